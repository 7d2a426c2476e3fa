"""accept(): what was explained becomes the chats a student is trained on."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from undo_ray import prompts, tasks
from undo_ray.config import Recipe
from undo_ray.place import Place, plain_rows
from undo_ray.store import Stage
from undo_ray.types import LESSONS, TRAIN, UserError, first_line

if TYPE_CHECKING:
    from ray.data import Dataset


def accept(rows: Dataset, earlier: Dataset | None, recipe: Recipe, out: Stage) -> None:
    """Accepted rationales become chats to train on, without exact duplicates.

    `earlier`: the previous round's lessons, for `lessons.mode = "accumulate"`. Raises UserError with exit code 3 when nothing
    is left to train on.
    """
    given, _, path = ("run" if out.round else recipe.round0).partition(":")
    if given == "student":
        return  # nothing is trained in round 0
    if given == "lessons":
        chats = _given_lessons(path)
    else:
        to_lessons = partial(_to_lessons, k=out.round, recipe=recipe)
        chats = rows.map_batches(to_lessons, batch_format="pyarrow", zero_copy_batch=True)
    if recipe.lessons.mode == "accumulate" and earlier is not None:
        chats = earlier.union(chats)
    chats = chats.materialize()  # asked twice below; about the size of the lessons themselves
    digests = chats.map_batches(_digests, batch_format="pyarrow")
    keys = sorted((row["digest"], row["round"], row["id"], row["hint"] or "") for row in digests.iter_rows())
    if not keys:
        raise UserError(
            f"round {out.round}: no rationale was accepted, so there is nothing to train on; see `refused` in "
            f"{out.ledger.place.uri}/round-{out.round:02d}/rationales/manifest.json for the reasons",
            exit_code=3,
        )
    duplicates = {key[1:3] for before, key in pairwise(keys) if before[0] == key[0]}
    out.write(chats.map_batches(partial(_without, dropped=duplicates), batch_format="pyarrow"))
    hinted = sum(bool(hint) and (k, id) not in duplicates for _, k, id, hint in keys)
    out.note(lessons=len(keys) - len(duplicates), hinted_lessons=hinted, duplicates=len(duplicates))
    out.note(keep_wrong=recipe.lessons.keep_wrong)


def _given_lessons(path: str) -> Dataset:
    """Chats of a JSONL or Parquet file with a `messages` column, as lessons of round 0."""
    import ray.data

    place = Place(path)
    try:
        if path.endswith(".parquet"):
            table = pq.read_table(place.path, columns=["messages"], filesystem=place.fs)
            chats = [row["messages"] for row in plain_rows(table, path)]
        else:
            chats = [json.loads(line)["messages"] for line in place.read_bytes().decode().split("\n") if line.strip()]
        rows = [{"id": f"given/{index}", "round": 0, "messages": chat} for index, chat in enumerate(chats)]
        return ray.data.from_arrow(pa.Table.from_pylist(rows, schema=LESSONS))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"round0 = lessons:{path}: not readable ({first_line(error)}); give JSONL or Parquet with `messages`"
        ) from None


def _to_lessons(table: pa.Table, k: int, recipe: Recipe) -> pa.Table:
    mode, named, lessons = recipe.lessons.mode, recipe.data.tasks, []
    for row in table.select(["id", "task", "split", "question", "choices", "lesson"]).to_pylist():
        lesson = row["lesson"]
        if row["split"] == TRAIN and lesson and (mode == "latest" or lesson["round"] == k):
            asked = prompts.solve(prompts.question_text(row), tasks.of(row, named).instruction)
            answer = {"role": "assistant", "content": lesson["rationale"]}
            marks = {name: lesson[name] for name in ("round", "hint")}
            lessons.append({"id": row["id"], **marks, "messages": [*asked, answer]})
    return pa.Table.from_pylist(lessons, schema=LESSONS)


def _digests(table: pa.Table) -> pa.Table:
    texts = [repr([message["content"] for message in chat]) for chat in table.column("messages").to_pylist()]
    digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32] for text in texts]
    return table.select(["id", "round", "hint"]).append_column("digest", pa.array(digests, pa.string()))


def _without(table: pa.Table, dropped: set[tuple[int, str]]) -> pa.Table:
    keys = zip(table.column("round").to_pylist(), table.column("id").to_pylist(), strict=True)
    return table.filter(pa.array([key not in dropped for key in keys], pa.bool_()))
