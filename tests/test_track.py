"""Trackers: what reaches them, by name, and what happens when a package is missing."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
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

    tracker = Tracker(("tensorboard",), str(tmp_path / "run"), {"seed": 0}, print)
    with tracker.following("round-01") as curves:
        ray.get([curves.add.remote(step, {"loss": 4.0 / step, "tokens_per_second": 10.0}) for step in (1, 2)])
    tracker.record(RECORD)
    tracker.close()
    found = scalars(tmp_path / "run/track/tensorboard")
    assert found["round-01/loss", 1] == 4.0 and found["round-01/loss", 2] == 2.0
    assert found["rounds/validation/accuracy", 1] == 0.5 and found["rounds/training/held_out_nll/after", 1] == 1.5


def test_without_trackers_nothing_is_followed_or_written(tmp_path: Path) -> None:
    tracker = Tracker((), str(tmp_path / "run"), {}, print)
    with tracker.following("round-00") as curves:
        assert curves is None
    tracker.record(RECORD)
    tracker.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name, module in MODULES.items() if not importlib.util.find_spec(module)])
def test_a_missing_package_is_one_clear_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf'track = \["{name}"\]: .*`pip install {name}`') as caught:
        Tracker((name,), str(tmp_path / "run"), {}, print)
    assert "\n" not in str(caught.value)


def test_wandb_offline_keeps_the_run_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(("wandb",), str(tmp_path / "run"), {"seed": 0}, print)
    tracker.log(3, {"round-00/loss": 1.0})
    tracker.record(RECORD)
    tracker.close()
    assert list((tmp_path / "run/track/wandb").glob("offline-run-*/run-*.wandb"))


def test_mlflow_goes_on_in_the_run_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said: list[str] = []
    for step in (1, 2):  # two drivers, one after the other
        tracker = Tracker(("mlflow",), str(tmp_path / "run"), {"seed": 0}, said.append)
        tracker.log(step, {"round-00/loss": 1.0 / step})
        tracker.record({**RECORD, "subjects": {"Counting & Probability": {"n": 12}, "term: 'it' [a]": {"n": 3}}})
        tracker.close()
    assert not said, "MLflow takes few characters in names"
    [run] = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.metrics["rounds/subjects/Counting _ Probability/n"] == 12.0
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, "round-00/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5)]


def test_a_tracker_that_fails_stops_nothing_and_is_told_of_once(cluster: None, tmp_path: Path) -> None:
    import ray

    said: list[str] = []
    tracker = Tracker(("tensorboard",), str(tmp_path / "run"), {}, said.append)
    with tracker.following("round-00") as curves:
        ray.get(
            [curves.add.remote(step, {"loss": value}) for step, value in ((1, 4.0), (2, object()), (3, object()), (4, 1.0))]
        )
    tracker.close()
    found = scalars(tmp_path / "run/track/tensorboard")
    assert {point: found[point] for point in found if "loss" in point[0]} == {
        ("round-00/loss", 1): 4.0,
        ("round-00/loss", 4): 1.0,
    }
    [told] = said
    assert told.startswith("track: tensorboard failed (") and told.endswith("; the run goes on, with figures missing there")


def test_a_tracker_that_does_not_open_is_one_line_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "track").mkdir()
    (tmp_path / "track/tensorboard").touch()
    with pytest.raises(
        UserError, match=r'track = \["tensorboard"\]: cannot be opened \(.*File exists.*\); mend that, or take it'
    ):
        Tracker(("tensorboard",), str(tmp_path), {}, print)


def test_a_full_disk_under_a_tracker_does_not_hold_up_the_run(tmp_path: Path) -> None:
    code = """if True:
        import resource, sys
        from undo_ray.track import Tracker
        tracker = Tracker(("tensorboard",), sys.argv[1], {}, print)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for step in range(5000):
            tracker.log(step, {"loss": 1.0})
        tracker.close()
    """
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.startswith("track: tensorboard failed ([Errno 27] File too large") and found.stdout.count("\n") == 1
