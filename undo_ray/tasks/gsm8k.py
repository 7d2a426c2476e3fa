"""GSM8K: grade-school word problems with an integer answer (Cobbe et al. 2021, arXiv 2110.14168).

Source: openai/gsm8k `main` on the hub, by openai/grade-school-math. Licence: MIT. 7,473 train, 1,319 test.
A hub row (invented): {"question": "A pen costs $2. What do 3 pens cost?", "answer": "3 pens cost 3*2 =
$<<3*2=6>>6.\\n#### 6"}
Metric: exact match of the final number (`grading.number`).
"""

from collections.abc import Mapping
from typing import Any

from undo_ray.tasks import Task


def _from_hub(row: Mapping[str, Any], index: int, split: str) -> dict[str, Any]:
    solution, _, answer = str(row["answer"]).rpartition("####") if "####" in str(row["answer"]) else ("", "", "")
    return {"id": f"gsm8k/{split}/{index}", "question": row["question"], "answer": answer.strip(), "solution": solution.strip()}


GSM8K = Task(
    name="gsm8k",
    source="openai/gsm8k (MIT)",
    kind="number",
    instruction="Reason step by step, then give the final answer as a number on a last line of its own: #### <number>",
    splits=("train", "test"),
    hub=("openai/gsm8k", "main"),
    columns=("question", "answer"),
    from_hub=_from_hub,
)
