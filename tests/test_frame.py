"""What refers to the tutoring frame is found; what only uses its words is not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from undo_ray.frame import frame_phrase, hint_phrase

LEAKS = [
    "The student's answer was incorrect because the two prices were added instead of multiplied.",
    "In the student’s previous attempt, the sales tax was left out.",
    "Unlike the previous rationale, this one writes out every step.",
    "Your score of 0 shows that the second step needs more care.",
    "As the tutor, I will explain why we divide before we add.",
    "The teacher's answer finds 18, and so do we.",
    "According to the gap information, subtraction is the weak point.",
    "### student answer:\n12",
    "### score:\n0\nSo we start again.",
    "### ITERATION 2 teacher answer:\nThere are 4 rows of 6.",
    "### new_answer\n3 + 4 = 7",
    "The student mistakenly added 5 and 3.",
    "To help the student understand, let's draw the groups.",
    "You made a mistake in the second step: 7 x 8 is 56.",
    "Your previous answer missed the discount, so take it off first.",
    "My earlier explanation was too short, so here is every step.",
    "In my previous response I skipped the conversion to minutes.",
    "Here is an improved answer that shows the carry.",
    "As an AI tutor, I will go slowly.",
    "The student seems to have confused perimeter with area.",
    "The learner's misunderstanding lies in the percentage step.",
    "Let's correct the student's mistake and try again.",
    "Based on the feedback, the next step is written out.",
    "The student received a score of 0 on this one.",
    "Score: 0\nThe total is 18.",
    "**Score:** 1\nThe total is 18.",
    "Score:0",
    "**Student's answer:** 14",
    "The earlier answer was correct, so we keep its steps.",
    "Let us look at where the student went wrong: the units.",
    "As noted in the analysis, the remainder was dropped.",
    "Compared with the previous answer, this one names the units.",
    "The student answered 15, which is incorrect.",
    "The student should have multiplied by 4.",
    "The student did not account for the two broken eggs.",
    "The previous teacher answer left out the tax.",
    "Your reasoning was right until the last step.",
    "The student, however, forgot to carry the one.",
    "The mistake made by the student was to double the cost.",
    "Since the previous attempt failed, we count in another way.",
    "What the student missed is that a dozen is 12.",
    "The student failed to convert hours into minutes.",
    "Your answer of 12 is too small, because there are two boxes.",
    "The teacher's explanation did not say why we divide.",
    "This time, let's break the problem into smaller steps.",
    "The student's approach is right, but the sum is not.",
    "The low score indicates that carrying is hard.",
    "Let's fix what went wrong in the student's working.",
    "You correctly found the cost of one pen, but then stopped too early.",
    "Since you scored 0 last time, I will be more explicit.",
    "The first attempt by the student ignored the discount.",
    "In contrast to the earlier teacher explanation, we use a table.",
    "The student's final answer should have been 12.",
    "Good job on the first step, but you added the tax twice.",
    "My last answer skipped the carry.",
    "The student didn't carry the one.",
    "The student's calculation of 7 x 8 = 54 is wrong.",
    "To address the student's confusion about units, convert first.",
    "Compared to your attempt, note that the price is per dozen.",
    "A score of 0 was given because the units were wrong.",
    "The teacher answered 18, while the student answered 16.",
    "Both the teacher and the student agree that the total is 18.",
    "The previous explanation did not mention the remainder.",
    "This explanation corrects the misunderstanding shown by the student.",
    "The student had the right idea but divided by the wrong number.",
    "For a student who struggles with carrying, write the units first.",
    "Here is a clearer explanation for the student.",
    "The student thought that half of 10 is 4.",
    "In the examples above, the student often forgets to carry.",
    "Unlike in the previous iteration, we show each step.",
    "I am your tutor, and I will show you each step.",
    "The student's response shows a good grasp of multiplication, yet it ends one step early.",
    "Looking at the score, we can tell that this kind of problem is hard.",
    "Note that the student reached 48 by counting the boxes twice.",
    "To close the gap identified above, we first review ratios.",
    "Since the last rationale did not help, here is another way.",
    "The student's answer of 24 would be right if there were two trips.",
    "As your teacher, I want to walk you through this once more.",
    "Your solution stops at 15, but the question asks for the total.",
    "Let me rephrase my previous rationale in simpler terms.",
    "In this iteration we add a picture of the number line.",
    "The model student confuses area and perimeter.",
    "Correct! You only need to add the tax.",
    "The student arrived at $50 because the coupon was ignored.",
    "I noticed that you divided before subtracting.",
    "This was answered incorrectly before, so pay attention to the unit.",
    "Improving on the earlier explanation, we name each quantity.",
    "The student was almost right.",
    "Here the student needs to see that 3 dozen is 36.",
    "The given student answer is 17, which is too low.",
    "The tutor's hint is to draw a table.",
    "Teacher answer: 18",
    "[Student's attempt] 3 + 4 = 8",
    "The student may not know that a decade is ten years.",
    "Unlike before, the explanation now shows the carry.",
]
ORDINARY = [
    "The student bought 3 pencils and 2 pens.",
    "Her score was 85, and his score was 10 points higher.",
    "Each student's answer sheet has 20 questions, so 5 students fill in 100.",
    "The teacher's desk is 4 feet long.",
    "There are 30 students in the class and the teacher has 60 stickers.",
    "She works as a teacher and earns $30 an hour.",
    "The tutor charges $40 for each lesson, so 3 lessons cost $120.",
    "The previous day he ran 5 miles.",
    "Multiply the previous answer by 2 to get 36.",
    "From the previous step, x = 4.",
    "How many questions did the student answer correctly? 20 - 4 = 16.",
    "The student answered 15 questions and skipped 5.",
    "The student missed 3 classes in May and 2 in June.",
    "The final score was 3 to 1.",
    "A team with a score of 10 beats a team with a score of 1.5.",
    "The new solution holds 40% acid.",
    "The student's bag weighs 4 kg and the teacher's bag weighs 6 kg.",
    "In the previous round, 8 players were left.",
    "A common mistake is to add the percentages; multiply them instead.",
    "Let's check the answer: 6 x 7 = 42.",
    "The students' scores average 80, so the total score is 2400.",
    "The student club sold 14 tickets.",
    "The student got 12 stickers but gave 3 away.",
    "The feedback form has 5 questions.",
    "The student and the teacher share 12 cookies, so each gets 6.",
    "Your total is 15 dollars.",
    "You add 5 and 3 to get 8.",
    "Once you have multiplied by 4, subtract 6.",
    "The student did not have enough money, so he borrowed 5 dollars.",
    "The student answered 12 of 20 questions correctly and 8 wrong.",
    "The teacher gave the student 5 stickers.",
    "If you doubled the recipe, you would need 6 eggs.",
    "The student should pay 12 dollars.",
    "The earlier train leaves at 5.",
    "The first attempt took 5 minutes and the second took 7.",
    "The student has read 40 pages and reads 10 more.",
    "The tutor works 5 hours a week.",
    "His score improved by 10 points.",
    "The student's total is 15 dollars.",
    "Each student's score is 80.",
    "The new answer sheet has 20 rows.",
    "This leaves a gap of 3 feet.",
    "The teacher must grade 30 tests.",
    "Her answer is 12 and his answer is 14.",
]


@pytest.mark.parametrize("text", LEAKS)
def test_leak_is_found(text: str) -> None:
    assert frame_phrase("There are 3 boxes of 6 eggs.\n" + text, "How many eggs are in 3 boxes of 6?") is not None


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_sentence_of_a_problem_that_speaks_of_such_people_is_not(text: str) -> None:
    assert frame_phrase(text, question=text) is None


def test_the_question_tells_whose_student_it_is() -> None:
    text = "The teacher had already found 36."
    assert frame_phrase(text, "How many eggs are in 3 dozen?") == "The teacher"
    assert frame_phrase(text, "Teachers look for 40 pens. How many are missing?") is None


def recorded(data_dir: Path) -> list[tuple[str, str]]:
    """(response, question) of the recorded correct responses."""

    def rows(pattern: str) -> Iterator[dict[str, Any]]:
        for path in sorted(data_dir.glob(pattern)):
            yield from map(json.loads, filter(None, path.read_text(encoding="utf-8").split("\n")))

    questions = {row["id"]: " ".join([row["question"], *(row["choices"] or [])]) for row in rows("[!g]*/*.jsonl")}
    questions |= {row["id"]: row["question"] for row in rows("gsm8k/*.jsonl")}
    found = [row for row in rows("graded/*.jsonl") if row["correct"] and row.get("question_id") in questions]
    return [(row["response"], questions[row["question_id"]]) for row in found]


@pytest.mark.parametrize("phrase", [frame_phrase, hint_phrase])
def test_recorded_correct_answers_are_lessons(data_dir: Path, phrase: Callable[[str, str], str | None]) -> None:
    answers = recorded(data_dir)
    found = [wording for answer in answers if (wording := phrase(*answer))]
    assert len(answers) > 3000
    assert len(found) <= 0.002 * len(answers), found


HINTED = [
    "The given answer is 42, so we need 6 * 7.",
    "As provided, the total is 18.",
    "The hint says to add first.",
    "As hinted, we factor first.",
    "The provided solution multiplies first.",
    "According to the reference solution, x = 3.",
    "Since the answer is 18, we look for two numbers.",
    "Knowing that the answer is 12, we check.",
    "We were told that the answer is 7.",
    "The correct answer was given as 18.",
    "We are given the final answer of 18.",
    "This agrees with the provided answer of 18.",
    "The answer, as given, is 18.",
    "The answer key says 18.",
    "Working back from the known answer, 18 / 3 = 6.",
    "This is consistent with the answer provided.",
    "Because the correct answer is 18, the sum must be 18.",
    "The expected answer is 18.",
    "Per the solution, we first subtract.",
    "The solution that was given shows 2x = 6.",
    "The right answer we were given is 18.",
    "To reach the stated answer of 18, add 3.",
    "This matches the right answer.",
    "Our result matches the reference.",
    "### right answer, for you alone:\n18",
]
UNHINTED = [
    "The given triangle has sides 3, 4 and 5.",
    "Substituting the given values, we get 12.",
    "As given in the problem, x = 3.",
    "As provided in the question, the rate is 5 per hour.",
    "The answer is 18, so the correct answer is (B).",
    "The general solution is given by y = ce^x.",
    "We are given that 3 apples cost 6 dollars.",
    "Given that x is positive, the solution is x = 3.",
    "It is known that the angles add up to 180 degrees.",
    "Based on the information provided, the total is 18.",
    "The expected value is 3.5.",
    "The solution contains 5 moles of salt.",
    "Adding the two equations gives the desired answer.",
    "Of the options provided, this matches the answer choice (C).",
]


@pytest.mark.parametrize("text", HINTED)
def test_a_mention_of_the_hint_is_found(text: str) -> None:
    assert hint_phrase("There are 3 boxes of 6 eggs.\n" + text, "How many eggs are in 3 boxes of 6?") is not None


@pytest.mark.parametrize("text", UNHINTED)
def test_a_sentence_that_only_sounds_like_one_is_not(text: str) -> None:
    assert hint_phrase(text, "How many?") is None


def test_what_the_question_hints_at_itself_may_be_named() -> None:
    assert hint_phrase("Following the hint, we factor.", "Solve x^2 = 4. Hint: factor.") is None
    assert hint_phrase("Following the hint, we factor.", "Solve x^2 = 4.") == "hint"


@pytest.mark.parametrize(
    "unit", ["your ", "the student's ", "a", " ", "#", "> ", "answer of the ", "word " * 3 + "\n", "\ud800\x00", "the given "]
)
def test_linear_time(unit: str) -> None:
    start = time.perf_counter()
    for phrase in (frame_phrase, hint_phrase):
        phrase(unit * (1_000_000 // len(unit)), "How many?")
    assert time.perf_counter() - start < 20
