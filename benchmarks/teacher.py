"""The teacher's stage against the bare engine, side by side in one run, on vLLM's CPU build.

    python benchmarks/teacher.py --data DIR [--runs 5] [--rows 192] [--only R1 R2 …] [--json OUT]

DIR holds gsm8k/train.jsonl. The model is a random Llama of 25M parameters, fp32, one engine on one CPU thread, 64 tokens an
answer (random weights seldom end earlier), so that the engine is what takes the time. The sides take turns; each figure is the
median of `--runs`, with the lowest and the highest. A side's seconds begin when its engine is up; for R2, where the other side
does not tell, they are those of all rows less those of one row, engine start included, on both sides. A stage ends 1 to 2 s
after its engine: the last rows are graded and written then, so `--rows` says what that weighs.

    R1           raw vllm.LLM.generate of all prompts, then grading them one by one ÷ our stage: read, prompt, generate, grade,
                 Parquet; seconds
    engine_share seconds in which our engine had rows ÷ seconds of our stage
    R2           output tokens/s of our stage ÷ of ray.data.llm's build_processor as it comes; lengths of a long tail: answers
                 drawn at temperature 1 end at the first of a set of letters, after 512 tokens at the latest
    R3           rationales/s of our stage ÷ of transformers' generate, one prompt at a time
    R4           our seconds with 1,000 shared tokens before 200 own ÷ with them after
    R4_over_raw  R4 ÷ the same of the raw engine
    R6_repeat    tokens generated twice ÷ tokens, when the engine is killed with half of the rows on disk
    R8_reload    seconds until a kept engine has new weights ÷ until a new one is up, its process and imports included
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from figures import tell

from undo_ray import cli, engines, loop
from undo_ray.config import Engine, Sampling
from undo_ray.engines import journal
from undo_ray.place import Place

TOKENS = 64
"""Of an answer."""
FEW = 48
"""Rows of what is slow: transformers one at a time, and the long prompts of R4."""
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
answers = llm.chat(prompts, SamplingParams(temperature=0.0, max_tokens=tokens), use_tqdm=False)
from undo_ray.grading import grader
for answer in answers:
    grader("number")(answer.outputs[0].text, {"answer": "1"})
print("SECONDS", time.perf_counter() - start)
"""

RELOAD = """
import json, sys, time
from undo_ray.config import Engine, Sampling
from undo_ray.engines.vllm import VLLM
directory, [other], tokens = json.loads(sys.stdin.read())
engine = VLLM(directory, Engine(kind="vllm", context=2048), Sampling(max_tokens=tokens))
up = time.time()
assert engine.load(other)
print("SECONDS", time.time() - up, up)
"""

STOCK = """
import json, sys, tempfile
from pathlib import Path
import ray
import teacher
directory, prompts, _ = json.loads(sys.stdin.read())
# With four logical CPUs its stages, one actor each, leave none for reading, and it waits for ever.
ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
with tempfile.TemporaryDirectory() as scratch:
    print("SECONDS", *teacher.stock(directory, prompts, Path(scratch)))
"""

STOPS = tuple("QZXJ")
"""End an answer of R2."""
LONGEST = 512
"""Tokens of an answer of R2."""
PLAINLY = Sampling(max_tokens=TOKENS)

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
    return said(code, directory, prompts)[0]


def said(code: str, directory: str, prompts: list[Any]) -> list[float]:
    """What such a process says of its times."""
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    asked = json.dumps([directory, prompts, TOKENS])
    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, text=True, env=here)
    line = next((line for line in done.stdout.splitlines() if line.startswith("SECONDS")), None)
    if line is None:
        raise RuntimeError(done.stderr[-2000:])
    return [float(part) for part in line.split()[1:]]


class Stage(NamedTuple):
    """What our side took."""

    seconds: float
    """From the engine being up to the last Parquet file."""
    in_all: float
    tokens: int
    """Completion tokens."""
    busy: float
    """Seconds in which the engine had rows."""


def ours(
    directory: str,
    chats: list[Any],
    scratch: Path,
    while_it_runs: Callable[[Place], None] | None = None,
    sampling: Sampling = PLAINLY,
) -> Stage:
    """Our side, through the loop's own pool and graders."""
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
        judged(found, parse_solve, shared(5.0, 1.0), {"gsm8k"})
        return table

    begun, kept = time.time(), Place(str(place / "journal"))
    work = engines.Work(
        "teacher",
        Engine(kind="vllm", context=2048, batch_size=64),
        partial(str, directory),
        sampling,
        lambda: chat_of,
        "out",
        lambda row: [zlib.crc32(row["chat"].encode())],
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
    tokens = sum(line["generation"]["completion_tokens"] for line in journal.lines(kept))
    return Stage(end - max(start["ready"] for start in journal.starts(kept)), end - begun, tokens, journal.busy(kept))


def stock(directory: str, chats: list[Any], scratch: Path) -> tuple[float, int]:
    """(seconds in all, completion tokens) of ray.data.llm with its defaults, beside what vLLM's CPU build needs to run."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    place = Path(tempfile.mkdtemp(dir=scratch))
    pq.write_table(pa.Table.from_pylist([{"chat": json.dumps(chat)} for chat in chats]), place / "rows.parquet")
    config = vLLMEngineProcessorConfig(
        model_source=directory,
        engine_kwargs={
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "distributed_executor_backend": "uni",
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 8192,
        },
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        concurrency=1,
    )
    drawn = {"temperature": 1.0, "max_tokens": LONGEST, "stop": list(STOPS)}

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        seed = zlib.crc32(row["chat"].encode())
        return {"messages": json.loads(row["chat"]), "sampling_params": {**drawn, "seed": seed}}

    processor = build_processor(config, preprocess=asked, postprocess=lambda row: {"tokens": row["num_generated_tokens"]})
    begun = time.time()
    processor(ray.data.read_parquet(str(place / "rows.parquet"))).write_parquet(str(place / "out"))
    seconds = time.time() - begun
    return seconds, sum(pq.read_table(place / "out")["tokens"].to_pylist())


def heavy_tailed(directory: str, chats: list[Any], scratch: Path) -> float:
    """R2 of one run."""
    sampling = Sampling(temperature=1.0, max_tokens=LONGEST, stop=STOPS)
    (one, few), (many, all_of_stock) = (said(STOCK, directory, part) for part in (chats[:1], chats))
    single, whole = (ours(directory, part, scratch, sampling=sampling) for part in (chats[:1], chats))
    rate = (whole.tokens - single.tokens) / (whole.in_all - single.in_all)
    return rate / ((all_of_stock - few) / (many - one))


def reloaded(directory: str, other: str) -> float:
    """R8_reload of one run."""
    begun = time.time()
    seconds, up = said(RELOAD, directory, [other])
    return seconds / (up - begun)


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
    parser.add_argument("--only", nargs="+", help="of R1 (with R3), R2, R4 (with R4_over_raw), R6_repeat, R8_reload")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (options.data / "gsm8k/train.jsonl").open(encoding="utf-8", newline="\n") as file:
        questions = [json.loads(line)["question"] for line in file]
    cli._quiet()
    loop.start_ray(verbose=False)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as home:
        scratch = Path(home)
        directory, other = (make(scratch / name, questions[:2000]) for name in ("model", "other"))
        chats = [[{"role": "user", "content": question}] for question in questions[: options.rows]]
        words = " ".join(questions).split()
        first, last = (prompts_of(words, directory, FEW, order) for order in (True, False))

        def whole_stage() -> dict[str, float]:
            raw = alone(RAW, directory, chats)
            stage = ours(directory, chats, scratch)
            return {
                "R1": raw / stage.seconds,
                "engine_share": stage.busy / stage.seconds,
                "R3": (len(chats) / stage.seconds) / (FEW / alone(PLAIN, directory, chats[:FEW])),
                "stage_tokens_per_second": stage.tokens / stage.seconds,
                "raw_tokens_per_second": stage.tokens / raw,
            }

        def shared_part() -> dict[str, float]:
            ratio = ours(directory, first, scratch).seconds / ours(directory, last, scratch).seconds
            return {"R4": ratio, "R4_over_raw": ratio / (alone(RAW, directory, first) / alone(RAW, directory, last))}

        sides: dict[str, Callable[[], dict[str, float]]] = {
            "R1": whole_stage,
            "R2": lambda: {"R2": heavy_tailed(directory, chats, scratch)},
            "R4": shared_part,
            "R6_repeat": lambda: {"R6_repeat": killed_halfway(directory, chats, scratch)},
            "R8_reload": lambda: {"R8_reload": reloaded(directory, other)},
        }
        for _ in range(options.runs):
            for side in [sides[name] for name in sides if not options.only or name in options.only]:
                for key, value in side().items():
                    found.setdefault(key, []).append(value)
                    print(f"{key} {value:.3g}", file=sys.stderr, flush=True)
    tell(found, options.json)


if __name__ == "__main__":
    main()
