r"""Answers of TheoremQA: an integer, a float, a list of either, true or false, or the letter of an option.

Which statement counts: the last readable one before the text opens a new problem (see `statements`); of a text caught in a
loop, which says its answer over and over, the last one of its first paragraph. Without a statement there, the last word of
truth for a bool, the last number for a number. Both are the rule of TIGER-AI-Lab/TheoremQA (`utils.py`, `answer_clean`), which
takes any second statement for a loop; but a worked solution may well state its answer twice.

What counts as equal, by the type (same file, `compare_two_numbers`, `compare_two_list`): an integer, when rounding gives it; a
float, within 4 % of the gold (so 0.0 is 0 alone); lists, the same length and equal element by element in ascending order;
a bool, also as yes or no; an option, its letter. Percent is a hundredth, units are not part of a number.

A stated number may be an expression: digits, + - * / ^, factorial, brackets, roots, logarithms, exponentials, trigonometric
functions, pi and e, plain or in LaTeX. It is read by recursive descent with a depth limit in floating point arithmetic, where
each step costs the same however big the number is: what overflows is refused.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any, Final

from undo_ray.grading import choice, number, statements, yes_no
from undo_ray.types import FORMAT, NO_ANSWER, UserError, Verdict

TOLERANCE: Final = 0.04
"""Of a float, relative to the gold."""
LOOP: Final = 3
"""The same statement more often than this is a loop. Between 2 and 9 the verdicts on recorded answers hardly depend on it."""
MAX_DEPTH: Final = 20
"""Nested brackets, signs and powers of an expression."""

_SAID: Final = re.compile(r"[Tt]he answer is[^\n]{0,60}")

Value = bool | str | float | list[float]


def grade(text: str, problem: Mapping[str, Any]) -> Verdict:
    """The verdict on `text`: pure, linear in its length.

    Without `answer_type` the gold shows it: `True`, `(b)`, `[1, 2]`, `3`, `3.0`. `reason` is `no_answer` when the text holds no
    answer of that type, `format` when what it states cannot be read as one. Raises UserError for a gold that is none.
    """
    gold = str(problem["answer"]).strip()
    kind = str(problem.get("answer_type") or _kind(gold))
    read = _READERS.get(kind)
    wanted = read(gold) if read else None
    if read is None or wanted is None:
        raise UserError(f"problem {problem.get('id')}: answer {gold[:80]!r} is no {kind}; correct or drop the row")
    if text.strip() == gold:
        return Verdict(correct=True, answer=statements.written(gold))
    text = _own(text)
    found = statements.answer(text, read) or _unstated(text, kind)
    if found is None:
        return Verdict(correct=False, answer=None, reason=NO_ANSWER)
    said, value = found
    correct = value is not None and _equal(value, wanted[1], "integer" in kind)
    return Verdict(correct, statements.written(said), FORMAT if value is None else None)


def _kind(gold: str) -> str:
    if gold.startswith("["):
        return "list of float" if "." in gold else "list of integer"
    if re.fullmatch(r"\([a-zA-Z]\)", gold):
        return "option"
    if gold.lower() in ("true", "false"):
        return "bool"
    return "integer" if re.fullmatch(r"[-+]?\d+", gold) else "float"


def _own(text: str) -> str:
    text = statements.own(text)
    said = Counter(_SAID.findall(text))
    return text.strip("\n").partition("\n\n")[0] if said and max(said.values()) > LOOP else text


def _unstated(text: str, kind: str) -> tuple[str, Value | None] | None:
    if kind == "bool":
        return yes_no.find(text)
    last = deque(number.NUMBER.finditer(text), maxlen=1) if kind in ("integer", "float") else None
    return (_scalar(last[0].group()) or (last[0].group(), None)) if last else None


def _equal(value: Value, gold: Value, whole: bool) -> bool:
    if isinstance(value, list) and isinstance(gold, list):
        return len(value) == len(gold) and all(_near(*pair, whole) for pair in zip(sorted(value), sorted(gold), strict=True))
    if isinstance(value, float) and isinstance(gold, float):
        return _near(value, gold, whole)
    return value == gold


def _near(value: float, gold: float, whole: bool) -> bool:
    return round(value) == gold if whole else abs(value - gold) <= TOLERANCE * abs(gold)


# -- reading what is stated ---------------------------------------------------------------------------------------------

_PLAIN: Final = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"(?<=\d)\u00a0(?=\d{3}(?!\d))", ""),
        (r"\\(?:text|mathrm|mbox|textbf|mathbf|operatorname)\s?\{([^{}]{0,80})\}", r" \1 "),
        (r"\\(?:left|right|displaystyle|boxed|fbox)(?![a-z])|\\[()\[\]]|\\?\$|[€£¥₹°]|\^\s?\{?\s?\\circ(?![a-z])\s?\}?", " "),
        (r"\\begin\s?\{[a-z]{1,12}\}|\\\{", "["),
        (r"\\end\s?\{[a-z]{1,12}\}|\\\}", "]"),
        (r"(?<=[\d)])\*\*(?=[\d(-])|\s\*\*\s(?=[\d(-])", "^"),
        (r"\\\\(?=[a-zA-Z])", r"\\"),
        (r"\\\\|&", ","),
        (r"\\(?:times|cdot|ast)(?![a-z])|[×·⋅]|(?<=\d)\s?[xX]\s?(?=10\s?\^)", "*"),
        (r"\\div(?![a-z])|÷", "/"),
        (r"\\simeq(?![a-z])|[≈≃]", "="),
        (r"π", "pi"),
        (r"√", "sqrt"),
        (r"\\[dt]?frac\s?(\d)\s?(\d)", r"(\1/\2)"),
        (r"\\[dt]frac(?![a-z])", "frac"),
        (r"\\sqrt\s?(\d)", r"sqrt(\1)"),
        (r"\*\*", " "),
        (r"\\(?=[a-zA-Z%])", ""),
        (r"\{", "("),
        (r"\}", ")"),
    )
)
_LEAD: Final = re.compile(
    r"(?:[\s:=~\"']|(?:approximately|about|around|roughly|exactly|only|simply|just)\b|[a-zA-Z]\s?=)*", re.IGNORECASE
)
_END: Final = re.compile(r"\.(?=\s|$)|[;?\n]")
_TOKEN: Final = re.compile(
    r"\s*+(?:(?P<number>(?:[0-9]++(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]++)?|\.[0-9]++)(?:[eE][+-]?[0-9]{1,3}(?![\w.]))?)"
    r"|(?P<name>[a-z]{1,6})(?![a-zA-Z])|(?P<sign>[-+*/^()!%]))"
)
_GOES_ON: Final = re.compile(r"\s?(?:[+*/^<>|_±]|[xyznij]\b|(?:,|:|and\b|or\b|to\b)\s?[-\d(])")
"""After a number, this makes what is stated no single number: `3x`, `18 + x`, `2, 3`."""
_FUNCTIONS: Final[Mapping[str, Callable[[float], float]]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "sin", "cos", "tan")},
    **{f"arc{name}": getattr(math, f"a{name}") for name in ("sin", "cos", "tan")},
    "ln": math.log,
}
_CONSTANTS: Final = {"pi": math.pi, "e": math.e}
_NAMES: Final = frozenset({*_FUNCTIONS, *_CONSTANTS, "frac"})
_OPERATORS: Final[Mapping[str, tuple[int, int, Callable[[float, float], float]]]] = {
    "+": (1, 1, operator.add),
    "-": (1, 1, operator.sub),
    "*": (2, 2, operator.mul),
    "/": (2, 2, operator.truediv),
    "^": (4, 3, math.pow),
}
"""Sign -> how tightly it binds, how tightly what it takes on its right is bound (less: from right to left), what it does."""


def _plain(fragment: str) -> str:
    fragment = number.clean(fragment.lstrip("*_ \t\n").replace("\\\\ ", ", "))
    for pattern, plain in _PLAIN:
        fragment = pattern.sub(plain, fragment)
    return _LEAD.sub("", fragment, count=1)


def _scalar(fragment: str) -> tuple[str, float] | None:
    return _chain(_END.split(_plain(fragment), maxsplit=1)[0])


def _list(fragment: str) -> tuple[str, list[float]] | None:
    """The numbers of `[1, 2]`, `(1, 2)`, `1 and 2`, `x = 1, y = 2`, a row or a column of a matrix."""
    plain = _plain(fragment)
    inside = _inside(plain)
    said = inside if "," in inside else _END.split(plain, maxsplit=1)[0]
    numbers = [_chain(part.strip(" []")) for part in re.split(r",(?:\s?and\b)?|\band\b", said) if part.strip()]
    return (said, [found[1] for found in numbers if found]) if numbers and all(numbers) else None


def _inside(text: str) -> str:
    """What is between the bracket a text opens with and the one that closes it."""
    depth = 0
    for at, sign in enumerate(text):
        depth += (sign in "([") - (sign in ")]")
        if depth <= 0:
            return text[1:at]
    return ""


def _chain(text: str) -> tuple[str, float] | None:
    """The number a text opens with, or the last one of its equations: `x = 9 * 2 = 18 dollars`."""
    found = None
    for part in text.split("=")[:8]:
        said, value, whole = _number(part.strip())
        if value is not None:
            found = said, value
        if found and not (value is not None and whole):
            break
    return found


def _number(text: str) -> tuple[str, float | None, bool]:
    """What a text opens with, its value (None: no single number), and whether that is all of the text."""
    for opening in dict.fromkeys((text, text.lstrip("([ "))):
        reader = _Reader(opening)
        try:
            value = reader.value()
        except (ArithmeticError, ValueError):
            continue
        if math.isfinite(value) and not _GOES_ON.match(opening, reader.at):
            return opening[: reader.at], value, not opening[reader.at :].strip()
    return text, None, False


class _Reader:
    """Recursive descent, by precedence, over the expression that a text opens with. `at` is where it ends.

    Raises ValueError for what is no expression or too deep, ArithmeticError for what has no value as a float.
    """

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def take(self, kind: str, allowed: Container[str]) -> str:
        """The next token when it is of that kind and allowed, else nothing."""
        token = _TOKEN.match(self.text, self.at)
        if not token or token[kind] is None or token[kind] not in allowed:
            return ""
        self.at = token.end()
        return token[kind]

    def value(self, depth: int = 0, binding: int = 0) -> float:
        """The value of what follows, up to an operator that binds no tighter than `binding`."""
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        left = self.operand(depth + 1)
        while True:
            before = self.at
            if sign := self.take("sign", "!%"):
                left = left / 100 if sign == "%" else _factorial(left)
            elif sign := self.take("sign", _OPERATORS):
                level, right, apply = _OPERATORS[sign]
                if level <= binding:
                    self.at = before
                    return left
                left = apply(left, self.value(depth + 1, right))
            elif binding < 2 and (self.text.startswith("(", self.at) or self.take("name", _NAMES)):
                self.at = before  # 2pi, 3(1 + 2): a product without a sign
                left *= self.value(depth + 1, 2)
            else:
                return left

    def operand(self, depth: int) -> float:
        if sign := self.take("sign", "+-"):
            return self.value(depth, 3) * (1 if sign == "+" else -1)
        if self.take("sign", "("):
            inside = self.value(depth)
            if not self.take("sign", ")"):
                raise ValueError("not closed")
            return inside
        if name := self.take("name", _NAMES):
            if name == "frac":
                return self.value(depth, 9) / self.value(depth, 9)
            return _CONSTANTS[name] if name in _CONSTANTS else _FUNCTIONS[name](self.value(depth, 9))
        token = _TOKEN.match(self.text, self.at)
        if not token or not token["number"]:
            raise ValueError("no expression")
        self.at = token.end()
        return float(token["number"].replace(",", ""))


def _factorial(value: float) -> float:
    if not value.is_integer() or not 0 <= value <= 170:  # the last one that a float holds
        raise ValueError("no factorial")
    return float(math.factorial(int(value)))


_READERS: Final[Mapping[str, Callable[[str], tuple[str, Value] | None]]] = {
    "integer": _scalar,
    "float": _scalar,
    "list of integer": _list,
    "list of float": _list,
    "bool": yes_no.read,
    "option": partial(choice.letter, letters="ABCDEF"),
}
"""Type of an answer -> what a fragment states, as written and as a value; None when it opens with no such answer."""
