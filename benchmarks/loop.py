"""What the loop adds to its engines and its training, and what a second call of a finished run costs, on the miniature world.

    python benchmarks/loop.py [--rounds 5] [--json OUT]

One run of `mini.toml` with so many rounds after round 0, each with training long enough for more than three minutes; then the
same command again, as often. Each figure is the median, with the lowest and the highest.

    R6_rerun     seconds of a second call ÷ those of the first until its round 1 was done
    R8_overhead  (seconds of a round - those in which the engines had rows - those of training's steps) ÷ seconds of the round,
                 for every round from 1 on; beside_STAGE are the seconds of each stage that it counts
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import tell

from undo_ray.types import unix_time

ROOT = Path(__file__).resolve().parent.parent
LONG = ("student.tokens=2_400_000", "data.tests=[]", "stop.patience=99")


def seconds(run_dir: Path, rounds: int) -> float:
    sets = [part for override in (f"rounds={rounds}", *LONG) for part in ("--set", override)]
    begun = time.monotonic()
    command = [sys.executable, "-m", "undo_ray", "run", "jobs/recipes/mini.toml", "--run-dir", str(run_dir), *sets]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - begun


def record(run_dir: Path, k: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / f"round-{k:02d}/record.json").read_text())
    return found


def of_round(run_dir: Path, k: int) -> dict[str, float]:
    """Figures of round k."""
    before, this = record(run_dir, k - 1), record(run_dir, k)
    wall = unix_time(this["finished"]) - unix_time(before["finished"])
    replicas = json.loads((run_dir / "recipe.json").read_text())["recipe"]["teacher"]["engine"]["replicas"]  # the student's too
    at_work = {stage: seconds / replicas for stage, seconds in this["engine_seconds"].items()}
    at_work["student"] = this["training"]["loop_seconds"]
    beside = {f"beside_{stage}": seconds - at_work.get(stage, 0.0) for stage, seconds in this["seconds"].items()}
    return {"R8_overhead": 1 - sum(at_work.values()) / wall, "round_seconds": wall, **beside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as home:
        run_dir, begun = Path(home) / "run", time.time()
        seconds(run_dir, options.rounds)
        cold = unix_time(record(run_dir, 1)["finished"]) - begun
        for k in range(1, options.rounds + 1):
            figures = {"R6_rerun": seconds(run_dir, options.rounds) / cold, **of_round(run_dir, k)}
            for key, value in figures.items():
                found.setdefault(key, []).append(value)
            print(*(f"{key} {value:.3g}" for key, value in figures.items()), file=sys.stderr, flush=True)
    tell(found, options.json)


if __name__ == "__main__":
    main()
