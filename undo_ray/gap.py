"""Δ(k) and what is decided from it. Pure functions over rows and counts; nothing here knows Ray.

`Gap` is what the teacher of round k + 1 is told about the student of round k, and what the loop decides by: the shown cases,
the accuracy on `select` with its interval, the error profile by subject. `refusal` says why a rationale is no lesson,
`converged` when to stop, `best` which round is the result.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from undo_ray.frame import frame_phrase, hint_phrase
from undo_ray.prompts import Case, own_case
from undo_ray.types import ENGINE_ERROR, SELECT, SHOW, TRUNCATED, Row

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Score:
    """An accuracy with what it rests on. `low` and `high` bound the 95 % Wilson interval; all shares are fractions of 1.

    Example: `Score.of(n=100, correct=50, unparsed=2, truncated=1)` has accuracy 0.5, low 0.404, high 0.596.
    """

    n: int
    accuracy: float | None
    low: float | None
    high: float | None
    unparsed: float | None
    """Share of answers in which nothing could be graded, truncated ones included."""
    truncated: float | None

    @classmethod
    def of(cls, n: int, correct: int, unparsed: int = 0, truncated: int = 0) -> Score:
        """Counts to shares. With n = 0 every share is None."""
        if n == 0:
            return cls(0, None, None, None, None, None)
        low, high = wilson(correct, n)
        return cls(n, correct / n, low, high, unparsed / n, truncated / n)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a binomial share (Wilson 1927)."""
    share, z2 = correct / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the bounds are exactly 0 and 1; rounding would miss them by an ulp.
    return (centre - half if correct else 0.0), (centre + half if correct < n else 1.0)


@dataclass(frozen=True, slots=True)
class Gap:
    """Δ(k): what the student of round `round` got wrong, as the next teacher sees it and as the loop decides by it."""

    round: int
    shown: tuple[Case, ...]
    """The show questions in a fixed order (by id), each with teacher answer, student answer and score."""
    select: Score
    show: Score
    subjects: dict[str, dict[str, int]] = field(default_factory=dict)
    """Error profile on select: subject -> {"n": …, "wrong": …}."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Gap:
        cases = (Case(**{**case, "before": tuple(map(tuple, case["before"]))}) for case in plain["shown"])
        scores = {name: Score(**plain[name]) for name in ("select", "show")}
        return cls(plain["round"], tuple(cases), **scores, subjects=dict(plain["subjects"]))


Tally = Counter[tuple[str, str, str]]
"""Counts under (split, subject, what was counted); adds up over the parts of a set. See `tally`."""


def tally(rows: Iterable[Row], column: str = "attempt", prefix: int = 0) -> Tally:
    """Count what a stage made in `column` of its rows, `attempt` or `candidates`.

    Per text: `generations`, `broken` (the engine failed), its three token counts, and `prefix_tokens`, how many of the first
    `prefix` tokens of its prompt came from a cache. Per candidate, and per question's first
    attempt: `n`, `correct`, `unparsed`, the verdict's reason, `refused REASON`, `hinted HINT`, `accepted HINT`. Per row:
    `good`, `asked` (it has a text), `failed` (the engine failed on one of them).
    """
    counts = Tally()
    for row in rows:
        texts = made(row, column)
        found = Counter(good=good(row, column), asked=bool(texts))
        for number, text in enumerate(texts):
            verdict = text["verdict"]
            found.update({name: text[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens")})
            found.update(prefix_tokens=min(text["cached_tokens"], prefix))
            found.update(generations=1, broken=verdict["reason"] == ENGINE_ERROR)
            if column == "attempt" and number:
                continue  # a score rests on one attempt a question: its interval is for independent ones
            found.update(n=1, correct=verdict["correct"])
            if verdict["reason"]:
                found.update(["unparsed", verdict["reason"]])
            if hint := text.get("hint"):
                found.update({f"hinted {hint}": 1, f"accepted {hint}": text["refused"] is None})
            if text.get("refused"):
                found["refused " + text["refused"]] += 1
        found["failed"] = found["broken"] > 0
        counts.update({(row["split"], row["subject"] or "", what): count for what, count in found.items()})
    return counts


def made(row: Row, column: str) -> list[Row]:
    """The texts a stage made for a row: its `candidates`, or its `attempt`, if it has any, and after it those `resampled`."""
    if column == "candidates":
        return list(row[column] or ())
    return [row["attempt"], *(row["resampled"] or ())] if row["attempt"] else []


def good(row: Row, column: str) -> bool:
    """Whether a row came out well: a candidate was accepted, the first attempt was right."""
    if column == "candidates":
        return any(text["refused"] is None for text in made(row, column))
    return any(text["verdict"]["correct"] for text in made(row, column)[:1])


def selected(candidates: Sequence[Row], select: str) -> Row | None:
    """The accepted candidate that becomes the lesson: the `first`, or the `shortest` by the characters of its rationale (of
    equals the first); None when none was accepted."""
    accepted = [candidate for candidate in candidates if candidate["refused"] is None]
    if select == "shortest":
        accepted.sort(key=lambda candidate: len(candidate["rationale"]))
    return accepted[0] if accepted else None


def asks_again(row: Row, regenerate: str, unstable_below: float) -> bool:
    """Whether the teacher of a round k > 0 explains a training question again, by what student k-1 made of it.

    `regenerate`: `all`; `failed`, where its attempt was not right; `unstable`, where the share of its attempts that were right
    is less than `unstable_below`. An attempt in which nothing could be graded is not right.
    """
    if regenerate == "unstable":
        right = [attempt["verdict"]["correct"] for attempt in made(row, "attempt")]
        return sum(right) / len(right) < unstable_below
    return regenerate == "all" or not good(row, "attempt")


def total(counts: Tally, split: str | None = None) -> Counter[str]:
    """A tally's sums over subjects, of one split or of all."""
    sums: Counter[str] = Counter()
    for (of, _, what), count in counts.items():
        sums[what] += count if split in (of, None) else 0
    return sums


def score(counts: Tally, split: str) -> Score:
    """The score of one split out of a tally."""
    sums = total(counts, split)
    return Score.of(sums["n"], sums["correct"], sums["unparsed"], sums[TRUNCATED])


def measured(round: int, show_rows: Sequence[Row], counts: Tally, shared: bool) -> Gap:
    """Δ(k) from the attempted show rows and the tally of show and select. `shared`: show is select, as in the paper."""
    chosen = SHOW if shared else SELECT
    asked = {subject: n for (split, subject, what), n in counts.items() if (split, what) == (chosen, "n") and subject}
    subjects = {subject: {"n": n, "wrong": n - counts[chosen, subject, "correct"]} for subject, n in sorted(asked.items())}
    shown = tuple(shown_case(row) for row in sorted(show_rows, key=lambda row: row["id"]))
    return Gap(round, shown, score(counts, chosen), score(counts, SHOW), subjects)


def shown_case(row: Row) -> Case:
    """A show row as an example: the teacher answered it once, in round 0; the student's part is its newest attempt."""
    first = (row["history"] or [{"rationale": None}])[0]
    newest = {"attempt": row["attempt"]["text"], "attempt_verdict": row["attempt"]["verdict"]}
    return own_case({**row, "history": [{**first, **newest}]})


def shuffled(cases: Sequence[Case], seed: int) -> tuple[Case, ...]:
    """The control `feedback = "shuffled"`: what students wrote and scored, permuted across questions. All totals stay."""
    pairs = zip(cases, random.Random(seed).sample(list(cases), len(cases)), strict=True)
    return tuple(replace(case, student=by.student, student_answer=by.student_answer, score=by.score) for case, by in pairs)


def refusal(candidate: Mapping[str, Any], question: str, keep_wrong: bool = False) -> str | None:
    """Why a graded candidate is no lesson by itself: its verdict's reason, `wrong`, `frame` or `hint`; None when it may be one.

    `frame` is a rationale that talks about the tutoring ("the student's answer"…): true to its prompt, useless as a lesson.
    `hint` is one that talks about the answer its teacher was shown.
    With `keep_wrong` a finished rationale is accepted whatever its answer, and without one.
    """
    verdict = candidate["verdict"]
    if candidate["rationale"] is None or candidate["finish_reason"] != "stop":
        return str(verdict["reason"])
    if not verdict["correct"] and not keep_wrong:
        return verdict["reason"] or "wrong"
    if frame_phrase(candidate["rationale"], question):
        return "frame"
    return "hint" if candidate["hint"] and hint_phrase(candidate["rationale"], question) else None


def converged(accuracies: Sequence[float], patience: int, min_gain: float) -> bool:
    """Whether select accuracy (one per round so far) has stopped rising.

    True when none of the last `patience` rounds beat the best before them by more than `min_gain`. Rounds are measured on the
    same questions, so their differences are paired.
    """
    if len(accuracies) <= patience:
        return False
    return max(accuracies[-patience:]) <= max(accuracies[:-patience]) + min_gain + 1e-9  # 0.34 - 0.24 > 0.1 in floats


def best(accuracies: Sequence[float]) -> int:
    """The round with the highest select accuracy; of equals the earliest, which cost least."""
    return max(range(len(accuracies)), key=lambda k: (accuracies[k], -k))


def row_seed(seed: int, *parts: object) -> int:
    """A 31-bit seed from the run's seed and what the draw is for; the same on every machine and in every order."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4], "big") >> 1
