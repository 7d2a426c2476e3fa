"""The whole loop through the real parts, as a user runs it: report, ledger, resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import runs
import tiny

from undo_ray import gap, grading, prompts, tasks
from undo_ray.gap import Gap

SMALL = (
    "data.train_limit=150",
    "data.show=20",
    "data.select=50",
    "data.test_limit=40",
    'data.tests=["gsm8k/test", "svamp/test"]',
    "rounds=1",
    "lessons.keep_wrong=true",
    "teacher.prompt_tokens=2000",
    "teacher.sampling={temperature = 1.0, max_tokens = 64}",
    "student.sampling={temperature = 0.0, max_tokens = 32}",
    "student.epochs=1",
    "student.workers=1",
    "student.dtype=float32",
    "student.resources={cpus = 1, gpus = 0}",
)
TRAIN_SPLITS = ["train"] * 150 + ["show"] * 20 + ["select"] * 50


def engine(kind: str, kept: bool) -> str:
    lifetime = ', lifetime = "run", resources = {cpus = 0.5}' if kept else ""
    return f'{{kind = "{kind}", dtype = "float32", context = 4096, batch_size = 64{lifetime}}}'


def overrides(data_dir: Path, models: Path, kind: str) -> tuple[str, ...]:
    return (
        *SMALL,
        f"data.dir={data_dir}",
        f"teacher.model={os.path.relpath(models, runs.ROOT)}/teacher",
        f"student.model={os.path.relpath(models, runs.ROOT)}/student",
        f"teacher.engine={engine(kind, kept=kind == 'vllm')}",  # it starts slowly; the other lives for a stage
        f"student.engine={engine(kind, kept=True)}",
    )


def make_models(data_dir: Path, directory: Path, architecture: str) -> Path:
    """A tiny teacher and student with a tokenizer trained on GSM8K's own text."""
    with (data_dir / "gsm8k/train.jsonl").open(encoding="utf-8", newline="\n") as file:
        texts = [json.loads(next(file))["question"] for _ in range(500)]
    for seed, name in enumerate(("teacher", "student")):
        tiny.make(directory / name, architecture, texts, seed=seed)
    return directory


@pytest.fixture(scope="module")
def qwen(joined: None, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...], str]:
    """A finished run on GSM8K with Qwen2 architecture and the transformers engine: (run directory, overrides, output)."""
    home = tmp_path_factory.mktemp("qwen")
    sets = overrides(data_dir, make_models(data_dir, home / "models", "qwen2"), "transformers")
    return home / "run", sets, runs.run("gsm8k", home / "run", *sets)


def check_rows(run_dir: Path) -> None:
    """What must hold of the committed rows of any two-round run with SMALL."""
    problems = runs.rows(run_dir, "problems")
    ids = [row["id"] for row in problems]
    assert len(set(ids)) == len(ids) == 220
    assert sorted(row["split"] for row in problems) == sorted(TRAIN_SPLITS)
    by_split = {split: {row["id"] for row in problems if row["split"] == split} for split in ("train", "show", "select")}

    for stage in ("round-00/rationales", "round-01/attempts", "round-01/rationales"):
        assert [row["id"] for row in runs.rows(run_dir, stage)] == ids, f"{stage} must return exactly the ids it was given"
    for k in (0, 1):
        explained = runs.rows(run_dir, f"round-0{k}/rationales")
        asked = by_split["train"] | (by_split["show"] if k == 0 else set())
        assert {row["id"] for row in explained if row["candidates"]} == asked
        for row in explained:
            for candidate in row["candidates"]:
                if candidate["finish_reason"] == "length":
                    assert candidate["verdict"]["reason"] == candidate["refused"] == "truncated"
                elif candidate["verdict"]["reason"] != "format":
                    kind = tasks.get(row["task"]).kind
                    assert candidate["verdict"]["correct"] == grading.grade(candidate["rationale"], row, kind).correct
        accepted = {row["id"] for row in explained if row["split"] == "train" and row["lesson"] and row["lesson"]["round"] == k}
        lessons = runs.rows(run_dir, f"round-0{k}/lessons")
        assert lessons and {lesson["id"] for lesson in lessons} <= accepted
        texts = [lesson["messages"][-1]["content"] for lesson in lessons]
        assert len({(lesson["messages"][0]["content"], text) for lesson, text in zip(lessons, texts, strict=True)}) == len(
            texts
        )
        assert {row["id"] for row in runs.rows(run_dir, f"round-0{k}/measure")} == by_split["show"] | by_split["select"]

    attempted = [row for row in runs.rows(run_dir, "round-01/attempts") if row["split"] == "train"]
    assert all(row["history"][-1]["attempt"] == row["attempt"]["text"] and row["attempt"]["round"] == 0 for row in attempted)


def check_prompts(run_dir: Path) -> None:
    """The teacher of round 1 was shown exactly Δ(0), and each question its own history: its token counts say so."""
    from transformers import AutoTokenizer

    from undo_ray.engines import prompt_ids

    recipe = json.loads((run_dir / "recipe.json").read_text())["recipe"]
    delta = Gap.from_json(json.loads((run_dir / "round-00/measure/manifest.json").read_text())["value"])
    show = runs.rows(run_dir, "round-00/measure")
    assert [case.question for case in delta.shown] == [row["question"] for row in show if row["split"] == "show"]
    tokenizer = AutoTokenizer.from_pretrained(runs.ROOT / recipe["teacher"]["model"])
    report = runs.report(run_dir)
    shown = delta.shown[: report["rounds"][1]["shown"]]
    assert 0 < len(shown) <= 20
    before, prefix = {row["id"]: row for row in runs.rows(run_dir, "round-01/attempts")}, report["rounds"][1]["prefix"]
    asked = []
    for row in runs.rows(run_dir, "round-01/rationales")[:40]:
        if row["split"] == "train":
            instruction = tasks.get("gsm8k").instruction
            chat = prompts.TEMPLATES["prefix"].render(shown, prompts.own_case(before[row["id"]]), instruction)
            asked.append(prompt_ids(tokenizer, chat))
            assert row["candidates"][0]["prompt_tokens"] == len(asked[-1])
    shared = next(n for n, (one, other) in enumerate(zip(min(asked), max(asked), strict=False)) if one != other)
    assert shared == prefix["tokens"] > 1000
    # vLLM's CPU build keeps whole blocks of 128 tokens; the other engine keeps every token.
    block = 128 if recipe["teacher"]["engine"]["kind"] == "vllm" else 1
    assert prefix["cached"] >= 0.98 * (prefix["tokens"] // block * block) / prefix["tokens"]


def check_report(run_dir: Path) -> None:
    """The schema of report.json, and that its figures are those of the rows."""
    report = runs.report(run_dir)
    assert report["primary_test"] == "gsm8k" and report["feedback"] == "real" and report["seed"] == 0
    assert report["keep_wrong"] is True and report["shared_validation"] is False
    assert [record["round"] for record in report["rounds"]] == [0, 1]
    accuracies = [record["validation"]["accuracy"] for record in report["rounds"]]
    assert report["best_round"] == gap.best(accuracies)
    for record in report["rounds"]:
        explained = [row for row in runs.rows(run_dir, f"round-0{record['round']}/rationales") if row["candidates"]]
        candidates = [candidate for row in explained for candidate in row["candidates"]]
        for name in ("prompt", "cached", "completion"):
            assert record["teacher_tokens"][name] == sum(candidate[f"{name}_tokens"] for candidate in candidates)
        refused = [candidate["refused"] for candidate in candidates if candidate["refused"]]
        assert record["refused"] == {reason: refused.count(reason) for reason in set(refused)}
        assert record["lessons"] == len(runs.rows(run_dir, f"round-0{record['round']}/lessons"))
        assert record["validation"]["n"] == 50 and set(record["tests"]) == {"gsm8k", "svamp"}
        for score in (record["validation"], *record["tests"].values()):
            assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1 and 0 <= score["unparsed"] <= 1
        stages = {"rationales", "lessons", "student", "measure"} | ({"attempts"} if record["round"] else set())
        assert set(record["seconds"]) == stages and all(seconds > 0 for seconds in record["seconds"].values())
    tests = report["rounds"][0]["tests"]["gsm8k"]
    assert report["baseline_test_accuracy"] == tests["accuracy"] and tests["n"] == 40
    assert report["final_test_accuracy"] == report["rounds"][report["best_round"]]["tests"]["gsm8k"]["accuracy"]
    assert report["base_test_accuracy"] == report["base_tests"]["gsm8k"]["accuracy"]


def test_two_rounds_on_gsm8k_with_transformers(qwen: tuple[Path, tuple[str, ...], str]) -> None:
    run_dir, _, output = qwen
    check_rows(run_dir)
    check_prompts(run_dir)
    check_report(run_dir)
    assert "keep_wrong" in output and "gsm8k" in output and os.path.relpath(run_dir, runs.ROOT) in output
    cached = runs.report(run_dir)["rounds"][1]["teacher_tokens"]
    assert cached["cached"] > 0.5 * cached["prompt"], "the shown examples come first, so their keys and values are shared"


def test_a_finished_run_is_not_run_again(qwen: tuple[Path, tuple[str, ...], str]) -> None:
    run_dir, sets, _ = qwen
    before = (run_dir / "report.json").read_bytes()
    assert "finished" in runs.run("gsm8k", run_dir, *sets)
    assert (run_dir / "report.json").read_bytes() == before


def test_another_identity_is_refused_by_key_and_values(qwen: tuple[Path, tuple[str, ...], str]) -> None:
    run_dir, sets, _ = qwen
    output = runs.run("gsm8k", run_dir, *sets, "student.learning_rate=0.5", code=4)
    assert "student.learning_rate" in output and "0.5" in output and "1e-05" in output


def test_a_model_that_is_evaluated_scores_what_it_scores_in_a_run(
    qwen: tuple[Path, tuple[str, ...], str], tmp_path: Path
) -> None:
    run_dir, sets, _ = qwen
    output = runs.run("gsm8k", tmp_path / "run", *sets, job="evaluate")
    found, base = json.loads((tmp_path / "run/evaluation.json").read_text()), runs.report(run_dir)["base_tests"]
    assert found["tests"] == base and f"of {base['gsm8k']['n']}" in output
    assert "student.model" in runs.run("gsm8k", tmp_path / "run", *sets, 'student.model="other"', job="evaluate", code=2)


def test_no_accepted_rationale_ends_in_order_with_exit_code_3(
    data_dir: Path, qwen: tuple[Path, tuple[str, ...], str], tmp_path: Path
) -> None:
    _, sets, _ = qwen
    output = runs.run(
        "gsm8k", tmp_path / "run", *sets, "lessons.keep_wrong=false", "data.train_limit=40", "data.select=5", code=3
    )
    assert "no rationale was accepted" in output.splitlines()[-1]
    assert len(runs.rows(tmp_path / "run", "round-00/rationales")) == 65, "what was computed stays"


@pytest.mark.slow
def test_two_rounds_on_gsm8k_with_vllm_resume_after_a_kill(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    sets = overrides(data_dir, make_models(data_dir, tmp_path / "models", "llama"), "vllm")
    run_dir = tmp_path / "run"
    runs.kill_in(runs.start("gsm8k", run_dir, *sets), run_dir / "round-01/rationales")
    committed = {path: path.read_bytes() for path in run_dir.rglob("*.parquet") if "round-01/rationales" not in str(path)}
    assert len(committed) >= 4
    runs.run("gsm8k", run_dir, *sets)
    assert all(path.read_bytes() == before for path, before in committed.items()), "committed rows are never touched"
    check_rows(run_dir)
    check_prompts(run_dir)
    check_report(run_dir)
    assert runs.report(run_dir)["resumes"] == 1
