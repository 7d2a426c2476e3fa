"""finetune() through Ray Train: one worker or two learn the same, and what is exported is what was trained."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import runs
import tiny

from undo_ray import config
from undo_ray.progress import Progress
from undo_ray.store import open_run
from undo_ray.train import finetune
from undo_ray.train.tokens import held_out
from undo_ray.types import LESSONS, UserError

HELD = 0.1
ROOT = Path(__file__).parent.parent
CHATS = [
    {
        "id": f"t/{i}",
        "round": 0,
        "messages": [{"role": "user", "content": f"What is {i} + 2?"}, {"role": "assistant", "content": f"{i} + 2 = {i + 2}"}],
    }
    for i in range(48)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [message["content"] for chat in CHATS for message in chat["messages"]]
    return tiny.make(tmp_path_factory.mktemp("base"), "qwen2", texts, seed=5)


def train(run_dir: Path, base: str, *sets: str) -> tuple[Path, dict[str, Any]]:
    """(exported directory, the stage's figures) of fine-tuning the tiny model on CHATS."""
    import ray.data

    spec = ("student.tokens=", "student.epochs=4", "student.learning_rate=5e-3", "student.batch_size=8", *sets)
    recipe = config.load(ROOT / "jobs/recipes/mini.toml", [f"student.model={base}", f"student.held_out={HELD}", *spec])
    with open_run(str(run_dir), recipe, {}, Progress(io.StringIO())) as run:
        lessons = ray.data.from_arrow(pa.Table.from_pylist(CHATS, schema=LESSONS))
        exported = run.round(0).once("student", finetune, lessons, base, recipe)
        manifest = json.loads((run_dir / "round-00/student/manifest.json").read_text())
    return Path(exported), manifest["figures"]


def loss(directory: str | Path, chats: list[dict[str, Any]] = CHATS) -> float:
    """Mean loss on the answers' tokens, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from undo_ray.train.tokens import supervised

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    total, count = 0.0, 0
    for chat in chats:
        ids, prompt = supervised(tokenizer, chat["messages"])
        labels = torch.tensor([[-100] * prompt + ids[prompt:]])
        with torch.inference_mode():
            total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * (len(ids) - prompt)
        count += len(ids) - prompt
    return total / count


def on_a_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A call in the background; its result, or the error, comes into the list."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # the test looks at it
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def wait_for_a_checkpoint(stage: Path, seconds: float = 120) -> None:
    """Until Ray Train knows of one: it asks its workers now and then."""
    deadline = time.monotonic() + seconds
    while not any("step-" in file.read_text() for file in stage.glob("resume/*/train/train/checkpoint_manager_snapshot.json")):
        assert time.monotonic() < deadline, f"no checkpoint in {stage} within {seconds} s"
        time.sleep(0.05)


def weights(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(directory / "model.safetensors"))


@pytest.fixture(scope="module")
def one(cluster: None, base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One worker's student of four passes."""
    return train(tmp_path_factory.mktemp("one"), base)


def test_the_export_is_a_hugging_face_directory_with_its_chat_template(one: tuple[Path, dict[str, Any]], base: str) -> None:
    from transformers import AutoTokenizer

    exported, figures = one
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in exported.iterdir()
    }
    assert AutoTokenizer.from_pretrained(exported).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert figures["too_long"] == 0 and figures["chats"] == 48 and figures["resumes"] == []
    assert not (exported.parent.parent / "resume").exists(), "what only training needed is gone"


def test_the_lessons_held_out_are_measured_before_and_after(one: tuple[Path, dict[str, Any]], base: str) -> None:
    exported, figures = one
    held = [chat for chat in CHATS if held_out((chat["id"], 0), 0, HELD)]
    assert figures["held_out"] == len(held) > 0
    assert figures["held_out_nll"]["before"] == pytest.approx(loss(base, held), rel=1e-4)
    assert figures["held_out_nll"]["after"] == pytest.approx(loss(exported, held), rel=1e-4)


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=pytest.mark.slow), "zero3"])
def test_two_workers_learn_what_one_learns(one: tuple[Path, dict[str, Any]], base: str, tmp_path: Path, mode: str) -> None:
    two, figures = train(tmp_path / "two", base, "student.workers=2", f"student.sharding={mode}", "student.micro_tokens=40")
    assert figures["steps"] == one[1]["steps"] and figures["passes"] == one[1]["passes"] >= 4
    before, after = loss(base), loss(one[0])
    assert after < 0.6 * before, f"loss on the lessons went from {before} to {after}"
    assert loss(two) == pytest.approx(after, rel=1e-3), "the same global batches, summed in another order"
    assert figures["loss"]["last"] == pytest.approx(one[1]["loss"]["last"], rel=1e-3)


def training_workers(count: int, seconds: float = 30) -> list[psutil.Process]:
    """Ray Train's workers below this process, once those of an earlier test are gone."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # gone between two looks, or dead and not yet reaped
                found += [child] if "RayTrainWorker" in " ".join(child.cmdline()) else []
        if len(found) == count:
            return found
        assert time.monotonic() < deadline, f"{len(found)} training workers, {count} expected"
        time.sleep(0.05)


LONG = ("student.epochs=48", "student.learning_rate=1e-3", "student.checkpoint_steps=20")


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    cluster: None, base: str, tmp_path: Path
) -> None:
    whole, figures = train(tmp_path / "whole", base, *LONG)
    sets = (*LONG, "student.workers=2", "student.sharding=fsdp2")
    thread, found = on_a_thread(lambda: train(tmp_path / "killed", base, *sets))
    wait_for_a_checkpoint(tmp_path / "killed/round-00/student")
    training_workers(2)[1].kill()
    thread.join(timeout=300)
    assert found and not isinstance(found[0], BaseException), found
    killed, after = found[0]
    assert after["resumes"] and all(step % 20 == 0 for step in after["resumes"])
    assert after["steps"] == figures["steps"]
    assert after["loss"]["last"] == pytest.approx(figures["loss"]["last"], rel=1e-2)
    assert loss(killed) == pytest.approx(loss(whole), rel=1e-2)


def test_loss_that_is_not_finite_stops_with_what_was_seen(cluster: None, base: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training stopped at step \d+ of 21: .*lower student\.learning_rate") as caught:
        train(tmp_path / "run", base, "student.learning_rate=1e30", "student.max_grad_norm=1e30")
    assert "\n" not in str(caught.value)


def test_chats_longer_than_the_limit_are_left_out_and_when_none_fits_it_says_so(
    cluster: None, base: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"student\.max_length = 4: none of the 48 lessons fits"):
        train(tmp_path / "run", base, "student.max_length=4")


def test_a_template_that_drops_the_answer_is_told_in_one_line_with_the_chat(cluster: None, base: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(base, tmp_path / "broken")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message.content }}", "{{ message.content[:3] }}")
    tokenizer.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"drops or rewrites part of this chat.*Wha.*48 of 48 lessons") as caught:
        train(tmp_path / "run", str(tmp_path / "broken"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    sets = (
        "data.train_limit=60",
        "data.select=10",
        "data.show=4",
        "data.tests=[]",
        "rounds=0",
        "student.tokens=150000",
        "student.checkpoint_steps=20",
        "student.held_out=0.2",
        'student.engine={batch_size = 64, lifetime = "run", resources = {cpus = 0.5}}',
        'teacher.engine={batch_size = 64, lifetime = "run", resources = {cpus = 0.5}}',
    )
    stage = tmp_path / "run/round-00/student"
    process = runs.start("mini", tmp_path / "run", *sets)
    wait_for_a_checkpoint(stage)
    process.kill()
    process.communicate()
    assert not (stage / "manifest.json").exists()
    output = runs.run("mini", tmp_path / "run", *sets)
    assert "a lesson as it is trained on: no loss on '<bos> <user>" in output
    manifest = json.loads((stage / "manifest.json").read_text())
    assert manifest["figures"]["resumes"] and not (stage / "resume").exists()
    [record] = runs.report(tmp_path / "run")["rounds"]
    assert record["training"]["held_out_nll"]["after"] < record["training"]["held_out_nll"]["before"]
