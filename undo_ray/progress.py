"""What a person sees while a stage works: a bar at a terminal, a plain line every few seconds in a job log.

The workers of a stage report to one small actor, the board; a thread of the driver reads it and writes. Nothing in a stage
waits for it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

LINE_SECONDS = 5.0
"""Between two lines of a job log."""


class Board:
    """Running totals of the stage in progress. Made a Ray actor by `Progress.connect`."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def add(self, **figures: float) -> None:
        """Add to counters: `done` rows, `asked` rows, `accepted` or `right` rows, `tokens`."""
        for name, value in figures.items():
            self.figures[name] = self.figures.get(name, 0) + value

    def set(self, **figures: float) -> None:
        """Set gauges: `loss`, and counters of one reporter."""
        self.figures.update(figures)

    def read(self) -> dict[str, float]:
        return dict(self.figures)

    def clear(self) -> None:
        self.figures = {}


class Progress:
    """Writes the progress of one stage at a time to `stream`."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.board: Any = None
        self.tracker: Any = None  # of track.py, where curves go besides
        self._total: float | None = None
        self._width = 0

    def connect(self) -> None:
        """Put the board on the Ray cluster; without it stages are announced but not followed."""
        import ray

        self.board = ray.remote(Board).options(num_cpus=0).remote()

    def say(self, text: str) -> None:
        """One plain line."""
        self._bar("")
        print(text, file=self.stream, flush=True)

    def total(self, rows: float) -> None:
        """How many rows (or steps) the stage in progress has to do."""
        self._total = rows

    @contextmanager
    def stage(self, name: str, k: int) -> Iterator[None]:
        title = f"round {k} · {name}" if k >= 0 else name
        start, self._total = time.monotonic(), None
        if self.board is not None:
            self.board.clear.remote()
        stop = threading.Event()
        thread = threading.Thread(target=self._follow, args=(title, start, stop), daemon=True, name="undo_ray progress")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        self.say(f"{title}: {self._line(start, final=True)}")

    def _follow(self, title: str, start: float, stop: threading.Event) -> None:
        live = self.stream.isatty()
        while not stop.wait(0.5 if live else LINE_SECONDS):
            line = self._line(start)
            if live:
                self._bar(f"{title}: {line}")
            elif line:
                print(f"{title}: {line}", file=self.stream, flush=True)

    def _bar(self, text: str) -> None:
        """Overwrite the terminal's current line."""
        if self.stream.isatty():
            print("\r" + text.ljust(self._width), end="" if text else "\r", file=self.stream, flush=True)
            self._width = len(text)

    def _line(self, start: float, final: bool = False) -> str:
        figures, seconds = self._read(), time.monotonic() - start
        done, asked, tokens = (figures.get(name, 0) for name in ("done", "asked", "tokens"))
        total = figures.get("total", self._total)  # training workers know their own
        left = f"starting, {seconds:.0f} s"
        parts = []
        if total and done:
            bar = f"[{'#' * int(20 * min(1.0, done / total)):.<20}]"
            parts = [bar] if self.stream.isatty() and not final else []
            parts.append(f"{done:.0f}/{total:.0f}")
            left = f"{(total - done) * seconds / done:.0f} s to go"
        parts += [f"{done / seconds:.1f} rows/s"] if done else []
        parts += [f"{tokens / seconds:,.0f} tokens/s"] if tokens else []
        parts += [f"{figures[well] / asked:.0%} {well}" for well in ("accepted", "right") if asked and well in figures]
        parts += [f"loss {figures['loss']:.3f}"] if "loss" in figures else []
        return ", ".join([*parts, f"{seconds:.1f} s" if final else left])

    def _read(self) -> dict[str, float]:
        if self.board is None:
            return {}
        import ray

        try:
            return dict(ray.get(self.board.read.remote(), timeout=5))
        except ray.exceptions.RayError:  # progress must never stop the work; the stage's own calls will say what broke
            return {}
