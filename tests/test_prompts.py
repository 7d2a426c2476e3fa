"""Prompts, word for word: what the student and the teacher are asked, and how the teacher's text is taken apart."""

from dataclasses import replace
from typing import Any

import pytest

from undo_ray import prompts
from undo_ray.prompts import TEMPLATES, Case

INSTRUCTION = "End with #### <number>."

SHOWN = (
    Case("A pen costs $2. What do 3 pens cost?", ((0, "3 x 2 = 6\n#### 6"),), "6", "It is 5.\n#### 5", "5", False),
    Case("What is 2 + 2?", ((0, "2 + 2 = 4\n#### 4"),), "4", "2 + 2 is 4", "4", True),
)
OWN = Case("What is 7 - 3?", ((1, "7 - 3 = 5\n#### 5"),), "5", "7 + 3 = 10\n#### 10", "10", False)
TWICE = Case("What is 7 - 3?", ((1, "7 - 3 = 5"), (2, "7 - 3 = 4")), "4", "10", "10", False)

ROLE = "You are a tutor. A student is learning to solve problems from written explanations, and you write those explanations."
CHECKS = """\
First study the student's answer next to the teacher's answer and find what went wrong or was weak. Ask yourself:
1. Did the student understand what is asked?
2. Was the approach right?
3. Is there an error of calculation?
4. Is the reasoning clear and in a logical order?
5. Is a step missing?"""
CHECKS_AGAIN = (
    "First compare the student's answer with the teacher's earlier answers and find which mistakes or weaknesses remain, then "
    "decide how a new explanation has to differ from the earlier ones to mend them."
)
WRITE = (
    "Then write a new answer to the question from which this student will learn better than from the earlier one: go step by "
    "step, explain what was misunderstood, and confirm what was right. The new answer must stand on its own: it is read "
    "without this conversation, so it must not mention a student, a teacher, a score or an earlier answer."
)
OUTPUT = """\
Write your analysis first. Then write the line
### new_answer
and below it nothing but the new answer. End with #### <number>."""
EXAMPLES = """\
### question:
A pen costs $2. What do 3 pens cost?
### teacher answer:
3 x 2 = 6
#### 6
### student answer:
It is 5.
#### 5
### score:
0

### question:
What is 2 + 2?
### teacher answer:
2 + 2 = 4
#### 4
### student answer:
2 + 2 is 4
### score:
1"""
OWN_BLOCK = """\
### question:
What is 7 - 3?
### teacher answer:
7 - 3 = 5
#### 5
### student answer:
7 + 3 = 10
#### 10
### score:
0"""

PREFIX = f"""\
{ROLE}

{CHECKS}

{WRITE}

{OUTPUT}

Examples of how this student answers, each with its score (1 right, 0 wrong):

{EXAMPLES}

Now the question to write a new answer for:

{OWN_BLOCK}"""

PAPER = f"""\
{ROLE}

You are given a question, the teacher's answer, a student's answer and its score (1 right, 0 wrong). \
Analyse them and write a new answer that helps the student learn better.

{OWN_BLOCK}

Examples of the task: similar questions, answered by the same student.

{EXAMPLES}

{CHECKS}

{WRITE}

{OUTPUT}"""

COMPACT = """\
example A pen costs $2. What do 3 pens cost? tutor 6 score [0] student 5
example What is 2 + 2? tutor 4 score [1] student 4
question What is 7 - 3? before 7 - 3 = 5
#### 5 score [0] student 10
End with #### <number>."""


def rendered(template: str, shown: tuple[Case, ...], own: Case, instruction: str = INSTRUCTION) -> str:
    """The text of the one user turn a template makes."""
    chat = TEMPLATES[template].render(shown, own, instruction)
    assert [message["role"] for message in chat] == ["user"]
    return chat[0]["content"]


# -- what is asked ------------------------------------------------------------------------------------------------------


def test_solve_is_the_question_then_how_to_answer() -> None:
    assert prompts.solve("What is 2 + 2?", INSTRUCTION) == [
        {"role": "user", "content": "What is 2 + 2?\n\nEnd with #### <number>."}
    ]


def test_solve_without_instruction_is_the_question_alone() -> None:
    assert prompts.solve("What is 2 + 2?", "") == [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.mark.parametrize("template, expected", [("prefix", PREFIX), ("paper", PAPER), ("compact", COMPACT)])
def test_a_template_word_for_word(template: str, expected: str) -> None:
    assert rendered(template, SHOWN, OWN) == expected


def test_the_templates_are_those_tested_here() -> None:
    assert set(TEMPLATES) == {"prefix", "paper", "compact"}


@pytest.mark.parametrize("template", ["prefix", "paper"])
def test_several_teacher_answers_are_numbered_by_their_round(template: str) -> None:
    assert (
        "### question:\nWhat is 7 - 3?\n"
        "### ITERATION 1 teacher answer:\n7 - 3 = 5\n### ITERATION 2 teacher answer:\n7 - 3 = 4\n"
        "### student answer:\n10\n### score:\n0"
    ) in rendered(template, SHOWN, TWICE)


def test_paper_asks_for_a_comparison_once_there_are_two_teacher_answers() -> None:
    assert CHECKS in rendered("paper", SHOWN, OWN) and CHECKS_AGAIN not in rendered("paper", SHOWN, OWN)
    assert CHECKS_AGAIN in rendered("paper", SHOWN, TWICE) and CHECKS not in rendered("paper", SHOWN, TWICE)


@pytest.mark.parametrize(
    "template, expected",
    [
        (
            "prefix",
            f"{ROLE}\n\n{CHECKS}\n\n{WRITE}\n\n{OUTPUT}\n\nNow the question to write a new answer for:\n\n### question:\nQ?",
        ),
        ("compact", f"question Q?\n{INSTRUCTION}"),
    ],
)
def test_without_examples_and_history_nothing_speaks_of_them(template: str, expected: str) -> None:
    assert rendered(template, (), Case("Q?")) == expected


def test_compact_of_a_question_whose_earlier_answers_could_not_be_parsed() -> None:
    case = Case("Q?", (), None, "gibberish", None, False)
    assert rendered("compact", (case,), case, "") == (
        "example Q? tutor none score [0] student none\nquestion Q? before none score [0] student none"
    )


def test_compact_shows_the_newest_of_several_teacher_answers() -> None:
    assert rendered("compact", (), TWICE, "") == "question What is 7 - 3? before 7 - 3 = 4 score [0] student 10"


@pytest.mark.parametrize("template", ["prefix", "compact"])
def test_everything_before_the_question_is_the_same_bytes_for_all_questions(template: str) -> None:
    owns = [
        OWN,
        TWICE,
        Case("Where to?"),
        Case("Z", (), None, "t", None, True),
        Case("\u2028ß", ((0, "x"),), "1", "", None, False),
    ]
    heads = []
    for own in owns:
        text = rendered(template, SHOWN, own)
        start = text.rindex(f"question:\n{own.question}" if template == "prefix" else f"question {own.question}")
        heads.append(text[:start].encode())
    assert len(set(heads)) == 1
    for case in SHOWN:
        assert case.question.encode() in heads[0]


HINT = """\
### reference solution, for you alone:
7 - 3 = 4
#### 4
Arrive there by reasoning step by step, in words of your own, as if you had not seen it. What you write is read by someone who \
has not, so it must not mention that anything was given, and must not copy it."""


def test_a_hint_word_for_word() -> None:
    assert TEMPLATES["prefix"].hint("solution", "7 - 3 = 4\n#### 4") == HINT
    assert TEMPLATES["paper"].hint("answer", "4") == HINT.replace("reference solution", "right answer").replace(
        "7 - 3 = 4\n#### 4", "4"
    )
    assert TEMPLATES["compact"].hint("answer", "4") == "before 4 score [0] student none"


def test_a_hint_follows_the_question_and_leaves_what_all_questions_share_alone() -> None:
    assert prompts.solve("What is 7 - 3?", INSTRUCTION, HINT) == [
        {"role": "user", "content": f"What is 7 - 3?\n\n{HINT}\n\n{INSTRUCTION}"}
    ]
    hinted = replace(OWN, hint=HINT)
    assert rendered("prefix", SHOWN, hinted) == f"{PREFIX}\n{HINT}"
    own = "### student answer:\n7 + 3 = 10\n#### 10\n### score:\n0"
    assert rendered("paper", SHOWN, hinted) == PAPER.replace(own, f"{own}\n{HINT}")
    short = replace(OWN, hint=TEMPLATES["compact"].hint("answer", "4"))
    assert rendered("compact", (), short, "") == "question What is 7 - 3? before 4 score [0] student none"


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_gold_answer_is_in_no_prompt(template: str) -> None:
    row = {**ROW, "answer": "987654321", "solution": "987654321 it is", "subject": "algebra-skill", "level": "level-9"}
    own = prompts.own_case(row)
    text = rendered(template, (own,), own) + prompts.solve(prompts.question_text(row), INSTRUCTION)[0]["content"]
    assert "Which?" in text
    for hidden in ("987654321", "algebra-skill", "level-9", "gsm8k/train/1"):
        assert hidden not in text


def verdict(correct: bool, answer: str | None, reason: str | None = None) -> dict[str, Any]:
    return {"correct": correct, "answer": answer, "reason": reason}


ROW: dict[str, Any] = {
    "id": "gsm8k/train/1",
    "task": "gsm8k",
    "split": "train",
    "question": "Which?",
    "answer": "4",
    "choices": None,
    "subject": None,
    "level": None,
    "history": [
        {
            "round": 0,
            "rationale": "because 3",
            "diagnosis": "the first diagnosis",
            "rationale_verdict": verdict(False, "3"),
            "attempt": "so 2",
            "attempt_verdict": verdict(False, "2"),
        },
        {
            "round": 1,
            "rationale": "because 4",
            "diagnosis": "the second diagnosis",
            "rationale_verdict": verdict(True, "4"),
            "attempt": "so 4",
            "attempt_verdict": verdict(True, "4"),
        },
    ],
}


def test_a_question_brings_all_teacher_answers_and_the_newest_attempt() -> None:
    assert prompts.own_case(ROW) == Case("Which?", ((0, "because 3"), (1, "because 4")), "4", "so 4", "4", True)


@pytest.mark.parametrize("history", [None, []])
def test_a_question_without_history_is_the_question_alone(history: Any) -> None:
    assert prompts.own_case({**ROW, "history": history}) == Case("Which?")


def test_a_question_not_attempted_yet_has_no_score() -> None:
    entry = {**ROW["history"][0], "attempt": None, "attempt_verdict": None}
    case = prompts.own_case({**ROW, "history": [entry]})
    assert case == Case("Which?", ((0, "because 3"),), "3")
    assert "score" not in rendered("compact", (), case, "")
    assert "### score" not in rendered("prefix", (), case)


def test_a_rationale_that_could_not_be_parsed_is_left_out_but_the_attempt_stays() -> None:
    entry = {**ROW["history"][1], "rationale": None, "rationale_verdict": verdict(False, None, "format")}
    case = prompts.own_case({**ROW, "history": [ROW["history"][0], entry]})
    assert case == Case("Which?", ((0, "because 3"),), "3", "so 4", "4", True)


def test_the_diagnosis_is_never_shown_again() -> None:
    own = prompts.own_case(ROW)
    for template in TEMPLATES:
        assert "diagnosis" not in rendered(template, (own,), own)


def test_options_follow_the_question_under_letters() -> None:
    row = {"question": "Which is even?", "choices": ["1", "2", "odd one"]}
    assert prompts.question_text(row) == "Which is even?\nA. 1\nB. 2\nC. odd one"


@pytest.mark.parametrize("choices", [None, []])
def test_a_question_without_options_stays_as_it_is(choices: Any) -> None:
    assert prompts.question_text({"question": "Which?", "choices": choices}) == "Which?"


# -- what comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, diagnosis, rationale",
    [
        ("2 + 2 = 4", None, "2 + 2 = 4"),
        ("\n 2 + 2 = 4 \n", None, "2 + 2 = 4"),
        ("<think>hm</think> so 4", "hm", "so 4"),
        ("hm\n</think>\n\nso 4", "hm", "so 4"),  # the chat template had opened the block
        ("<think>\n\n</think>\n\nso 4", None, "so 4"),
        ("<think>hm</think>", "hm", None),
        ("<think>hm</think>\n ", "hm", None),
        ("", None, None),
        (" \n\t", None, None),
        ("### new_answer\n4", None, "### new_answer\n4"),
        ("\x00\u202e{% raw %}</s><|im_end|>", None, "\x00\u202e{% raw %}</s><|im_end|>"),
    ],
)
def test_a_solution_is_what_follows_the_private_reasoning(text: str, diagnosis: str | None, rationale: str | None) -> None:
    assert prompts.parse_solve(text) == (diagnosis, rationale)


def test_of_several_reasoning_blocks_only_what_follows_the_last_is_the_solution() -> None:
    diagnosis, rationale = prompts.parse_solve("<think>a</think> b <think>c</think> d")
    assert rationale == "d"
    assert diagnosis is not None and diagnosis.startswith("a")


@pytest.mark.parametrize("parse", [prompts.parse_solve, prompts.parse_new_answer])
def test_reasoning_that_never_ends_is_no_solution(parse: Any) -> None:
    diagnosis, rationale = parse("<think>first I add\n### new_answer\n2 + 2 = 4")
    assert rationale is None
    assert diagnosis is not None and "first I add" in diagnosis


@pytest.mark.parametrize(
    "text, diagnosis, rationale",
    [
        ("It added.\n\n### new_answer\n7 - 3 = 4", "It added.", "7 - 3 = 4"),
        ("It added.\n### new_answer:\n7 - 3 = 4\n", "It added.", "7 - 3 = 4"),
        ("### new_answer\n7 - 3 = 4", None, "7 - 3 = 4"),
        ("<think>hm</think>It added.\n### new_answer\n7 - 3 = 4", "hm\nIt added.", "7 - 3 = 4"),
        ("<think>a draft: ### new_answer 5</think>\n### new_answer\n7 - 3 = 4", "a draft: ### new_answer 5", "7 - 3 = 4"),
        ("It added. 7 - 3 = 4", "It added. 7 - 3 = 4", None),
        ("It added.\n### new_answer\n", "It added.", None),
        ("It added.\n### new_answer:", "It added.", None),
        ("<think>### new_answer\n4</think>", "### new_answer\n4", None),
        ("", None, None),
        ("  ", None, None),
        ("\x00\ud800### new_answer\n\u202e#### 4", "\x00\ud800", "\u202e#### 4"),
    ],
)
def test_a_new_answer_is_what_stands_under_its_heading(text: str, diagnosis: str | None, rationale: str | None) -> None:
    assert prompts.parse_new_answer(text) == (diagnosis, rationale)


def test_a_second_heading_stays_in_the_text_where_accept_refuses_it() -> None:
    from undo_ray.frame import frame_phrase

    _, rationale = prompts.parse_new_answer("a\n### new_answer\none\n### new_answer\ntwo")
    assert rationale == "one\n### new_answer\ntwo"
    assert frame_phrase(rationale, "What is 3 + 4?") is not None


@pytest.mark.parametrize(
    "template, parse",
    [("prefix", prompts.parse_new_answer), ("paper", prompts.parse_new_answer), ("compact", prompts.parse_solve)],
)
def test_a_template_brings_the_parse_of_the_form_it_asks_for(template: str, parse: Any) -> None:
    assert TEMPLATES[template].parse is parse
    assert ("### new_answer" in rendered(template, (), OWN)) is (parse is prompts.parse_new_answer)


@pytest.mark.parametrize("text", ["<think>" * 50_000, "</think>" * 50_000, "### new_answer\n" * 20_000, "#" * 500_000])
def test_parsing_hostile_output_takes_no_time(text: str) -> None:
    import time

    start = time.process_time()
    prompts.parse_new_answer(text)
    assert time.process_time() - start < 1
