"""Graders of letters, of yes and no, and of TheoremQA, against recorded verdicts and against hostile text."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undo_ray.grading import grade
from undo_ray.types import FORMAT, NO_ANSWER, UserError, Verdict

ANIMALS = ["the cat", "the cat and the dog", "4", "4.5 m", "$x^2$", "I and II", "the owl", "the owl"]
ACCEPTABLE = {"choice": "C", "yes_no": "yes", "theoremqa": "[1, 2]"}


def choice(text: str, gold: str = "C", **fields: Any) -> Verdict:
    return grade(text, {"id": "t/1", "answer": gold, "choices": None, **fields}, "choice")


def yes_no(text: str, gold: str = "yes") -> Verdict:
    return grade(text, {"id": "t/1", "answer": gold}, "yes_no")


def theoremqa(text: str, gold: str, **fields: Any) -> Verdict:
    return grade(text, {"id": "t/1", "answer": gold, **fields}, "theoremqa")


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without those whose recorded verdict its maker doubts."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [row for row in map(json.loads, filter(None, lines)) if not row.get("suspect")]


# -- recorded verdicts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", ["options", "number of options", "nothing"])
def test_mmlu_pro_agrees_with_recorded_verdicts(data_dir: Path, known: str) -> None:
    options = {row["id"]: row["choices"] for row in rows(data_dir / "mmlu_pro/test.jsonl")}
    samples = [row for row in rows(data_dir / "graded/mmlu_pro_samples.jsonl") if row["pred"] is not None]
    agree = []
    for row in samples:
        fields = {"options": {"choices": options[row["question_id"]]}, "number of options": {"n_choices": row["n_choices"]}}
        agree.append(choice(row["response"], row["gold"], **fields.get(known, {})).correct == row["correct"])
    assert len(samples) > 1000
    assert sum(agree) / len(agree) >= 0.995


@pytest.mark.parametrize("typed", [True, False])
def test_theoremqa_agrees_with_recorded_verdicts(data_dir: Path, typed: bool) -> None:
    samples = rows(data_dir / "graded/theoremqa_samples.jsonl")
    types = [{"answer_type": row["answer_type"]} if typed else {} for row in samples]
    agree = [
        theoremqa(row["response"], row["gold"], **t).correct == row["correct"] for row, t in zip(samples, types, strict=True)
    ]
    assert len(samples) > 500
    assert sum(agree) / len(agree) >= 0.95


@pytest.mark.parametrize("form", ["The answer is {}.", "So $\\boxed{{{}}}$", "**Answer:** {}\n", "Final answer: ${}$"])
def test_every_gold_answer_is_right_where_it_is_stated(data_dir: Path, form: str) -> None:
    for row in rows(data_dir / "theoremqa/test.jsonl"):
        assert theoremqa(form.format(row["answer"]), row["answer"], answer_type=row["answer_type"]).correct, row
    for row in rows(data_dir / "strategyqa/test.jsonl"):
        assert yes_no(form.format(row["answer"]), row["answer"]).correct, row
        assert not yes_no(form.format(row["answer"]), "no" if row["answer"] == "yes" else "yes").correct, row
    for row in rows(data_dir / "mmlu_pro/test.jsonl"):
        stated = form.format(f"({row['answer']})")
        assert choice(stated, row["answer"], choices=row["choices"]).correct, row


def test_the_text_of_an_option_counts_and_no_other_does(data_dir: Path) -> None:
    """Over all options of 1,500 questions: none but the right one is right, the right one nearly always is."""
    found = []
    for row in rows(data_dir / "mmlu_pro/test.jsonl")[::8]:
        for at, option in zip("ABCDEFGHIJ", row["choices"], strict=False):
            verdict = choice(f"The answer is {option}.", row["answer"], choices=row["choices"])
            if at == row["answer"]:
                found.append(verdict.correct)
            elif option.strip().casefold() != row["choices"][ord(row["answer"]) - ord("A")].strip().casefold():
                assert not verdict.correct, (option, row)
    assert sum(found) / len(found) > 0.98


# -- letters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "The answer is (C).",
        "the answer is C",
        "The correct answer is: **C**",
        "The answer is **(C) the dog**.",
        "The answer is $\\boxed{C}$.",
        "\\boxed{\\text{(C)}}",
        "\\boxed{c}",
        "So the answer is (c) because (as said) it is.",
        "Answer: C",
        "**Final Answer:** C. It has four legs",
        "Answer:\n\n(C)",
        "The answer to the question is (C).",
        "The answer is (A). No: that has two legs. The answer is (C).",
        "Answer: A. But this is wrong, so the answer is C",
        "The answer is (C). This answer is Absolutely right.",
        "The answer is (C).\n\nQuestion: What is 1 + 1?\nAnswer: (A)",
        "The answer is (C)\nProblem 2:\nThe answer is (B)",
        "The correct option is C.",
        "Therefore, option C is correct, not option B.",
        "C",
        "It has four legs.\n\n**(C)**",
        "C.",
    ],
)
def test_finds_letter_c(text: str) -> None:
    assert choice(text) == Verdict(True, "C")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The answer is (B).", None),
        ("The answer is (A). Then the answer is (B).", None),
        ("The answer is not (C).", NO_ANSWER),
        ("The answer is I think unknown", FORMAT),
        ("The answer is A good question.", FORMAT),
        ("The answer is E = mc^2", FORMAT),
        ("The answer is a matter of taste", FORMAT),
        ("The answer is (K).", FORMAT),
        ("The answer is none of the above", FORMAT),
        ("The answer is a) 5 and b) 7", FORMAT),
        ("Vitamin C is in (C) lemons and in other fruit", NO_ANSWER),
        ("A: cats\nB: dogs\nC: owls", NO_ANSWER),
        ("Consider each choice:\n(C) owls", NO_ANSWER),
        ("", NO_ANSWER),
    ],
)
def test_does_not_find_letter_c(text: str, reason: str | None) -> None:
    assert (choice(text).correct, choice(text).reason) == (False, reason)


def test_letters_end_with_the_options() -> None:
    assert choice("The answer is (D).", "C", n_choices=3) == Verdict(False, "D)", FORMAT)
    assert choice("The answer is (D).", "C", n_choices=4) == Verdict(False, "D")
    assert choice("The answer is (C). I am sure that the answer is (J).", "C", choices=["x", "y", "z"]).correct


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("The answer is the cat.", "A"),
        ("The answer is The Cat, as it has four legs.", "A"),
        ("The answer is **the cat and the dog**", "B"),
        ("The answer is 4.", "C"),
        ("The answer is \\boxed{4.5\\text{ m}}", "D"),
        ("Answer: x^2", "E"),
        ("The answer is I and II.", "F"),
        ("The answer is (I) and nothing else", None),
        ("The answer is the owl.", None),
        ("The answer is the catalogue.", None),
        ("The answer is 45.", None),
        ("The answer is 4 + x", None),
        ("The answer is .4", None),
        ("I like the cat.", None),
    ],
)
def test_text_of_an_option(text: str, gold: str | None) -> None:
    verdict = choice(text, gold or "A", choices=ANIMALS)
    assert verdict == Verdict(True, gold) if gold else verdict.reason in (FORMAT, NO_ANSWER)


# -- yes and no ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("So the answer is yes.", "yes"),
        ("The answer is: **No**", "no"),
        ("Answer: no", "no"),
        ("Therefore, the answer (Yes or No) is NO.", "no"),
        ("\\boxed{\\text{yes}}", "yes"),
        ("The answer is $\\boxed{No}$", "no"),
        ("The answer is no. Wait, it could. So the answer is yes.", "yes"),
        ("The answer is yes.\n\nQ: Is water dry?\nA: The answer is no.", "yes"),
        ("The answer is that the claim is false.", "no"),
        ("The answer is not true.", "no"),
        ("The answer is True", "yes"),
        ("No, because no cat can fly. It is true that birds can.", "no"),
        ("Cats have no wings.\n\n**No**", "no"),
        ("**Yes**, they have no wings.", "yes"),
        ("Cats have no wings, thus yes", "yes"),
        ("Thus, the statement is false.", "no"),
        ("This answer is yes.\nThe answer is no.", "no"),
        ("<think>yes or no?</think>No", "no"),
    ],
)
def test_yes_and_no(text: str, gold: str) -> None:
    assert yes_no(text, gold).correct, yes_no(text, gold)
    assert yes_no(text, "yes" if gold == "no" else "no").reason is None
    assert not yes_no(text, "yes" if gold == "no" else "no").correct


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("No one knows, there is no way to tell", NO_ANSWER),
        ("Cats have no wings", NO_ANSWER),
        ("The answer is no longer known", FORMAT),
        ("The answer is unknown. Yes.", FORMAT),
        ("The answer is that it is true and that it is false", FORMAT),
        ("yesterday, noon, falsehood", NO_ANSWER),
        ("", NO_ANSWER),
    ],
)
def test_neither_yes_nor_no(text: str, reason: str) -> None:
    verdicts = [yes_no(text, gold) for gold in ("yes", "no")]
    assert [(verdict.correct, verdict.reason) for verdict in verdicts] == [(False, reason)] * 2


# -- TheoremQA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("The answer is 3.", "3"),
        ("The answer is 3.4", "3"),
        ("The answer is approximately $1{,}234$ dollars.", "1234"),
        ("The answer is 1,234,567", "1234567"),
        ("The answer is: \\[\n x = 5\n\\]", "5"),
        ("The answer is **5** units", "5"),
        ("The answer is x = 2 * 3 = 6 cm, as y = 7", "6"),
        ("The answer is 6! / (3! * 3!).", "20"),
        ("The answer is 5\n\nProblem:\nWhat is 6?\nSolution:\nThe answer is 6", "5"),
        ("The answer is 5.\nThis answer is correct.\nThis answer is wrong.", "5"),
        ("The answer is 4. No, the answer is 5.\n\nThe answer is 5.\n\nThe answer is -", "5"),
        ("Thus 7.\n\nThe answer is 7.\nThe answer is 7.\nThe answer is 7.", "7"),
        ("It is 7: the answer is 7.\n\n" + "The answer is 8.\n" * 90, "7"),
        ("So there are 12 ways", "12"),
        ("\\boxed{12}", "12"),
        ("The answer is -3/8", "-0.375"),
        ("The answer is $-\\frac{\\pi}{12}$", "-0.2618"),
        ("The answer is $\\frac{2}{1 + 2e^{-2}}$.", "1.574"),
        ("The answer is -3\\sqrt{72}", "-25.456"),
        ("The answer is sqrt(2)/2", "0.7071"),
        ("The answer is √2", "1.4142"),
        ("The answer is 3*pi", "9.425"),
        ("The answer is 2π/3 rad", "2.0944"),
        ("The answer is \\(10^{-3}\\)", "0.001"),
        ("The answer is 3.5 \\times 10^{-8} m", "3.5e-08"),
        ("The answer is 3.5 x 10^-8", "3.5e-08"),
        ("The answer is 3.5e-8.", "3.5e-08"),
        ("The answer is 2**3**2", "512.0"),
        ("The answer is -2^2", "-4.0"),
        ("The answer is \\frac12", "0.5"),
        ("The answer is \\left(\\dfrac{1}{2}\\right)^{2}", "0.25"),
        ("The answer is ln(2)", "0.6931"),
        ("The answer is ln(2)^2 / 2", "0.2402"),
        ("The answer is 2\\pi r = 6.2832 for r = 1", "6.2832"),
        ("The answer is \\sin(\\frac{\\pi}{6})", "0.5"),
        ("The answer is 7.6\\%.", "0.0758"),
        ("The answer is $78.10.", "78.3526"),
        ("The answer is (1 + 2)/3 in total", "1.0"),
        ("The answer is 104", "100.0"),
        ("The answer is 96", "100.0"),
        ("The answer is １８", "18"),
        ("The answer is [1, 2].", "[1, 2]"),
        ("The answer is (2, 1)", "[1, 2]"),
        ("The answer is x = 1, y = 2", "[1, 2]"),
        ("The answer is 1 and 2", "[1, 2]"),
        ("The answer is \\begin{bmatrix} 1 \\\\ 2 \\end{bmatrix}", "[1, 2]"),
        ("The answer is [1/3, \\frac{1}{4}]", "[0.333, 0.25]"),
        ("The answer is True", "True"),
        ("The answer is yes.", "True"),
        ("Therefore, the statement is false.", "False"),
        ("The answer is (b).", "(b)"),
        ("The answer is (B) Gamma", "(b)"),
        ("The answer is \\text{(b)}", "(b)"),
    ],
)
def test_theoremqa_right(text: str, gold: str) -> None:
    assert theoremqa(text, gold).correct, theoremqa(text, gold)


@pytest.mark.parametrize(
    ("text", "gold", "reason"),
    [
        ("The answer is 4", "3", None),
        ("The answer is 3.6", "3", None),
        ("The answer is 105", "100.0", None),
        ("The answer is 0.001", "0.0", None),
        ("The answer is 45%", "45.0", None),
        ("The answer is [1, 2, 3]", "[1, 2]", None),
        ("The answer is [1, 3]", "[1, 2]", None),
        ("The answer is False", "True", None),
        ("The answer is (a)", "(b)", None),
        ("The answer is 3x", "3", FORMAT),
        ("The answer is 3 + x", "3", FORMAT),
        ("The answer is 3, 4", "3", FORMAT),
        ("The answer is (3, 4)", "3", FORMAT),
        ("The answer is 3 or 4", "3", FORMAT),
        ("The answer is infinity, after 3 steps", "3", FORMAT),
        ("The answer is 1/0", "3", FORMAT),
        ("The answer is \\sqrt{-1}", "1", FORMAT),
        ("The answer is 3!!!!", "3", FORMAT),
        ("The answer is 9**9**9**9", "9", FORMAT),
        ("The answer is 10^(10^10)", "10", FORMAT),
        ("The answer is [1, x]", "[1, 2]", FORMAT),
        ("The answer is unknown", "True", FORMAT),
        ("No idea at all", "3", NO_ANSWER),
        ("No idea at all", "[1, 2]", NO_ANSWER),
    ],
)
def test_theoremqa_wrong(text: str, gold: str, reason: str | None) -> None:
    assert (theoremqa(text, gold).correct, theoremqa(text, gold).reason) == (False, reason), theoremqa(text, gold)


@given(
    st.recursive(
        st.integers(1, 20).map(str) | st.just("0.5"),
        lambda inner: (
            st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
            | st.tuples(inner, st.integers(0, 3)).map(lambda t: f"({t[0]}**{t[1]})")
            | inner.map(lambda t: f"-{t}")
        ),
        max_leaves=6,
    )
)
@settings(max_examples=200, deadline=None)
def test_expressions_have_the_value_that_python_gives_them(expression: str) -> None:
    try:
        value = float(eval(expression))
    except (ZeroDivisionError, OverflowError):
        value = math.nan
    verdict = theoremqa(f"The answer is {expression}", repr(value) if math.isfinite(value) else "1.0", answer_type="float")
    if math.isfinite(value) and abs(value) > 1e-9:
        assert verdict.correct, (expression, value, verdict)


# -- golds and hostile text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "gold", "fields", "says"),
    [
        ("choice", "K", {}, "'K' is no letter from A to J"),
        ("choice", "D", {"n_choices": 3}, "'D' is no letter from A to C"),
        ("choice", "", {"choices": ["x", "y"]}, "no letter from A to B"),
        ("yes_no", "maybe", {}, "'maybe' is not yes or no"),
        ("theoremqa", "many", {}, "'many' is no float"),
        ("theoremqa", "3", {"answer_type": "matrix"}, "'3' is no matrix"),
        ("theoremqa", "[1, x]", {"answer_type": "list of integer"}, "is no list of integer"),
    ],
)
def test_gold_must_be_of_its_kind(kind: str, gold: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"t/1.*{says}"):
        grade("3", {"id": "t/1", "answer": gold, **fields}, kind)


HOSTILE = {
    "digits": "7" * 1_000_000,
    "stated digits": "The answer is " + "7" * 1_000_000,
    "digits and commas": "The answer is " + "1,234" * 200_000,
    "braces": "{" * 100_000 + "C" + "}" * 100_000,
    "stated braces": "The answer is " + "{" * 100_000 + "C" + "}" * 100_000,
    "brackets": "The answer is " + "(" * 100_000,
    "signs": "The answer is " + "-" * 100_000 + "1",
    "powers": "The answer is " + "2^" * 100_000 + "2",
    "fractions": "The answer is " + "\\frac{" * 100_000,
    "factorials": "The answer is 9" + "!" * 100_000,
    "boxes": "\\boxed{1}" * 10_000,
    "open boxes": "\\boxed{" * 100_000,
    "answers": "the answer is " * 70_000,
    "these answers": "this answer is correct\n" * 40_000,
    "answer lines": "Answer:\n" * 100_000,
    "options": "option is " * 100_000,
    "letters": "A is " * 200_000,
    "problems": "The answer is" + "\nProblem" * 100_000,
    "not": "not " * 250_000,
    "no": "no" + " " * 300_000,
    "yes": "yes " * 250_000,
    "stars": "*" * 300_000,
    "stated stars": "The answer is " + "*" * 300_000,
    "spaces": "The answer is" + " " * 300_000,
    "lines": "\n" * 300_000,
    "dollars": "$" * 300_000,
    "equals": "The answer is " + "=" * 300_000,
    "odd characters": "The answer is \x00\ud800\u202e\u200f１٨²ⅣＣ" * 20_000,
    "python": "The answer is __import__('os').system('touch canary')",
    "tower": "The answer is 9**9**9**9",
    "latex tower": "\\boxed{10^{10^{10^{10}}}}",
    "input": "\\boxed{\\input{/etc/passwd}}",
}
GRADE_ALL = """
import json, sys
from undo_ray.grading import grade
from undo_ray.types import Verdict
texts, kinds = json.load(sys.stdin)
for name, text in texts.items():
    print(name, flush=True)
    for kind, gold in kinds:
        fields = {"choices": ["the cat", "", "4"]} if kind == "choice" else {}
        verdict = grade(text, {"id": "t/1", "answer": gold, **fields}, kind)
        assert isinstance(verdict, Verdict) and not verdict.correct, verdict
        (verdict.answer or "").encode()
        assert len(verdict.answer or "") <= 200
"""


def test_hostile_text_neither_hangs_nor_raises_nor_runs(tmp_path: Path) -> None:
    """In a process of its own: a text that hangs a regular expression can only be killed. The last name printed is its own."""
    kinds = [("choice", "B"), ("yes_no", "no"), ("theoremqa", "31"), ("theoremqa", "[3, 1]"), ("theoremqa", "False")]
    command = [sys.executable, "-c", GRADE_ALL]
    texts = json.dumps([HOSTILE, kinds])
    done = subprocess.run(command, input=texts, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout[-80:], done.stderr[-800:])
    assert done.stdout.split("\n")[:-1] == list(HOSTILE)
    assert not list(tmp_path.iterdir())


PIECES = [
    "The answer is ",
    "Answer:",
    "\\boxed{",
    "}",
    "(",
    ")",
    "C",
    "yes",
    "no",
    "\n\n",
    "Problem:",
    "3",
    "^",
    "!",
    "[",
    ",",
    "\\frac",
    "=",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=40).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_gets_a_verdict(text: str) -> None:
    for kind, gold in [
        *ACCEPTABLE.items(),
        ("theoremqa", "3"),
        ("theoremqa", "2.5"),
        ("theoremqa", "True"),
        ("theoremqa", "(a)"),
    ]:
        fields = {"choices": ANIMALS} if kind == "choice" else {}
        verdict = grade(text, {"id": "t/1", "answer": gold, **fields}, kind)
        assert verdict.reason in (None, NO_ANSWER, FORMAT)
        assert (verdict.reason == NO_ANSWER) == (verdict.answer is None)
        (verdict.answer or "").encode()
