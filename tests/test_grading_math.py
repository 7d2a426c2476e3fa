"""Mathematical answers, against recorded verdicts, Math-Verify's and MATH's own cases, sympy, and hostile text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import math_verify.parser
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from undo_ray import grading
from undo_ray.grading import math
from undo_ray.grading.pool import Pool
from undo_ray.types import FORMAT, NO_ANSWER, UserError, Verdict


def verdict(text: str, gold: str) -> Verdict:
    return math.grade(text, {"id": "t/1", "answer": gold})


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(deadline=3.0) as pool:
        yield pool


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    lines = (data / "graded" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [row for row in map(json.loads, filter(None, lines)) if not row.get("suspect")]


# -- recorded verdicts --------------------------------------------------------------------------------------------------

WRONGLY_RECORDED = {
    # (file, question, what the recording extracted): the recorded verdict is wrong; docs/grading.md says why.
    ("math500_rho_cot", "test/precalculus/452.json", "2"),
    ("math500_rho_cot", "test/prealgebra/1114.json", "15"),
    ("math500_rho_tora", "test/precalculus/697.json", "-\\tan(4\\pi/9)+4\\cos(\\pi/18)"),
    ("math500_rho_tora", "test/prealgebra/1114.json", "15"),
}


@pytest.mark.parametrize(
    ("file", "floor"),
    [("math500_rho_cot", 0.985), ("math500_rho_tora", 0.994), ("math_qwen25_cot", 0.998), ("math_answer_pairs", 0.99)],
)
def test_agrees_with_recorded_verdicts(data_dir: Path, pool: Pool, file: str, floor: float) -> None:
    everything = rows(data_dir, file)
    left_out = [row for row in everything if (file, row["question_id"], row.get("pred")) in WRONGLY_RECORDED]
    recorded = [row for row in everything if row["correct"] or row not in left_out]
    assert len(everything) - len(recorded) <= 0.005 * len(everything)
    found = pool.grade([(row["response"], {"answer": row["gold"]}, "math") for row in recorded])
    agree = [verdict.correct == row["correct"] for verdict, row in zip(found, recorded, strict=True)]
    assert len(agree) > 300
    assert sum(agree) / len(agree) >= floor


ELSEWHERE = {
    "1.22",  # a decimal comma, `1,22`: in MATH a comma parts thousands or the members of a list
    "0.111",
    "Answer $ \n 9 \n $",  # a formula over lines is none, Math-Verify holds
    "$(0.6,2.6667]$",  # equal at a precision of two digits, an option of Math-Verify's
    "${35 cm,4}$",  # boxes joined over "++++++"
    "$\\boxed{1,2}$",  # boxes joined over words: "1 papers and 2 bins"
}
"""Responses of Math-Verify's cases about ways of extraction that are not offered here."""


def test_agrees_with_the_cases_of_math_verify(data_dir: Path, pool: Pool) -> None:
    cases = [row for row in rows(data_dir, "math_verify_cases") if row["response"] not in ELSEWHERE]
    found = pool.grade([(row["response"], {"answer": row["gold"]}, "math") for row in cases])
    wrong = [row["response"] for verdict, row in zip(found, cases, strict=True) if verdict.correct != row["correct"]]
    assert len(cases) > 100
    assert len(wrong) <= 0.02 * len(cases), wrong


def test_departs_from_the_cases_of_math_in_the_order_of_lists_alone(data_dir: Path) -> None:
    """MATH's own grader compares strings; a bare list of solutions is a set here, as it is to Math-Verify."""
    cases = rows(data_dir, "hendrycks_equiv_cases")
    other = [row for row in cases if verdict(row["response"], row["gold"]).correct != row["correct"]]
    for row in other:
        members = [{part.strip().removeprefix("0") for part in row[side].split(",")} for side in ("gold", "response")]
        assert members[0] == members[1], row
    assert len(cases) - len(other) >= 4


def test_every_gold_answer_is_right_where_it_is_boxed_or_stated(data_dir: Path) -> None:
    lines = (data_dir / "math/math500.jsonl").read_text(encoding="utf-8").split("\n")
    golds = [json.loads(line)["answer"] for line in lines if line]
    assert len(golds) == 500
    for form in ("So $\\boxed{%s}$.", "Final Answer: The final answer is $%s$. I hope it is correct.", "%s", "$%s$"):
        missed = [gold for gold in golds if not verdict(form % gold, gold).correct]
        assert missed == [], form


# -- which text is the answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First \\boxed{1}, no: \\boxed{2}.", "2"),
        ("$\\boxed{-2}$ and $\\boxed{1}$", "-2, 1"),
        ("\\boxed{840}, that is \n\n**Final Answer**\n\\boxed{840}", "840"),
        ("\\boxed{(1, 2)}, \\boxed{(2, 1)}", "(1, 2), (2, 1)"),
        ("\\fbox{7}", "7"),
        ("so \\boxed 9 .", "9"),
        ("\\boxed{3} or rather \\boxed{}", "3"),
        ("\\boxed{\\frac{1}{2}} and \\boxed{", "\\frac{1}{2}"),
        ("\\boxed{255} and so on. Final Answer: The final answer is $10,455$. I hope it is correct.", "10,455"),
        ("Final Answer: The final answer is $x+1$. I hope it is correct.", "x+1"),
        ("The answer is \\(\\frac{3}{4}\\) of it.", "\\frac{3}{4}"),
        ("The final answer is $\\$10$.", "\\$10"),
        ("The answers are $2$ and $3$.", "2, 3"),
        ("**Answer:** 18 eggs", "18 eggs"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        ("The answer to part (b) is $7$.", "7"),
        ("The answer is not $5$ but that is all", "5"),
        ("Hence she is left with $12.50$ in all.", "12.50"),
        ("It costs \\$5 and then \\$6", "6"),
        ("There are 12 distinct ones that meet the conditions. I hope it is correct. <|im_start|>user", "12"),
        ("$x = 3$ so there are 4 of them", "4"),
        ("We find that x^2 = 5^2\\cdot 3-5^", "-5"),
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("-\\frac{10}{9}", "-\\frac{10}{9}"),
        ("1 000", "1 000"),
    ],
)
def test_the_answer_of_a_text(text: str, answer: str) -> None:
    assert math.extract(text) == answer


@pytest.mark.parametrize("text", ["", "   ", "no idea at all", "\\boxed{} and nothing else"])
def test_a_text_without_an_answer(text: str) -> None:
    assert verdict(text, "1") == Verdict(False, None, NO_ANSWER)


# -- equal --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("\\frac{1}{2}", "\\dfrac12"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{1}{2}", ".5"),
        ("\\frac{1}{2}", "1/2"),
        ("\\frac{1}{2}", "\\frac{2}{4}"),
        ("10", "10\\%"),
        ("10", "10\\text{ units}"),
        ("10", "\\$10.00"),
        ("90^\\circ", "90"),
        ("15\\mbox{ cm}^2", "15"),
        ("1{,}000", "1000"),
        ("11,\\! 111", "11111"),
        ("x=5", "5"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\text{(C)}", "(C)"),
        ("2516_8", "2516_{8}"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{pmatrix}-\\frac{1}{3}\\\\\\frac{2}{3}\\end{pmatrix}"),
        ("-2,1", "1, -2"),
        ("[-2,7]", "x \\in [-2,7]"),
        ("26000", "1000(26)"),
        ("11\\sqrt2", "11\\\\sqrt{2}"),
        ("2\\sqrt{3}", "2*sqrt(3)"),
        ("\\frac{\\pi}{4}", "pi/4"),
        ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}, 1 - \\sqrt{19}"),
        ("12", "１２"),
        ("$\\frac{7}{4}$", "1.75"),
        ("\\boxed{42}", "42"),
    ],
)
def test_equal_answers(gold: str, answer: str) -> None:
    assert verdict(f"so \\boxed{{{answer}}}", gold).correct


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("\\frac{1}{2}", "\\frac{1}{3}"),
        ("\\frac{1}{3}", "0.33"),
        ("(0,9)", "[0,9)"),
        ("(3,1)", "(1,3)"),
        ("-2,1", "1"),
        ("\\pm 3", "3"),
        ("x+1", "x-1"),
        ("\\text{Evelyn}", "Debra"),
        ("32349", "32, 349"),
        ("50", "0.5"),
        ("12", "12x"),
        ("10_9", "10_8"),
        ("\\begin{pmatrix}1 & 2\\end{pmatrix}", "\\begin{pmatrix}1 & 3\\end{pmatrix}"),
    ],
)
def test_different_answers(gold: str, answer: str) -> None:
    found = verdict(f"so \\boxed{{{answer}}}", gold)
    assert not found.correct
    assert found.answer == answer


def test_a_formula_nobody_can_read_is_no_answer_to_a_formula() -> None:
    assert verdict("\\boxed{\\frac{1}{}+}", "3").reason == FORMAT
    assert verdict("\\boxed{Debra}", "\\text{Evelyn}").reason is None


def test_an_empty_gold_is_refused() -> None:
    with pytest.raises(UserError, match="t/1: answer '\\$\\$' holds no mathematics"):
        verdict("1", "$$")


rationals = st.fractions(min_value=-1000, max_value=1000, max_denominator=200)
polynomials = st.lists(st.integers(-9, 9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(rationals, rationals)
def test_fractions_are_equal_when_they_are(one: Any, other: Any) -> None:
    text = f"\\boxed{{{sympy.latex(sympy.Rational(one.numerator, one.denominator))}}}"
    for value in (one, other):
        gold = f"{value.numerator}/{value.denominator}" if value.denominator > 1 else str(value)
        assert verdict(text, gold).correct == (one == value)


@settings(max_examples=40, deadline=None)
@given(polynomials, polynomials)
def test_polynomials_are_equal_when_sympy_finds_them_so(one: list[int], other: list[int]) -> None:
    x = sympy.Symbol("x")
    left, right = (sum((c * x**k for k, c in enumerate(cs)), sympy.Integer(0)) for cs in (one, other))
    answer = sympy.latex(sympy.expand(left * (x + 2)))
    assert verdict(f"\\boxed{{{answer}}}", f"(x+2)({sympy.latex(left)})").correct
    assert verdict(f"\\boxed{{{answer}}}", f"(x+2)({sympy.latex(right)})").correct == (sympy.expand(left - right) == 0)


# -- hostile ------------------------------------------------------------------------------------------------------------


def test_hostile_answers_are_wrong_answers_and_the_pool_goes_on(pool: Pool) -> None:
    kinds = ("math", "number", "choice", "yes_no", "theoremqa")
    golds = {"choice": "C", "yes_no": "yes"}
    jobs = [(text, {"answer": golds.get(kind, "18")}, kind) for text in hostile.TEXTS.values() for kind in kinds]
    found = pool.grade([*jobs, ("\\boxed{18}", {"answer": "18"}, "math")])
    names = [(name, kind) for name in hostile.TEXTS for kind in kinds]
    assert [name for name, verdict in zip(names, found, strict=False) if verdict.correct] == []
    assert found[-1] == Verdict(True, "18")
    for found_one in found:
        json.dumps(found_one.answer, ensure_ascii=False).encode()  # storable


def test_no_answer_is_run(pool: Pool, tmp_path: Path) -> None:
    """Python in every place where a parser might evaluate it makes no file, in the pool or, unprotected, in this process."""
    canary = tmp_path / "canary"
    texts = hostile.payloads(canary)
    for kind, gold in (("math", "\\frac{1}{2}"), ("number", "18"), ("theoremqa", "18"), ("choice", "C"), ("yes_no", "yes")):
        for text in texts:
            grading.grade(text, {"answer": gold}, kind)
        assert not any(verdict.correct for verdict in pool.grade([(text, {"answer": gold}, kind) for text in texts]))
    for text in texts:
        math.gold(text, {"answer": text})
    assert not canary.exists()


def test_the_canary_lives(tmp_path: Path) -> None:
    """The parser that Math-Verify gives plain expressions to does run such texts: what is kept from it matters."""
    canary = tmp_path / "canary"
    sympy.parse_expr(hostile.payloads(canary)[0])
    assert canary.exists()


def test_nothing_of_an_answer_reaches_sympys_evaluating_parser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reached: list[str] = []
    monkeypatch.setattr(math_verify.parser, "parse_expr", lambda text, **_: reached.append(text))
    for text in hostile.payloads(tmp_path / "canary"):
        verdict(text, "\\frac{1}{2}")
    verdict("2*3+1", "7")
    assert reached == []
    math_verify.parse("the value is 2*3+1", [math_verify.ExprExtractionConfig()], parsing_timeout=None)
    assert reached, "Math-Verify's plain expressions do go there"
