"""A student behind Ray Serve, asked with OpenAI's own client.

The server is a process started by the command line, the student a tiny random model in a run directory whose driver holds it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import openai
import psutil
import pytest
import runs
import tiny

from undo_ray import config, serve
from undo_ray.progress import Progress
from undo_ray.store import Run, Stage, open_run
from undo_ray.types import UserError

ROOT = Path(__file__).resolve().parent.parent
ASK = [{"role": "user", "content": "count to seven, please"}]
ACCURACIES = (0.5, 0.75, 0.75)
"""Of the finished rounds 0, 1 and 2: the best is round 1, the earliest of equals."""


def upload(model: str, out: Stage) -> None:
    out.model.upload(model)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.make(tmp_path_factory.mktemp("model"), "llama", [f"count to {i}" for i in range(50)])


@pytest.fixture(scope="module")
def held(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run in progress: three finished rounds, a fourth whose student is trained, and a driver that holds the lease."""
    recipe = config.load(ROOT / "jobs/recipes/mini.toml", ["student.engine.context=2048", "student.engine.resources.cpus=0.5"])
    with open_run(str(tmp_path_factory.mktemp("runs") / "a"), recipe, {}, Progress()) as held:
        for k in range(len(ACCURACIES) + 1):
            held.round(k).once("student", upload, model)
        for k, accuracy in enumerate(ACCURACIES):
            held.round(k).commit(validation={"accuracy": accuracy})
        yield held


@contextmanager
def server(run_dir: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`undo-ray serve` until it answers; gives the process and the API's address."""
    [port] = runs.free_ports(1)
    command = [sys.executable, "-m", "undo_ray", "serve", run_dir, "--port", str(port), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout
        for line in process.stdout:
            if "serving on" in line:
                break
        else:
            raise AssertionError(f"exit code {process.wait()} before it served")
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.fixture(scope="module")
def served(held: Run) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with server(held.place.uri, "--replicas", "2", "--name", "mine") as found:
        yield found


@pytest.fixture
def client(served: tuple[subprocess.Popen[str], str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=served[1], api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def reference(model: str) -> Any:
    """`transformers`' own greedy generation: (text, tokens of the prompt, tokens of the answer) for up to N tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def greedy(tokens: int) -> tuple[str, int, int]:
        ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = loaded.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return tokenizer.decode(output, skip_special_tokens=True), ids["input_ids"].shape[1], len(output)

    return greedy


def test_a_token_that_changes_how_those_before_it_read_ends_no_answer() -> None:
    """By hand: with `ab` read as `xyz`, what was sent, `a`, does not begin the text (vllm#17448 met it in French)."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from undo_ray.serve.hf import Answer

    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="</s>"))
    bare.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "xyz")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")

    async def answered() -> str:
        answer = Answer(tokenizer, {3}, [])
        for token in (0, 0, 0, 1, 2, 3):
            answer._add(token)
        answer.close()
        return "".join([piece async for piece in answer])

    assert asyncio.run(answered()) == "aaabc"


# -- which student -------------------------------------------------------------------------------------------------------


def test_the_best_finished_round_is_served_while_a_driver_holds_the_run(held: Run) -> None:
    found = serve.find(held.place.uri)
    assert found.round == 1
    assert found.model == held.round(1).made("student")
    assert found.engine.context == 2048


def test_any_trained_round_can_be_asked_for(held: Run) -> None:
    assert serve.find(held.place.uri, 3).model == held.round(3).made("student")
    with pytest.raises(UserError, match=r"round 4 has no finished student; rounds that have one: round-00, .*round-03"):
        serve.find(held.place.uri, 4)


def test_what_a_run_directory_says_cannot_name_code_to_vllm(held: Run) -> None:
    """Its recipe.json is a file like any other: only the knobs of memory are taken from it."""
    kwargs = {"load_format": "pt", "worker_cls": "os.system", "trust_remote_code": True, "max_num_seqs": 7}
    engine = serve.find(held.place.uri).engine
    for executor, taken in (("mp", {"distributed_executor_backend": "mp"}), ("runs.math-a.evil.Executor", {})):
        asked = engine.model_copy(update={"kind": "vllm", "kwargs": {**kwargs, "distributed_executor_backend": executor}})
        assert serve.served(asked, serve.Asked()).kwargs == {"max_num_seqs": 7, **taken}


def test_what_ran_over_several_nodes_is_served_on_one(held: Run) -> None:
    split = {"kind": "vllm", "tensor_parallel": 2, "nodes": 2}
    engine = serve.served(serve.find(held.place.uri).engine.model_copy(update=split), serve.Asked())
    assert (engine.nodes, engine.tensor_parallel) == (1, 2)


def cli(code: str, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of the command line in a process that runs `code` first."""
    program = f"import sys\n{code}\nfrom undo_ray.cli import main\nsys.exit(main({list(arguments)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_bad_input_is_one_line_before_ray_starts(held: Run, tmp_path: Path) -> None:
    run = held.place.uri
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            ("", ["serve", run, "--round", "9"], "round 9 has no finished student"),
            ("", ["serve", run, "--port", port], f"127.0.0.1:{port}: cannot be listened on (Address already in use)"),
            ("", ["serve", run, "--port", "70000"], "--port 70000: give one from 1 to 65535"),
            ("", ["serve", run, "--replicas", "2", "--max-replicas", "1"], "--max-replicas at least as many"),
            ("sys.modules['vllm'] = None", ["serve", run, "--engine", "vllm"], "--engine vllm: vllm is not installed"),
            ("sys.modules['starlette'] = None", ["serve", run], 'pip install "ray[serve]=='),
        ]
        for code, arguments, expected in cases:
            exit_code, said = cli(code, *arguments)
            assert (exit_code, said.count("\n")) == (2, 1), said
            assert expected in said
    exit_code, said = cli("", "serve", str(tmp_path))
    assert (exit_code, said) == (4, f"undo-ray: {tmp_path}: has no recipe.json; give a run directory\n")


def test_a_run_without_a_finished_round_has_no_best_student(tmp_path: Path) -> None:
    recipe, run = config.load(ROOT / "jobs/recipes/mini.toml"), str(tmp_path / "new")
    with open_run(run, recipe, {}, Progress()), pytest.raises(UserError, match="no round has finished yet"):
        serve.find(run)


# -- what is served ------------------------------------------------------------------------------------------------------


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    [found] = client.models.list().data
    assert (found.id, found.object) == ("mine", "model")
    assert client.models.retrieve("mine") == found


def test_an_answer_is_transformers_own(client: openai.OpenAI, reference: Any) -> None:
    text, prompt, answer = reference(60)
    found = client.chat.completions.create(model="mine", messages=ASK, max_tokens=60, temperature=0)
    [choice] = found.choices
    assert choice.message.content == text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length" if answer == 60 else "stop")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, answer)
    assert found.usage.total_tokens == prompt + answer


def test_the_chunks_of_a_stream_add_up_to_the_answer(client: openai.OpenAI, reference: Any) -> None:
    text, prompt, answer = reference(60)
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="mine", messages=ASK, max_completion_tokens=60, temperature=0, stream=True, stream_options=options
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (last.choices, last.usage and (last.usage.prompt_tokens, last.usage.completion_tokens)) == ([], (prompt, answer))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(client: openai.OpenAI, reference: Any, stream: bool) -> None:
    text, _, _ = reference(60)
    stop = text[20:23]
    found: Any = client.chat.completions.create(
        model="mine", messages=ASK, max_tokens=60, temperature=0, stop=["not there", stop], stream=stream
    )
    if stream:
        choices = [chunk.choices[0] for chunk in found]
        said, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        said, reason = found.choices[0].message.content, found.choices[0].finish_reason
    assert (said, reason) == (text[: text.index(stop)], "stop")


def test_a_seed_repeats_a_draw_and_without_one_draws_differ(client: openai.OpenAI) -> None:
    def draw(**options: Any) -> str | None:
        found = client.chat.completions.create(model="mine", messages=ASK, max_tokens=30, temperature=1.0, **options)
        return found.choices[0].message.content

    assert draw(seed=5) == draw(seed=5)
    assert len({draw(seed=6), draw(), draw(), draw()}) == 4


def test_content_in_parts_is_their_text(client: openai.OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("count to ", "seven, please")]}]
    one, other = (
        client.chat.completions.create(model="mine", messages=chat, max_tokens=20, temperature=0) for chat in (ASK, parts)
    )
    assert one.choices[0].message == other.choices[0].message


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than 0"),
        ({"n": 2}, "n", "1"),
        ({"logprobs": True}, "logprobs", "False"),
        ({"tools": []}, "tools", "not supported by this server"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "not supported by this server"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "?"}]}, "messages.0.role", "'user'"),
        ({"max_tokens": 2049}, "max_tokens", "context is 2048 tokens"),
        ({"messages": [{"role": "user", "content": "count " * 3000}]}, "messages", "context is 2048 tokens"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_bad_request_is_refused_in_openai_s_shape(
    client: openai.OpenAI, options: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "mine", "messages": ASK, "max_tokens": 5, **options})
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert says in refused.value.message


def test_another_model_and_a_body_that_is_no_json_are_refused(client: openai.OpenAI, served: tuple[Any, str]) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt", messages=ASK)
    assert refused.value.code == "model_not_found"
    for path, body, status in (("/chat/completions", b"{", 400), ("/nothing", None, 404)):
        with pytest.raises(HTTPError) as answer:
            urlopen(f"{served[1]}{path}", data=body, timeout=60)
        assert (answer.value.code, json.load(answer.value)["error"]["type"]) == (status, "invalid_request_error")


def replicas(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [one for one in found if any("ServeReplica" in part for part in one.cmdline())]


def test_under_load_a_killed_replica_costs_its_own_requests_alone(
    served: tuple[subprocess.Popen[str], str], client: openai.OpenAI, reference: Any
) -> None:
    """24 requests, half of them streams, over two replicas: each ends with the whole answer or with an error."""
    text, _, _ = reference(200)

    async def ask(asked: openai.AsyncOpenAI, stream: bool) -> str | Exception:
        try:
            found: Any = await asked.chat.completions.create(
                model="mine", messages=ASK, max_tokens=200, temperature=0, stream=stream
            )
            if not stream:
                return str(found.choices[0].message.content)
            choices = [chunk.choices[0] async for chunk in found]
            assert choices[-1].finish_reason, "a stream that was cut passed for a whole one"
            return "".join(choice.delta.content or "" for choice in choices)
        except openai.APIError as error:
            return error

    async def load() -> list[str | Exception]:
        async with openai.AsyncOpenAI(base_url=served[1], api_key="none", max_retries=0, timeout=60) as asked:
            waiting = [asyncio.create_task(ask(asked, bool(i % 2))) for i in range(24)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            killed.kill()
            return await asyncio.wait_for(asyncio.gather(*waiting), timeout=120)

    killed, _ = replicas(served[0])
    answers = asyncio.run(load())
    errors = [answer for answer in answers if isinstance(answer, Exception)]
    assert [answer for answer in answers if not isinstance(answer, Exception)] == [text] * (24 - len(errors))
    assert 1 <= len(errors) <= serve.IN_FLIGHT, errors

    deadline = time.monotonic() + 90
    while len(replicas(served[0])) < 2:
        assert time.monotonic() < deadline, "the replica was not replaced"
        time.sleep(0.2)
    assert client.chat.completions.create(model="mine", messages=ASK, max_tokens=5).choices


def test_sigterm_lets_requests_in_flight_finish(
    served: tuple[subprocess.Popen[str], str], client: openai.OpenAI, reference: Any
) -> None:
    process, _ = served
    streams = [
        client.chat.completions.create(model="mine", messages=ASK, max_tokens=400, temperature=0, stream=True) for _ in range(2)
    ]
    for stream in streams:
        assert next(iter(stream)).choices  # it has begun
    process.send_signal(signal.SIGTERM)
    for stream in streams:
        choices = [chunk.choices[0] for chunk in stream]
        assert "".join(choice.delta.content or "" for choice in choices) == reference(400)[0]
        assert choices[-1].finish_reason == "length"
    assert process.wait(timeout=60) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_serves_the_same_answer(held: Run, reference: Any) -> None:
    text, prompt, answer = reference(24)
    with server(held.place.uri, "--engine", "vllm", "--round", "3") as (_, url):
        asked = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        assert [model.id for model in asked.models.list()] == ["student"]
        found = asked.chat.completions.create(model="student", messages=ASK, max_tokens=24, temperature=0)
        assert found.choices[0].message.content == text
        assert found.usage and (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, answer)
        stream = asked.chat.completions.create(model="student", messages=ASK, max_tokens=24, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        with pytest.raises(openai.BadRequestError, match="2049"):
            asked.chat.completions.create(model="student", messages=ASK, max_tokens=2049)
