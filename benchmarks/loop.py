"""What the loop adds to its engines and its training, and what a second call of a finished run costs, on the miniature world.

    python benchmarks/loop.py [--runs 5] [--json OUT]

Each run is `mini.toml` with one round after round 0 and training long enough for a round of three minutes; then the same
command again. Each figure is the median of `--runs`, with the lowest and the highest.

    R6_rerun     seconds of the second call ÷ of the first
    R8_overhead  (seconds of round 1 - those in which the engines had rows - those of training's steps) ÷ seconds of round 1;
                 beside_STAGE are the seconds of each stage that it counts
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import tell

from undo_ray.types import unix_time

ROOT = Path(__file__).resolve().parent.parent
LONG = ("rounds=1", "student.tokens=2_400_000", "data.tests=[]")


def seconds(run_dir: Path) -> float:
    sets = [part for override in LONG for part in ("--set", override)]
    begun = time.monotonic()
    command = [sys.executable, "-m", "undo_ray", "run", "jobs/recipes/mini.toml", "--run-dir", str(run_dir), *sets]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - begun


def of_round(run_dir: Path) -> dict[str, float]:
    """Figures of round 1."""
    first, second = (json.loads((run_dir / f"round-0{k}/record.json").read_text()) for k in (0, 1))
    wall = unix_time(second["finished"]) - unix_time(first["finished"])
    replicas = json.loads((run_dir / "recipe.json").read_text())["recipe"]["teacher"]["engine"]["replicas"]  # the student's too
    at_work = {stage: seconds / replicas for stage, seconds in second["engine_seconds"].items()}
    at_work["student"] = second["training"]["loop_seconds"]
    beside = {f"beside_{stage}": seconds - at_work.get(stage, 0.0) for stage, seconds in second["seconds"].items()}
    return {"R8_overhead": 1 - sum(at_work.values()) / wall, "round_seconds": wall, **beside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as home:
            cold = seconds(Path(home) / "run")
            figures = {"R6_rerun": seconds(Path(home) / "run") / cold, **of_round(Path(home) / "run")}
        for key, value in figures.items():
            found.setdefault(key, []).append(value)
        print(*(f"{key} {value:.3g}" for key, value in figures.items()), file=sys.stderr, flush=True)
    tell(found, options.json)


if __name__ == "__main__":
    main()
