"""A run's best student behind Ray Serve, with the OpenAI-compatible API. docs/serving.md is for whoever runs it.

One deployment: each replica holds the whole model and is itself the HTTP application (`hf.py`, `vllm.py`), Serve's proxy
spreads requests over them. The ledger is read without its lease, so a run in progress may be served.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pkgutil
import re
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from undo_ray import placement
from undo_ray.config import MEMORY_KNOBS, Engine
from undo_ray.gap import best
from undo_ray.place import absolute
from undo_ray.store import committed, recipe_of, records, said
from undo_ray.types import UserError, unusable

APP = "undo-ray"
"""The Serve application's name."""

REPLICAS = {"transformers": "undo_ray.serve.hf:Transformers", "vllm": "undo_ray.serve.vllm:VLLM"}
"""Both are built with (model reference, name, engine) and give Serve their ASGI application."""

IN_FLIGHT = 4
"""Requests handed to a transformers replica at a time: one is worked on, the others need not wait for the proxy."""

EXECUTOR, EXECUTORS = "distributed_executor_backend", ("mp", "ray", "uni")
"""vLLM's own, by name. It imports any other text as a class's."""


@dataclass(frozen=True)
class Student:
    """What is served."""

    round: int
    model: str
    """Directory or URI of the model."""
    engine: Engine
    """The run's own, with which the student was measured."""


@dataclass(frozen=True)
class Asked:
    """How to serve it: the flags of `undo-ray serve`."""

    engine: str | None = None
    """`vllm` or `transformers`; None: the run's own."""
    name: str = "student"
    """What clients call the model."""
    replicas: int = 1
    max_replicas: int | None = None
    """Autoscaling goes up to here; None: no autoscaling."""
    gpus: int | None = None
    """Of each replica; None: as many as the run gave its student's engine."""
    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0
    """Seconds that requests in flight have to finish after Ctrl-C or SIGTERM."""


def find(run_dir: str, k: int | None = None) -> Student:
    """The student of round k, else of the best finished round on validation: once a run has ended, that of its report.

    Raises UserError when the directory is not a run's, or the round has no student (yet).
    """
    place = absolute(run_dir)
    recipe = recipe_of(place)
    if k is None:
        try:
            accuracies = [record["validation"]["accuracy"] for record in records(place)]
        except (KeyError, TypeError):
            raise unusable(f"{run_dir}: a record without a validation accuracy; name the round with --round") from None
        if not accuracies:
            raise UserError(f"{run_dir}: no round has finished yet; wait for round 0, or name a trained one with --round")
        k = best(accuracies)
    stage = place / f"round-{k:02d}" / "student"
    manifest = committed(stage)
    if not manifest:
        trained = [name for name in place.names() if committed(place / name / "student")]
        have = ", ".join(sorted(trained)) or "none"
        raise UserError(f"{run_dir}: round {k} has no finished student; rounds that have one: {have}")
    if manifest["kind"] != "model" or not re.fullmatch(r"try-\w+", str(manifest["try"])):
        raise unusable(f"{(stage / 'manifest.json').uri}: not the manifest of a model; move the folder away and run again")
    return Student(k, (stage / manifest["try"] / "model").uri, recipe.student.engine)


def run(run_dir: str, k: int | None, asked: Asked, start_ray: Callable[[], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; requests in flight then have `asked.drain` seconds to finish.

    Raises UserError for whatever the person serving can mend, before Ray starts where it can be known then.
    """
    student = find(run_dir, k)
    engine = served(student.engine, asked)
    _check(asked, engine)
    start_ray()
    _check_cluster(asked, engine)
    say(f"round {student.round} of {run_dir} comes up as {asked.name!r}: {asked.replicas} x {engine.kind}")
    # Ray has set its own handler for SIGTERM by now, which would end the replicas at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        _deploy(student.model, engine, asked)
        say(f"serving on http://{asked.host}:{asked.port}/v1 (Ctrl-C ends it)")
        while True:
            signal.pause()
    except KeyboardInterrupt:
        say(f"stopping: requests in flight have {asked.drain:g} s to finish")
    finally:
        _end()


def say(text: str) -> None:
    print(f"undo-ray: {text}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def served(engine: Engine, asked: Asked) -> Engine:
    """The run's engine as it is served. Of what a run directory says of vLLM only the memory knobs are taken: other arguments
    could name code or weights to load, and so could an executor, which vLLM imports when it is none of its own."""
    kind = asked.engine or engine.kind
    taken = MEMORY_KNOBS if engine.kwargs.get(EXECUTOR) in EXECUTORS else MEMORY_KNOBS - {EXECUTOR}
    kwargs = {name: value for name, value in engine.kwargs.items() if name in taken} if kind == "vllm" else {}
    update: dict[str, Any] = {"kind": kind, "kwargs": kwargs, "nodes": 1}  # a replica of Ray Serve lies on one
    if kind == "transformers":
        update |= {"tensor_parallel": 1, "pipeline_parallel": 1}
    if asked.gpus is not None:
        parts = max(1, asked.gpus) if kind == "vllm" else 1
        resources = engine.resources.model_copy(update={"gpus": asked.gpus})
        update |= {"resources": resources, "tensor_parallel": parts, "pipeline_parallel": 1}
    return engine.model_copy(update=update)


def _check(asked: Asked, engine: Engine) -> None:
    """What can be known without Ray."""
    if asked.replicas < 1 or (asked.max_replicas is not None and asked.max_replicas < asked.replicas):
        raise UserError("--replicas: give 1 or more, and --max-replicas at least as many")
    if asked.gpus is not None and asked.gpus < 0:
        raise UserError("--gpus: give 0 or more")
    if not asked.drain >= 0:
        raise UserError("--drain: give 0 or more seconds")
    if not 0 < asked.port < 65536:
        raise UserError(f"--port {asked.port}: give one from 1 to 65535")
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError('Ray Serve is not installed: pip install "ray[serve]==2.60.0" (the cpu extra is without it)')
    if engine.kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm: vllm is not installed; install the gpu extra, or give --engine transformers")
    if not os.environ.get("RAY_ADDRESS"):  # on a cluster the proxy is on its head node
        try:
            # Without SO_REUSEPORT, which Serve sets: with it two servers would silently share the port.
            with socket.socket(socket.AF_INET6 if ":" in asked.host else socket.AF_INET) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((asked.host, asked.port))
        except OSError as error:
            raise UserError(
                f"{asked.host}:{asked.port}: cannot be listened on ({error.strerror}); give another --port or --host"
            ) from None


def _check_cluster(asked: Asked, engine: Engine) -> None:
    """Raises UserError when Serve runs already, or (exit code 5) when the cluster can never hold the replicas asked for."""
    from ray import serve as ray_serve

    if ray_serve.status().proxies:
        raise UserError("Ray Serve already runs on this cluster, with a host and port of its own; end it with `serve shutdown`")
    each = engine.resources
    placement.check([placement.Ask("--replicas", asked.replicas, (float(each.gpus), float(each.cpus)), [])], say)


def _deploy(model: str, engine: Engine, asked: Asked) -> None:
    """Start Serve and the replicas, and wait until all of them answer."""
    from ray import serve as ray_serve

    at_a_time = engine.sequences if engine.kind == "vllm" else IN_FLIGHT
    logs = {"log_level": "WARNING", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    scaling: dict[str, Any] = {"num_replicas": asked.replicas}
    if asked.max_replicas is not None:
        limits = {"min_replicas": asked.replicas, "max_replicas": asked.max_replicas}
        scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": at_a_time / 2}}
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": asked.host, "port": asked.port}, logging_config=logs)
    deployment = ray_serve.deployment(
        ray_serve.ingress()(pkgutil.resolve_name(REPLICAS[engine.kind])),
        name="student",
        max_ongoing_requests=at_a_time,
        graceful_shutdown_timeout_s=asked.drain,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": engine.resources.cpus, "num_gpus": engine.resources.gpus},
        logging_config=logs,
        **scaling,
    )
    try:
        ray_serve.run(deployment.bind(model, asked.name, engine), name=APP)
    except RuntimeError:
        found = ray_serve.status().applications[APP]
        text = "\n".join([found.message, *(one.message for one in found.deployments.values())])
        last = [line.strip() for line in text.splitlines() if line.strip()][-1]
        unknown = UserError(f"the student did not come up: {last}; --verbose shows more", exit_code=1)
        raise (said(text) or unknown) from None


def _end() -> None:
    """First the application, so that the proxy stays up while replicas finish what they have; then Serve and Ray."""
    import ray
    from ray import serve as ray_serve

    while APP in ray_serve.status().applications:
        try:
            ray_serve.delete(APP)
        except TimeoutError:  # Ray waits 60 s at a time; Serve itself ends a replica whose time is over
            continue
    if os.environ.get("RAY_ADDRESS"):  # a Ray of our own takes Serve with it
        ray_serve.shutdown()
    ray.shutdown()
