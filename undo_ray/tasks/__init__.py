"""Tasks: where a benchmark's questions come from, and which role each plays in a run.

A benchmark is one `Task`, in one small file. Rows come from the Hugging Face hub, from a local folder in the hub's
layout or in the normalised one (`id, question, answer`, optionally `choices, subject, level`), or from a generator.
Whatever the way, the same row has the same id. A user's own benchmark is a `Task` in a module of theirs, named
`package.module:NAME` in the recipe.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from undo_ray.grading import grade
from undo_ray.types import PROBLEM_FIELDS, SELECT, SHOW, TRAIN, UserError

TASKS: dict[str, str] = {
    "gsm8k": "undo_ray.tasks.gsm8k:GSM8K",
    "mini": "undo_ray.tasks.mini:MINI",
    "svamp": "undo_ray.tasks.svamp:SVAMP",
}
"""Name -> `module:NAME`, imported when asked for. A literal, so that it is the same on every Ray worker."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark."""

    name: str
    """First part of its ids, and of its folder."""
    source: str
    """Where it comes from and under which licence."""
    kind: str
    """Answer kind, a key of `grading.KINDS`."""
    instruction: str
    """The sentence a solve prompt adds to the question; empty for the question alone."""
    splits: tuple[str, ...]
    hub: tuple[str, str | None] = ("", None)
    """Data set id and configuration on the Hugging Face hub."""
    columns: tuple[str, ...] = ()
    """The columns of a hub row that `from_hub` reads."""
    from_hub: Callable[[Mapping[str, Any], int, str], dict[str, Any]] | None = None
    """(hub row, its index in hub order, split) -> `id`, `question`, `answer` and any other problem fields it has."""
    generate: Callable[[str], Rows] | None = None
    """split -> rows, for a benchmark that is computed; it then needs no folder and no hub."""
    reference: str = ""
    """What the recipe calls it, so that a row finds its grader on any worker. Set by `get`."""


def get(reference: str) -> Task:
    """The task of that name, or of `package.module:NAME`. Raises UserError when there is none."""
    target = TASKS.get(reference, reference)
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        known = ", ".join(sorted(TASKS))
        raise UserError(f"task {reference!r} is unknown; use one of {known}, or package.module:NAME for your own")
    try:
        task = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(f"task {reference!r}: no module {error.name!r}; install it or put its folder on PYTHONPATH") from error
    except AttributeError as error:
        raise UserError(f"task {reference!r}: module {module} has no {name}; name the Task object after the colon") from error
    if not isinstance(task, Task):
        raise UserError(f"task {reference!r} is a {type(task).__name__}, not an undo_ray.tasks.Task; name a Task object")
    return replace(task, reference=reference)


def parse_source(text: str, default_split: str) -> tuple[Task, str]:
    """A recipe's source, `TASK` or `TASK/SPLIT`, as (task, split). Raises UserError for an unknown task or split."""
    reference, _, split = text.strip().partition("/")
    task = get(reference)
    split = split or default_split
    if split not in task.splits:
        raise UserError(f"source {text!r}: task {reference} has no split {split!r}; use one of {', '.join(task.splits)}")
    return task, split


def load(task: Task, split: str, directory: str | None) -> Rows:
    """All problems of a split, in the benchmark's order; each row has exactly the keys of `PROBLEM_FIELDS`.

    `directory` is the task's folder or the folder that holds it; None is the hub. Raises UserError for a folder, file
    or column that is not there, an unreadable or incomplete row, a repeated id, a gold answer that its own grader
    does not accept, and an empty split.
    """
    if split not in task.splits:
        raise UserError(f"task {task.name} has no split {split!r}; use one of {', '.join(task.splits)}")
    numbered: Iterable[tuple[int, Any]]
    if task.generate:
        where, numbered = task.name, enumerate(task.generate(split), 1)
    elif directory is None:
        where, numbered = f"{task.hub[0]} {split}", enumerate(_hub_rows(task, split), 1)
    else:
        path = _find(task, split, Path(directory).expanduser())
        where, numbered = str(path), _file_rows(path)

    problems: Rows = []
    seen: dict[str, int] = {}
    for index, (line, row) in enumerate(numbered):
        problem = _problem(task, split, row, index, f"{where}, row {line}")
        first = seen.setdefault(problem["id"], line)
        if first != line:
            raise UserError(f"{where}: id {problem['id']!r} in rows {first} and {line}; ids must differ, rename or drop one")
        problems.append(problem)
    if not problems:
        raise UserError(f"{where}: split {split!r} of {task.name} is empty; put rows in it or name another split")
    return problems


def _problem(task: Task, split: str, row: Any, index: int, where: str) -> dict[str, Any]:
    """One row in any layout as a problem, checked."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    if "id" in row:
        wanted: Sequence[str] = ("id", "question", "answer")
        found: Mapping[str, Any] = row
    else:
        wanted, found = task.columns, row
    if not wanted or any(name not in row for name in wanted):
        layouts = " or ".join(", ".join(names) for names in (("id", "question", "answer"), task.columns) if names)
        missing = ", ".join(name for name in wanted if name not in row) or "id"
        raise UserError(f"{where}: no column {missing} (there are {', '.join(map(str, row))}); {task.name} needs {layouts}")
    if "id" in row:
        found = {**row, "id": f"{task.name}/{split}/{_key(str(row['id']), task.name, split)}"}
    elif task.from_hub:
        found = task.from_hub(row, index, split)
    for name in ("question", "answer"):
        value = found.get(name)
        if not (isinstance(value, str) and value.strip()):
            raise UserError(f"{where}: {name} must be a text that is not empty, not {value!r:.60}; correct or drop the row")
    problem = {name: found.get(name) for name in PROBLEM_FIELDS}
    problem |= {"task": task.reference or task.name, "split": split}
    if problem.get("level") is not None:
        problem["level"] = str(problem["level"])
    try:
        json.dumps(problem, ensure_ascii=False).encode()
        accepted = grade(found["answer"], problem, task.kind).correct
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a surrogate pair ({error.reason}); correct or drop the row") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not accepted:
        raise UserError(f"{where}: the {task.kind} grader refuses the answer {found['answer'][:60]!r}; correct or drop the row")
    return problem


def _key(own: str, name: str, split: str) -> str:
    """What is left of a row's own id without task and split: `gsm8k-train-0` -> `0`, `svamp-chal-777` -> `chal-777`."""
    for prefix in (name, split):
        own = re.sub(rf"^{re.escape(prefix)}[-/](?=.)", "", own)
    return own


def _find(task: Task, split: str, directory: Path) -> Path:
    """The file of a split: normalised before hub layout, `DIR/<task>/` before `DIR/`."""
    if not directory.is_dir():
        raise UserError(f"data folder {directory} is not there; set data.dir to a folder with {task.name}/{split}.jsonl")
    folder = directory / task.name
    if not folder.is_dir():
        # A folder named after another benchmark is not searched: its rows could pass for this one's.
        if directory.name != task.name and directory.name in TASKS:
            raise UserError(
                f"data folder {directory} holds {directory.name}, not {task.name}; set data.dir to the folder above it"
            )
        folder = directory
    names = [f"{part}{split}{end}" for end in (".jsonl", ".parquet") for part in ("", "raw/")]
    shards = [f"{part}/{split}-00000-of-00001.parquet" for part in (task.hub[1], "data") if part]
    for name in (*names, *shards):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no file for {task.name} {split} in {folder}: tried {', '.join((*names, *shards))}; add one or set data.dir"
    )


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(1-based row or line number, row) of a file. Lines end at "\\n" alone: texts hold U+2028 and U+0085."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({_line(error)}); fetch it again") from error
        return
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{path}, line {number}: not JSON ({_line(error)}); write one object a line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({_line(error)}); fix or replace the file") from error


def _hub_rows(task: Task, split: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{task.name}: reading from the hub needs `datasets`; install it, or set data.dir to a local folder"
        ) from error
    try:
        return load_dataset(*task.hub, split=split)
    except Exception as error:  # whatever the network, the cache or the data set's files do wrong
        raise UserError(
            f"{task.name}: {task.hub[0]} {split} did not load from the hub ({_line(error)}); set data.dir to a folder"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def draw(rows: Iterable[Mapping[str, Any]], size: int | None, seed: int, salt: str) -> Rows:
    """`size` rows (None: all) in the order of sha256(seed, salt, id): the same ones in any file order, no state, no
    generator.

    Raises UserError when there are fewer.
    """

    def rank(row: Mapping[str, Any]) -> bytes:
        return hashlib.sha256(f"{seed}\n{salt}\n{row['id']}".encode()).digest()

    ranked = [dict(row) for row in sorted(rows, key=rank)]
    if size is not None and size > len(ranked):
        raise UserError(f"{salt}: {size} questions asked for, {len(ranked)} there; ask for fewer")
    return ranked[:size]


def roles(
    train_rows: Sequence[Mapping[str, Any]],
    validation_rows: Sequence[Mapping[str, Any]] | None,
    *,
    show: int,
    select: int,
    seed: int,
    train_limit: int | None = None,
    shared: bool = False,
) -> tuple[Rows, int]:
    """The rows of a run with `split` set to train, show or select, and how many training rows were removed as
    duplicates.

    `show` and `select` are disjoint draws, free of repeated questions, from `validation_rows`, or else from
    `train_rows`, which then lose them. `shared` draws `show` questions for both uses, marked show alone. A training
    row that asks the same as one of them (letter case, punctuation and spacing aside) is removed and counted.
    `train_limit` draws from what is left; fewer than that many are all taken. Raises UserError when validation asks
    for more than there is, or no training row is left.
    """
    pool: dict[str, dict[str, Any]] = {}
    for row in draw(train_rows if validation_rows is None else validation_rows, None, seed, "validation"):
        pool.setdefault(normal(row["question"]), row)
    need = show if shared else show + select
    if need > len(pool):
        keys = "data.show" if shared else "data.show + data.select"
        source, remedy = ("training", " or name data.validation") if validation_rows is None else ("its source", "")
        raise UserError(
            f"validation larger than {source}: {keys} = {need}, but there are {len(pool)} different questions; "
            f"lower {'it' if shared else 'them'}{remedy}"
        )
    held = list(pool.values())[:need]
    questions = {normal(row["question"]) for row in held}
    left = [row for row in train_rows if normal(row["question"]) not in questions]
    removed = len(train_rows) - len(left) - (need if validation_rows is None else 0)
    if not left:
        raise UserError(f"no training question is left beside {need} validation questions; lower data.show and data.select")
    train = draw(left, None, seed, "train")[:train_limit]
    marked = ((TRAIN, train), (SHOW, held[:show]), (SELECT, held[show:]))
    return [{**row, "split": split} for split, rows in marked for row in rows], removed


def normal(question: str) -> str:
    """A question without letter case, punctuation and spacing: equal texts ask the same."""
    return " ".join(re.findall(r"\w+", question.casefold()))
