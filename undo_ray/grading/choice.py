r"""Answers that are one of several options: MMLU-Pro.

Rule, in this order (the last statement of each form counts; the official script takes the first and guesses at random when
there is none, this never guesses):
1. "the answer is (C)", "Answer: C", `\boxed{C}` (TIGER-AI-Lab/MMLU-Pro, `evaluate_from_local.py`), in parentheses, bold or
   LaTeX dress or bare, of the letters that the question has; or, in the same place, the text of exactly one option;
2. "the correct option is C", "(C) is correct";
3. a last line that is nothing but a letter: `C`, `(C)`, `**C.**`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any, Final

from undo_ray.grading import statements
from undo_ray.grading.number import IS
from undo_ray.types import FORMAT, NO_ANSWER, UserError, Verdict

MOST: Final = 10
"""Options of a question that does not say how many it has: MMLU-Pro has 3 to 10."""

_COLON: Final = re.compile(r"""\banswer["'*_\s)]{0,8}[:=]""", re.IGNORECASE)
"""Unlike with numbers, `A:` at the head of a line is an option, not a statement."""
_STATED: Final = (IS, _COLON, statements.BOX)
_OPTION: Final = re.compile(
    r"\b(?:option|choice)[*_]{0,2}\s{1,3}(?:is|would\sbe)\b(?!\snot\b)|\b(?:correct|right|best)\s(?:option|choice)[*_]{0,2}\s?:",
    re.IGNORECASE,
)
_CORRECT: Final = re.compile(
    r"(?<![\w'])(?=\(?[*_]{0,2}[A-Z]\)?[*_]{0,2}\s{1,3}(?:is|would\sbe)\s{1,3}(?:the\s)?(?:(?:most|single)\s)?(?:correct|right|best)\b)"
)
_FOLLOWS: Final = r"(?:because|since|as|is|and|or|for|which|with|due|from|by)\b"
_LETTER: Final = re.compile(
    # A bare A or I before a word is English ("I think"); a letter before an operator is a formula ("E = mc^2").
    rf"(?:[B-HJ-Z]|[AI](?!\s(?!{_FOLLOWS})[a-z]))(?![\w'’]|-\w|\s?[=^/+])|[a-z](?=\s?[)}}\]])"
)
_BARE: Final = re.compile("[a-z]?")
"""An option whose text is a letter (or nothing) is not stated by it: "The answer is B" names the second one."""
_PART: Final = re.compile(r"(?<![\w)])\(?(?:[a-z]|i{1,3}|iv)\)")
"""Further on behind a small letter: the answer has parts, a) and b)."""
_LAST_LINE: Final = re.compile(r"(?:^|\n)[\s*_(\[$\\{>]{0,12}(?=[A-Z][\s*_)\]$\\}.]{0,12}\Z)")
_DRESS: Final = re.compile(r"\\(?:text|mathrm|textbf|mathbf|left|right)(?![a-z])|\\[()\[\],!;]|[$*_\\{}\"“”]")
_ENDS: Final = re.compile(rf"[\s)\]'’]{{0,3}}(?:\Z|[.;:!?](?=\s|\Z)|,(?=\s)|\(|\n|\s{_FOLLOWS})")


def grade(text: str, problem: Mapping[str, Any]) -> Verdict:
    """The verdict on `text`: pure, linear in its length.

    `answer` is the letter. `reason` is `no_answer` when the text states nothing, `format` when what it states is no option.
    Without `choices` the letters go up to `n_choices`, or to J. Raises UserError when the gold answer is no such letter.
    """
    options = [str(option) for option in problem.get("choices") or ()]
    letters = ascii_uppercase[: len(options) or int(problem.get("n_choices") or MOST)]
    gold = str(problem["answer"]).strip().upper()
    if len(gold) != 1 or gold not in letters:
        shown = str(problem["answer"])[:80]
        raise UserError(f"problem {problem.get('id')}: answer {shown!r} is no letter from A to {letters[-1]}; correct it")
    found = _find(text, letters, options)
    if found is None:
        return Verdict(correct=False, answer=None, reason=NO_ANSWER)
    said, at = found
    return Verdict(at == gold, at or statements.written(said), None if at else FORMAT)


def _find(text: str, letters: str, options: list[str]) -> tuple[str, str | None] | None:
    def read(fragment: str) -> tuple[str, str] | None:
        # The text first: "I and II" and "(a) 5 V, (b) 3 V" are options of their own.
        return _option(fragment, letters, options) or letter(fragment, letters)

    def bare(fragment: str) -> tuple[str, str] | None:
        return letter(fragment, letters)

    found = statements.answer(text, read, _STATED)
    if found and found[1]:
        return found
    tail = text.rstrip()[-40:]
    others = statements.answer(text, bare, (_OPTION, _CORRECT)) or statements.answer(tail, bare, (_LAST_LINE,))
    return others if others and others[1] else found


def letter(fragment: str, letters: str) -> tuple[str, str] | None:
    """The letter a fragment opens with, twice: as written and in upper case. Small letters count in brackets alone."""
    fragment = statements.undressed(fragment)
    match = _LETTER.match(fragment)
    if not match or (match.group().islower() and _PART.search(fragment, match.end() + 1)):
        return None
    at = match.group().upper()
    return (match.group(), at) if at in letters else None


def _option(fragment: str, letters: str, options: list[str]) -> tuple[str, str] | None:
    """The letter of the one option that a fragment opens with word for word; the longest where one opens another."""
    said = _plain(fragment)
    matches = [
        (plain, at)
        for at, option in zip(letters, options, strict=False)
        if said.startswith(plain := _plain(option)) and not _BARE.fullmatch(plain) and _ENDS.match(said, len(plain))
    ]
    longest = [match for match in matches if len(match[0]) == max(len(plain) for plain, _ in matches)]
    return longest[0] if len(longest) == 1 else None


def _plain(text: str) -> str:
    return re.sub(r"[ \t]+", " ", _DRESS.sub("", text)).strip(" \t\n:='‘’").rstrip(".").casefold()
