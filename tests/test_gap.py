"""Δ(k) and what is decided from it: intervals, shown cases, the controls, what is refused, when to stop, which round wins."""

import itertools
import json
import math
from collections import Counter
from dataclasses import asdict
from statistics import NormalDist
from typing import Any

import pytest

from undo_ray import gap
from undo_ray.gap import Gap, Score
from undo_ray.prompts import Case

Z = NormalDist().inv_cdf(0.975)


TOKENS = {"prompt_tokens": 7, "cached_tokens": 3, "completion_tokens": 5}


def verdict(correct: bool, answer: str | None = "4", reason: str | None = None) -> dict[str, Any]:
    return {"correct": correct, "answer": answer, "reason": reason}


def row(
    id: str, split: str, correct: bool, reason: str | None = None, subject: str | None = None, **more: Any
) -> dict[str, Any]:
    """An attempted row as `measure` reads it."""
    found = None if reason else ("4" if correct else "5")
    return {
        "id": id,
        "split": split,
        "question": f"question of {id}",
        "choices": None,
        "subject": subject,
        "history": [],
        "attempt": {"text": f"attempt of {id}", "verdict": verdict(correct, found, reason), **TOKENS},
        "resampled": [],
        **more,
    }


# -- accuracies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "correct, n, low, high",
    [  # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: the score method without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_wilson_score_interval(correct: int, n: int, low: float, high: float) -> None:
    found = gap.wilson(correct, n)
    assert [round(bound, 4) for bound in found] == [low, high]
    mirrored = gap.wilson(n - correct, n)
    assert mirrored == pytest.approx((1 - found[1], 1 - found[0]))


@pytest.mark.parametrize("correct, n", [(1, 3), (7, 20), (50, 100), (999, 1319), (1, 1_000_000)])
def test_each_bound_is_the_share_that_the_observation_just_does_not_contradict(correct: int, n: int) -> None:
    for bound in gap.wilson(correct, n):
        assert abs(correct / n - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


@pytest.mark.parametrize("n", [1, 20, 10_000])
def test_the_interval_never_leaves_0_to_1(n: int) -> None:
    (none, few), (many, all) = gap.wilson(0, n), gap.wilson(n, n)
    assert 0 <= none < 1e-12 < few < 1
    assert 0 < many < 1 - 1e-12 < all <= 1


def test_a_score_turns_counts_into_shares() -> None:
    score = Score.of(n=200, correct=100, unparsed=30, truncated=10)
    assert (score.n, score.accuracy, score.unparsed, score.truncated) == (200, 0.5, 0.15, 0.05)
    assert (score.low, score.high) == gap.wilson(100, 200)


def test_nothing_measured_has_no_accuracy() -> None:
    assert asdict(Score.of(0, 0)) == dict.fromkeys(["accuracy", "low", "high", "unparsed", "truncated"], None) | {"n": 0}


def test_tallies_of_the_parts_add_up_to_the_tally_of_the_whole() -> None:
    rows = [row(f"r{i}", "select", i % 3 == 0, "truncated" if i % 5 == 1 else None, f"s{i % 2}") for i in range(30)]
    parts: Counter[Any] = Counter()
    for start in range(0, 30, 7):
        parts.update(gap.tally(rows[start : start + 7]))
    assert gap.score(parts, "select") == gap.score(gap.tally(rows), "select")


def test_a_truncated_answer_counts_as_unparsed_and_wrong() -> None:
    counts = gap.tally([row("a", "select", True), row("b", "select", False, "truncated"), row("c", "select", False, "format")])
    score = gap.score(counts, "select")
    assert (score.n, score.accuracy, score.unparsed, score.truncated) == (3, 1 / 3, 2 / 3, 1 / 3)


# -- Δ(k) ---------------------------------------------------------------------------------------------------------------

PAST = {"diagnosis": None, "rationale_verdict": verdict(True, "4"), "attempt": None, "attempt_verdict": None}


def delta(shared: bool) -> Gap:
    shown = [
        row("q/9", "show", False, history=[{"round": 0, "rationale": "teach 9", **PAST}]),
        row("q/10", "show", True, history=[{"round": 0, "rationale": "teach 10", **PAST}]),
    ]
    selected = [
        row("s1", "select", True, subject="algebra"),
        row("s2", "select", False, subject="algebra"),
        row("s3", "select", False, "no_answer", subject="geometry"),
        row("s4", "select", True),
    ]
    return gap.measured(3, shown, gap.tally([*shown, *selected]), shared)


def test_shown_cases_stand_in_the_order_of_their_ids_whatever_order_they_came_in() -> None:
    assert [case.question for case in delta(False).shown] == ["question of q/10", "question of q/9"]


def test_a_shown_case_has_the_teachers_one_answer_and_the_students_newest() -> None:
    assert delta(False).shown[1] == Case("question of q/9", ((0, "teach 9"),), "4", "attempt of q/9", "5", False)


def test_a_gap_measures_select_and_show_apart() -> None:
    found = delta(False)
    assert found.round == 3
    assert (found.select.n, found.select.accuracy, found.select.unparsed) == (4, 0.5, 0.25)
    assert (found.show.n, found.show.accuracy) == (2, 0.5)


def test_the_error_profile_counts_select_by_subject() -> None:
    assert delta(False).subjects == {"algebra": {"n": 2, "wrong": 1}, "geometry": {"n": 1, "wrong": 1}}


def test_a_shared_set_is_measured_where_it_is_shown() -> None:
    found = delta(True)
    assert found.select == found.show and found.select.n == 2
    assert found.subjects == {}


def test_a_gap_survives_the_record_as_it_was() -> None:
    found = delta(False)
    assert Gap.from_json(json.loads(json.dumps(found.to_json()))) == found


# -- the controls -------------------------------------------------------------------------------------------------------

CASES = [
    Case(f"question {i}", ((0, f"teacher {i}"),), f"t{i}", f"student {i}", None if i % 7 == 0 else f"a{i}", i % 3 == 0)
    for i in range(20)
]


def test_shuffling_keeps_every_total_and_moves_what_students_wrote_together_with_its_score() -> None:
    def pairs(cases: Any) -> list[Any]:
        return sorted((case.student, case.student_answer or "", case.score) for case in cases)

    found = gap.shuffled(CASES, 5)
    assert pairs(found) == pairs(CASES)
    assert [(c.question, c.before, c.teacher_answer) for c in found] == [
        (c.question, c.before, c.teacher_answer) for c in CASES
    ]
    moved = sum(new.student != old.student for new, old in zip(found, CASES, strict=True))
    assert moved >= 15  # of 20; a random permutation leaves one in place on average


def test_shuffling_depends_on_the_seed_alone() -> None:
    assert gap.shuffled(CASES, 5) == gap.shuffled(list(CASES), 5)
    assert gap.shuffled(CASES, 5) != gap.shuffled(CASES, 6)


@pytest.mark.parametrize("cases", [[], CASES[:1]])
def test_nothing_to_shuffle_stays_as_it_is(cases: list[Case]) -> None:
    assert gap.shuffled(cases, 1) == tuple(cases)


@pytest.mark.parametrize(
    "parts, value",
    [  # int(sha256(repr(parts)).hexdigest()[:8], 16) >> 1
        ((0,), 1223360973),
        ((0, "rationale", 1, "gsm8k/train/17", 0), 1408902666),
        ((7, "attempt", 0, "é", 0), 2003239995),
    ],
)
def test_row_seeds_stay_what_they_are(parts: tuple[Any, ...], value: int) -> None:
    assert gap.row_seed(*parts) == value


def test_row_seeds_fit_31_bits_and_differ_by_every_part() -> None:
    keys = [
        (s, what, k, f"id/{i}", n) for s, what, k, i, n in itertools.product((0, 1), ("a", "b"), (0, 1), range(250), (0, 1))
    ]
    seeds = [gap.row_seed(*key) for key in keys]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == len(keys) == 4000
    assert [gap.row_seed(*key) for key in reversed(keys)] == seeds[::-1]


# -- which questions are explained again --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right, failed, unstable",  # which attempts were right; unstable below 0.75
    [
        ([True], False, False),
        ([False], True, True),
        ([True, True, True, False], False, False),  # three quarters are not below three quarters
        ([False, True, True, True], True, False),
        ([True, True, False, False], False, True),
        ([False, False, False, False], True, True),
    ],
)
def test_which_questions_are_explained_again(right: list[bool], failed: bool, unstable: bool) -> None:
    first, *more = [{"verdict": verdict(good)} for good in right]
    attempted = {"attempt": first, "resampled": more}
    found = [gap.asks_again(attempted, regenerate, 0.75) for regenerate in ("all", "failed", "unstable")]
    assert found == [True, failed, unstable]


def test_a_pass_rate_of_exactly_the_threshold_is_not_below_it() -> None:
    for n in range(1, 30):
        for right in range(n + 1):
            attempts = [{"verdict": verdict(i < right)} for i in range(n)]
            row = {"attempt": attempts[0], "resampled": attempts[1:]}
            assert not gap.asks_again(row, "unstable", right / n)


# -- what is no lesson --------------------------------------------------------------------------------------------------


def candidate(
    rationale: str | None, finish: str | None = "stop", correct: bool = True, reason: str | None = None
) -> dict[str, Any]:
    answer = None if reason else "4"
    return {"rationale": rationale, "finish_reason": finish, "verdict": verdict(correct, answer, reason), "hint": None}


FRAMED = "The student's answer is wrong: 2 + 2 = 4."


@pytest.mark.parametrize(
    "given, strict, trial",
    [
        (candidate("2 + 2 = 4"), None, None),
        (candidate("2 + 2 = 5", correct=False), "wrong", None),
        (candidate("no idea", correct=False, reason="no_answer"), "no_answer", None),
        (candidate("1e999", correct=False, reason="format"), "format", None),
        (candidate(FRAMED), "frame", "frame"),
        (candidate(FRAMED, correct=False), "wrong", "frame"),
        (candidate(None, correct=False, reason="format"), "format", "format"),
        (candidate(None, "length", False, "truncated"), "truncated", "truncated"),
        (candidate(None, None, False, "engine_error"), "engine_error", "engine_error"),
    ],
)
def test_the_first_reason_that_holds_is_given(given: dict[str, Any], strict: str | None, trial: str | None) -> None:
    assert gap.refusal(given, "What is 2 + 2?") == strict
    assert gap.refusal(given, "What is 2 + 2?", keep_wrong=True) == trial


def test_a_mention_of_the_hint_is_refused_where_there_was_one() -> None:
    given = candidate("The given answer is 4, and 2 + 2 = 4.")
    assert gap.refusal(given, "What is 2 + 2?") is None
    assert [gap.refusal({**given, "hint": hint}, "What is 2 + 2?") for hint in ("answer", "solution")] == ["hint", "hint"]
    assert gap.refusal({**candidate("2 + 2 = 4"), "hint": "answer"}, "What is 2 + 2?") is None


def test_a_student_in_the_question_may_be_in_the_lesson() -> None:
    lesson = candidate("The student buys 2 + 2 = 4 pens.")
    assert gap.refusal(lesson, "A student buys 2 pens, then 2 more. How many?") is None
    assert gap.refusal(lesson, "What is 2 + 2?") == "frame"


# -- when to stop, what to keep -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accuracies, patience, min_gain, stop",
    [
        ([], 1, 0.0, False),
        ([0.5], 1, 0.0, False),
        ([0.5, 0.6], 1, 0.0, False),
        ([0.5, 0.5], 1, 0.0, True),  # no gain
        ([0.5, 0.4], 1, 0.0, True),
        ([0.5, 0.4, 0.45], 1, 0.0, True),  # better than the last, not than the best
        ([0.5, 0.4], 2, 0.0, False),  # patience leaves one more round
        ([0.5, 0.4, 0.4], 2, 0.0, True),
        ([0.5, 0.4, 0.6], 2, 0.0, False),
        ([0.5, 0.6, 0.4], 2, 0.0, False),  # a gain within the last two rounds
        ([0.5, 0.6, 0.4, 0.6], 2, 0.0, True),
        ([0.5, 0.4, 0.4, 0.4], 3, 0.0, True),
        ([0.5, 0.4, 0.4], 3, 0.0, False),
        ([0.5, 0.52], 1, 0.05, True),  # too small a gain
        ([0.5, 0.56], 1, 0.05, False),
        ([0.50, 0.54, 0.58], 2, 0.05, False),  # 8 points over the best before the two rounds
        ([0.50, 0.54, 0.58], 1, 0.05, True),  # 4 points in the last one
        ([0.0, 0.0], 1, 0.0, True),
        ([1.0, 1.0], 1, 0.0, True),
        ([0.0, 1.0], 1, 1.0, True),
    ],
)
def test_the_loop_stops_when_the_last_rounds_brought_no_gain(
    accuracies: list[float], patience: int, min_gain: float, stop: bool
) -> None:
    assert gap.converged(accuracies, patience, min_gain) is stop


@pytest.mark.parametrize("gained, stop", [(10, True), (11, False)])
def test_a_gain_of_exactly_the_minimum_is_not_above_it(gained: int, stop: bool) -> None:
    pairs = [(before, before + gained) for before in range(90)]  # right of 100
    assert [pair for pair in pairs if gap.converged([n / 100 for n in pair], 1, 0.1) is not stop] == []


@pytest.mark.parametrize(
    "accuracies, round",
    [([0.5], 0), ([0.5, 0.6, 0.55], 1), ([0.6, 0.6, 0.6], 0), ([0.1, 0.6, 0.6], 1), ([0.0, 0.0], 0), ([0.1, 0.2], 1)],
)
def test_the_best_round_is_the_earliest_of_equals(accuracies: list[float], round: int) -> None:
    assert gap.best(accuracies) == round
