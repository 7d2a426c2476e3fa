"""Records, report.json and the table a run ends with. The schema is in docs/run-directory.md."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from undo_ray.config import Recipe, digest, leaves
from undo_ray.gap import Z95, Gap, best, score_json
from undo_ray.place import Place
from undo_ray.problems import test_name
from undo_ray.store import Run, Step
from undo_ray.types import UserError

Json = dict[str, Any]


def round_figures(step: Step, delta: Gap) -> Json:
    """What the record of a round holds beside its identity: accuracies, lessons, tokens, seconds."""
    stages = step.manifests
    figures = {name: manifest["figures"] for name, manifest in stages.items()}
    return {
        "validation": score_json(delta.select),
        "show": score_json(delta.show),
        "subjects": delta.subjects,
        "previous_train": figures["attempts"]["train"] if "attempts" in figures else None,
        "lessons": figures["lessons"].get("lessons", 0),
        "duplicates": figures["lessons"].get("duplicates", 0),
        "rationales": figures["rationales"]["generations"],
        "refused": figures["rationales"]["refused"],
        "shown": figures["rationales"]["shown"],
        "teacher_tokens": figures["rationales"]["tokens"],
        "student_tokens": {
            name: sum(figures[stage]["tokens"][name] for stage in ("attempts", "measure") if stage in figures)
            for name in ("prompt", "cached", "completion")
        },
        "training": figures["student"],
        "seconds": {name: manifest["seconds"] for name, manifest in stages.items()},
        "gpu_seconds": {
            name: round(manifest["seconds"] * manifest["figures"].get("gpus", 0), 3) for name, manifest in stages.items()
        },
    }


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
    for earlier, later in pairwise(rounds):
        # Training questions were just trained on: what exceeds validation there is memory, not skill.
        earlier["train"] = later.pop("previous_train")
        earlier["train_minus_validation"] = earlier["train"]["accuracy"] - earlier["validation"]["accuracy"]
    for record in rounds:
        record.pop("previous_train", None)
    chosen = best([record["validation"]["accuracy"] for record in records])
    report: Json = {
        "best_round": chosen,
        "primary_test": None,
        "base_test_accuracy": None,
        "baseline_test_accuracy": None,
        "final_test_accuracy": None,
        "feedback": recipe.gap.feedback,
        "seed": recipe.seed,
        "shared_validation": recipe.data.shared,
        "keep_wrong": recipe.lessons.keep_wrong,
        "student": f"round-{chosen:02d}/student",
        "rounds": rounds,
        "resumes": run.resumes,
        "stopped": stopped,
        "goal": _goal(recipe),
    }
    if recipe.data.tests:
        tests = run.tests(recipe)
        primary = test_name(recipe.data.tests[0])
        base = tests.made("base")
        for record in rounds:
            record["tests"] = tests.made(f"round-{record['round']:02d}")
        report |= {
            "primary_test": primary,
            "base_tests": base,
            "base_test_accuracy": base[primary]["accuracy"],
            "baseline_test_accuracy": rounds[0]["tests"][primary]["accuracy"],
            "final_test_accuracy": rounds[chosen]["tests"][primary]["accuracy"],
            "gain": paired(_correct(tests, 0, primary), _correct(tests, chosen, primary)),
            "test_seconds": {name: manifest["seconds"] for name, manifest in tests.manifests.items()},
        }
    (run.place / "report.json").write_json(report)
    return report


def _goal(recipe: Recipe) -> str:
    """Hash of the extendable keys: a finished run of another goal is not finished."""
    return digest({key: value for key, kind, value in leaves(recipe) if kind == "extendable"})


def finished(run: Run) -> Json | None:
    """The report of a run that has reached this recipe's goal; None while there is something to do."""
    place = run.place / "report.json"
    if not place.exists():
        return None
    report = place.read_json("move it away and run the same command: it is written again")
    _check(report, place)
    return report if report["goal"] == _goal(run.recipe) and report["stopped"] != "no_lessons" else None


def read(run_dir: str) -> Json:
    """The report of a finished run. Raises UserError when there is none."""
    place = Place(run_dir) / "report.json"
    if not place.exists():
        raise UserError(f"{run_dir}: has no report.json; is it a run directory, and has the run finished?")
    report = place.read_json("move it away and run the recipe again: it is written again")
    return _check(report, place)


def _check(report: Any, place: Place) -> Json:
    if not isinstance(report, dict) or not {"goal", "stopped", "rounds", "primary_test"} <= report.keys():
        raise UserError(f"{place.uri}: not a report; move it away and run the recipe again: it is written again", exit_code=4)
    return report


def _correct(tests: Step, k: int, name: str) -> dict[str, bool]:
    """id -> right, of round k's student on one test."""
    rows = tests.rows(f"round-{k:02d}").select_columns(["id", "split", "attempt"])
    return {row["id"]: row["attempt"]["verdict"]["correct"] for row in rows.iter_rows() if row["split"] == name}


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


def _percent(score: Json) -> str:
    if not score or score["accuracy"] is None:
        return "-"
    return f"{score['accuracy']:.1%} [{score['low']:.1%}, {score['high']:.1%}] of {score['n']}"


def table(report: Json, title: str) -> str:
    """The rounds of a finished run as text."""
    primary = report["primary_test"]
    head = [
        "round",
        "validation",
        f"test: {primary}" if primary else "test",
        "unparsed",
        "lessons",
        "teacher tokens",
        "seconds",
    ]
    lines = [head]
    if primary:
        base = report["base_tests"][primary]
        lines.append(["base", "", _percent(base), f"{base['unparsed']:.1%}", "", "", ""])
    for record in report["rounds"]:
        test = record["tests"].get(primary) if primary else None
        tokens = record["teacher_tokens"]
        cached = tokens["cached"] / max(1, tokens["prompt"])
        mark = " *" if record["round"] == report["best_round"] else ""
        lines.append(
            [
                f"{record['round']}{mark}",
                _percent(record["validation"]),
                _percent(test) if test else "-",
                f"{test['unparsed']:.1%}" if test else "-",
                f"{record['lessons']} of {record['rationales']}",
                f"{tokens['prompt']:,} in ({cached:.0%} cached), {tokens['completion']:,} out",
                " ".join(f"{name} {seconds:.0f}" for name, seconds in record["seconds"].items()),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"* best round on validation (95 % intervals; feedback: {report['feedback']}; seed {report['seed']})"]
    if report["shared_validation"]:
        notes.append("validation is shared: the questions that chose the round were in the teacher's prompts")
    if report["keep_wrong"]:
        notes.append("keep_wrong: students were also trained on rationales with wrong or missing answers")
    if primary and len(report["rounds"]) > 1:
        gain = report["gain"]
        notes.append(
            f"gain of round {report['best_round']} over round 0 on {primary}: {100 * gain['gain']:+.1f} points "
            f"[{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}] (the same {gain['n']} "
            f"questions: {gain['won']} won, {gain['lost']} lost)"
        )
    return "\n".join([title, "", *rows, "", *notes])
