"""Problems into the run directory: the three roles of the loop, and the tests that are read at its end."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from undo_ray import tasks
from undo_ray.config import Recipe
from undo_ray.place import Place
from undo_ray.store import Stage
from undo_ray.types import ROWS, SELECT, SHOW, TRAIN, Row, UserError

ROWS_PER_FILE = 10_000


def check(recipe: Recipe) -> None:
    """Raises UserError for whatever is wrong with the recipe's sources before anything is started, tests included."""
    _roles(recipe)
    seen = {_source(recipe.data.train, "train"): "data.train"}
    for source in recipe.data.tests:
        key = _source(source, "test")
        if key in seen:
            raise UserError(f"data.tests: {source!r} is the same questions as {seen[key]}; name each set once")
        seen[key] = f"data.tests {source!r}"
    _tests(recipe)
    if recipe.round0.startswith("lessons:") and not Place(recipe.round0.removeprefix("lessons:")).exists():
        raise UserError(f"round0 = {recipe.round0}: no such file; give JSONL or Parquet with a `messages` column")


def _source(text: str, split: str) -> tuple[str, str]:
    task, found = tasks.parse_source(text, split)
    return task.name, found


def _roles(recipe: Recipe) -> tuple[list[Row], int]:
    data = recipe.data
    train = tasks.load(*tasks.parse_source(data.train, "train"), data.dir)
    validation = tasks.load(*tasks.parse_source(data.validation, "train"), data.dir) if data.validation is not None else None
    limit = data.train_limit
    return tasks.roles(
        train, validation, show=data.show, select=data.select, seed=recipe.seed, train_limit=limit, shared=data.shared
    )


def _tests(recipe: Recipe) -> list[Row]:
    rows: list[Row] = []
    for source in recipe.data.tests:
        found = tasks.load(*tasks.parse_source(source, "test"), recipe.data.dir)
        limit = min(recipe.data.test_limit or len(found), len(found))
        rows += [{**row, "split": test_name(source)} for row in tasks.draw(found, limit, recipe.seed, "test")]
    return rows


def prepare(recipe: Recipe, out: Stage) -> None:
    """Rows with their role: train, show, select (design: show and select are disjoint, and neither is ever taught)."""
    rows, duplicates = _roles(recipe)
    _write(rows, out)
    counts = {role: sum(row["split"] == role for row in rows) for role in (TRAIN, SHOW, SELECT)}
    out.note(**counts, duplicates=duplicates)
    roles = ", ".join(f"{count} {role}" for role, count in counts.items())
    out.progress.say(f"{roles} questions; {duplicates} removed from training because validation asks the same")


def prepare_tests(recipe: Recipe, out: Stage) -> None:
    """The rows of every test of the recipe, `split` naming the test."""
    _write(_tests(recipe), out)


def test_name(source: str) -> str:
    """What the report calls a test: `gsm8k` for `gsm8k` and `gsm8k/test`, else the source as written."""
    return source.removesuffix("/test")


def _write(rows: list[Row], out: Stage) -> None:
    fs, path = out.rows.fs, out.rows.made().path
    for start in range(0, len(rows), ROWS_PER_FILE):
        part: list[Row] = [{**row, "history": [], "candidates": []} for row in rows[start : start + ROWS_PER_FILE]]
        table = pa.Table.from_pylist(part, schema=ROWS)
        pq.write_table(table, f"{path}/{start // ROWS_PER_FILE:06d}.parquet", filesystem=fs)
