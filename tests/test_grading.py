"""Number grading, against recorded verdicts of other graders and against hostile text."""

from __future__ import annotations

import json
import os
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from undo_ray.grading import grade
from undo_ray.grading.number import MAX_DIGITS
from undo_ray.types import FORMAT, NO_ANSWER, UserError, Verdict


def verdict(text: str, gold: str = "18") -> Verdict:
    return grade(text, {"id": "t/1", "answer": gold}, "number")


@pytest.mark.parametrize(
    ("file", "floor"), [("gsm8k_openai_samples", 1.0), ("gsm8k_rho_cot", 0.997), ("gsm8k_rho_tora", 0.995)]
)
def test_agrees_with_recorded_verdicts(file: str, floor: float) -> None:
    data = os.environ.get("UNDO_RAY_TEST_DATA")
    if not data:
        pytest.skip("UNDO_RAY_TEST_DATA is not set: no recorded verdicts to compare with")
    lines = (Path(data) / "graded" / f"{file}.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [row for row in map(json.loads, filter(None, lines)) if not row.get("suspect")]
    agree = [verdict(row["response"], row["gold"]).correct == row["correct"] for row in rows]
    assert len(rows) > 300
    assert sum(agree) / len(rows) >= floor


@pytest.mark.parametrize(
    "text",
    [
        "2 * 9 = 18\n#### 18",
        "#### $18.00",
        "####18",
        "#### 18 dollars a day",
        "#### 9 * 2 = 18",
        "#### Step 1: add\n3\n#### 2. Sum up the 5 parts\nThe answer is 18",
        "#### 18\nCheck: 3 days.",
        "So $\\boxed{18}$ eggs for 3 days.",
        "\\boxed{\\$18}",
        "\\boxed{18\\%}",
        "\\boxed{18 \\text{ eggs}}",
        "\\boxed{\\text{18 eggs}}",
        "\\boxed{x = 18}",
        "\\boxed{18^\\circ}",
        "\\boxed{18\\text{ cm}^2}",
        "\\boxed{\\frac{36}{2}}",
        "\\boxed{\\dfrac{36}{2}}",
        "\\boxed{1.8 \\times 10^{1}}",
        "\\boxed{{18}}",
        "\\boxed{17} no: \\boxed{18}",
        "\\boxed{18} and \\boxed{",
        "\\boxed{18} and \\boxed{}",
        "{ \\{ \\boxed{18}",
        "The answer is 18.",
        "The answer is $18.",
        "The answer is 18 because 3 days have passed in week 4.",
        "The answer is 9 x 2 = 18 dollars. That is for 1 day.",
        "The final answer is: **18** (for 2 people)",
        "The answer to part (b) would be 18. Now 5 remain.",
        "The answer is 17. No, the answer is 18, not 16.",
        "Therefore, the answer (arabic numerals) is 18 for 3 days.",
        "**Answer:** 18 eggs in 3 days",
        "Answer: \\( 18 \\) from 3 parts",
        "Final answer:\n\n18\n\nin 2 steps",
        "A: 18\nQ: how many in 3 days",
        '{"answer": 18, "steps": 3}',
        "so 10 + 8 = 18. ans 18",
        "steps: units 9 + 9 = 18 carry 1. ans 18",
        "She has 18 left.",
        "She pays 1,2,3 and then € 18,-",
        "18.0",
        "It costs US$18.",
        "In total: +18",
        "x=18",
        "The area is 18 cm^2",
        "The volume is 18 m^{3}.",
        "１８ eggs",
        "at 18:00",
        "36/2",
        "1.8e1",
        "17 2/2",
        "She has 20 - 2 -> 18",
        "<think>The answer is 5.</think> It is 18.",
        "<think>It is 18.</think>  ",
    ],
)
def test_finds_eighteen(text: str) -> None:
    assert verdict(text).correct, verdict(text)


@pytest.mark.parametrize(
    "text",
    [
        "#### 17",
        "18 eggs\n#### 17",
        "\\boxed{18 + x}",
        "\\boxed{3x}",
        "\\boxed{18, 20}",
        "\\boxed{18\\pi}",
        "\\boxed{\\text{none}} of 18",
        "\\boxed{2^{18}}",
        "The answer is not 18 but 17",
        "The answer is 1.8",
        "20 - 18 = 2",
        "-18",
        "1800%",
        "0.18",
        "18:30",
        "x18 is a name",
        "18/0",
        "180",
        "18,000",
        "18.0000000001",
        "",
        "eighteen",
    ],
)
def test_does_not_find_eighteen(text: str) -> None:
    assert not verdict(text).correct, verdict(text)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 1,234", "1234"),
        ("The answer is 40,000.", "40,000"),
        ("The answer is 1{,}234\\,567.", "1234567"),
        ("\\boxed{-5}", "-5"),
        ("\\boxed{- 5}", "-5"),
        ("The answer is −5.", "-5"),
        ("The answer is -$505.", "-505"),
        ("The answer is $-505.", "-505"),
        ("The answer is -\\$505.", "-505"),
        ("10 - 5", "5"),
        ("10 -5", "5"),
        ("8-3", "3"),
        ("\\boxed{\\frac{-1}{2}}", "-0.5"),
        ("\\boxed{-\\frac12}", "-1/2"),
        ("\\boxed{2\\frac{1}{2}}", "2.5"),
        ("The answer is 2 1/2 hours.", "2.5"),
        ("The answer is .5", "0.5"),
        ("The answer is 50%.", "50"),
        ("3 × 10^5", "300000"),
        ("6.02e23", "602" + "0" * 21),
    ],
)
def test_forms_of_a_number(text: str, gold: str) -> None:
    assert verdict(text, gold).correct, verdict(text, gold)


def test_exact_not_float() -> None:
    assert not verdict("9007199254740993", "9007199254740992").correct
    assert verdict("0.1", str(Fraction(1, 10))).correct
    assert not verdict("0.333", "1/3").correct


def test_verdicts_say_what_was_found() -> None:
    assert verdict("The answer is $1,234.50 a day", "3") == Verdict(False, "1,234.50", None)
    assert verdict("no idea") == Verdict(False, None, NO_ANSWER)
    assert verdict("\\boxed{18 + x}") == Verdict(False, "18 + x", FORMAT)


def test_gold_must_be_a_number() -> None:
    with pytest.raises(UserError, match=r"t/1.*'many'.*not a number"):
        verdict("18", "many")
    with pytest.raises(UserError, match=r"'prose' is unknown.*number"):
        grade("18", {"id": "t/1", "answer": "18"}, "prose")


HOSTILE = {
    "power tower": "9**9**9**9",
    "latex tower": "\\boxed{5^{5^{5^{5^5}}}}",
    "digits": "7" * 1_000_000,
    "grouped digits": "1" + ",234" * 250_000,
    "odd groups": "1,23" * 250_000,
    "spaced digits": "1 " * 500_000,
    "minus signs": "-" * 1_000_000,
    "dots": "1." * 500_000,
    "slashes": "1/" * 500_000,
    "fractions": "\\frac{" * 150_000,
    "nested fractions": "\\frac{1}{" * 100_000 + "2" + "}" * 100_000,
    "braces": "{" * 100_000 + "18" + "}" * 100_000,
    "nested boxes": "\\boxed{" * 100_000 + "18" + "}" * 100_000,
    "open boxes": "\\boxed{" * 140_000,
    "boxes": "\\boxed{1}" * 100_000,
    "open text": "\\boxed{" + "\\text{" * 100_000 + "}",
    "hashes": "#" * 1_000_000,
    "hash lines": "####\n" * 200_000,
    "answers": "the answer is " * 70_000,
    "answer to": "answer to " * 100_000,
    "colons": "answer:\n" * 120_000,
    "lines": "\n" * 1_000_000,
    "spaces": "answer is" + " " * 1_000_000,
    "dollars": "$" * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "equals": "answer is " + "=" * 1_000_000,
    "unicode": "\x00\ud800‮١٨²" * 100_000,
    "python": "__import__('os').system('touch /tmp/undo_ray_canary')",
    "exponent": "1e999999999999",
    "huge exponent": "\\boxed{10 \\times 10^{999999999}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_neither_hangs_nor_raises(name: str) -> None:
    start = time.perf_counter()
    result = verdict(HOSTILE[name])
    assert time.perf_counter() - start < 15  # seconds; linear scans need well under 3 on a busy core
    assert len(result.answer or "") <= MAX_DIGITS
    (result.answer or "").encode()


def test_answer_can_be_stored() -> None:
    result = verdict("\\boxed{\ud800}")
    assert result == Verdict(False, "?", FORMAT)


def test_no_pattern_has_a_possessive_group() -> None:
    """Before Python 3.11.5 such a group keeps what it failed on (python/cpython#106052): "3," of "3, 4"."""
    for path in sorted((Path(__file__).parent.parent / "undo_ray").rglob("*.py")):
        assert not re.search(r"\)[*+?]\+|\)\{[0-9,]+\}\+|\(\?>", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(("text", "read"), [("1/2.5/3", ["1", "2.5/3"]), ("1/2,000/3", ["1", "2,000/3"]), ("3, 4", ["3", "4"])])
def test_a_number_is_read_whole_or_not_at_all(text: str, read: list[str]) -> None:
    """What Python 3.11.7 reads with possessive groups; without them a part of the divisor would do."""
    from undo_ray.grading.number import NUMBER

    assert [found.group() for found in NUMBER.finditer(text)] == read
