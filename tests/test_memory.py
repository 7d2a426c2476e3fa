"""The memory formula of docs/training.md against what a process really used: small models, on the CPU, one worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from undo_ray import config
from undo_ray.config import Student
from undo_ray.train import memory

STEP = """
import json, sys, torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from undo_ray import config
from undo_ray.config import Student
from undo_ray.train import memory, model, sharding

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

shape, keys = json.loads(sys.argv[1])
spec, cpu = Student.model_validate({"model": "m", "epochs": 1, "sharding": "none", **keys}), torch.device("cpu")
AttentionInterface.register(model.ATTENTION, model.packed_attention)
torch.randn(64, 64) @ torch.randn(64, 64)
before = status("VmRSS")
config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape)
config._attn_implementation = model.ATTENTION
lm = LlamaForCausalLM(config).train()
if spec.gradient_checkpointing:
    lm.gradient_checkpointing_enable({"use_reentrant": False})
sharded = sharding.shard(model.Scored(lm), spec, cpu)
size = spec.micro_tokens
row = {"input_ids": [i % config.vocab_size for i in range(size)], "lengths": [size // 8] * 8, "prompts": [1] * 8}
for _ in range(2):
    with sharded.micro(last=True):
        sharded.backward(sharded.module(model.batch(row, cpu)) / size)
    sharded.step(1e-4)
print(json.dumps([status("VmHWM") - before, memory.need(memory.Shape.of(lm), spec)]))
"""
NARROW = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
CASES = {
    "weights": ({**NARROW, "hidden_size": 512, "intermediate_size": 1536, "tie_word_embeddings": True}, {"micro_tokens": 64}),
    "activations": (NARROW, {"micro_tokens": 6144}),
    "bfloat16": (NARROW, {"micro_tokens": 6144, "dtype": "bfloat16"}),
    "recomputed": (NARROW, {"micro_tokens": 6144, "gradient_checkpointing": True}),
    "vocabulary": ({**NARROW, "vocab_size": 100_000, "hidden_size": 128, "num_hidden_layers": 2}, {"micro_tokens": 2048}),
}

SLOW = ("bfloat16", "recomputed", "vocabulary")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES])
def test_the_formula_foretells_the_measured_peak(name: str) -> None:
    # glibc would keep freed blocks below a growing threshold: the peak would be the allocator's.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEP, json.dumps(CASES[name])]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    measured, parts = json.loads(output.splitlines()[-1])
    assert sum(parts.values()) == pytest.approx(measured, rel=0.2), (measured, parts)


QWEN = memory.Shape(1_543_714_304, 1_543_714_304, 151_936, 1536, 8960, 28, 1536, True)
"""Qwen2.5-1.5B."""


LLAMA = memory.Shape(1_235_814_400, 1_235_814_400, 128_256, 2048, 8192, 16, 2048, True)
"""Llama-3.2-1B."""
SMOLLM = memory.Shape(1_711_376_384, 1_711_376_384, 49_152, 2048, 8192, 24, 2048, True)
"""SmolLM2-1.7B."""


def student(**keys: Any) -> Student:
    return Student.model_validate({"model": "m", "epochs": 1, "dtype": "bfloat16", "max_length": 1024, **keys})


def test_more_workers_need_less_only_where_something_is_shared() -> None:
    def total(mode: str, workers: int) -> float:
        return sum(memory.need(QWEN, student(sharding=mode, workers=workers)).values())

    assert total("ddp", 8) == total("ddp", 1) == total("none", 1)
    for mode in ("fsdp2", "zero2", "zero3"):
        assert total(mode, 8) < total(mode, 2) < total("ddp", 2)
    assert total("zero3", 8) < total("zero2", 8)
    assert sum(memory.need(QWEN, student(gradient_checkpointing=True)).values()) < total("ddp", 1)


def test_the_recipe_states_the_memory_of_the_papers_students() -> None:
    path = Path(__file__).parent.parent / "jobs" / "recipes" / "gsm8k.toml"
    spec, text = config.load(path).student, path.read_text()
    modes = next(line for line in text.splitlines() if "student.model " in line).split()[2:]
    for name, shape in (("Qwen2.5-1.5B", QWEN), ("Llama-3.2-1B", LLAMA), ("SmolLM2-1.7B", SMOLLM)):
        [line] = [line for line in text.splitlines() if line.startswith("#   ") and name in line]
        for mode, stated in zip(modes, line.split()[2:], strict=True):
            needed = sum(memory.need(shape, spec.model_copy(update={"sharding": mode})).values()) / 1e9
            assert float(stated) == pytest.approx(needed, abs=0.051), (name, mode)
