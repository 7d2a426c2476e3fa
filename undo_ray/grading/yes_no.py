r"""Answers that are yes or no: StrategyQA. True and false count as yes and no.

Rule, in this order:
1. the last statement ("So the answer is no", the form of arXiv 2201.11903, appendix G; "the answer (Yes or No) is", of
   kojima-takeshi188/zero_shot_cot; "Answer: no", `\boxed{yes}`): the word it opens with, or the one polarity of its sentence;
2. the last line that opens with the word: "No, because ...", "**Yes**";
3. the last such word of the text (zero_shot_cot, `answer_cleansing`). "no" before a noun is no answer.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from undo_ray.grading import statements
from undo_ray.types import FORMAT, NO_ANSWER, UserError, Verdict

_WORD: Final = re.compile(
    r"\b(?P<not>not\s{1,3}(?:necessarily\s{1,3})?)?(?:(?P<yes>yes|true)|no(?=\s{0,3}(?:[^\w\s]|\n|$))|false)\b", re.IGNORECASE
)
_OPENING: Final = re.compile(
    r"(?:not\s{1,3}(?P<not>(?=true|false)))?(?:(?P<yes>yes|true)|no(?!\s(?:longer|one|more|doubt|way|such|idea)\b)|false)\b",
    re.IGNORECASE,
)
_LINE: Final = re.compile(rf"^[ \t>*_#$\\(\"'-]{{0,12}}(?P<word>{_WORD.pattern})", re.IGNORECASE | re.MULTILINE)


def grade(text: str, problem: Mapping[str, Any]) -> Verdict:
    """The verdict on `text`: pure, linear in its length.

    `reason` is `no_answer` when the text says neither, `format` when what it states as the answer is neither. Raises UserError
    when the gold answer is not yes or no.
    """
    gold = _OPENING.fullmatch(str(problem["answer"]).strip())
    if not gold:
        shown = str(problem["answer"])[:80]
        raise UserError(f"problem {problem.get('id')}: answer {shown!r} is not yes or no; correct or drop the row")
    found = find(text)
    if found is None:
        return Verdict(correct=False, answer=None, reason=NO_ANSWER)
    said, value = found
    return Verdict(value == _polarity(gold), statements.written(said), FORMAT if value is None else None)


def find(text: str) -> tuple[str, bool | None] | None:
    """The word by the rule of this module and whether it affirms (None: something else is stated); None when there is none."""
    if found := statements.answer(text, read):
        return found
    text = statements.own(text)
    for form in (_LINE, _WORD):
        if last := deque(form.finditer(text), maxlen=1):
            return last[0].group(), _polarity(last[0])
    return None


def read(fragment: str) -> tuple[str, bool] | None:
    """The word that a fragment opens with and whether it affirms, or the one polarity of its first sentence."""
    if opening := _OPENING.match(statements.undressed(fragment)):
        return opening.group(), _polarity(opening)
    words = list(_WORD.finditer(statements.sentence(fragment)))
    return (words[-1].group(), _polarity(words[-1])) if len({_polarity(word) for word in words}) == 1 else None


def _polarity(word: re.Match[str]) -> bool:
    return (word["yes"] is not None) != (word["not"] is not None)
