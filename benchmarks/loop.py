"""What the loop adds to its engines and its training, and what a second call of a finished run costs, on the miniature world.

    python benchmarks/loop.py [--runs 5] [--json OUT]

Each run is `mini.toml` with one round after round 0 and training long enough for a round of three minutes; then the same
command again. Each figure is the median of `--runs`, with the lowest and the highest.

    R6_rerun     seconds of the second call ÷ of the first
    R8_overhead  (seconds of round 1 - those in which the engines had rows - those of training's steps) ÷ seconds of round 1
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
LONG = ("rounds=1", "student.tokens=1_800_000", "data.tests=[]")


def seconds(run_dir: Path) -> float:
    sets = [part for override in LONG for part in ("--set", override)]
    begun = time.monotonic()
    command = [sys.executable, "-m", "undo_ray", "run", "jobs/recipes/mini.toml", "--run-dir", str(run_dir), *sets]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - begun


def overhead(run_dir: Path) -> tuple[float, float]:
    """(seconds of round 1, share of them without engine or training)."""
    first, second = (json.loads((run_dir / f"round-0{k}/record.json").read_text()) for k in (0, 1))
    begun, ended = (unix_time(record["finished"]) for record in (first, second))
    replicas = json.loads((run_dir / "recipe.json").read_text())["recipe"]["teacher"]["engine"]["replicas"]  # the student's too
    at_work = sum(second["engine_seconds"].values()) / replicas + second["training"]["loop_seconds"]
    return ended - begun, 1 - at_work / (ended - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"R6_rerun": [], "R8_overhead": [], "round_seconds": []}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as home:
            cold = seconds(Path(home) / "run")
            found["R6_rerun"].append(seconds(Path(home) / "run") / cold)
            wall, share = overhead(Path(home) / "run")
            found["R8_overhead"].append(share)
            found["round_seconds"].append(wall)
        print(*(f"{key} {values[-1]:.3g}" for key, values in found.items()), file=sys.stderr, flush=True)
    tell(found, options.json)


if __name__ == "__main__":
    main()
