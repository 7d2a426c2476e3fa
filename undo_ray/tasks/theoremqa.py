"""TheoremQA: university questions that need a theorem (Chen et al. 2023, arXiv 2305.12524).

Source: TIGER-Lab/TheoremQA on the hub, by TIGER-AI-Lab/TheoremQA. Licence: MIT. 800 test, of which 53 need a picture:
they are left out and counted.
A hub row (invented): {"Question": "What is the rank of the 2 x 2 identity matrix?", "Answer": "2", "Answer_type":
"integer", "Picture": null}
Metric: the rule of the answer type: bool, integer, float, list of integer, list of float, option (`grading`, kind
`theoremqa`).
"""

from collections.abc import Mapping
from typing import Any

from undo_ray.tasks import Task


def _from_hub(row: Mapping[str, Any], index: int, split: str) -> dict[str, Any]:
    return {"question": row["Question"], "answer": str(row["Answer"]), "answer_type": row["Answer_type"]}


def _rule(row: Mapping[str, Any]) -> tuple[bool, str] | None:
    picture = row.get("has_picture", row.get("Picture"))
    if isinstance(picture, Mapping):  # as the hub's Parquet files hold it: bytes and path
        picture = any(picture.values())
    return (False, "needs a picture") if picture else None


THEOREMQA = Task(
    name="theoremqa",
    source="TIGER-Lab/TheoremQA (MIT)",
    kind="theoremqa",
    instruction='Reason step by step, then finish with "the answer is ...": a number, a list such as [1, 2], True, False, '
    "or the letter of an option.",
    splits=("test",),
    hub=("TIGER-Lab/TheoremQA", None),
    columns=("Question", "Answer", "Answer_type", "Picture"),
    from_hub=_from_hub,
    rule=_rule,
    hashed_ids=True,
)
