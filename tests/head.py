"""A Ray head on this machine that asks for a token, and jobs submitted to it as from somebody's shell."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import runs

RAY = str(Path(sys.executable).with_name("ray"))


class Cluster(NamedTuple):
    gcs: str
    """What RAY_ADDRESS is set to."""
    address: str
    """Of the dashboard, where jobs are submitted."""
    metrics: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def ray(self, *arguments: str, code: int = 0) -> str:
        """`ray ARGUMENTS` as in the shell of whoever submits; its output."""
        command = [RAY, *arguments]
        done = subprocess.run(command, cwd=runs.ROOT, env=self.environment, capture_output=True, text=True, timeout=300)
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        return output

    def submit(self, *arguments: str, options: tuple[str, ...] = (), code: int = 0) -> str:
        submit = ("job", "submit", "--address", self.address, "--working-dir", ".", *options)
        return self.ray(*submit, "--", "python", *arguments, code=code)

    def ready(self) -> bool:
        """Whether jobs are taken: the dashboard is up a while before the agent that starts them."""
        look = [RAY, "job", "submit", "--address", self.address, "--", "true"]
        return not subprocess.run(look, env=self.environment, capture_output=True).returncode

    def alive(self) -> int:
        """Nodes that are up, the head among them."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in found)

    def die(self) -> None:
        """SIGKILL to the head and everything on it."""
        for one in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def wait_for(what: str, found: Callable[[], Any], seconds: float = 120, log: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s\n{log()}"
        time.sleep(0.3)
    return value


@contextlib.contextmanager
def started(*options: str, cpus: int = 4, address: str = "", **variables: str) -> Iterator[Cluster]:
    """`ray start --head` with these options, until the block ends. `address`: IP:PORT of its GCS; default: a free one on
    loopback."""
    free, dashboard, metrics, agent = runs.free_ports(4)
    gcs = address or f"127.0.0.1:{free}"
    ip, port = gcs.split(":")
    home = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets have short names
    (home / "token").touch(0o600)
    (home / "token").write_text(secrets.token_hex(32))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        **variables,
    }
    head = ["start", "--head", "--block", f"--num-cpus={cpus}", f"--port={port}", f"--temp-dir={home}"]
    ports = [f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}", "--dashboard-host=127.0.0.1"]
    ports.append(f"--dashboard-agent-listen-port={agent}")  # the default is taken where another Ray runs
    command, log = [RAY, *head, *ports, f"--node-ip-address={ip}", *options], home / "start.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    found = Cluster(gcs, f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", environment, process)
    try:
        wait_for("job agent", lambda: process.poll() is not None or found.ready())
        assert process.poll() is None, log.read_text()
        yield found
    finally:
        found.die()  # SIGTERM would take it half a minute
        process.wait(60)
        shutil.rmtree(home, ignore_errors=True)
