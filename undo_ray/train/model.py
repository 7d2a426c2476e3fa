"""The model as training sees it: packed rows in, summed loss out.

`Scored` wraps a causal language model of transformers. Chats of a row lie end to end with positions of their own; attention is
computed chat by chat, so none sees another and no mask of row² is made. The head and the cross-entropy are one operation over
pieces of the supervised positions, so a vocabulary of 150k never sets the memory peak.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undo_ray import models
from undo_ray.config import Student
from undo_ray.types import Row, UserError, first_line

ATTENTION = "undo_ray_packed"
"""Name under which transformers finds `packed_attention`."""

OTHERS = "use a decoder of the Llama, Qwen, Mistral, Phi or SmolLM kind"
"""What is said where chats cannot be packed."""

PIECE = 2**25
"""Logits (positions × vocabulary) held at a time: 128 MB in fp32."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Where the chats of a row end: `lengths` in tokens, `ends` their running sum from 0 (int32, on the device)."""

    lengths: list[int]
    ends: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """A row on the device. `targets[i]` is the token that position `where[i]` has to foretell."""

    input_ids: Tensor  # (1, tokens)
    position_ids: Tensor  # (1, tokens)
    packed: Packed
    where: Tensor  # (supervised,)
    targets: Tensor  # (supervised,)


def batch(row: Row | None, device: torch.device) -> Batch:
    """A packed row as tensors. None, and a row without chats, become one unsupervised token: the worker has nothing to add,
    yet takes part in what the workers compute together."""
    if row is None or not row["input_ids"]:
        row = {"input_ids": [0], "lengths": [1], "prompts": [1]}
    positions: list[int] = []
    where: list[int] = []
    start = 0
    for length, prompt in zip(row["lengths"], row["prompts"], strict=True):
        positions += range(length)
        where += range(start + max(1, prompt) - 1, start + length - 1)
        start += length
    ids, places = torch.tensor(row["input_ids"], device=device), torch.tensor(where, dtype=torch.long, device=device)
    ends = F.pad(torch.tensor(row["lengths"], device=device).cumsum(0), (1, 0)).to(torch.int32)
    packed = Packed(row["lengths"], ends)
    return Batch(ids[None], torch.tensor(positions, device=device)[None], packed, places, ids[places + 1])


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Packed,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each chat. query, key, value: (1, heads, tokens, head size); returns (1, tokens, heads, size).

    Raises UserError for sinks (`s_aux`) and capped scores, which it does not compute. In half precision on a GPU torch's
    variable-length flash attention, else scaled dot products chat by chat.
    """
    if s_aux is not None or softcap:
        raise UserError(f"student.model: {type(module).__name__} has sinks or capped scores; use another student")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings come in fp32 under autocast
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        flat = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
        longest, window = max(packed.lengths), (sliding_window - 1 if sliding_window else -1, 0)
        ends = packed.ends
        out = varlen_attn(*flat, ends, ends, longest, longest, scale=scaling, window_size=window, enable_gqa=True)
        return out[None], None
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    chats = zip(*(x.split(packed.lengths, 2) for x in (query, key, value)), strict=True)
    parts = [_causal(q, k, v, scaling, dropout, sliding_window) for q, k, v in chats]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float, window: int | None) -> Tensor:
    if not window or q.shape[2] <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)
    ahead = torch.arange(q.shape[2], device=q.device)
    behind = ahead[:, None] - ahead[None, :]
    return F.scaled_dot_product_attention(q, k, v, (behind >= 0) & (behind < window), scale=scale, dropout_p=dropout)


class _HeadLoss(torch.autograd.Function):
    """Σ −log softmax(hidden Wᵀ + b)[target], with gradients computed piece by piece in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: bool) -> Tensor:
        given = (hidden, weight, bias)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        low = weight.to(hidden.dtype)
        # Sums over pieces in fp32, whatever the type of the weights.
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if grad and weight.requires_grad else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if grad and bias is not None and bias.requires_grad else None
        of_hidden = torch.empty_like(hidden) if grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = max(1, PIECE // weight.shape[0])
        for start in range(0, len(targets), size):
            part, wanted = hidden[start : start + size], targets[start : start + size, None]
            scores = (part @ low.T if bias is None else torch.addmm(bias.to(low.dtype), part, low.T)).float()
            norm = scores.logsumexp(-1, keepdim=True)
            total += (norm - scores.gather(1, wanted)).sum()
            if of_hidden is None:
                continue
            # In place, and let go before the next piece: a piece is what sets the peak.
            scores.sub_(norm).exp_().scatter_add_(1, wanted, -torch.ones_like(norm))  # softmax − one-hot
            slope = scores.to(hidden.dtype)
            torch.mm(slope, low, out=of_hidden[start : start + size])
            if of_weight is not None:
                if slope.dtype == torch.float32:
                    of_weight.addmm_(slope.T, part)
                else:
                    of_weight += slope.T @ part
            if of_bias is not None:
                of_bias += scores.sum(0)
            del scores, slope
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.types = [tensor.dtype if tensor is not None else None for tensor in given]
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.types, strict=True)
        return (*(None if grad is None else grad.mul_(above[0]).to(kind) for grad, kind in pairs), None, None)


def head_loss(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Summed cross-entropy of (positions, size) against token ids, without all logits at once."""
    total: Tensor = _HeadLoss.apply(hidden, head.weight, head.bias, targets, torch.is_grad_enabled())
    return total


class Scored(nn.Module):
    """A causal language model whose forward pass gives the summed loss of a `Batch`, or log-probabilities."""

    def __init__(self, lm: Any):
        super().__init__()
        self.lm = lm
        head = lm.get_output_embeddings()
        plain: Callable[[Tensor], Tensor] = head.forward
        # Inside the head's own forward: sharding gathers a module's weights around its forward call and nowhere else.
        head.forward = lambda hidden, targets=None: plain(hidden) if targets is None else head_loss(hidden, head, targets)

    def forward(self, batch: Batch, loss: bool = True) -> Tensor:
        """The summed loss (fp32, scalar), or with `loss=False` log-probabilities (tokens, vocabulary) in fp32."""
        hidden = self.lm.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, packed=batch.packed, use_cache=False
        ).last_hidden_state[0]
        head = self.lm.get_output_embeddings()
        if loss:
            out: Tensor = head(hidden[batch.where], batch.targets)
            return out
        return head(hidden).float().log_softmax(-1)


def skeleton(directory: str) -> Any:
    """The model without its weights. Raises UserError where transformers has no causal language model for it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(models.config(directory, trust=False))
    except ValueError as error:
        raise UserError(f"student.model: no causal language model of transformers ({first_line(error)})") from None


def refuse(lm: Any) -> None:
    """Raise UserError where the loss here, or chats laid end to end, would not be what the model computes."""
    c, name = lm.config, type(lm).__name__
    if c.get_text_config(decoder=True) is not c:
        raise UserError(f"student.model: {name} reads more than text, and only models of text alone are trained; use another")
    scaled = [key for key in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(c, key, None)]
    if scaled:
        raise UserError(
            f"student.model: {name} changes its logits after the head ({scaled[0]}), which the loss here does not; use another "
            "student"
        )
    if not lm._supports_attention_backend or lm.base_model is lm:
        raise UserError(f"student.model: the attention of {name} cannot be replaced, so its chats cannot be packed; {OTHERS}")
    mixed = set(getattr(c, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    mixed |= {type(part).__name__ for part in lm.modules() if isinstance(part, nn.Conv1d)}
    mixed |= {path for path, _ in lm.named_parameters() if path.endswith(".sinks")}
    if mixed:
        raise UserError(
            f"student.model: {name} mixes tokens by more than plain attention ({min(mixed)}), so chats in one row would see "
            f"one another; {OTHERS}"
        )


def load(directory: str, spec: Student) -> Any:
    """The model to train, in fp32 on the CPU, with the adapters and the recomputation that the recipe asks for."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    lm = models.weights(directory, spec.trust_remote_code, dtype=torch.float32, attn_implementation=ATTENTION)
    refuse(lm)
    if spec.kernels == "liger":
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance as fuse
        except ImportError:
            raise UserError(
                'student.kernels = "liger" needs Liger\'s kernels; install the gpu extra, or set it to "torch"'
            ) from None
        # This model alone: the export is loaded beside it on a CPU, where these kernels do not run. The loss is ours.
        module = vars(sys.modules[type(lm).__module__])
        before = dict(module)
        fuse(model=lm, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
        module.update(before)
    if spec.lora.rank:
        from peft import LoraConfig, inject_adapter_in_model

        lora = spec.lora
        targets = list(lora.targets) if lora.targets else "all-linear"
        lm.requires_grad_(False)
        inject_adapter_in_model(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets), lm
        )
    if spec.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm.train()


def merged(state: dict[str, Tensor], spec: Student) -> dict[str, Tensor]:
    """A state dict with LoRA adapters as the plain model's: W + (alpha / rank) · B A, under the plain names."""
    plain = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            prefix, _, rest = name.rpartition(".base_layer.")
            if rest == "weight":
                down, up = (state[f"{prefix}.lora_{side}.default.weight"].float() for side in "AB")
                tensor = tensor + (spec.lora.alpha / spec.lora.rank) * (up @ down)
            name = f"{prefix}.{rest}"
        plain[name] = tensor
    return plain


def flops_per_token(lm: Any) -> float:
    """Of a forward and a backward pass, without attention scores: 6 per parameter in a matrix (2 of them if it is frozen)."""
    embedding = lm.get_input_embeddings().weight
    tied = lm.get_output_embeddings().weight is embedding
    matrices = [p for p in lm.parameters() if p.ndim == 2 and (tied or p is not embedding)]
    return math.fsum((6.0 if p.requires_grad else 4.0) * p.numel() for p in matrices)
