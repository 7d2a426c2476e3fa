"""What only a GPU can show, on one NVIDIA GPU; skipped without one.

    pytest tests/test_gpu.py -s

Attention of packed rows by variable-length flash attention, the sharding modes over NCCL, the memory formula against CUDA's own
count, and the loop whose teacher, training and student take turns on one GPU.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from test_sharding import TEXTS, alone, chats, check, curve, row, spec

from undo_ray.config import Student
from undo_ray.train import memory, model, sharding

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU on this machine", allow_module_level=True)

os.environ["DS_ACCELERATOR"] = "cuda"
GPU = torch.device("cuda", 0)
HALF = {"dtype": "bfloat16", "resources": {"gpus": 1}}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.make(tmp_path_factory.mktemp("student"), "qwen2", TEXTS, seed=3)


def test_no_chat_of_a_row_sees_another_in_flash_attention(student: str) -> None:
    several = chats(1, 24)
    net = model.Scored(model.load(student, spec(**HALF))).to(GPU)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        together = float(net(model.batch(row(several), GPU)))
        apart = [float(net(model.batch(row([chat]), GPU))) for chat in several]
    singles = [alone(student, *chat) for chat in several]
    assert together == pytest.approx(sum(singles), rel=2e-3)
    assert apart == pytest.approx(singles, rel=2e-2, abs=2e-2)


def test_a_sliding_window_is_kept_inside_each_chat_in_flash_attention() -> None:
    from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

    AttentionInterface.register(model.ATTENTION, model.packed_attention)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = MistralForCausalLM(MistralConfig(vocab_size=300, num_key_value_heads=1, sliding_window=8, **sizes)).eval()
    lm.set_attn_implementation(model.ATTENTION)
    with torch.no_grad():
        expected = float(model.Scored(lm)(model.batch(row(chats(2, 4)), torch.device("cpu"))))
        with torch.autocast("cuda", torch.bfloat16):
            found = float(model.Scored(lm.to(GPU))(model.batch(row(chats(2, 4)), GPU)))
    assert found == pytest.approx(expected, rel=2e-3)


def on_one(rank: int, port: int, task: Any, arguments: tuple[Any, ...], out: Path) -> None:
    """Run `task(*arguments)` in a process group of its own over NCCL; its result as JSON."""
    import torch.distributed as dist

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cuda")
    torch.cuda.set_device(GPU)
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=GPU)
    out.write_text(json.dumps(task(*arguments)))
    dist.destroy_process_group()


def in_a_process(task: Any, arguments: tuple[Any, ...], out: Path) -> Any:
    torch.multiprocessing.spawn(on_one, (runs.free_ports(1)[0], task, arguments, out), nprocs=1)
    return json.loads(out.read_text())


def losses(directory: str, keys: Student) -> list[float]:
    return curve(directory, keys, device=GPU)[0]


@pytest.mark.parametrize(
    ("mode", "kernels"), [("none", "torch"), ("fsdp2", "torch"), ("zero2", "torch"), ("zero3", "torch"), ("none", "liger")]
)
def test_every_mode_learns_in_bfloat16_what_the_cpu_learns_in_float32(
    student: str, tmp_path: Path, mode: str, kernels: str
) -> None:
    if kernels == "liger":
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: student.kernels needs it")
    found = in_a_process(losses, (student, spec(sharding=mode, kernels=kernels, **HALF)), tmp_path / "losses.json")
    check(found, curve(student, spec(sharding="none"))[0], tolerance=0.02)


SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


def peak(keys: Student) -> tuple[int, dict[str, float]]:
    """(bytes CUDA's allocator gave at most over three steps, the formula's parts)."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register(model.ATTENTION, model.packed_attention)
    config = LlamaConfig(**SHAPE)
    config._attn_implementation = model.ATTENTION
    lm = LlamaForCausalLM(config).train()
    if keys.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    shape = memory.Shape.of(lm)
    sharded = sharding.shard(model.Scored(lm), keys, GPU)
    size = keys.micro_tokens or 0
    packed = {"input_ids": [i % 32_000 for i in range(size)], "lengths": [size // 8] * 8, "prompts": [1] * 8}
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        for last in (False, True):  # the second pass finds the gradients of the first
            with sharded.micro(last):
                sharded.backward(sharded.module(model.batch(packed, GPU)) / size)
        sharded.step(1e-4)
    return torch.cuda.max_memory_allocated(), memory.need(shape, keys)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", ["none", "fsdp2", "zero2", "zero3"])
def test_the_memory_formula_foretells_the_peak_of_the_gpu(tmp_path: Path, mode: str, again: bool) -> None:
    keys = spec(sharding=mode, micro_tokens=16_384, gradient_checkpointing=again, **HALF)
    measured, parts = in_a_process(peak, (keys,), tmp_path / "peak.json")
    expected = sum(parts.values())
    print(f"\n{mode}, recomputed {again}: {measured / 1e9:.2f} GB, formula {expected / 1e9:.2f}, {measured / expected:.2f}")
    assert 0.75 * expected < measured < 1.05 * expected, parts


def test_teacher_training_and_student_take_turns_on_one_gpu(tmp_path: Path) -> None:
    sets = ["rounds=1", "data.train_limit=300", "data.select=40", "data.test_limit=60", "student.tokens=300_000"]
    for role in ("teacher", "student"):
        sets += [f"{role}.engine.replicas=1", f"{role}.engine.batch_size=150", f"{role}.engine.resources.gpus=1"]
    sets += ["student.resources.gpus=1", "student.dtype=bfloat16"]
    print(runs.run("mini", tmp_path / "run", *sets))
    report = runs.report(tmp_path / "run")
    assert report["rounds"][1]["lessons"] > 100
    assert report["rounds"][1]["validation"]["accuracy"] > report["base_test_accuracy"]
