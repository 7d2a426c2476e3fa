"""Every string a model sees, and the parse that undoes it.

`solve` is what the student is always asked, and the teacher in round 0. A `Template` is what the teacher is asked against a
gap Δ(k): `render` makes the chat, `parse` takes the answer apart into the diagnosis (kept) and the rationale (graded, trained
on). The gold answer is in no prompt but a hinted one, which the recipe has to ask for.

Layout matters to the bill: in `prefix` and `compact` everything before the question is byte-identical for all questions of a
round, so an engine's prefix cache computes the shown examples once. `paper` follows the published layout (arXiv 2504.02521 by
way of its public re-implementation), where the question comes first and nothing can be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from undo_ray.types import Message, Row

NEW_ANSWER = "### new_answer"
"""The heading under which a teacher writes the rationale."""


Parse = Callable[[str], tuple[str | None, str | None]]
"""Model output -> (diagnosis, rationale). A rationale of None is the verdict reason `format`."""


@dataclass(frozen=True, slots=True)
class Case:
    """One scored example as a teacher sees it: a question, what the teacher said, what the student made of it.

    `before` holds the teacher's answers, oldest first, as (round, text). `score` is None when no student has attempted it.
    """

    question: str
    before: tuple[tuple[int, str], ...] = ()
    teacher_answer: str | None = None
    student: str | None = None
    student_answer: str | None = None
    score: bool | None = None
    hint: str | None = None
    """What a teacher is told of the gold, as the template's `hint` words it."""


@dataclass(frozen=True, slots=True)
class Template:
    """A way to ask for a rationale against a gap."""

    render: Callable[[Sequence[Case], Case, str], list[Message]]
    """(shown examples, the question with its own history, the task's instruction) -> chat."""
    parse: Parse
    hint: Callable[[str, str], str]
    """(`answer` or `solution`, the gold one) -> how a prompt says it."""


def question_text(row: Row) -> str:
    """The question with its lettered options, if it has any."""
    options = [f"{chr(65 + index)}. {choice}" for index, choice in enumerate(row["choices"] or ())]
    return "\n".join([row["question"], *options])


def solve(question: str, instruction: str, hint: str | None = None) -> list[Message]:
    """The plain task: the question, a hint where there is one, then how to state the answer."""
    return _user("\n\n".join(part for part in (question, hint, instruction) if part))


def parse_solve(text: str) -> tuple[str | None, str | None]:
    """What follows a model's private reasoning is the rationale: `<think>a</think> b` -> ("a", "b")."""
    thought, closed, answer = text.rpartition("</think>")
    if not closed:
        # Reasoning that was never closed has no answer after it.
        thought, answer = ("", text) if "<think>" not in text else (text, "")
    thought = thought.replace("<think>", "", 1).strip()
    return thought or None, answer.strip() or None


def parse_new_answer(text: str) -> tuple[str | None, str | None]:
    """Everything before the heading `### new_answer` is the diagnosis, everything after it the rationale."""
    thought, body = parse_solve(text)
    before, heading, after = (body or "").partition(NEW_ANSWER)
    diagnosis = "\n".join(part for part in (thought, before.strip()) if part) or None
    return diagnosis, (after.lstrip(":").strip() or None) if heading else None


_ROLE = "You are a tutor. A student is learning to solve problems from written explanations, and you write those explanations."
_CHECKS = (
    "First study the student's answer next to the teacher's answer and find what went wrong or was weak. Ask yourself:\n"
    "1. Did the student understand what is asked?\n"
    "2. Was the approach right?\n"
    "3. Is there an error of calculation?\n"
    "4. Is the reasoning clear and in a logical order?\n"
    "5. Is a step missing?"
)
_CHECKS_AGAIN = (
    "First compare the student's answer with the teacher's earlier answers and find which mistakes or weaknesses remain, "
    "then decide how a new explanation has to differ from the earlier ones to mend them."
)
_WRITE = (
    "Then write a new answer to the question from which this student will learn better than from the earlier one: go step by "
    "step, explain what was misunderstood, and confirm what was right. The new answer must stand on its own: it is read "
    "without this conversation, so it must not mention a student, a teacher, a score or an earlier answer."
)


def _output(instruction: str) -> str:
    more = f" {instruction}" if instruction else ""
    return f"Write your analysis first. Then write the line\n{NEW_ANSWER}\nand below it nothing but the new answer.{more}"


def _block(case: Case) -> str:
    """One example in the headed layout; parts that are not known are left out."""
    several = len(case.before) > 1
    teacher = [f"### {f'ITERATION {round} ' if several else ''}teacher answer:\n{text}" for round, text in case.before]
    scored = [f"### student answer:\n{case.student or ''}", f"### score:\n{int(case.score)}"] if case.score is not None else []
    return "\n".join([f"### question:\n{case.question}", *teacher, *scored, *filter(None, [case.hint])])


def _prefix(shown: Sequence[Case], own: Case, instruction: str) -> list[Message]:
    # Nothing above the last part may depend on the question: it is what the engine's prefix cache shares.
    shared = [_ROLE, _CHECKS, _WRITE, _output(instruction)]
    if shown:
        shared.append("Examples of how this student answers, each with its score (1 right, 0 wrong):")
        shared += [_block(case) for case in shown]
    return _user("\n\n".join([*shared, "Now the question to write a new answer for:", _block(own)]))


def _paper(shown: Sequence[Case], own: Case, instruction: str) -> list[Message]:
    parts = [
        _ROLE,
        "You are given a question, the teacher's answer, a student's answer and its score (1 right, 0 wrong). Analyse them and "
        "write a new answer that helps the student learn better.",
        _block(own),
    ]
    if shown:
        parts += ["Examples of the task: similar questions, answered by the same student.", *map(_block, shown)]
    return _user("\n\n".join([*parts, _CHECKS if len(own.before) < 2 else _CHECKS_AGAIN, _WRITE, _output(instruction)]))


def _compact(shown: Sequence[Case], own: Case, instruction: str) -> list[Message]:
    # The score stands before the student's answer: a small model predicts it best from earlier examples of its kind.
    lines = [
        f"example {case.question} tutor {case.teacher_answer or 'none'} score [{int(bool(case.score))}] "
        f"student {case.student_answer or 'none'}"
        for case in shown
    ]
    last = f"question {own.question}"
    if own.hint:
        last += f" {own.hint}"
    elif own.score is not None:
        before = own.before[-1][1] if own.before else "none"
        last += f" before {before} score [{int(own.score)}] student {own.student_answer or 'none'}"
    return _user("\n".join([*lines, last]) + (f"\n{instruction}" if instruction else ""))


def _hint(kind: str, gold: str) -> str:
    name = {"answer": "right answer", "solution": "reference solution"}[kind]
    return (
        f"### {name}, for you alone:\n{gold}\n"
        "Arrive there by reasoning step by step, in words of your own, as if you had not seen it. What you write is read by "
        "someone who has not, so it must not mention that anything was given, and must not copy it."
    )


def _compact_hint(kind: str, gold: str) -> str:
    # In the words the miniature teacher knows: an earlier rationale with which the student failed.
    return f"before {gold} score [0] student none"


def _user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


TEMPLATES: dict[str, Template] = {
    "prefix": Template(_prefix, parse_new_answer, _hint),
    "paper": Template(_paper, parse_new_answer, _hint),
    "compact": Template(_compact, parse_solve, _compact_hint),
}


def own_case(row: Row) -> Case:
    """A row's question with its own history, as a teacher sees it."""
    past: list[dict[str, Any]] = [entry for entry in row["history"] or () if entry["rationale"]]
    last = (row["history"] or [{}])[-1]
    verdict = last.get("attempt_verdict")
    return Case(
        question=question_text(row),
        before=tuple((entry["round"], entry["rationale"]) for entry in past),
        teacher_answer=past[-1]["rationale_verdict"]["answer"] if past else None,
        student=last.get("attempt"),
        student_answer=verdict["answer"] if verdict else None,
        score=verdict["correct"] if verdict else None,
    )
