"""How much memory a training worker needs, from the shape of the model; docs/training.md explains the terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from undo_ray.config import Student

PIECE_BYTES = 2 * 4 * 2**25
"""Two fp32 copies of the logits that are held at a time (`model.PIECE`)."""


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
    kv: int  # key (or value) heads × head size, in elements

    @classmethod
    def of(cls, lm: Any) -> Shape:
        """Of a transformers model, with the adapters it has."""
        c = lm.config
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        count = sum(p.numel() for p in lm.parameters())
        trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        q, kv = c.num_attention_heads * size, c.num_key_value_heads * size
        return cls(count, trained, c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers, q, kv)


def need(shape: Shape, spec: Student) -> dict[str, float]:
    """Bytes of one worker at its peak, by what they are for: weights, gradients, optimiser, activations, head.

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
        per_layer = (shape.parameters - 2 * shape.vocabulary * shape.hidden) / max(1, shape.layers)
        of_weights += (2 if half else 4) * (2 * max(0.0, per_layer) + 2 * shape.vocabulary * shape.hidden)
    if spec.sharding == "ddp" and workers > 1:
        gradients = 1
    tokens = spec.micro_tokens or spec.max_length
    width = 2 if half else 4
    # Kept for the backward pass by a layer: inputs of two norms (fp32 once more inside each), of the projections, queries,
    # keys, values before and after rotation, attention's output, and the MLP's gate, its activation, up and product.
    layer = 8 * shape.hidden + 3 * shape.heads + 4 * shape.kv + 4 * shape.intermediate
    kept = shape.hidden * shape.layers + layer if spec.gradient_checkpointing else layer * shape.layers
    head = 4 * shape.vocabulary * shape.hidden * (shape.trained == shape.parameters)
    return {
        "weights": of_weights,
        "gradients": 4 * shape.trained / gradients,
        "optimiser": 8 * shape.trained / optimiser + master,
        "activations": float(width * tokens * kept),
        "head": float(min(PIECE_BYTES, 8 * tokens * shape.vocabulary) + head),
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
