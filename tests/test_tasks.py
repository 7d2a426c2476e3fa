"""Tasks: every layout gives the same rows, bad input one line, and roles that do not depend on file order."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from undo_ray import tasks
from undo_ray.tasks import draw, get, load, normal, parse_source, roles
from undo_ray.types import PROBLEM_FIELDS, UserError

GOOD = {"id": "gsm8k-train-0", "question": "One pen costs 2 coins. What do 3 cost?", "answer": "6"}
HUB = {"question": "One pen costs 2 coins. What do 3 cost?", "answer": "3*2 = <<3*2=6>>6\n#### 6"}


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="\n")
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("UNDO_RAY_TEST_DATA")
    if not folder:
        pytest.skip("UNDO_RAY_TEST_DATA is not set: no benchmark files to load")
    return Path(folder)


SIZES = [("gsm8k", "train", 7473), ("gsm8k", "test", 1319), ("svamp", "train", 700), ("svamp", "test", 300)]


@pytest.mark.parametrize(("name", "split", "size"), SIZES)
def test_both_local_layouts_give_the_same_rows(data: Path, tmp_path: Path, name: str, split: str, size: int) -> None:
    rows = load(get(name), split, str(data))
    assert len(rows) == size
    assert all(list(row) == list(PROBLEM_FIELDS) and row["task"] == name and row["split"] == split for row in rows)
    assert pa.Table.from_pylist(rows, schema=pa.schema(list(PROBLEM_FIELDS.items()))).num_rows == size
    (tmp_path / name).symlink_to(data / name / "raw")
    assert load(get(name), split, str(tmp_path)) == rows
    assert load(get(name), split, str(data / name)) == rows
    if name == "gsm8k":
        assert [row["id"] for row in rows] == [f"gsm8k/{split}/{index}" for index in range(size)]


def test_hub_rows_are_mapped_like_files(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*name: str | None, split: str) -> Any:
        asked.append((*name, split))
        folder = {"openai/gsm8k": "gsm8k", "ChilleD/SVAMP": "svamp"}[str(name[0])]
        path = str(data / folder / "raw" / f"{split}.jsonl")
        return datasets.Dataset.from_json(path, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("gsm8k", "svamp"):
        assert load(get(name), "test", None) == load(get(name), "test", str(data))
    assert asked == [("openai/gsm8k", "main", "test"), ("ChilleD/SVAMP", None, "test")]


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*name: str | None, split: str) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "openai/gsm8k train did not load from the hub (no route); set data.dir" in refusal(
        lambda: load(get("gsm8k"), "train", None)
    )


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    table = pa.Table.from_pylist([HUB, {**HUB, "question": "Two?"}])
    pyarrow.parquet.write_table(table, tmp_path / "gsm8k" / "main" / "train-00000-of-00001.parquet")
    rows = load(get("gsm8k"), "train", str(tmp_path))
    assert [(row["id"], row["answer"]) for row in rows] == [("gsm8k/train/0", "6"), ("gsm8k/train/1", "6")]


def test_lines_end_at_newline_alone(tmp_path: Path) -> None:
    question = "a\u2028b\u2029c\u0085d\x0b?"
    write(tmp_path / "train.jsonl", "\ufeff" + json.dumps(GOOD), "", {**GOOD, "id": "x", "question": question})
    rows = load(get("gsm8k"), "train", str(tmp_path))
    assert [row["question"] for row in rows] == [GOOD["question"], question]
    assert [row["id"] for row in rows] == ["gsm8k/train/0", "gsm8k/train/x"]


def test_mini_is_generated() -> None:
    rows = load(get("mini"), "test", None)
    assert rows == load(get("mini"), "test", "/nowhere")
    assert rows[0]["id"] == "mini/test/0" and list(rows[0]) == list(PROBLEM_FIELDS)
    assert get("mini").instruction == ""


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (["{"], ["train.jsonl, line 1", "not JSON"]),
        ([GOOD, "[" * 100_000], ["train.jsonl, line 2", "not JSON"]),
        ([GOOD, [1]], ["train.jsonl, row 2", "list"]),
        (
            [GOOD, {"prompt": "?", "answer": "#### 6"}],
            ["row 2", "no column question", "prompt, answer", "id, question, answer"],
        ),
        ([{"id": "1", "prompt": "?"}], ["row 1", "no column question, answer"]),
        ([HUB, {**HUB, "answer": "six"}], ["row 2", "answer must be a text that is not empty"]),
        ([{**GOOD, "question": " "}], ["row 1", "question must be a text that is not empty"]),
        ([{**GOOD, "answer": 6}], ["row 1", "answer must be a text"]),
        ([{**GOOD, "answer": "many"}], ["row 1", "'many' is not a number"]),
        ([{**GOOD, "answer": "1/0"}], ["row 1", "not a number"]),
        (['{"id": "1", "question": "\\ud800", "answer": "6"}'], ["row 1", "surrogate"]),
        ([GOOD, {**GOOD, "id": "1"}, GOOD], ["id 'gsm8k/train/0' in rows 1 and 3"]),
        ([], ["train.jsonl", "split 'train' of gsm8k is empty"]),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[object], parts: list[str]) -> None:
    write(tmp_path / "train.jsonl", *rows)
    message = refusal(lambda: load(get("gsm8k"), "train", str(tmp_path)))
    assert all(part in message for part in [str(tmp_path), *parts]), message


def test_bad_folders_and_files(tmp_path: Path) -> None:
    gsm8k = get("gsm8k")
    assert "data folder /nowhere is not there; set data.dir" in refusal(lambda: load(gsm8k, "train", "/nowhere"))
    message = refusal(lambda: load(gsm8k, "test", str(tmp_path)))
    assert "tried test.jsonl, raw/test.jsonl" in message and str(tmp_path) in message
    write(tmp_path / "svamp" / "test.jsonl", GOOD)
    assert "holds svamp, not gsm8k" in refusal(lambda: load(gsm8k, "test", str(tmp_path / "svamp")))
    assert "no split 'dev'; use one of train, test" in refusal(lambda: load(gsm8k, "dev", str(tmp_path)))
    (tmp_path / "test.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "not readable as UTF-8" in refusal(lambda: load(gsm8k, "test", str(tmp_path)))
    (tmp_path / "train.parquet").write_bytes(b"PAR0")
    assert "not a readable Parquet file" in refusal(lambda: load(gsm8k, "train", str(tmp_path)))


OWN_TASK = '''
"""A user's benchmark."""
from undo_ray.tasks import Task

WORDS = Task(
    name="words", source="mine", kind="number", instruction="Say a number.", splits=("train", "dev"),
    columns=("q", "a"),
    from_hub=lambda row, index, split: {"id": f"words/{split}/{index}", "question": row["q"], "answer": row["a"]},
)
NOT_A_TASK = 1
'''


def test_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_words.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    task, split = parse_source("own_words:WORDS/dev", "train")
    write(tmp_path / "dev.jsonl", {"q": "2 + 2?", "a": "4"})
    (row,) = load(task, split, str(tmp_path))
    assert (row["id"], row["task"]) == ("words/dev/0", "own_words:WORDS")
    assert get(row["task"]).kind == "number"  # how a worker finds the grader
    assert "own_words has no NONE" in refusal(lambda: get("own_words:NONE"))
    assert "is a int, not an undo_ray.tasks.Task" in refusal(lambda: get("own_words:NOT_A_TASK"))
    assert "no module 'no_such_module'" in refusal(lambda: get("no_such_module:TASK"))


def test_sources() -> None:
    assert parse_source("gsm8k", "train") == (get("gsm8k"), "train")
    assert parse_source(" svamp/test ", "train") == (get("svamp"), "test")
    assert "task 'gsm9k' is unknown; use one of gsm8k, mini, svamp" in refusal(lambda: parse_source("gsm9k", "train"))
    assert "no split 'validation'; use one of train, test" in refusal(lambda: parse_source("gsm8k", "validation"))
    assert "task '' is unknown" in refusal(lambda: parse_source("/train", "train"))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_is_whole(name: str) -> None:
    task = get(name)
    assert task.name == name == task.reference
    assert task.source and task.splits
    assert task.generate or (task.hub[0] and task.columns and task.from_hub)


def rows_of(n: int, prefix: str = "t") -> list[dict[str, Any]]:
    return [{"id": f"{prefix}/{i}", "question": f"What is {prefix} {i}?", "split": "x"} for i in range(n)]


def test_draw_does_not_depend_on_order() -> None:
    rows = rows_of(100)
    shuffled = random.Random(1).sample(rows, 100)
    assert draw(rows, 10, 0, "a") == draw(shuffled, 10, 0, "a")
    assert draw(rows, 10, 0, "a") == draw(rows, 20, 0, "a")[:10]
    assert draw(rows, 10, 0, "a") != draw(rows, 10, 1, "a") != draw(rows, 10, 1, "b")
    assert "a: 101 questions asked for, 100 there" in refusal(lambda: draw(rows, 101, 0, "a"))
    # Pinned: another order would silently be another experiment.
    assert [row["id"] for row in draw(rows, 3, 0, "validation")] == ["t/12", "t/62", "t/21"]


def ids(rows: list[dict[str, Any]], split: str) -> list[str]:
    return [row["id"] for row in rows if row["split"] == split]


def test_roles_are_disjoint() -> None:
    rows, removed = roles(rows_of(100), None, show=5, select=15, seed=0)
    assert removed == 0
    assert [len(ids(rows, split)) for split in ("train", "show", "select")] == [80, 5, 15]
    assert len({row["id"] for row in rows}) == 100
    again, _ = roles(rows_of(100)[::-1], None, show=5, select=15, seed=0)
    assert again == rows
    limited, _ = roles(rows_of(100), None, show=5, select=15, seed=0, train_limit=7)
    assert ids(limited, "train") == ids(rows, "train")[:7]


def test_roles_from_a_validation_source() -> None:
    validation = [{"id": f"v/{i}", "question": f"what is  T {i}!"} for i in range(4)] + rows_of(10, "v2")
    rows, removed = roles(rows_of(100), validation, show=4, select=10, seed=0)
    assert removed == 4
    assert len(ids(rows, "train")) == 96
    assert sorted(ids(rows, "show") + ids(rows, "select")) == sorted(row["id"] for row in validation)


def test_repeated_questions_have_one_role() -> None:
    doubled = rows_of(50) + [{**row, "id": row["id"] + "b"} for row in rows_of(50)]
    rows, removed = roles(doubled, None, show=10, select=10, seed=0)
    held = [row["question"] for row in rows if row["split"] != "train"]
    assert len(set(held)) == 20 and removed == 20
    assert not {normal(row["question"]) for row in rows if row["split"] == "train"} & set(map(normal, held))


def test_shared_draw() -> None:
    rows, _ = roles(rows_of(30), None, show=20, select=200, seed=0, shared=True)
    assert [len(ids(rows, split)) for split in ("train", "show", "select")] == [10, 20, 0]


def test_impossible_roles() -> None:
    message = refusal(lambda: roles(rows_of(50), None, show=20, select=50, seed=0))
    assert "validation larger than training: data.show + data.select = 70, but there are 50" in message
    assert "larger than its source" in refusal(lambda: roles(rows_of(50), rows_of(5, "v"), show=2, select=5, seed=0))
    assert "no training question is left" in refusal(lambda: roles(rows_of(50), None, show=20, select=30, seed=0))


def test_no_heavy_imports() -> None:
    code = (
        "import sys, undo_ray.tasks as t, undo_ray.grading, undo_ray.frame; [t.get(n) for n in t.TASKS];"
        "print([m for m in ('torch', 'ray', 'vllm', 'datasets', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
