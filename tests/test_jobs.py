"""Jobs on a cluster that asks for a token: submitted, looked at from outside, stopped, submitted again, and failing."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from head import Cluster, started, wait_for

pytest.importorskip("ray.job_submission", reason="jobs need ray[default], which ray[serve] of the extra test brings")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started() as found:
        yield found


def metrics(cluster: Cluster) -> list[str]:
    with urllib.request.urlopen(cluster.metrics, timeout=10) as answer:
        return [line for line in answer.read().decode().splitlines() if "undo_ray_" in line and not line.startswith("#")]


def test_a_job_is_followed_stopped_and_goes_on_when_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    run_dir, job = tmp_path / "run", "first"
    sets = runs.sets(*runs.SMALL, "rounds=0", "data.train_limit=400")
    command = ("jobs/undo.py", "jobs/recipes/mini.toml", "--run-dir", str(run_dir), *sets)
    slowly = runs.sets("teacher.engine.batch_size=1")  # progress.json is written every ten seconds
    cluster.submit(*command, *slowly, options=("--no-wait", "--submission-id", job))
    kept = run_dir / "progress.json"

    def at_work() -> bool:
        return kept.exists() and "tokens" in json.loads(kept.read_bytes())["figures"]

    wait_for("rows", at_work, 240, lambda: cluster.ray("job", "logs", "--address", cluster.address, job))
    found = status(run_dir)
    assert found["state"] == "running" and found["driver"]["seconds_ago"] < 60
    current, figures = found["current"], found["current"]["figures"]
    assert 0 < figures["done"] <= figures["total"] == 412
    labels = [f'run="{run_dir}"', f'round="{current["round"]}"', f'stage="{current["stage"]}"', "undo_ray_done"]
    [done] = wait_for("metrics", lambda: [line for line in metrics(cluster) if all(label in line for label in labels)])
    assert 0 < float(done.split()[-1]) <= 412
    assert "round 0" in cluster.ray("job", "logs", "--address", cluster.address, job)
    cluster.ray("job", "stop", "--address", cluster.address, job)
    assert status(run_dir)["state"] in ("killed", "stopped") and not (run_dir / "report.json").exists()

    output = cluster.submit(*command)
    assert "succeeded" in output and "best round" in output
    assert runs.report(run_dir)["resumes"] == 1 and status(run_dir)["state"] == "finished"


def test_a_job_that_fails_passes_it_on_with_its_line(cluster: Cluster, tmp_path: Path) -> None:
    output = cluster.submit("jobs/undo.py", "jobs/recipes/mini.toml", "--run-dir", "runs/here", code=1)
    assert "a job's working directory is a temporary copy; give an absolute path or a URI" in output


@pytest.mark.slow  # Ray tries for 20 s
def test_a_run_that_the_cluster_does_not_know_ends_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    strange = {"RAY_ADDRESS": cluster.gcs, "RAY_AUTH_MODE": "disabled"}
    [line] = runs.finish(runs.start("mini", tmp_path / "run", environment=strange), code=5).splitlines()
    assert line.startswith(f"undo-ray: RAY_ADDRESS={cluster.gcs}: cannot join this Ray: ") and "RAY_AUTH_TOKEN" in line


def test_without_the_token_nothing_is_taken(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=10)
    assert caught.value.code in (401, 403)


def status(run_dir: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "undo_ray", "status", str(run_dir), "--json"], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
