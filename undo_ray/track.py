"""Trackers: curves and figures to TensorBoard, Weights & Biases or MLflow, beside the run directory, which stays the record.

They are written by the driver alone, with its environment (`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`…); workers hand their
figures to a small actor that the driver empties. A run directory is one run in each tracker, whatever drivers worked on it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from undo_ray.progress import beside_the_driver
from undo_ray.types import UserError, first_line

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}

SECONDS = 2.0
"""Between two emptyings of the workers' figures."""


class Curves:
    """What workers hand over: (step, figures). Made a Ray actor by `Tracker.following`."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def add(self, step: int, figures: dict[str, float]) -> None:
        self.points.append((step, figures))

    def drain(self) -> list[tuple[int, dict[str, float]]]:
        points, self.points = self.points, []
        return points


class Tracker:
    """The trackers a recipe names, open from the run's start to its end. With none, nothing happens.

    One that fails later, as a server does that is away for a while, never stops the work: `say` is told, once.
    """

    def __init__(self, names: tuple[str, ...], run: str, settings: dict[str, Any], say: Callable[[str], None]):
        """`run`: URI of the run directory; its last part names the run.

        Raises UserError when a package is missing, or a tracker does not open.
        """
        modules = {name: _imported(name) for name in dict.fromkeys(names)}
        title = run.rstrip("/").rpartition("/")[2]
        # Where a tracker keeps files: beside the run's own when those are on this disk.
        folder = os.path.abspath("track" if "://" in run else os.path.join(run, "track"))
        self._say, self._failed = say, set[str]()
        self._open: dict[str, tuple[Any, Any]] = {}
        for name, module in modules.items():
            try:
                self._open[name] = OPEN[name](module, title, folder, run, settings)
            except Exception as error:  # each has a dozen types of its own
                why = f"cannot be opened ({first_line(error)})"
                raise UserError(f'track = ["{name}"]: {why}; mend that, or take it out of the recipe\'s `track`') from error

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Add one point to each curve in `figures`, by their names (`round-00/loss`)."""
        for name, (write, _) in self._open.items():
            self._let(name, write, step, figures)

    def record(self, record: dict[str, Any]) -> None:
        """The figures of a finished round, as curves over rounds."""
        self.log(record["round"], {f"rounds/{name}": value for name, value in _flat(record) if name != "round"})

    def close(self) -> None:
        for name, (_, close) in self._open.items():
            self._let(name, close)

    def _let(self, name: str, act: Callable[..., None], *args: Any) -> None:
        """Have a tracker do something; what it raises must neither end the run nor hide what did."""
        try:
            act(*args)
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                self._say(f"track: {name} failed ({first_line(error)}); the run goes on, with figures missing there")

    @contextmanager
    def following(self, prefix: str) -> Iterator[Any]:
        """A `Curves` actor (None without trackers) whose figures are logged under `prefix` while the block runs."""
        if not self._open:
            yield None
            return
        import ray

        curves = ray.remote(Curves).options(num_cpus=0, scheduling_strategy=beside_the_driver()).remote()
        stop = threading.Event()

        def drain() -> None:
            with suppress(ray.exceptions.RayError):  # curves must never stop the work
                for step, figures in ray.get(curves.drain.remote()):
                    self.log(step, {f"{prefix}/{name}": value for name, value in figures.items()})

        def follow() -> None:
            while not stop.wait(SECONDS):
                drain()

        thread = threading.Thread(target=follow, daemon=True, name="undo_ray trackers")
        thread.start()
        try:
            yield curves
        finally:
            stop.set()
            thread.join()
            drain()


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise UserError(
            f'track = ["{name}"]: {error}; `pip install {MODULES[name]}`, or take {name} out of the recipe\'s `track`'
        ) from None


def _tensorboard(module: Any, title: str, folder: str, run: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    # Not its SummaryWriter: that writes in a thread, and waits for ever where the thread has ended, as on a full disk.
    place = os.path.join(folder, "tensorboard")
    os.makedirs(place, exist_ok=True)
    events, event = module.event_file_writer.EventsWriter(os.path.join(place, "events")), module.proto.event_pb2.Event

    def put(summary: Any, step: int) -> None:
        events.write_event(event(wall_time=time.time(), step=step, summary=summary))

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            put(module.summary.scalar(name, value), step)
        events.flush()

    put(module.summary.text("recipe", "".join(f"    {key} = {value}\n" for key, value in settings.items())), 0)
    return write, events.close


def _wandb(module: Any, title: str, folder: str, run: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    os.makedirs(folder, exist_ok=True)
    key = hashlib.sha256(run.encode()).hexdigest()[:16]
    project = os.environ.get("WANDB_PROJECT", "undo-ray")
    opened = module.init(project=project, name=title, id=key, resume="allow", dir=folder, config=settings)

    def write(step: int, figures: dict[str, float]) -> None:
        # Rounds count from 0 again and again, so each curve has its own step in place of the run's rising one.
        axes = {name.rpartition("/")[0] for name in figures}
        for axis in axes:
            opened.define_metric(f"{axis}/*", step_metric=f"{axis}/step")
        opened.log({**figures, **{f"{axis}/step": step for axis in axes}})

    return write, opened.finish


def _mlflow(module: Any, title: str, folder: str, run: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.makedirs(folder, exist_ok=True)
        module.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "undo-ray"))
    key = hashlib.sha256(run.encode()).hexdigest()[:16]
    known = module.search_runs(filter_string=f"tags.undo_ray = '{key}'", output_format="list", max_results=1)
    module.start_run(run_id=known[0].info.run_id if known else None, run_name=title, tags={"undo_ray": key})
    if not known:
        module.log_params({name: str(value)[:500] for name, value in settings.items()})

    def write(step: int, figures: dict[str, float]) -> None:
        # Of a metric's name MLflow takes no other characters; a subject may be "Counting & Probability".
        module.log_metrics({re.sub(r"[^/\w.\- ]", "_", name): value for name, value in figures.items()}, step=step)

    return write, module.end_run


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}/")
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield f"{prefix}{name}", float(item)
