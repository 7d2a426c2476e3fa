"""Tasks: every layout gives the same rows, bad input one line, and roles that do not depend on file order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from undo_ray import tasks
from undo_ray.grading import KINDS
from undo_ray.tasks import get, load, parse_source
from undo_ray.tasks.math import boxed
from undo_ray.types import PROBLEM_FIELDS, UserError

ROOT = Path(__file__).resolve().parent.parent
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


PICTURES = {"left out: needs a picture": 53}
EMPTY = {"left out: empty box": 2}
SOURCES = [
    ("gsm8k", "train", 7473, {}),
    ("gsm8k", "test", 1319, {}),
    ("svamp", "train", 700, {}),
    ("svamp", "test", 300, {}),
    ("math", "train", 7498, {}),
    ("math", "test", 5000, {}),
    ("math", "math500", 500, {}),
    ("mmlu_pro", "test", 12032, {}),
    ("mmlu_pro", "validation", 70, {}),
    ("strategyqa", "train", 1603, {}),
    ("strategyqa", "test", 687, {}),
    ("theoremqa", "test", 747, PICTURES),
]
RAW = {
    ("math", "train"): (7498, EMPTY),
    ("math", "test"): (700, {}),  # the first 100 of each subject are there
    ("mmlu_pro", "test"): (1401, {"kept: letter and index disagree, the letter counts": 1}),
}
"""Where the copy in the hub's layout holds other rows than the normalised one."""


@pytest.mark.parametrize(("name", "split", "size", "odd"), SOURCES)
def test_the_normalised_layout(data: Path, name: str, split: str, size: int, odd: dict[str, int]) -> None:
    rows, counts = load(get(name), split, str(data))
    assert len(rows) == size and counts == odd
    assert all(list(row) == list(PROBLEM_FIELDS) and row["task"] == name and row["split"] == split for row in rows)
    assert pa.Table.from_pylist(rows, schema=pa.schema(list(PROBLEM_FIELDS.items()))).num_rows == size
    assert load(get(name), split, str(data / name)) == (rows, counts)
    if name in ("gsm8k", "strategyqa"):
        assert [row["id"] for row in rows] == [f"{name}/{split}/{index}" for index in range(size)]


@pytest.mark.parametrize(("name", "split", "size", "odd"), [row for row in SOURCES if row[1] != "validation"])
def test_the_hub_layout_gives_the_same_rows(
    data: Path, tmp_path: Path, name: str, split: str, size: int, odd: dict[str, int]
) -> None:
    (tmp_path / name).symlink_to(data / name / "raw")
    rows, counts = load(get(name), split, str(tmp_path))
    assert (len(rows), counts) == RAW.get((name, split), (size, odd))
    same = {row["id"]: row for row in load(get(name), split, str(data))[0]}
    if name == "theoremqa":  # its files know the field, the hub does not
        same = {key: {**row, "subject": None} for key, row in same.items()}
    assert all(row == same[row["id"]] for row in rows)


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "math", "strategyqa"])
def test_worked_solutions_are_the_same_from_both_layouts_and_kept_only_when_asked_for(
    data: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).symlink_to(data / name / "raw")
    from_hub, normalised = (load(get(name), "train", str(folder), solutions=True)[0] for folder in (tmp_path, data))
    solutions = [row["solution"] for row in normalised]
    assert [row["solution"] for row in from_hub] == solutions and all(solutions)
    assert not any("<<" in solution and ">>" in solution for solution in solutions)
    assert all(row["solution"] is None for row in load(get(name), "train", str(data))[0])


def test_gsm8ks_notes_for_a_calculator_are_no_part_of_a_solution(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", HUB)
    assert load(get("gsm8k"), "train", str(tmp_path), solutions=True)[0][0]["solution"] == "3*2 = 6"


def test_files_of_ones_own_are_sources_too(data: Path, tmp_path: Path) -> None:
    file = data / "svamp" / "mawps_asdiv_a_train.jsonl"
    task, split = parse_source(f"svamp/{file}", "train")
    rows, _ = load(task, split, None)
    assert len(rows) == 3138 and rows[0]["id"] == "svamp/mawps_asdiv_a_train/mawps-asdiv-a-0"
    mine = write(tmp_path / "mine.jsonl", {"id": "a", "question": "Which is odd?", "answer": "B", "choices": ["2", "3"]})
    assert load(*parse_source(f"mmlu_pro/{mine}", "train"), str(data))[0][0]["id"] == "mmlu_pro/mine/a"
    assert "not readable" in refusal(lambda: load(*parse_source("svamp/none.jsonl", "train"), None))


def test_recorded_answers_are_joined_by_the_ids_of_the_files(data: Path) -> None:
    for name, split in (("math", "math500"), ("theoremqa", "test"), ("mmlu_pro", "test"), ("gsm8k", "test")):
        known = tasks.by_own_id(get(name), split, str(data))
        file = {"math": "math500_rho_cot", "gsm8k": "gsm8k_rho_cot"}.get(name, f"{name}_samples")
        with (data / "graded" / f"{file}.jsonl").open(encoding="utf-8", newline="\n") as lines:
            graded = [json.loads(line) for line in lines]
        found = [row for row in graded if str(row["question_id"]) in known]
        assert len(found) > 0.9 * len(graded)  # TheoremQA's answers include questions that need a picture
        assert all(known[str(row["question_id"])]["answer"].replace(",", "") == row["gold"].replace(",", "") for row in found)


HUB_FOLDERS = {
    "openai/gsm8k": "gsm8k/raw",
    "ChilleD/SVAMP": "svamp/raw",
    "EleutherAI/hendrycks_math": "math/raw/hendrycks_math",
    "HuggingFaceH4/MATH-500": "math/raw/MATH-500",
    "TIGER-Lab/MMLU-Pro": "mmlu_pro/raw",
    "ChilleD/StrategyQA": "strategyqa/raw",
    "TIGER-Lab/TheoremQA": "theoremqa/raw",
}


def test_hub_rows_are_mapped_like_files(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        folder = data / HUB_FOLDERS[name]
        path = folder / f"{split}.jsonl" if config in (None, "main") else folder / str(config) / f"{split}.jsonl"
        return datasets.Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "data").mkdir()
    for name, split in [("math", "math500"), *((name, "test") for name in tasks.TASKS if name not in ("mini", "numina"))]:
        (tmp_path / "data" / name).unlink(missing_ok=True)
        (tmp_path / "data" / name).symlink_to(data / name / "raw")
        assert load(get(name), split, None) == load(get(name), split, str(tmp_path / "data"))
    assert asked[:2] == [("HuggingFaceH4/MATH-500", None, "test"), ("openai/gsm8k", "main", "test")]
    subjects = [config for name, config, _ in asked if name == "EleutherAI/hendrycks_math"]
    assert len(subjects) == 7 and subjects == sorted(set(map(str, subjects)))


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "openai/gsm8k train did not load from the hub (no route); set data.dir" in refusal(
        lambda: load(get("gsm8k"), "train", None)
    )


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    table = pa.Table.from_pylist([HUB, {**HUB, "question": "Two?"}])
    pyarrow.parquet.write_table(table, tmp_path / "gsm8k" / "main" / "train-00000-of-00001.parquet")
    rows, _ = load(get("gsm8k"), "train", str(tmp_path))
    assert [(row["id"], row["answer"]) for row in rows] == [("gsm8k/train/0", "6"), ("gsm8k/train/1", "6")]


def test_shards_of_the_hub_are_read_in_order_and_all(tmp_path: Path) -> None:
    folder = tmp_path / "numina" / "data"
    folder.mkdir(parents=True)
    for shard in range(2):
        rows = [{"source": "made", "problem": f"Add {shard} and {i}.", "solution": f"\\boxed{{{shard + i}}}"} for i in range(3)]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / f"train-0000{shard}-of-00002.parquet")
    found, _ = load(get("numina"), "train", str(tmp_path))
    assert [row["id"] for row in found] == [f"numina/train/{index}" for index in range(6)]
    assert [row["answer"] for row in found] == ["0", "1", "2", "1", "2", "3"]
    (folder / "train-00001-of-00002.parquet").unlink()
    assert "no file for numina train" in (message := refusal(lambda: load(get("numina"), "train", str(tmp_path))))
    assert "1 of 2 shards" in message


def test_lines_end_at_newline_alone(tmp_path: Path) -> None:
    question = "a\u2028b\u2029c\u0085d\x0b?"
    write(tmp_path / "train.jsonl", "\ufeff" + json.dumps(GOOD), "", {**GOOD, "id": "x", "question": question})
    rows, _ = load(get("gsm8k"), "train", str(tmp_path))
    assert [row["question"] for row in rows] == [GOOD["question"], question]
    assert [row["id"] for row in rows] == ["gsm8k/train/0", "gsm8k/train/x"]


def test_mini_is_generated() -> None:
    rows, odd = load(get("mini"), "test", None)
    assert (rows, odd) == load(get("mini"), "test", "/nowhere") and odd == {}
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
        ([{**GOOD, "choices": "a or b"}], ["row 1", "choices must be a list of texts"]),
        ([{**GOOD, "choices": ["a", 2]}], ["row 1", "choices must be a list of texts"]),
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
    assert "words is not on the hub; set data.dir" in refusal(
        lambda: load(replace(gsm8k, name="words", hub=("", None)), "test", None)
    )
    (tmp_path / "test.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "not readable as UTF-8" in refusal(lambda: load(gsm8k, "test", str(tmp_path)))
    (tmp_path / "train.parquet").write_bytes(b"PAR0")
    assert "not readable as Parquet" in refusal(lambda: load(gsm8k, "train", str(tmp_path)))


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
    [row], _ = load(task, split, str(tmp_path))
    assert (row["id"], row["task"]) == ("words/dev/0", "own_words:WORDS")
    assert get(row["task"]).kind == "number"  # how a worker finds the grader
    assert "own_words has no NONE" in refusal(lambda: get("own_words:NONE"))
    assert "is a int, not an undo_ray.tasks.Task" in refusal(lambda: get("own_words:NOT_A_TASK"))
    assert "no module 'no_such_module'" in refusal(lambda: get("no_such_module:TASK"))


def test_sources() -> None:
    assert parse_source("gsm8k", "train") == (get("gsm8k"), "train")
    assert parse_source(" svamp/test ", "train") == (get("svamp"), "test")
    assert "task 'gsm9k' is unknown; use one of gsm8k, math, mini, mmlu_pro, numina" in refusal(
        lambda: parse_source("gsm9k", "train")
    )
    assert "no split 'validation'; use one of train, test" in refusal(lambda: parse_source("gsm8k", "validation"))
    assert "task '' is unknown" in refusal(lambda: parse_source("/train", "train"))
    assert parse_source("math/math500", "test") == (get("math"), "math500")
    for name in ("mmlu_pro", "theoremqa"):
        message = refusal(lambda name=name: parse_source(name, "train"))  # type: ignore[misc]
        assert "has no training questions: name another task such as numina, or a file" in message and f"{name}/" in message


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_is_whole(name: str) -> None:
    task = get(name)
    assert task.name == name == task.reference
    assert task.source and task.splits
    assert task.generate or (task.hub[0] and task.columns and task.from_hub)
    assert task.kind in KINDS and set(task.parts) <= set(task.splits)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{3}$.", "3"),
        (r"$\boxed{1}$, no: $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"$\fbox{-2}$", "-2"),
        (r"$\boxed{7}$ and $\fbox{8}$", "8"),
        (r"$\boxed 5$ coins for $2$ each", "5"),
        (r"$\boxed\frac12$", r"\frac12"),
        (r"$\boxed{\{1, 2\}}$", r"\{1, 2\}"),
        (r"$\boxed{\left\{ x \right.}$", r"\left\{ x \right."),
        (r"$\boxed{\boxed{4}}$", "4"),
        (r"$\boxed{}$", ""),
        (r"$\boxed{ }$", ""),
        (r"$\boxed{3", None),
        (r"a boxed{3} without its backslash", None),
        ("", None),
        (r"\boxed{" * 20_000, None),
    ],
)
def test_the_gold_of_a_solution_is_in_its_last_box(solution: str, answer: str | None) -> None:
    assert boxed(solution) == answer


def test_numina_counts_what_it_leaves_out(tmp_path: Path) -> None:
    golds = {
        r"$\boxed{12}$": None,
        r"so it is 12": "no box",
        r"$\boxed{}$": "empty box",
        "\\boxed{a\nb}": "box of several lines",
        "\\boxed{" + "1" * 201 + "}": "box longer than 200 characters",
        r"\boxed{\text{Proof complete}}": "a proof",
        r"\boxed{(a)\ 3,\ (b)\ 4}": "several parts",
        r"\boxed{(1) \; 3 \; (2) \; 4}": "several parts",
        r"\boxed{f(1) = 3, f(2) = 4}": None,
    }
    rows = [{"source": "made", "problem": f"Question {i}?", "solution": text, "messages": []} for i, text in enumerate(golds)]
    write(tmp_path / "train.jsonl", *rows)
    found, counts = load(get("numina"), "train", str(tmp_path))
    assert [row["id"] for row in found] == ["numina/train/0", "numina/train/8"]
    assert counts == Counter(f"left out: {reason}" for reason in golds.values() if reason)


@pytest.mark.timeout(120)
def test_a_gold_that_no_grader_comes_to_an_end_with_holds_nobody_up(tmp_path: Path) -> None:
    gold = r"about $2^{9^{9^9}}$"  # read as an answer it is the formula alone: only Math-Verify could tell that from the whole
    rows = [{"id": str(i), "question": f"What is {i}?", "answer": answer} for i, answer in enumerate([gold, "3 "])]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, counts = load(get("numina"), str(tmp_path / "own.jsonl"), None)
    assert [row["answer"] for row in found] == ["3"] and counts == {"left out: question or gold answer unusable": 1}
    with pytest.raises(UserError, match=r"row 1: the math grader refuses the answer 'about"):
        load(get("math"), str(tmp_path / "own.jsonl"), None)


def test_a_row_that_breaks_no_rule_but_is_malformed_is_an_error_unless_the_set_is_sifted(tmp_path: Path) -> None:
    rows = [
        {"source": "s", "problem": text, "solution": "\\boxed{1}", "level": "Level 1", "type": "t"} for text in ("One?", " ")
    ]
    write(tmp_path / "train.jsonl", *rows)
    assert "row 2: question must be a text" in refusal(lambda: load(get("math"), "train", str(tmp_path)))
    found, counts = load(get("numina"), "train", str(tmp_path))
    assert len(found) == 1 and counts == {"left out: question or gold answer unusable": 1}


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name not in ("mini", "numina")])
def test_a_hub_row_of_wrong_types_is_one_line(tmp_path: Path, name: str) -> None:
    task = get(name)
    for wrong in (None, 7, [1], {"a": 1}, ""):
        row = {**dict.fromkeys(task.columns, wrong), "answer_index": 1}
        write(tmp_path / name / f"{task.splits[0]}.jsonl", row)
        assert "correct or drop the row" in (message := refusal(lambda: load(task, task.splits[0], str(tmp_path)))) or (
            "is empty" in message and name == "theoremqa"  # something stands where the picture would
        )


def test_the_letter_counts_where_letter_and_index_disagree(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mmlu_pro").symlink_to(data / "mmlu_pro" / "raw")
    rows, _ = load(get("mmlu_pro"), "test", str(tmp_path))
    (row,) = [row for row in rows if row["id"] == "mmlu_pro/test/3983"]
    assert row["answer"] == "C" and len(row["choices"]) == 7
    assert {len(row["choices"]) for row in rows} == set(range(3, 11))


def test_a_picture_as_the_hub_holds_it_leaves_its_row_out(tmp_path: Path) -> None:
    row = {"Question": "How many?", "Answer": "3", "Answer_type": "integer", "Picture": {"bytes": None, "path": None}}
    seen = {**row, "Question": "How many are drawn?", "Picture": {"bytes": b"\x89PNG", "path": "a.png"}}
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist([row, seen]), tmp_path / "data" / "test-00000-of-00001-0a1b.parquet")
    rows, counts = load(get("theoremqa"), "test", str(tmp_path))
    assert [(row["question"], row["answer_type"]) for row in rows] == [("How many?", "integer")]
    assert counts == {"left out: needs a picture": 1}


def test_answers_of_strategyqa_are_yes_and_no(data: Path) -> None:
    rows, _ = load(get("strategyqa"), "train", str(data))
    assert Counter(row["answer"] for row in rows).keys() == {"yes", "no"}


def test_a_run_on_ones_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of the documentation: module on PYTHONPATH alone, rows in local files, and workers find its grader."""
    import runs

    from undo_ray.mini import world

    write(tmp_path / "code" / "my_pkg" / "__init__.py", "")
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8"), re.DOTALL)
    code = re.sub(r"(?<=instruction=).*", '"",', code)  # the miniature teacher knows the words of its world alone
    write(tmp_path / "code" / "my_pkg" / "my_task.py", code)
    for split, size in (("train", 40), ("dev", 12)):
        rows = [{"q": case.question, "a": str(case.answer)} for case in world.cases(split.replace("dev", "test"), size, 5)]
        write(tmp_path / "data" / "sums" / f"{split}.jsonl", *rows)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "code"), os.environ.get("PYTHONPATH", "")]))
    options = (
        "rounds=0",
        "data.train=my_pkg.my_task:MY_TASK",
        "data.validation=my_pkg.my_task:MY_TASK/dev",
        "data.tests=[]",
        f"data.dir={tmp_path}/data",
        "data.clean=exact",
        "data.train_limit=",
        "data.show=4",
        "data.select=6",
        "student.tokens=2000",
    )
    lessons = tmp_path / "run/round-00/lessons/manifest.json"
    output = runs.until(runs.start("mini", tmp_path / "run", *options), lessons)
    assert json.loads(lessons.read_text())["rows"] > 20, "the teacher's answers were graded right by the task's own kind"
    assert "40 train, 4 show, 6 select questions; removed: none" in output


def test_no_heavy_imports() -> None:
    code = (
        "import sys, undo_ray.tasks as t, undo_ray.grading, undo_ray.frame; [t.get(n) for n in t.TASKS];"
        "print([m for m in ('torch', 'ray', 'vllm', 'datasets', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
