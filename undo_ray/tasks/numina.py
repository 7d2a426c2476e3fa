r"""NuminaMath-CoT: about 860,000 mathematics questions with worked solutions; the paper's training source.

Source: AI-MO/NuminaMath-CoT on the hub (Li et al. 2024). Licence: Apache-2.0. 859,494 train, 100 test. It holds the
training questions of MATH and GSM8K, and relatives of test questions: what overlaps with the tests is removed (see
`clean`).
A hub row (invented): {"source": "cn_k12", "problem": "Compute $1 + 2$.", "solution": "The sum is $\\boxed{3}$.",
"messages": [{"role": "user", "content": "Compute $1 + 2$."}]}
The gold answer is the last box of the solution. Rows without one that can be graded are left out and counted.
Metric: equivalence (`grading`, kind `math`).
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from undo_ray.tasks import Task
from undo_ray.tasks.math import boxed

MAX_GOLD: Final = 200
"""Characters of a gold answer; a longer one is a text, not an answer."""

_PROOF: Final = re.compile(r"\b(?:proof|prove[sdn]?|q\.?e\.?d)\b", re.IGNORECASE)
_PARTS: Final = re.compile(r"(?<![a-z])\((?:a\).*(?<![a-z])\(b|i\).*(?<![a-z])\(ii|1\).*(?<![a-z])\(2)\)", re.IGNORECASE)


def _from_hub(row: Mapping[str, Any], index: int, split: str) -> dict[str, Any]:
    return {
        "id": f"numina/{split}/{index}",
        "question": row["problem"],
        "answer": boxed(str(row["solution"])),
        "solution": row["solution"],
        "subject": row["source"],
    }


def _rule(row: Mapping[str, Any]) -> tuple[bool, str] | None:
    gold = str(row["answer"]) if "id" in row else boxed(str(row["solution"]))
    if gold is None:
        return False, "no box"
    if not gold:
        return False, "empty box"
    if "\n" in gold:
        return False, "box of several lines"
    if len(gold) > MAX_GOLD:
        return False, f"box longer than {MAX_GOLD} characters"
    if _PROOF.search(gold):
        return False, "a proof"
    if _PARTS.search(gold):
        return False, "several parts"
    return None


NUMINA = Task(
    name="numina",
    source="AI-MO/NuminaMath-CoT (Apache-2.0)",
    kind="math",
    instruction="Reason step by step, and put the final answer in \\boxed{}.",
    splits=("train", "test"),
    hub=("AI-MO/NuminaMath-CoT", None),
    columns=("problem", "solution", "source"),
    from_hub=_from_hub,
    rule=_rule,
    sifted=True,
)
