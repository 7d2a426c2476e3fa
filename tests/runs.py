"""Runs of the command line as a user starts it: in a process of its own, on a local Ray."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent

SMALL = (
    "data.train_limit=60",
    "data.show=12",
    "data.select=8",
    "data.tests=[]",
    "rounds=1",
    "student.tokens=4000",
    'teacher.engine={batch_size = 32, lifetime = "run", resources = {cpus = 0.5}}',
    'student.engine={batch_size = 32, lifetime = "run", resources = {cpus = 0.5}}',
)
"""Overrides of `mini` for a whole run of one round that takes about a minute; a later override of a key counts."""

SHUFFLED = (*SMALL, "gap.feedback=shuffled", "lessons.mode=accumulate", "student.start=previous", "data.shared=true")
"""Options that the other runs leave at their defaults: shuffled feedback, accumulated lessons, a student that goes on from the
previous one, one validation set."""


def start(
    recipe: str, run_dir: Path | str, *overrides: str, environment: dict[str, str] | None = None, job: str = "undo"
) -> subprocess.Popen[str]:
    """Start `python jobs/JOB.py RECIPE --run-dir DIR --set …`; `run_dir`: a path, or a URI as it is.

    `environment`: variables beside those of this process.
    """
    if isinstance(run_dir, Path):
        # Relative on purpose, as people write it: workers have other working directories.
        run_dir = os.path.relpath(run_dir, ROOT)
    command = [sys.executable, f"jobs/{job}.py", f"jobs/recipes/{recipe}.toml", "--run-dir", run_dir, *sets(*overrides)]
    known = {**os.environ, **(environment or {})}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=known)


def sets(*overrides: str) -> list[str]:
    """Overrides as the command line takes them."""
    return [part for override in overrides for part in ("--set", override)]


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a run; its output. Fails with that output when the exit code is another, or after ten minutes."""
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        output = f"not done after ten minutes:\n{process.communicate()[0]}"
    assert process.returncode == code, output
    return output


def run(recipe: str, run_dir: Path | str, *overrides: str, code: int = 0, job: str = "undo") -> str:
    return finish(start(recipe, run_dir, *overrides, job=job), code)


def kill_in(process: subprocess.Popen[str], stage: Path, seconds: float = 240) -> None:
    """SIGKILL the driver once a try at the stage has begun and before it is committed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the run ended before {stage}: {process.communicate()[0]}")
        if any(stage.glob("try-*")):
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not (stage / "manifest.json").exists(), f"{stage} was committed before the kill"
            return
        time.sleep(0.005)
    raise AssertionError(f"{stage} was not begun within {seconds} s")


def until(process: subprocess.Popen[str], file: Path, seconds: float = 240) -> str:
    """Let a run go on until this file is there, and kill it: what comes after has tests of its own. Its output."""
    deadline = time.monotonic() + seconds
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    output, _ = process.communicate()
    assert file.exists(), f"no {file}: {output}"
    return output


def report(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "report.json").read_text()))


def rows(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    """The committed rows of a stage."""
    manifest = json.loads((run_dir / stage / "manifest.json").read_text())
    files = [run_dir / stage / file["name"] for file in manifest["files"] if file["name"].endswith(".parquet")]
    table = pa.concat_tables([pq.read_table(file) for file in files])
    return sorted(table.to_pylist(), key=lambda row: row["id"])


def timeless(value: Any) -> Any:
    """A report without what differs between two runs of the same: seconds, times, the count of resumes."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if "seconds" not in key and key not in ("finished", "resumes")}
        return {key: timeless(item) for key, item in kept.items()}
    return [timeless(item) for item in value] if isinstance(value, list) else value
