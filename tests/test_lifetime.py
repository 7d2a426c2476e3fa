"""Engines and their stages: what comes up, what stays up, what is given back."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs
import tiny

from undo_ray import engines
from undo_ray.config import Engine, Placement, Sampling
from undo_ray.engines import kept
from undo_ray.place import Place
from undo_ray.store import said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two of one shape with other weights."""
    texts = [f"count {i}" for i in range(50)]
    return [tiny.make(tmp_path_factory.mktemp(f"model{seed}"), "llama", texts, seed=seed) for seed in (3, 4)]


def work(model: str, journal: Path, **engine: Any) -> engines.Work:
    def ask(row: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"count {row['n']}"}]

    return engines.Work(
        name="student",
        engine=Engine(**{"context": 512, "batch_size": 4, **engine}),
        model=partial(str, model),
        sampling=Sampling(max_tokens=8),
        render=lambda: ask,  # type: ignore[arg-type, return-value]
        column="out",
        seeds=lambda row: [0],
        journal=Place(str(journal)),
    )


def texts(job: engines.Work, held: kept.Held) -> list[str]:
    """What a stage over 24 rows writes."""
    import ray.data

    rows = ray.data.from_items([{"n": n} for n in range(24)], override_num_blocks=6)
    found = {row["n"]: row["out"][0] for row in engines.generate(rows, job, held).take_all()}
    assert all(out["engine_error"] is None for out in found.values())
    return [found[n]["text"] for n in range(24)]


def reference(directory: str) -> list[str]:
    """Plain greedy `generate`, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    found = []
    for n in range(24):
        ids = torch.tensor([engines.prompt_ids(tokenizer, [{"role": "user", "content": f"count {n}"}])])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        found.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def named(name: str) -> set[int]:
    """Process ids of this test's Ray workers that are at work as this class."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            found |= {process.pid} if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}") else set()
        except psutil.Error:
            continue
    return found


def resources() -> dict[str, float]:
    import ray

    return {kind: amount for kind, amount in ray.available_resources().items() if kind in ("CPU", "GPU")}


def idle() -> dict[str, float]:
    """All there is, once the tests before have given theirs back."""
    import ray

    there = {kind: amount for kind, amount in ray.cluster_resources().items() if kind in ("CPU", "GPU")}
    deadline = time.monotonic() + 30
    while resources() != there:
        assert time.monotonic() < deadline, f"{resources()} of {there}"
        time.sleep(0.1)
    return there


def test_three_stages_take_turns_on_one_slot_and_each_gives_it_back(cluster: None, models: list[str], tmp_path: Path) -> None:
    """An engine takes three of the four CPUs: the next stage's cannot start before it is gone (ray#64035, #53124, #54361)."""
    before = idle()
    for stage, model in enumerate([models[0], models[1], models[0]]):
        texts(work(model, tmp_path / str(stage), resources=Placement(cpus=3)), {})
        deadline = time.monotonic() + 30
        while resources() != before:
            assert time.monotonic() < deadline, f"after stage {stage}: {resources()}, before: {before}"
            time.sleep(0.1)


def test_kept_engines_serve_stage_after_stage_with_the_weights_of_each(
    cluster: None, models: list[str], tmp_path: Path
) -> None:
    before, held = idle(), kept.Held()
    wanted, processes = {model: reference(model) for model in models}, []
    for stage, model in enumerate([models[0], models[1], models[1], models[0]]):
        job = work(model, tmp_path / str(stage), replicas=2, lifetime="run", resources=Placement(cpus=0.5))
        assert texts(job, held) == wanted[model]
        processes.append(named("Host"))
    assert len(processes[0]) == 2 and all(found == processes[0] for found in processes)
    kept.release(held)
    deadline = time.monotonic() + 30
    while named("Host") & processes[0] or resources() != before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_every_pool_of_a_stage_has_all_engines_that_are_kept(cluster: None, models: list[str], tmp_path: Path) -> None:
    """A stage that asks again, of what is left, has one pool after another."""
    held, at_work = kept.Held(), list[list[float]]()
    for wave in range(3):
        job = work(models[0], tmp_path / "stage", replicas=2, lifetime="run", resources=Placement(cpus=0.5))
        job = dataclasses.replace(job, sampling=Sampling(max_tokens=200), seeds=lambda row, wave=wave: [wave])
        before = {pid: sum(psutil.Process(pid).cpu_times()[:2]) for pid in named("Host")}
        texts(job, held)
        at_work.append([sum(psutil.Process(pid).cpu_times()[:2]) - before.get(pid, 0.0) for pid in named("Host")])
    kept.release(held)
    for seconds in at_work[1:]:
        assert len(seconds) == 2 and min(seconds) > 0.25 * max(seconds), at_work


def test_where_weights_cannot_be_exchanged_a_kept_engine_starts_anew(cluster: None, tmp_path: Path) -> None:
    """vLLM's CPU build with tied embeddings, where exchanging them would leave the old head."""
    pytest.importorskip("vllm")
    tied = [tiny.make(tmp_path / f"tied{seed}", "qwen2", [f"count {i}" for i in range(50)], seed=seed) for seed in (3, 4)]
    held = kept.Held()
    for stage, model in enumerate(tied):
        job = work(model, tmp_path / str(stage), kind="vllm", lifetime="run", resources=Placement(cpus=0.5))
        assert texts(job, held) == reference(model)
    kept.release(held)


GPUS_BY_NAME = """
import importlib.abc, importlib.machinery, sys

class Named(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "vllm.platforms.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        plain = spec.loader.exec_module

        def exec_module(module):
            plain(module)
            module.CpuPlatform.ray_device_key = "GPU"
            module.CpuPlatform.device_control_env_var = "ANY"

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Named())
"""
"""vLLM's CPU build takes what Ray calls GPUs for its devices: its Ray executor wants devices with a name."""

OVER_NODES = """
import json, pathlib, sys, time
import ray
from ray.cluster_utils import Cluster
from undo_ray.config import Engine, Placement, Sampling
from undo_ray.engines import kept

def model(directory=sys.argv[1], looked=pathlib.Path(sys.argv[2])):
    (looked / ray.get_runtime_context().get_node_id()).touch()
    return directory

def free():
    return {key: ray.available_resources().get(key, 0) for key in ("CPU", "GPU")}

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=4, num_gpus=1).node_id for _ in range(2)]
ray.init(cluster.address, log_to_driver=False)
before, held = free(), kept.Held()
parts = {"tensor_parallel": 2, "nodes": 2, "resources": Placement(cpus=6, gpus=2)}
plainly = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
engine = Engine(kind="vllm", lifetime="run", context=512, kwargs=plainly, **parts)
[host] = kept.hosts(held, "teacher", engine, Sampling(max_tokens=8), False, 1)
assert ray.get(host.load.remote(model))
chats, out = [[{"role": "user", "content": f"count {n}"}] for n in range(24)], {}
for ref in host.answer.options(num_returns="streaming").remote(chats, [0] * 24):
    out.update(ray.get(ref))
during = free()
kept.release(held)
while free() != before:
    time.sleep(0.1)
print(json.dumps([nodes, before, during, [out[n]["text"] for n in range(24)]]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_an_engine_over_two_nodes_answers_as_one_does(models: list[str], tmp_path: Path) -> None:
    """vLLM's own Ray executor, a layer split over workers on two emulated nodes, and the model fetched on both."""
    pytest.importorskip("vllm")
    looked = tmp_path / "looked"
    looked.mkdir()
    (tmp_path / "sitecustomize.py").write_text(GPUS_BY_NAME)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [sys.executable, "-c", OVER_NODES, models[0], str(looked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=runs.ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    nodes, before, during, found = json.loads(done.stdout.splitlines()[-1])
    assert found == reference(models[0])
    assert {file.name for file in looked.iterdir()} == set(nodes)
    assert before == {"CPU": 9, "GPU": 2} and during == {"CPU": 3, "GPU": 0}


@pytest.mark.parametrize(
    ("lifetime", "says"),
    [
        ("stage", "out of memory"),
        ("stage", "its process was killed while it started"),
        ("run", r"not up after 1 s \(engine.start_seconds\)"),
    ],
)
def test_an_engine_that_does_not_come_up_is_tried_twice_and_the_stage_ends_with_what_to_change(
    cluster: None, models: list[str], tmp_path: Path, lifetime: str, says: str
) -> None:
    import ray.data
    from ray.exceptions import RayError

    directory = models[0]

    def broken() -> str:
        """No model at all."""
        raise RuntimeError("CUDA out of memory, said the device")

    def killed() -> str:
        """As the system does where the memory is short."""
        os.kill(os.getpid(), signal.SIGKILL)
        return directory

    def slow() -> str:
        """The model's directory; from here on it takes a minute to load in this process."""
        import transformers

        transformers.AutoModelForCausalLM.from_pretrained = lambda *_, **__: time.sleep(60)  # type: ignore[method-assign]
        return directory

    job = work(directory, tmp_path, lifetime=lifetime, start_seconds=1.0)
    job = dataclasses.replace(job, model=slow if lifetime == "run" else killed if "killed" in says else broken)
    held = kept.Held()
    try:
        with pytest.raises(RayError) as error:
            engines.generate(ray.data.from_items([{"n": 0}]), job, held).take_all()
    finally:
        kept.release(held)
    told = said(str(error.value))
    assert told and told.exit_code == 5 and "engine.kwargs.gpu_memory_utilization" in str(told)
    assert re.match(rf"the student's engine did not start, 2 times: .*{says}", str(told))


def test_a_stage_does_not_wait_for_an_engine_whose_node_is_not_there(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(kept, "CLAIM_SECONDS", 2.0)
    host, engine = ray.remote(kept.Host), (Engine(), Sampling(), False)
    away = host.options(num_cpus=0, resources={"a node that is away": 1}).remote(*engine)
    up = [host.options(num_cpus=0, max_restarts=-1).remote(*engine) for _ in range(2)]
    ray.get([one.life.remote() for one in up])
    taken = [kept._claimed([away, *up], "pool", replica) for replica in ("r1", "r2")]
    assert {one._actor_id for one in taken} == {one._actor_id for one in up}
    again = kept._claimed([up[0], up[1], away], "pool", "r2")
    assert again._actor_id == taken[1]._actor_id, "a replica that is started again has its own engine"
    ray.kill(up[0], no_restart=False)
    assert kept._claimed([up[0]], "another pool", "r3")._actor_id == up[0]._actor_id, "one that is started again is waited for"
    for one in (away, *up):
        ray.kill(one)


def test_one_engine_serves_all_rounds_and_a_killed_driver_leaves_none_behind(joined: None, tmp_path: Path) -> None:
    """vLLM as the teacher on a cluster that outlives its drivers; the driver is killed when two rounds were explained."""
    pytest.importorskip("vllm")
    engine = 'kind = "vllm", context = 1024, batch_size = 32, lifetime = "run", resources = {cpus = 0.5}'
    sets = [*runs.SMALL, f"teacher.engine={{{engine}}}"]
    deadline = time.monotonic() + 60
    while named("Host"):
        assert time.monotonic() < deadline, "the engines of the tests before are still there"
        time.sleep(0.2)
    process, started = runs.start("mini", tmp_path / "run", *sets), set[int]()
    stages = [tmp_path / f"run/round-0{k}/rationales/manifest.json" for k in (0, 1)]
    deadline = time.monotonic() + 400
    while not stages[1].exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        started |= named("Host")
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(started) == 2, "one engine for the teacher and one for the student, over two rounds"
    deadline = time.monotonic() + 60
    while named("Host") & started:
        assert time.monotonic() < deadline, "Ray ends what a dead driver owned"
        time.sleep(0.2)
    starts = [json.loads(stage.read_text())["figures"]["engine_start_seconds"] for stage in stages]
    assert starts[1] < starts[0] / 3, "start-up is paid once"
