"""Grading in processes that can be killed: an answer that hangs costs its own deadline, never the stage.

Mathematical equivalence is undecidable and its checkers hang (huggingface/Math-Verify#65), their own time-outs need signals and
so the main thread (Math-Verify#50), and what they do with hostile text is nobody's promise. So answers are judged in workers
(worker.py) without network, secrets or the right to write. The pool works from any thread, inside Ray tasks too, and keeps the
order of what it is given. A worker that is slow on one answer is stopped, another takes its place, and when the rest is done
all that were set aside go on together: a hang holds up nothing, and an honest slow answer has the machine for itself. At its
deadline a worker is killed, as is one that outgrows its memory, and its answer is a `timeout`.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Final

import psutil

from undo_ray.grading import grader
from undo_ray.types import TIMEOUT, UserError, Verdict

Job = tuple[str, Mapping[str, Any], str]
"""(what the model wrote, the problem, its answer kind)."""

DEADLINE: Final = 5.0
"""Seconds for one answer; the slowest of 2,100 recorded answers to MATH takes half a second. A worker that computes and got
less than a fifth of them as CPU time goes on, up to `BUSY` deadlines: a busy neighbour must not make answers wrong."""
BUSY: Final = 4
MEMORY: Final = 1.0
"""GiB of address space for one worker; it starts with 0.4."""
PATIENCE: Final = 0.2
"""CPU seconds on one answer after which its worker is set aside for another; few answers need as much."""
LOOK: Final = 0.05
"""Seconds between two looks at the workers' clocks."""
SET_ASIDE: Final = 8
"""Workers set aside per regular one, at most, before they go on."""
BATCH: Final = 32
"""Answers sent to a worker at a time, at most."""
FIELDS: Final = ("id", "answer", "choices", "n_choices", "answer_type")
"""What graders see of a problem."""


class Pool:
    """Workers for grading, started when first needed and kept until `close`.

    `workers`: how many judge at a time (default: the CPUs this process may use). `deadline` in seconds and `memory` in GiB are
    for one answer.
    """

    def __init__(self, workers: int | None = None, deadline: float = DEADLINE, memory: float = MEMORY):
        self.workers = workers or len(os.sched_getaffinity(0))
        self.deadline, self.memory = deadline, memory
        self._source = _Source()
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the pool."""
        with self._lock:
            while self._idle:
                self._idle.pop().kill()
            self._source.close()

    def grade(self, jobs: Sequence[Job]) -> list[Verdict]:
        """One verdict per job, in order.

        Raises UserError for a gold answer that cannot be graded, an unknown kind, a missing package, and where the kernel does
        not let workers be confined.
        """
        with self._lock:
            for kind in sorted({kind for _, _, kind in jobs}):
                grader(kind)  # an unknown one raises here
                if self._source.warm(kind):
                    while self._idle:  # forked before the kind was there
                        self._idle.pop().kill()
            return self._grade(jobs)

    def _grade(self, jobs: Sequence[Job]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(jobs)))
        busy: list[_Worker] = []
        with selectors.DefaultSelector() as selector:
            try:
                while len(verdicts) < len(jobs):
                    at_work, aside = [w for w in busy if not w.aside], [w for w in busy if w.aside]
                    full = len(aside) >= SET_ASIDE * self.workers
                    if len(at_work) < self.workers and (full or not waiting):
                        for worker in aside:
                            worker.go_on()
                    for _ in range(0 if full else self.workers - len(at_work)):
                        if not waiting:
                            break
                        worker = self._idle.pop() if self._idle else self._source.fork(self.memory)
                        size = max(1, min(BATCH, len(waiting) // (2 * self.workers)))
                        worker.send({index: jobs[index] for index in (waiting.popleft() for _ in range(size))})
                        selector.register(worker.channel, selectors.EVENT_READ, worker)
                        busy.append(worker)
                    for key, _ in selector.select(LOOK):
                        verdicts |= key.data.receive()
                    for worker in busy.copy():
                        verdicts |= worker.judge(self.deadline)
                        waiting.extendleft(worker.given_back())
                        if not worker.jobs:
                            busy.remove(worker)
                            selector.unregister(worker.channel)
                            if worker.fit:
                                self._idle.append(worker)
                            else:
                                worker.kill()
            finally:
                for worker in busy:
                    worker.kill()
        return [verdicts[index] for index in range(len(jobs))]


@cache
def shared(deadline: float, memory: float) -> Pool:
    """This process's pool of one worker, for tasks that Ray already runs side by side; its start is paid once a process."""
    return Pool(1, deadline, memory)


class _Worker:
    """A forked worker at its batch. `jobs` are the indices it has not answered, the first being the one it is at."""

    def __init__(self, pid: int, channel: socket.socket):
        self.channel = channel
        self.process = os.pidfd_open(pid)  # a number could be somebody else's by the time of the kill
        self._pid = pid
        self._clock = (~pid << 3) | 2  # the clock of another process's CPU time (linux/posix-timers.h)
        self.jobs: deque[int] = deque()
        self.slow = self.aside = self.dead = False
        self._since = self._running = self._spent = 0.0
        self._rest = b""

    @property
    def fit(self) -> bool:
        """Whether it can take another batch; one that was set aside goes on with jobs that others have by now."""
        return not (self.slow or self.dead)

    def send(self, batch: Mapping[int, Job]) -> None:
        self.jobs.extend(batch)
        self._begin()
        lines = [(text, {name: problem.get(name) for name in FIELDS}, kind) for text, problem, kind in batch.values()]
        try:
            self.channel.sendall(json.dumps(lines).encode() + b"\n")
        except OSError:
            self.dead = True

    def receive(self) -> dict[int, Verdict]:
        """The verdicts that have come in, by index."""
        try:
            data = self.channel.recv(1 << 20)
        except OSError:
            data = b""
        self.dead = not data
        self._begin()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return {self.jobs.popleft(): _verdict(line) for line in lines[: len(self.jobs)]}

    def _begin(self) -> None:
        self._since = self._running = time.monotonic()
        self._spent = self._cpu()

    def _cpu(self) -> float:
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            self.dead = True
            return 0.0

    def judge(self, deadline: float) -> dict[int, Verdict]:
        """The verdict `timeout` on a job that is past its deadline or has cost the worker its life."""
        now, spent = time.monotonic(), self._cpu() - self._spent
        if not self.dead and (self.aside or select.select([self.channel], [], [], 0)[0]):
            return {}  # stopped, or it has answered since and the time went into another job
        over = now - self._since >= deadline and (spent >= deadline / 5 or self._asleep())
        if self.jobs and (self.dead or over or now - self._running >= BUSY * deadline):
            self.dead = True
            return {self.jobs.popleft(): Verdict(False, None, TIMEOUT)}
        if self.jobs and not self.slow and spent >= PATIENCE:
            self.slow = self.aside = True
            self._signal(signal.SIGSTOP)
        return {}

    def go_on(self) -> None:
        """Take up the job it was set aside for."""
        self.aside, self._running = False, time.monotonic()
        self._signal(signal.SIGCONT)

    def _asleep(self) -> bool:
        try:
            return psutil.Process(self._pid).status() == psutil.STATUS_SLEEPING
        except psutil.NoSuchProcess:
            return True

    def given_back(self) -> list[int]:
        """The jobs that others must do, last first: all of a dead worker's, and those behind one that takes long."""
        kept = 0 if self.dead else 1 if self.slow else len(self.jobs)
        return [self.jobs.pop() for _ in range(len(self.jobs) - kept)]

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it is dead already
            signal.pidfd_send_signal(self.process, number)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        os.close(self.process)
        self.channel.close()


def _verdict(line: bytes) -> Verdict:
    found = json.loads(line)
    if isinstance(found, str):
        raise UserError(found)
    return Verdict(*found)


class _Source:
    """The process that workers are forked from: every grader imported, no answer ever seen."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._kinds: set[str] = set()

    def close(self) -> None:
        if self._process and self._control:
            self._control.close()
            self._process.kill()
            self._process.wait()
        self._process = self._control = None
        self._kinds.clear()

    def warm(self, kind: str) -> bool:
        """Make a kind of answer ready; whether that was new."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        if kind in self._kinds:
            return False
        self._order(kind)
        self._kinds.add(kind)
        return True

    def fork(self, memory: float) -> _Worker:
        own, others = socket.socketpair()
        with others:
            worker = _Worker(self._order(str(int(memory * 2**30)), others), own)
        hello = own.recv(4096)
        if hello != b"+":
            worker.kill()
            raise UserError(f"grading workers cannot be confined: {hello.decode() or 'they die at once'}", exit_code=1)
        return worker

    def _start(self) -> None:
        own, others = socket.socketpair()
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
        # Nothing else of the environment: it may hold tokens and keys.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with others:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "undo_ray.grading.worker", str(others.fileno())],
                pass_fds=[others.fileno()],
                env={**kept, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the driver's
            )
        self._control = own

    def _order(self, order: str, channel: socket.socket | None = None) -> int:
        assert self._control is not None
        try:
            socket.send_fds(self._control, [order.encode()], [channel.fileno()] if channel else [])
            return int(struct.unpack("!i", self._control.recv(4))[0])
        except (OSError, struct.error):
            raise UserError("the process that starts grading workers has ended; see its message above", exit_code=1) from None
