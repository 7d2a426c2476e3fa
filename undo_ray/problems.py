"""Problems into the run directory: the three roles of the loop, cleaned against the tests, and the tests read at its end."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from undo_ray import clean, tasks
from undo_ray.config import Recipe
from undo_ray.grading.pool import Pool
from undo_ray.place import Place, plain_rows
from undo_ray.store import Run, Stage, Step
from undo_ray.types import ROWS, SELECT, SHOW, TRAIN, Row, UserError

ROWS_PER_FILE = 10_000
HELD = "held.u64"
"""Beside the rows, so no Parquet: hashes, 8 bytes each, little-endian."""


def check(recipe: Recipe) -> None:
    """Raises UserError for whatever is wrong with the recipe's sources before anything is started, tests included."""
    seen = {_source(recipe.data.train, "train"): "data.train"}
    for source in recipe.data.tests:
        key = _source(source, "test")
        if key in seen:
            raise UserError(f"data.tests: {source!r} is the same questions as {seen[key]}; name each set once")
        seen[key] = f"data.tests {source!r}"
    _Sources(recipe, read_golds=False).roles()
    if recipe.round0.startswith("lessons:") and not Place(recipe.round0.removeprefix("lessons:")).exists():
        raise UserError(f"round0 = {recipe.round0}: no such file; give JSONL or Parquet with a `messages` column")


def _source(text: str, split: str) -> tuple[str, str]:
    task, found = tasks.parse_source(text, split)
    return task.name, found


class _Sources:
    """What the recipe's sources hold: rows, and the counts of rows that were left out or are odd."""

    def __init__(self, recipe: Recipe, read_golds: bool = True):
        """`read_golds`: whether the golds of a source that nobody has checked are tried on the grader (2 ms each and core)."""
        self.recipe, self.read_golds = recipe, read_golds
        self.cleaned = clean.Tests(())
        self.figures: dict[str, dict[str, int]] = {}
        self.templated: set[str] = set()

    def load(self, source: str, split: str, solutions: bool = False) -> list[Row]:
        task, split = tasks.parse_source(source, split)
        if task.templated:
            self.templated.add(task.reference)
        rows, odd = tasks.load(task, split, self.recipe.data.dir, solutions)
        if task.sifted and task.kind == "math" and self.read_golds:
            with Pool(deadline=self.recipe.grading.deadline, memory=self.recipe.grading.memory) as pool:
                verdicts = pool.grade([("", row, "math_gold") for row in rows])
            rows, found = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict.correct], len(rows)
            odd["left out: gold answer is no readable mathematics"] = found - len(rows)
            if not rows:
                raise UserError(f"{source}: none of the {found} gold answers can be read as mathematics; name another source")
        self.figures[f"{task.reference}/{split}"] = {"rows": len(rows), **odd}
        return rows

    def tests(self) -> dict[str, list[Row]]:
        """Test -> its questions, all of them."""
        return {test_name(source): self.load(source, "test") for source in self.recipe.data.tests}

    def roles(self) -> tuple[list[Row], list[Row]]:
        data = self.recipe.data
        hints = self.recipe.teacher.hints
        train = self.load(data.train, "train", solutions=hints in ("solution", "cascade"))
        if hints == "solution" and not any(row["solution"] for row in train):
            raise UserError(
                f'teacher.hints = "solution": no question of {data.train} has a worked solution; set it to "answer"'
            )
        validation = self.load(data.validation, "train") if data.validation is not None else None
        asked = [row for rows in self.tests().values() for row in rows]
        tests = self.cleaned = clean.Tests(asked, self.templated, data.clean == "ngram")
        limit, shared = data.train_limit, data.shared
        return roles(
            train,
            validation,
            tests,
            show=data.show,
            select=data.select,
            seed=self.recipe.seed,
            train_limit=limit,
            shared=shared,
        )


def prepare(recipe: Recipe, out: Stage) -> None:
    """Rows with their role: train, show, select (design: show and select are disjoint, and neither is ever taught).

    Test questions are read here for their wording alone, to keep them and their like out of training and validation.
    """
    sources = _Sources(recipe)
    rows, removed = sources.roles()
    _write(rows, out)
    _write_held(sources, rows, out)
    counts = {role: sum(row["split"] == role for row in rows) for role in (TRAIN, SHOW, SELECT)}
    out.note(**counts, sources=sources.figures, removed=_counts(removed))
    _list(removed, out, "removed.jsonl")
    for source, figures in sources.figures.items():
        if odd := [f"{count} {what}" for what, count in figures.items() if what != "rows"]:
            out.progress.say(f"{source}: {figures['rows']} questions; {', '.join(odd)}")
    asked = ", ".join(f"{count} {role}" for role, count in counts.items())
    out.progress.say(f"{asked} questions; removed: {_said(out.figures['removed'])}")


def prepare_tests(recipe: Recipe, out: Stage) -> None:
    """The rows of every test of the recipe, `split` naming the test.

    A test may have been added since training and validation were cleaned: the questions that overlap with it are counted.
    """
    sources = _Sources(recipe)
    rows: list[Row] = []
    overlap: dict[str, list[Row]] = {}
    for name, found in sources.tests().items():
        drawn = ranked(found, recipe.seed, "test")[: recipe.data.test_limit]
        rows += [{**row, "split": name} for row in drawn]
        tests = clean.Tests(drawn, sources.templated, recipe.data.clean == "ngram")
        overlap[name] = [
            {**finding, "split": asked[index]["split"], "test": name}
            for asked in _committed(out)
            for index, finding in tests.find(asked)
        ]
    _write(rows, out)
    _list([finding for findings in overlap.values() for finding in findings], out, "overlap.jsonl")
    out.note(sources=sources.figures, overlap={name: _counts(findings) for name, findings in overlap.items() if findings})
    for name, counts in out.figures["overlap"].items():
        out.progress.say(f"{name}: its like was not removed, for it is new to this run: {_said(counts)}")


def _committed(out: Stage) -> Iterator[list[Row]]:
    """The questions of the loop as they were committed, a file at a time."""
    loop = Step(out.ledger, out.ledger.place, -1)
    loop.made("problems")  # raises where they are not committed
    for file in loop.files("problems"):
        columns = ["id", "task", "split", "question", "choices"]
        yield plain_rows(pq.read_table(file.path, filesystem=file.fs, columns=columns), file.uri)


def _write_held(sources: _Sources, rows: list[Row], out: Stage) -> None:
    """The runs of 8 words of test and validation questions, for `held`; none where runs say nothing."""
    import numpy as np

    tests = sources.cleaned
    validation = clean.hashes(row["question"] for row in rows if row["split"] != TRAIN and tests.compares(row))
    runs = np.union1d(tests.held, validation)
    (out.place / HELD).write_bytes(runs.astype("<u8").tobytes())


def held(run: Run) -> clean.Hashes:
    """The runs of 8 words that no lesson may share (see `clean.leaks`), as the problems of this run were committed with."""
    import numpy as np

    place = run.place / "problems"
    manifest = json.loads((place / "manifest.json").read_bytes())
    return np.frombuffer((place / manifest["try"] / HELD).read_bytes(), "<u8")


def _list(findings: Sequence[Row], out: Stage, name: str) -> None:
    """Write findings into the stage's folder, one a line."""
    if findings:
        (out.place / name).write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in findings).encode())


def _counts(findings: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How many findings there are by split and kind."""
    counts: dict[str, dict[str, int]] = {}
    for finding in findings:
        kinds = counts.setdefault(finding["split"], {})
        kinds[finding["kind"]] = kinds.get(finding["kind"], 0) + 1
    return counts


def _said(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Counts of findings for the log, e.g. `train: 3 test_ngram, 1 duplicate`."""
    parts = (f"{split}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()) for split, kinds in counts.items())
    return "; ".join(parts) or "none"


def test_name(source: str) -> str:
    """What the report calls a test: `gsm8k` for `gsm8k` and `gsm8k/test`, else the source as written."""
    return source.removesuffix("/test")


def _write(rows: list[Row], out: Stage) -> None:
    fs, path = out.rows.fs, out.rows.made().path
    for start in range(0, len(rows), ROWS_PER_FILE):
        part: list[Row] = [{**row, "history": [], "candidates": []} for row in rows[start : start + ROWS_PER_FILE]]
        table = pa.Table.from_pylist(part, schema=ROWS)
        pq.write_table(table, f"{path}/{start // ROWS_PER_FILE:06d}.parquet", filesystem=fs)


def ranked(rows: Iterable[Row], seed: int, salt: str) -> list[Row]:
    """Rows in the order of sha256(seed, salt, id): its first are a draw that no file order changes, without any state."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\n{salt}\n{row['id']}".encode()).digest())


def roles(
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row] | None,
    tests: clean.Tests,
    *,
    show: int,
    select: int,
    seed: int,
    train_limit: int | None = None,
    shared: bool = False,
) -> tuple[list[Row], list[Row]]:
    """The rows of a run with `split` set to train, show or select, and what was removed on the way (see `clean.distinct`).

    `show` and `select` are disjoint draws from `validation_rows`, or else from `train_rows`, which then lose them; `shared`
    draws `show` questions for both uses, marked show alone. Questions are removed before they are drawn, so that every draw
    has its size: those that overlap with `tests`, training questions that repeat a validation question, and those that repeat
    an earlier one. `train_limit` draws from what is left; fewer than that many are all taken. Raises UserError when
    validation asks for more than there is, or no training row is left.
    """
    own = validation_rows is None
    need = show if shared else show + select
    pool = ranked(train_rows if validation_rows is None else validation_rows, seed, "validation")
    held, unfit = clean.distinct(pool, need, tests)
    if need > len(held):
        keys = "data.show" if shared else "data.show + data.select"
        source, remedy = ("training", " or name data.validation") if own else ("its source", "")
        raise UserError(
            f"validation larger than {source}: {keys} = {need}, but there are {len(held)} different questions"
            f"{_beside(unfit)}; lower {'it' if shared else 'them'}{remedy}"
        )
    taken = {row["id"] for row in held} if own else set()
    rest = ranked((row for row in train_rows if row["id"] not in taken), seed, "train")
    train, removed = clean.distinct(rest, train_limit, tests, held)
    if not train:
        raise UserError(
            f"no training question is left beside {need} validation questions{_beside(removed)}; "
            "lower data.show and data.select"
        )
    # Passed over for validation, a training question is still one for training, and judged there.
    findings = [("validation", finding) for finding in unfit if not own] + [(TRAIN, finding) for finding in removed]
    marked = ((TRAIN, train), (SHOW, held[:show]), (SELECT, held[show:]))
    return (
        [{**row, "split": split} for split, rows in marked for row in rows],
        [{**finding, "split": split} for split, finding in findings],
    )


def _beside(findings: Sequence[Row]) -> str:
    kinds = Counter(finding["kind"] for finding in findings)
    return f" (removed: {', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""
