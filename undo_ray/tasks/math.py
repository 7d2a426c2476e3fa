r"""MATH: competition problems with an answer in LaTeX (Hendrycks et al. 2021, arXiv 2103.03874).

Source: EleutherAI/hendrycks_math on the hub, one configuration for each of seven subjects, by hendrycks/math. Licence:
MIT; Art of Problem Solving asserts rights in the problem texts. 7,500 train, 5,000 test. The split `math500` is
HuggingFaceH4/MATH-500, 500 of the test problems (Lightman et al. 2023, arXiv 2305.20050).
A hub row (invented): {"problem": "If $2x = 6,$ what is $x$?", "level": "Level 1", "type": "Algebra", "solution": "Halving
both sides gives $x = \\boxed{3}.$"}
The gold answer is the last box of the solution. Two training problems have an empty one and are left out.
Metric: equivalence (`grading`, kind `math`).
"""

import re
from collections.abc import Mapping
from typing import Any

from undo_ray.tasks import Task

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def boxed(solution: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, `\fbox{...}` or `\boxed x` of a solution; None when there is no box, or it is
    never closed."""
    ends = [box.end() for box in _BOX.finditer(solution)]
    if not ends:
        return None
    rest = solution[ends[-1] :]
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip()  # `\boxed 3$`: the box ends with the formula
    depth = 0
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            return rest[1 : brace.start()].strip()
    return None


def _from_hub(row: Mapping[str, Any], index: int, split: str) -> dict[str, Any]:
    level = str(row.get("level")).removeprefix("Level ")
    return {
        "question": row["problem"],
        "answer": boxed(str(row["solution"])),
        "solution": row["solution"],
        "subject": row.get("type") or row.get("subject"),
        "level": level if level.isdecimal() else None,
    }


def _rule(row: Mapping[str, Any]) -> tuple[bool, str] | None:
    return (False, "empty box") if "id" not in row and boxed(str(row["solution"])) == "" else None


_EVERY_SUBJECT = {
    split: tuple(("EleutherAI/hendrycks_math", subject, split) for subject in SUBJECTS) for split in ("train", "test")
}

MATH = Task(
    name="math",
    source="EleutherAI/hendrycks_math, HuggingFaceH4/MATH-500 (MIT)",
    kind="math",
    instruction="Reason step by step, and put the final answer in \\boxed{}.",
    splits=("train", "test", "math500"),
    hub=("EleutherAI/hendrycks_math", None),
    parts={**_EVERY_SUBJECT, "math500": (("HuggingFaceH4/MATH-500", None, "test"),)},
    columns=("problem", "solution"),
    from_hub=_from_hub,
    rule=_rule,
    hashed_ids=True,
)
