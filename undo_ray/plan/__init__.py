"""`undo-ray plan`: what a recipe would cost on given GPUs, before anything runs.

A roofline estimate from data sheets, the shapes of the models and the recipe's own prompt templates, every figure with its
formula; docs/plan.md says what is left out. No GPU, no Ray and no torch is needed, unless a pilot is to measure (pilot.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

from undo_ray import prompts, tasks
from undo_ray.config import Engine, Recipe, Student
from undo_ray.plan.known import CLEANED, GPUS, LENGTHS, QUANTISED, Gpu, Lengths, Model, model_of, size_of
from undo_ray.plan.pilot import Pilot
from undo_ray.plan.text import table
from undo_ray.prompts import Case
from undo_ray.report import money
from undo_ray.train import memory
from undo_ray.types import Message, UserError

Json = dict[str, Any]

__all__ = ["plan", "table"]


BYTES = 4
"""Of a token of filler text, and of the templates' English (measured: 4.3)."""
CHAT = 20
"""Tokens a chat template adds."""
BLOCK = 16
"""Tokens in which vLLM's prefix cache counts."""

MFU, TRAINING_MFU, OF_BANDWIDTH = 0.5, 0.35, 0.7
"""Assumed: the share of peak FLOP/s in prefill and in training, and of bandwidth in decoding."""
OF_MEMORY = 0.92
"""Of a GPU's memory that an engine takes: vLLM's default."""
LOAD, START = 2e9, 60.0
"""Assumed: bytes a second at which a replica reads its weights; seconds that an engine or a training run takes to start."""
RUNTIME = 2e9
"""Bytes of a GPU that CUDA, NCCL and Python take beside what training needs."""

PAPER_HOURS, PAPER_QUESTIONS = 2800, 100_000
"""GPU-hours (GH200) that the paper gives for the teacher's part of one round, and its questions (arXiv 2504.02521)."""


def plan(
    recipe: Recipe,
    gpus: str | None,
    lengths: Sequence[str] = (),
    shapes: Sequence[str] = (),
    pilot: Callable[[str], Json] | None = None,
) -> Json:
    """The plan as JSON; docs/plan.md has its keys.

    `gpus`: `KIND` or `KIND:COUNT`; `lengths`: `question=80`…; `shapes`: `teacher=DIR` for models not in `MODELS`; `pilot`: is
    given the kind of `gpus` or "" and measures (see `pilot.run`). Raises UserError for an unknown GPU or model, a set of
    unknown size, and an engine without GPUs where nothing is measured.
    """
    kind, count = _gpus(recipe, gpus, piloted=pilot is not None)
    recipe = recipe if gpus is None or ":" not in gpus else _filled(recipe, count)
    asked = _questions(recipe)
    costs: Table | Pilot
    sheet: Json = {}
    beside: Json = {"lengths": None, "memory": {}, "templates": None, "pilot": None}
    if pilot:
        if lengths or shapes:
            raise UserError("--pilot measures lengths and loads the models; leave out --tokens and --shape")
        beside["pilot"] = pilot(kind)
        kind, costs = beside["pilot"]["machine"], Pilot(recipe, asked, beside["pilot"]["stages"])
    else:
        given = dict(_pair(shape, "--shape", ("teacher", "student")) for shape in shapes)
        student = model_of("student", recipe.student.model, given)
        teacher = None if recipe.teacher.engine.remote else model_of("teacher", recipe.teacher.model, given)
        known, gpu = _lengths(recipe, lengths), GPUS[kind]
        sheet, costs = asdict(gpu), Table(recipe, asked, known, teacher, student, gpu)
        beside |= {"lengths": asdict(known), "memory": _memory(recipe, teacher, student, gpu)}
        beside["templates"] = _templates(recipe, known, asked, teacher, gpu) if teacher else None
    formulas: list[str] = []
    rounds = [_round(recipe, asked, k, costs, count, formulas) for k in range(recipe.rounds + 1)]
    tests = None
    if asked["tests"]:  # the base model and the student of every round, each in a stage of its own
        times = recipe.rounds + 2
        tests = _stage(costs.answers(times * asked["tests"], formulas, "tests", times), count)
    parts = [*rounds, tests] if tests else rounds
    hours = sum(part["gpu_hours"] for part in parts)
    tokens = {name: sum(entry["teacher_tokens"][name] for entry in rounds) for name in ("prompt", "cached", "completion")}
    return {
        "gpus": {"kind": kind, "count": count, **sheet},
        "placement": _placement(recipe),
        "questions": asked,
        "notes": _notes(recipe, asked, measured=pilot is not None),
        **beside,
        "rounds": rounds,
        "tests": tests,
        "gpu_hours": hours,
        "idle_gpu_hours": sum(part["idle_gpu_hours"] for part in parts),
        "wall_hours": sum(part["wall_seconds"] for part in parts) / 3600,
        "money": money(recipe.prices, tokens, hours * 3600),
        "formulas": formulas,
    }


@dataclass(frozen=True)
class Table:
    """What the stages of a run take by data sheets and assumed efficiencies; to `formulas` goes how it was computed."""

    recipe: Recipe
    asked: Json
    known: Lengths
    teacher_model: Model | None
    student_model: Model
    gpu: Gpu

    def teacher(self, k: int) -> Json:
        """{shown, teacher_tokens} of round k."""
        texts = self._texts(k)
        return {"shown": texts.shown, "teacher_tokens": texts.total()}

    def rationales(self, k: int, formulas: list[str]) -> Json | None:
        """The teacher's part of round k; None behind an endpoint."""
        model, engine = self.teacher_model, self.recipe.teacher.engine
        return _answers(model, engine, self.gpu, self._texts(k), formulas, f"round {k} rationales") if model else None

    def answers(self, requests: int, formulas: list[str], name: str, stages: int = 1) -> Json:
        """The student's answers to plain questions, in so many stages."""
        texts = Texts(requests, _plain(self.recipe, self.known), 0.0, self.known.attempt)
        return _answers(self.student_model, self.recipe.student.engine, self.gpu, texts, formulas, name, stages)

    def training(self, questions: int, formulas: list[str]) -> Json:
        """The training of one round on the lessons of so many questions."""
        return _training(self.recipe, self.known, questions, self.student_model, self.gpu, formulas)

    def _texts(self, k: int) -> Texts:
        return _texts(self.recipe, self.known, self.asked, k, self.recipe.teacher.template, self.teacher_model)


# -- what is asked ------------------------------------------------------------------------------------------------------


def _notes(recipe: Recipe, asked: Json, measured: bool) -> list[str]:
    """What of this recipe the figures do not hold, one sentence each."""
    spec, data = recipe.teacher, recipe.data
    cleaned = data.clean == "ngram" and not _task(recipe).templated
    found = []
    if cleaned and _cleaned(recipe) is None and asked["train"] != data.train_limit:
        found.append("what data.clean removes is not known here and not taken off the questions")
    if spec.regenerate != "all":
        found.append(f'teacher.regenerate = "{spec.regenerate}" is planned as "all": an upper bound of rounds from 1 on')
    if not measured and ((spec.samples > 1 and recipe.lessons.select == "first") or spec.hints != "off"):
        found.append("every question is planned with one request: samples and hints for those without a rationale come on top")
    if spec.engine.remote and not measured:
        limit = spec.engine.endpoint.requests_per_minute
        least = f", at least {asked['train'] / limit / 60:,.1f} hours a round by requests_per_minute" if limit else ""
        found.append(f"the teacher's time at its endpoint is in no figure{least}")
    if recipe.round0.startswith("lessons:"):
        found.append("round 0 is planned with as many lessons as questions, not with those of its file")
    if kept := [part for part in ("teacher", "student") if getattr(recipe, part).engine.lifetime == "run"]:
        found.append(
            f'engines of {" and ".join(kept)} are kept (lifetime = "run"): their starts after the first are not taken off'
        )
    return found


def _gpus(recipe: Recipe, text: str | None, piloted: bool) -> tuple[str, int]:
    """(kind, how many): by default as many H100s as the recipe's largest stage holds, and with a pilot "" of the kind."""
    kind, _, number = (text or ("" if piloted else "H100")).partition(":")
    if kind not in (GPUS if text or not piloted else ("",)):
        raise UserError(f"--gpus {text}: {kind} is not in the table; use one of {', '.join(GPUS)}, as in --gpus H200:16")
    if number and not (number.isascii() and number.isdigit() and int(number)):
        raise UserError(f"--gpus {text}: {number!r} is no count; write it as --gpus {kind}:16")
    parts = _placement(recipe)
    kept = _kept(parts)
    for key in ("teacher.engine", "student.engine", "student"):
        part = parts[key]
        if part and not part["gpus"] and kind:
            raise UserError(
                f"{key}.resources.gpus = 0: a plan is about GPUs; add `--set {key}.resources.gpus=1`, or measure this machine "
                "with --pilot 50 and without --gpus"
            )
        if part and number and kept + (0 if part["kept"] else part["gpus"]) > int(number):
            beside = f' beside {kept:g} of engines that are kept (lifetime = "run")' if kept else ""
            raise UserError(
                f"--gpus {text}: one {part['what']} of {key} takes {part['gpus']:g}{beside}; give more, or lower resources.gpus"
            )
    shared = [part["gpus"] * part["count"] for part in parts.values() if part and not part["kept"]]
    return kind, int(number) if number else math.ceil(kept + max(shared))


def _kept(parts: Json) -> float:
    """GPUs that engines hold for the whole run (lifetime = "run")."""
    return float(sum(part["gpus"] * part["count"] for part in parts.values() if part and part["kept"]))


def _placement(recipe: Recipe) -> Json:
    """By section: how many, and the GPUs of each; None of a teacher behind an endpoint."""
    student = recipe.student
    found: Json = {}
    for key, engine in (("teacher.engine", recipe.teacher.engine), ("student.engine", student.engine)):
        part = {"count": engine.replicas, "gpus": engine.resources.gpus, "kept": engine.lifetime == "run"}
        found[key] = None if engine.remote else {"what": "replica", **part}
    found["student"] = {"what": "worker", "count": student.workers, "gpus": student.resources.gpus, "kept": False}
    return found


def _filled(recipe: Recipe, count: int) -> Recipe:
    """The recipe with as many replicas and workers as the GPUs hold beside engines that are kept, which stay as many as they
    are; no more workers than chats in a step, since the others would have nothing to do."""
    student = recipe.student
    room = count - _kept(_placement(recipe))

    def filled(engine: Any) -> Any:
        fixed = engine.remote or engine.lifetime == "run"
        return engine if fixed else engine.model_copy(update={"replicas": int(room // engine.resources.gpus)})

    teacher, engine = filled(recipe.teacher.engine), filled(student.engine)
    workers = 1 if student.sharding == "none" else _busy(int(room // student.resources.gpus), student)
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"engine": teacher}),
            "student": student.model_copy(update={"engine": engine, "workers": workers}),
        }
    )


def _busy(workers: int, student: Student) -> int:
    """Of so many workers, those that have a chat in every step; with batch_tokens a step is taken to be long enough for all."""
    return workers if student.batch_tokens else min(workers, student.batch_size)


def _pair(text: str, flag: str, keys: Sequence[str]) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if key not in keys or not equals or not value:
        raise UserError(f"{flag} {text}: write it as {flag} KEY=VALUE with one of {', '.join(keys)}")
    return key, value


def _questions(recipe: Recipe) -> dict[str, int]:
    data = recipe.data
    select = 0 if data.shared else data.select
    held = 0 if data.validation else data.show + select
    there = _cleaned(recipe) or size_of(recipe, data.train, "train")
    if (train := there - held) < 1:
        raise UserError(
            f"data.show and data.select hold {held} of the {there} questions of {data.train} and leave none to teach; lower "
            "them, or name another data.validation"
        )
    tests = [min(data.test_limit or 10**12, size_of(recipe, source, "test")) for source in data.tests]
    return {"train": min(data.train_limit or train, train), "show": data.show, "select": select, "tests": sum(tests)}


def _cleaned(recipe: Recipe) -> int | None:
    """Questions that cleaning leaves of a public training set; None where they are not known."""
    data = recipe.data
    task, split = tasks.parse_source(data.train, "train")
    known = data.clean == "ngram" and data.tests and data.dir is None and split == "train"
    return CLEANED.get(task.name) if known else None


def _lengths(recipe: Recipe, given: Sequence[str]) -> Lengths:
    keys = tuple(Lengths.__slots__)
    changed = {}
    for text in given:
        key, value = _pair(text, "--tokens", keys)
        if not (value.isascii() and value.isdigit() and int(value)):
            raise UserError(f"--tokens {text}: {value!r} is no count of tokens; write it as --tokens {key}=400")
        changed[key] = float(value)
    name = _task(recipe).name
    if name in LENGTHS:
        return replace(LENGTHS[name], **changed)
    if missing := [key for key in keys if key not in changed]:
        raise UserError(f"data.train = {recipe.data.train!r}: its lengths are not known; add --tokens {missing[0]}=N")
    return Lengths(**changed)


# -- prompts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Texts:
    """Requests, and the tokens of each."""

    requests: int
    prompt: float
    cached: float
    completion: float
    shown: int = 0

    def total(self) -> Json:
        each = {"prompt": self.prompt, "cached": self.cached, "completion": self.completion}
        return {name: round(self.requests * tokens) for name, tokens in each.items()}


def _task(recipe: Recipe) -> tasks.Task:
    """Whose questions are taught."""
    return tasks.parse_source(recipe.data.train, "train")[0]


def _tokens(text: str) -> float:
    return len(text.encode()) / BYTES


def _filler(letter: str, tokens: float) -> str:
    return (letter * (BYTES - 1) + " ") * round(tokens)


def _texts(recipe: Recipe, known: Lengths, asked: Json, k: int, template: str, teacher: Model | None) -> Texts:
    """The teacher's in round k, by rendering the template with filler text."""
    train = asked["train"] if k or recipe.round0 == "run" else 0
    show = 0 if k else asked["show"]
    instruction, feedback = _task(recipe).instruction, recipe.gap.feedback
    if k == 0 or feedback == "none":
        chats = [prompts.solve(_filler(letter, known.question), instruction) for letter in "qr"]
        shown: list[Case] = []
        written = known.rationale
    else:
        shown = [_case(known, "s", 1)] * (0 if feedback == "history" else asked["show"])
        render = prompts.TEMPLATES[template].render
        budget = recipe.room(recipe.teacher.engine.context or (teacher.context if teacher else None))
        while shown and _length(render(shown, Case(""), "")) > budget:
            shown.pop()
        past = 0 if feedback == "block" else min(k, recipe.gap.history)
        chats = [render(shown, _case(known, letter, past), instruction) for letter in "qr"]
        written = known.rationale + (known.diagnosis if template != "compact" else 0)
    prompt = _length(chats[0]) + CHAT
    pairs = zip(*(chat[0]["content"] for chat in chats), strict=False)
    common = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    cached = _tokens(common) // BLOCK * BLOCK
    requests = (train + show) * (recipe.teacher.samples if recipe.lessons.select == "shortest" else 1)
    return Texts(requests, prompt, cached, written, len(shown))


def _length(chat: list[Message]) -> float:
    return _tokens(chat[0]["content"])


def _case(known: Lengths, letter: str, past: int) -> Case:
    """A question with `past` earlier rationales and, if there are any, the student's scored answer."""
    before = tuple((k, _filler(letter, known.rationale)) for k in range(past))
    if not past:
        return Case(_filler(letter, known.question))
    return Case(_filler(letter, known.question), before, "1", _filler(letter, known.attempt), "1", True)


def _plain(recipe: Recipe, known: Lengths) -> float:
    """Tokens of the prompt that asks a question alone."""
    return _length(prompts.solve(_filler("q", known.question), _task(recipe).instruction)) + CHAT


# -- what it takes ------------------------------------------------------------------------------------------------------


def weight_bytes(model: Model, engine: Engine) -> float:
    """Of one replica. Raises UserError for a way to quantise whose size is not known."""
    plain, each = 4.0 if engine.dtype == "float32" else 2.0, model.quantised
    if each is None and (method := engine.kwargs.get("quantization")) is not None:
        if method not in QUANTISED:
            raise UserError(f"kwargs.quantization = {method!r}: its size is not known here; known are {', '.join(QUANTISED)}")
        each = QUANTISED[method]
    return model.tables * plain + (model.parameters - model.tables) * (plain if each is None else each)


def kv_bytes(model: Model, engine: Engine) -> float:
    """Of one token in a replica's cache. Where tensor parallel exceeds the key/value heads, vLLM keeps copies of them."""
    size = 1 if str(engine.kwargs.get("kv_cache_dtype", "")).startswith("fp8") else 4 if engine.dtype == "float32" else 2
    return model.kv_bytes * size / 2 * max(1.0, engine.tensor_parallel / model.kv_heads)


def of_memory(engine: Engine) -> float:
    """Share of a GPU's memory that the engine takes."""
    return float(engine.kwargs.get("gpu_memory_utilization", OF_MEMORY))


def _answers(model: Model, engine: Engine, gpu: Gpu, texts: Texts, formulas: list[str], name: str, stages: int = 1) -> Json:
    """What the answers take on the engine's replicas: prefill bound by FLOP/s, decoding by bandwidth or FLOP/s."""
    requests, prompt, cached, completion = texts.requests, texts.prompt, texts.cached, texts.completion
    each, replicas = engine.resources.gpus, engine.replicas
    peak = each * (gpu.fp32 if engine.dtype == "float32" else gpu.peak) * MFU
    weights, kv, context = weight_bytes(model, engine), kv_bytes(model, engine), prompt + completion / 2
    room = (each * gpu.memory * of_memory(engine) - weights) / kv - cached
    most = engine.sequences
    batch = max(1.0, min(most, requests / replicas, room // (prompt - cached + completion)))
    prefill = requests * (prompt - cached) * model.flops((prompt + cached) / 2) / (replicas * peak)
    moved = (weights + batch * context * kv) / (each * gpu.bandwidth * OF_BANDWIDTH)
    step = max(moved, batch * model.flops(context) / peak)
    decode = requests * completion / (replicas * batch) * step
    load = stages * (START + weights / LOAD)
    held = each * replicas
    fresh, flops = prompt - cached, model.flops((prompt + cached) / 2) / 1e9
    speed, read = peak / each / 1e12, gpu.bandwidth * OF_BANDWIDTH / 1e12
    formulas += [
        f"{name}: prefill = {requests:,.0f} requests × {fresh:,.0f} tokens not cached × {flops:,.1f} GFLOP ÷ ({held:g} GPUs × "
        f"{speed:,.0f} TFLOP/s) = {prefill:,.0f} s",
        f"{name}: a decoding step of {batch:,.0f} requests a replica = max of ({weights / 1e9:,.1f} GB weights + "
        f"{batch:,.0f} × {context:,.0f} tokens × {kv / 1e3:,.0f} kB) ÷ ({each:g} GPUs × {read:.2f} TB/s) and "
        f"{batch:,.0f} × {model.flops(context) / 1e9:,.1f} GFLOP ÷ ({each:g} GPUs × {speed:,.0f} TFLOP/s) = "
        f"{step * 1e3:,.1f} ms",
        f"{name}: decoding = {requests:,.0f} × {completion:,.0f} tokens ÷ ({replicas} replicas × {batch:,.0f}) × step = "
        f"{decode:,.0f} s",
        f"{name}: loading = {stages} × ({START:g} s + {weights / 1e9:,.1f} GB ÷ {LOAD / 1e9:g} GB/s) = {load:,.0f} s",
    ]
    return {
        "gpus": held,
        "load_seconds": load,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "batch": batch,
        "wall_seconds": load + prefill + decode,
        "gpu_hours": held * (load + prefill + decode) / 3600,
    }


def _training(recipe: Recipe, known: Lengths, lessons: float, student: Model, gpu: Gpu, formulas: list[str]) -> Json:
    spec = recipe.student
    one = _plain(recipe, known) + known.rationale
    tokens = float(spec.tokens or lessons * one * (spec.epochs or 1))
    passes = (4 if spec.lora.rank else 6) + (2 if spec.gradient_checkpointing else 0)
    held, working = (workers * spec.resources.gpus for workers in (spec.workers, _busy(spec.workers, spec)))
    peak = gpu.peak * (1 if spec.dtype == "bfloat16" else 0.5) * TRAINING_MFU
    work = tokens * (passes * student.parameters + passes / 2 * (student.flops(one / 2) - student.flops(0))) / (working * peak)
    load = START + 2 * student.parameters / LOAD
    formulas.append(
        f"training: {tokens:,.0f} tokens × {passes} × {student.parameters / 1e9:.2f} G parameters ÷ ({working:g} GPUs × "
        f"{peak / 1e12:,.0f} TFLOP/s) = {work:,.0f} s, attention included"
    )
    hours = held * (load + work) / 3600
    return {"gpus": held, "load_seconds": load, "tokens": tokens, "wall_seconds": load + work, "gpu_hours": hours}


def _stage(figures: Json, count: int) -> Json:
    """With the GPU-hours of those that have nothing to do meanwhile."""
    return {**figures, "idle_gpu_hours": (count - figures["gpus"]) * figures["wall_seconds"] / 3600}


def _round(recipe: Recipe, asked: Json, k: int, costs: Table | Pilot, count: int, formulas: list[str]) -> Json:
    kept = formulas if k < 2 else []  # later rounds differ in their numbers alone
    stages = {}
    if k:
        stages["attempts"] = costs.answers(asked["train"] * recipe.student.samples, kept, f"round {k} attempts")
    if (rationales := costs.rationales(k, kept)) is not None:
        stages["rationales"] = rationales
    if k or not recipe.round0.startswith("student:"):
        of_rounds = k + 1 if recipe.lessons.mode == "accumulate" else 1
        stages["student"] = costs.training(asked["train"] * of_rounds, kept)
    stages["measure"] = costs.answers(asked["show"] + asked["select"], [], "")
    stages = {name: _stage(figures, count) for name, figures in stages.items()}
    return {
        "round": k,
        **costs.teacher(k),
        "stages": stages,
        **{name: sum(figures[name] for figures in stages.values()) for name in ("gpu_hours", "idle_gpu_hours", "wall_seconds")},
    }


def _memory(recipe: Recipe, teacher: Model | None, student: Model, gpu: Gpu) -> Json:
    """By section: bytes of one GPU by what they are for, the limit, and whether they fit."""
    found: Json = {}
    for key, model, engine in (
        ("teacher.engine", teacher, recipe.teacher.engine),
        ("student.engine", student, recipe.student.engine),
    ):
        if model:
            longest = (engine.context or model.context) * kv_bytes(model, engine)
            parts = {"weights": weight_bytes(model, engine), "one longest request": longest}
            limit = gpu.memory * of_memory(engine)
            found[key] = _fit({name: size / engine.resources.gpus for name, size in parts.items()}, limit)
    spec: Student = recipe.student
    found["student"] = _fit({**memory.need(student.shape(spec.lora.rank), spec), "runtime": RUNTIME}, gpu.memory)
    return found


def _fit(parts: dict[str, float], limit: float) -> Json:
    return {"bytes": parts, "limit": limit, "fits": sum(parts.values()) <= limit}


def _templates(recipe: Recipe, known: Lengths, asked: Json, teacher: Model, gpu: Gpu) -> Json | None:
    """The teacher's part of a round with full history, with the shared part first and with the paper's layout."""
    if not recipe.rounds or recipe.gap.feedback == "none":
        return None
    k = min(recipe.rounds, recipe.gap.history)
    found: Json = {"round": k}
    for template in ("prefix", "paper"):
        texts = _texts(recipe, known, asked, k, template, teacher)
        figures = _answers(teacher, recipe.teacher.engine, gpu, texts, [], "")
        found[template] = {**asdict(texts), **figures}
    reported = PAPER_HOURS if _task(recipe).name == "numina" and asked["train"] == PAPER_QUESTIONS else None
    return {**found, "reported_gpu_hours": reported}
