"""Speed of grading, both sides in one run: the pool against serial Math-Verify, and against itself with answers that hang.

    python benchmarks/grading.py --data DIR [--json] [--runs 5]

DIR holds `graded/*.jsonl`, recorded responses to MATH (rows with `gold` and `response`). Two ratios, each the median over the
runs, in which the sides take turns:

over_serial_math_verify   answers a second of the pool ÷ of Math-Verify in this process (its `parse` and `verify` on the gold
                          and on the whole response, as its documentation has it), on the same 3,000 answers
hang_overhead             (seconds of 1,000 answers with 5 that hang - one deadline) ÷ seconds of the same without them
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from undo_ray.grading.pool import DEADLINE, Pool

FILES = ("math500_rho_cot", "math500_rho_tora", "math_qwen25_cot", "math_answer_pairs")
ANSWERS, FEW, HANGS = 3000, 1000, 5
HANG = r"\boxed{\frac{1}{" + r"1+\frac{1}{" * 17 + "2" + "}" * 18 + "}"
"""A nested fraction: Math-Verify takes about a minute over it, and gets nowhere within any deadline in use."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    recorded = [row for name in FILES for row in _rows(Path(options.data) / "graded" / f"{name}.jsonl")]
    # Math-Verify looks for a formula, so bare answers are given to both sides as one.
    jobs = [(_as_text(row), {"answer": row["gold"]}, "math") for row in (recorded * 2)[:ANSWERS]]
    few = jobs[:FEW]
    hanging = list(few)
    for index in range(HANGS):
        hanging[(index + 1) * FEW // (HANGS + 1)] = (HANG, {"answer": "18"}, "math")
    with Pool() as pool:
        serial, pooled = _in_turn(lambda: _serial(jobs), lambda: _graded(pool, jobs), options.runs)
        without, with_hangs = _in_turn(lambda: _graded(pool, few), lambda: _hung(pool, hanging), options.runs)
    ratios = {
        "over_serial_math_verify": [a / b for a, b in zip(serial, pooled, strict=True)],
        "hang_overhead": [(b - DEADLINE) / a for a, b in zip(without, with_hangs, strict=True)],
    }
    if options.json:
        print(json.dumps({name: round(statistics.median(values), 3) for name, values in ratios.items()}))
        return
    print(
        f"{len(jobs)} answers, {len(os.sched_getaffinity(0))} CPUs, Python {sys.version.split()[0]}, {options.runs} runs each\n"
    )
    for name, values in (
        ("serial Math-Verify, answers/s", [len(jobs) / seconds for seconds in serial]),
        ("pool, answers/s", [len(jobs) / seconds for seconds in pooled]),
        (f"{FEW} answers, s", without),
        (f"{FEW} answers with {HANGS} hangs, s", with_hangs),
        *ratios.items(),
    ):
        print(f"{name:36} median {statistics.median(values):8.2f}   min {min(values):8.2f}   max {max(values):8.2f}")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _as_text(row: dict[str, Any]) -> str:
    return f"${row['response']}$" if row["source"].endswith("(extracted answer)") else str(row["response"])


def _serial(jobs: list[Any]) -> None:
    from math_verify import parse, verify

    for text, problem, _ in jobs:
        verify(parse(f"${problem['answer']}$"), parse(text))


def _graded(pool: Pool, jobs: list[Any]) -> None:
    assert len(pool.grade(jobs)) == len(jobs)


def _hung(pool: Pool, jobs: list[Any]) -> None:
    assert sum(verdict.reason == "timeout" for verdict in pool.grade(jobs)) == HANGS


def _in_turn(one: Callable[[], None], other: Callable[[], None], runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each in `runs` runs, after one of each that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for side, call in enumerate((one, other)):
            start = time.perf_counter()
            call()
            if run:
                seconds[side].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
