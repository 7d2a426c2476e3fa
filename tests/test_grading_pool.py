"""The grading pool: what hangs, dies, grows or breaks out costs itself alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hostile
import psutil
import pytest

from undo_ray.grading.pool import Pool
from undo_ray.types import TIMEOUT, UserError, Verdict

HANG = "hostile:hang"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, deadline=2.0, memory=1.0) as pool:
        yield pool


def jobs(texts: list[str], kind: str, answer: str = "18") -> list[Any]:
    return [(text, {"id": f"t/{index}", "answer": answer}, kind) for index, text in enumerate(texts)]


def graders() -> set[int]:
    """Process ids of this machine's grading processes that this process, or one it started, owns."""
    return {process.pid for process in psutil.Process().children(recursive=True) if is_grader(process)}


def is_grader(process: psutil.Process) -> bool:
    try:
        return "undo_ray.grading.worker" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def test_verdicts_come_in_the_order_of_their_answers(pool: Pool) -> None:
    found = pool.grade(jobs([f"#### {number}" for number in range(200)], "number"))
    assert [verdict.answer for verdict in found] == [str(number) for number in range(200)]
    assert [index for index, verdict in enumerate(found) if verdict.correct] == [18]


def test_nothing_to_grade_is_nothing(pool: Pool) -> None:
    assert pool.grade([]) == []


def test_hanging_and_dying_answers_are_time_outs_and_the_others_keep_their_verdicts(pool: Pool) -> None:
    texts = [str(number) for number in range(60)]
    for position, text in ((3, "hang"), (11, "sleep"), (12, "die"), (30, "exit"), (31, "hang"), (59, "hang")):
        texts[position] = text
    found = pool.grade(jobs(texts, HANG))
    bad = {"hang", "sleep", "die", "exit"}
    expected = [Verdict(False, None, TIMEOUT) if text in bad else Verdict(True, text) for text in texts]
    assert found == expected


def test_a_slow_answer_within_its_deadline_is_graded_and_holds_up_nobody(pool: Pool) -> None:
    texts = ["slow", *map(str, range(40)), "slow"]
    assert pool.grade(jobs(texts, HANG)) == [Verdict(True, text) for text in texts]


def test_more_hangs_than_may_be_set_aside_still_end() -> None:
    """They wait for one another, and the answer behind them is graded."""
    with Pool(1, deadline=0.3) as small:
        found = small.grade(jobs(["hang"] * 12 + ["1"], HANG))
    assert [verdict.reason for verdict in found] == [TIMEOUT] * 12 + [None]


def test_it_works_from_threads_side_by_side(pool: Pool) -> None:
    found: dict[int, list[Verdict]] = {}

    def ask(number: int) -> None:
        found[number] = pool.grade(jobs([f"#### {number}"] * 20, "number"))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {number: {verdict.answer for verdict in verdicts} for number, verdicts in found.items()} == {
        number: {str(number)} for number in range(4)
    }


def test_it_works_inside_ray_tasks(cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0.5, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
    def task(number: int) -> list[Any]:
        from undo_ray.grading.pool import shared

        return [verdict.reason or verdict.answer for verdict in shared(1.0, 1.0).grade(jobs([str(number), "hang"], HANG))]

    assert ray.get([task.remote(number) for number in range(3)]) == [[str(number), TIMEOUT] for number in range(3)]


def test_a_gold_that_cannot_be_graded_and_an_unknown_kind_say_so(pool: Pool) -> None:
    with pytest.raises(UserError, match=r"t/1: answer 'many' is not a number"):
        pool.grade([*jobs(["#### 1"], "number"), ("#### 1", {"id": "t/1", "answer": "many"}, "number")])
    with pytest.raises(UserError, match="answer kind 'essay' is unknown"):
        pool.grade(jobs(["x"], "essay"))
    with pytest.raises(UserError, match="no_such_module"):
        pool.grade(jobs(["x"], "no_such_module:grade"))
    assert pool.grade(jobs(["#### 18"], "number"))[0].correct, "and the pool goes on"


# -- confined -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", ["write", "append", "mkdir", "link", "run", "shell", "fork", "socket", "kill", "memory"])
def test_a_worker_cannot_get_out(pool: Pool, attempt: str, tmp_path: Path) -> None:
    target = tmp_path / "canary"
    before = graders()
    [verdict] = pool.grade(jobs([attempt], "hostile:escape", str(target)))
    assert not verdict.correct
    assert verdict.reason == TIMEOUT or (verdict.answer or "").startswith("stopped")
    assert list(tmp_path.iterdir()) == []
    assert len(graders()) <= len(before) + 2


@pytest.mark.parametrize("attempt", ["remove", "rename"])
def test_a_worker_cannot_touch_what_is_there(pool: Pool, attempt: str, tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.write_text("before")
    [verdict] = pool.grade(jobs([attempt], "hostile:escape", str(target)))
    assert verdict.answer == "stopped: PermissionError"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_worker_reaches_no_network_not_even_this_machine(pool: Pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        [verdict] = pool.grade(jobs(["connect"], "hostile:escape", str(server.getsockname()[1])))
    assert verdict.answer == "stopped: PermissionError"


def test_the_attempts_succeed_outside_the_pool(tmp_path: Path) -> None:
    """The canaries are alive: what is stopped above does happen where nothing stops it."""
    for attempt in ("write", "run", "shell", "socket"):
        target = tmp_path / attempt
        assert hostile.escape(attempt, {"answer": str(target)}).correct
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "shell", "write"]


def test_no_secret_of_the_environment_reaches_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123456789")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws_canary_0123456789")
    with Pool(1) as own:
        found = own.grade(jobs(["hf_canary_0123456789", "aws_canary_0123456789"], "hostile:environment"))
    assert [verdict.correct for verdict in found] == [False, False]


# -- its processes ------------------------------------------------------------------------------------------------------


def test_close_ends_every_process() -> None:
    before = graders()
    with Pool(2) as own:
        own.grade(jobs(["1", "2", "3", "4"], HANG))
        assert graders() - before
    assert wait_for(lambda: not graders() - before)


@pytest.mark.parametrize("text", ["1", "hang"])
def test_no_process_outlives_an_owner_that_is_killed(text: str) -> None:
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1])\n"
        "from undo_ray.grading.pool import Pool\n"
        f"pool = Pool(2, deadline=600)\npool.grade([('1', {{'answer': '1'}}, {HANG!r})])\n"
        f"threading.Thread(target=pool.grade, args=([({text!r}, {{'answer': '1'}}, {HANG!r})],), daemon=True).start()\n"
        "print('ready', flush=True); import time; time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    time.sleep(0.5)
    processes = psutil.Process(owner.pid).children(recursive=True)
    assert len(processes) >= 2
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert wait_for(lambda: not any(alive(process) for process in processes))


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Any, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_source_that_was_killed_is_started_again() -> None:
    with Pool(1) as own:
        own.grade(jobs(["1"], HANG))
        for pid in graders():
            with suppress(ProcessLookupError):  # a worker dies with the source it was forked from
                os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: own._source._process is not None and own._source._process.poll() is not None)
        assert own.grade(jobs(["1", "2"], HANG)) == [Verdict(True, "1"), Verdict(True, "2")]
