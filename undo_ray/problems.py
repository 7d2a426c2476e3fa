"""Problems into the run directory: the three roles of the loop, and the tests that are read at its end."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from undo_ray import tasks
from undo_ray.config import Recipe
from undo_ray.store import Stage
from undo_ray.types import ROWS, Row

ROWS_PER_FILE = 10_000


def prepare(recipe: Recipe, out: Stage) -> None:
    """Rows with their role: train, show, select (design: show and select are disjoint, and neither is ever taught)."""
    data = recipe.data
    task, split = tasks.parse_source(data.train, "train")
    train = tasks.load(task, split, data.dir)
    validation = None
    if data.validation is not None:
        task, split = tasks.parse_source(data.validation, "train")
        validation = tasks.load(task, split, data.dir)
    rows, duplicates = tasks.roles(
        train,
        validation,
        show=data.show,
        select=data.select,
        seed=recipe.seed,
        train_limit=data.train_limit,
        shared=data.shared,
    )
    _write(rows, out)
    counts = {role: sum(row["split"] == role for row in rows) for role in ("train", "show", "select")}
    out.note(**counts, duplicates=duplicates)
    out.progress.say(
        ", ".join(f"{count} {role}" for role, count in counts.items())
        + f" questions; {duplicates} removed from training because validation asks the same"
    )


def prepare_tests(recipe: Recipe, out: Stage) -> None:
    """The rows of every test of the recipe, `split` naming the test."""
    rows: list[Row] = []
    for source in recipe.data.tests:
        task, split = tasks.parse_source(source, "test")
        found = tasks.load(task, split, recipe.data.dir)
        limit = min(recipe.data.test_limit or len(found), len(found))
        rows += [{**row, "split": test_name(source)} for row in tasks.draw(found, limit, recipe.seed, "test")]
    _write(rows, out)


def test_name(source: str) -> str:
    """What the report calls a test: `gsm8k` for `gsm8k` and `gsm8k/test`, else the source as written."""
    return source.removesuffix("/test")


def _write(rows: list[Row], out: Stage) -> None:
    fs, path = out.rows.fs, out.rows.path
    fs.create_dir(path, recursive=True)
    empty: Row = {"history": [], "candidates": []}
    for start in range(0, len(rows), ROWS_PER_FILE):
        table = pa.Table.from_pylist([{**row, **empty} for row in rows[start : start + ROWS_PER_FILE]], schema=ROWS)
        pq.write_table(table, f"{path}/{start // ROWS_PER_FILE:06d}.parquet", filesystem=fs)
