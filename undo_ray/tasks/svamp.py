"""SVAMP: one-step arithmetic word problems with varied wording (Patel et al. 2021, arXiv 2103.07191).

Source: ChilleD/SVAMP on the hub, by arkilpatel/SVAMP. Licence: MIT. 700 train, 300 test.
A hub row (invented): {"ID": "chal-0", "Body": "Ida has 5 nuts and 2 cups.", "Question": "How many nuts per cup?",
"Equation": "( 5.0 / 2.0 )", "Answer": "2.5", "Type": "Common-Division", "question_concat": "Ida has ... per cup?"}
Metric: exact match of the final number (`grading.number`).
"""

from collections.abc import Mapping
from typing import Any

from undo_ray.tasks import Task


def _from_hub(row: Mapping[str, Any], index: int, split: str) -> dict[str, Any]:
    return {
        "id": f"svamp/{split}/{row['ID']}",
        "question": row["question_concat"],
        "answer": str(row["Answer"]),
        "subject": row["Type"],
        "solution": row.get("Equation"),
    }


SVAMP = Task(
    name="svamp",
    source="ChilleD/SVAMP (MIT)",
    kind="number",
    instruction="Reason step by step, then give the final answer as a number on a last line of its own: #### <number>",
    splits=("train", "test"),
    hub=("ChilleD/SVAMP", None),
    columns=("ID", "question_concat", "Answer", "Type"),
    from_hub=_from_hub,
)
