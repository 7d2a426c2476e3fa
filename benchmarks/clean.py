"""Cleaning questions against tests and one another: CPU seconds and memory as the training set grows.

    python benchmarks/clean.py [--json] [--sizes 25000 50000 100000] [--tests 20000] [--repeats 3]

Questions are made up: words drawn from a Zipf vocabulary, a third of them opened or closed by a stock phrase, 2 % near copies
and 1 % exact copies of others, 1 % with a run of words from a test. Every size runs in a process of its own. Memory is the
peak resident size of `clean.distinct`, indexing of the tests included, beyond that of the process with all texts in it.
`--peer` also times SetSimilaritySearch's exact join on the near duplicates of the smallest size.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import resource
import statistics
import time
from itertools import accumulate
from typing import Any

from undo_ray import clean

VOCABULARY = 50_000


def questions(n: int, name: str, seed: int) -> list[dict[str, Any]]:
    """`n` made-up questions of 10 to 90 words."""
    rng = random.Random(f"{name} {seed}")
    weights = list(accumulate(1 / rank for rank in range(1, VOCABULARY + 1)))
    phrases = [[f"w{rng.randrange(2000)}" for _ in range(rng.randint(4, 12))] for _ in range(200)]
    rows = []
    for index in range(n):
        text = [f"w{word}" for word in rng.choices(range(VOCABULARY), cum_weights=weights, k=rng.randint(10, 90))]
        if rng.random() < 1 / 3:
            text = [*rng.choice(phrases), *text] if rng.random() < 0.5 else [*text, *rng.choice(phrases)]
        rows.append({"id": f"{name}/{index}", "task": name, "question": " ".join(text), "choices": None})
    return rows


def training(n: int, tests: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """`n` questions with copies of one another and of runs of the tests among them."""
    rng = random.Random(seed)
    rows = questions(n, "train", seed)
    for row in rows:
        kind = rng.random()
        if kind < 0.03:
            text = rng.choice(rows)["question"].split()
            if kind < 0.02:
                text[-1] = "changed"
            row["question"] = " ".join(text)
        elif kind < 0.04:
            row["question"] += " " + " ".join(rng.choice(tests)["question"].split()[:9])
    return rows


def _peak() -> float:
    """Peak resident size of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(size: int, tests: int, seed: int) -> dict[str, Any]:
    """One cleaning of `size` training questions."""
    held = questions(tests, "test", seed)
    rows = training(size, held, seed)
    before, start = _peak(), time.process_time()
    kept, removed = clean.distinct(rows, None, clean.Tests(held))
    seconds = time.process_time() - start
    return {
        "train": size,
        "tests": tests,
        "seconds": seconds,
        "mb": _peak() - before,
        "kept": len(kept),
        "removed": len(removed),
    }


def peer(size: int, tests: int, seed: int) -> dict[str, float]:
    """CPU seconds for the near duplicates of `size` questions alone: ours, and SetSimilaritySearch's exact join."""
    from SetSimilaritySearch import all_pairs

    texts = [row["question"] for row in training(size, questions(tests, "test", seed), seed)]
    start = time.process_time()
    clean.near_duplicates(texts)
    middle = time.process_time()
    sets: list[set[tuple[str, ...]]] = []
    for text in texts:
        words = clean.words(text)
        sets.append({tuple(words[i : i + clean.NGRAM]) for i in range(len(words) - clean.NGRAM + 1)})
    list(all_pairs([found for found in sets if found], similarity_func_name="jaccard", similarity_threshold=clean.NEAR))
    return {"ours": middle - start, "peer": time.process_time() - middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument("--tests", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also time SetSimilaritySearch on the smallest size")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    rows = []
    for size in options.sizes:
        runs = []
        for seed in range(options.repeats):
            with context.Pool(1) as pool:
                runs.append(pool.apply(measure, (size, options.tests, seed)))
        rows.append({key: statistics.median(run[key] for run in runs) for key in runs[0]})
    first, last = rows[0], rows[-1]
    growth = math.log(last["train"] / first["train"]) or 1
    figures: dict[str, Any] = {
        "sizes": rows,
        "seconds_exponent": math.log(last["seconds"] / first["seconds"]) / growth,
        "bytes_per_question": (last["mb"] - first["mb"]) * 2**20 / max(1, last["train"] - first["train"]),
    }
    if options.peer:
        with context.Pool(1) as pool:
            figures["peer"] = pool.apply(peer, (options.sizes[0], options.tests, 0))
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{'train':>9}  {'tests':>7}  {'seconds':>8}  {'MB':>6}  {'removed':>8}")
    for row in rows:
        print(f"{row['train']:>9,}  {row['tests']:>7,}  {row['seconds']:8.2f}  {row['mb']:6.0f}  {row['removed']:8.0f}")
    print(f"seconds grow with train^{figures['seconds_exponent']:.2f}; {figures['bytes_per_question']:,.0f} bytes a question")
    if options.peer:
        ours, theirs = figures["peer"]["ours"], figures["peer"]["peer"]
        print(f"near duplicates of {first['train']:,}: {ours:.1f} s, SetSimilaritySearch {theirs:.1f} s")


if __name__ == "__main__":
    main()
