"""Records, report.json and the table a run ends with. The schema is in docs/run-directory.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise

from undo_ray.config import Prices, Recipe, digest, leaves
from undo_ray.gap import Z95, Gap, best
from undo_ray.place import Json, Place
from undo_ray.problems import test_name
from undo_ray.store import Run, Step, split_rows
from undo_ray.types import UserError


def round_figures(step: Step, delta: Gap) -> Json:
    """What the record of a round holds beside its identity: accuracies, lessons, tokens, seconds."""
    stages = step.manifests
    figures = {name: manifest["figures"] for name, manifest in stages.items()}
    explained, lessons = figures["rationales"], figures["lessons"]
    answered = [figures[name]["tokens"] for name in ("attempts", "measure") if name in figures]
    gpu_seconds = {name: round(stages[name]["seconds"] * figures[name].get("gpus", 0), 3) for name in stages}
    return {
        "validation": asdict(delta.select),
        "show": asdict(delta.show),
        "subjects": delta.subjects,
        "previous_train": figures.get("attempts", {}).get("train"),
        **{name: lessons.get(name, 0) for name in ("lessons", "hinted_lessons", "duplicates")},
        "rationales": explained["generations"],
        **{name: explained[name] for name in ("asked", "hinted", "refused", "shown")},
        "teacher_tokens": explained["tokens"],
        "reused": explained.get("reused"),
        "prefix": explained["prefix"],
        "student_tokens": {name: sum(tokens[name] for tokens in answered) for name in explained["tokens"]},
        "training": figures["student"],
        "seconds": {name: manifest["seconds"] for name, manifest in stages.items()},
        **{
            key: {name: found[key] for name, found in figures.items() if key in found}
            for key in ("engine_start_seconds", "engine_seconds")
        },
        "gpu_seconds": gpu_seconds,
        "per_accepted": _per_accepted(explained, gpu_seconds["rationales"]),
        "money": money(step.run.recipe.prices, explained["tokens"], sum(gpu_seconds.values())),
    }


def _per_accepted(explained: Json, gpu_seconds: float) -> Json:
    """What one question with an accepted rationale cost: teacher tokens and GPU seconds; None of all where there is none, and
    where some came from the cache and cost nothing."""
    told = explained["good"] and not (explained.get("reused") or {}).get("generations")
    spent = {**{f"{name}_tokens": count for name, count in explained["tokens"].items()}, "gpu_seconds": gpu_seconds}
    return {name: round(amount / explained["good"], 3) if told else None for name, amount in spent.items()}


def money(prices: Prices, tokens: Json, gpu_seconds: float) -> Json:
    """What teacher tokens (none where {}) and GPU time cost, in the recipe's currency; None of what has no price."""
    spent: Json = {"tokens": None, "gpus": None}
    if tokens and prices.prompt is not None and prices.completion is not None:
        cached = prices.prompt if prices.cached is None else prices.cached
        fresh = (tokens["prompt"] - tokens["cached"]) * prices.prompt
        spent["tokens"] = (fresh + tokens["cached"] * cached + tokens["completion"] * prices.completion) / 1e6
    if prices.gpu is not None:
        spent["gpus"] = gpu_seconds / 3600 * prices.gpu
    return spent


def round_line(record: Json) -> str:
    """One line for the log when a round is done."""
    return (
        f"round {record['round']} done: validation {_percent(record['validation'])}, {record['lessons']} lessons from "
        f"{record['rationales']} rationales, {sum(record['seconds'].values()):.0f} s"
    )


def write(run: Run, records: list[Json], stopped: str) -> Json:
    """Write report.json from the records and, where the recipe has tests, their committed results.

    `stopped` is why there are no more rounds: `converged`, `rounds` or `no_lessons`.
    """
    recipe = run.recipe
    rounds = [dict(record, tests={}) for record in records]
    del rounds[0]["previous_train"]
    for earlier, later in pairwise(rounds):
        # Training questions were just trained on: what exceeds validation there is memory, not skill.
        earlier["train"] = later.pop("previous_train")
        earlier["train_minus_validation"] = earlier["train"]["accuracy"] - earlier["validation"]["accuracy"]
    chosen = best([record["validation"]["accuracy"] for record in records])
    report: Json = {
        "best_round": chosen,
        **dict.fromkeys(["primary_test", "base_test_accuracy", "baseline_test_accuracy", "final_test_accuracy"]),
        "feedback": recipe.gap.feedback,
        "seed": recipe.seed,
        "shared_validation": recipe.data.shared,
        "keep_wrong": recipe.lessons.keep_wrong,
        "hints": recipe.teacher.hints,
        "student": f"round-{chosen:02d}/student",
        "rounds": rounds,
        "resumes": run.resumes,
        "stopped": stopped,
        "goal": _goal(recipe),
    }
    spent = [record["money"] for record in records]
    if recipe.data.tests:
        tests, primary = run.tests(recipe), test_name(recipe.data.tests[0])
        base = tests.made("base")
        fed_back = _fed_back([record["validation"]["accuracy"] for record in records])
        for record in rounds:
            record["tests"] = tests.made(f"round-{record['round']:02d}")
        report |= {
            "primary_test": primary,
            "base_tests": base,
            "base_test_accuracy": base[primary]["accuracy"],
            "baseline_test_accuracy": rounds[0]["tests"][primary]["accuracy"],
            "final_test_accuracy": rounds[chosen]["tests"][primary]["accuracy"],
            "gain": {"round": fed_back, **paired(_correct(tests, 0, primary), _correct(tests, fed_back, primary))},
            "test_seconds": {name: manifest["seconds"] for name, manifest in tests.manifests.items()},
        }
        held = sum(manifest["seconds"] * manifest["figures"].get("gpus", 0) for manifest in tests.manifests.values())
        spent.append({"tokens": None, "gpus": money(recipe.prices, {}, held)["gpus"]})
    report["money"] = {kind: _sum(part[kind] for part in spent) for kind in ("tokens", "gpus")}
    run.lease.check()
    (run.place / "report.json").write_json(report)
    return report


def _fed_back(accuracies: list[float]) -> int:
    """The best round with feedback, so that what feedback lost is told too; 0 where there is none."""
    return 1 + best(accuracies[1:]) if len(accuracies) > 1 else 0


def _sum(parts: Iterable[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _goal(recipe: Recipe) -> str:
    """Hash of the extendable keys: a finished run of another goal is not finished."""
    return digest({key: value for key, kind, value in leaves(recipe) if kind == "extendable"})


def ended(run: Place, recipe: Recipe) -> Json | None:
    """The report of a run directory that has gone as far as this recipe lets it; None while there is something to do."""
    place = run / "report.json"
    report = _read(place) if place.exists() else None
    return report if report and report["goal"] == _goal(recipe) else None


def finished(run: Place, recipe: Recipe) -> Json | None:
    """The same where it reached its goal: a run that ended without lessons says so anew when it is started again."""
    report = ended(run, recipe)
    return report if report and report["stopped"] != "no_lessons" else None


def read(run_dir: str) -> Json:
    """The report of a finished run. Raises UserError when there is none."""
    place = Place(run_dir) / "report.json"
    if not place.exists():
        raise UserError(f"{run_dir}: has no report.json; is it a run directory, and has the run finished?")
    return _read(place)


def _read(place: Place) -> Json:
    def valid(found: Json) -> bool:
        return found.keys() >= {"goal", "stopped", "rounds", "primary_test"}

    return place.read_json("move it away and run the recipe again: it is written again", "a report", valid)


def _correct(tests: Step, k: int, name: str) -> dict[str, bool]:
    """id -> right, of round k's student on one test."""
    rows = split_rows(tests.files(f"round-{k:02d}"), name, ["id", "attempt"])
    return {row["id"]: row["attempt"]["verdict"]["correct"] for row in rows}


def paired(before: dict[str, bool], after: dict[str, bool]) -> Json:
    """The gain of `after` over `before` on the same problems, as a fraction of 1, with a 95 % interval for paired shares.

    Normal approximation: with b problems won and c lost of n, the variance of the difference is (b + c - (b - c)²/n) / n².
    """
    won = sum(after[id] and not before[id] for id in before)
    lost = sum(before[id] and not after[id] for id in before)
    n = len(before)
    gain = (won - lost) / n
    half = Z95 * math.sqrt(max(0.0, won + lost - (won - lost) ** 2 / n)) / n
    return {"n": n, "gain": gain, "low": gain - half, "high": gain + half, "won": won, "lost": lost}


# -- for people ---------------------------------------------------------------------------------------------------------


NOTES = {
    "shared_validation": "validation is shared: the questions that chose the round were in the teacher's prompts",
    "keep_wrong": "keep_wrong: students were also trained on rationales with wrong or missing answers",
}
"""What is said below the table where the report marks it."""


def scores(evaluation: Json) -> str:
    """A model's scores on tests as text."""
    lines = [["test", evaluation["model"], "unparsed"], *([name, *_test(score)] for name, score in evaluation["tests"].items())]
    return "\n".join(_columns(lines))


def _columns(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _percent(score: Json) -> str:
    if score["accuracy"] is None:
        return "-"
    return f"{score['accuracy']:.1%} [{score['low']:.1%}, {score['high']:.1%}] of {score['n']}"


def _test(score: Json | None) -> list[str]:
    return [_percent(score), f"{score['unparsed']:.1%}"] if score else ["-", "-"]


def table(report: Json, title: str) -> str:
    """The rounds of a finished run as text."""
    primary, chosen = report["primary_test"], report["best_round"]
    test = f"test: {primary}" if primary else "test"
    lines = [["round", "validation", test, "unparsed", "lessons", "teacher tokens", "seconds"]]
    if primary:
        lines.append(["base", "", *_test(report["base_tests"][primary]), "", "", ""])
    for record in report["rounds"]:
        tokens, k = record["teacher_tokens"], record["round"]
        cached = tokens["cached"] / max(1, tokens["prompt"])
        lines.append(
            [
                f"{k} *" if k == chosen else f"{k}",
                _percent(record["validation"]),
                *_test(record["tests"].get(primary)),
                f"{record['lessons']} of {record['rationales']}",
                f"{tokens['prompt']:,} in ({cached:.0%} cached), {tokens['completion']:,} out",
                " ".join(f"{name} {seconds:.0f}" for name, seconds in record["seconds"].items()),
            ]
        )
    rows = _columns(lines)
    notes = [f"* best round on validation (95 % intervals; feedback: {report['feedback']}; seed {report['seed']})"]
    notes += [note for key, note in NOTES.items() if report[key]]
    if report["hints"] != "off":
        hinted, lessons = (sum(record[name] for record in report["rounds"]) for name in ("hinted_lessons", "lessons"))
        notes.append(f"hints: {report['hints']}; the teacher wrote {hinted} of {lessons} lessons after it was shown the gold")
    if reused := sum((record.get("reused") or {"generations": 0})["generations"] for record in report["rounds"]):
        notes.append(f"teacher.cache: {reused:,} rationales were made in other runs; their tokens are in no figure here")
    if spent := {kind: amount for kind, amount in report["money"].items() if amount is not None}:
        notes.append(
            "spent, by the recipe's prices: " + ", ".join(f"{amount:,.2f} on {kind}" for kind, amount in spent.items())
        )
    if primary and len(report["rounds"]) > 1:
        gain = report["gain"]
        points, low, high = (f"{100 * gain[key]:+.1f}" for key in ("gain", "low", "high"))
        notes.append(
            f"gain of round {gain.get('round', chosen)} over round 0 on {primary}: {points} points [{low}, {high}] "
            f"(the same {gain['n']} questions: {gain['won']} won, {gain['lost']} lost)"
        )
    return "\n".join([title, "", *rows, "", *notes])
