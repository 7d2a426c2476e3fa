"""The report for people: the paired gain, the line of a round, the table a run ends with."""

import copy
import math
import re
from typing import Any

import pytest

from undo_ray import report
from undo_ray.config import Prices
from undo_ray.place import Place
from undo_ray.types import UserError


def answers(right: str) -> dict[str, bool]:
    """`++-` -> three questions, the first two right."""
    return {f"q{i}": sign == "+" for i, sign in enumerate(right)}


def test_a_paired_gain_by_hand() -> None:
    # 10 questions: 3 won, 1 lost. Gain 2/10. Variance (3 + 1 - 2²/10) / 10² = 0.036; 1.959964 x sqrt(0.036) = 0.371877.
    found = report.paired(answers("++++------"), answers("+++-+++---"))
    assert (found["n"], found["won"], found["lost"], found["gain"]) == (10, 3, 1, 0.2)
    assert found["low"] == pytest.approx(-0.171877, abs=1e-6)
    assert found["high"] == pytest.approx(0.571877, abs=1e-6)


def test_a_paired_interval_is_that_of_the_mean_difference() -> None:
    before, after = answers("+-" * 100 + "+" * 50), answers("+-" * 30 + "-+" * 50 + "++" * 20 + "-" * 10 + "+" * 40)
    differences = [after[id] - before[id] for id in before]
    n, mean = len(differences), sum(differences) / len(differences)
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / n / n)
    found = report.paired(before, after)
    assert found["gain"] == pytest.approx(mean)
    assert found["high"] - mean == pytest.approx(1.959964 * error, rel=1e-6)
    assert mean - found["low"] == pytest.approx(1.959964 * error, rel=1e-6)


@pytest.mark.parametrize("right", ["++--", "----", "++++"])
def test_no_gain_over_itself(right: str) -> None:
    assert report.paired(answers(right), answers(right)) == {"n": 4, "gain": 0.0, "low": 0.0, "high": 0.0, "won": 0, "lost": 0}


def test_a_gain_on_every_question_has_no_spread() -> None:
    found = report.paired(answers("----"), answers("++++"))
    assert (found["gain"], found["low"], found["high"]) == (1.0, 1.0, 1.0)


def score(accuracy: float | None, low: float = 0.0, high: float = 1.0, n: int = 100, unparsed: float = 0.0) -> dict[str, Any]:
    return {"n": n, "accuracy": accuracy, "low": low, "high": high, "unparsed": unparsed, "truncated": 0.0}


def record(k: int, accuracy: float, test: float) -> dict[str, Any]:
    return {
        "round": k,
        "validation": score(accuracy, accuracy - 0.1, accuracy + 0.1),
        "tests": {"mini": score(test, test - 0.05, test + 0.05, 400, 0.02), "svamp": score(0.0)},
        "lessons": 900 + k,
        "hinted_lessons": 20 * k,
        "rationales": 1000,
        "reused": None,
        "teacher_tokens": {"prompt": 1_250_000, "cached": 1_000_000, "completion": 45_000},
        "seconds": {"rationales": 20.4, "student": 40.6} | ({"attempts": 5.0} if k else {}),
    }


REPORT: dict[str, Any] = {
    "best_round": 1,
    "primary_test": "mini",
    "base_tests": {"mini": score(0.0025, 0.0004, 0.014, 400, 0.5), "svamp": score(0.0)},
    "rounds": [record(0, 0.40, 0.35), record(1, 0.65, 0.625), record(2, 0.60, 0.6)],
    "feedback": "real",
    "seed": 3,
    "goal": "0123456789abcdef",
    "stopped": "rounds",
    "shared_validation": False,
    "keep_wrong": False,
    "hints": "off",
    "money": {"tokens": None, "gpus": None},
    "gain": {"round": 1, "n": 400, "gain": 0.275, "low": 0.221, "high": 0.329, "won": 130, "lost": 20},
}


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line)


def test_a_table_has_a_line_for_the_base_and_each_round_under_one_head() -> None:
    lines = report.table(REPORT, "runs/mini").splitlines()
    assert lines[0] == "runs/mini" and lines[1] == ""
    head, base, *rounds = lines[2:7]
    assert cells(head) == ["round", "validation", "test: mini", "unparsed", "lessons", "teacher tokens", "seconds"]
    assert cells(base) == ["base", "0.2% [0.0%, 1.4%] of 400", "50.0%"]
    assert cells(rounds[0]) == [
        "0",
        "40.0% [30.0%, 50.0%] of 100",
        "35.0% [30.0%, 40.0%] of 400",
        "2.0%",
        "900 of 1000",
        "1,250,000 in (80% cached), 45,000 out",
        "rationales 20 student 41",
    ]
    assert [cells(line)[0] for line in rounds] == ["0", "1 *", "2"]
    for column in ("validation", "test: mini", "unparsed", "lessons", "teacher tokens", "seconds"):
        start = head.index(column)
        assert all(line[start - 2 : start] == "  " and line[start] != " " for line in rounds)


def test_the_notes_say_which_round_is_best_and_what_it_gained() -> None:
    lines = report.table(REPORT, "runs/mini").splitlines()
    assert lines[7:] == [
        "",
        "* best round on validation (95 % intervals; feedback: real; seed 3)",
        "gain of round 1 over round 0 on mini: +27.5 points [+22.1, +32.9] (the same 400 questions: 130 won, 20 lost)",
    ]


def test_a_run_with_hints_says_how_many_lessons_they_brought() -> None:
    text = report.table({**REPORT, "hints": "cascade"}, "t")
    assert "hints: cascade; the teacher wrote 60 of 2703 lessons after it was shown the gold" in text
    assert "hints" not in report.table(REPORT, "t")


def test_what_weakens_a_result_is_said_below_its_table() -> None:
    text = report.table({**REPORT, "shared_validation": True, "keep_wrong": True}, "t")
    assert "validation is shared: the questions that chose the round were in the teacher's prompts" in text
    assert "keep_wrong: students were also trained on rationales with wrong or missing answers" in text


def test_what_came_from_the_cache_is_said() -> None:
    reused = copy.deepcopy(REPORT)
    for entry in reused["rounds"][:2]:
        entry["reused"] = {"generations": 700, "prompt": 5, "cached": 4, "completion": 3}
    note = "teacher.cache: 1,400 rationales were made in other runs; their tokens are in no figure here"
    assert note in report.table(reused, "t") and "teacher.cache" not in report.table(REPORT, "t")


def test_a_rationale_costs_nothing_that_can_be_told_where_some_came_from_the_cache() -> None:
    explained = {"good": 50, "tokens": {"prompt": 1000, "cached": 500, "completion": 200}}
    each = {"prompt_tokens": 20.0, "cached_tokens": 10.0, "completion_tokens": 4.0, "gpu_seconds": 0.5}
    assert report._per_accepted(explained, 25.0) == each
    assert report._per_accepted({**explained, "reused": {"generations": 0}}, 25.0) == each
    for nothing in ({"reused": {"generations": 1}}, {"good": 0}):
        assert report._per_accepted({**explained, **nothing}, 25.0) == dict.fromkeys(each)


def test_what_was_spent_is_said_where_there_are_prices() -> None:
    text = report.table({**REPORT, "money": {"tokens": 1234.567, "gpus": None}}, "t")
    assert "spent, by the recipe's prices: 1,234.57 on tokens" in text and "on gpus" not in text
    assert "spent" not in report.table(REPORT, "t")


def test_money_by_hand() -> None:
    tokens = {"prompt": 3_000_000, "cached": 2_000_000, "completion": 500_000}
    # 1 fresh and 2 cached million at 2 and 0.5, half a million at 10; 7,200 GPU-seconds at 3 an hour.
    spent = report.money(Prices(prompt=2.0, cached=0.5, completion=10.0, gpu=3.0), tokens, 7200)
    assert spent == {"tokens": 2 + 1 + 5, "gpus": 6.0}
    assert report.money(Prices(prompt=2.0, completion=10.0), tokens, 7200) == {"tokens": 6 + 5, "gpus": None}
    assert report.money(Prices(), tokens, 7200) == {"tokens": None, "gpus": None}


def test_a_run_without_tests_has_a_table_of_its_validation() -> None:
    plain = copy.deepcopy(REPORT)
    plain["primary_test"] = None
    del plain["base_tests"], plain["gain"]
    for entry in plain["rounds"]:
        entry["tests"] = {}
    lines = report.table(plain, "t").splitlines()
    assert cells(lines[2])[:5] == ["round", "validation", "test", "unparsed", "lessons"]
    assert cells(lines[3])[:5] == ["0", "40.0% [30.0%, 50.0%] of 100", "-", "-", "900 of 1000"]
    assert "gain" not in "\n".join(lines)


@pytest.mark.parametrize("accuracies, round", [([0.5], 0), ([0.5, 0.3, 0.4], 2), ([0.1, 0.6, 0.6], 1)])
def test_what_is_held_against_round_0_is_never_round_0_itself(accuracies: list[float], round: int) -> None:
    assert report._fed_back(accuracies) == round


def test_round_0_alone_has_no_gain_to_tell() -> None:
    lone = {**REPORT, "rounds": REPORT["rounds"][:1], "best_round": 0}
    assert "gain of" not in report.table(lone, "t")


def test_an_accuracy_of_nothing_is_a_dash_and_no_prompt_tokens_are_no_division() -> None:
    empty = copy.deepcopy(REPORT)
    empty["rounds"] = empty["rounds"][:1]
    empty["rounds"][0]["validation"] = score(None, n=0)
    empty["rounds"][0]["teacher_tokens"] = {"prompt": 0, "cached": 0, "completion": 0}
    line = report.table(empty, "t").splitlines()[4]
    assert cells(line)[1] == "-" and "0 in (0% cached), 0 out" in line


def test_a_round_in_one_line() -> None:
    assert report.round_line(record(1, 0.65, 0.6)) == (
        "round 1 done: validation 65.0% [55.0%, 75.0%] of 100, 901 lessons from 1000 rationales, 66 s"
    )


def test_a_report_that_is_not_there_is_asked_for(tmp_path: Any) -> None:
    with pytest.raises(UserError) as caught:
        report.read(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: has no report.json; is it a run directory, and has the run finished?"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"7"])
def test_a_corrupt_report_is_named(tmp_path: Any, content: bytes) -> None:
    place = Place(str(tmp_path)) / "report.json"
    place.write_bytes(content)
    with pytest.raises(UserError) as caught:
        report.read(str(tmp_path))
    assert str(caught.value).startswith(f"{place.uri}: ") and "\n" not in str(caught.value)


def test_a_report_comes_back_as_it_was_written(tmp_path: Any) -> None:
    (Place(str(tmp_path)) / "report.json").write_json(REPORT)
    assert report.read(str(tmp_path)) == REPORT
