"""The five ways a student lies on its workers, behind one set of verbs: run, backward, step, save, load, gather.

All average gradients over the workers, so the caller scales its loss by their number. `none` and `ddp` keep the whole model
on each worker, `fsdp2` a share of it (torch's `fully_shard`, a decoder layer at a time), `zero2` and `zero3` are DeepSpeed's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from undo_ray.config import Student
from undo_ray.place import cache
from undo_ray.train import memory
from undo_ray.types import UserError


def shard(net: nn.Module, spec: Student, device: torch.device) -> Whole:
    """Lay `net` (a `model.Scored`, on the CPU in fp32) out over the workers of the process group."""
    kind = {"none": Whole, "ddp": Whole, "fsdp2": Fsdp2, "zero2": Zero, "zero3": Zero}[spec.sharding]
    return kind(net, spec, device)


def adamw(net: nn.Module, spec: Student) -> torch.optim.Optimizer:
    """AdamW over what trains; vectors (norms, biases) are not decayed. Fused kernels on CPU and GPU alike."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=spec.learning_rate, betas=(0.9, spec.beta2), eps=1e-8, fused=True
    )


def compile_once() -> None:
    """Have DeepSpeed compile and load the operation its CPU workers communicate with, one process of a machine at a time.

    torch guards a compilation by a file that stays when its holder is killed, and waits for it to go for ever. Here a lock
    of the system, which ends with its holder, comes before it, in a folder of our own: a file found under it is a dead one's.
    """
    from filelock import FileLock

    home = cache() / f"extensions-py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
    home.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(home)
    with FileLock(home / "compile.lock"):
        for left in home.glob("*/lock"):
            left.unlink()
        from deepspeed.accelerator import get_accelerator

        get_accelerator().create_op_builder("ShareMemCommBuilder").load()


class Whole:
    """`none` and `ddp`: every worker holds everything. Also what the other modes have in common."""

    reshards = True
    """Whether saved state can be loaded by another number of workers."""

    def __init__(self, net: nn.Module, spec: Student, device: torch.device):
        self.net, self.spec, self.device = net, spec, device
        self.workers = dist.get_world_size() if dist.is_initialized() else 1
        self.module = self._placed()

    def _placed(self) -> nn.Module:
        self.net.to(self.device)
        self.optimizer = adamw(self.net, self.spec)
        if self.workers == 1:
            return self.net
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.net, device_ids=ids, gradient_as_bucket_view=True)

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        """Around one forward and backward pass; gradients travel with the last of a step."""
        wait = self.module.no_sync() if self.workers > 1 and not last else nullcontext()
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.dtype == "bfloat16")
        with wait, half:
            yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate: float) -> float:
        """Clip, update at learning rate `rate`, forget the gradients; returns their L2 norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.spec.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def save(self, directory: str) -> None:
        """This worker's part of model and optimiser into a folder of its own; all workers call it."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state(), checkpoint_id=directory, no_dist=not dist.is_initialized())

    def load(self, directory: str) -> None:
        """What `save` wrote, of all workers in one folder."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        from undo_ray.train.state import guarded

        state = self._state()
        with guarded(directory):
            dcp.load(state, checkpoint_id=directory, no_dist=not dist.is_initialized())
        set_state_dict(
            self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"], options=self._options()
        )

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optim = get_state_dict(self.net, self.optimizer, options=self._options())
        return {"model": model, "optim": optim}

    def _options(self) -> Any:
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        adapters = bool(self.spec.lora.rank)  # frozen weights are those of the model it starts from
        return StateDictOptions(ignore_frozen_params=adapters, strict=not adapters)

    def gather(self) -> dict[str, Tensor]:
        """The whole model in fp32 on the CPU of worker 0, a tensor at a time ({} elsewhere); all workers call it."""
        return {name: p.detach().float().cpu() for name, p in self.net.state_dict().items()} if self._first() else {}

    def _first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0


class Fsdp2(Whole):
    """Parameters, gradients and optimiser state in shares; each decoder layer is gathered when it computes."""

    def _placed(self) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = half if self.spec.dtype == "bfloat16" else MixedPrecisionPolicy()
        mesh = init_device_mesh(self.device.type, (self.workers,))
        layers = set(self.net.lm._no_split_modules or ())
        for module in list(self.net.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(self.net, mesh=mesh, mp_policy=policy)
        self.net.to(self.device)  # buffers; parameters are there
        self.optimizer = adamw(self.net, self.spec)
        return self.net

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        # Gradients are scattered after every pass: kept until the last, they would be whole on each worker.
        yield

    def gather(self) -> dict[str, Tensor]:
        whole = {}
        for name, value in self.net.state_dict().items():
            tensor = value.detach()
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self._first():
                whole[name] = tensor.float().cpu()
        return whole


class Zero(Whole):
    """DeepSpeed: optimiser state and gradients in shares (`zero2`), parameters too (`zero3`)."""

    reshards = False

    def _placed(self) -> nn.Module:
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError:
            raise UserError(
                f'student.sharding = "{self.spec.sharding}" needs DeepSpeed; `pip install deepspeed`, or set it to "fsdp2"'
            ) from None
        if self.device.type == "cpu":
            compile_once()
        stage = int(self.spec.sharding[-1])
        bucket = memory.bucket(sum(p.numel() for p in self.net.parameters()))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # steps differ in rows: the boundary is set by hand
            "gradient_clipping": self.spec.max_grad_norm,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": self.device.type == "cuda",
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "stage3_prefetch_bucket_size": bucket,
                "stage3_max_live_parameters": 2 * bucket,
                "stage3_max_reuse_distance": 2 * bucket,
            },
            "zero_allow_untested_optimizer": True,  # torch's AdamW, as in the other modes
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.spec.dtype == "bfloat16"},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        self.net.to(self.device)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=self.net, optimizer=adamw(self.net, self.spec), config=config, dist_init_required=False
        )
        engine: nn.Module = self.engine
        return engine

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def save(self, directory: str) -> None:
        os.makedirs(os.path.join(directory, "zero"), exist_ok=True)  # DeepSpeed makes it on worker 0 alone
        self.engine.save_checkpoint(directory, tag="zero", exclude_frozen_parameters=bool(self.spec.lora.rank))

    def load(self, directory: str) -> None:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        from undo_ray.train.state import guarded

        with guarded(directory, [LossScaler, ZeroStageEnum, fragment_address]):
            path, _ = self.engine.load_checkpoint(directory, tag="zero", load_module_strict=not self.spec.lora.rank)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {directory}")

    def gather(self) -> dict[str, Tensor]:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        whole = {}
        for name, p in self.net.named_parameters(remove_duplicate=False):
            master = safe_get_full_fp32_param(p) if p.requires_grad else None
            with GatheredParameters([p]) if master is None else nullcontext():
                if self._first():
                    whole[name] = (p.detach() if master is None else master.detach()).float().cpu().clone()
        return whole
