"""Whether a cluster can ever hold what a recipe asks for at a time, counting the nodes its autoscaler may add."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from undo_ray.config import Engine, Placement, Recipe
from undo_ray.engines.kept import RELAY_CPUS
from undo_ray.place import Json
from undo_ray.types import UserError

Shape = tuple[float, float]
"""(GPUs, CPUs) of a node, or of what must lie on one."""

HEAD = "node:__internal_head__"
"""What Ray marks the head node with."""

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Of a pod, as Kubernetes mounts it."""


class Ask(NamedTuple):
    """What is held at a time. `n` × `each` is what `key` of the recipe asks for, `beside` what is there meanwhile."""

    key: str
    n: int
    each: Shape
    beside: list[Shape]
    note: str = ""


class Kind(NamedTuple):
    """One node that is there, or a node type of an autoscaler with how many it may start."""

    name: str
    each: Shape
    n: int


def asked(recipe: Recipe, training: bool = True) -> list[Ask]:
    """What the stages of a run ask for, one after another; without `training`, those of an evaluation, which has the student's
    engines alone. Engines that are kept lie beside all of them."""
    student = recipe.student
    pools: dict[str, Engine] = {"teacher.engine": recipe.teacher.engine} if training else {}
    pools["student.engine"] = student.engine
    kept = {key: engine for key, engine in pools.items() if engine.lifetime == "run"}
    found = []
    asks = [(key, (engine.min_replicas or engine.replicas) * engine.nodes, _part(engine)) for key, engine in pools.items()]
    if training:
        asks.append(("student.workers", student.workers, _shape(student.resources)))
    for key, count, each in asks:
        others = [other for other in kept if other != key]
        beside = _parts(kept[other] for other in others)
        beside += [(0.0, 1.0)] if key in pools else []  # what reads, grades and writes
        beside += [(0.0, RELAY_CPUS)] * (pools[key].replicas if key in kept else 0)
        note = f', beside {" and ".join(others)} (lifetime = "run")' if others else ""
        found.append(Ask(key, count, each, beside, note))
    if training and "student.engine" in kept and student.engine.kind == "vllm" and student.engine.nodes == 1:
        note = ", beside all engines that are kept, to check an export"
        found.append(Ask("student.engine", 1, _part(student.engine), _parts(kept.values()), note))
    return found


def _parts(engines: Iterable[Engine]) -> list[Shape]:
    """What all replicas of these engines hold, node by node."""
    return [_part(engine) for engine in engines for _ in range(engine.replicas * engine.nodes)]


def _shape(each: Placement, nodes: int = 1) -> Shape:
    return each.gpus / nodes, each.cpus / nodes


def _part(engine: Engine) -> Shape:
    """What one of its nodes gives an engine."""
    return _shape(engine.resources, engine.nodes)


def holds(ask: Ask, there: Sequence[Kind], types: Sequence[Kind] = (), limit: int = 0) -> bool:
    """Whether the nodes that are there and up to `limit` more of these types hold it all at a time: the largest parts first,
    each where it leaves the least room, else on a new node of the smallest type that takes it."""
    open_nodes = [list(node.each) for node in there]
    # No more of one type than there are parts: KubeRay's default is 2³¹ nodes.
    parts = ask.n + len(ask.beside)
    left = sorted(kind.each for kind in types for _ in range(min(kind.n, limit, parts)))
    for part in sorted([*[ask.each] * ask.n, *ask.beside], reverse=True):
        fitting = [node for node in open_nodes if all(room >= need - 1e-6 for room, need in zip(node, part, strict=True))]
        if not fitting:
            new = next((each for each in left if each[0] >= part[0] and each[1] >= part[1]), None)
            if new is None or len(open_nodes) == len(there) + limit:
                return False
            left.remove(new)
            fitting = [list(new)]
            open_nodes += fitting
        node = min(fitting)
        node[0], node[1] = node[0] - part[0], node[1] - part[1]
    return True


def check(asks: Sequence[Ask], say: Callable[[str], Any]) -> None:
    """Raises UserError (exit code 5) with what is asked and what there is when the cluster can never hold one of them.

    Where an autoscaler may add nodes but its configuration cannot be seen from this process, that is said, and nothing raised.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    there = [Kind(node["NodeManagerHostname"], _resources(node["Resources"]), 1) for node in nodes]
    wanting = [ask for ask in asks if not holds(ask, there)]
    if not wanting:
        return
    head = next(index for index, node in enumerate(nodes) if HEAD in node["Resources"])
    here, config, hidden = ray.get_runtime_context(), None, None
    if nodes[head]["NodeID"] != here.get_node_id():
        hidden = "this driver is not on the head node"
    else:
        try:
            config = _autoscaler(here.gcs_address)
        except Exception as error:  # Kubernetes says no in many ways
            hidden = f"{type(error).__name__}: {error}"[:200]
    types, limit = grown(config) if config else ([], 0)
    there = [there[head]] if config else there
    wanting = [ask for ask in wanting if not holds(ask, there, types, limit)]
    if not wanting:
        return
    ask = wanting[0]
    what = f"{ask.key}: needs {ask.n} × ({_said(ask.each)}) at a time{ask.note}; the cluster has "
    what += ", ".join(f"{node.name} ({_said(node.each)})" for node in there)
    if config:
        may = " or ".join(f"{kind.n} × {kind.name} ({_said(kind.each)})" for kind in types)
        what += f", and its autoscaler may add {may}, {limit} nodes at most"
    if hidden:
        say(f"{what}; whether it can grow is not seen from here ({hidden}): if it cannot, the stage will wait for ever")
        return
    raise UserError(f"{what}; lower replicas, workers or resources in the recipe, or run on a larger cluster", exit_code=5)


def grown(config: Json) -> tuple[list[Kind], int]:
    """(node types, how many nodes in all) that an autoscaler's configuration allows beside the head. As in `cluster.yaml`."""
    limit = int(config.get("max_workers", 2))  # Ray's own default
    types = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    most = {name: int(kind.get("max_workers", limit)) for name, kind in types.items()}
    return [Kind(name, _resources(kind.get("resources", {})), most[name]) for name, kind in types.items()], limit


def _resources(found: Mapping[str, float]) -> Shape:
    return float(found.get("GPU", 0)), float(found.get("CPU", 0))


def _said(shape: Shape) -> str:
    gpus, cpus = shape
    return " and ".join([f"{gpus:g} GPUs"] * bool(gpus) + [f"{cpus:g} CPUs"])


def _autoscaler(gcs: str) -> Json | None:
    """The configuration of the autoscaler that runs beside this process, on the head node; None where there is none.

    KubeRay's is made from the RayCluster it belongs to; that of `ray up` is a file that Ray's monitor was started with.
    """
    if "KUBERNETES_SERVICE_HOST" in os.environ and "RAY_CLUSTER_NAME" in os.environ:
        from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

        return dict(AutoscalingConfigProducer(os.environ["RAY_CLUSTER_NAME"], NAMESPACE.read_text().strip())())
    import yaml

    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if any(part.endswith("/monitor.py") for part in line) and f"--gcs-address={gcs}" in line:
            for part in line:
                if part.startswith("--autoscaling-config="):
                    return dict(yaml.safe_load(Path(part.partition("=")[2]).expanduser().read_text(encoding="utf-8")))
    return None
