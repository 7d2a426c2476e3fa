"""finetune() through Ray Train: one worker or two learn the same, and what is exported is what was trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny

from undo_ray import config
from undo_ray.progress import Progress
from undo_ray.store import open_run
from undo_ray.train import finetune
from undo_ray.types import LESSONS, UserError

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
    recipe = config.load(ROOT / "jobs/recipes/mini.toml", [f"student.model={base}", *spec])
    with open_run(str(run_dir), recipe, {}, Progress(io.StringIO())) as run:
        lessons = ray.data.from_arrow(pa.Table.from_pylist(CHATS, schema=LESSONS))
        exported = run.round(0).once("student", finetune, lessons, base, recipe)
        manifest = json.loads((run_dir / "round-00/student/manifest.json").read_text())
    return Path(exported), manifest["figures"]


def loss(directory: str | Path) -> float:
    """Mean loss on the answers' tokens, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from undo_ray.train import supervised

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    total, count = 0.0, 0
    for chat in CHATS:
        ids, prompt = supervised(tokenizer, chat["messages"])
        labels = torch.tensor([[-100] * prompt + ids[prompt:]])
        with torch.inference_mode():
            total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * (len(ids) - prompt)
        count += len(ids) - prompt
    return total / count


def test_two_workers_learn_what_one_learns(cluster: None, base: str, tmp_path: Path) -> None:
    one, figures = train(tmp_path / "one", base)
    two, of_two = train(tmp_path / "two", base, "student.workers=2", "student.micro_batch=2")
    assert figures["steps"] == of_two["steps"] == 24 and figures["passes"] == 4.0
    before, after = loss(base), loss(one)
    assert after < 0.6 * before, f"loss on the lessons went from {before} to {after}"
    assert loss(two) == pytest.approx(after, rel=0.02), "the same global batches, summed in another order"
    assert figures["loss"]["last"] == pytest.approx(of_two["loss"]["last"], rel=0.02)


def test_the_export_is_a_hugging_face_directory_with_its_chat_template(cluster: None, base: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    exported, figures = train(tmp_path / "run", base)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in exported.iterdir()
    }
    assert AutoTokenizer.from_pretrained(exported).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert figures["too_long"] == 0 and figures["chats"] == 48
    assert not list((tmp_path / "run").rglob("tokens")), "what only training needed is gone"


def test_chats_longer_than_the_limit_are_left_out_and_when_none_fits_it_says_so(
    cluster: None, base: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"student\.max_length = 4: none of the 48 lessons fits"):
        train(tmp_path / "run", base, "student.max_length=4")
