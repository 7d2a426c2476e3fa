r"""Answers that are mathematics in LaTeX: MATH, MATH-500, NuminaMath.

Which text is the answer (of each form the last counts, and a statement that follows the last box beats it):
1. `\boxed{...}` or `\fbox{...}`, balanced and not empty, also `\boxed x` (hendrycks/math, `last_boxed_only_string`). Boxes
   parted by nothing but "and", commas and dollar signs are one answer: `$\boxed{-2}$ and $\boxed{1}$` is -2, 1 (Math-Verify);
2. "The final answer is $...$", "the answer is ...", "Answer: ..." (the prompt of Minerva, arXiv 2206.14858, appendix D);
3. what stands last: a formula in prose (`$...$`, `\(...\)`) or a number; of a computation that breaks off the last number, as
   the harnesses of the field do (microsoft/rho, Qwen2.5-Math).

Right is what is the same text as the gold after the normalisation of MATH (hendrycks/math, `math_equivalence.py`: units,
degrees, percent and dollar signs, `\left`, `\dfrac`, `\frac12`, `.5`, `x =` are dress), or what Math-Verify finds to be the
same mathematics. Only a short and shallow formula goes to Math-Verify, and only by way of its LaTeX grammar: its other way in,
plain expressions, ends in sympy's `parse_expr`, which evaluates Python.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from undo_ray.grading import number
from undo_ray.types import FORMAT, NO_ANSWER, UserError, Verdict

MAX_LENGTH: Final = 800
"""Characters of an answer that is compared as mathematics; a longer one is compared as text alone."""
MAX_DEPTH: Final = 20
"""Nested brackets of such an answer: the grammar is recursive, so deeper ones would cost its stack."""
MAX_DIGITS: Final = 60
"""Digits in a row of such an answer. Longer numbers are compared as text."""

_BARE_BOX: Final = re.compile(r"\\boxed\s{1,3}([^\s{}$\\]{1,40})")
_AND: Final = r"(?:[\s,;.]|\\q?quad|\\text ?\{ ?(?:and|or) ?\}|and|or){0,12}"
_BETWEEN_BOXES: Final = re.compile(rf"\}}(?:\$|\\[])]|{_AND}|\$|\\[\[(]){{0,3}}\\(?:boxed|fbox) ?\{{", re.IGNORECASE)
_STATEMENT: Final = re.compile(
    r"\banswers?(?:\s{1,3}(?:to|for|in)\b[^.,;\n]{0,60}?)?[\"*_)]{0,3}(?:\s{1,3}(?:is|are)\b|\s?:|\s{1,3}(?=[$\\]))(?!\s{0,3}not\b)"
    r"(?:[\s*_:\"]|\\\"){0,8}",
    re.IGNORECASE,
)
_FORMULA: Final = re.compile(
    r"\$\$([^$]{1,1000})\$\$|\\\[(.{1,1000}?)\\\]|(?<!\\)\$((?:[^$\\]|\\.){1,1000})\$|\\\((.{1,1000}?)\\\)", re.DOTALL
)
_DISPLAYED: Final = ("$$", "\\[")
_SENTENCE_END: Final = re.compile(r"\.(?=\s|$)|[!?\n]|\bI hope\b|<\|")
_NEXT: Final = re.compile(_AND, re.IGNORECASE)
_LATEX: Final = re.compile(r"[\\^_&|]")
_PROSE: Final = re.compile(r"\n|\\(?:boxed|fbox)|(?<![\\a-zA-Z])[a-zA-Z]{2,} [a-zA-Z]{2}")
_PIECES: Final = re.compile(r"(?<=[.!?])\s|\n|\$\$")
_DIGITS: Final = re.compile(r"-?\d*\.?\d+")
_MATHEMATICAL: Final = re.compile(r"[-+]?[.\d\\(\[{]|[a-zA-Z]{1,2}\s?[-+*/=<>^_(\\]|\S{1,20}$")
_IN_BASE: Final = re.compile(r"[0-9A-Z.]+ ?_ ?\{?\d+\}?")
_TAIL: Final = 4000
"""Characters from the end in which an answer that nothing announces is looked for."""


def grade(text: str, problem: Mapping[str, Any]) -> Verdict:
    """The verdict on `text`. Run it in the pool: Math-Verify may take for ever (huggingface/Math-Verify#65).

    `reason` is `no_answer` when the text states nothing, and `format` when the gold is mathematics and what is stated cannot
    be read as such. Raises UserError when the gold answer is empty.
    """
    gold = normal(_plain(str(problem["answer"])))
    if not gold:
        shown = str(problem["answer"])[:80]
        raise UserError(f"problem {problem.get('id')}: answer {shown!r} holds no mathematics; correct or drop the row")
    found = text if text.strip() == str(problem["answer"]).strip() else extract(text)
    if found is None:
        return Verdict(correct=False, answer=None, reason=NO_ANSWER)
    written = found[:MAX_LENGTH].encode("utf-8", "replace").decode()  # a lone surrogate cannot be stored
    answer = normal(found)
    if _bare(answer) == _bare(gold):
        return Verdict(correct=True, answer=written)
    if _IN_BASE.fullmatch(answer) and _IN_BASE.fullmatch(gold):
        return Verdict(correct=False, answer=written)  # Math-Verify drops the base: 10_8 would be 10_9
    wanted, got = parsed(gold), parsed(answer)
    if not wanted or not got:
        # A gold in words ("Evelyn") that other words miss is a wrong answer; a formula nobody can read is none.
        return Verdict(correct=False, answer=written, reason=FORMAT if wanted else None)
    from math_verify import verify

    return Verdict(correct=bool(verify(list(wanted), list(got), timeout_seconds=None)), answer=written)


def same(text: str, problem: Mapping[str, Any]) -> bool:
    """Whether a text is the gold answer as it is written, but for its dress: what `grade` finds right without Math-Verify."""
    gold = normal(_plain(str(problem["answer"])))
    return bool(gold) and _bare(normal(text)) == _bare(gold)


def gold(text: str, problem: Mapping[str, Any]) -> Verdict:
    """Whether Math-Verify can read the gold answer: for sources whose golds nobody has checked. `text` plays no part."""
    return Verdict(correct=bool(parsed(normal(_plain(str(problem["answer"]))))))


def warm() -> None:
    """Load Math-Verify and sympy, and use their ways of comparing once: a second, which forked workers then need not spend."""
    for gold, answer in _USES:
        grade(rf"\boxed{{{answer}}}", {"answer": gold})


def _plain(gold: str) -> str:
    """A gold answer bare; one that comes as a formula, a box or a worked text is read as an answer is."""
    return (extract(gold) if "\\boxed" in gold or _FORMULA.search(gold) else None) or gold


# -- which text is the answer -------------------------------------------------------------------------------------------


def extract(text: str) -> str | None:
    """The answer a text states, as written; None when there is none. Linear in the text."""
    whole = text.strip().rstrip(" .")
    formulas, end = _formulas(whole)
    if formulas and end == len(whole) and "boxed" not in formulas:
        return formulas
    if len(whole) <= 200 and _MATHEMATICAL.match(whole) and not _PROSE.search(whole):
        return whole
    box, end = _boxed(text)
    for match in reversed(deque(_STATEMENT.finditer(text, max(end, 0)), maxlen=64)):
        if stated := _opening(text[match.end() : match.end() + 2000]):
            return stated
    return box or _last(text[-_TAIL:])


def _boxed(text: str) -> tuple[str | None, int]:
    """The last box, joined with those right before it (each content once), and where it ends."""
    spans = number.boxes(text)[-64:]
    if not spans:
        bare = deque(_BARE_BOX.finditer(text), maxlen=1)
        return (bare[0][1], bare[0].end()) if bare else (None, -1)
    joined = [spans[-1]]
    for span in reversed(spans[:-1]):
        if not _BETWEEN_BOXES.fullmatch(text, span[1], joined[0][0]):
            break
        joined.insert(0, span)
    return ", ".join(dict.fromkeys(text[start:end].strip() for start, end in joined)), spans[-1][1]


def _opening(fragment: str) -> str | None:
    """The answer a statement opens with: a formula, or the rest of its sentence where that looks like mathematics."""
    if formulas := _formulas(fragment)[0]:
        return formulas
    end = _SENTENCE_END.search(fragment)
    sentence = (fragment[: end.start()] if end else fragment).strip(" \t*_\"'")
    if _MATHEMATICAL.match(sentence) and len(sentence) <= 200:
        return sentence
    after = sentence.rpartition(" is ")[2]
    found = _FORMULA.search(after)
    return _formulas(after[found.start() :])[0] if found else _last(after)


def _formulas(text: str) -> tuple[str | None, int]:
    """The formula a text opens with, with those that "and" and commas join to it, and where the last one ends."""
    found: list[str] = []
    end = position = 0
    while (formula := _FORMULA.match(text, position)) and len(found) < 16:
        found.append(_content(formula))
        end = formula.end()
        between = _NEXT.match(text, end)
        position = between.end() if between else end
    return ", ".join(found) or None, end


def _last(tail: str) -> str | None:
    """What stands last: a formula in prose, a number in prose, or the last number of a computation that breaks off."""
    tail = tail.partition("<|")[0]
    formulas = [match for match in _FORMULA.finditer(tail) if not match.group().startswith(_DISPLAYED)]
    after = tail[formulas[-1].end() :] if formulas else tail
    for piece in reversed(_PIECES.split(after)):
        if digits := deque(_DIGITS.finditer(piece.replace(",", "")), maxlen=1):
            found = None if _LATEX.search(piece) else number.last(piece)
            return found[0] if found else digits[0].group()
    return _content(formulas[-1]) if formulas else None


def _content(formula: re.Match[str]) -> str:
    return str(next(filter(None, formula.groups()))).strip()


# -- the same text ------------------------------------------------------------------------------------------------------

_WORDS: Final = r"\\(?:text|mbox|textnormal|textbf|textrm|textit|mathrm|mathbf|operatorname)\s?"
_RULES: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r",\s?\\!\s{0,2}|\{,\}", ","),
        (r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])\s?|(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|[~\s]+", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\^\s?\{?\s?\\circ(?![a-zA-Z])\s?\}?|°|\\degree(?![a-zA-Z])", ""),
        (r"\\?[$%]|[€£¥]", ""),
        (_WORDS + r"\{ {0,2}(?:and|or) {0,2}\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])", ","),
        (r", ?,", ","),
        # A unit behind a number, with its exponent: 15\mbox{ cm}^2.
        (r"(?<=[\d})])\s?" + _WORDS + r"\{[^{}]{0,40}\}(?:\s?\^\s?\{?\d\}?)?$", ""),
        (_WORDS + r"\{([^{}]{0,200})\}", r"\1"),
        (r"(?<!\d)\.(?=\d)", "0."),
        (r"\\sqrt\s?(\w)", r"\\sqrt{\1}"),
        (r"\\frac\s?(\w)\s?(\w)", r"\\frac{\1}{\2}"),
        (r"\\frac\s?(\d)\s?\{", r"\\frac{\1}{"),
        (r"\\frac\s?(\{[^{}]{1,40}\})\s?(\d)", r"\\frac\1{\2}"),
        (r"^(-?\d{1,9}) ?/ ?(\d{1,9})$", r"\\frac{\1}{\2}"),
        (r"^[a-zA-Z]{1,2} ?=(?=[^=]{1,400}$)", ""),
        (r"([_^])\{(\w)\}", r"\1\2"),
        # Plain-text mathematics, as programs print it.
        (r"(?<![\\a-zA-Z])sqrt ?\(([^()]{1,60})\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(pi|infty|sin|cos|tan|log|ln|exp)(?![a-zA-Z])", r"\\\1"),
        (r"\*\*", "^"),
        (r"\^\((-?\d{1,9})\)", r"^{\1}"),
        (r"\*|(?<=\d) ?(?=\(-?\d{1,9}\))", r" \\cdot "),
    )
)
_THOUSANDS: Final = re.compile(r"-?\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?")


def normal(answer: str) -> str:
    """An answer without its dress, still LaTeX, spaces kept where they part commands from letters."""
    text = answer.translate(number.TYPOGRAPHIC).strip()[: 2 * MAX_LENGTH]
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z{}(\[,!%$])", r"\\", text)  # records that escaped it twice
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.strip(" .")
    return text.replace(",", "").replace(" ", "") if _THOUSANDS.fullmatch(text) else text


def _bare(text: str) -> str:
    return text.replace(" ", "")


_USES: Final = (
    (r"x^2 + 0.5 \cdot \sqrt{3}", r"\frac{\sqrt{3}}{2} + x^2"),
    ("p - q", "3"),
    (r"(3, \frac{\pi}{2})", r"(3, \frac{\pi}{3})"),
    (r"[0, 1) \cup (2, \infty)", r"(0, 1] \cup [2, \infty)"),
    (r"x \in [-2, 7]", r"-2 \le x \le 8"),
    (r"\{1, 2, 3\}", "1, 2, 4"),
    (r"\begin{pmatrix} 1 & \frac{1}{2} \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"),
    ("5x - 7y + 11z + 4 = 0", "x - y + z + 1 = 0"),
    ("y = 2x + 3", "x < 5"),
    ("3 - 4i", "3 + 4i"),
    (r"\sin 2x", r"2 \sin x \cos y"),
    (r"\frac{x+1}{x^2-1}", r"1 \pm \sqrt[3]{2}"),
    (r"\log_2 8 + \binom{5}{2}", r"e^{3} + 4!"),
    (r"\text{even}", "(x+1)(x-2)"),
)
"""Pairs of answers of the kinds that benchmarks have."""


# -- the same mathematics -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=2048)
def parsed(answer: str) -> tuple[Any, ...]:
    """A normalised answer as Math-Verify reads LaTeX (sympy objects); empty when it cannot, or should not."""
    if not answer or len(answer) > MAX_LENGTH or _depth(answer) > MAX_DEPTH or re.search(rf"\d{{{MAX_DIGITS + 1}}}", answer):
        return ()
    from math_verify import LatexExtractionConfig, parse

    return tuple(parse(f"${answer}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None))


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest
