"""How much memory a training worker needs, from the shape of the model; docs/training.md explains the terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from undo_ray.config import Student

PIECE = 2**25
"""Logits that the loss holds at a time (`model.PIECE`)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model its memory depends on."""

    parameters: int
    trained: int  # of these, with LoRA the adapters alone
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int  # query heads × head size, in elements
    tied: bool  # head and embeddings are one matrix

    @classmethod
    def of(cls, lm: Any) -> Shape:
        """Of a transformers model, with the adapters it has."""
        c = lm.config
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        count = sum(p.numel() for p in lm.parameters())
        trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        heads, tied = c.num_attention_heads * size, bool(c.tie_word_embeddings)
        return cls(count, trained, c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, heads, tied)


def bucket(parameters: int) -> int:
    """Elements of a DeepSpeed buffer: its own defaults are sized for models of hundreds of billions."""
    return min(50_000_000, max(1_000_000, parameters // 16))


def need(shape: Shape, spec: Student) -> dict[str, float]:
    """Bytes of one worker at its peak, by what they are for: weights, gradients, optimiser, buckets, activations, head.

    Without the runtime's own (CUDA context, NCCL, Python: 1–2 GB) and fragmentation.
    """
    half = spec.dtype == "bfloat16"
    workers = spec.workers
    share = {"none": (1, 1, 1), "ddp": (1, 1, 1), "fsdp2": (workers,) * 3, "zero2": (1, workers, workers)}
    weights, gradients, optimiser = share.get(spec.sharding, (workers,) * 3)
    # DeepSpeed in bf16 computes with a bf16 copy and keeps its fp32 master weights with the optimiser.
    deepspeed = spec.sharding.startswith("zero")
    master = 4 * shape.trained / optimiser if deepspeed else 0
    of_weights = (2 if deepspeed and half else 4) * shape.parameters / weights
    if spec.sharding in ("fsdp2", "zero3"):  # the layer at work and the one after it, gathered
        ends = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden  # embeddings and head stay gathered
        of_weights += (2 if half else 4) * (ends + 2 * (shape.parameters - ends) / max(1, shape.layers))
    tokens = spec.micro_tokens or spec.max_length
    # Bytes that a layer keeps for its backward pass, counted on what autograd saves: both norms (input and normalised), the
    # inputs of the projections, queries, keys and values as attention takes them (as many heads each), what it gives, and
    # the MLP's gate, its activation, up and their product. Under autocast each projection casts its own input.
    autocast = half and spec.sharding in ("none", "ddp")
    if half:
        layer = (26 if autocast else 16) * shape.hidden + 10.5 * shape.heads + 8 * shape.intermediate
    else:
        layer = 24 * shape.hidden + 20.25 * shape.heads + 16 * shape.intermediate
    of_weights += 2 * shape.parameters * autocast  # its casts of the weights, kept for the backward pass
    between = (2 if half and not autocast else 4) * shape.hidden
    kept = between * shape.layers + layer if spec.gradient_checkpointing else layer * shape.layers
    kept += 6 * between  # embedding, last norm, and what the head takes and gives back
    logits = 8 if half else 4
    # The gradient of the head as the loss sums it, and of tied embeddings before the two are added.
    head = 4 * shape.vocabulary * shape.hidden * (1 + shape.tied) * (shape.trained == shape.parameters)
    return {
        "weights": of_weights,
        "gradients": 4 * shape.trained / gradients,
        "optimiser": 8 * shape.trained / optimiser + master,
        "buckets": 4.0 * {"zero2": 2, "zero3": 5}.get(spec.sharding, 0) * bucket(shape.parameters),
        "activations": float(tokens * kept),
        "head": float(logits * min(PIECE, tokens * shape.vocabulary) + head),
    }


def advice(spec: Student, shape: Shape | None) -> str:
    """What to change when memory ran out, with the values there are."""
    knobs = []
    if not spec.gradient_checkpointing:
        knobs.append("student.gradient_checkpointing=true")
    knobs.append(f"student.micro_tokens below {spec.micro_tokens or spec.max_length}")
    if spec.sharding not in ("fsdp2", "zero3"):
        knobs.append(f"student.sharding=fsdp2 (now {spec.sharding}) over more than {spec.workers} workers")
    else:
        knobs.append(f"more student.workers than {spec.workers}")
    if not spec.lora.rank:
        knobs.append("student.lora.rank=16")
    if shape is None:
        return "set " + ", or ".join(knobs)
    parts = need(shape, spec)
    figures = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"a worker needs about {sum(parts.values()) / 1e9:.2f} GB ({figures}); set " + ", or ".join(knobs)
