"""Both engines against plain greedy decoding by transformers, and the pool around them."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny

from undo_ray import engines, models
from undo_ray.config import Engine, Sampling
from undo_ray.engines import prompt_ids
from undo_ray.mini import models as mini
from undo_ray.place import Place

SHARED = "Here is a long text that all the prompts begin with, so that its keys and values need be computed once only. " * 3
QUESTIONS = [
    "What is 2 + 3?",
    "How many legs have four cats and a dog?",
    "Why?",
    "Tom has 12 pens and loses 7. How many are left?",
]

MINI_TEXTS = [
    "sam has 66 cups and finds 49 more. how many cups are there in all?",
    "what is the tens digit of 48?",
    "ben counts 7 shells, leo counts 8 and zoe counts 6. how many shells are the most?",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.make(tmp_path_factory.mktemp("llama"), "llama", [SHARED, *QUESTIONS], seed=3)


def reference(directory: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations by plain `generate`, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
        found.append(output[0, len(prompt) :].tolist())
    return found


def chats(directory: str, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def answers(backend: engines.Backend, prompts: list[list[int]], seeds: list[int]) -> list[engines.Completion]:
    """What the backend gives, in the order of the prompts."""
    found = dict(backend.complete(prompts, seeds))
    return [completion for index in range(len(prompts)) if not isinstance(completion := found[index], str)]


@pytest.mark.parametrize("shared", ["", SHARED])
def test_batched_transformers_writes_what_plain_generate_writes(llama: str, shared: str) -> None:
    from undo_ray.engines.hf import Transformers

    prompts = chats(llama, [shared + question for question in QUESTIONS])
    backend = Transformers(llama, Engine(), Sampling(max_tokens=24))
    for _ in range(2):  # the second time the shared part's keys and values are there
        completions = answers(backend, prompts, [0] * len(prompts))
        assert [completion.token_ids for completion in completions] == reference(llama, prompts, 24)
    common = next(i for i in range(9999) if len({prompt[i] for prompt in prompts}) > 1)
    assert {completion.cached_tokens for completion in completions} == ({common} if shared else {0})


@pytest.mark.parametrize("architecture", ["mistral", "lfm2", "mamba"])
def test_a_model_that_does_not_attend_to_all_shares_nothing_and_writes_what_plain_generate_writes(
    architecture: str, tmp_path: Path
) -> None:
    from undo_ray.engines.hf import Transformers

    directory = tiny.make(tmp_path, architecture, [SHARED, *QUESTIONS], seed=3)
    prompts = chats(directory, [SHARED + question for question in QUESTIONS])
    backend = Transformers(directory, Engine(), Sampling(max_tokens=24))
    for _ in range(2):
        completions = answers(backend, prompts, [0] * len(prompts))
        assert [completion.token_ids for completion in completions] == reference(directory, prompts, 24)
    assert {completion.cached_tokens for completion in completions} == {0}


def test_one_prompt_shares_nothing(llama: str) -> None:
    from undo_ray.engines.hf import Transformers

    [prompt] = chats(llama, [SHARED])
    [completion] = answers(Transformers(llama, Engine(), Sampling(max_tokens=24)), [prompt], [0])
    assert completion.cached_tokens == 0 and completion.token_ids == reference(llama, [prompt], 24)[0]


def test_a_shared_part_whose_pass_failed_is_computed_anew(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the memory was short for it; what an earlier batch shared must not stand in for it."""
    import torch

    from undo_ray.engines.hf import Transformers

    backend = Transformers(llama, Engine(), Sampling(max_tokens=24))
    answers(backend, chats(llama, [SHARED + question for question in QUESTIONS]), [0] * len(QUESTIONS))
    plain, calls = backend.model.forward, 0

    def short(*args: Any, **others: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("no room")
        return plain(*args, **others)

    monkeypatch.setattr(backend.model, "forward", short)
    prompts = chats(llama, [SHARED[::-1] + question for question in QUESTIONS])
    assert [found.token_ids for found in answers(backend, prompts, [0] * len(prompts))] == reference(llama, prompts, 24)


def test_the_context_of_a_model_that_sees_images_too_is_that_of_its_text() -> None:
    from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig

    text = Gemma3TextConfig(max_position_embeddings=8192)
    assert models.context(Gemma3Config(text_config=text)) == 8192
    assert models.context(LlamaConfig(max_position_embeddings=512)) == 512


def test_an_answer_cut_short_says_so_and_an_ended_one_too() -> None:
    from undo_ray.engines.hf import Transformers

    teacher = mini.teacher(0)
    prompts = chats(teacher, ["sam has 66 cups and finds 49 more. how many cups are there in all?"])
    [short] = answers(Transformers(teacher, Engine(), Sampling(max_tokens=5)), prompts, [0])
    [whole] = answers(Transformers(teacher, Engine(), Sampling(max_tokens=96)), prompts, [0])
    assert (short.finish_reason, len(short.token_ids)) == ("length", 5)
    assert whole.finish_reason == "stop" and whole.token_ids[:5] == short.token_ids


def test_an_answer_ends_with_the_turn_where_a_base_model_names_another_end(tmp_path: Path) -> None:
    """As Qwen2.5's base models do. The model here says the end of the turn whatever it is asked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from undo_ray import models
    from undo_ray.engines.hf import Transformers
    from undo_ray.train import export

    base = tiny.make(tmp_path / "base", "llama", [SHARED])
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    turn, text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    tokenizer.eos_token = "<|endoftext|>"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[turn] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=text)
    for part in (tokenizer, model):
        part.save_pretrained(base)
    export.write(model.state_dict(), base, str(tmp_path / "student"))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert set(student.generation_config.eos_token_id) == {text, turn}
    prompts, backends = chats(base, QUESTIONS), [Transformers]
    if importlib.util.find_spec("vllm"):
        from undo_ray.engines.vllm import VLLM

        backends.append(VLLM)
    for backend in backends:
        for completion in answers(backend(base, Engine(context=512), Sampling(max_tokens=8)), prompts, [0] * len(prompts)):
            assert (completion.token_ids, completion.finish_reason) == ([turn], "stop")
    assert models.turn_end(AutoTokenizer.from_pretrained(mini.teacher(0))) == 2, "its end of text is the end of its turns"


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it() -> None:
    """The miniature teacher ends its steps with that tag."""
    from undo_ray.engines.hf import Transformers

    teacher = mini.teacher(0)
    asked = [[{"role": "user", "content": text}] for text in MINI_TEXTS]
    plain, cut = Sampling(max_tokens=96), Sampling(max_tokens=96, stop=("</think>", "never"))
    local = [engines.Local(Transformers(teacher, Engine(), sampling), sampling, {}) for sampling in (plain, cut)]
    whole, ended = (dict(engine.answer(asked, [0] * len(asked))) for engine in local)
    for index in range(len(asked)):
        head, found, _ = whole[index]["text"].partition("</think>")
        assert found and ended[index]["text"] == head and ended[index]["finish_reason"] == "stop"
        assert 0 < ended[index]["completion_tokens"] < whole[index]["completion_tokens"]


def test_variables_of_the_chat_template_reach_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.make(tmp_path, "llama", [SHARED]))
    tokenizer.chat_template = tiny.CHATML + "{% if enable_thinking is false %}<think></think>{% endif %}"
    chat: list[Any] = [{"role": "user", "content": "Why?"}]
    plain, switched = prompt_ids(tokenizer, chat), prompt_ids(tokenizer, chat, enable_thinking=False)
    assert tokenizer.decode(switched[len(plain) :]) == "<think></think>" and switched[: len(plain)] == plain


def test_sampling_is_repeatable_and_depends_on_the_seed(llama: str) -> None:
    from undo_ray.engines.hf import Transformers

    backend = Transformers(llama, Engine(), Sampling(temperature=1.0, max_tokens=16))
    prompts = chats(llama, QUESTIONS)
    first, again, other = (answers(backend, prompts, seeds) for seeds in ([1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]))
    assert first == again != other


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_vllm_writes_what_transformers_writes_and_does_so_with_other_weights(tied: bool, tmp_path: Path) -> None:
    """With tied embeddings vLLM's CPU build would keep the old head: there only a new process can have the new weights."""
    pytest.importorskip("vllm")
    import json
    import subprocess
    import sys

    directory = tiny.make(tmp_path / "tied", "qwen2", [SHARED], seed=5) if tied else mini.teacher(0)
    prompts = chats(directory, MINI_TEXTS)
    # In a process of its own, as in a run: the engine takes over threads and environment of the process it lives in.
    script = (
        "import json, sys, time\n"
        "from undo_ray.config import Engine, Sampling\n"
        "from undo_ray.engines.vllm import VLLM\n"
        "backend = VLLM(sys.argv[1], Engine(kind='vllm'), Sampling(max_tokens=40, stop=('</think>',)))\n"
        "done = dict(backend.complete(json.loads(sys.argv[2]), [0] * 3))\n"
        "print('TOKENS', json.dumps([done[index].token_ids for index in range(3)]))\n"
        "loaded = backend.load(sys.argv[3])\n"
        "done = dict(backend.complete(json.loads(sys.argv[2]), [0] * 3))\n"
        "print('RELOADED', json.dumps([loaded, [done[index].token_ids for index in range(3)]]))\n"
        "def broken(*_):\n"
        "    raise OSError('the engine is gone')\n"
        "backend.engine.add_request, begun = broken, time.monotonic()\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        list(backend.complete(json.loads(sys.argv[2]), [0] * 3))\n"
        "    except OSError as error:\n"
        "        print('BROKEN', error, time.monotonic() - begun < 60)\n"
    )
    other = _with_other_weights(directory, tmp_path / "other")
    command = [sys.executable, "-c", script, directory, json.dumps(prompts), other]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300)
    found = dict(line.split(" ", 1) for line in run.stdout.splitlines() if line.startswith(("TOKENS", "RELOADED")))
    assert set(found) == {"TOKENS", "RELOADED"}, run.stderr[-3000:]
    assert run.stdout.count("BROKEN the engine is gone True") == 2, "callers are told at once"
    assert json.loads(found["TOKENS"]) == up_to(directory, "</think>", reference(directory, prompts, 40))
    loaded, tokens = json.loads(found["RELOADED"])
    assert loaded is not tied
    assert tokens == up_to(directory, "</think>", reference(directory if tied else other, prompts, 40))


def up_to(directory: str, stop: str, answers: list[list[int]]) -> list[list[int]]:
    """The answers up to the token that completes the stop string, where they have it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ends = [[n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n])] for ids in answers]
    return [ids[: end[0]] if end else ids for ids, end in zip(answers, ends, strict=True)]


def _with_other_weights(directory: str, target: Path) -> str:
    """A copy of a model, every weight of it changed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().clamp(min=0.02))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(directory).save_pretrained(target)
    return str(target)


def test_the_pool_answers_each_row_and_a_row_it_cannot_answer_keeps_its_place(
    cluster: None, llama: str, tmp_path: Path
) -> None:
    import ray.data

    def ask(row: dict[str, str]) -> list[dict[str, str]] | None:
        return None if row["question"] == "pass" else [{"role": "user", "content": row["question"]}]

    questions = ["What is 1 + 1?", "pass", "too long " * 400, "What is 2 + 2?"]
    rows = ray.data.from_arrow(pa.table({"id": list("abcd"), "question": questions}))
    work = engines.Work(
        name="teacher",
        engine=Engine(context=256, batch_size=3),
        model=partial(str, llama),
        sampling=Sampling(temperature=1.0, max_tokens=8),
        render=lambda: ask,  # type: ignore[arg-type, return-value]
        column="out",
        seeds=lambda row: [1, 2],
        journal=Place(str(tmp_path)),
    )
    answered = engines.generate(rows, work, {})
    by_id = {row["id"]: row["out"] for row in answered.take_all()}
    assert [len(by_id[id]) for id in "abcd"] == [2, 0, 2, 2]
    assert all("leaves no room" in sample["engine_error"] and sample["text"] is None for sample in by_id["c"])
    for sample in by_id["a"] + by_id["d"]:
        assert sample["engine_error"] is None and sample["finish_reason"] in ("stop", "length")
        assert 0 < sample["completion_tokens"] <= 8 and sample["prompt_tokens"] > 8
