"""Trackers: what reaches them, by name, and what happens when a package is missing."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest

from undo_ray.track import MODULES, Tracker
from undo_ray.types import UserError

RECORD = {
    "round": 1,
    "validation": {"n": 50, "accuracy": 0.5, "low": 0.4},
    "training": {"held_out_nll": {"before": 2.0, "after": 1.5}, "resumes": []},
    "finished": "2026-01-31T23:59:59Z",
}


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of all TensorBoard event files in a folder, by the format's own framing."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        data, start = path.read_bytes(), 0
        while start < len(data):
            [length] = struct.unpack("<Q", data[start : start + 8])
            event = Event.FromString(data[start + 12 : start + 12 + length])
            found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
            start += 16 + length
    return found


def test_curves_of_workers_and_figures_of_rounds_reach_tensorboard(cluster: None, tmp_path: Path) -> None:
    import ray

    tracker = Tracker(("tensorboard",), str(tmp_path / "run"), {"seed": 0})
    with tracker.following("round-01") as curves:
        ray.get([curves.add.remote(step, {"loss": 4.0 / step, "tokens_per_second": 10.0}) for step in (1, 2)])
    tracker.record(RECORD)
    tracker.close()
    found = scalars(tmp_path / "run/track/tensorboard")
    assert found["round-01/loss", 1] == 4.0 and found["round-01/loss", 2] == 2.0
    assert found["rounds/validation/accuracy", 1] == 0.5 and found["rounds/training/held_out_nll/after", 1] == 1.5


def test_without_trackers_nothing_is_followed_or_written(tmp_path: Path) -> None:
    tracker = Tracker((), str(tmp_path / "run"), {})
    with tracker.following("round-00") as curves:
        assert curves is None
    tracker.record(RECORD)
    tracker.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name, module in MODULES.items() if not importlib.util.find_spec(module)])
def test_a_missing_package_is_one_clear_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf'track = \["{name}"\]: .*`pip install {name}`') as caught:
        Tracker((name,), str(tmp_path / "run"), {})
    assert "\n" not in str(caught.value)


def test_wandb_offline_keeps_the_run_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(("wandb",), str(tmp_path / "run"), {"seed": 0})
    tracker.log(3, {"round-00/loss": 1.0})
    tracker.record(RECORD)
    tracker.close()
    assert list((tmp_path / "run/track/wandb").glob("offline-run-*/run-*.wandb"))


def test_mlflow_goes_on_in_the_run_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for step in (1, 2):  # two drivers, one after the other
        tracker = Tracker(("mlflow",), str(tmp_path / "run"), {"seed": 0})
        tracker.log(step, {"round-00/loss": 1.0 / step})
        tracker.close()
    [run] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, "round-00/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5)]
