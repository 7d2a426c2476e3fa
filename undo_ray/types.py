"""The nouns of undo_ray and the one Arrow schema that every stage reads and writes.

Vocabulary: a **problem** is a question with a known answer. A **rationale** is what the teacher wrote for it in round k, an
**attempt** what a student wrote. A **verdict** says whether a text reached the problem's answer. A **lesson** is a chat the
student is trained on, made from an accepted rationale. A **gap**, Δ(k), is what the student got wrong after round k, as the
teacher sees it. "Round" and "iteration" are one thing; round 0 is standard one-shot distillation.

One row per problem travels round the loop. `ROWS` is its schema, identical in every round, so that no column drifts: a stage
fills the columns below the problem's own and passes everything else through. Names ending in `_ref` are `ray.ObjectRef`s; they
die with the driver, so nothing that must last is ever one.
"""

from __future__ import annotations

import time
from calendar import timegm
from dataclasses import dataclass
from typing import Any, TypedDict

import pyarrow as pa

from undo_ray.written import printable

Row = dict[str, Any]
"""One row of `ROWS` as plain Python values (`pa.Table.to_pylist`)."""

TRAIN, SHOW, SELECT = "train", "show", "select"
"""The three roles of rows inside the loop (column `split`): taught; shown in every teacher prompt; chooses between rounds."""


class Message(TypedDict):
    """One turn of a chat, e.g. `{"role": "user", "content": "What is 2 + 2?"}`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What grading one text against one problem found.

    Example: `Verdict(False, "41")`, `Verdict(False, None, "no_answer")`. Ungraded counts as wrong and is always shown apart.
    """

    correct: bool
    answer: str | None = None
    """The answer found in the text, as written there."""
    reason: str | None = None
    """Why nothing could be graded: `no_answer`, `format`, `truncated`, `timeout`, `engine_error`; None when it was graded."""


NO_ANSWER, FORMAT, TRUNCATED, TIMEOUT, ENGINE_ERROR = "no_answer", "format", "truncated", "timeout", "engine_error"
"""Reasons of a verdict that compared nothing."""

INT, TEXT = pa.int64(), pa.string()
VERDICT = pa.struct([("correct", pa.bool_()), ("answer", TEXT), ("reason", TEXT)])

GENERATION = pa.struct(
    [
        ("text", TEXT),
        ("finish_reason", TEXT),  # "stop" | "length"; null when the engine failed
        ("prompt_tokens", INT),
        ("cached_tokens", INT),  # prompt tokens whose keys and values were reused, as the engine counts them
        ("completion_tokens", INT),
        ("engine_error", TEXT),
    ]
)
"""One sample from an engine."""

CANDIDATE = pa.struct(
    [
        ("round", INT),
        ("hint", TEXT),  # what of the gold the teacher was shown, "answer" or "solution"; null for an unhinted one
        *GENERATION,
        ("diagnosis", TEXT),  # what the teacher said about the student's answer; kept, never trained on
        ("rationale", TEXT),  # the part that is graded and trained on; null when the text could not be parsed
        ("verdict", VERDICT),
        ("refused", TEXT),  # why it is no lesson (see gap.refusal); null when accepted
    ]
)
"""One rationale of this round, accepted or not."""

ATTEMPT = pa.struct([("round", INT), *GENERATION, ("verdict", VERDICT)])
"""What the student of `round` wrote."""

_TEACHER_PART = [("rationale", TEXT), ("diagnosis", TEXT), ("rationale_verdict", VERDICT)]
HISTORY = pa.struct([("round", INT), *_TEACHER_PART, ("attempt", TEXT), ("attempt_verdict", VERDICT)])
"""One round of a question's own past: what the teacher wrote, and what its student then made of the question."""

PROBLEM_FIELDS: dict[str, pa.DataType] = {
    "id": TEXT,  # `gsm8k/train/17`: stable and unique in a run, the key of everything
    "task": TEXT,  # whose grader judges answers: a name of tasks.TASKS or `package.module:NAME`
    "split": TEXT,  # role in the run (train, show, select); of test rows the name of the test
    "question": TEXT,
    "answer": TEXT,  # the gold answer alone, without its derivation
    "choices": pa.list_(TEXT),  # options of a multiple-choice question
    "subject": TEXT,  # the benchmark's own category: for error profiles, never in a prompt
    "level": TEXT,
    "solution": TEXT,  # the benchmark's own worked solution; null unless the recipe's hints show it to the teacher
    "answer_type": TEXT,  # how to compare the gold where the benchmark says so: TheoremQA's `float`, `bool`…
}
"""A problem: a question whose answer is known."""

ROWS = pa.schema(
    [
        *PROBLEM_FIELDS.items(),
        ("history", pa.list_(HISTORY)),  # oldest first
        ("candidates", pa.list_(CANDIDATE)),  # this round's samples
        ("attempt", ATTEMPT),  # the newest attempt of a student
        ("resampled", pa.list_(ATTEMPT)),  # further samples of that student at the same question, for its pass rate
        ("lesson", pa.struct([("round", INT), ("hint", TEXT), ("rationale", TEXT)])),  # newest accepted rationale
    ]
)
"""The row that travels round the loop."""

_CHAT = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))
LESSONS = pa.schema([("id", TEXT), ("round", INT), ("hint", TEXT), ("messages", _CHAT)])
"""What `accept` writes and `finetune` reads; loadable as it is by TRL, Axolotl, LLaMA-Factory and `datasets`."""


class UserError(Exception):
    """Something the person running undo_ray can mend. The message is one line: what, where, the remedy; what it quotes of
    datasets and models cannot steer a terminal.

    `exit_code` is what the command line exits with: 2 for input, 3 for a round without any accepted rationale, 4 for a run
    directory that cannot be used (held by another driver, another identity, a corrupt record), 5 for too few resources.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(printable(message).replace("\n", " "))
        self.exit_code = exit_code
        self.add_note(f"exit code {exit_code}")  # ends its traceback, which may be all that leaves a worker


class Damaged(UserError):
    """Something a stage kept for going on cannot be read. The stage is done again without it: see `store.Step.once`."""

    def __init__(self, message: str, place: str):
        """`place`: its path or URI."""
        super().__init__(message, exit_code=4)
        self.place = place


def unusable(message: str) -> UserError:
    """The error of a run directory that cannot be used."""
    return UserError(message, exit_code=4)


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


_TIME = "%Y-%m-%dT%H:%M:%SZ"


def now() -> str:
    """The time in UTC as records have it, e.g. `2026-01-31T23:59:59Z`."""
    return time.strftime(_TIME, time.gmtime())


def unix_time(at: str) -> int:
    """Seconds since 1970 of what `now` gave."""
    return timegm(time.strptime(at, _TIME))


def got(ref: Any) -> Any:
    """What a Ray task or actor gave; raises what it raised, without Ray's wrapping, so that a UserError is one line still."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from error
