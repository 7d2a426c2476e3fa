"""Which chats an optimiser step takes, and how they lie in the rows that workers compute.

A step is a set of chats and does not depend on workers. Its chats lie end to end in rows of at most `micro_tokens`, without
padding; the number of rows is a multiple of the workers, so that all of them call the same collectives. Rows are Parquet files
of `CHUNK` steps, so that a worker that starts again at step n opens the file of step n.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from undo_ray.config import Student
from undo_ray.place import Place, plain_rows
from undo_ray.train.tokens import TOKENS, Key, held_out
from undo_ray.types import Row

CHUNK = 64
"""Steps in a file."""

PACKED = pa.schema(
    [
        ("step", pa.int32()),
        ("row", pa.int32()),  # worker `row % workers` computes it
        ("ids", pa.list_(pa.string())),
        ("input_ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),  # tokens of each chat
        ("prompts", pa.list_(pa.int32())),  # of these, without loss
    ]
)

HELD = 200
"""Most chats kept for measuring alone: enough for a standard error of a few hundredths of a nat."""


def training_steps(lengths: dict[Key, int], seed: int, spec: Student) -> list[list[Key]]:
    """The chats of each optimiser step: pass after pass, in the order of a hash of (seed, pass, id, round).

    `lengths`: tokens of each chat. A step is `spec.batch_size` chats, or ends with the chat that reaches `spec.batch_tokens`.
    The last step is the first that reaches `spec.tokens`, or completes `spec.epochs` passes.
    """
    keys = sorted(lengths)
    limit = math.ceil(len(keys) * spec.epochs) if spec.epochs is not None else None
    steps: list[list[Key]] = []
    step: list[Key] = []
    chats, seen, in_step, epoch = 0, 0, 0, 0
    while True:
        for key in sorted(keys, key=lambda key: hashlib.sha256(repr((seed, epoch, *key)).encode()).digest()):
            step.append(key)
            chats, seen, in_step = chats + 1, seen + lengths[key], in_step + lengths[key]
            if in_step >= spec.batch_tokens if spec.batch_tokens else len(step) == spec.batch_size:
                steps.append(step)
                step, in_step = [], 0
                if chats >= limit if limit is not None else seen >= (spec.tokens or 0):
                    return steps
        epoch += 1


def rows_of(keys: list[Key], lengths: dict[Key, int], room: int, workers: int) -> list[list[Key]]:
    """Chats spread over rows of at most `room` tokens (one chat may be longer than that by itself), evenly by tokens.

    The number of rows is a multiple of `workers`; with fewer chats than that, some rows are empty.
    """
    room = max([room, *(lengths[key] for key in keys)])
    largest_first = sorted(enumerate(keys), key=lambda item: (-lengths[item[1]], item[0]))
    count = workers * max(1, math.ceil(sum(lengths[key] for key in keys) / room / workers))
    while True:
        rows: list[list[Key]] = [[] for _ in range(count)]
        filled = [0] * count
        for _, key in largest_first:
            least = filled.index(min(filled))
            if filled[least] + lengths[key] > room:
                break
            rows[least].append(key)
            filled[least] += lengths[key]
        else:
            return rows
        count += workers


def pack(tokens: Place, spec: Student, seed: int, place: Place) -> dict[str, Any]:
    """Write the rows of all steps (`CHUNK` to a file) and of the chats held out, below `place`; a Ray task.

    Returns {steps, tokens, passes, supervised, held_out}: `tokens` without padding, `supervised` the share that carries loss.
    `plan.json`, written last, says that it is all there.
    """
    table = pads.dataset(tokens.path, filesystem=tokens.fs, schema=TOKENS).to_table().combine_chunks()
    names = list(zip(table["id"].to_pylist(), table["round"].to_pylist(), strict=True))
    counts = table["input_ids"].combine_chunks().value_lengths().to_pylist()
    lengths, where = dict(zip(names, counts, strict=True)), {key: index for index, key in enumerate(names)}
    prompts = dict(zip(names, table["prompt"].to_pylist(), strict=True))
    held = sorted(key for key in names if held_out(key, seed, spec.held_out))
    apart = set(held)
    taught = {key: count for key, count in lengths.items() if key not in apart}
    if not taught:  # a handful of chats
        held, taught = [], lengths
    steps = training_steps(taught, seed, spec)
    room = spec.micro_tokens or spec.max_length

    def packed(step: int, keys: list[Key]) -> list[Row]:
        rows = []
        for row, chosen in enumerate(rows_of(keys, lengths, room, spec.workers)):
            chats = table["input_ids"].take(pa.array([where[key] for key in chosen], pa.int64()))
            rows.append(
                {
                    "step": step,
                    "row": row,
                    "ids": [id for id, _ in chosen],
                    "input_ids": chats.combine_chunks().flatten().to_numpy(),  # as Python's numbers ten times as large
                    "lengths": [lengths[key] for key in chosen],
                    "prompts": [prompts[key] for key in chosen],
                }
            )
        return rows

    place.fs.create_dir(place.path, recursive=True)
    for first in range(0, len(steps), CHUNK):
        rows = [row for step in range(first, min(first + CHUNK, len(steps))) for row in packed(step, steps[step])]
        _write(rows, place / _file(first))
    _write(packed(0, held[:HELD]) if held else [], place / "held-out.parquet")
    order = [key for step in steps for key in step]
    seen = sum(lengths[key] for key in order)
    plan = {
        "steps": len(steps),
        "tokens": seen,
        "passes": round(len(order) / len(taught), 3),
        "supervised": round(1 - sum(max(1, prompts[key]) for key in order) / seen, 4),
        "held_out": len(held[:HELD]),
    }
    (place / "plan.json").write_json(plan)
    return plan


def _write(rows: list[Row], file: Place) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=PACKED), file.path, filesystem=file.fs)


def _file(step: int) -> str:
    return f"steps-{step // CHUNK:06d}.parquet"


class Steps:
    """The packed rows, as one worker reads them."""

    def __init__(self, place: Place, rank: int, workers: int):
        self.place, self.rank, self.workers = place, rank, workers
        self._name, self._steps = "", dict[int, tuple[list[Row], int]]()

    def __getitem__(self, step: int) -> tuple[list[Row], int]:
        """(this worker's rows of a step, supervised tokens in the rows of all workers)."""
        if self._name != _file(step):
            self._name, self._steps = _file(step), self._read(_file(step))
        return self._steps[step]

    def held_out(self) -> tuple[list[Row], int]:
        """The same, of the chats that are not trained on."""
        return self._read("held-out.parquet").get(0, ([], 0))

    def _read(self, name: str) -> dict[int, tuple[list[Row], int]]:
        """By step. The tokens of other workers' rows, which are most of a file, never become Python's numbers."""
        file = self.place / name
        table = pq.read_table(file.path, filesystem=file.fs)
        lines = plain_rows(table.select(["step", "row", "lengths", "prompts"]), file.uri)
        own = table.filter(pa.array([line["row"] % self.workers == self.rank for line in lines], pa.bool_()))
        found: dict[int, tuple[list[Row], int]] = {}
        for line in lines:
            rows, supervised = found.get(line["step"], ([], 0))
            found[line["step"]] = rows, supervised + supervised_tokens(line)
        for row in plain_rows(own, file.uri):
            found[row["step"]][0].append(row)
        return found


def supervised_tokens(row: Row) -> int:
    """Tokens of a row that carry loss. A chat's first token never does: nothing stands before it to foretell it from."""
    return sum(length - max(1, prompt) for length, prompt in zip(row["lengths"], row["prompts"], strict=True))
