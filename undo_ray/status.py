"""`undo-ray status`: where a run is, read off its run directory alone, from any machine, while it runs and after."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from undo_ray import report, store
from undo_ray.config import Recipe
from undo_ray.lease import LEASE_SECONDS, holder
from undo_ray.place import Json, Place
from undo_ray.progress import START, left, line
from undo_ray.types import unix_time

STAGES = ("attempts", "rationales", "lessons", "student", "measure")
"""Of a round, in their order; round 0 has no attempts."""

ROUND = ("round", "validation", "lessons", "rationales", "seconds")
"""What is told of a finished round."""

ENGINE_ERRORS = 3
"""Of the stage in progress, that are told."""


def read(run_dir: str) -> Json:
    """What is known of a run, as docs/run-directory.md has it. Raises UserError (exit code 4) where there is none."""
    run = Place(run_dir)
    recipe, state = store.recipe_of(run), dict[str, Any]()
    if (run / "progress.json").exists():
        state = (run / "progress.json").read_json(
            "it is for reading alone: remove it", "a run's progress", lambda f: "errors" in f
        )
    driver, alive = holder(run)
    records = store.records(run)
    ended = None if driver else _ended(run, recipe)
    known = "running" if alive else "killed" if driver else "finished" if ended else "stopped"
    current = _current(run, state, records) if known != "finished" and "folder" in state else None
    return {
        "run": run.uri,
        "state": known,
        "ended": ended,
        "driver": driver and {**{key: driver[key] for key in ("host", "pid", "since")}, "seconds_ago": _ago(driver["renewed"])},
        "rounds": recipe.rounds,
        "done": [{key: record[key] for key in ROUND} for record in records],
        "current": current,
        "errors": [*state.get("errors", []), *(_engine_errors(run, state) if current else ())],
    }


def _ended(run: Place, recipe: Recipe) -> str | None:
    """Why there is nothing more to do, as report.json has it, or `evaluated`; None while there is."""
    if known := report.ended(run, recipe):
        return str(known["stopped"])
    return "evaluated" if (run / "evaluation.json").exists() else None


def _ago(seconds: float) -> float:
    return round(max(0.0, time.time() - seconds), 1)


def _current(run: Place, state: Json, records: Sequence[Json]) -> Json:
    """The stage in progress (or the last one that was), and when its round ends at the pace of the round before."""
    k, name, figures = state["round"], state["stage"], state["figures"]
    seconds, first = state["seconds"], state.get("first", START)
    rest = left(figures, seconds, first)
    found = {"title": state["title"], "round": k, "stage": name, "figures": figures, "seconds": seconds}
    found |= {"first": first, "left": rest}
    found["seconds_ago"] = _ago(unix_time(state["at"]))
    if k < 0:
        return found
    before = records[k - 1]["seconds"] if 0 < k <= len(records) else {}
    order = STAGES[0 if k else 1 :]
    after = [stage for stage in order[order.index(name) + 1 :] if not _committed(run, k, stage)]
    known = rest is not None and all(stage in before for stage in after)
    left_of_round = rest + sum(before[stage] for stage in after) if rest is not None and known else None
    return {**found, "to_come": after, "left_of_round": left_of_round}


def _committed(run: Place, k: int, stage: str) -> bool:
    return (run / f"round-{k:02d}/{stage}/manifest.json").exists()


def _engine_errors(run: Place, state: Json) -> Iterator[Json]:
    """What engines of the stage in progress died of, newest last."""
    resume = run / state["folder"] / store.RESUME / "generations"
    # MODEL/flight/REPLICA/FILE.json, MODEL/failed/FILE.json
    found = [name for name in resume.files() if re.fullmatch(r"\w+/(flight|failed)/.+\.json", name)]
    for name in found[-ENGINE_ERRORS:]:
        try:
            noted = json.loads((resume / name).read_bytes())
        except (OSError, ValueError):  # it went while we read
            continue
        told = [noted["error"]] if "error" in noted else noted.get("errors", [])
        yield from ({"at": None, "stage": state["title"], "error": f"engine: {one}"} for one in told[-1:])


def text(found: Json) -> str:
    """The same for people."""
    driver, current = found["driver"], found["current"]
    who = f"pid {driver['pid']} on {driver['host']} since {driver['since']}" if driver else ""
    ends = {
        "no_lessons": "ended: no rationale was accepted in the last round; `undo-ray show` prints the rounds before it",
        "evaluated": "finished; its scores are in evaluation.json",
    }
    said = {
        "finished": ends.get(found["ended"], "finished; `undo-ray show` prints its table"),
        "running": f"running: {who}, last heard of {driver['seconds_ago']:.0f} s ago" if driver else "",
        "killed": f"killed: {who} is gone; the same command goes on (on another machine within {LEASE_SECONDS} s)",
        "stopped": "stopped; the same command goes on",
    }[found["state"]]
    lines = [f"{found['run']}: {said}"]
    lines += [report.round_line(record) for record in found["done"]]
    if current:
        old = f" ({current['seconds_ago']:.0f} s ago)" if found["state"] != "running" else ""
        lines.append(f"{current['title']}: {line(current['figures'], current['seconds'], current['first'])}{old}")
        if current.get("to_come"):
            ends_in = current["left_of_round"]
            rest = "" if ends_in is None else f"; at the pace of the round before, the round ends in {ends_in / 60:.0f} min"
            lines.append(f"then {', '.join(current['to_come'])}{rest}; {found['rounds']} rounds after round 0 at most")
    lines += ["last errors:"] if found["errors"] else []
    lines += [f"  {_when(error)}{error['stage']}: {error['error']}" for error in found["errors"]]
    return "\n".join(lines)


def _when(error: dict[str, Any]) -> str:
    return f"{error['at']} " if error["at"] else ""
