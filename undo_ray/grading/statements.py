r"""Where a text states its answer: what the graders of letters, of yes and no, and of TheoremQA share.

A statement is "the answer is ...", "Answer: ..." or `\boxed{...}`. The last one that can be read counts, as models correct
themselves; "this answer is correct" states nothing. Only what the model wrote about its own question counts: a base model
goes on after its answer with new problems and answers them too, so a text ends where, after a statement, a line opens a new
problem (the stop strings of TIGER-AI-Lab/TheoremQA, `run.py`, and of TIGER-AI-Lab/MMLU-Pro, `evaluate_from_local.py`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from undo_ray.grading.number import COLON, IS, LEAD, SENTENCE_END, STATEMENT, STATEMENTS

BOX: Final = re.compile(r"\\(?:boxed|fbox)\s?\{")
FORMS: Final = (IS, COLON, BOX)
_JUDGES: Final = re.compile(r"this\s$", re.IGNORECASE)
_NEW_PROBLEM: Final = re.compile(
    r"\n[ \t#*>]{0,8}(?:Problem|Question|Q|Instruction|Input|User|Human|Response)\b[ \t*\d.]{0,8}(?::|\n)"
    r"|(?-i:USER:|ASSISTANT:)|<start_of_turn>|\[INST\]|<\|",
    re.IGNORECASE,
)
MAX_WRITTEN: Final = 200
"""Characters of an answer that are kept in a verdict."""

Value = TypeVar("Value")


def answer(
    text: str, read: Callable[[str], tuple[str, Value] | None], forms: tuple[re.Pattern[str], ...] = FORMS
) -> tuple[str, Value | None] | None:
    """The answer of `text`: as written and as `read` makes it of what follows a statement.

    The value is None when statements are there and none can be read; the result is None when nothing is stated.
    """
    text = own(text, forms)
    ends = sorted(
        {
            match.end()
            for form in forms
            for match in deque(form.finditer(text), maxlen=4 * STATEMENTS)
            if not _JUDGES.search(text, max(0, match.start() - 5), match.start())
        }
    )[-STATEMENTS:]
    for end in reversed(ends):
        if found := read(text[end : end + STATEMENT]):
            return found
    return (sentence(text[ends[-1] : ends[-1] + STATEMENT]), None) if ends else None


def own(text: str, forms: tuple[re.Pattern[str], ...] = FORMS) -> str:
    """`text` as far as it is about its own question."""
    starts = [match.start() for form in forms if (match := form.search(text))]
    new = _NEW_PROBLEM.search(text, min(starts)) if starts else None
    return text[: new.start()] if new else text


def undressed(fragment: str) -> str:
    """`fragment` without the dress before the answer."""
    match = LEAD.match(fragment)
    return fragment[match.end() :] if match else fragment


def sentence(fragment: str) -> str:
    """The first sentence of a fragment, without the dress before it."""
    fragment = undressed(fragment)
    end = SENTENCE_END.search(fragment)
    return fragment[: end.start()] if end else fragment


def written(found: str) -> str:
    """An answer as a verdict can keep it: short, and without lone surrogates, which cannot be stored."""
    return found.strip()[:MAX_WRITTEN].encode("utf-8", "replace").decode()
