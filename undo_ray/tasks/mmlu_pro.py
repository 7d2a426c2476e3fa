"""MMLU-Pro: multiple-choice questions of 14 categories with three to ten options (Wang et al. 2024, arXiv 2406.01574).

Source: TIGER-Lab/MMLU-Pro on the hub, by TIGER-AI-Lab/MMLU-Pro. Licence: MIT. 12,032 test, 70 validation (five a
category, worked examples); no training split.
A hub row (invented): {"question_id": 7, "question": "Which is a metal?", "options": ["Neon", "Iron", "Sulfur"], "answer":
"B", "answer_index": 1, "cot_content": "", "category": "chemistry", "src": "made up"}
The letter is the gold answer; where the index disagrees (question 3983) the row is kept and counted.
Metric: exact match of the letter (`grading`, kind `choice`).
"""

from collections.abc import Mapping
from typing import Any

from undo_ray.tasks import Task


def _from_hub(row: Mapping[str, Any], index: int, split: str) -> dict[str, Any]:
    return {
        "id": f"mmlu_pro/{split}/{row['question_id']}",
        "question": row["question"],
        "answer": row["answer"],
        "choices": row["options"],
        "subject": row["category"],
    }


def _rule(row: Mapping[str, Any]) -> tuple[bool, str] | None:
    index = row.get("answer_index")
    return (
        (True, "letter and index disagree, the letter counts")
        if index not in (None, "ABCDEFGHIJ".find(str(row["answer"])))
        else None
    )


MMLU_PRO = Task(
    name="mmlu_pro",
    source="TIGER-Lab/MMLU-Pro (MIT)",
    kind="choice",
    instruction='Reason step by step, then finish with "the answer is (X)", where X is the letter of the right option.',
    splits=("test", "validation"),
    hub=("TIGER-Lab/MMLU-Pro", None),
    columns=("question_id", "question", "options", "answer", "category"),
    from_hub=_from_hub,
    rule=_rule,
)
