"""A pilot: the loop's own stages over a few training questions on this machine, and what a run takes going by their figures.

Questions, prompts, engines, grading and training are a run's, in a temporary folder. The gap is one of the recipe's size, of
the base student, so that the prompts of round 1 are as long as a run's and share as much.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

from undo_ray import engines, models, problems
from undo_ray.config import Engine, Placement, Recipe, TeacherEngine
from undo_ray.gap import Gap, measured
from undo_ray.generate import answer, explain
from undo_ray.lessons import accept
from undo_ray.progress import Progress
from undo_ray.store import Stage, Step, dataset, open_run, split_rows
from undo_ray.train import finetune
from undo_ray.types import SELECT, SHOW, TRAIN, UserError

Json = dict[str, Any]

STEPS = 8
"""Optimiser steps that are timed: the first, which warms up, must not be most of them."""


def small(recipe: Recipe, text: str) -> Recipe:
    """The recipe over `text` questions, with one replica of each engine and a few steps of training.

    Raises UserError when `text` is no count, an engine is not installed or a model not to be had.
    """
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UserError(f"--pilot {text}: no count of questions; write it as --pilot 50")
    parts: Json = {"teacher": recipe.teacher, "student": recipe.student}
    count = int(text)
    for role, spec in parts.items():
        engines.check(spec.engine, f"{role}.engine")
        if not spec.engine.remote:
            models.check(spec.model, recipe.seed, f"{role}.model", spec.trust_remote_code)
        alone = {"replicas": 1, "min_replicas": None, "lifetime": "stage"}
        parts[role] = spec.model_copy(update={"engine": spec.engine.model_copy(update=alone)})
    epochs = {"tokens": None, "epochs": STEPS * recipe.student.batch_size / count}
    parts["student"] = parts["student"].model_copy(update=epochs)
    parts["teacher"] = parts["teacher"].model_copy(update={"cache": False})  # what was made elsewhere took no time here
    data = recipe.data.model_copy(update={"train_limit": min(count, recipe.data.train_limit or count)})
    return recipe.model_copy(update={"round0": "run", "data": data, **parts})


def run(recipe: Recipe, kind: str) -> Json:
    """Run a `small` recipe; what it took, as docs/plan.md has it. Ray is up and holds it; `kind`: of the GPUs planned for.

    Raises UserError when that is not this machine's, when Ray spans several machines, and whatever stops a run.
    """
    import ray
    from ray.data.expressions import col

    machine = next((key.partition(":")[2] for key in ray.cluster_resources() if key.startswith("accelerator_type:")), "CPU")
    if kind and kind != machine:
        raise UserError(f"--gpus {kind}: --pilot measures this machine, which is a {machine}; leave out one of both")
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        raise UserError("--pilot measures one machine, and Ray spans several; run it on one like theirs, without RAY_ADDRESS")
    begun, progress, found = time.monotonic(), Progress(), dict[str, Json]()
    at_once = recipe.teacher.samples if recipe.lessons.select == "shortest" else 1
    progress.connect()
    with tempfile.TemporaryDirectory(prefix="undo-ray-pilot-") as folder, open_run(folder, recipe, {}, progress) as held:
        whole, first, second = Step(held, held.place, -1), held.round(0), held.round(1)
        rows = whole.once("problems", problems.prepare, recipe).filter(expr=col("split") != SELECT)
        count = whole.manifests["problems"]["figures"]["train"]
        rows = first.once("rationales", explain, rows, None, recipe)
        found["round 0 rationales"] = _made(first, "rationales", count + recipe.data.show, recipe.teacher.engine, at_once)
        delta_ref = ray.put(Gap.from_json(second.once("attempts", _attempts, rows, recipe)))
        found["attempts"] = _made(second, "attempts", count + recipe.data.show, recipe.student.engine, recipe.student.samples)
        last, rows = first, dataset(second.files("attempts"))
        if recipe.rounds:
            last, rows = second, second.once("rationales", explain, rows, delta_ref, recipe)
            found["round 1 rationales"] = _made(second, "rationales", count, recipe.teacher.engine, at_once)
        # The latest lesson of a question that round 1 did not ask about is round 0's.
        steps = (first, last) if recipe.lessons.mode == "latest" else (last,)
        if not any(step.manifests["rationales"]["figures"]["good"] for step in steps):
            explained = last.manifests["rationales"]["figures"]
            refused = ", ".join(f"{n} {why}" for why, n in explained["refused"].items()) or f"{explained['asked']} asked about"
            raise UserError(
                f"--pilot: of {count} questions no rationale is accepted ({refused}), so there is nothing to train on; look at "
                "the teacher and its prompt, or give --pilot more questions",
                exit_code=3,
            )
        lessons = last.once("lessons", accept, rows, None, recipe)
        last.once("student", finetune, lessons, recipe.student.model, recipe)
        figures, seconds = last.manifests["student"]["figures"], last.manifests["student"]["seconds"]
        found["training"] = {
            "lessons_per_question": last.manifests["lessons"]["figures"]["lessons"] / count,
            "tokens_per_lesson": figures["tokens"] / figures["passes"] / (figures["chats"] - figures["held_out"]),
            **{name: figures[name] for name in ("steps", "tokens", "workers")},
            "load_seconds": seconds - figures["loop_seconds"],
            "work_seconds": figures["loop_seconds"],
        }
    return {"questions": count, "seconds": time.monotonic() - begun, "machine": machine, "stages": found}


def _attempts(rows: Any, recipe: Recipe, out: Stage) -> None:
    """The base student's answers to training and show questions alike; the stage's value is the gap."""
    counts = answer(rows, recipe.student.model, recipe, (TRAIN, SHOW), 0, out, recipe.student.samples)
    out.value = measured(0, split_rows(out.files(), SHOW), counts, shared=True).to_json()


def _made(step: Step, name: str, questions: int, engine: Engine, samples: int) -> Json:
    """The figures of a stage that makes text; `samples` of a question are asked for at once."""
    figures, seconds = step.manifests[name]["figures"], step.manifests[name]["seconds"]
    requests, work = figures["generations"], figures["engine_seconds"]
    room = engine.batch_size * engines.calls(engine) * samples
    if engine.kind == "vllm":
        room = min(room, engine.sequences)
    elif isinstance(engine, TeacherEngine) and engine.remote:
        room = engine.endpoint.concurrency
    return {
        "requests": requests,
        "requests_per_question": requests / questions,
        "good": figures["good"] / max(1, figures.get("asked", questions)),
        **{name: count / max(1, requests) for name, count in figures["tokens"].items()},
        "shown": figures.get("shown", 0),
        "in_flight": min(requests, room),
        "room": room,
        "start_seconds": figures["engine_start_seconds"],
        "load_seconds": seconds - work,
        "work_seconds": work,
        "tokens_per_second": figures["tokens"]["completion"] / work if work else 0.0,
    }


@dataclass(frozen=True)
class Pilot:
    """What the stages of a run take by a pilot's figures, as `plan.Table` has it by data sheets."""

    recipe: Recipe
    asked: Json
    stages: Json

    def teacher(self, k: int) -> Json:
        """{shown, teacher_tokens} of round k."""
        each, requests = self._rationales(k)
        tokens = {name: round(requests * each[name]) for name in ("prompt", "cached", "completion")}
        return {"shown": each["shown"], "teacher_tokens": tokens}

    def rationales(self, k: int, formulas: list[str]) -> Json:
        """The teacher's part of round k."""
        each, requests = self._rationales(k)
        engine = self.recipe.teacher.engine
        return _stage(f"round {k} rationales", each, "requests", requests, engine.replicas, engine.resources, formulas)

    def answers(self, requests: int, formulas: list[str], name: str, stages: int = 1) -> Json:
        """The student's answers to plain questions, in so many stages."""
        engine = self.recipe.student.engine
        each = {**self.stages["attempts"], "load_seconds": stages * self.stages["attempts"]["load_seconds"]}
        return _stage(name, each, "requests", requests, engine.replicas, engine.resources, formulas)

    def training(self, questions: int, formulas: list[str]) -> Json:
        """The training of one round on the lessons of so many questions."""
        spec, each = self.recipe.student, self.stages["training"]
        lessons = questions * each["lessons_per_question"]
        tokens = float(spec.tokens or lessons * each["tokens_per_lesson"] * (spec.epochs or 1))
        return {"tokens": tokens, **_stage("training", each, "tokens", tokens, spec.workers, spec.resources, formulas)}

    def _rationales(self, k: int) -> tuple[Json, float]:
        """(the pilot's figures of round 0 or 1, how many requests round k makes)."""
        questions = self.asked["train"] if k or self.recipe.round0 == "run" else 0
        each: Json = self.stages[f"round {min(k, 1)} rationales"]
        return each, (questions + (0 if k else self.asked["show"])) * each["requests_per_question"]


def _stage(name: str, each: Json, unit: str, amount: float, count: int, resources: Placement, formulas: list[str]) -> Json:
    """What `amount` of requests or tokens takes on `count` replicas or workers, each as fast as the pilot's."""
    load, work = each["load_seconds"], each["work_seconds"]
    one = work * each.get("workers", 1) / max(1, each[unit])
    wall, held = load + amount * one / count, count * resources.gpus
    formulas.append(
        f"{name}: {amount:,.0f} {unit} × {one * 1e3:,.4g} ms ÷ {count} + {load:,.1f} s to start and to end = {wall:,.0f} s; "
        f"from the pilot: {each[unit]:,} {unit} in {work:.2f} s"
    )
    return {"gpus": held, "load_seconds": load, "wall_seconds": wall, "gpu_hours": held * wall / 3600}
