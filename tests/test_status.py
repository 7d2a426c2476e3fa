"""`undo-ray status`: what the run directory alone tells, while a driver holds it, after it stopped and after it was killed."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from undo_ray import report, status
from undo_ray.config import Recipe
from undo_ray.place import Place
from undo_ray.progress import LINE_SECONDS, Board, Progress, line
from undo_ray.store import Stage, open_run
from undo_ray.types import UserError

RECIPE = Recipe.model_validate(
    {
        "rounds": 3,
        "data": {"train": "gsm8k"},
        "teacher": {"model": "big/teacher"},
        "student": {"model": "small/student", "tokens": 1000},
    }
)
SECONDS = {"rationales": 40.0, "lessons": 2.0, "student": 100.0, "measure": 30.0}
SCORE = {"n": 100, "accuracy": 0.5, "low": 0.4, "high": 0.6, "unparsed": 0.0, "truncated": 0.0}


def opened(run: Path | str) -> Any:
    return open_run(str(run), RECIPE, {}, Progress(open(os.devnull, "w")))


def look(out: Stage) -> None:
    """A stage that looks at its own run from outside."""
    out.value = status.read(out.ledger.place.uri)


def done(run: Place, k: int) -> None:
    record = {"round": k, "fingerprint": "x", "validation": SCORE, "lessons": 90, "rationales": 120, "seconds": SECONDS}
    (run / f"round-{k:02d}/record.json").write_json(record)


def test_a_run_is_seen_while_it_works_and_after_it_stopped(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        seen = run.round(0).once("rationales", look)
        done(run.place, 0)
    assert seen["state"] == "running" and seen["driver"]["pid"] == os.getpid() and seen["driver"]["seconds_ago"] < 60
    assert seen["current"]["title"] == "round 0 · rationales" and seen["current"]["to_come"] == [
        "lessons",
        "student",
        "measure",
    ]
    after = status.read(str(tmp_path / "run"))
    assert after["state"] == "stopped" and after["driver"] is None
    assert after["done"] == [{"round": 0, "validation": SCORE, "lessons": 90, "rationales": 120, "seconds": SECONDS}]
    assert "round 0 done: validation 50.0% [40.0%, 60.0%] of 100, 90 lessons from 120 rationales, 172 s" in status.text(after)


def test_a_killed_run_says_how_to_go_on(tmp_path: Path) -> None:
    if not (pid := os.fork()):
        with opened(tmp_path / "run") as run:
            run.round(0).once("rationales", lambda out: os._exit(0))
    os.waitpid(pid, 0)
    found = status.read(str(tmp_path / "run"))
    assert found["state"] == "killed" and found["driver"]["pid"] == pid
    assert f"killed: pid {pid}" in status.text(found) and "the same command goes on" in status.text(found)


@pytest.mark.parametrize("stopped", ["converged", "no_lessons"])
def test_what_has_come_to_its_end_says_so_and_why(tmp_path: Path, stopped: str) -> None:
    with opened(tmp_path / "run") as run:
        run.round(0).once("rationales", look)
        (run.place / "report.json").write_json(
            {"goal": report._goal(RECIPE), "stopped": stopped, "rounds": [], "primary_test": None}
        )
    found = status.read(str(tmp_path / "run"))
    assert (found["state"], found["ended"], found["current"]) == ("finished", stopped, None)
    assert ("no rationale was accepted" in status.text(found)) == (stopped == "no_lessons")
    more = RECIPE.model_copy(update={"rounds": 9})
    with open_run(str(tmp_path / "run"), more, {}, Progress(open(os.devnull, "w"))):
        pass
    assert status.read(str(tmp_path / "run"))["state"] == "stopped", "there is more to do"


def test_a_model_that_was_evaluated_is_finished(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        (run.place / "evaluation.json").write_json({"model": "small/student", "tests": {}})
    found = status.read(str(tmp_path / "run"))
    assert (found["state"], found["ended"]) == ("finished", "evaluated") and "evaluation.json" in status.text(found)


def test_the_last_errors_outlive_their_drivers(tmp_path: Path) -> None:
    def fail(error: Exception, out: Stage) -> None:
        raise error

    for error in [*(OSError(f"the disk\nis full, {number}") for number in range(7)), UserError("a line")]:
        with pytest.raises(type(error)), opened(tmp_path / "run") as run:
            run.round(0).once("measure", fail, error)
    errors = status.read(str(tmp_path / "run"))["errors"]
    assert [error["error"] for error in errors] == [
        *(f"OSError: the disk is full, {number}" for number in (3, 4, 5, 6)),
        "a line",
    ]
    assert {error["stage"] for error in errors} == {"round 0 · measure"}


def test_what_engines_died_of_is_told_while_their_stage_goes_on(tmp_path: Path) -> None:
    def die(out: Stage) -> None:
        (out.resume / "generations/model/flight/a/1-x.json").write_json(
            {"keys": [], "life": "x", "error": "RuntimeError: out of memory"}
        )
        look(out)

    with opened(tmp_path / "run") as run:
        for step, title in ((run.round(0), "round 0 · rationales"), (run.tests(RECIPE), "tests · rationales")):
            [error] = step.once("rationales", die)["errors"]
            assert error["stage"] == title and error["error"] == "engine: RuntimeError: out of memory"


def test_times_to_come_are_those_of_the_round_before(tmp_path: Path) -> None:
    run = Place(str(tmp_path))
    done(run, 0)
    (run / "recipe.json").write_json({"recipe": RECIPE.model_dump(mode="json"), "identity": {}, "starts": []})
    figures = {"done": 300.0, "total": 400.0, "tokens": 6000.0, "asked": 300.0, "accepted": 240.0, "errors": 2.0}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    stage = {"round": 1, "stage": "rationales", "title": "round 1 · rationales", "folder": "round-01/rationales"}
    state = {**stage, "figures": figures, "seconds": 60.0, "first": [0.0, 0.0], "at": at}
    (run / "progress.json").write_json({**state, "errors": []})
    current = status.read(str(tmp_path))["current"]
    assert current["left"] == pytest.approx(20.0)  # 100 rows at 5 a second
    assert current["to_come"] == ["lessons", "student", "measure"]
    assert current["left_of_round"] == pytest.approx(20.0 + 2.0 + 100.0 + 30.0)
    assert line(figures, 60.0) == "300/400, 5.0 rows/s, 100 tokens/s, 80% accepted, 2 failed, 20 s to go"


def test_time_to_go_counts_what_this_start_has_done(tmp_path: Path) -> None:
    """Training that goes on at step 900 of 1,000, a second a step after a minute's start: 80 s are left at step 920."""
    figures = {"done": 920.0, "total": 1000.0}
    assert line(figures, 80.0, (900.0, 60.0)) == "920/1000, 1.0 rows/s, 80 s to go"
    assert line({"done": 900.0, "total": 1000.0}, 60.0, (900.0, 60.0)) == "900/1000, 60 s"
    assert line({}, 30.0) == "starting, 30 s"


def test_a_stage_s_pace_counts_from_when_it_is_first_seen_at_work(tmp_path: Path) -> None:
    class At(Progress):
        """Reads what a board would give."""

        def _read(self) -> dict[str, float]:
            return {"done": 900.0, "total": 1000.0}

    progress = At(io.StringIO())
    progress.keep(Place(str(tmp_path)) / "progress.json")
    with progress.stage("student", 0, "round 0 · student", "round-00/student"):
        time.sleep(LINE_SECONDS + 1)
    done, seconds = json.loads((tmp_path / "progress.json").read_bytes())["first"]
    assert done == 900.0 and LINE_SECONDS <= seconds < LINE_SECONDS + 1


def test_a_run_on_an_object_store_is_read_there(s3: str) -> None:
    uri = f"s3://runs/status?endpoint_override={s3}&scheme=http&region=us-east-1"
    with opened(uri) as run:
        assert run.round(0).once("rationales", look)["state"] == "running"


@pytest.mark.parametrize("content", [None, b"{", b'{"identity": 1}'])
def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.json") as caught:
        status.read(str(tmp_path))
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_damaged_progress_is_named_and_a_driver_writes_it_anew(tmp_path: Path) -> None:
    with opened(tmp_path / "run"):
        pass
    (tmp_path / "run/progress.json").write_text("{")
    with pytest.raises(UserError, match=r"progress\.json: not valid JSON; .*remove it"):
        status.read(str(tmp_path / "run"))
    with opened(tmp_path / "run") as run:
        run.round(0).once("rationales", look)
    assert json.loads((tmp_path / "run/progress.json").read_text())["stage"] == "rationales"


def test_the_gauges_take_names_that_are_not_ascii(cluster: None) -> None:
    """Ray's metrics refuse such labels, and a stage of tests is named with a middle dot."""
    import ray

    board = ray.remote(Board).options(num_cpus=0).remote("runs/größe")
    ray.get([board.begin.remote(None, "tests · base"), board.set.remote(total=3), board.add.remote(done=1)])
    assert ray.get(board.read.remote()) == {"total": 3, "done": 1}
