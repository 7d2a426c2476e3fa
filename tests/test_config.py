"""Recipes: those we ship load; a bad one is refused in one line that names file, key, value and remedy; the kinds of keys."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pydantic
import pytest
from pydantic_core import PydanticUndefined

from undo_ray import config
from undo_ray.types import UserError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.toml"))
REFERENCE = ROOT / "docs" / "recipe.md"

GOOD = """
seed = 3
rounds = 2

[data]
train = "gsm8k/train"
tests = ["gsm8k"]

[teacher]
model = "big/teacher"
sampling = { temperature = 0.7 }

[teacher.engine]
kind = "vllm"
resources = { gpus = 1 }

[student]
model = "small/student"
tokens = 1000

[student.engine]
kind = "vllm"
resources = { gpus = 1 }
"""

PLACEMENT = {
    "data.dir": '"/data"',
    "teacher.engine.replicas": "4",
    "teacher.cache": "true",
    "teacher.engine.min_replicas": "1",
    "teacher.engine.tensor_parallel": "4",
    "teacher.engine.pipeline_parallel": "2",
    "teacher.engine.nodes": "2",
    "teacher.engine.batch_size": "8",
    "teacher.engine.lifetime": "run",
    "teacher.engine.start_seconds": "60",
    "teacher.engine.resources.cpus": "2",
    "teacher.engine.resources.gpus": "0.5",
    "teacher.engine.stall_seconds": "60",
    "teacher.engine.max_errors": "0.5",
    "teacher.engine.endpoint.base_url": '"http://127.0.0.1:8000/v1"',
    "teacher.engine.endpoint.key_env": '"KEY"',
    "teacher.engine.endpoint.send_seed": "false",
    "teacher.engine.endpoint.concurrency": "8",
    "teacher.engine.endpoint.requests_per_minute": "8",
    "teacher.engine.endpoint.timeout": "8",
    "teacher.engine.endpoint.retries": "3",
    "prices.prompt": "2",
    "prices.cached": "0.5",
    "prices.completion": "4",
    "prices.gpu": "2.5",
    "student.engine.replicas": "4",
    "student.engine.min_replicas": "1",
    "student.engine.tensor_parallel": "4",
    "student.engine.pipeline_parallel": "2",
    "student.engine.nodes": "2",
    "student.engine.batch_size": "8",
    "student.engine.lifetime": "run",
    "student.engine.start_seconds": "60",
    "student.engine.resources.cpus": "2",
    "student.engine.resources.gpus": "0.5",
    "student.engine.stall_seconds": "60",
    "student.engine.max_errors": "0.5",
    "student.workers": "4",
    "track": '["tensorboard"]',
    "student.sharding": '"fsdp2"',
    "student.micro_tokens": "8",
    "student.kernels": "liger",
    "student.gradient_checkpointing": "true",
    "student.checkpoint_steps": "8",
    "student.checkpoint_minutes": "8",
    "student.max_failures": "8",
    "student.resources.cpus": "2",
    "student.resources.gpus": "0.5",
}
EXTENDABLE = {"rounds": "9", "data.test_limit": "7", "data.tests": '["svamp"]', "stop.patience": "3", "stop.min_gain": "0.01"}
IDENTITY = {
    "seed": "4",
    "data.train": '"svamp/train"',
    "data.validation": '"svamp/train"',
    "data.train_limit": "10",
    "data.show": "5",
    "data.select": "50",
    "data.shared": "true",
    "data.clean": '"exact"',
    "teacher.model": '"big/other"',
    "teacher.template": '"paper"',
    "teacher.samples": "2",
    "teacher.unstable_below": "0.5",
    "teacher.hints": '"cascade"',
    "teacher.sampling.temperature": "0.1",
    "teacher.sampling.top_p": "0.5",
    "teacher.sampling.max_tokens": "100",
    "teacher.sampling.stop": '["Question:"]',
    "teacher.engine.chat_template_kwargs": "{ enable_thinking = false }",
    "teacher.engine.kind": '"transformers"',
    "teacher.engine.dtype": '"bfloat16"',
    "teacher.engine.context": "4096",
    "teacher.engine.kwargs": '{ quantization = "fp8" }',
    "teacher.prompt_tokens": "100",
    "student.model": '"small/other"',
    "student.start": '"previous"',
    "student.tokens": "2000",
    "student.batch_size": "32",
    "student.learning_rate": "1e-4",
    "student.schedule": '"linear"',
    "student.warmup": "0.1",
    "student.weight_decay": "0.1",
    "student.beta2": "0.95",
    "student.max_grad_norm": "2",
    "student.max_length": "100",
    "student.dtype": '"bfloat16"',
    "student.batch_tokens": "4000",
    "student.held_out": "0.1",
    "student.lora.rank": "8",
    "student.lora.alpha": "8",
    "student.lora.dropout": "0.1",
    "student.lora.targets": '["q_proj"]',
    "student.sampling.temperature": "0.1",
    "student.engine.kind": '"transformers"',
    "student.engine.dtype": '"bfloat16"',
    "lessons.mode": '"latest"',
    "lessons.keep_wrong": "true",
    "gap.feedback": '"none"',
    "gap.history": "3",
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    return path


def refused(path: Path | str, *overrides: str) -> str:
    """The one line a recipe is refused with."""
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def written(tmp_path: Path, old: str, new: str) -> Path:
    """The good recipe with one piece of text changed."""
    assert old in GOOD
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace(old, new))
    return path


# -- recipes we ship ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = config.load(path)
    assert recipe.data.train and recipe.data.tests


def test_the_five_recipes_of_the_documentation_are_there() -> None:
    names = {path.name for path in RECIPES}
    assert names >= {"mini.toml", "mini-vllm.toml", "mini-extended.toml", "gsm8k.toml", "svamp.toml"}


def test_the_extended_control_trains_round_0_alone_on_as_many_tokens_as_all_rounds_of_mini() -> None:
    mini = config.load(ROOT / "jobs" / "recipes" / "mini.toml")
    extended = config.load(ROOT / "jobs" / "recipes" / "mini-extended.toml")
    assert mini.student.tokens is not None
    assert (extended.rounds, extended.student.tokens) == (0, (mini.rounds + 1) * mini.student.tokens)
    differing = {key for key, value in config.identity(mini).items() if config.identity(extended)[key] != value}
    assert differing == {"student.tokens"}


def test_the_vllm_recipe_differs_from_mini_in_the_engines_alone() -> None:
    mini = config.identity(config.load(ROOT / "jobs" / "recipes" / "mini.toml"))
    vllm = config.identity(config.load(ROOT / "jobs" / "recipes" / "mini-vllm.toml"))
    assert {key for key in mini if mini[key] != vllm[key]} == {"teacher.engine.kind", "student.engine.kind"}


# -- bad recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("seed = 3", "sed = 3", "unknown key sed; remove it or see docs/recipe.md for the keys there are"),
        ("tokens = 1000", "tokens = 1000\nlr = 1", "unknown key student.lr; remove it"),
        ('kind = "vllm"', 'kind = "vllm"\nreplica = 2', "unknown key teacher.engine.replica; remove it"),
        ('model = "big/teacher"', "", "teacher.model is missing; add it"),
        ('train = "gsm8k/train"', "", "data.train is missing; add it"),
        ("seed = 3", 'seed = "three"', "seed = 'three': Input should be a valid integer"),
        ("seed = 3", "seed = -1", "seed = -1: Input should be greater than or equal to 0"),
        ("seed = 3", 'seed = "3"', "seed = '3': Input should be a valid integer"),
        ("seed = 3", "seed = true", "seed = True: Input should be a valid integer"),
        ('tests = ["gsm8k"]', "shared = 1", "data.shared = 1: Input should be a valid boolean"),
        ("rounds = 2", "rounds = 2.5", "rounds = 2.5: Input should be a valid integer"),
        ('model = "big/teacher"', "model = 7", "teacher.model = 7: Input should be a valid string"),
        ('tests = ["gsm8k"]', 'tests = "gsm8k"', "data.tests = 'gsm8k': Input should be a valid tuple"),
        ('tests = ["gsm8k"]', "tests = [7]", "data.tests.0 = 7: Input should be a valid string"),
        (
            'kind = "vllm"',
            'kind = "sglang"',
            "teacher.engine.kind = 'sglang': Input should be 'transformers', 'vllm' or 'openai'",
        ),
        ("tokens = 1000", "tokens = 0", "student.tokens = 0: Input should be greater than 0"),
        ("seed = 3", 'round0 = "lessons"', "round0 = 'lessons': String should match pattern"),
        ("seed = 3", "gap = 1", "gap = 1: Input should be a valid dictionary"),
    ],
)
def test_a_bad_key_or_value_is_named_with_its_file(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = written(tmp_path, old, new)
    message = refused(path)
    assert message.startswith(f"{path}: {expected}")
    assert "docs/recipe.md" in message or message.endswith("add it")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("student.epochs=2", "give exactly one of student.tokens and student.epochs"),
        ("student={model = 'm', epochs = 1, workers = 3, sharding = 'none'}", 'sharding = "none" trains on one worker, not 3'),
        ("data.select=0", "data.select = 0 leaves nothing to choose between rounds"),
        (
            "teacher.engine.nodes=2",
            'nodes = 2 needs kind = "vllm", lifetime = "run", and tensor_parallel x pipeline_parallel =',
        ),
        ("teacher.engine.tensor_parallel=16", "tensor_parallel x pipeline_parallel = 16 needs as many resources.gpus, not 1"),
        ("student.engine.resources.gpus=2", "resources.gpus = 2, but tensor_parallel x pipeline_parallel = 1: the other GPUs"),
        ("student.resources.gpus=2", "a training worker uses one GPU; raise student.workers"),
    ],
)
def test_an_impossible_combination_is_refused_with_both_values(good: Path, override: str, expected: str) -> None:
    assert expected in refused(good, override)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("student.engine={kind = 'openai'}", 'student: engine.kind = "openai": a student is trained and measured here'),
        ("teacher.engine={kind = 'openai', replicas = 2}", 'kind = "openai" is one client without GPUs: leave out replicas'),
        ("teacher.engine={kind = 'openai', resources = {gpus = 1}}", "one client without GPUs"),
        ("teacher.engine.endpoint={retries = 1}", "the section endpoint is for kind = \"openai\", not 'vllm'"),
        ("teacher.engine={kind = 'openai', endpoint = {base_url = '127.0.0.1:8000'}}", "is no http(s) address; write it as"),
        ("teacher.engine={kind = 'openai', endpoint = {base_url = 'http://me:k@h/v1'}}", "base_url: holds a login"),
        ("teacher.engine={kind = 'openai', endpoint = {base_url = 'http://h/v1?key=k'}}", "holds a secret (the parameter key)"),
        ("teacher.engine={kind = 'openai', endpoint = {base_url = 'http://me@h/v1'}}", "leave login and query out of it"),
        ("prices={prompt = 1}", "give both prompt and completion"),
        ("prices={prompt = 1, completion = 1}", "teacher.engine.kind is none; give prices.gpu"),
    ],
)
def test_what_an_endpoint_cannot_be_is_refused(good: Path, override: str, expected: str) -> None:
    message = refused(good, override)
    assert expected in message and "\n" not in message


def test_neither_tokens_nor_epochs_is_refused(tmp_path: Path) -> None:
    assert "give exactly one of student.tokens and student.epochs" in refused(written(tmp_path, "tokens = 1000", ""))


def test_one_set_for_both_uses_needs_no_select_questions(good: Path) -> None:
    assert config.load(good, ["data.select=0", "data.shared=true"]).data.select == 0


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_vllm_arguments_for_the_transformers_engine_name_the_section(good: Path, section: str) -> None:
    message = refused(good, f"{section}.engine.kind=transformers", f"{section}.engine.tensor_parallel=2")
    assert f"{section}.engine" in message and "tensor_parallel" in message and 'kind = "vllm"' in message


def test_a_latest_lesson_needs_a_round_0_that_has_lessons(good: Path) -> None:
    message = refused(good, "round0=student:/models/s", "lessons.mode=latest")
    assert "lessons.mode" in message and "round0" in message


UNSTABLE = ("teacher.regenerate=unstable", "lessons.mode=latest", "student.samples=4", "student.sampling.temperature=1.0")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["teacher.regenerate=failed"], 'lessons.mode = "replace" would train on those alone; set lessons.mode = "latest"'),
        ([*UNSTABLE, "lessons.mode=replace"], 'lessons.mode = "replace" would train on those alone'),
        (["teacher.regenerate=failed", "lessons.mode=latest", "round0=lessons:a.jsonl"], 'needs lessons.mode = "accumulate"'),
        (
            [*UNSTABLE, "student.samples=1"],
            "student.samples above 1 and student.sampling.temperature above 0; they are 1 and 1",
        ),
        ([*UNSTABLE, "student.sampling.temperature=0.0"], "they are 4 and 0"),
        (
            ["lessons.select=shortest"],
            'lessons.select = "shortest" has one rationale to choose from; set teacher.samples above 1',
        ),
        (["student.samples=4"], 'student.samples = 4 is for teacher.regenerate = "unstable" alone'),
        ([*UNSTABLE, "teacher.regenerate=failed"], "student.samples = 4 is for"),
    ],
)
def test_a_way_to_save_tokens_without_what_it_needs_is_refused_with_the_remedy(
    good: Path, overrides: list[str], expected: str
) -> None:
    assert expected in refused(good, *overrides)


@pytest.mark.parametrize("mode", ["latest", "accumulate"])
@pytest.mark.parametrize("overrides", [["teacher.regenerate=failed"], UNSTABLE])
def test_each_way_to_ask_again_changes_the_identity(good: Path, overrides: list[str], mode: str) -> None:
    recipe = config.load(good, [*overrides, f"lessons.mode={mode}"])
    assert config.identity(recipe)["teacher.regenerate"] == recipe.teacher.regenerate != "all"


@pytest.mark.parametrize("key", ["student.learning_rate", "student.epochs", "student.weight_decay"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, key: str, value: str) -> None:
    path = written(tmp_path, "tokens = 1000", "epochs = 1.0")
    assert f"{key} = {value}" in refused(path, f"{key}={value}")


def test_several_mistakes_are_counted(good: Path) -> None:
    assert refused(good, "seed=-1", "rounds=-1", "data.show=0").endswith("(and 2 more)")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert refused(path) == (f"{path}: cannot read the recipe (No such file or directory); give the path of a TOML file")


def test_a_folder_instead_of_a_recipe_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(f"{tmp_path}: cannot read the recipe (Is a directory)")


@pytest.mark.parametrize(
    "content",
    [b"seed = = 1", b"[data\n", b"seed = 1\nseed = 2\n", b"\xff\xfe\x00s", b"\x00", b'{"seed": 1}'],
    ids=["syntax", "bracket", "twice", "utf-16", "nul", "json"],
)
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}: ")


def test_an_empty_recipe_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert refused(path) == f"{path}: data is missing; add it (and 2 more)"


# -- --set --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("student.learning_rate=1e-3", "student.learning_rate", 0.001),
        ("student.tokens=400_000", "student.tokens", 400000),
        ("rounds=0", "rounds", 0),
        ("data.shared=true", "data.shared", True),
        ('data.tests=["gsm8k", "svamp"]', "data.tests", ("gsm8k", "svamp")),
        ("data.tests=[]", "data.tests", ()),
        ("teacher.model=Qwen/Qwen2.5-72B-Instruct@main", "teacher.model", "Qwen/Qwen2.5-72B-Instruct@main"),
        ("teacher.model=undo_ray.mini.models:teacher", "teacher.model", "undo_ray.mini.models:teacher"),
        ('teacher.model="a b"', "teacher.model", "a b"),
        ("data.dir=/data/with=sign", "data.dir", "/data/with=sign"),
        ("gap.feedback=shuffled", "gap.feedback", "shuffled"),
        ('teacher.engine.kwargs={quantization="fp8"}', "teacher.engine.kwargs", {"quantization": "fp8"}),
        ("teacher.engine.kwargs.max_num_seqs=8", "teacher.engine.kwargs", {"max_num_seqs": 8}),
        (" student.warmup = 0.5", "student.warmup", 0.5),
    ],
)
def test_set_takes_toml_values_and_bare_words(good: Path, override: str, key: str, value: Any) -> None:
    found = {name: found for name, _, found in config.leaves(config.load(good, [override]))}
    assert found[key] == value and type(found[key]) is type(value)


def test_set_without_a_value_unsets_the_key(good: Path) -> None:
    student = config.load(good, ["student.tokens=", "student.epochs=2"]).student
    assert (student.tokens, student.epochs) == (None, 2.0)
    assert "data.train is missing" in refused(good, "data.train=")


def test_of_two_overrides_of_a_key_the_last_counts(good: Path) -> None:
    assert config.load(good, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["seed", "=1", " =1", ""])
def test_an_override_without_key_or_value_is_shown_how_to_write_it(good: Path, override: str) -> None:
    assert refused(good, override) == f"--set {override}: write it as --set section.key=value"


def test_an_override_below_a_value_is_refused(good: Path) -> None:
    message = refused(good, "seed.more=1")
    assert message.startswith("--set seed.more=1: seed is a value, not a section")


@pytest.mark.parametrize("override", ["student.lr=1", "nothing.at.all=1", "data..train=x"])
def test_an_override_of_an_unknown_key_is_refused(good: Path, override: str) -> None:
    assert "unknown key" in refused(good, override)


# -- the three kinds of keys --------------------------------------------------------------------------------------------


def test_every_key_is_tried_below_as_the_kind_it_is() -> None:
    recipe = config.load(RECIPES[0])
    kinds = {key: kind for key, kind, _ in config.leaves(recipe)}
    assert {key for key, kind in kinds.items() if kind == "placement"} == PLACEMENT.keys()
    assert {key for key, kind in kinds.items() if kind == "extendable"} == EXTENDABLE.keys()
    assert IDENTITY.keys() <= {key for key, kind in kinds.items() if kind == "identity"}


ENDPOINT = ["teacher.engine={kind = 'openai'}", "prices={prompt = 1, cached = 0, completion = 1}"]
"""Of the endpoint's own keys, what they need beside them."""


@pytest.mark.parametrize("key", [*PLACEMENT, *EXTENDABLE])
def test_a_placement_or_extendable_key_leaves_the_identity_alone(good: Path, key: str) -> None:
    beside = ENDPOINT if key.startswith(("teacher.engine.endpoint", "prices")) else []
    changed = [f"{key}={({**PLACEMENT, **EXTENDABLE})[key]}"]
    engine, _, last = key.rpartition(".")
    if last == "nodes":
        beside = [f"{engine}.lifetime=run", f"{engine}.tensor_parallel=8", f"{engine}.resources.gpus=8"]
    if last in ("tensor_parallel", "pipeline_parallel"):  # with as many GPUs
        changed.append(f"{engine}.resources.gpus={PLACEMENT[key]}")
    before, after = config.load(good, beside), config.load(good, [*beside, *changed])
    assert before != after
    assert config.identity(before) == config.identity(after)


@pytest.mark.parametrize("key", IDENTITY)
def test_an_identity_key_changes_the_identity_in_itself_alone(good: Path, key: str) -> None:
    before = config.identity(config.load(good))
    after = config.identity(config.load(good, [f"{key}={IDENTITY[key]}"]))
    assert [name for name in before if before[name] != after[name]] == [key]
    assert config.digest(before) != config.digest(after)


@pytest.mark.parametrize("knob", sorted(config.MEMORY_KNOBS))
@pytest.mark.parametrize("section", ["teacher", "student"])
def test_memory_knobs_of_the_engine_are_placement(good: Path, section: str, knob: str) -> None:
    changed = config.load(good, [f"{section}.engine.kwargs.{knob}=1"])
    assert changed != config.load(good)
    assert config.identity(changed) == config.identity(config.load(good))


def test_other_engine_arguments_are_identity_beside_a_memory_knob(good: Path) -> None:
    recipe = config.load(good, ['teacher.engine.kwargs={quantization="fp8", gpu_memory_utilization=0.8}'])
    assert config.identity(recipe)["teacher.engine.kwargs"] == {"quantization": "fp8"}


def test_the_identity_survives_json_unchanged(good: Path) -> None:
    identity = config.identity(config.load(good))
    assert json.loads(json.dumps(identity)) == identity
    assert list(identity) == sorted(identity)


def test_a_resolved_recipe_loads_back_from_its_json(good: Path) -> None:
    recipe = config.load(good, ["student.micro_tokens=4"])
    assert config.Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_digest_is_the_start_of_the_sha256_of_compact_json() -> None:
    # printf '{"a":[1,2],"b":"\\u00e9"}' | sha256sum
    assert config.digest({"b": "é", "a": (1, 2)}) == "4f4995260c41bd0d"


def test_a_recipe_cannot_be_changed(good: Path) -> None:
    recipe = config.load(good)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.seed = 5  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.student.engine.replicas = 5  # type: ignore[misc]


# -- the reference ------------------------------------------------------------------------------------------------------


def flat(section: type[pydantic.BaseModel], prefix: str = "", kind: str = "identity") -> list[tuple[str, str, Any]]:
    """(dotted name, kind, default) of every leaf key, read off the pydantic models alone."""
    found = []
    for name, field in section.model_fields.items():
        own = next((mark for mark in ("extendable", "placement") if mark in field.metadata), kind)
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            found += flat(field.annotation, f"{prefix}{name}.", own)
        else:
            found.append((f"{prefix}{name}", own, field.default))
    return found


def documented() -> dict[str, list[str]]:
    """Key -> the other cells of its row, of every table of docs/recipe.md that has the column Default."""
    rows: dict[str, list[str]] = {}
    inside = False
    for line in REFERENCE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        inside = line.startswith("|") and (inside or (cells[0], cells[-2]) == ("Key", "Default"))
        if inside and (key := re.fullmatch(r"`([\w.]+)`", cells[0])):
            assert key[1] not in rows, f"docs/recipe.md has two rows for {key[1]}"
            rows[key[1]] = cells[1:]
    return rows


@pytest.mark.parametrize("key, kind, default", flat(config.Recipe))
def test_the_reference_has_a_row_for_the_key_with_its_kind_and_default(key: str, kind: str, default: Any) -> None:
    found_kind, _, found, meaning = documented()[key]
    assert found_kind == kind and meaning
    if default is PydanticUndefined:
        assert found == "required"
    elif default is None:
        assert found == "unset"
    else:
        assert tomllib.loads(f"default = {found.strip('`')}")["default"] == json.loads(json.dumps(default))


def test_the_reference_has_no_row_for_a_key_that_is_not_there() -> None:
    assert documented().keys() <= {key for key, _, _ in flat(config.Recipe)}
