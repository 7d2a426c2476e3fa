"""Tasks: where a benchmark's questions come from. docs/tasks.md shows how to add one.

A benchmark is one `Task`, in one small file. Rows come from the Hugging Face hub, from a local folder in the hub's
layout or in the normalised one (`id, question, answer`, optionally `choices, subject, level, solution, answer_type`), or from
a generator. Whatever the way, the same row has the same id. A user's own benchmark is a `Task` in a module of theirs,
named `package.module:NAME` in the recipe.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from undo_ray.grading import grade
from undo_ray.place import plain_rows
from undo_ray.types import PROBLEM_FIELDS, Row, UserError, first_line, unusable

TASKS: dict[str, str] = {
    "gsm8k": "undo_ray.tasks.gsm8k:GSM8K",
    "math": "undo_ray.tasks.math:MATH",
    "mini": "undo_ray.tasks.mini:MINI",
    "mmlu_pro": "undo_ray.tasks.mmlu_pro:MMLU_PRO",
    "numina": "undo_ray.tasks.numina:NUMINA",
    "strategyqa": "undo_ray.tasks.strategyqa:STRATEGYQA",
    "svamp": "undo_ray.tasks.svamp:SVAMP",
    "theoremqa": "undo_ray.tasks.theoremqa:THEOREMQA",
}
"""Name -> `module:NAME`, imported when asked for. A literal, so that it is the same on every Ray worker."""

_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
"""What GSM8K's solutions, and sets made in their style, note for a calculator (`<<3*2=6>>`): no part of the wording."""

FILES = (".jsonl", ".parquet")
"""Endings of the files that rows are read from."""


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
    parts: Mapping[str, tuple[tuple[str, str | None, str], ...]] = field(default_factory=dict)
    """Splits that lie elsewhere or in several places: split -> (data set id, configuration, split there), in order."""
    columns: tuple[str, ...] = ()
    """The columns of a hub row that `from_hub` reads."""
    from_hub: Callable[[Mapping[str, Any], int, str], dict[str, Any]] | None = None
    """(hub row, its index in hub order, split) -> `id`, `question`, `answer` and any other problem fields it has."""
    rule: Callable[[Mapping[str, Any]], tuple[bool, str] | None] | None = None
    """Row in either layout -> (whether it is used, what is odd about it), to be counted; None for an ordinary row."""
    sifted: bool = False
    """Collected at large: rows whose gold answer the grader refuses are left out and counted, where it is an error else."""
    hashed_ids: bool = False
    """Ids are made from the question, for hub rows carry none and files of them carry others."""
    templated: bool = False
    """Questions are filled-in templates and share their wording: only equal ones are duplicates (see `clean`)."""
    generate: Callable[[str], list[Row]] | None = None
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


def of(row: Mapping[str, Any], named: Collection[str]) -> Task:
    """The task of a problem row, one of those the recipe names (`config.Data.tasks`).

    Rows are data: they must not choose what is imported. Raises UserError (exit code 4) for a row of another task.
    """
    if (reference := row["task"]) not in named:
        raise unusable(f"a row has the task {reference!r}, the recipe names {', '.join(sorted(named))}: it was changed by hand")
    return get(reference)


def parse_source(text: str, default_split: str) -> tuple[Task, str]:
    """A recipe's source, `TASK`, `TASK/SPLIT` or `TASK/FILE.jsonl`, as (task, split or file).

    Raises UserError for an unknown task or split.
    """
    reference, _, split = text.strip().partition("/")
    task = get(reference)
    split = split or default_split
    if split not in task.splits and not split.endswith(FILES):
        remedy = f"use one of {', '.join(task.splits)}, or a file: {reference}/PATH.jsonl"
        if split == "train":
            remedy = f"it has no training questions: name another task such as numina, or a file: {reference}/PATH.jsonl"
        raise UserError(f"source {text!r}: task {reference} has no split {split!r}; {remedy}")
    return task, split


def load(task: Task, split: str, directory: str | None, solutions: bool = False) -> tuple[list[Row], dict[str, int]]:
    """All problems of a split in the benchmark's order, each with exactly the keys of `PROBLEM_FIELDS`, and how many rows
    were left out or are odd, by reason (`left out: needs a picture`).

    `solutions`: keep the worked solutions, most of the memory of a set that has them; without, the column is None.
    `split` may be the path of a file. `directory` is the task's folder or the folder that holds it; None is the hub.
    Raises UserError for a folder, file or column that is not there, an unreadable or incomplete row, a repeated id, a gold
    answer that its own grader does not accept, and an empty split.
    """
    counts: Counter[str] = Counter()
    found = (problem for _, problem in _problems(task, split, directory, counts))
    rows = [problem if solutions else {**problem, "solution": None} for problem in found]
    return rows, dict(counts)


def by_own_id(task: Task, split: str, directory: str | None) -> dict[str, Row]:
    """The problems of a split in the normalised layout by the ids in its file, for joining recorded answers to them."""
    return {str(row["id"]): problem for row, problem in _problems(task, split, directory, Counter()) if "id" in row}


def _problems(task: Task, split: str, directory: str | None, counts: Counter[str]) -> Iterator[tuple[Any, Row]]:
    """(row as it came, problem) of every row that is used; adds to `counts` what is left out or odd."""
    where, placed = _source(task, split, directory)
    seen: dict[str, str] = {}
    for index, (place, row) in enumerate(placed):
        problem = _problem(task, Path(split).stem, row, index, f"{where}, row {place}")
        used, odd = (task.rule and task.rule(row)) or (True, None)
        if odd:
            counts[f"{'kept' if used else 'left out'}: {odd}"] += 1
        if not used:
            continue
        if fault := _fault(problem, task.kind):
            if not task.sifted:
                raise UserError(f"{where}, row {place}: {fault}")
            counts["left out: question or gold answer unusable"] += 1
            continue
        first = seen.setdefault(problem["id"], place)
        if first != place:
            raise UserError(f"{where}: id {problem['id']!r} in rows {first} and {place}; ids must differ, rename or drop one")
        yield row, problem
    if not seen:
        raise UserError(f"{where}: split {split!r} of {task.name} is empty; put rows in it or name another split")


def _problem(task: Task, split: str, row: Any, index: int, where: str) -> Row:
    """One row in any layout as a problem."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    wanted = ("id", "question", "answer") if "id" in row else task.columns
    if not wanted or any(name not in row for name in wanted):
        layouts = " or ".join(", ".join(names) for names in (("id", "question", "answer"), task.columns) if names)
        missing = ", ".join(name for name in wanted if name not in row) or "id"
        raise UserError(f"{where}: no column {missing} (there are {', '.join(map(str, row))}); {task.name} needs {layouts}")
    found = row
    if "id" in row:
        found = {**row, "id": f"{task.name}/{split}/{_key(str(row['id']), task.name, split)}"}
    elif task.from_hub:
        found = task.from_hub(row, index, split)
    problem = {name: found.get(name) for name in PROBLEM_FIELDS} | {"task": task.reference or task.name, "split": split}
    if task.hashed_ids:
        question = str(problem["question"]).encode("utf-8", "replace")
        problem["id"] = f"{task.name}/{split}/{hashlib.sha256(question).hexdigest()[:12]}"
    if isinstance(problem["answer"], str):
        problem["answer"] = problem["answer"].strip()
    for name in ("subject", "level", "solution", "answer_type"):
        problem[name] = None if problem[name] is None else str(problem[name])
    if problem["solution"] is not None:
        problem["solution"] = _CALCULATOR.sub("", problem["solution"]).strip() or None
    return problem


def _fault(problem: Row, kind: str) -> str | None:
    """What makes a problem unusable, with the remedy; None when nothing does."""
    for name in ("question", "answer"):
        value = problem[name]
        if not (isinstance(value, str) and value.strip()):
            return f"{name} must be a text that is not empty, not {value!r:.60}; correct or drop the row"
    choices = problem["choices"]
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        return f"choices must be a list of texts, not {choices!r:.60}; correct or drop the row"
    try:
        json.dumps(problem, ensure_ascii=False).encode()
        if _accepted(problem, kind):
            return None
    except UnicodeEncodeError as error:
        return f"half a surrogate pair ({error.reason}); correct or drop the row"
    except UserError as error:
        return str(error)
    return f"the {kind} grader refuses the answer {problem['answer'][:60]!r}; correct or drop the row"


def _accepted(problem: Row, kind: str) -> bool:
    """Whether the grader of this kind accepts a gold answer as an answer. What only Math-Verify can tell is told in a process
    that can be killed: of a formula such as 9^9^9^9 it never ends."""
    gold = problem["answer"]
    if kind != "math":
        return grade(gold, problem, kind).correct
    from undo_ray.grading import math, pool

    return math.same(gold, problem) or pool.shared(pool.DEADLINE, pool.MEMORY).grade([(gold, problem, kind)])[0].correct


def _key(own: str, name: str, split: str) -> str:
    """What is left of a row's own id without task and split: `gsm8k-train-0` -> `0`, `svamp-chal-777` -> `chal-777`."""
    for prefix in (name, split):
        own = re.sub(rf"^{re.escape(prefix)}[-/](?=.)", "", own)
    return own


def _source(task: Task, split: str, directory: str | None) -> tuple[str, Iterable[tuple[str, Any]]]:
    """(what to call it in a message, (row number, row) of a split in its order)."""
    if split.endswith(FILES):
        path = Path(split).expanduser()
        return str(path), file_rows(path)
    if task.generate:
        return task.name, ((str(number), row) for number, row in enumerate(task.generate(split), 1))
    parts = task.parts.get(split) or ((*task.hub, split),)
    if directory is None:
        if not parts[0][0]:
            raise UserError(f"task {task.name} is not on the hub; set data.dir to a folder with {task.name}/{split}.jsonl")
        return f"{parts[0][0]} {split}", (row for part in parts for row in _hub_rows(task, *part))
    folder, paths = _find(task, split, Path(directory).expanduser())
    if len(paths) == 1:
        return str(paths[0]), file_rows(paths[0])
    return str(folder), ((f"{number} of {path.relative_to(folder)}", row) for path in paths for number, row in file_rows(path))


def _find(task: Task, split: str, directory: Path) -> tuple[Path, list[Path]]:
    """(the task's folder, the files of a split): one file of the whole split before the hub's parts."""
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
    single = [f"{part}{split}{end}" for end in FILES for part in ("", "raw/")]
    for name in single:
        if (folder / name).is_file():
            return folder, [folder / name]
    found: list[Path] = []
    for source, config, part in task.parts.get(split) or ((*task.hub, split),):
        stems = [f"{config}/{part}"] if config else [f"data/{part}"] * (split not in task.parts)
        stems += [f"{up}{source.rpartition('/')[2]}/{f'{config}/' if config else ''}{part}" for up in ("", "raw/") if source]
        names = [f"{stem}{end}" for stem in stems for end in (".jsonl", "-*.parquet")]
        files = next(filter(None, (sorted(folder.glob(name)) for name in names)), [])
        shards = re.search(r"-of-0*(\d+)", files[-1].name) if files else None
        wrong = "" if files else f"tried {', '.join((*single, *names))}"
        if shards and int(shards[1]) != len(files):
            wrong = f"{len(files)} of {int(shards[1])} shards"
        if wrong:
            raise UserError(f"no file for {task.name} {split} in {folder}: {wrong}; add one or set data.dir")
        found += files
    return folder, found


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(1-based row or line number, row) of a file. Lines end at "\\n" alone: texts hold U+2028 and U+0085."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
            rows = (row for batch in batches for row in plain_rows(batch, str(path)))
            yield from ((str(number), row) for number, row in enumerate(rows, 1))
            return
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield str(number), json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(
                            f"{path}, line {number}: not JSON ({first_line(error)}); write one object a line"
                        ) from error
    except (OSError, ValueError) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "UTF-8 text"
        raise UserError(
            f"{path}: not readable as {kind} ({first_line(error)}); fix, fetch again or name another file"
        ) from error


def _hub_rows(task: Task, source: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{task.name}: reading from the hub needs `datasets`; install it, or set data.dir to a local folder"
        ) from error
    try:
        rows = datasets.load_dataset(source, config, split=split)
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):  # whether there is one is all that counts
                rows = rows.cast_column(name, datasets.Image(decode=False))
    except Exception as error:  # whatever the network, the cache or the data set's files do wrong
        raise UserError(
            f"{task.name}: {source} {split} did not load from the hub ({first_line(error)}); set data.dir to a folder"
        ) from error
    yield from ((str(number), row) for number, row in enumerate(rows, 1))
