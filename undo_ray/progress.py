"""What a person sees while a stage works: a bar at a terminal, a plain line every few seconds in a job log.

The workers of a stage report to one small actor, the board; a thread of the driver reads it and writes. Nothing in a stage
waits for it. The same figures go to `progress.json` of the run directory, where `undo-ray status` finds them, and, from the
board, to Ray's metrics.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from undo_ray.types import UserError, now
from undo_ray.written import printable

LINE_SECONDS = 5.0
"""Between two lines of a job log."""


KEEP_SECONDS = 10.0
"""Between two writings of progress.json."""

ERRORS = 5
"""Of a run, that progress.json keeps."""

First = Sequence[float]
"""(`done`, seconds) when a stage was first seen at work: the engines' start, and what an earlier start of the driver had done,
are no part of its pace."""
START: First = (0.0, 0.0)


def beside_the_driver() -> Any:
    """Where an actor that asks for nothing belongs: another node could not be given back for it, and would take it along."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Board:
    """Running totals of the stage in progress, and their gauges in Ray's metrics: `undo_ray_done`, `undo_ray_total`,
    `undo_ray_tokens`… by `run`, `round` and `stage`. Made a Ray actor by `Progress.connect`."""

    def __init__(self, run: str = "") -> None:
        self.figures: dict[str, float] = {}
        self._run, self._tags, self._gauges = run, dict[str, str](), dict[str, Any]()

    def begin(self, k: int | None, stage: str) -> None:
        """A stage begins: all totals are zero. `k`: its round, None outside rounds."""
        tags = {"run": self._run, "round": "" if k is None else str(k), "stage": stage.replace(" ·", ",")}
        # Ray's metrics refuse what is not ASCII.
        self.figures, self._tags = {}, {key: tag.encode("ascii", "backslashreplace").decode() for key, tag in tags.items()}

    def add(self, **figures: float) -> None:
        """Add to counters: `done` rows, `asked` rows, `accepted` or `right` rows, `tokens`."""
        self.set(**{name: self.figures.get(name, 0) + value for name, value in figures.items()})

    def set(self, **figures: float) -> None:
        """Set gauges: `total` rows or steps, `loss`, and counters of one reporter."""
        from ray.util.metrics import Gauge

        self.figures.update(figures)
        for name, value in figures.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"undo_ray_{name}", f"{name} of a stage of undo-ray", tuple(self._tags))
            self._gauges[name].set(value, self._tags)

    def read(self) -> dict[str, float]:
        return dict(self.figures)


class Progress:
    """Writes the progress of one stage at a time to `stream`, and, after `keep`, to a file."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.board: Any = None
        self.tracker: Any = None  # of track.py, where curves go besides
        self._file: Any = None  # a Place
        self._state: dict[str, Any] = {"errors": []}
        self._width = 0

    def connect(self, run: str = "") -> None:
        """Put the board on the Ray cluster; without it stages are announced but not followed. `run`: its name in metrics."""
        import ray

        self.board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=beside_the_driver()).remote(run)

    def keep(self, file: Any) -> None:
        """From now on keep the state of the run in this file (a `Place`), with the errors that are there already."""
        self._file = file
        if file.exists():
            with suppress(Exception):  # what it says is for reading alone: a damaged one is written anew
                self._state["errors"] = list(json.loads(file.read_bytes())["errors"])

    def say(self, text: str) -> None:
        """One plain line."""
        self._bar("")
        print(printable(text), file=self.stream, flush=True)

    def total(self, rows: float) -> None:
        """How many rows (or steps) the stage in progress has to do."""
        if self.board is not None:
            self.board.set.remote(total=rows)

    @contextmanager
    def stage(self, name: str, k: int, title: str, folder: str) -> Iterator[None]:
        """While the block runs, this is the stage in progress. `title`: what people read, such as `round 1 · measure`.
        `folder`: where it lies in the run directory."""
        start = time.monotonic()
        if self.board is not None:
            self.board.begin.remote(*((k, name) if k >= 0 else (None, title)))
        self._state |= {"round": k, "stage": name, "title": title, "folder": folder}
        self._state |= {"figures": {}, "seconds": 0.0, "first": START}
        self._save()
        stop = threading.Event()
        thread = threading.Thread(target=self._follow, args=(title, start, stop), daemon=True, name="undo_ray progress")
        thread.start()
        try:
            yield
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            stop.set()
            thread.join()
            self._state["seconds"], self._state["figures"] = time.monotonic() - start, self._read()
            self._save()
        self.say(f"{title}: {line(self._state['figures'], self._state['seconds'], final=True)}")

    def _follow(self, title: str, start: float, stop: threading.Event) -> None:
        live, due = self.stream.isatty(), start + KEEP_SECONDS
        while not stop.wait(0.5 if live else LINE_SECONDS):
            figures, seconds = self._read(), time.monotonic() - start
            if self._state["first"] == START and figures.get("done"):
                self._state["first"] = (figures["done"], seconds)
            text = f"{title}: {line(figures, seconds, self._state['first'], bar=live)}"
            if live:
                self._bar(text)
            else:
                print(text, file=self.stream, flush=True)
            if time.monotonic() >= due:
                self._state |= {"figures": figures, "seconds": seconds}
                self._save()
                due = time.monotonic() + KEEP_SECONDS

    def _failed(self, error: BaseException) -> None:
        """Note why a stage ended; kept with the next `_save`."""
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        new = {"at": now(), "stage": self._state["title"], "error": " ".join(what.split())[:1000]}
        self._state["errors"] = [*self._state["errors"], new][-ERRORS:]

    def _bar(self, text: str) -> None:
        """Overwrite the terminal's current line."""
        if self.stream.isatty():
            print("\r" + text.ljust(self._width), end="" if text else "\r", file=self.stream, flush=True)
            self._width = len(text)

    def _save(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # nor must it here
                self._file.write_json({**self._state, "at": now()})

    def _read(self) -> dict[str, float]:
        if self.board is None:
            return {}
        import ray

        try:
            return dict(ray.get(self.board.read.remote(), timeout=5))
        except ray.exceptions.RayError:  # progress must never stop the work; the stage's own calls will say what broke
            return {}


def left(figures: Mapping[str, float], seconds: float, first: First) -> float | None:
    """Seconds until a stage has done all, at its pace since `first`; None while that is not known."""
    done, total = figures.get("done", 0), figures.get("total", 0)
    worked = done - first[0]
    return (total - done) * (seconds - first[1]) / worked if total and worked > 0 else None


def line(figures: Mapping[str, float], seconds: float, first: First = START, final: bool = False, bar: bool = False) -> str:
    """A stage's figures after so many seconds as text: done of total, rates, shares, and what is left."""
    done, asked, tokens, total = (figures.get(name, 0) for name in ("done", "asked", "tokens", "total"))
    rest = left(figures, seconds, first)
    ahead = f"{rest:.0f} s to go" if rest is not None else f"{seconds:.0f} s" if done else f"starting, {seconds:.0f} s"
    parts = []
    if total and done:
        parts = [f"[{'#' * int(20 * min(1.0, done / total)):.<20}]"] if bar else []
        parts.append(f"{done:.0f}/{total:.0f}")
    worked = done - first[0]
    parts += [f"{worked / (seconds - first[1]):.1f} rows/s"] if worked > 0 else []
    parts += [f"{tokens / seconds:,.0f} tokens/s"] if tokens else []
    parts += [f"{figures[well] / asked:.0%} {well}" for well in ("accepted", "right") if asked and well in figures]
    parts += [f"{figures['errors']:.0f} failed"] if figures.get("errors") else []
    parts += [f"loss {figures['loss']:.3f}"] if "loss" in figures else []
    return ", ".join([*parts, f"{seconds:.1f} s" if final else ahead])
