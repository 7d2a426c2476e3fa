"""What must not happen: SECURITY.md, claim by claim. Files that would run code touch a canary; planted secrets are sought."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from test_endpoint import PRICES, Server, at, holding

from undo_ray import cli, config, models, tasks
from undo_ray.config import Engine, Sampling
from undo_ray.place import Place
from undo_ray.progress import Progress
from undo_ray.types import SHOW, UserError
from undo_ray.written import printable

PACKAGE = Path(__file__).parent.parent / "undo_ray"

RECIPE = """
[data]
train = "gsm8k"
[teacher]
model = "org/teacher"
[student]
model = "org/student"
tokens = 1000
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


class Bomb:
    """Unpickled, it touches a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def refused(act: Callable[[], object]) -> str:
    """The one line of the UserError it raises."""
    with pytest.raises(UserError) as raised:
        act()
    message = str(raised.value)
    assert "\n" not in message
    return message


# -- secrets ------------------------------------------------------------------------------------------------------------

SECRET = "wJalr/XUtnFEMI+K7MDENG-" + secrets.token_hex(8)  # with a slash, as those of AWS often are

ENDPOINT = 'teacher.engine={{kind = "openai", endpoint = {{{}}}}}'


@pytest.mark.parametrize(
    "override, expected",
    [
        (f"teacher.model=s3://AKIAKEY:{SECRET}@models/teacher", "teacher.model: holds a login (user:password@)"),
        (f"student.model=https://me:{SECRET}@huggingface.co/org/student", "student.model: holds a login"),
        (f"teacher.model=s3://models/teacher?secret_key={SECRET}", "teacher.model: holds a secret (the parameter secret_key)"),
        (
            f"teacher.cache=abfs://c@a.dfs.core.windows.net/x?sv=1&sig={SECRET}",
            "teacher.cache: holds a secret (the parameter sig)",
        ),
        (f"round0=lessons:s3://k:{SECRET}@chats/a.jsonl", "round0: holds a login"),
        (f'data.tests=["gsm8k/s3://k:{SECRET}@b/t.jsonl"]', "data.tests: holds a login"),
        (ENDPOINT.format(f'base_url = "http://me:{SECRET}@h/v1"'), "teacher.engine.endpoint.base_url: holds a login"),
        (ENDPOINT.format(f'base_url = "{SECRET}@h/v1"'), "leave login and query out of it; the key goes through key_env"),
        (ENDPOINT.format(f'base_url = "http://h/v1?code={SECRET}"'), "leave login and query out of it"),
        (ENDPOINT.format(f'key_env = "{SECRET}"'), "key_env is the name of an environment variable, in capitals, not a key"),
        (ENDPOINT.format(f'api_key = "{SECRET}"'), "teacher.engine.endpoint.api_key: is a secret by its name"),
        (
            f'teacher.engine={{kind = "openai", kwargs = {{api_key = "{SECRET}"}}}}',
            "teacher.engine.kwargs.api_key: is a secret",
        ),
        (
            f'teacher.engine={{kind = "vllm", kwargs = {{hf_token = "{SECRET}"}}}}',
            "teacher.engine.kwargs.hf_token: is a secret",
        ),
        (f'teacher.engine.kwargs={{extra_headers = {{Authorization = "Bearer {SECRET}"}}}}', "Authorization: is a secret"),
        (f'rounds="s3://k:{SECRET}@b"', "rounds: holds a login"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_repeating_it(recipe: Path, override: str, expected: str) -> None:
    message = refused(lambda: config.load(recipe, [override]))
    assert expected in message and SECRET not in message
    assert "environment" in message or "key_env" in message


def test_the_value_of_a_secret_variable_is_known_wherever_it_stands(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(recipe))  # a path is no secret
    config.load(recipe, ["teacher.engine.chat_template_kwargs={enable_thinking = 'false', about = '" + str(recipe) + "'}"])
    for override in (
        f"teacher.model=org/{SECRET}",
        f'teacher.sampling.stop=["{SECRET}"]',
        f'teacher.engine.kwargs={{"{SECRET}" = 1}}',
    ):
        message = refused(lambda override=override: config.load(recipe, [override]))
        assert "holds the value of $HF_TOKEN" in message and SECRET not in message


@pytest.mark.parametrize(
    "uri",
    [f"s3://AKIAKEY:{SECRET}@bucket/run", f"s3://bucket/run?region=eu&secret_key={SECRET}", f"ftp://me:{SECRET}@host/run"],
)
def test_a_run_directory_with_a_secret_is_refused_without_repeating_it(
    recipe: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["run", str(recipe), "--run-dir", uri], ["show", uri]):
        assert cli.main(command) == 2
        said = capsys.readouterr()
        assert "holds a" in said.err and "AWS_SECRET_ACCESS_KEY" in said.err and SECRET not in said.err + said.out


def test_addresses_that_hold_no_secret_are_let_through(recipe: Path) -> None:
    for uri in (
        "s3://runs/math-a?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1",
        "abfs://container@account.dfs.core.windows.net/runs/a",
        "sftp://me@host/runs/a",
        "https://host:8000/models/v1",
        "org/name@v1.2",
    ):
        assert config.load(recipe, [f"teacher.model={uri}"]).teacher.model == uri


# -- the terminal -------------------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eevil\u2066\x00\x7f"


def test_text_that_steers_a_terminal_is_spelt_out() -> None:
    shown = printable(HOSTILE + "\nδ – 数学 é")
    assert shown.endswith("\nδ – 数学 é") and shown.replace("\n", "").isprintable()
    assert shown.startswith(r"\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202eevil")
    assert printable("\ud800") == r"\ud800"


def test_what_models_and_datasets_wrote_does_not_reach_the_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    row = {"gold": "18", "response": f"the answer is 17 {HOSTILE}", "correct": True, "question_id": HOSTILE}
    file.write_text(json.dumps(row) + "\n")
    assert cli.main(["grade", str(file), "--task", "gsm8k", "--show-disagreements", "1"]) == 0
    assert "owned" in (said := capsys.readouterr().out) and said.replace("\n", "").isprintable()

    file.write_text(json.dumps({"id": HOSTILE, "question": f"a {HOSTILE}\nb", "answer": f"{HOSTILE}"}) + "\n")
    message = refused(lambda: tasks.load(tasks.get("gsm8k"), str(file), None))
    assert "owned" in message and message.isprintable()

    Progress().say(f"a lesson: {HOSTILE}")
    assert "owned" in (said := capsys.readouterr().err) and said.rstrip("\n").isprintable()


# -- models -------------------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({canary!r}).touch()
class Config(LlamaConfig):
    model_type = "theirs"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from undo_ray.mini import models as mini

    return Path(shutil.copytree(mini.teacher(0), tmp_path_factory.mktemp("plain") / "model"))


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def changed(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def with_code(model: Path, canary: Path) -> None:
    """A model whose classes lie beside its weights, in code that touches the canary."""
    (model / "theirs.py").write_text(CODE.format(canary=str(canary)))
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    changed(model / "config.json", model_type="theirs", architectures=["Model"], auto_map=names)


def engine(directory: Path, trust: bool = False) -> Any:
    from undo_ray.engines.hf import Transformers

    return Transformers(str(directory), Engine(), Sampling(max_tokens=1), trust)


def test_code_beside_a_model_runs_only_where_the_recipe_trusts_it(
    model: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_code(model, canary)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # transformers' own default would ask, and take this for a yes
    message = refused(lambda: models.check(str(model), 0, "student.model"))
    assert message.startswith(
        f"student.model: {model}: has code of its own, which is not run; read it and set trust_remote_code"
    )
    for load in (engine, lambda path: models.config(str(path), False), lambda path: models.weights(str(path), False)):
        with pytest.raises(ValueError, match="custom code"):
            load(model)
    assert not canary.exists()

    known = models.check(str(model), 0, "student.model", trust=True)
    assert canary.exists()
    assert type(engine(model, trust=True).model).__name__ == "Model"
    (model / "theirs.py").write_text((model / "theirs.py").read_text() + "# changed\n")
    assert models.check(str(model), 0, "student.model", trust=True) != known, "other code is another model"


def test_only_one_module_loads_models_and_it_says_what_it_trusts() -> None:
    def loads(tree: ast.AST) -> list[set[str | None]]:
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        return [{keyword.arg for keyword in call.keywords} for call in calls if call.func.attr == "from_pretrained"]

    found = {path: loads(ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py") if "mini" not in path.parts}
    found = {path.name: calls for path, calls in found.items() if calls}
    assert found.keys() == {"models.py"} and len(found["models.py"]) == 3
    assert all("trust_remote_code" in keywords for keywords in found["models.py"])


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ("{trust_remote_code = true}", "kwargs.trust_remote_code: set teacher.trust_remote_code or student.trust_remote_code"),
        ('{load_format = "pt"}', "kwargs.load_format = 'pt' opens pickles, which can run code; models are safetensors alone"),
    ],
)
def test_an_engine_s_arguments_cannot_bring_in_code(recipe: Path, kwargs: str, expected: str) -> None:
    for role in ("teacher", "student"):
        engine = f'{role}.engine={{kind = "vllm", kwargs = {kwargs}}}'
        assert expected in refused(lambda engine=engine: config.load(recipe, [engine]))


def test_pickles_in_a_model_directory_are_never_opened(model: Path, canary: Path) -> None:
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    names = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt", "optimizer.pkl")
    for name in names:
        (model / name).write_bytes(pickle.dumps(Bomb(canary)))
    opened.clear()
    models.check(str(model), 0, "student.model")
    engine(model)
    assert str(model / "config.json") in opened, "what is watched is what transformers opens"
    assert not [path for path in opened if path.endswith(names)] and not canary.exists()

    changed(model / "config.json")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}')
    assert "holds an adapter; merge it into the weights" in refused(lambda: models.check(str(model), 0, "student.model"))
    (model / "adapter_config.json").unlink()
    (model / "model.safetensors").unlink()
    opened.clear()
    assert "has no *.safetensors weights" in refused(lambda: models.check(str(model), 0, "student.model"))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        models.weights(str(model), False)
    assert not [path for path in opened if path.endswith(names)] and not canary.exists()


# -- data and run directories -------------------------------------------------------------------------------------------


def pickled(path: Path, column: str, canary: Path, **others: Any) -> Path:
    """A Parquet file with a column of Ray Data's pickled objects."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    kind = ArrowPythonObjectType()
    bombs = pa.ExtensionArray.from_storage(kind, pa.array([pickle.dumps(Bomb(canary))], pa.large_binary()))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**{name: [value] for name, value in others.items()}, column: bombs}), path)
    return path


def test_pickled_objects_in_parquet_are_refused(canary: Path, tmp_path: Path) -> None:
    from undo_ray import lessons, store

    file = pickled(tmp_path / "train.parquet", "answer", canary, id="a", question="b")
    message = refused(lambda: tasks.load(tasks.get("gsm8k"), str(file), None))
    assert message == f"{file}: column answer holds pickled objects, which could run code; write plain values"
    chats = pickled(tmp_path / "chats.parquet", "messages", canary)
    assert "column messages holds pickled objects" in refused(lambda: lessons._given_lessons(str(chats)))
    rows = pickled(tmp_path / "rows.parquet", "question", canary, split=SHOW)
    assert "column question holds pickled" in refused(lambda: store.split_rows([Place(str(rows))], SHOW))
    assert not canary.exists()
    pq.read_table(file).to_pylist()
    assert canary.exists(), "the column type is one that runs code where nobody looks"


def test_a_row_chooses_no_module_to_import(canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    """The working directory is on the path of every worker, and run directories lie below it."""
    from undo_ray import generate, lessons
    from undo_ray.grading.pool import shared
    from undo_ray.prompts import parse_solve

    (tmp_path / "planted.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    known, lesson = config.load(recipe), {"round": 0, "hint": None, "rationale": "#### 1"}
    row = {"id": "a", "task": "planted:X", "split": "train", "question": "b", "answer": "1", "choices": None, "history": None}
    given = {"text": "#### 1", "finish_reason": "stop", "engine_error": None}
    for use in (
        lambda: generate._Explain(known, None)(row),
        lambda: generate._solver(("train",), known.data.tasks)(row),
        lambda: generate.judged([(row, given)], parse_solve, shared(5.0, 1.0), known.data.tasks),
        lambda: lessons._to_lessons(pa.Table.from_pylist([{**row, "lesson": lesson}]), 0, known),
    ):
        assert "a row has the task 'planted:X', the recipe names gsm8k" in refused(use)
    assert not canary.exists()


def test_training_state_that_could_run_code_is_refused(plain: Path, canary: Path, tmp_path: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    from undo_ray.config import Student
    from undo_ray.train import model, sharding

    spec = Student(model=str(plain), tokens=1, sharding="none")
    whole = sharding.shard(model.Scored(model.load(str(plain), spec)), spec, torch.device("cpu"))
    whole.save(str(tmp_path / "good"))
    whole.load(str(tmp_path / "good"))

    described = shutil.copytree(tmp_path / "good", tmp_path / "described")
    (described / ".metadata").write_bytes(pickle.dumps(Bomb(canary)))
    state = {**whole._state()}
    state["optim"]["param_groups"][0]["lr"] = Bomb(canary)
    dcp.save(state, checkpoint_id=str(tmp_path / "valued"), no_dist=True)
    for bad in ("described", "valued"):
        assert "could run code" in refused(lambda bad=bad: whole.load(str(tmp_path / bad)))
    assert not canary.exists()


@pytest.mark.parametrize("change", [{"try": "../../elsewhere"}, {"try": "."}, {"kind": "value", "value": "os:abort"}])
def test_a_manifest_leads_nowhere_out_of_its_stage(tmp_path: Path, change: dict[str, str], recipe: Path) -> None:
    from undo_ray.store import open_run

    def student(out: Any) -> None:
        (out.model / "config.json").write_bytes(b"{}")

    with open_run(str(tmp_path / "run"), config.load(recipe), {}, Progress()) as run:
        run.round(0).once("student", student)
        changed(tmp_path / "run/round-00/student/manifest.json", **change)
        assert "manifest.json: not a stage manifest" in refused(lambda: run.round(0).made("student"))


def test_an_object_s_name_writes_nothing_outside_of_the_copy(s3: str, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://{s3}", region_name="us-east-1")
    for key in ("climbing/config.json", "climbing/../../out.json"):
        client.put_object(Bucket="runs", Key=key, Body=b"{}")
    place = Place(f"s3://runs/climbing?endpoint_override={s3}&scheme=http&region=us-east-1")
    message = refused(lambda: place.download(str(tmp_path / "a/b"), ["*.json"]))
    assert "holds ../../out.json" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# -- a whole run --------------------------------------------------------------------------------------------------------

PLANTED = (
    "OPENAI_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN "
    "AZURE_STORAGE_KEY GITHUB_TOKEN VLLM_API_KEY RAY_AUTH_TOKEN MLFLOW_TRACKING_PASSWORD"
).split()

IDS = (
    "../../../../escape",
    "/tmp/escape",
    "..",
    "a/b/../c",
    "%2e%2e%2f",
    "nul\x00",
    HOSTILE,
    "x" * 3000,
    "$(touch escape)",
    "a b",
)


@dataclass
class Whole:
    """A run that was watched."""

    home: Path
    logs: Path
    output: str
    secrets: dict[str, str]
    log: list[tuple[float, str, str, dict[str, Any]]]
    """What the endpoint was sent, see `Server.log`."""
    ports: dict[tuple[str, str], int]
    """(process, address it listens on) -> a port."""
    intruders: dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """Round 0 of a small run with an endpoint as teacher, on problems with hostile ids."""
    home, logs = tmp_path_factory.mktemp("whole"), Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    rows = tasks.load(tasks.get("mini"), "train", None)[0][:60]
    named = [
        {**row, "id": IDS[index] if index < len(IDS) else f"n{index}", "subject": HOSTILE} for index, row in enumerate(rows)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    values = {name: secrets.token_hex(32) for name in PLANTED}
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    small = ["data.show=8", "data.select=8", "data.tests=[]", "rounds=0", "student.tokens=2000", "lessons.keep_wrong=true"]
    small += [f"data.train=mini/{home / 'rows.jsonl'}", "data.train_limit=40", "teacher.model=big", at(server), PRICES]
    small += ['track=["tensorboard"]']
    ports: dict[tuple[str, str], int] = {}
    intruders: dict[str, subprocess.CompletedProcess[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**values, "RAY_TMPDIR": str(logs)}.items():
            patch.setenv(name, value)
        process = runs.start("mini", home / "run", *small)
        done = threading.Event()
        watch = threading.Thread(target=listening, args=(process.pid, done, ports))
        watch.start()
        gcs = next(port for port in waited(lambda: [port for (name, _), port in ports.items() if name == "gcs_server"]))
        tokens = {"none": {"RAY_AUTH_MODE": "disabled"}, "wrong": {"RAY_AUTH_TOKEN": "0" * 64}}
        tokens["right"] = {"RAY_AUTH_TOKEN": values["RAY_AUTH_TOKEN"]}
        intruders = {how: intrude(gcs, **token) for how, token in tokens.items()}
        try:
            output = runs.finish(process)
        finally:
            done.set()
            watch.join()
            server.shutdown()
            server.server_close()
    yield Whole(home, logs, output, values, server.log, ports, intruders)
    shutil.rmtree(logs, ignore_errors=True)


def waited(look: Callable[[], list[int]], seconds: float = 120) -> list[int]:
    end = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < end:
        time.sleep(0.2)
    assert found, "Ray did not come up"
    return found


def listening(pid: int, done: threading.Event, ports: dict[tuple[str, str], int]) -> None:
    """Until `done`, what a process and all below it listen on."""
    while not done.wait(0.5):
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.Error:
            continue
        for one in family:
            try:
                for held in one.net_connections("inet"):
                    if held.status == psutil.CONN_LISTEN:
                        ports[one.name(), held.laddr.ip] = held.laddr.port
            except psutil.Error:  # it has ended
                continue


def intrude(gcs: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Somebody else on this machine speaks to the control service of a Ray."""
    code = (
        f"from ray._raylet import GcsClient; print('in', GcsClient(address='127.0.0.1:{gcs}').internal_kv_keys(b'', None, 10))"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**own, "RAY_AUTH_MODE": "token", **environment}, capture_output=True, text=True, timeout=120
    )


def test_a_planted_secret_is_nowhere_in_what_a_run_writes(whole: Whole) -> None:
    assert whole.log and "round 0 done" in whole.output
    for name, value in whole.secrets.items():
        assert value not in whole.output, name
        assert holding(whole.home, value) == [] and holding(whole.logs, value) == [], name
    assert holding(whole.home, '"teacher.model": "big"') and holding(whole.logs, "ray"), "what is searched is what is written"


def test_a_run_listens_on_this_machine_alone(whole: Whole) -> None:
    assert {name for name, _ in whole.ports} >= {"gcs_server", "raylet"}
    assert any("RayTrainWorker" in name or "_setup_torch" in name for name, _ in whole.ports), "the rendezvous was not seen"
    outside = {name for name, address in whole.ports if address.removeprefix("::ffff:") not in ("127.0.0.1", "::1")}
    assert not outside


def test_nobody_joins_a_run_without_its_token(whole: Whole) -> None:
    for how in ("none", "wrong"):
        process = whole.intruders[how]
        assert process.returncode != 0 and not process.stdout and "token authentication is enabled" in process.stderr, how
    assert whole.intruders["right"].stdout.startswith("in "), whole.intruders["right"].stderr


def test_names_from_a_dataset_name_no_file(whole: Whole) -> None:
    assert {path.name for path in whole.home.iterdir()} == {"rows.jsonl", "run"}
    written = [path.name for path in (whole.home / "run").rglob("*")]
    assert len(written) > 30 and all(re.fullmatch(r"[\w.-]{1,120}", name) and "escape" not in name for name in written)
    assert not Path("/tmp/escape").exists()
    kept = {row["id"] for row in runs.rows(whole.home / "run", "round-00/rationales")}
    assert len(kept) == 56 and any("escape" in id for id in kept)


def test_what_the_endpoint_took_and_gave_is_counted_and_kept(whole: Whole) -> None:
    report = runs.report(whole.home / "run")
    [record] = report["rounds"]
    asked = 40 + 8
    assert record["rationales"] == len(whole.log) == asked
    assert record["teacher_tokens"] == {"prompt": 9 * asked, "cached": 4 * asked, "completion": 3 * asked}
    spent = {"tokens": pytest.approx(asked * (5 * 2 + 4 * 0.5 + 3 * 10) / 1e6), "gpus": None}
    assert record["money"] == report["money"] == spent
    assert "spent, by the recipe's prices: 0.00 on tokens" in whole.output
    rows = [row for row in runs.rows(whole.home / "run", "round-00/rationales") if row["candidates"]]
    sent = {body["messages"][-1]["content"]: body["seed"] for _, _, _, body in whole.log}
    assert {row["question"]: row["candidates"][0]["text"] for row in rows} == {q: f"{q} {seed}" for q, seed in sent.items()}
    assert {authorization for _, _, authorization, _ in whole.log} == {f"Bearer {whole.secrets['OPENAI_API_KEY']}"}


def test_a_run_keeps_no_pickle(whole: Whole) -> None:
    """The folder `resume` goes when its stage is committed."""
    kinds = {path.suffix for path in (whole.home / "run").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".parquet", ".safetensors", ".jinja", ".u64", ".txt", ""} | {
        path.suffix for path in (whole.home / "run/track").rglob("*")
    }


def test_what_a_run_says_steers_no_terminal(whole: Whole) -> None:
    said = re.sub(r"\x1b\[[\d;]*m", "", whole.output)  # Ray colours what it says itself on a busy machine
    assert re.sub(r"[\n\t]", "", said).isprintable(), repr(said)
