"""An endpoint as teacher: against a real server that misbehaves as asked, and against vLLM's own server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import runs
from pydantic import SecretStr

from undo_ray import engines, gap, generate
from undo_ray.config import Endpoint, Engine, Recipe, Sampling, TeacherEngine
from undo_ray.mini import models as mini
from undo_ray.place import Place
from undo_ray.prompts import TEMPLATES, Case
from undo_ray.types import GENERATION, Message, Row, UserError

KEY = "sk-planted-0123456789abcdef"
LONE = '"\\ud800 2"'
"""JSON of a text that UTF-8 cannot hold."""

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


class Handler(BaseHTTPRequestHandler):
    """What a question begins with says how it is treated: `500 x2` fails twice, then it is answered."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, seed = body["messages"][-1]["content"], body.get("seed", 0)
        with self.server.lock:
            self.server.seen[question, seed] += 1
            self.server.log.append((time.monotonic(), question, self.headers["Authorization"], body))
            self.server.flying += 1
            self.server.most = max(self.server.most, self.server.flying)
            tried = self.server.seen[question, seed]
        time.sleep(0.02)
        with self.server.lock:  # before it is answered: afterwards the client may send the next one
            self.server.flying -= 1
        kind, _, times = (self.server.always or question).partition(" x")
        self.answer(kind if not times or tried <= int(times) else "ok", question, seed)

    def answer(self, kind: str, question: str, seed: int) -> None:
        if kind == "hang":
            time.sleep(3)
        elif kind == "cut":
            self.send(200, '{"choices": [', length=1000)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif kind == "html":
            self.send(200, "<html>busy</html>", type="text/html")
        elif kind == "garbage":
            self.send(200, '{"choices": [')
        elif kind == "empty":
            self.send(200, '{"choices": []}')
        elif kind == "wait":
            self.send(429, '{"error": {"message": "slow down"}}', {"Retry-After": "1"})
        elif kind == "quota":
            self.send(429, '{"error": {"message": "no credit", "code": "insufficient_quota"}}')
        elif kind.isdigit():  # servers quote what they were sent
            self.send(int(kind), json.dumps({"error": {"message": f"refused\n{self.headers['Authorization']}"}}))
        else:
            text = json.dumps(f"{question} {seed}")
            self.send(200, self.completion(LONE if kind == "surrogate" else "null" if kind == "null" else text, kind))

    def completion(self, text: str, kind: str) -> str:
        usage = {"prompt_tokens": "9", "completion_tokens": -3, "prompt_tokens_details": 7} if kind == "counts" else USAGE
        message = f'{{"role": "assistant", "content": {text}' + (', "reasoning": "hm"}' if kind == "thinks" else "}")
        reason = {"filter": "content_filter", "long": "length"}.get(kind, "stop")
        return (
            f'{{"choices": [{{"index": 0, "message": {message}, "finish_reason": "{reason}"}}], "usage": {json.dumps(usage)}}}'
        )

    def send(
        self, code: int, body: str, headers: dict[str, str] | None = None, length: int = 0, type: str = "application/json"
    ) -> None:
        data = body.encode()
        self.send_response(code)
        known = {"Content-Type": type, "Content-Length": str(length or len(data)), **(headers or {})}
        for name, value in known.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.flying, self.most, self.always = threading.Lock(), 0, 0, ""
        self.seen: Counter[tuple[str, int]] = Counter()
        self.log: list[tuple[float, str, str, dict[str, Any]]] = []

    def handle_error(self, *_: Any) -> None:  # a client that went away
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def engine(port: int, kwargs: dict[str, Any] | None = None, **endpoint: Any) -> TeacherEngine:
    address = f"http://127.0.0.1:{port}/v1"
    return TeacherEngine(kind="openai", endpoint=Endpoint(base_url=address, **endpoint), kwargs=kwargs or {})


def chat(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def said(speaker: engines.Speaker, asked: list[tuple[list[Message], list[int]]]) -> list[list[Row]]:
    """Of each chat one generation per seed, in order."""
    jobs = [(chat, seed) for chat, seeds in asked for seed in seeds]
    found = dict(speaker.answer([chat for chat, _ in jobs], [seed for _, seed in jobs]))
    made = (found[index] for index in range(len(jobs)))
    return [[next(made) for _ in seeds] for _, seeds in asked]


def ask(server: Server, *questions: str, seeds: tuple[int, ...] = (5,), **endpoint: Any) -> list[Row]:
    """The first sample of each question."""
    from undo_ray.engines.openai import OpenAI

    made = engine(server.server_port, **endpoint)
    client = OpenAI("tiny", made, Sampling(temperature=0.5, max_tokens=8), engines.secret(made))
    answers = said(client, [(chat(question), list(seeds)) for question in questions])
    pa.array(answers, pa.list_(GENERATION))  # whatever came, Parquet holds it
    assert [len(answer) for answer in answers] == [len(seeds)] * len(questions)
    return [answer[0] for answer in answers]


def test_every_sample_is_a_request_of_its_own_with_its_seed_and_the_fields_of_the_recipe(server: Server) -> None:
    from undo_ray.engines.openai import OpenAI

    made = engine(server.server_port, kwargs={"reasoning_effort": "low", "max_completion_tokens": 99})
    client = OpenAI("org/tiny", made, Sampling(temperature=0.5, top_p=0.9, max_tokens=8), engines.secret(made))
    answers = said(client, [(chat("a"), [1, 2]), (chat("b"), [3])])
    assert [[sample["text"] for sample in answer] for answer in answers] == [["a 1", "a 2"], ["b 3"]]
    counts = {"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 3}
    assert answers[0][0] == {"text": "a 1", "finish_reason": "stop", **counts, "engine_error": None}
    for _, _, authorization, body in server.log:
        assert authorization == f"Bearer {KEY}"
        assert body["model"] == "org/tiny" and body["reasoning_effort"] == "low"
        assert (body["temperature"], body["top_p"], body["max_completion_tokens"]) == (0.5, 0.9, 99)
        assert "max_tokens" not in body


def test_stop_strings_and_switches_are_sent_and_a_seed_only_where_it_is_wanted(server: Server) -> None:
    from undo_ray.engines.openai import OpenAI

    made = engine(server.server_port, send_seed=False)
    made = made.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    client = OpenAI("org/tiny", made, Sampling(max_tokens=8, stop=("Question:",)), engines.secret(made))
    said(client, [(chat("a"), [1])])
    [(_, _, _, body)] = server.log
    assert body["stop"] == ["Question:"] and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "seed" not in body


@pytest.mark.parametrize("kind", ["429", "408", "500", "503", "cut", "html", "garbage", "empty", "hang"])
def test_what_passes_is_tried_again(server: Server, kind: str) -> None:
    [row] = ask(server, f"{kind} x1", timeout=1.0)
    assert row["text"] == f"{kind} x1 5" and row["engine_error"] is None
    assert server.seen[f"{kind} x1", 5] == 2


def test_an_endpoint_that_asks_for_a_rest_gets_it_from_all_requests(server: Server) -> None:
    rows = ask(server, "wait x1", *map(str, "abcdef"), concurrency=1)
    assert all(row["engine_error"] is None for row in rows)
    times = [when for when, *_ in server.log]
    assert times[1] - times[0] >= 1.0
    assert len(times) == 8


def test_the_wait_between_two_tries_grows(server: Server) -> None:
    ask(server, "500 x3")
    first, second, third, fourth = (when for when, *_ in server.log)
    assert 0.2 < second - first < third - second + 0.5 and fourth - third > 0.9  # 2 s less at most half, after 0.5 and 1


def test_what_does_not_pass_is_an_error_of_its_row_alone(server: Server) -> None:
    bad, lost, good = ask(server, "400", "500", "fine", retries=1)
    assert "400" in bad["engine_error"] and server.seen["400", 5] == 1
    assert "500" in lost["engine_error"] and lost["engine_error"].endswith("(tried 2 times)") and server.seen["500", 5] == 2
    assert bad["text"] is None and good["text"] == "fine 5"
    assert KEY not in str((bad, lost)) and "[key]" in bad["engine_error"]


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("401", "it does not accept the key in $OPENAI_API_KEY; export a valid key"),
        ("402", "the account of the key in $OPENAI_API_KEY has no credit; add some"),
        ("403", "the key in $OPENAI_API_KEY may not use the model tiny; give another teacher.model"),
        ("404", "it has no model tiny, or nothing at this path; mend teacher.model or teacher.engine.endpoint.base_url"),
        ("quota", "has no credit; add some"),
    ],
)
def test_what_no_request_can_mend_stops_at_once_with_one_line(server: Server, kind: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(server, "fine", kind, *["hang"] * 3)
    message = str(caught.value)
    assert message.startswith(f"http://127.0.0.1:{server.server_port}/v1: ") and expected in message
    assert "\n" not in message and KEY not in message
    assert server.seen[kind, 5] == 1


def test_an_endpoint_that_is_down_stops_the_stage() -> None:
    from undo_ray.engines.openai import DOWN, OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        made = engine(free.getsockname()[1], retries=0)
        client = OpenAI("tiny", made, Sampling(), None)
        few = said(client, [(chat("a"), list(range(DOWN - 1)))])
        assert all("ConnectError" in sample["engine_error"] for sample in few[0])
        with pytest.raises(
            UserError, match=f"no answer to {DOWN} requests in a row, each tried 1 times .*see that the endpoint"
        ):
            said(client, [(chat("a"), [1])])


def test_no_more_requests_are_in_flight_or_sent_a_minute_than_the_recipe_says(server: Server) -> None:
    ask(server, *(f"q{i}" for i in range(40)), concurrency=3)
    assert server.most <= 3
    server.log.clear()
    ask(server, *(f"q{i}" for i in range(24)), requests_per_minute=600)
    times = sorted(when for when, *_ in server.log)
    assert times[-1] - times[0] >= 12 * 0.1  # 600 a minute are 0.1 s apart: 23 times, less what a busy machine is late with


def test_a_strange_answer_is_still_a_row(server: Server) -> None:
    surrogate, null, thinks, counts, filtered, long = ask(
        server, "surrogate", "null", "thinks", "counts", "filter", "long", retries=0
    )
    assert surrogate["text"] == "? 2" and null["text"] == ""
    assert thinks["text"] == "<think>hm</think>thinks 5"
    assert (counts["prompt_tokens"], counts["cached_tokens"], counts["completion_tokens"]) == (0, 0, 0)
    assert filtered["engine_error"] == "the answer ended with content_filter" and filtered["completion_tokens"] == 3
    assert long["finish_reason"] == "length" and long["engine_error"] is None


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, 'the environment has no $OPENAI_API_KEY; export the key, or set key_env = "" where none is needed'),
        ("  ", "the environment has no $OPENAI_API_KEY"),
        ("sk-a\nsk-b", "$OPENAI_API_KEY holds blanks or characters that no key has"),
    ],
)
def test_a_key_that_is_not_there_is_asked_for_before_any_work(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    if value is not None:
        monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(UserError) as caught:
        engines.check(engine(1), "teacher.engine")
    assert expected in str(caught.value) and "sk-" not in str(caught.value)
    engines.check(engine(1, key_env=""), "teacher.engine")


def test_without_a_tokenizer_the_shown_examples_are_measured_in_bytes() -> None:
    case = Case("How many are 2 and 3?", ((0, "They are 5."),), "5", "They are 6.", "6", False)
    nothing = gap.Score.of(0, 0)
    delta = gap.Gap(0, (case,) * 50, nothing, nothing)
    tree = {"data": {"train": "gsm8k"}, "student": {"model": "m", "epochs": 1.0}}
    made = {"model": "big", "template": "prefix", "prompt_tokens": 1500, "engine": {"kind": "openai"}}

    def fitting(teacher: dict[str, Any]) -> tuple[Case, ...]:
        recipe = Recipe.model_validate({**tree, "teacher": teacher})
        return generate._shown(delta, recipe, 1, *generate._reader(recipe))

    shown = fitting(made)
    prompt = TEMPLATES["prefix"].render
    fits, more = (len(prompt((case,) * n, Case(""), "")[0]["content"].encode()) for n in (len(shown), len(shown) + 1))
    assert 0 < len(shown) < 50 and fits <= 1500 * 2.5 < more
    # With a context there must also be room for two rationales of the history, an attempt and the answer, of 512 tokens each.
    for context, same in ((4 * 512 + 1500, True), (4 * 512 + 1000, False)):
        found = fitting({**made, "engine": {"kind": "openai", "context": context}})
        assert (found == shown) == same and found
    with pytest.raises(UserError, match=r"the teacher reads 2048 tokens, and 3 of its answers .* leave no room for examples"):
        fitting({**made, "engine": {"kind": "openai", "context": 4 * 512}})


# -- through the pool ---------------------------------------------------------------------------------------------------


def test_the_pool_keeps_rows_and_order_and_its_batches_overlap(cluster: None, server: Server, tmp_path: Path) -> None:
    import ray.data

    def question(row: dict[str, str]) -> list[dict[str, str]] | None:
        return None if row["question"] == "pass" else [{"role": "user", "content": row["question"]}]

    names = [f"q{i}" for i in range(10)] + ["pass", "hang x1"] + [f"r{i}" for i in range(20)]
    rows = ray.data.from_arrow(pa.table({"question": names})).repartition(target_num_rows_per_block=4)
    made = engine(server.server_port, timeout=2.0, concurrency=8).model_copy(update={"batch_size": 4})
    sampling = Sampling(max_tokens=8)
    work = engines.Work(
        "teacher", made, partial(str, "tiny"), sampling, lambda: question, "out", lambda row: [1, 2], Place(str(tmp_path))
    )  # type: ignore[arg-type, return-value]
    found = engines.generate(rows, work, {}).take_all()
    assert [row["question"] for row in found] == names
    assert [[sample["text"] for sample in row["out"]] for row in found] == [
        [] if name == "pass" else [f"{name} 1", f"{name} 2"] for name in names
    ]
    slow = [when for when, name, *_ in server.log if name == "hang x1"]
    assert any(name.startswith("r") and name != "r0" and when < slow[0] + 1.5 for when, name, *_ in server.log)


# -- whole runs ---------------------------------------------------------------------------------------------------------


def holding(folder: Path, secret: str) -> list[Path]:
    """Files below a folder that hold the text, in plain or in UTF-16, whatever else they are."""
    needles = (secret.encode(), secret.encode("utf-16-le"))
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if any(needle in path.read_bytes() for needle in needles)]


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the Ray of a run writes."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: Ray makes sockets below it
    monkeypatch.setenv("RAY_TMPDIR", folder)
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


SMALL = ("data.train_limit=40", "data.show=8", "data.select=8", "data.tests=[]", "student.tokens=3000", "teacher.model=big")
PRICES = "prices={prompt = 2.0, cached = 0.5, completion = 10.0}"
"""Of the run in test_security.py, which an endpoint teaches."""


def at(server: Server) -> str:
    base_url = f'base_url = "http://127.0.0.1:{server.server_port}/v1"'
    return f'teacher.engine={{kind = "openai", batch_size = 16, endpoint = {{{base_url}}}}}'


def test_a_run_whose_key_is_refused_ends_with_one_line_and_without_the_key(server: Server, logs: Path, tmp_path: Path) -> None:
    server.always = "401"
    output = runs.run("mini", tmp_path / "run", *SMALL, at(server), code=2)
    start = f"undo-ray: http://127.0.0.1:{server.server_port}/v1: it does not accept the key in $OPENAI_API_KEY; export a valid"
    [line] = [line for line in output.splitlines() if line.startswith("undo-ray:")]  # Ray may add a word as it goes
    assert line.startswith(start)
    assert KEY not in output and holding(tmp_path, KEY) == [] and holding(logs, KEY) == []
    assert not (tmp_path / "run/round-00/rationales/manifest.json").exists()
    assert holding(logs, "ray") != []  # what is searched is what Ray writes


# -- vLLM's own server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of `vllm serve` with the teacher of the miniature world; it wants the planted key."""
    pytest.importorskip("vllm")
    pytest.importorskip("prometheus_fastapi_instrumentator", reason="vLLM's server needs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--served-model-name mini/teacher --dtype float32 --enforce-eager --enable-prompt-tokens-details --host 127.0.0.1"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", mini.teacher(0), "--port", str(port)]
    knobs = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_API_KEY": KEY}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *options.split()],
            env={**os.environ, **knobs},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            time.sleep(0.5)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_vllm_s_own_server_writes_what_transformers_writes_and_counts_its_cache(vllm: int) -> None:
    from undo_ray.engines.hf import Transformers
    from undo_ray.engines.openai import OpenAI

    questions = [f"sam has {n} cups and finds {n + 7} more. how many cups are there in all?" for n in range(60, 76)]
    asked = [(chat(question), [1]) for question in questions]
    sampling = Sampling(max_tokens=24)
    made = engine(vllm)
    client = OpenAI("mini/teacher", made, sampling, engines.secret(made))
    found = said(client, asked)
    local = said(engines.Local(Transformers(mini.teacher(0), Engine(), sampling), sampling, {}), asked)
    for row, expected in zip(found, local, strict=True):
        for sample, other in zip(row, expected, strict=True):
            # vLLM's detokeniser keeps the space that a first token begins with.
            assert sample["text"].strip() == other["text"].strip() and sample["engine_error"] is None
            assert all(sample[n] == other[n] for n in ("finish_reason", "prompt_tokens", "completion_tokens"))
    long = [(chat(questions[0] + " why? " * 150), [1])]
    [[first]], [[again]] = said(client, long), said(client, long)
    assert first["cached_tokens"] == 0 and 128 <= again["cached_tokens"] < again["prompt_tokens"]  # vLLM's CPU blocks are 128

    [[bad]] = said(client, [(chat("word " * 5000), [1])])
    assert bad["text"] is None and "400" in bad["engine_error"] and "context length" in bad["engine_error"]
    with pytest.raises(UserError, match="it does not accept the key in"):
        said(OpenAI("mini/teacher", made, sampling, SecretStr("sk-another")), asked[:1])
    with pytest.raises(UserError, match="it has no model other"):
        said(OpenAI("other", made, sampling, engines.secret(made)), asked[:1])
