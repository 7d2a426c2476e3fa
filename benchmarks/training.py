"""Training, measured side by side in one run on the same rows.

    python benchmarks/training.py --data DIR [--rows 200] [--rounds 3] [--json OUT]

DIR holds gsm8k/train.jsonl and math/train.jsonl (columns question, answer or solution). On a CPU a Llama of 5M parameters in
fp32 on one thread; on a GPU Qwen2.5-1.5B's geometry in bf16, with and without Liger's kernels. TRL (`pip install trl==1.16.0`)
takes part when it is installed. Every variant trains the same chats and is timed in turn, `--rounds` times; the best of each
counts. Tokens are those of chats, never padding; on a CPU the time is that of the process (all its threads), so that
neighbours on the machine weigh less.

    packing_efficiency    tokens/s packed ÷ padded, over the ideal: padded positions ÷ tokens
    over_trl_packing      tokens/s packed ÷ TRL's SFTTrainer with packing
    ray_train_overhead    time of the same steps through Ray Train ÷ without it, less 1, start-up apart
    startup_seconds       of Ray Train, from fit() to the first step
    peak_150k_gb          peak memory of a pass with a vocabulary of 150,000: the loss in pieces, and torch's
    memory_gb             on a GPU: CUDA's count at the peak of the packed variant, and what docs/training.md's formula says
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from undo_ray.config import Student
from undo_ray.train import model, sharding
from undo_ray.train.packing import rows_of, supervised_tokens
from undo_ray.train.tokens import supervised
from undo_ray.train.worker import peak_flops

LENGTH = 1024
"""Most tokens of a chat, and of a packed row of TRL."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
BATCH = 128 if GPU else 16
"""Chats of an optimiser step."""
ROOM = 16 * LENGTH if GPU else LENGTH
"""Tokens of a packed row (`student.micro_tokens`)."""
PADDED = 16 if GPU else 8
"""Chats of a padded batch; 64 run out of 140 GB with the GPU's model."""
TRL = [False, True] if GPU else [False]
"""TRL with Liger's kernels or without; flash attention's package is not needed for either."""
SHAPE = {
    "cpu": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
    "cuda": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
}[DEVICE.type]


def chats(data: Path, name: str, rows: int) -> list[list[dict[str, str]]]:
    """Questions with their worked answers, drawn by a fixed seed."""
    with (data / name / "train.jsonl").open(encoding="utf-8", newline="\n") as file:
        read = [json.loads(line) for line in file]
    drawn = random.Random(0).sample(read, min(rows, len(read)))
    answers = [row.get("solution") or row.get("rationale") or row["answer"] for row in drawn]
    asked = [{"role": "user", "content": row["question"]} for row in drawn]
    return [[ask, {"role": "assistant", "content": answer}] for ask, answer in zip(asked, answers, strict=True)]


def make(directory: Path, texts: list[str]) -> str:
    """A random Llama (on a GPU: Qwen2) of `SHAPE` with a byte-level tokenizer trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = (Qwen2Config if GPU else LlamaConfig)(
        **{"vocab_size": len(tokenizer), **SHAPE},
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with DEVICE:  # drawing 1.5 billion normal numbers takes a CPU a minute
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.save_pretrained(directory)
    return str(directory)


def clock() -> float:
    if GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


Tokens = list[tuple[list[int], int]]


def steps_of(tokens: Tokens) -> list[Tokens]:
    """Chats in steps of `BATCH`, in a fixed random order; a rest is left out."""
    mixed = random.Random(1).sample(tokens, len(tokens))
    return [mixed[i : i + BATCH] for i in range(0, len(mixed) - BATCH + 1, BATCH)]


def packed_rows(step: Tokens) -> list[dict[str, Any]]:
    keyed = {(str(i), 0): chat for i, chat in enumerate(step)}
    rows = rows_of(list(keyed), {key: len(ids) for key, (ids, _) in keyed.items()}, ROOM, 1)
    return [
        {
            "input_ids": [token for key in keys for token in keyed[key][0]],
            "lengths": [len(keyed[key][0]) for key in keys],
            "prompts": [keyed[key][1] for key in keys],
        }
        for keys in rows
    ]


def ours(directory: str, spec: Student, steps: list[Tokens], warm: bool = True) -> float:
    """Seconds for the steps, packed, by the loop's own parts without Ray."""
    sharded = sharding.shard(model.Scored(model.load(directory, spec)), spec, DEVICE)
    packed = [packed_rows(step) for step in steps]

    def run(chosen: list[list[dict[str, Any]]]) -> None:
        for rows in chosen:
            total = sum(map(supervised_tokens, rows))
            for index, row in enumerate(rows):
                with sharded.micro(last=index == len(rows) - 1):
                    sharded.backward(sharded.module(model.batch(row, DEVICE)) / total)
            sharded.step(1e-4)

    return timed(run, packed, warm)


def padded(directory: str, spec: Student, steps: list[Tokens]) -> float:
    """The same without packing: `PADDED` chats at a time, each as long as the longest, torch's attention with a mask."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").to(DEVICE).train()
    optimizer = sharding.adamw(lm, spec)

    def run(chosen: list[Tokens]) -> None:
        for step in chosen:
            total = sum(len(ids) - max(1, prompt) for ids, prompt in step)
            for first in range(0, len(step), PADDED):
                part = step[first : first + PADDED]
                width = max(len(ids) for ids, _ in part)
                ids, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width, dtype=torch.long)
                labels = torch.full_like(ids, -100)
                for index, (own, prompt) in enumerate(part):
                    ids[index, : len(own)], mask[index, : len(own)] = torch.tensor(own), 1
                    labels[index, max(1, prompt) : len(own)] = torch.tensor(own[max(1, prompt) :])
                ids, mask, labels = ids.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE)
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
                    hidden = lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
                    wanted = labels[:, 1:] >= 0
                    loss = model.head_loss(hidden[wanted], lm.lm_head, labels[:, 1:][wanted])
                (loss / total).backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return timed(run, steps)


def timed(run: Callable[[list[Any]], None], steps: list[Any], warm: bool = True) -> float:
    if warm:
        run(steps[:2])
    tidy()
    start = clock()
    run(steps)
    return clock() - start


def tidy() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def trl(directory: str, spec: Student, steps: list[Tokens], liger: bool) -> tuple[float, int] | None:
    """(seconds, tokens) of TRL's SFTTrainer with its packing; None where TRL is not installed.

    Packed rows of `LENGTH`, on a GPU as many tokens at a time as ours, on a CPU two rows (no other number was tried there);
    loss on the completion, torch's SDPA, fused AdamW.
    """
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    rows = [
        {"input_ids": ids, "completion_mask": [0] * max(1, prompt) + [1] * (len(ids) - max(1, prompt))}
        for step in steps
        for ids, prompt in step
    ]

    class Clock(TrainerCallback):
        start = end = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                Clock.start = clock()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            Clock.end = clock()

    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            packing=True,
            max_length=LENGTH,
            per_device_train_batch_size=ROOM // LENGTH if GPU else 2,
            num_train_epochs=1,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            bf16=spec.dtype == "bfloat16",
            use_cpu=not GPU,
            use_liger_kernel=liger,
            gradient_checkpointing=False,
            completion_only_loss=True,
            save_strategy="no",
            report_to=[],
            logging_steps=10_000,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        lm = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        trainer = SFTTrainer(
            lm, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]
        )
        loader = iter(trainer.get_train_dataloader())
        widths = [int((batch["input_ids"] != tokenizer.pad_token_id).sum()) for batch in loader]
        trainer.train()
    done = sum(widths[2:]) / max(1, len(widths) - 2)  # the order differs from epoch to epoch: the mean step
    return Clock.end - Clock.start, round(done * (len(widths) - 2))


def through_ray(directory: str, spec: Student, steps: list[Tokens], place: Path) -> dict[str, float]:
    """The same steps through Ray Train on one worker: seconds of the loop, of its process, and before it."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    from undo_ray import config, loop
    from undo_ray.place import Place
    from undo_ray.progress import Progress
    from undo_ray.store import open_run
    from undo_ray.train import _train
    from undo_ray.train.packing import PACKED

    if not ray.is_initialized():
        loop.start_ray(verbose=False)
    packed = place / "packed"
    packed.mkdir(parents=True)
    rows = [
        {"step": step, "row": index, "ids": [], **row}
        for step, chosen in enumerate(steps)
        for index, row in enumerate(packed_rows(chosen))
    ]
    for first in range(0, len(steps), 64):
        part = [row for row in rows if row["step"] // 64 == first // 64]
        pq.write_table(pa.Table.from_pylist(part, schema=PACKED), packed / f"steps-{first // 64:06d}.parquet")
    pq.write_table(pa.Table.from_pylist([], schema=PACKED), packed / "held-out.parquet")
    recipe = config.load(Path(__file__).parent.parent / "jobs/recipes/mini.toml").model_copy(update={"student": spec})
    found: dict[str, float] = {}
    with open_run(str(place / "run"), recipe, {}, Progress(io.StringIO())) as run:

        def stage(out: Any) -> None:
            start = time.perf_counter()
            report = _train(directory, recipe, out, out.resume, Place(str(packed)), {"steps": len(steps)})
            total = time.perf_counter() - start
            found.update(total=total, loop=report["loop_seconds"], cpu=report["loop_cpu_seconds"])

        run.round(0).once("student", stage)
    return found


def peak(which: str) -> float:
    """Peak memory (GB, beyond the model) of a forward and backward pass over 2,048 positions and 150,000 words; in a process
    of its own."""
    loss = {"pieces": "model.head_loss(hidden, head, targets)", "torch": "F.cross_entropy(head(hidden), targets)"}[which]
    code = (
        "import torch, torch.nn.functional as F; from undo_ray.train import model\n"
        "torch.manual_seed(0); head = torch.nn.Linear(64, 150_000, bias=False)\n"
        "hidden, targets = torch.randn(2048, 64, requires_grad=True), torch.randint(0, 150_000, (2048,))\n"
        "def high(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        "F.cross_entropy(head(hidden[:8]), targets[:8]).backward(); before = high()\n"
        f"{loss}.backward(); print((high() - before) / 1e9)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])


@contextmanager
def restored() -> Iterator[None]:
    """Take back what a variant puts into transformers' modules for all models (Liger's kernels)."""
    from transformers.models.qwen2 import modeling_qwen2

    before = dict(vars(modeling_qwen2))
    try:
        yield
    finally:
        vars(modeling_qwen2).update(before)


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process alone, for the modes that shard."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group(
            "nccl", init_method=f"file://{scratch}/group", rank=0, world_size=1, device_id=torch.device("cuda", 0)
        )
        yield
        dist.destroy_process_group()


def measured(
    directory: str, spec: Student, steps: list[Tokens], real: int, rounds: int, result: dict[str, Any]
) -> dict[str, float]:
    """Tokens per second of every variant, the best of `rounds`, by name."""
    speed: dict[str, float] = {}

    def keep(name: str, rate: float) -> None:
        speed[name] = max(speed.get(name, 0), rate)
        print(f"{name}: {rate:,.0f} tokens/s", file=sys.stderr)
        tidy()

    with_liger = spec.model_copy(update={"kernels": "liger"})
    for _ in range(rounds):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        keep("packed", real / ours(directory, spec, steps))
        if GPU:
            result["memory_gb"] = {"measured": torch.cuda.max_memory_allocated() / 1e9, "formula": formula(directory, spec)}
            keep("packed, Liger", real / ours(directory, with_liger, steps))
            with alone():
                keep("packed, Liger, fsdp2", real / ours(directory, with_liger.model_copy(update={"sharding": "fsdp2"}), steps))
        keep("padded", real / padded(directory, spec, steps))
        for liger in TRL:
            name = "TRL packed, Liger" if liger else "TRL packed"
            try:
                with restored():
                    timing = trl(directory, spec, steps, liger)
            except Exception as error:  # a peer's variant that does not run here is left out, and said
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                continue
            if timing is not None:
                keep(name, timing[1] / timing[0])
    return speed


def formula(directory: str, spec: Student) -> float:
    """GB that docs/training.md foretells."""
    from undo_ray.train import memory

    return sum(memory.need(memory.Shape.of(model.load(directory, spec)), spec).values()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200, help="chats of each set")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the best counts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = Student.model_validate(
        {
            "model": "m",
            "epochs": 1,
            "batch_size": BATCH,
            "max_length": LENGTH,
            "held_out": 0.0,
            "sharding": "none",
            "micro_tokens": ROOM,
            "dtype": "bfloat16" if GPU else "float32",
            "resources": {"cpus": 1, "gpus": int(GPU)},
        }
    )
    table: list[tuple[str, str, str]] = []
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if GPU else "cpu, one thread"}
    with tempfile.TemporaryDirectory() as scratch:
        sets = {name: chats(options.data, name, options.rows) for name in ("gsm8k", "math")}
        texts = [message["content"] for found in sets.values() for chat in found for message in chat]
        directory = make(Path(scratch) / "model", texts)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        for name, found in sets.items():
            tokens = [pair for pair in (supervised(tokenizer, chat) for chat in found) if len(pair[0]) <= LENGTH]
            steps = steps_of(tokens)
            real = sum(len(ids) for step in steps for ids, _ in step)
            parts = [step[i : i + PADDED] for step in steps for i in range(0, len(step), PADDED)]
            ideal = sum(len(part) * max(len(ids) for ids, _ in part) for part in parts) / real
            speed = measured(directory, spec, steps, real, options.rounds, result)
            efficiency = speed["packed"] / speed["padded"] / ideal
            result[name] = {**speed, "ideal": ideal, "packing_efficiency": efficiency, "tokens": real}
            table.append((name, "chats, tokens", f"{sum(map(len, steps))}, {real:,}"))
            table.append((name, "padded, tokens/s", f"{speed['padded']:,.0f}"))
            table += [(name, f"{key}, tokens/s", f"{rate:,.0f}") for key, rate in speed.items() if key.startswith("packed")]
            table.append((name, "packed ÷ padded, over the ideal of " + f"{ideal:.2f}", f"{efficiency:.2f}"))
            if (best := peak_flops(DEVICE)) is not None:
                from transformers import AutoModelForCausalLM

                flops = model.flops_per_token(AutoModelForCausalLM.from_pretrained(directory))
                result[name]["mfu"] = {which: rate * flops / best for which, rate in speed.items()}
                table += [(name, f"MFU, {which}", f"{share:.1%}") for which, share in result[name]["mfu"].items()]
            peers = {which: rate for which, rate in speed.items() if which.startswith("TRL")}
            if peers:
                best_of_ours = max(rate for which, rate in speed.items() if which.startswith("packed"))
                result[name]["over_trl_packing"] = best_of_ours / max(peers.values())
                table += [(name, f"{which}, tokens/s", f"{rate:,.0f}") for which, rate in peers.items()]
                table.append((name, "packed ÷ TRL packed", f"{result[name]['over_trl_packing']:.2f}"))
            else:
                table.append((name, "TRL", "not installed"))
            if name == "gsm8k":
                runs = [through_ray(directory, spec, steps, Path(scratch) / f"ray-{round}") for round in range(options.rounds)]
                fastest = min(run["loop" if GPU else "cpu"] for run in runs)
                bare = min(ours(directory, spec, steps, warm=False) for _ in range(options.rounds))  # cold, as the worker's
                result["ray_train_overhead"] = fastest / bare - 1
                result["startup_seconds"] = min(run["total"] - run["loop"] for run in runs)
                table.append((name, "Ray Train, same steps, more time", f"{result['ray_train_overhead']:+.1%}"))
                table.append((name, "Ray Train, start-up and export, s", f"{result['startup_seconds']:.1f}"))
    for key in ("packing_efficiency", "over_trl_packing"):
        if all(key in result[name] for name in sets):
            result[key] = min(result[name][key] for name in sets)
    result["peak_150k_gb"] = {which: peak(which) for which in ("pieces", "torch")}
    table += [("", f"vocabulary 150,000, peak GB, {which}", f"{size:.2f}") for which, size in result["peak_150k_gb"].items()]
    print("| Rows | Measure | |\n|---|---|---|")
    print("\n".join(f"| {name} | {what} | {value} |" for name, what, value in table))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
