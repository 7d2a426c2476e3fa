"""The plan of a recipe: its figures by hand for a small made-up model, its keys, and what it says of the paper's setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from undo_ray import cli, config, plan
from undo_ray.plan import known, pilot
from undo_ray.types import UserError

ROOT = Path(__file__).resolve().parent.parent
MINI = str(ROOT / "jobs/recipes/mini.toml")
NUMINA = str(ROOT / "jobs/recipes/numina-paper.toml")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
PARAMETERS = 1000 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64
"""Embeddings; per layer queries and output, keys and values, the MLP, two norms; the last norm."""

RECIPE = """
rounds = 1

[data]
train = "gsm8k/train"
tests = ["svamp/test"]
train_limit = 1000
show = 10
select = 90

[teacher]
model = "{model}"
sampling = {{ max_tokens = 200 }}

[teacher.engine]
kind = "vllm"
dtype = "bfloat16"
replicas = 2
resources = {{ gpus = 1 }}

[student]
model = "{model}"
epochs = 2
dtype = "bfloat16"
workers = 2
resources = {{ gpus = 1 }}
sampling = {{ max_tokens = 200 }}

[student.engine]
kind = "vllm"
dtype = "bfloat16"
resources = {{ gpus = 1 }}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose two models are the small one, in a folder with nothing but its config.json."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model=tmp_path / "model"))
    return tmp_path / "recipe.toml"


def planned(recipe: Path | str, *overrides: str, gpus: str | None = None, tokens: tuple[str, ...] = ()) -> dict[str, Any]:
    return plan.plan(config.load(recipe, overrides), gpus, tokens)


def prompt_tokens(recipe: Path, question: int) -> float:
    """Of a plain question: itself, a blank line, how to answer, and what the chat template adds."""
    return question + 2 / plan.BYTES + plan._tokens(plan._task(config.load(recipe)).instruction) + plan.CHAT


def test_the_shapes_of_known_models_have_their_published_sizes() -> None:
    # The model cards: 72.7, 7.61, 1.54 and 0.49 billion parameters.
    published = {"72B": 72.7, "7B": 7.61, "1.5B": 1.54, "0.5B": 0.494}
    sizes = {name.split("-")[1]: model.parameters / 1e9 for name, model in known.MODELS.items()}
    assert sizes == {name: pytest.approx(size, rel=3e-3) for name, size in published.items()}


def test_parameters_are_those_transformers_counts(recipe: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from undo_ray.train import memory

    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    found = known.model_of("teacher", str(recipe.parent / "model"), {})
    assert found.parameters == lm.num_parameters() == PARAMETERS
    assert found.shape(0) == memory.Shape.of(lm)


def test_the_questions_and_tokens_of_a_round_by_hand(recipe: Path) -> None:
    found = planned(recipe, tokens=("question=50", "rationale=100", "attempt=80", "diagnosis=60"))
    assert found["questions"] == {"train": 1000, "show": 10, "select": 90, "tests": 300}
    first, second = found["rounds"]
    assert first["teacher_tokens"]["prompt"] == pytest.approx(1010 * prompt_tokens(recipe, 50), abs=1)
    assert first["teacher_tokens"]["completion"] == 1010 * 100 and first["teacher_tokens"]["cached"] == 0
    assert second["teacher_tokens"]["completion"] == 1000 * (100 + 60)
    assert second["shown"] == 10
    # Ten examples of 50 + 100 + 80 tokens come before the question, the own history of as many after it.
    cached, prompt = (second["teacher_tokens"][name] / 1000 for name in ("cached", "prompt"))
    assert 10 * 230 < cached < 10 * 230 + 600 and cached % plan.BLOCK == 0
    assert 230 < prompt - cached < 230 + 100


def test_memory_and_time_of_an_engine_by_hand(recipe: Path) -> None:
    found = planned(recipe, gpus="H100")
    weights, kv = 2 * PARAMETERS, 2 * 2 * 2 * 2 * 16  # 16 bits; keys and values of 2 layers, 2 heads of 16
    parts = found["memory"]["teacher.engine"]
    assert parts["bytes"] == {"weights": weights, "one longest request": 4096 * kv} and parts["limit"] == 0.92 * 80e9
    tests = found["tests"]
    requests, completion, prompt = 3 * 300, 121, prompt_tokens(recipe, 60)  # the base model and two rounds' students
    flops = 2 * PARAMETERS + 4 * 2 * 64 * prompt / 2
    assert tests["prefill_seconds"] == pytest.approx(requests * prompt * flops / (989e12 * 0.5))
    read = weights + 256 * (prompt + completion / 2) * kv
    assert tests["batch"] == 256
    assert tests["decode_seconds"] == pytest.approx(requests * completion / 256 * read / (3.35e12 * 0.7))
    assert tests["load_seconds"] == pytest.approx(3 * (60 + weights / 2e9))
    wall = tests["load_seconds"] + tests["prefill_seconds"] + tests["decode_seconds"]
    assert tests["gpu_hours"] == tests["idle_gpu_hours"] == pytest.approx(wall / 3600)  # one of two GPUs


def test_training_by_hand(recipe: Path) -> None:
    found = planned(recipe)["rounds"][0]["stages"]["student"]
    chat = prompt_tokens(recipe, 60) + 121
    assert found["tokens"] == pytest.approx(1000 * 2 * chat)
    flops = 6 * PARAMETERS + 3 * 4 * 2 * 64 * chat / 2  # attention forward, and twice backward
    assert found["wall_seconds"] - found["load_seconds"] == pytest.approx(found["tokens"] * flops / (2 * 989e12 * 0.35))
    again = planned(recipe, "student.gradient_checkpointing=true")["rounds"][0]["stages"]["student"]
    ratio = (again["wall_seconds"] - again["load_seconds"]) / (found["wall_seconds"] - found["load_seconds"])
    assert ratio == pytest.approx(4 / 3)


def test_the_sums_are_those_of_the_stages_and_a_gpu_has_its_price(recipe: Path) -> None:
    found = planned(recipe, "prices={gpu = 2.0}")
    stages = [figures for entry in found["rounds"] for figures in entry["stages"].values()] + [found["tests"]]
    assert found["gpu_hours"] == pytest.approx(sum(figures["gpu_hours"] for figures in stages))
    assert found["wall_hours"] == pytest.approx(sum(figures["wall_seconds"] for figures in stages) / 3600)
    assert found["money"] == {"tokens": None, "gpus": pytest.approx(2 * found["gpu_hours"])}
    assert found["idle_gpu_hours"] == pytest.approx(sum(figures["idle_gpu_hours"] for figures in stages))
    assert [list(entry["stages"]) for entry in found["rounds"]] == [
        ["rationales", "student", "measure"],
        ["attempts", "rationales", "student", "measure"],
    ]


def test_a_count_of_gpus_is_filled_with_replicas_and_workers(recipe: Path) -> None:
    assert planned(recipe)["gpus"]["count"] == 2
    found = planned(recipe, gpus="L4:8")
    assert {key: part["count"] for key, part in found["placement"].items()} == dict.fromkeys(found["placement"], 8)
    assert all(figures["idle_gpu_hours"] == 0 for entry in found["rounds"] for figures in entry["stages"].values())


def test_what_does_not_fit_is_said() -> None:
    found = planned(NUMINA, gpus="L4:16")
    assert not found["memory"]["teacher.engine"]["fits"] and "DOES NOT FIT" in plan.table(found, "t")
    assert planned(NUMINA, gpus="H200:16")["memory"]["teacher.engine"]["fits"]
    halved = planned(NUMINA, "teacher.engine.kwargs.quantization=fp8")["memory"]["teacher.engine"]
    tables = 2 * 152064 * 8192  # embeddings and head stay in 16 bits
    assert halved["bytes"]["weights"] == pytest.approx((72.7e9 + tables) / 4, rel=2e-3)


def with_config(recipe: Path, **config: Any) -> dict[str, Any]:
    (recipe.parent / "model" / "config.json").write_text(json.dumps({**SHAPE, **config}))
    return planned(recipe, gpus="H100")["memory"]["teacher.engine"]["bytes"]


@pytest.mark.parametrize(
    "how, each",
    [
        ({"quant_method": "awq", "bits": 4}, 0.5 + 2.5 / 128),
        ({"quant_method": "gptq", "bits": 8}, 1),
        ({"quant_method": "fp8"}, 1),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 1),
    ],
)
def test_a_quantised_checkpoint_is_as_large_as_it_says(recipe: Path, how: dict[str, Any], each: float) -> None:
    assert with_config(recipe, quantization_config=how)["weights"] == 2 * 64_000 + each * (PARAMETERS - 64_000)


def test_a_way_to_quantise_that_is_not_known_is_no_guess(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: quantised by 'mxfp4', whose size is not known here"):
        with_config(recipe, quantization_config={"quant_method": "mxfp4"})
    with_config(recipe)
    with pytest.raises(UserError, match=r"kwargs\.quantization = 'new': its size is not known here"):
        planned(recipe, "teacher.engine.kwargs.quantization=new", gpus="H100")


def test_a_head_that_config_json_does_not_name_is_the_model_type_s_own(recipe: Path) -> None:
    silent = {key: value for key, value in SHAPE.items() if key != "tie_word_embeddings"}
    sizes = []
    for kind in ("gemma2", "llama"):
        (recipe.parent / "model" / "config.json").write_text(json.dumps({**silent, "model_type": kind}))
        sizes.append(known.model_of("teacher", str(recipe.parent / "model"), {}).parameters)
    assert sizes == [PARAMETERS, PARAMETERS + 64_000]


def test_the_cache_of_keys_and_values_by_type_and_split(recipe: Path) -> None:
    def longest(*overrides: str) -> float:
        memory = planned(recipe, *overrides, gpus="H100")["memory"]["teacher.engine"]
        return float(memory["bytes"]["one longest request"])

    plain = 4096 * 2 * 2 * 2 * 2 * 16
    assert longest() == plain and longest("teacher.engine.dtype=float32") == 2 * plain
    assert longest("teacher.engine.kwargs.kv_cache_dtype=fp8") == plain / 2
    split = ("teacher.engine.tensor_parallel={0}", "teacher.engine.resources={{gpus = {0}}}")
    assert longest(*(part.format(2) for part in split)) == plain / 2
    assert longest(*(part.format(4) for part in split)) == plain / 2  # two heads on four GPUs: each GPU has one


def test_engines_in_float32_do_without_tensor_cores(recipe: Path) -> None:
    half, full = (planned(recipe, f"student.engine.dtype={dtype}", gpus="H100")["tests"] for dtype in ("bfloat16", "float32"))
    assert full["prefill_seconds"] / half["prefill_seconds"] == pytest.approx(989 / 67)


def test_engines_that_are_kept_leave_their_gpus_to_nobody(recipe: Path) -> None:
    kept = "teacher.engine.lifetime=run"
    assert planned(recipe, kept)["gpus"]["count"] == 2 + 2  # two replicas of the teacher beside two workers
    found = planned(recipe, kept, gpus="H100:8")
    assert {key: part["count"] for key, part in found["placement"].items()} == {
        "teacher.engine": 2,
        "student.engine": 6,
        "student": 6,
    }
    training, rationales = (found["rounds"][0]["stages"][name] for name in ("student", "rationales"))
    assert training["idle_gpu_hours"] == pytest.approx(2 * training["wall_seconds"] / 3600)
    assert rationales["idle_gpu_hours"] == pytest.approx(6 * rationales["wall_seconds"] / 3600)
    assert any('engines of teacher are kept (lifetime = "run")' in note for note in found["notes"])
    with pytest.raises(UserError, match=r"one replica of student\.engine takes 1 beside 2 of engines that are kept"):
        planned(recipe, kept, gpus="H100:2")


def test_no_more_workers_than_chats_in_a_step(recipe: Path) -> None:
    found = planned(recipe, "student.batch_size=4", gpus="H100:16")
    assert found["placement"]["student"]["count"] == 4 and found["placement"]["student.engine"]["count"] == 16


def test_samples_that_are_asked_for_one_after_another_are_one_request(recipe: Path) -> None:
    def prompt(*overrides: str) -> int:
        return int(planned(recipe, *overrides)["rounds"][1]["teacher_tokens"]["prompt"])

    several = ("teacher.samples=3", "teacher.sampling.temperature=1.0")
    assert prompt(*several) == prompt() and prompt(*several, "lessons.select=shortest") == pytest.approx(3 * prompt(), abs=2)
    [note] = planned(recipe, *several)["notes"]
    assert note.startswith("every question is planned with one request") and f"note: {note}" in plan.table(
        planned(recipe, *several), "t"
    )


def test_rounds_that_keep_all_lessons_train_longer(recipe: Path) -> None:
    found = planned(recipe, "rounds=2", "lessons.mode=accumulate")
    first, second, third = (entry["stages"]["student"]["tokens"] for entry in found["rounds"])
    assert second == 2 * first and third == 3 * first


def test_what_is_cleaned_away_is_not_taught(recipe: Path) -> None:
    def asked(*overrides: str) -> int:
        return int(planned(recipe, "data.train=svamp/train", "data.train_limit=", *overrides)["questions"]["train"])

    # As in docs/tasks.md: 278 of 700 are left; 100 are for validation.
    assert asked() == 278 - 100 and asked("data.clean=exact") == 700 - 100
    with pytest.raises(UserError, match="hold 310 of the 278 questions of svamp/train and leave none to teach"):
        asked("data.select=300")


def test_an_endpoint_takes_tokens_and_money_but_no_gpus(recipe: Path) -> None:
    endpoint = ("teacher.engine={kind = 'openai'}", "teacher.model=big", "prices={prompt = 2, cached = 1, completion = 8}")
    found = planned(recipe, *endpoint)
    tokens = [entry["teacher_tokens"] for entry in found["rounds"]]
    spent = sum(2 * (t["prompt"] - t["cached"]) + t["cached"] + 8 * t["completion"] for t in tokens) / 1e6
    assert found["money"] == {"tokens": pytest.approx(spent), "gpus": None}
    assert found["templates"] is None and "rationales" not in found["rounds"][1]["stages"]
    assert "rationales  endpoint" in plan.table(found, "t")
    assert found["notes"] == ["the teacher's time at its endpoint is in no figure"]


def test_the_paper_s_setting_compares_the_prompts_and_the_reported_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", NUMINA, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ours, paper = found["templates"]["prefix"], found["templates"]["paper"]
    assert found["questions"]["train"] == 100_000 and found["gpus"]["count"] == 8
    assert ours["shown"] == paper["shown"] == 20
    assert ours["cached"] > 0.9 * ours["prompt"] and paper["cached"] < 0.01 * paper["prompt"]
    assert abs(ours["prompt"] - paper["prompt"]) < 100
    assert paper["gpu_hours"] > 2 * ours["gpu_hours"]
    assert found["rounds"][2]["stages"]["rationales"]["gpu_hours"] == pytest.approx(ours["gpu_hours"])
    assert found["templates"]["reported_gpu_hours"] == 2800
    assert cli.main(["plan", NUMINA]) == 0
    text = capsys.readouterr().out
    assert "the paper reports about 2,800 GPU-hours" in text and "formulas:" in text
    assert f"{paper['gpu_hours']:,.1f} GPU-hours" in text and f"{ours['gpu_hours']:,.1f} GPU-hours" in text


@pytest.mark.parametrize("name", ["gsm8k", "math", "mmlu_pro", "svamp", "numina-paper"])
def test_every_recipe_for_gpus_has_a_plan_in_which_it_fits(name: str) -> None:
    found = planned(str(ROOT / f"jobs/recipes/{name}.toml"))
    assert all(fit["fits"] for fit in found["memory"].values()), found["memory"]
    assert plan.table(found, name).startswith(f"{name} on 8 × H100")


def test_the_sizes_are_those_of_the_files(data_dir: Path) -> None:
    recipe = config.load(NUMINA, [f"data.dir={data_dir}"])
    for source in ("gsm8k/train", "math/test", "svamp/train", "strategyqa/train", "mmlu_pro/test", "theoremqa/test"):
        name, split = source.split("/")
        assert known.size_of(recipe, source, "train") == known.SIZES[name][split]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--gpus", "H300"), "--gpus H300: H300 is not in the table; use one of A100, H100, H200"),
        (("--gpus", "H100:x"), "--gpus H100:x: 'x' is no count; write it as --gpus H100:16"),
        (("--gpus", "H100:2"), "one replica of teacher.engine takes 4; give more, or lower resources.gpus"),
        (("--set", "teacher.model=org/other"), "its shape is not known here; add --shape teacher=DIR"),
        (("--shape", "judge=x"), "--shape judge=x: write it as --shape KEY=VALUE with one of teacher, student"),
        (("--tokens", "question=x"), "--tokens question=x: 'x' is no count of tokens"),
        (("--tokens", "word=1"), "with one of question, rationale, attempt, diagnosis"),
        (("--set", "student.resources.gpus=0"), "student.resources.gpus = 0: a plan is about GPUs; add `--set student"),
        (("--pilot", "0"), "--pilot 0: no count of questions; write it as --pilot 50"),
        (("--pilot", "9", "--tokens", "question=80"), "--pilot measures lengths and loads the models; leave out --tokens"),
    ],
)
def test_bad_input_is_one_line_and_nothing_heavy_is_imported(arguments: tuple[str, ...], expected: str) -> None:
    code = (
        "import sys\nfrom undo_ray.cli import main\n"
        f"code = main(['plan', {NUMINA!r}, *{arguments!r}])\n"
        "heavy = [name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules]\n"
        "assert not heavy, heavy\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr


def test_a_pilot_measures_what_a_run_would_do(tmp_path: Path) -> None:
    """Its tokens are counted again here, on the questions that a run teaches first, with plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from undo_ray import problems
    from undo_ray.mini import models

    command = [sys.executable, "-m", "undo_ray", "plan", MINI, "--pilot", "16", "--json", "--set", "teacher.cache=true"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(temporary),
        "RAY_TMPDIR": "/tmp",
    }  # sockets want short paths
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [temporary]
    assert not (temporary / ".generations").exists(), "what is measured comes from no cache, and fills none"
    found = json.loads(done.stdout)
    taught, attempts, again, training = found["pilot"]["stages"].values()

    rows = problems._Sources(config.load(MINI)).roles()[0]
    asked = [row["question"] for row in rows if row["split"] == "train"][:16]
    asked += [row["question"] for row in rows if row["split"] == "show"]
    prompts = [f"<bos> <user> {question} <assistant>" for question in asked]
    for each, model in ((taught, models.teacher(0)), (attempts, models.student(0))):
        batch = AutoTokenizer.from_pretrained(model)(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
        lm = AutoModelForCausalLM.from_pretrained(model)
        with torch.inference_mode():
            written = lm.generate(**batch, max_new_tokens=96, do_sample=False)[:, batch["input_ids"].shape[1] :]
        assert each["requests"] == 36
        assert each["prompt"] * 36 == pytest.approx(int(batch["attention_mask"].sum()))
        # Sums in another order may turn a near tie of the untrained student.
        assert each["completion"] * 36 == pytest.approx(int((written != lm.config.pad_token_id).sum()), rel=0.02)
        assert each["tokens_per_second"] == pytest.approx(each["completion"] * 36 / each["work_seconds"])
        assert 0 < each["start_seconds"] < each["load_seconds"] and (each["in_flight"], each["room"]) == (32, 32)
    # From round 1 on 20 examples, each with its question, come before the question and are computed once.
    assert again["shown"] == 20 and again["requests"] == again["in_flight"] == 16
    assert 20 * (taught["prompt"] - 3) < again["cached"] < again["prompt"] - (taught["prompt"] - 3)
    assert taught["good"] > 0.8 and attempts["good"] < 0.2  # a trained teacher, and a student that knows nothing
    assert training["lessons_per_question"] <= again["good"]
    assert found["pilot"]["seconds"] > sum(each["load_seconds"] + each["work_seconds"] for each in (taught, attempts, again))

    # 1,000 + 20 questions on two replicas; four tests of 400; 700,000 tokens on one worker.
    first, tests = found["rounds"][0]["stages"], found["tests"]
    assert first["rationales"]["wall_seconds"] == pytest.approx(taught["load_seconds"] + 1020 * taught["work_seconds"] / 36 / 2)
    assert found["rounds"][0]["teacher_tokens"]["prompt"] == round(1020 * taught["prompt"])
    assert found["rounds"][2]["teacher_tokens"]["cached"] == round(1000 * again["cached"])
    assert tests["wall_seconds"] == pytest.approx(4 * attempts["load_seconds"] + 1600 * attempts["work_seconds"] / 36 / 2)
    speed = training["tokens"] / training["work_seconds"]
    assert first["student"]["wall_seconds"] == pytest.approx(training["load_seconds"] + 700_000 / speed)
    assert found["gpu_hours"] == 0 and found["gpus"] == {"kind": "CPU", "count": 0} and found["wall_hours"] > 0
    assert all("from the pilot: " in formula for formula in found["formulas"])
    assert "36 requests of" in plan.table(found, "t")


def test_a_pilot_is_for_the_gpus_of_its_machine(cluster: None) -> None:
    with pytest.raises(UserError, match="--gpus H100: --pilot measures this machine, which is a "):
        pilot.run(config.load(MINI), "H100")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"num_attention_heads": 0, "hidden_size": 8}'])
def test_a_config_that_is_none_is_named(recipe: Path, content: str) -> None:
    (recipe.parent / "model" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: not the config\.json of a model of the Llama family"):
        planned(recipe)


def test_a_mixture_of_experts_is_refused(recipe: Path) -> None:
    (recipe.parent / "model" / "config.json").write_text(json.dumps({**SHAPE, "num_experts": 8}))
    with pytest.raises(UserError, match="a mixture of experts is not planned for"):
        planned(recipe)
