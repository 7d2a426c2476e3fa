"""finetune(): lessons to a student, on Ray Train.

Chats become tokens once, in Ray Data, with the loss on the assistant's tokens only. Inside each training worker the
transformers `Trainer` (over accelerate) does the loop; see docs/decisions.md for why. What is ours: the masking, the order of
the chats, the export, and the proof that the export is the model that was trained.

The order is a hash of (seed, pass, problem id): the same for any file order and any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads

from undo_ray import models
from undo_ray.config import Recipe, Student
from undo_ray.place import Place
from undo_ray.store import Stage
from undo_ray.types import Message, Row, UserError

if TYPE_CHECKING:
    from ray.data import Dataset

TOKENS = pa.schema([("id", pa.string()), ("round", pa.int64()), ("input_ids", pa.list_(pa.int32())), ("prompt", pa.int32())])
"""A tokenised chat; the first `prompt` of its `input_ids` carry no loss."""

PROBE_TOLERANCE = 1e-3
"""Largest difference of log-probabilities between the trained model and its export, in fp32 (identical weights give 0–1e-5)."""


def finetune(lessons: Dataset, start: str, recipe: Recipe, out: Stage) -> None:
    """Fine-tune `start` (a ModelRef) on the lessons; the stage's model is a Hugging Face directory.

    With `round0 = "student:PATH"` round 0 takes that student as it is.

    Raises UserError when no chat fits `student.max_length` or a chat has no supervised tokens.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    spec = recipe.student
    tokens = out.place / "tokens"
    if out.round == 0 and recipe.round0.startswith("student:"):
        out.model.upload(models.local(recipe.round0.removeprefix("student:"), recipe.seed))
        return
    figures = _tokenise(lessons, start, recipe, tokens)
    config = {
        "start": start,
        "tokens": tokens,
        "export": out.model,
        "spec": spec,
        "seed": recipe.seed,
        "board": out.progress.board,
    }
    state = out.place / "ray_train"
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if spec.resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=spec.workers,
            use_gpu=spec.resources.gpus > 0,
            resources_per_worker={"CPU": spec.resources.cpus, **({"GPU": spec.resources.gpus} if spec.resources.gpus else {})},
        ),
        # The name must be new each time: Ray Train resumes whatever a name it has seen left behind.
        run_config=RunConfig(name=uuid.uuid4().hex, storage_path=state.path, storage_filesystem=state.fs),
    )
    trainer.fit()
    report = (out.model / "training.json").read_json("delete the student stage's folder and run the same command")
    (out.model / "training.json").fs.delete_file((out.model / "training.json").path)
    for scratch in (tokens, state):
        scratch.remove()
    out.note(**figures, **report, gpus=spec.workers * spec.resources.gpus)


# -- chats to tokens ----------------------------------------------------------------------------------------------------


def _tokenise(lessons: Dataset, start: str, recipe: Recipe, place: Place) -> dict[str, int]:
    """Write the lessons as `TOKENS` Parquet; returns {chats, too_long}."""
    total = lessons.count()
    tokenise = partial(_tokens_of, start=start, seed=recipe.seed, max_length=recipe.student.max_length)
    place.fs.create_dir(place.path, recursive=True)
    lessons.map_batches(tokenise, batch_format="pyarrow", zero_copy_batch=True).write_parquet(place.path, filesystem=place.fs)
    kept = sum(part.count_rows() for part in pads.dataset(place.path, filesystem=place.fs).get_fragments())
    if kept == 0:
        raise UserError(
            f"student.max_length = {recipe.student.max_length}: none of the {total} lessons fits; raise it", exit_code=2
        )
    return {"chats": kept, "too_long": total - kept}


def _tokens_of(table: pa.Table, start: str, seed: int, max_length: int) -> pa.Table:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.local(start, seed))
    rows = []
    for row in table.to_pylist():
        input_ids, prompt = supervised(tokenizer, row["messages"])
        if len(input_ids) <= max_length:
            rows.append({"id": row["id"], "round": row["round"], "input_ids": input_ids, "prompt": prompt})
    return pa.Table.from_pylist(rows, schema=TOKENS)


def supervised(tokenizer: Any, messages: list[Message]) -> tuple[list[int], int]:
    """(token ids of the whole chat, how many of them are prompt), told apart by token prefix.

    Raises UserError, showing the chat as the model would see it, when the template leaves the assistant nothing to learn or
    rewrites what came before it.
    """
    render = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
    prompt = list(render(messages[:-1], add_generation_prompt=True))
    whole = list(render(messages))
    answer = tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)
    # Through the tokenizer once: normalisation and special tokens spelt out in the text are no fault of the template.
    content = tokenizer.decode(
        tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"], skip_special_tokens=True
    )
    if whole[: len(prompt)] != prompt or not answer.strip() or content.strip() not in answer:
        raise UserError(
            "the student's chat template drops or rewrites part of this chat, so the answer cannot be told from the prompt; "
            f"use another template. The chat as the model would see it: {tokenizer.decode(whole)!r}"
        )
    return whole, len(prompt)


def training_order(lengths: dict[tuple[str, int], int], seed: int, spec: Student) -> list[tuple[str, int]]:
    """The chats, by (id, round), in the order they are trained on: whole batches, pass after pass.

    `lengths`: tokens of each chat. It ends after the first batch that reaches `spec.tokens`, or after `spec.epochs` passes
    (rounded up to a whole batch).
    """
    keys = sorted(lengths)
    order: list[tuple[str, int]] = []
    limit = math.ceil(len(keys) * spec.epochs) if spec.epochs is not None else None
    seen, epoch = 0, 0
    while True:
        for key in sorted(keys, key=lambda key: hashlib.sha256(repr((seed, epoch, *key)).encode()).digest()):
            at_edge = len(order) % spec.batch_size == 0 and bool(order)
            if at_edge and (len(order) >= limit if limit is not None else seen >= (spec.tokens or 0)):
                return order
            order.append(key)
            seen += lengths[key]
        epoch += 1


# -- the worker ---------------------------------------------------------------------------------------------------------


def _worker(config: dict[str, Any]) -> None:
    """One data-parallel training worker (Ray Train calls it on each)."""
    import ray.train
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec: Student = config["spec"]
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(max(1, int(spec.resources.cpus)))
    directory = models.local(config["start"], config["seed"])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens: Place = config["tokens"]
    chats = {(row["id"], row["round"]): row for row in pads.dataset(tokens.path, filesystem=tokens.fs).to_table().to_pylist()}
    order = training_order({key: len(row["input_ids"]) for key, row in chats.items()}, config["seed"], spec)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, [chats[key] for key in order], tokenizer, spec, config, scratch, world, rank)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if not all(math.isfinite(loss) for loss in losses):
            raise FloatingPointError(
                f"the training loss is not finite (last: {losses[-3:]}); lower student.learning_rate = {spec.learning_rate}"
            )
        if rank == 0:
            export = os.path.join(scratch, "export")
            trained = trainer.accelerator.unwrap_model(trainer.model)
            _export(trained, tokenizer, export, chats[order[0]])
            report = {
                "steps": trainer.state.global_step,
                "tokens": sum(len(chats[key]["input_ids"]) for key in order),
                "passes": round(len(order) / len(chats), 3),
                "loss": {"first": losses[0], "last": losses[-1]},
            }
            with open(os.path.join(export, "training.json"), "w", encoding="utf-8") as file:
                json.dump(report, file)
            config["export"].upload(export)
    ray.train.report({})


def _trainer(
    model: Any, chats: list[Row], tokenizer: Any, spec: Student, config: dict[str, Any], scratch: str, world: int, rank: int
) -> Any:
    """A transformers Trainer that takes the chats in the order given."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), pad)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for index, row in enumerate(rows):
            own = torch.tensor(row["input_ids"])
            ids[index, : len(own)], mask[index, : len(own)] = own, 1
            labels[index, row["prompt"] : len(own)] = own[row["prompt"] :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(chats)

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if rank == 0 and config["board"] is not None and logs and "loss" in logs:
                config["board"].set.remote(done=state.global_step, total=state.max_steps, loss=logs["loss"])

    steps = math.ceil(len(chats) / spec.batch_size)
    per_worker = spec.batch_size // world
    micro = spec.micro_batch or per_worker
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_worker // micro,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=round(steps * spec.warmup),
        weight_decay=spec.weight_decay,
        adam_beta2=spec.beta2,
        max_grad_norm=spec.max_grad_norm,
        bf16=spec.dtype == "bfloat16",
        use_cpu=not spec.resources.gpus,
        seed=config["seed"],
        save_strategy="no",
        report_to=[],
        logging_strategy="steps",
        logging_steps=max(1, min(20, steps // 10)),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=bool(spec.resources.gpus),
        remove_unused_columns=False,
    )
    return InOrder(model=model, args=arguments, train_dataset=chats, data_collator=collate, callbacks=[Report()])


def _export(model: Any, tokenizer: Any, directory: str, probe: Row) -> None:
    """Save as a Hugging Face directory, load it once as the next stage will, and compare log-probabilities on a probe chat."""
    import torch
    from transformers import AutoModelForCausalLM

    model = model.to("cpu").float().eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    ids = torch.tensor([probe["input_ids"]])
    with torch.inference_mode():
        trained = model(input_ids=ids).logits.log_softmax(-1)
        loaded = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(input_ids=ids).logits.log_softmax(-1)
        )
    difference = (trained - loaded).abs().max().item()
    if not difference <= PROBE_TOLERANCE:
        raise RuntimeError(
            f"the exported student differs from the trained one: log-probabilities by up to {difference:.2g} on a lesson"
        )
