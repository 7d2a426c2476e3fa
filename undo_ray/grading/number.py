r"""Answers that are one number: GSM8K, SVAMP, the miniature world.

Rule, in this order (the last statement of each form counts, as models correct themselves):
1. `#### 18`: how GSM8K's own solutions end (openai/grade-school-math, `dataset.py`);
2. the last balanced `\boxed{18}` (as for MATH; microsoft/rho and its math-evaluation-harness look for it first);
3. a stated answer: "the answer is 18", "Answer: 18", a line `A: 18` (few-shot practice; the OpenAI samples end so);
4. the last number of the text (EleutherAI/lm-evaluation-harness, `gsm8k`, filter `flexible-extract`).

Currency, thousands separators, units, percent signs and LaTeX dress are not part of the number: `\$1,234.00` = 1234 and
50 % = 50 (never 0.5). Comparison is exact, on fractions: 0.333 is not 1/3, and 2.67 is not 2.666.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from fractions import Fraction
from itertools import islice
from typing import Any, Final

from undo_ray.types import FORMAT, NO_ANSWER, UserError, Verdict

MAX_DIGITS: Final = 200
"""A longer number is no answer to a word problem: it is kept as written (cut to this length) and counted wrong."""

TYPOGRAPHIC: Final = str.maketrans("−﹣－＋０１２３４５６７８９．，：％＄／\u2009\u202f", "---+0123456789.,:%$/\u00a0\u00a0")
_DRESS: Final = (
    ("{,}", ","),
    ("\\!", ""),
    ("\\,", "\u00a0"),
    ("\\ ", " "),
    ("\\approx", " ≈ "),
    ("\\quad", " "),
    ("\\qquad", " "),
)

# No two repetitions in these can share characters: a scan is linear in the text. Groups are not possessive, for before Python
# 3.11.5 those keep what they failed on (python/cpython#106052); what follows a number says that it was read whole.
_THOUSANDS = r"[,\u00a0][0-9]{3}(?![0-9])"
_DIGITS = rf"(?:[0-9]++(?:{_THOUSANDS})*(?!{_THOUSANDS})(?:\.[0-9]++|(?!\.[0-9]))|\.[0-9]++)"
_MONEY = r"(?:\\?[$€£¥₹]\ ?)?"
NUMBER: Final = re.compile(
    rf"""
    (?<![A-Za-z0-9_^])(?<![_^]\{{)                  # not the digits of x2, m^2, a_{{2}}
    (?P<sign>[-+]\ ?)? {_MONEY} (?P<inner>-)?
    (?:
        (?P<whole>[0-9]{{1,9}}\ ?)?\\[dt]?frac\ ?
        (?:\{{\ ?(?P<top>-?{_DIGITS})\ ?\}}\ ?\{{\ ?(?P<bottom>{_DIGITS})\ ?\}}|(?P<top1>[0-9])(?P<bottom1>[0-9]))
      | (?P<hour>[0-9]{{1,2}}):(?P<minute>[0-9]{{2}})(?![0-9])
      | (?P<mixed>[0-9]{{1,9}})\ (?P<over>[0-9]{{1,9}})/(?P<under>[0-9]{{1,9}})(?![0-9]|/[0-9])
      | (?P<digits>{_DIGITS})
        (?: \ ?/\ ?{_MONEY}(?P<divisor>{_DIGITS})(?!\ ?/\ ?[0-9])
          | [eE](?P<e>[-+]?[0-9]{{1,3}})(?![0-9A-Za-z])
          | \ ?(?:\\times|\\cdot|×|[xX*])\ ?10\ ?(?:\^|\*\*)\ ?\{{?(?P<power>[-+]?[0-9]{{1,3}})(?![0-9])\}}?
        )?
    )
    (?P<raised>\ ?(?:\^|\*\*)\ ?\{{?\ ?[-0-9])?     # 2^3: an expression, not a number
    """,
    re.VERBOSE,
)
_HASHES: Final = re.compile(r"####([^\n]*+)")
_HEADING: Final = re.compile(r"[\s*_]*+[0-9]++[.):]\s++\S")
"""`#### 2. Add the parts` is a heading of a worked solution, not an answer."""
_BRACES: Final = re.compile(r"\\?(?:boxed|fbox)\ ?\{|\\[{}]|[{}]")
_TEXT: Final = re.compile(r"\\(?:text|mathrm|mbox|textbf|textrm|mathbf)\ ?\{([^{}]*+)\}")
_OPERATOR: Final = r"[+*<>|]|\\(?:times|cdot|div|pm|sqrt|pi)(?![a-z])"
_TERM_BEFORE: Final = re.compile(rf"{_OPERATOR}|-\s?$")
_TERM_AFTER: Final = re.compile(rf"{_OPERATOR}|^\s?(?:-|[xyzn]\b)")
"""Beside the number of a box, these make it part of a larger expression: `18 + x`, `3x`, `5\\pi`."""
_SUM: Final = re.compile(r"\s?(?:[-+*/×÷]|\\times|\\cdot|x\b)\s?[$(]{0,2}[0-9]")
"""After a stated number: the statement is a sum nobody worked out, or a range."""
_EQUALS: Final = re.compile(r"[=≈]")
IS: Final = re.compile(
    r"""\banswer(?:\s{1,3}(?:to|for|in)\b[^.,;\n]{0,60}?|\s?\([^()\n]{1,40}\))?["*_)]{0,3}\s{1,3}"""
    r"(?:is|was|are|equals|(?:will|would|should|must)\sbe)\b(?!\snot\b)",
    re.IGNORECASE,
)
COLON: Final = re.compile(r"""\banswer["'*_\s)]{0,8}[:=]|^[ \t>*_]{0,8}A[*_]{0,2}:""", re.IGNORECASE | re.MULTILINE)
LEAD: Final = re.compile(
    r"(?:[\s*_~:=≈($\\\[{\"']|approximately\b|about\b|exactly\b|only\b|boxed\b|text\b|[a-z]\ ?=)*", re.IGNORECASE
)
SENTENCE_END: Final = re.compile(r"[.!?](?=\s|$)|\n")
STATEMENT: Final = 400
"""Characters after "the answer is" in which the answer must stand. With the next limit this keeps the search linear."""
STATEMENTS: Final = 64
"""Statements looked at, from the last one backwards."""


def grade(text: str, problem: Mapping[str, Any]) -> Verdict:
    """The verdict on `text`: pure, linear in its length.

    `answer` is the number as written (separators and signs in ASCII). `reason` is `no_answer` when the text holds no
    number and `format` when what it states as the answer is not one readable number; both count as wrong. Raises
    UserError when the gold answer is not a number.
    """
    gold = _only(clean(str(problem["answer"])))
    wanted = gold[1] if gold else None
    if wanted is None:
        shown = str(problem["answer"])[:80]
        raise UserError(f"problem {problem.get('id')}: answer {shown!r} is not a number; correct or drop the row")
    found = _find(clean(text))
    if found is None:
        return Verdict(correct=False, answer=None, reason=NO_ANSWER)
    written, value = found
    written = written[:MAX_DIGITS].encode("utf-8", "replace").decode()  # a lone surrogate cannot be stored
    return Verdict(correct=value == wanted, answer=written, reason=FORMAT if value is None else None)


Found = tuple[str, Fraction | None]
"""A number as written, and its value (None: stated as the answer, but not readable as one number)."""


def _find(text: str) -> Found | None:
    """The answer of a cleaned text by the rule of this module, or None when there is none."""
    for line in reversed(_HASHES.findall(text)[-STATEMENTS:]):
        if not _HEADING.match(line) and (found := _opening(line[:STATEMENT])):
            return found
    if spans := boxes(text):
        content = text[slice(*spans[-1])]
        return _only(content) or (content, None)
    statements = [(match.end(), anywhere) for form, anywhere in ((IS, True), (COLON, False)) for match in form.finditer(text)]
    for end, anywhere in sorted(statements, reverse=True)[:STATEMENTS]:
        fragment = text[end : end + STATEMENT]
        if found := _opening(fragment) or (_first(fragment) if anywhere else None):
            return found
    return last(text)


def last(text: str) -> Found | None:
    """The last number of a text."""
    matches = deque(NUMBER.finditer(text), maxlen=1)
    return _read(matches[0]) if matches else None


def _opening(fragment: str) -> Found | None:
    """The number a statement opens with: `**$18**`, `x = 18`, `9 * 2 = 18 dollars`."""
    fragment = fragment[_lead_end(fragment) :]
    return _first(fragment) if NUMBER.match(fragment) else None


def _lead_end(fragment: str) -> int:
    match = LEAD.match(fragment)
    return match.end() if match else 0


def _first(fragment: str) -> Found | None:
    """The number a sentence states: the first one, or the first after its last equals sign."""
    end = SENTENCE_END.search(fragment)
    sentence = fragment[: end.start()] if end else fragment
    match = NUMBER.search(_EQUALS.split(sentence)[-1]) or NUMBER.search(sentence)
    return _read(match) if match and not _SUM.match(match.string, match.end()) else None


def _only(content: str) -> Found | None:
    """The single number of a box (or of a gold answer), or None when it holds none, several or an expression."""
    result = _EQUALS.split(content)[-1]
    bare = _TEXT.sub(" u ", result)
    if not NUMBER.search(bare):
        bare = _TEXT.sub(r" \1 ", result)
    matches = list(islice(NUMBER.finditer(bare), 2))
    if len(matches) != 1:
        return None
    match = matches[0]
    before = bare[: match.start()]
    if before.strip() and match["sign"] and not _is_negative(match):
        return None
    return None if _TERM_BEFORE.search(before) or _TERM_AFTER.search(bare[match.end() :]) else _read(match)


def boxes(text: str) -> list[tuple[int, int]]:
    """Spans of the contents of balanced, non-empty `\\boxed{...}` in the order they close; one pass, however many stay open."""
    opened: list[int | None] = []
    found = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}" and opened:
            start = opened.pop()
            if start is not None and text[start : match.start()].strip():
                found.append((start, match.start()))
        elif token.endswith("{") and token != "\\{":
            opened.append(None if token == "{" else match.end())
    return found


def clean(text: str) -> str:
    """`text` with full-width and typographic digits, signs and spaces in ASCII, and without LaTeX spacing."""
    text = text.translate(TYPOGRAPHIC)
    for dress, plain in _DRESS:
        text = text.replace(dress, plain)
    return text


def _read(match: re.Match[str]) -> Found:
    """A match of `NUMBER` as written and its exact value (None: too long, a power, a time of day, over zero)."""
    part = match.groupdict()
    written = match.group().strip()
    negative = _is_negative(match)
    if not negative:
        written = written.lstrip("-+ ")
    if part["raised"] or len(written) > MAX_DIGITS or part["minute"] not in (None, "00"):
        return written, None
    top = _exact(part["digits"] or part["top"] or part["top1"] or part["hour"] or part["over"])
    bottom = _exact(part["divisor"] or part["bottom"] or part["bottom1"] or part["under"] or "1")
    if not bottom:
        return written, None
    value = top / bottom + _exact(part["whole"] or part["mixed"] or "0")
    value *= Fraction(10) ** int(part["e"] or part["power"] or 0)
    return written, -value if negative else value


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace("\u00a0", "").strip())


def _is_negative(match: re.Match[str]) -> bool:
    """Whether the sign belongs to the number: not in `10 - 3`, `10 -3` or after a list dash."""
    if match["inner"]:
        return True
    sign = match["sign"] or ""
    before = match.string[max(0, match.start() - 4) : match.start()].rstrip()
    return sign.startswith("-") and (not before if sign == "- " else not before or before[-1] not in "0123456789)]}%")
