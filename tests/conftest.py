"""What every test needs: an environment set before any heavy import, and the benchmark files where there are some.

Only what keeps tests quiet, offline and fair to a small machine is set here. What the product needs in order to work
it sets itself, so that a test cannot pass by a setting a user does not have.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # several processes share two cores; more threads each only wait for one another
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads sleep and leave the core to the other workers
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warns at every fork otherwise
    "HF_HUB_OFFLINE": "1",  # models are made on the spot: a test that reaches for the Hub is wrong
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DS_ACCELERATOR": "cpu",  # DeepSpeed warns when it has to find out
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real benchmark files that UNDO_RAY_TEST_DATA names; skips where it is unset."""
    named = os.environ.get("UNDO_RAY_TEST_DATA")
    if not named:
        pytest.skip("UNDO_RAY_TEST_DATA is unset: it names the folder with the real benchmark files")
    path = Path(named)
    assert path.is_dir(), f"UNDO_RAY_TEST_DATA={named} is not a folder"
    return path


def pytest_sessionfinish() -> None:
    """Stop a Ray that a test started in this process: its processes would outlive a failed run."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="session")
def cluster() -> None:
    """A local Ray in this process, started as a run starts it."""
    from undo_ray import loop

    loop.start_ray(verbose=False)


@pytest.fixture(scope="session")
def address(cluster: None) -> str:
    """That Ray's, as RAY_ADDRESS has it."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def joined(address: str) -> Iterator[None]:
    """Runs that a module's tests start join the Ray of `cluster`, as jobs do: one of its own takes each seven seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", address)
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """`HOST:PORT` of an S3 service on this machine, with a bucket `runs`.

    In a process of its own: vLLM 0.32 looks at all that the modules of its process hold, and fails at proxies of Flask's, which
    moto's server imports.
    """
    for package in ("moto", "flask", "flask_cors"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: moto is the S3 service of these tests")
    import pyarrow.fs as pafs
    import runs

    [port] = runs.free_ports(1)
    address = f"127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "http_proxy", "HTTP_PROXY"):
            patch.delenv(name, raising=False)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        options = {"scheme": "http", "region": "us-east-1", "allow_bucket_creation": True}
        for left in reversed(range(120)):
            try:
                pafs.S3FileSystem(endpoint_override=address, **options).create_dir("runs")
                break
            except OSError:  # it is not up yet
                assert left and server.poll() is None
                time.sleep(0.5)
        yield address
        server.kill()


@pytest.fixture(scope="session", autouse=True)
def begun_on_s3(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any] | None]:
    """A run of `mini` with runs.SHUFFLED whose directory is on S3: its URI and its process. It goes on beside the first tests,
    which work on one core."""
    if not any("on_s3" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    import runs

    uri = f"s3://runs/whole?endpoint_override={request.getfixturevalue('s3')}&scheme=http&region=us-east-1"
    environment = {
        "RAY_ADDRESS": "",  # a Ray of its own, whose workers have the service's keys
        "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "1",  # as for a cluster whose nodes take half an hour to come
    }
    process = runs.start("mini", uri, *runs.SHUFFLED, environment=environment)
    yield uri, process
    process.kill()


@pytest.fixture(scope="session")
def on_s3(begun_on_s3: tuple[str, Any]) -> tuple[str, str]:
    """That run, finished: its URI, and what it printed."""
    import runs

    uri, process = begun_on_s3
    return uri, runs.finish(process)


@pytest.fixture(scope="session")
def shuffled(on_s3: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that run's directory on this machine."""
    from undo_ray.place import Place

    run_dir = tmp_path_factory.mktemp("shuffled") / "run"
    Place(on_s3[0]).download(str(run_dir), ["*"])
    return run_dir
