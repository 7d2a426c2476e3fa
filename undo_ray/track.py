"""Trackers: curves and figures to TensorBoard, Weights & Biases or MLflow, beside the run directory, which stays the record.

They are written by the driver alone, with its environment (`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`…); workers hand their
figures to a small actor that the driver empties. A run directory is one run in each tracker, whatever drivers worked on it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from undo_ray.progress import beside_the_driver
from undo_ray.types import UserError

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
    """The trackers a recipe names, open from the run's start to its end. With none, nothing happens."""

    def __init__(self, names: tuple[str, ...], run: str, settings: dict[str, Any]):
        """`run`: URI of the run directory; its last part names the run. Raises UserError when a package is missing."""
        modules = {name: _imported(name) for name in dict.fromkeys(names)}
        title = run.rstrip("/").rpartition("/")[2]
        # Where a tracker keeps files: beside the run's own when those are on this disk.
        folder = os.path.abspath("track" if "://" in run else os.path.join(run, "track"))
        self._open = [OPEN[name](module, title, folder, run, settings) for name, module in modules.items()]

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Add one point to each curve in `figures`, by their names (`round-00/loss`)."""
        for write, _ in self._open:
            write(step, figures)

    def record(self, record: dict[str, Any]) -> None:
        """The figures of a finished round, as curves over rounds."""
        self.log(record["round"], {f"rounds/{name}": value for name, value in _flat(record) if name != "round"})

    def close(self) -> None:
        for _, close in self._open:
            close()

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
    writer = module.SummaryWriter(os.path.join(folder, "tensorboard"))
    writer.add_text("recipe", "".join(f"    {key} = {value}\n" for key, value in settings.items()))

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


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
        module.log_metrics(figures, step=step)

    return write, module.end_run


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}/")
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield f"{prefix}{name}", float(item)
