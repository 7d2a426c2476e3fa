"""Engines that outlive their stages (`lifetime = "run"`): actors of the driver, one for each replica of a pool.

A stage's replicas then speak to them in place of an engine of their own. They end with the driver that made them, killed or
not, since Ray ends what a dead driver owned; the next driver starts its own.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from undo_ray.config import Engine, Sampling
from undo_ray.types import Message, Row, UserError, got

if TYPE_CHECKING:
    from undo_ray.engines import Local

RELAY_CPUS = 0.1
"""Logical CPUs of a replica that only passes rows on to a kept engine."""

CLAIM_SECONDS = 5.0
"""How long a replica waits for all engines to say whose they are, before it takes one of those that did."""

Held = dict[str, "list[tuple[Any, Any]]"]
"""What a driver keeps, by what it is kept for: each engine's handle, and its placement group where it has one."""


def hosts(held: Held, name: str, engine: Engine, sampling: Sampling, trust: bool, calls: int) -> list[Any]:
    """The engines kept under this name; started when there are none yet, without a model. `calls`: batches at a time."""
    import ray

    if name not in held:
        host, held[name] = ray.remote(Host), []
        for _ in range(engine.replicas):
            where, group = _where(engine)
            where |= {"max_restarts": -1, "max_concurrency": calls + 2}  # beside the batches a claim and a load
            held[name].append((host.options(**where).remote(engine, sampling, trust), group))
    return [handle for handle, _ in held[name]]


def _where(engine: Engine) -> tuple[dict[str, Any], Any]:
    """(Ray's options for one engine, its placement group where its GPUs are on several nodes)."""
    cpus, gpus = engine.resources.cpus, engine.resources.gpus
    if engine.nodes == 1:
        return {"num_cpus": cpus, "num_gpus": gpus or None}, None
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # As vLLM's Ray executor wants it: bundles of one GPU for its workers, and their parent beside one of them, without a GPU.
    share = cpus / gpus
    group = ray.util.placement_group([{"GPU": 1, "CPU": share}] * int(gpus), strategy="PACK")
    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    return {"num_cpus": share, "num_gpus": 0, "scheduling_strategy": inside}, group


def _everywhere(model: Callable[[], str]) -> str:
    """The directory that `model()` gives, once every node of this process's placement group has it: workers open it there."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    if group is None:
        return model()
    bundles = ray.util.placement_group_table(group)["bundles_to_node_id"]
    fetch = ray.remote(num_cpus=0)(_call)
    places = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in {node: n for n, node in bundles.items()}.values()]
    found = {got(ref) for ref in [fetch.options(scheduling_strategy=place).remote(model) for place in places]}
    if len(found) > 1:
        raise UserError(f"the nodes of an engine have its model at different places: {', '.join(sorted(found))}")
    return found.pop()


def _call(model: Callable[[], str]) -> str:
    return model()


def release(held: Held) -> None:
    """End the engines and give their memory back."""
    import ray

    for host, group in [kept for pool in held.values() for kept in pool]:
        ray.kill(host)
        if group is not None:
            ray.util.remove_placement_group(group)
    held.clear()


class Host:
    """An engine in an actor of its own. Which model it holds is told by `load`."""

    def __init__(self, engine: Engine, sampling: Sampling, trust: bool):
        self._engine, self._sampling, self._trust = engine, sampling, trust
        self._local: Local | None = None
        self._claims, self._claimed, self._life = threading.Lock(), ("", ""), uuid.uuid4().hex
        self._loading = threading.Lock()

    def life(self) -> str:
        """Another one in every process that Ray starts for this engine."""
        return self._life

    def nodes(self) -> list[str]:
        """The nodes it is on."""
        import ray

        group = ray.util.get_current_placement_group()
        here = ray.get_runtime_context().get_node_id()
        return [here] if group is None else sorted(set(ray.util.placement_group_table(group)["bundles_to_node_id"].values()))

    def claimed(self, pool: str) -> str | None:
        """The replica of this pool whose engine it is."""
        with self._claims:
            return self._claimed[1] if self._claimed[0] == pool else None

    def claim(self, pool: str, replica: str) -> bool:
        """Whether this engine is the replica's as long as there is its pool: that of the first who asks."""
        with self._claims:
            if self._claimed[0] != pool:
                self._claimed = (pool, replica)
            return self._claimed == (pool, replica)

    def load(self, model: Callable[[], str]) -> bool:
        """Have the model that `model()` gives the directory of; False where only a new process can. See `engines.Backend`."""
        from undo_ray.engines import local

        with self._loading:
            if self._local is not None:
                return self._local.backend.load(_everywhere(model))
            try:
                self._local = local(partial(_everywhere, model), self._engine, self._sampling, self._trust)
            except UserError:
                raise
            except Exception as error:
                raise _plain(error) from None
            return True

    def answer(self, chats: Sequence[list[Message]], seeds: Sequence[int]) -> Iterator[list[tuple[int, Row]]]:
        """As `Speaker.answer`, in lists of what finished since the last one."""
        assert self._local is not None  # a replica loads before it asks
        local, sink = self._local, queue.SimpleQueue[Any]()

        def drain() -> None:
            try:
                for found in local.answer(chats, seeds):
                    sink.put(found)
                sink.put(None)
            except UserError as error:
                sink.put(error)
            except BaseException as error:
                sink.put(_plain(error))

        threading.Thread(target=drain, daemon=True).start()
        while True:
            found = [sink.get()]
            while not sink.empty():
                found.append(sink.get())
            if done := [one for one in found if isinstance(one, tuple)]:
                yield done
            if isinstance(found[-1], BaseException):
                raise found[-1]
            if found[-1] is None:
                return


def _claimed(hosts: Sequence[Any], pool: str, replica: str) -> Any:
    """The engine that is this replica's, which may have been started again; else the first that is free of those that are up,
    or comes up: a node may be hours away, and the others must not wait for it."""
    import ray
    from ray.exceptions import RayActorError

    asked = {host.claimed.remote(pool): host for host in hosts}
    ray.wait(list(asked), num_returns=len(asked), timeout=CLAIM_SECONDS)
    while asked:
        ray.wait(list(asked))
        up, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        late, free = list[Any](), list[Any]()
        for ref in up:
            host = asked.pop(ref)
            try:
                if (whose := got(ref)) == replica:
                    return host
                free += [host] if whose is None else []
            except RayActorError:  # its node went, which Ray may not know yet, or its process is being started again
                late.append(host)
        for host in free:
            try:
                if got(host.claim.remote(pool, replica)):
                    return host
            except RayActorError:
                late.append(host)
        if late:
            time.sleep(1)
            asked |= {host.claimed.remote(pool): host for host in late}
    return hosts[0]


class Kept:
    """See `engines.Speaker`: the engine that is kept for this replica. `pool`: a name that no other pool has."""

    def __init__(self, hosts: Sequence[Any], pool: str, replica: str, model: Callable[[], str]):
        self._host = _claimed(hosts, pool, replica)
        try:
            while not got(self._host.load.remote(model)):
                self._renew()
                if not got(self._host.claim.remote(pool, replica)):  # another was faster
                    self._host = _claimed(hosts, pool, replica)
            self.nodes: Sequence[str] = got(self._host.nodes.remote())
        except Exception:
            self.end()
            raise

    def _renew(self) -> None:
        """Have a new process of the engine, which can load any model."""
        from ray.exceptions import RayActorError

        old = got(self._host.life.remote())
        self.end()
        while True:  # the old one may still answer, and then calls fail until Ray knows that it ended
            with suppress(RayActorError):
                if got(self._host.life.remote()) != old:
                    break
            time.sleep(0.1)

    def answer(self, chats: Sequence[list[Message]], seeds: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """See `engines.Speaker`."""
        for ref in self._host.answer.options(num_returns="streaming").remote(chats, seeds):
            yield from got(ref)

    def end(self) -> None:
        """End the engine's process; Ray starts another."""
        import ray

        ray.kill(self._host, no_restart=False)


def _plain(error: BaseException) -> RuntimeError:
    """An error that pickles, in place of one of the engine's own that may not."""
    logging.getLogger(__name__).error("in a kept engine", exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")
