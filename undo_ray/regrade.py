"""Recorded responses, graded again: `undo-ray grade --task T FILE.jsonl`.

A row has `gold` and `response`, or an id (`question_id`) of the task's own rows, from which its gold, options and answer type
then come; also, as far as known, `choices` or `n_choices`, `answer_type`, `finish_reason`, `correct` (a recorded verdict to
compare with) and `suspect` (the recorded verdict is doubtful: the row is left out and counted).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from undo_ray import tasks
from undo_ray.grading.pool import DEADLINE, Pool
from undo_ray.types import TRUNCATED, UserError, Verdict

Json = dict[str, Any]


def regrade(reference: str, path: str, data: str | None = None, deadline: float = DEADLINE) -> tuple[Json, list[Json]]:
    """(summary, disagreements) of the responses in a JSONL file, graded by the rule of a task.

    The summary has `n`, `accuracy`, `unparsed` (share in which nothing could be graded, truncated ones included),
    `truncated` and `seconds`; where rows carry `correct` also `agreement` (a share of those), `false_positives` and
    `false_negatives`; and `suspect`, how many rows were left out. Raises UserError for a file or row that cannot be read.
    """
    task = tasks.get(reference)
    known = _own_rows(task, data) if data else {}
    rows, problems, suspect = [], [], 0
    for number, row in tasks.file_rows(Path(path)):
        if not (isinstance(row, Mapping) and isinstance(row.get("response"), str)):
            raise UserError(f"{path}, row {number}: no text in `response`; write one JSON object a line with gold and response")
        if row.get("suspect"):
            suspect += 1
            continue
        rows.append(row)
        problems.append(_problem(row, task, known, f"{path}, row {number}"))
    if not rows:
        raise UserError(f"{path}: holds no response to grade; give one JSON object a line with gold and response")
    start = time.monotonic()
    with Pool(deadline=deadline) as pool:
        verdicts = pool.grade([(row["response"], problem, task.kind) for row, problem in zip(rows, problems, strict=True)])
    seconds = time.monotonic() - start
    verdicts = [
        Verdict(False, None, TRUNCATED) if row.get("finish_reason") == "length" else verdict
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    n = len(verdicts)
    summary: Json = {
        "n": n,
        "accuracy": sum(verdict.correct for verdict in verdicts) / n,
        "unparsed": sum(verdict.reason is not None for verdict in verdicts) / n,
        "truncated": sum(verdict.reason == TRUNCATED for verdict in verdicts) / n,
        "seconds": round(seconds, 3),
        "suspect": suspect,
    }
    recorded = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if isinstance(row.get("correct"), bool)]
    disagreements = [(row, verdict) for row, verdict in recorded if row["correct"] != verdict.correct]
    if recorded:
        summary["agreement"] = 1 - len(disagreements) / len(recorded)
        summary["false_positives"] = sum(verdict.correct for _, verdict in disagreements)
        summary["false_negatives"] = len(disagreements) - summary["false_positives"]
    return summary, [_shown(row, verdict) for row, verdict in disagreements]


def table(summary: Json, disagreements: list[Json]) -> str:
    """The summary and some disagreements as text."""
    lines = [f"{name:16} {value:.4f}" if isinstance(value, float) else f"{name:16} {value}" for name, value in summary.items()]
    for row in disagreements:
        lines.append("\n" + "\n".join(f"  {name:9} {json.dumps(value, ensure_ascii=False)}" for name, value in row.items()))
    return "\n".join(lines)


def _own_rows(task: tasks.Task, data: str) -> dict[str, Json]:
    """The task's rows by the ids in its files, of every split whose file is in the folder."""
    found: dict[str, Json] = {}
    for split in task.splits:
        with suppress(UserError):  # not every split need be there
            found |= tasks.by_own_id(task, split, data)
    if not found:
        raise UserError(
            f"{data}: no questions of {task.name} with ids; give the folder that holds {task.name}/, or leave --data out"
        )
    return found


def _problem(row: Mapping[str, Any], task: tasks.Task, known: Mapping[str, Json], where: str) -> Json:
    """What the grader needs of a row: the task's own row where there is one, and over it what the row itself says."""
    own = str(row.get("question_id", ""))
    problem = dict(known.get(own, {"id": own or where}))
    problem |= {name: row[name] for name in ("choices", "n_choices", "answer_type") if row.get(name) is not None}
    if row.get("gold") is not None:
        problem["answer"] = str(row["gold"])
    if "answer" not in problem:
        raise UserError(f"{where}: no `gold`, and no question {own!r} of {task.name} to take it from; add it, or give --data")
    return problem


def _shown(row: Mapping[str, Any], verdict: Verdict) -> Json:
    recorded = {"correct": row["correct"], **({"answer": row["pred"]} if "pred" in row else {})}
    ours = {"correct": verdict.correct, "answer": verdict.answer, **({"reason": verdict.reason} if verdict.reason else {})}
    end = row["response"][-300:]
    return {"question": row.get("question_id"), "gold": row.get("gold"), "recorded": recorded, "here": ours, "response": end}
