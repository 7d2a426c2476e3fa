"""The teacher's stage against the bare engine, side by side in one run, on vLLM's CPU build.

    python benchmarks/teacher.py --data DIR [--runs 5] [--rows 192] [--json OUT]

DIR holds gsm8k/train.jsonl. The model is a random Llama of 25M parameters, fp32, one engine on one CPU thread, 64 tokens an
answer (random weights seldom end earlier), so that the engine is what takes the time. The sides take turns; each figure is the
median of `--runs`, with the lowest and the highest. A side's seconds begin when its engine is up.

    R1           raw vllm.LLM.generate of all prompts ÷ our stage: read, prompt, generate, grade, Parquet; seconds
    R3           rationales/s of our stage ÷ of transformers' generate, one prompt at a time
    R4           our seconds with 1,000 shared tokens before 200 own ÷ with them after
    R4_over_raw  R4 ÷ the same of the raw engine
    R6_repeat    tokens generated twice ÷ tokens, when the engine is killed with half of the rows on disk
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from undo_ray import cli, engines, loop
from undo_ray.config import Engine, Sampling
from undo_ray.engines import journal
from undo_ray.place import Place

TOKENS = 64
"""Of an answer."""
SHARED, OWN = 1000, 200
"""Tokens of a prompt for R4."""
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}

RAW = """
import json, os, sys, time
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR"}
import torch
torch.set_num_threads(1)
from vllm import LLM, SamplingParams
directory, prompts, tokens = json.loads(sys.stdin.read())
llm = LLM(directory, dtype="float32", enforce_eager=True, distributed_executor_backend="uni", enable_prefix_caching=True,
          enable_chunked_prefill=False, max_num_batched_tokens=8192, max_model_len=2048, disable_log_stats=True)
start = time.perf_counter()
llm.chat(prompts, SamplingParams(temperature=0.0, max_tokens=tokens), use_tqdm=False)
print("SECONDS", time.perf_counter() - start)
"""

PLAIN = """
import json, sys, time, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, prompts, tokens = json.loads(sys.stdin.read())
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
start = time.perf_counter()
for chat in prompts:
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.generate(**ids, max_new_tokens=tokens, do_sample=False)
print("SECONDS", time.perf_counter() - start)
"""


def alone(code: str, directory: str, prompts: list[Any]) -> float:
    """Seconds that a side without Ray takes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([directory, prompts, TOKENS]), capture_output=True, text=True
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("SECONDS")), None)
    if line is None:
        raise RuntimeError(done.stderr[-2000:])
    return float(line.split()[1])


def ours(directory: str, chats: list[Any], scratch: Path, while_it_runs: Callable[[Place], None] | None = None) -> float:
    """Seconds from the engine being up to the last Parquet file, through the loop's own pool and graders."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray.data

    from undo_ray.generate import judged
    from undo_ray.grading.pool import shared
    from undo_ray.prompts import parse_solve

    place = Path(tempfile.mkdtemp(dir=scratch))
    rows = [{"task": "gsm8k", "answer": "1", "chat": json.dumps(chat)} for chat in chats]
    pq.write_table(pa.Table.from_pylist(rows), place / "rows.parquet")

    def chat_of(row: dict[str, Any]) -> list[Any]:
        return list(json.loads(row["chat"]))

    def grade(table: Any) -> Any:
        found = [(row, generation) for row in table.to_pylist() for generation in row["out"]]
        judged(found, parse_solve, shared(5.0, 1.0))
        return table

    kept = Place(str(place / "journal"))
    work = engines.Work(
        "teacher",
        Engine(kind="vllm", context=2048, batch_size=64),
        partial(str, directory),
        Sampling(max_tokens=TOKENS),
        lambda: chat_of,
        "out",
        lambda row: [0],
        kept,
    )
    watcher = threading.Thread(target=while_it_runs, args=(kept,)) if while_it_runs else None
    if watcher:
        watcher.start()
    blocks = ray.data.read_parquet(str(place / "rows.parquet")).repartition(target_num_rows_per_block=64)
    answered = engines.generate(blocks, work, {}).map_batches(grade, batch_format="pyarrow", zero_copy_batch=True)
    answered.write_parquet(str(place / "out"))
    end = time.time()
    if watcher:
        watcher.join()
    return end - max(start["ready"] for start in journal.starts(kept))


def killed_halfway(directory: str, chats: list[Any], scratch: Path) -> float:
    """R6_repeat of one run: completion tokens of generations that stand in the journal twice, by all of them."""
    import psutil

    found: list[Place] = []

    def kill(kept: Place) -> None:
        found.append(kept)
        while journal.finished(kept) < len(chats) // 2:
            time.sleep(0.02)
        for child in psutil.Process().children(recursive=True):
            if "MapWorker(MapBatches(Replica)" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)

    ours(directory, chats, scratch, kill)
    lines = list(journal.lines(found[0]))
    total = sum(line["generation"]["completion_tokens"] for line in lines)
    once = {line["key"]: line["generation"]["completion_tokens"] for line in lines}
    return (total - sum(once.values())) / total


def make(directory: Path, texts: Sequence[str]) -> str:
    """The model, with a tokenizer trained on the texts."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny
    from transformers import AutoModelForCausalLM, LlamaConfig

    tiny.make(directory, "llama", texts, vocabulary=4096)
    known = LlamaConfig.from_pretrained(directory).to_dict()
    config = LlamaConfig.from_dict({**known, **SHAPE, "num_key_value_heads": 4, "head_dim": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return str(directory)


def prompts_of(words: list[str], directory: str, count: int, shared_first: bool) -> list[Any]:
    """Chats of `SHARED` tokens that all have and `OWN` that one has, in either order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)

    def text(tokens: int, start: int) -> str:
        ids = tokenizer(" ".join(words[start : start + tokens]), add_special_tokens=False)["input_ids"][:tokens]
        return str(tokenizer.decode(ids))

    common = text(SHARED, 0)
    own = [text(OWN, 2000 + 300 * index) for index in range(count)]
    return [[{"role": "user", "content": f"{common}\n{one}" if shared_first else f"{one}\n{common}"}] for one in own]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (options.data / "gsm8k/train.jsonl").open(encoding="utf-8", newline="\n") as file:
        questions = [json.loads(line)["question"] for line in file]
    cli._quiet()
    loop.start_ray(verbose=False)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as home:
        scratch = Path(home)
        directory = make(scratch / "model", questions[:2000])
        chats = [[{"role": "user", "content": question}] for question in questions[: options.rows]]
        few, words = options.rows // 4, " ".join(questions).split()
        first, last = (prompts_of(words, directory, few, order) for order in (True, False))
        for _ in range(options.runs):
            raw, own = alone(RAW, directory, chats), ours(directory, chats, scratch)
            single = alone(PLAIN, directory, chats[:few])
            ratio = ours(directory, first, scratch) / ours(directory, last, scratch)
            of_raw = alone(RAW, directory, first) / alone(RAW, directory, last)
            for key, value in {
                "R1": raw / own,
                "R3": (len(chats) / own) / (few / single),
                "R4": ratio,
                "R4_over_raw": ratio / of_raw,
                "R6_repeat": killed_halfway(directory, chats, scratch),
                "stage_tokens_per_second": len(chats) * TOKENS / own,
                "raw_tokens_per_second": len(chats) * TOKENS / raw,
            }.items():
                found.setdefault(key, []).append(value)
    print("| | median | lowest | highest |\n|---|---|---|---|")
    for key, values in found.items():
        print(f"| {key} | {statistics.median(values):.3g} | {min(values):.3g} | {max(values):.3g} |")
    if options.json:
        options.json.write_text(json.dumps({key: statistics.median(values) for key, values in found.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
