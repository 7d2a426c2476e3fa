"""What a recipe can do to ask a teacher less, each through a whole small run on the miniature world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs

SMALL = (*runs.SMALL, "student.tokens=6000", "teacher.engine.batch_size=16", "lessons.mode=latest")


def by_id(run_dir: Path, stage: str, split: str = "train") -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in runs.rows(run_dir, stage) if row["split"] == split}


def check_asked_again(run_dir: Path, asked: set[str], select: str = "first") -> None:
    """Round 1 asked about these training questions alone, and the others keep the lesson of round 0."""
    attempts, explained, first = (
        by_id(run_dir, f"round-{stage}") for stage in ("01/attempts", "01/rationales", "00/rationales")
    )
    assert explained.keys() == attempts.keys() == first.keys()
    assert {id for id, row in explained.items() if row["candidates"]} == asked
    for id, row in explained.items():
        accepted = [candidate["rationale"] for candidate in row["candidates"] if candidate["refused"] is None]
        assert all(candidate["round"] == 1 for candidate in row["candidates"])
        chosen = min(accepted, key=len) if select == "shortest" and accepted else next(iter(accepted), None)
        kept = first[id]["lesson"] or dict.fromkeys(("round", "rationale"))
        lesson = row["lesson"] or kept
        expected = (1, chosen) if accepted else (kept["round"], kept["rationale"])
        assert (lesson["round"], lesson["rationale"]) == expected
        assert row["history"][-1]["round"] == (1 if id in asked else 0)
    texts = {row["id"]: row["messages"][-1]["content"] for row in runs.rows(run_dir, "round-01/lessons")}
    assert texts == {id: row["lesson"]["rationale"] for id, row in explained.items() if row["lesson"]}
    zero, one = runs.report(run_dir)["rounds"]
    assert (zero["asked"], one["asked"]) == (72, len(asked))
    candidates = [candidate for row in explained.values() for candidate in row["candidates"]]
    assert one["rationales"] == len(candidates)
    assert one["teacher_tokens"]["completion"] == sum(candidate["completion_tokens"] for candidate in candidates)


WILD = "teacher.sampling={temperature = 2.0, max_tokens = 96}"
"""A third of the teacher's rationales come out wrong."""


ASKING = ("teacher.regenerate=failed", "teacher.samples=2", WILD, "teacher.hints=cascade", "teacher.cache=true")


@pytest.fixture(scope="module")
def failed(joined: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that asks again about failed questions alone: up to twice plainly, then with the answer, then with the solution."""
    run_dir = tmp_path_factory.mktemp("failed") / "run"
    # As many tokens as it takes for some attempts to be right: the skill `tens` is learnt first.
    assert "hints: cascade; the teacher wrote" in runs.run("mini", run_dir, *SMALL, "student.tokens=24000", *ASKING)
    return run_dir


def test_only_failed_questions_are_explained_again_and_the_others_keep_their_lesson(failed: Path) -> None:
    attempts = by_id(failed, "round-01/attempts")
    wrong = {id for id, row in attempts.items() if not row["attempt"]["verdict"]["correct"]}
    assert 0 < len(wrong) < 60
    check_asked_again(failed, wrong)


@pytest.mark.parametrize("k", [0, 1])
def test_what_is_asked_next_depends_on_all_before_it_being_refused(failed: Path, k: int) -> None:
    explained = [row for row in runs.rows(failed, f"round-0{k}/rationales") if row["candidates"]]
    lengths = set()
    for row in explained:
        candidates = row["candidates"]
        hints = [None, None, "answer", "solution"] if row["split"] == "train" else [None, None]
        assert [candidate["hint"] for candidate in candidates] == hints[: len(candidates)]
        *before, last = [candidate["refused"] for candidate in candidates]
        assert all(before) and (last is None or len(candidates) == len(hints))
        # The same shared examples, the same history: what was refused adds nothing to the next prompt.
        assert len({candidate["prompt_tokens"] for candidate in candidates if candidate["hint"] is None}) == 1
        lengths.add(len(candidates))
    assert {1, 2} <= lengths
    assert k or lengths >= {1, 2, 3}
    assert not list(failed.glob("round-*/rationales/try-*/waves")), "what the waves left to one another is gone"


def test_hinted_lessons_are_marked_and_counted(failed: Path) -> None:
    for record in runs.report(failed)["rounds"]:
        k = record["round"]
        rows = by_id(failed, f"round-0{k}/rationales")
        hinted = [candidate for row in rows.values() for candidate in row["candidates"] if candidate["hint"]]
        for hint in ("answer", "solution"):
            of = [candidate["refused"] for candidate in hinted if candidate["hint"] == hint]
            assert record["hinted"][hint] == {"asked": len(of), "accepted": of.count(None)}
        marks = {row["id"]: row["hint"] for row in runs.rows(failed, f"round-0{k}/lessons")}
        assert marks == {id: row["lesson"]["hint"] for id, row in rows.items() if row["lesson"]}
        assert record["hinted_lessons"] == sum(mark is not None for mark in marks.values())
    assert runs.report(failed)["rounds"][0]["hinted"]["answer"]["accepted"] > 0, "a hint helps even this teacher"
    assert runs.report(failed)["hints"] == "cascade"
    assert all(row["solution"] for row in by_id(failed, "problems").values())


@pytest.mark.slow
def test_a_run_with_another_student_takes_what_the_teacher_wrote_for_the_first(failed: Path) -> None:
    again = failed.parent / "again"
    runs.run("mini", again, *SMALL, "student.tokens=2000", *ASKING, "rounds=0")
    stage = json.loads((again / "round-00/rationales/manifest.json").read_text())["figures"]
    [record], first = runs.report(again)["rounds"], runs.report(failed)["rounds"][0]
    assert stage["reused"] == {"generations": first["rationales"], **first["teacher_tokens"]}
    assert record["teacher_tokens"] == dict.fromkeys(("prompt", "cached", "completion"), 0)
    assert record["reused"] == stage["reused"]
    texts = [
        {row["id"]: [candidate["text"] for candidate in row["candidates"]] for row in runs.rows(run, "round-00/rationales")}
        for run in (failed, again)
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_only_questions_with_a_low_pass_rate_are_explained_again(tmp_path: Path) -> None:
    sampled = (
        "teacher.samples=2",
        WILD,
        "lessons.select=shortest",
        "student.samples=3",
        "student.sampling={temperature = 1.0, max_tokens = 48}",
        "student.tokens=24000",
    )
    runs.run("mini", tmp_path / "run", *SMALL, "teacher.regenerate=unstable", "teacher.unstable_below=0.5", *sampled)
    attempts = by_id(tmp_path / "run", "round-01/attempts")
    right = {
        id: [attempt["verdict"]["correct"] for attempt in (row["attempt"], *row["resampled"])] for id, row in attempts.items()
    }
    assert {len(found) for found in right.values()} == {3}
    unstable = {id for id, found in right.items() if sum(found) < 1.5}
    assert {id for id, found in right.items() if not found[0]} != unstable, "one attempt does not tell"
    check_asked_again(tmp_path / "run", unstable, select="shortest")
    explained = by_id(tmp_path / "run", "round-01/rationales")
    assert all(len(explained[id]["candidates"]) == 2 for id in unstable), "all samples are there to be compared"
    assert all(row["solution"] is None for row in explained.values()), "no hints, no solutions"
    for id in unstable:
        assert attempts[id]["history"][-1]["attempt_verdict"]["correct"] is False
    train = runs.report(tmp_path / "run")["rounds"][0]["train"]
    assert (train["n"], train["accuracy"]) == (60, pytest.approx(sum(found[0] for found in right.values()) / 60))
    measured = runs.rows(tmp_path / "run", "round-01/measure")
    assert all(row["attempt"] and not row["resampled"] for row in measured)
