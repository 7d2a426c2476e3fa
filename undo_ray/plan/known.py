"""What a plan starts from: data sheets of GPUs, shapes of models, sizes of sets and lengths of texts, each with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undo_ray import tasks
from undo_ray.config import Recipe
from undo_ray.train import memory
from undo_ray.types import UserError


@dataclass(frozen=True, slots=True)
class Gpu:
    """Figures of a data sheet, in bytes and FLOP per second."""

    memory: float
    bandwidth: float
    peak: float
    """bf16, dense"""
    fp32: float
    """outside tensor cores, where vLLM and transformers compute in float32"""


GPUS = {
    "A100": Gpu(80e9, 2.039e12, 312e12, 19.5e12),  # SXM 80 GB
    "H100": Gpu(80e9, 3.35e12, 989e12, 67e12),  # SXM
    "H200": Gpu(141e9, 4.8e12, 989e12, 67e12),  # SXM
    "GH200": Gpu(96e9, 4.0e12, 989e12, 67e12),  # 96 GB HBM3: the paper's machine
    "B200": Gpu(180e9, 7.7e12, 2250e12, 75e12),  # of a DGX B200; bandwidth by its bus and clock
    "L40S": Gpu(48e9, 0.864e12, 362e12, 91.6e12),
    "L4": Gpu(24e9, 0.3e12, 121e12, 30.3e12),
}
"""By NVIDIA's data sheets, which docs/plan.md names."""


@dataclass(frozen=True, slots=True)
class Model:
    """The figures of a `config.json` that memory and speed depend on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    context: int
    head_size: int = 128
    quantised: float | None = None
    """bytes of a weight of its linear layers, where the checkpoint is quantised"""

    @property
    def tables(self) -> int:
        """Parameters of embeddings and head, which quantisation leaves as they are."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Of the Llama family: embeddings, head, and per layer attention, gated MLP and two norms; biases left out."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        layer = self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate + 2)
        return self.tables + self.layers * layer + self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values, in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size

    def flops(self, context: float) -> float:
        """Of one token's forward pass that attends to `context` others."""
        return 2 * self.parameters + 4 * self.layers * self.heads * self.head_size * context

    def shape(self, rank: int) -> memory.Shape:
        """For the memory of training; `rank` of adapters on every linear layer, 0 for none."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        pairs = 2 * (self.hidden + queries) + 2 * (self.hidden + keys) + 3 * (self.hidden + self.intermediate)
        trained = self.layers * rank * pairs if rank else self.parameters
        every = self.parameters + (trained if rank else 0)
        return memory.Shape(every, trained, self.vocabulary, self.hidden, self.intermediate, self.layers, queries, self.tied)


MODELS = {
    "Qwen/Qwen2.5-72B-Instruct": Model(8192, 29568, 80, 64, 8, 152064, False, 32768),
    "Qwen/Qwen2.5-7B-Instruct": Model(3584, 18944, 28, 28, 4, 152064, False, 32768),
    "Qwen/Qwen2.5-1.5B-Instruct": Model(1536, 8960, 28, 12, 2, 151936, True, 32768),
    "Qwen/Qwen2.5-0.5B-Instruct": Model(896, 4864, 24, 14, 2, 151936, True, 32768, 64),
}
"""From their public `config.json`."""

SIZES = {
    "gsm8k": {"train": 7473, "test": 1319},
    "math": {"train": 7498, "test": 5000, "math500": 500},
    "mini": {"train": 2000, "test": 400},
    "mmlu_pro": {"test": 12032, "validation": 70},
    "numina": {"train": 859494, "test": 100},
    "strategyqa": {"train": 1603, "test": 687},
    "svamp": {"train": 700, "test": 300},
    "theoremqa": {"test": 747},
}
"""Questions of the public sets, as docs/recipe.md has them; NuminaMath-CoT before rows without a usable answer."""

CLEANED = {"gsm8k": 7357, "math": 5273, "strategyqa": 1602, "svamp": 278}
"""What `data.clean = "ngram"` leaves of the training sets against all six tests (measured, docs/tasks.md)."""

GROUPED = 2.5 / 128
"""Bytes a weight of AWQ and GPTQ takes for the scale and the zero of its group of 128."""

QUANTISED = {"fp8": 1.0, "bitsandbytes": 0.5, **dict.fromkeys(["awq", "awq_marlin", "gptq", "gptq_marlin"], 0.5 + GROUPED)}
"""Bytes of a weight of the linear layers by `engine.kwargs.quantization`."""

TIED = ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "smollm3")
"""Values of `model_type` whose head is the embedding when config.json does not say (transformers 5.19)."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of what the models read and write."""

    question: float
    rationale: float
    attempt: float
    diagnosis: float
    """what the teacher writes before the rationale, from round 1 on"""

    @classmethod
    def of(cls, question: float, answer: float) -> Lengths:
        """With answers of one length; a diagnosis as long as the rationale is an assumption."""
        return cls(question, answer, answer, answer)


LENGTHS = {
    "gsm8k": Lengths.of(60, 121),
    "math": Lengths.of(74, 377),
    "mini": Lengths.of(25, 45),
    "mmlu_pro": Lengths.of(188, 96),
    "numina": Lengths.of(74, 377),  # as MATH
    "strategyqa": Lengths.of(12, 121),  # answers as GSM8K
    "svamp": Lengths.of(41, 121),  # answers as GSM8K
    "theoremqa": Lengths.of(60, 471),
}
"""Measured on the sets' questions and on recorded answers of models to them, see docs/plan.md."""


def model_of(role: str, reference: str, given: dict[str, str]) -> Model:
    if role not in given and reference in MODELS:
        return MODELS[reference]
    file = Path(given.get(role, reference)) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{role}.model = {reference!r}: its shape is not known here; add --shape {role}=DIR with a folder that holds its "
            f"config.json (known: {', '.join(MODELS)})"
        )
    try:
        c = json.loads(file.read_text(encoding="utf-8"))
        c = {**c, **c.get("text_config", {})}  # of a model that sees images too
        heads, hidden = c["num_attention_heads"], c["hidden_size"]
        if any("expert" in key for key in c):
            raise UserError(f"{file}: a mixture of experts is not planned for; give --shape {role}=DIR of a dense model")
        return Model(
            hidden=hidden,
            intermediate=c["intermediate_size"],
            layers=c["num_hidden_layers"],
            heads=heads,
            kv_heads=c.get("num_key_value_heads") or heads,
            vocabulary=c["vocab_size"],
            tied=bool(c.get("tie_word_embeddings", c.get("model_type") in TIED)),
            context=c.get("max_position_embeddings", 0),
            head_size=c.get("head_dim") or hidden // heads,
            quantised=_quantised(file, c["quantization_config"]) if c.get("quantization_config") else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{file}: not the config.json of a model of the Llama family ({error!r}); give another folder"
        ) from None


def _quantised(file: Path, how: dict[str, Any]) -> float:
    """Bytes of a weight of the linear layers by a `quantization_config`. Raises UserError where they are not known."""
    method, groups = str(how.get("quant_method")), how.get("config_groups") or {}
    found = [group["weights"]["num_bits"] for group in groups.values()]  # compressed-tensors
    bits = how.get("bits") or max(found, default=0)
    if method == "bitsandbytes" and not how.get("load_in_4bit"):
        bits = 8
    if bits:
        return float(bits / 8 + (GROUPED if bits < 8 else 0))
    if method not in QUANTISED:
        raise UserError(
            f"{file}: quantised by {method!r}, whose size is not known here; give --shape a folder with one of "
            f"{', '.join(QUANTISED)}, or one that is not quantised"
        )
    return QUANTISED[method]


def size_of(recipe: Recipe, source: str, split: str) -> int:
    """Questions of a set, before any is cleaned away."""
    task, found = tasks.parse_source(source, split)
    if recipe.data.dir is not None or found.endswith(tasks.FILES):
        return len(tasks.load(task, found, recipe.data.dir)[0])
    if task.name not in SIZES or found not in SIZES[task.name]:
        raise UserError(f"source {source!r}: its size is not known without reading it; set data.dir to a folder that holds it")
    return SIZES[task.name][found]
