"""Grading: what a model wrote against a problem's gold answer, as one `Verdict`.

One module per answer kind. A grader is a pure function of (text, problem), linear in the text: model output is
hostile, so nothing here evaluates it or recurses over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from undo_ray.grading import choice, number, theoremqa, yes_no
from undo_ray.types import UserError, Verdict

KINDS: dict[str, Callable[[str, Mapping[str, Any]], Verdict]] = {
    "choice": choice.grade,
    "number": number.grade,
    "theoremqa": theoremqa.grade,
    "yes_no": yes_no.grade,
}
"""Answer kind -> grader. A literal, so that it is the same on every Ray worker."""


def grade(text: str, problem: Mapping[str, Any], kind: str) -> Verdict:
    """The verdict on `text` as an answer to `problem` (the fields of `types.PROBLEM_FIELDS`), by the rule of `kind`.

    Private reasoning (`<think>...</think>`) is not searched for the answer unless nothing follows it. The reasons
    `truncated` and `engine_error` are the caller's, from the finish reason. Raises UserError for an unknown kind or
    an ungradable gold.
    """
    if kind not in KINDS:
        raise UserError(f"answer kind {kind!r} is unknown; use one of: {', '.join(sorted(KINDS))}")
    _, closed, answer = text.rpartition("</think>")
    return KINDS[kind](answer if closed and answer.strip() else text, problem)
