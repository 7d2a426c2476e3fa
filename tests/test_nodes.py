"""Many nodes: a cluster whose autoscaler adds and takes away nodes, as Ray emulates it on one machine."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from head import Cluster, started, wait_for

pytest.importorskip("ray.job_submission", reason="ray[default] brings the dashboard, which ray[serve] of the extra test brings")
pytestmark = pytest.mark.faults

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
NOTHING = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head with one CPU, and up to three workers with four each, which go after three idle seconds."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    config = {
        "cluster_name": "growing",
        "max_workers": 3,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 10,
        # `type = "fake_multinode"` wants a file that the wheel of Ray 2.60 lacks.
        "provider": {"type": "external", "module": PROVIDER, "head_node_id": FAKE_HEAD_NODE_ID, "launch_multiple": True},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 4}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "head_node_type": "ray.head.default",
        **{key: [] for key in NOTHING},
        **{key: {} for key in ("file_mounts", "auth", "docker")},
    }
    file = tmp_path_factory.mktemp("growing") / "config.yaml"
    file.write_text(json.dumps(config))
    variables = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    import ray

    address = f"{ray.util.get_node_ip_address()}:6379"  # where the emulated nodes look for their head
    with started(f"--autoscaling-config={file}", cpus=1, address=address, **variables) as cluster:
        yield cluster


def engine(replicas: str) -> str:
    return f"teacher.engine={{batch_size = 16, {replicas}, resources = {{cpus = 2.1}}}}"


def begun(cluster: Cluster, run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    return runs.start("mini", run_dir, *runs.SMALL, *overrides, environment={**cluster.environment, "RAY_ADDRESS": cluster.gcs})


def test_a_pool_grows_with_its_cluster_and_both_shrink_again(growing: Cluster, tmp_path: Path) -> None:
    assert growing.alive() == 1
    sets = ("rounds=0", "data.train_limit=1000", engine("replicas = 3, min_replicas = 1"))
    process = begun(growing, tmp_path / "run", *sets)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.append(process.communicate()[0]), daemon=True)
    reader.start()
    most, engines = 0, 0
    while process.poll() is None:
        most = max(most, growing.alive())
        engines = max(engines, len(list((tmp_path / "run").glob("round-00/rationales/resume/generations/*/starts/*.json"))))
        time.sleep(0.5)
    reader.join()
    assert process.returncode == 0, output
    assert most == 4 and engines == 3, f"{most} nodes at most, {engines} engines"
    assert len(runs.rows(tmp_path / "run", "round-00/rationales")) == 1020
    wait_for("idle nodes to go", lambda: growing.alive() == 1, 60)


def test_what_no_growth_can_hold_is_refused_with_what_there_is(growing: Cluster, tmp_path: Path) -> None:
    last = runs.finish(begun(growing, tmp_path / "run", engine("replicas = 5")), code=5).splitlines()[-1]
    assert "teacher.engine: needs 5 × (2.1 CPUs) at a time, beside student.engine" in last
    assert (
        "(1 CPUs), and its autoscaler may add 3 × worker (4 CPUs), 3 nodes at most; lower" in last
        and not (tmp_path / "run/problems").exists()
    )
