"""Grading: what a model wrote against a problem's gold answer, as one `Verdict`.

One module per answer kind. A grader is a pure function of (text, problem), and finding the answer in the text is linear in it:
model output is hostile, so nothing here evaluates it or recurses over it. Whether two formulas are equal can take for ever all
the same, so the pipelines judge through `pool.Pool`, in processes that can be killed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from undo_ray.types import UserError, Verdict

Grader = Callable[[str, Mapping[str, Any]], Verdict]

KINDS: dict[str, str] = {
    "choice": "undo_ray.grading.choice:grade",
    "math": "undo_ray.grading.math:grade",
    "math_gold": "undo_ray.grading.math:gold",
    "number": "undo_ray.grading.number:grade",
    "theoremqa": "undo_ray.grading.theoremqa:grade",
    "yes_no": "undo_ray.grading.yes_no:grade",
}
"""Answer kind -> `module:function`, imported when first asked for. A literal, so that it is the same in every process."""


def grader(kind: str) -> Grader:
    """The grader of a kind of answers, or of `package.module:function`. Raises UserError when there is none."""
    module, colon, name = KINDS.get(kind, kind).partition(":")
    if not colon:
        known = ", ".join(sorted(KINDS))
        raise UserError(f"answer kind {kind!r} is unknown; use one of {known}, or package.module:function for your own")
    try:
        found: Grader = getattr(importlib.import_module(module), name)
        return found
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"answer kind {kind!r}: {error}; put its module on PYTHONPATH, name its function") from error


def warm(kind: str) -> None:
    """Import what a kind of answers needs and use it once, so that no answer's deadline pays for it."""
    module = sys.modules[grader(kind).__module__]
    if prepare := getattr(module, "warm", None):
        prepare()


def grade(text: str, problem: Mapping[str, Any], kind: str) -> Verdict:
    """The verdict on `text` as an answer to `problem` (the fields of `types.PROBLEM_FIELDS`), by the rule of `kind`.

    Private reasoning (`<think>...</think>`) is not searched for the answer unless nothing follows it. The reasons
    `truncated`, `engine_error` and `timeout` are the caller's. Raises UserError for an unknown kind or an ungradable gold.
    """
    _, closed, answer = text.rpartition("</think>")
    return grader(kind)(answer if closed and answer.strip() else text, problem)
