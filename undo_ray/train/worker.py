"""The training loop, as each worker runs it.

All workers see the same sums, so all of them stop, save and end at the same step. What a person can mend is written to
`failure.json` and ends the attempt in order; anything else is raised, and Ray Train starts the workers again from the last
checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from undo_ray import models
from undo_ray.config import Student
from undo_ray.place import Place
from undo_ray.train import export, memory, model, sharding
from undo_ray.train.packing import Steps, supervised_tokens
from undo_ray.types import Damaged, Row, UserError

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 peak by what a GPU's name holds, from NVIDIA's data sheets."""

PROBE = 512
"""Tokens of a lesson on which the export is compared: all their logits are held at once."""

TRIES = 4
"""At a file, before a storage error counts."""


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    start: str  # ModelRef
    seed: int
    spec: Student
    packed: Place
    plan: dict[str, Any]
    model: Place  # where the Hugging Face directory goes
    state: Place  # what this training run keeps until its stage is committed
    board: Any  # progress actor or None
    log: Any  # actor that takes curves, or None

    @property
    def failure(self) -> Place:
        return self.state / "failure.json"

    @property
    def report(self) -> Place:
        return self.state / "report.json"


def work(config: dict[str, Job]) -> None:
    """Train (Ray Train calls it on each worker)."""
    job = config["job"]
    if job.failure.exists():  # written by a worker whose loss started this group anew
        return
    shape: memory.Shape | None = None
    try:
        worker = Worker(job)
        shape = worker.shape
        worker.run()
    except Damaged as error:  # of one worker's share perhaps, while the others wait for it
        failed(job, str(error), error.exit_code, error.place)
        raise
    except UserError as error:
        failed(job, str(error), error.exit_code)
        if ray.train.get_context().get_world_size() > 1:  # the others may not have met it, and would wait for this one
            raise
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not out_of_memory(error):
            raise
        failed(job, f"training ran out of memory: {memory.advice(job.spec, shape)} (placement keys: the same run goes on)", 5)
        raise  # the others wait for this worker: they must be ended


def failed(job: Job, message: str, exit_code: int, damaged: str | None = None) -> None:
    retried(lambda: job.failure.write_json({"message": message, "exit_code": exit_code, "damaged": damaged}))


def out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in ("out of memory", "can't allocate memory"))


class Worker:
    """One worker: its share of the model, its rows, and where it is."""

    def __init__(self, job: Job):
        context = ray.train.get_context()
        self.job, self.spec = job, job.spec
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        torch.set_num_threads(max(1, int(self.spec.resources.cpus)))
        torch.manual_seed(job.seed)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        self.directory = models.local(job.start, job.seed)
        self.rows = Steps(job.packed, self.rank, self.workers)
        lm = model.load(self.directory, self.spec)
        self.shape, self.flops = memory.Shape.of(lm), model.flops_per_token(lm)
        self.net = model.Scored(lm)
        self.sharded = sharding.shard(self.net, self.spec, self.device)
        self.step = 0
        self.losses: list[float] = []
        self.before: float | None = None
        self.resumes: list[int] = []
        self.took = (0.0, 0.0)  # seconds of this attempt's steps: wall, process

    # -- the loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """From the last checkpoint, or the start, to the export."""
        self.resume()
        # Of dropout: every worker's own, and after a checkpoint not the first steps' again.
        torch.manual_seed(random.Random(repr((self.job.seed, self.rank, self.step))).getrandbits(63))
        if self.step == 0:
            self.before = self.held_out()
        steps, saved, since = self.job.plan["steps"], time.monotonic(), time.monotonic()
        began = time.perf_counter(), time.process_time()
        tokens = 0
        every = max(1, min(20, steps // 10))
        while self.step < steps:
            rows, supervised = self.rows[self.step]
            rate = learning_rate(self.step, steps, self.spec)
            loss, norm = self.update(rows, supervised, rate)
            self.step += 1
            self.losses.append(loss)
            if trouble := unhealthy(self.losses, norm):
                raise UserError(f"training stopped at step {self.step} of {steps}: {trouble}; {self.kept()}", exit_code=1)
            tokens += sum(len(row["input_ids"]) for row in rows)
            if self.step % every == 0 or self.step == steps:
                self.tell(rate, norm, supervised, tokens / (time.monotonic() - since), rows)
                tokens, since = 0, time.monotonic()
            if self.step < steps and self.due(saved):
                self.save()
                saved = time.monotonic()
        self.took = time.perf_counter() - began[0], time.process_time() - began[1]
        self.finish()

    def update(self, rows: list[Row], supervised: int, rate: float) -> tuple[float, float]:
        """One optimiser step; (mean loss of its supervised tokens, norm of the gradient), of all workers together."""
        total = torch.zeros((), device=self.device)
        for index, row in enumerate(rows):
            with self.sharded.micro(last=index == len(rows) - 1):
                loss = self.sharded.module(model.batch(row, self.device))
                # Gradients are averaged over workers, and the loss is a mean over the step's tokens, wherever they are.
                self.sharded.backward(loss * (self.workers / supervised))
            total += loss.detach()
        norm = self.sharded.step(rate)
        return self.sum(total) / supervised, norm

    def held_out(self) -> float | None:
        """Mean negative log-likelihood (nats) of a token of the lessons held out; None when there are none."""
        rows, supervised = self.rows.held_out()
        if not supervised:
            return None
        self.sharded.module.eval()
        total = torch.zeros((), device=self.device)
        with torch.no_grad():
            for row in rows:
                with self.sharded.micro(last=True):
                    total += self.sharded.module(model.batch(row, self.device))
        self.sharded.module.train()
        return self.sum(total) / supervised

    def sum(self, value: torch.Tensor) -> float:
        if self.workers > 1:
            dist.all_reduce(value)
        return float(value)

    def due(self, saved: float) -> bool:
        """Whether a checkpoint is to be made now, the last being of `saved` (monotonic seconds). The same on all workers."""
        if self.spec.checkpoint_steps and self.step % self.spec.checkpoint_steps == 0:
            return True
        late = time.monotonic() - saved > 60 * self.spec.checkpoint_minutes
        if self.workers == 1:
            return late
        # Worker 0's clock decides for all, asked now and then.
        return self.step % 10 == 0 and self.sum(torch.tensor(float(late and self.rank == 0), device=self.device)) > 0

    def tell(self, rate: float, norm: float, supervised: int, speed: float, rows: list[Row]) -> None:
        """Progress and curves, from worker 0. `speed`: its tokens per second."""
        if self.rank:
            return
        if self.job.board is not None:
            self.job.board.set.remote(done=self.step, total=self.job.plan["steps"], loss=self.losses[-1])
        if self.job.log is not None:
            figures = {
                "loss": self.losses[-1],
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens_per_second": speed * self.workers,
                "supervised_share": sum(map(supervised_tokens, rows)) / max(1, sum(len(row["input_ids"]) for row in rows)),
            }
            if (peak := peak_flops(self.device)) is not None:
                figures["mfu"] = speed * self.flops / peak
            self.job.log.add.remote(self.step, figures)

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint through Ray Train: each worker its share."""
        with tempfile.TemporaryDirectory() as scratch:
            self.sharded.save(scratch)
            if self.rank == 0:
                meta = {
                    "step": self.step,
                    "workers": self.workers,
                    "sharding": self.spec.sharding,
                    "losses": self.losses,
                    "before": self.before,
                    "resumes": self.resumes,
                }
                with open(os.path.join(scratch, "meta.json"), "w", encoding="utf-8") as file:
                    json.dump(meta, file)
            ray.train.report(
                {"step": self.step},
                checkpoint=ray.train.Checkpoint.from_directory(scratch),
                checkpoint_dir_name=f"step-{self.step:08d}",
                checkpoint_upload_fn=_upload,
            )

    def resume(self) -> None:
        """Load the last checkpoint, if there is one. Raises UserError where this layout cannot go on from it."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        broken = Damaged(f"{checkpoint.path}: this checkpoint cannot be read", (self.job.state / "train").uri)
        with checkpoint.as_directory() as directory:
            try:
                with open(os.path.join(directory, "meta.json"), encoding="utf-8") as file:
                    meta = json.load(file)
            except (OSError, ValueError) as error:
                raise broken from error
            layout, earlier = (self.spec.sharding, self.workers), (meta["sharding"], meta["workers"])
            if refused := refusal(layout, earlier):
                raise UserError(f"{refused}, or delete {self.job.state.uri} to train this round from its start", exit_code=5)
            try:
                self.sharded.load(directory)
            except Exception as error:  # each kind of sharding has its own
                if out_of_memory(error):
                    raise
                raise broken from error
        self.step, self.losses, self.before = meta["step"], meta["losses"], meta["before"]
        self.resumes = [*meta["resumes"], self.step]

    def kept(self) -> str:
        """What is left of this run, for a message."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return "no checkpoint was made"
        return f"the last checkpoint is {checkpoint.path}"

    # -- the end --------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Export, compare what was exported with what was trained, and report."""
        after = self.held_out()
        probe = self.probe()
        self.sharded.module.eval()
        torch.backends.cuda.matmul.allow_tf32 = False  # the export is compared in full fp32
        with torch.no_grad(), self.sharded.micro(last=True):
            trained = self.sharded.module(model.batch(probe, self.device), loss=False)
        state = self.sharded.gather()
        if self.rank:
            return
        plain = model.merged({name.removeprefix("lm."): tensor for name, tensor in state.items()}, self.spec)
        with tempfile.TemporaryDirectory() as scratch:
            trust = self.spec.trust_remote_code
            export.write(plain, self.directory, scratch, trust)
            exact = self.spec.dtype == "float32" and export.keeps_fp32(self.directory, trust)
            if wrong := export.differs(scratch, probe["input_ids"], trained, exact, trust):
                raise UserError(f"the exported student is not the trained one: {wrong}", exit_code=1)
            retried(lambda: self.job.model.upload(scratch))
        ids = torch.tensor(probe["input_ids"][1:], device=trained.device)
        report = {
            "loss": {"first": self.losses[0], "last": statistics.fmean(self.losses[-20:])},
            "resumes": self.resumes,
            "loop_seconds": round(self.took[0], 3),
            "loop_cpu_seconds": round(self.took[1], 3),
            "held_out_nll": {"before": self.before, "after": after},
            "probe": {"ids": probe["input_ids"], "logprobs": trained[:-1].gather(1, ids[:, None])[:, 0].tolist()},
        }
        retried(lambda: self.job.report.write_json(report))

    def probe(self) -> Row:
        """The beginning of the first chat of the first step, the same on every worker."""
        first = Steps(self.job.packed, 0, self.workers)[0][0]
        row = next(row for row in first if row["lengths"])
        length = min(row["lengths"][0], PROBE)
        return {"input_ids": row["input_ids"][:length], "lengths": [length], "prompts": [1]}


def _upload(checkpoint: Any, name: str) -> Any:
    """This worker's files into the checkpoint's folder of the run, again when storage fails for a moment."""
    import pyarrow.fs as pafs

    storage = ray.train.get_context().get_storage()
    fs, path = storage.storage_filesystem, os.path.join(storage.experiment_fs_path, name)

    def copy() -> None:
        fs.create_dir(path, recursive=True)
        pafs.copy_files(checkpoint.path, path, source_filesystem=checkpoint.filesystem, destination_filesystem=fs)

    retried(copy)
    return ray.train.Checkpoint(path, filesystem=fs)


def retried(act: Callable[[], None], wait: float = 1.0) -> None:
    """Do it again after a storage error, `TRIES` times in all, waiting longer each time."""
    for left in reversed(range(TRIES)):
        try:
            return act()
        except OSError:
            if not left:
                raise
            time.sleep(wait)
            wait *= 4


def refusal(layout: tuple[str, int], earlier: tuple[str, int]) -> str | None:
    """Why training in `layout`, (sharding, workers), cannot go on from a checkpoint of another one; None when it can."""
    if layout == earlier or not any(mode.startswith("zero") for mode, _ in (layout, earlier)):
        return None
    return (
        f"student.sharding = {layout[0]} on {layout[1]} workers cannot go on from a checkpoint of {earlier[0]} on "
        f"{earlier[1]}: DeepSpeed's state fits its own layout alone; set them back"
    )


def learning_rate(step: int, steps: int, spec: Student) -> float:
    """Of step `step` (from 0) of `steps`: a linear rise over the warm-up's share, then the schedule down to 0."""
    warmup = round(steps * spec.warmup)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant_with_warmup": 1.0}[spec.schedule]
    return spec.learning_rate * factor


def unhealthy(losses: list[float], norm: float) -> str | None:
    """Why training should stop, seen from the losses so far and the newest gradient's norm; None when all is well."""
    last = losses[-1]
    if not math.isfinite(last) or not math.isfinite(norm):
        recent = ", ".join(f"{loss:.4g}" for loss in losses[-4:])
        return f"loss {last:g} and gradient norm {norm:g} after losses {recent}; lower student.learning_rate"
    if norm == 0:
        return f"the gradient is zero at loss {last:.4g}: nothing is learnt; check the lessons and what is trained"
    # Sustained, and far above where it began: a single hard batch is no explosion.
    if len(losses) > 10 and (now := statistics.median(losses[-5:])) > 2 * losses[0] + 2:
        return f"the loss exploded from {losses[0]:.4g} to {now:.4g}; lower student.learning_rate or student.max_grad_norm"
    return None


def peak_flops(device: torch.device) -> float | None:
    """A GPU's dense bf16 peak; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
