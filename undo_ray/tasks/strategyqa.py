"""StrategyQA: yes/no questions whose steps are left implicit (Geva et al. 2021, arXiv 2101.02235).

Source: ChilleD/StrategyQA on the hub, by eladsegal/strategyqa. Licence: MIT. 1,603 train, 687 test, both from the
authors' training and development sets; the official test set has no public answers.
A hub row (invented): {"qid": "0a1b", "term": "Snail", "description": "A slow animal", "question": "Could a snail outrun a
train?", "answer": false, "facts": ["Snails are slow."], "decomposition": ["How fast is a snail?"]}
Metric: exact match of yes or no (`grading`, kind `yes_no`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from undo_ray.tasks import Task


def _solution(facts: Iterable[str]) -> str:
    """The facts as one text, each a sentence."""
    stripped = (fact.strip() for fact in facts)
    return " ".join(fact if fact.endswith((".", "?", "!")) else f"{fact}." for fact in stripped)


def _from_hub(row: Mapping[str, Any], index: int, split: str) -> dict[str, Any]:
    return {
        "id": f"strategyqa/{split}/{index}",
        "question": row["question"],
        "answer": "yes" if row["answer"] is True else "no" if row["answer"] is False else None,
        "subject": row["term"],
        "solution": _solution(row.get("facts") or ()),
    }


STRATEGYQA = Task(
    name="strategyqa",
    source="ChilleD/StrategyQA (MIT)",
    kind="yes_no",
    instruction='Reason step by step, then finish with "the answer is yes" or "the answer is no".',
    splits=("train", "test"),
    hub=("ChilleD/StrategyQA", None),
    columns=("question", "answer", "term"),
    from_hub=_from_hub,
)
