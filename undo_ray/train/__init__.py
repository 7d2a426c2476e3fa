"""finetune(): lessons to a student, on Ray Train.

    tokens.py    chats to tokens, with the loss on the assistant's alone
    packing.py   which chats a step takes, laid end to end in rows
    model.py     packed attention, the loss in pieces, adapters
    sharding.py  none, ddp, fsdp2, zero2, zero3 behind one set of verbs
    worker.py    the loop: steps, checkpoints, checks
    export.py    the Hugging Face directory, and the proof that it is the model that was trained
    memory.py    how much memory a worker needs

What a run keeps until its stage is committed (tokens, packed rows, checkpoints) lies in the stage's `resume` folder, below a
hash of what it is made of: the same command goes on from there, another lesson or learning rate starts anew.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from undo_ray import models
from undo_ray.config import Recipe, Student, digest
from undo_ray.place import Place
from undo_ray.store import FULL, Stage
from undo_ray.train.packing import pack
from undo_ray.train.tokens import content_key, tokenise
from undo_ray.types import Damaged, UserError, got

if TYPE_CHECKING:
    from ray.data import Dataset

    from undo_ray.train.worker import Job

REMEDY = "delete the stage's folder and run the same command"


def check(ref: str, recipe: Recipe) -> None:
    """Raises UserError where the student cannot be trained: asked before the teacher is paid for its lessons.

    One with code of its own may not build without weights, and is looked at when they are loaded.
    """
    from undo_ray.train.model import refuse, skeleton

    if not recipe.student.trust_remote_code:
        refuse(skeleton(models.local(ref, recipe.seed, weights=False)))


def finetune(lessons: Dataset, start: str, recipe: Recipe, out: Stage) -> None:
    """Fine-tune `start` (a ModelRef) on the lessons; the stage's model is a Hugging Face directory.

    With `round0 = "student:PATH"` round 0 takes that student as it is.

    Raises UserError when no chat fits `student.max_length`, a chat has no supervised tokens, training went wrong (loss not
    finite, no gradient, an explosion) or ran out of memory; what was kept for resuming stays.
    """
    import ray

    spec = recipe.student
    if out.round == 0 and recipe.round0.startswith("student:"):
        got(ray.remote(_given).options(num_cpus=1).remote(recipe.round0.removeprefix("student:"), recipe.seed, out.model))
        return
    state = out.resume / content_key(lessons, start, recipe)
    figures, sample = _tokens(lessons, start, recipe, state)
    out.progress.say(f"round {out.round} · student: a lesson as it is trained on: {sample}")
    packed = state / f"packed-{digest([spec.workers, spec.micro_tokens])[:8]}"
    if (packed / "plan.json").exists():
        plan = (packed / "plan.json").read_json(REMEDY)
    else:
        task = ray.remote(pack).options(num_cpus=1)
        plan = ray.get(task.remote(state / "tokens", spec, recipe.seed, packed))
    report = _train(start, recipe, out, state, packed, plan)
    probe = report.pop("probe")
    if spec.engine.kind == "vllm" and spec.engine.nodes == 1:  # the check is one task
        _check_in_vllm(out.model.uri, recipe, probe)
    gpus = spec.workers * spec.resources.gpus
    out.note(**figures, **plan, **report, sharding=spec.sharding, workers=spec.workers, gpus=gpus)


def _given(ref: str, seed: int, place: Place) -> None:
    place.upload(models.local(ref, seed))


def _tokens(lessons: Dataset, start: str, recipe: Recipe, state: Place) -> tuple[dict[str, int], str]:
    """({chats, too_long}, one chat decoded with its mask); the tokens lie in `state / "tokens"`, made once."""
    done = state / "tokens.json"
    if done.exists():
        known: dict[str, Any] = done.read_json(REMEDY)
    else:
        known = tokenise(lessons, start, recipe, state / "tokens")
        done.write_json(known)
    return {"chats": known["chats"], "too_long": known["too_long"]}, known["sample"]


def _train(start: str, recipe: Recipe, out: Stage, state: Place, packed: Place, plan: dict[str, Any]) -> dict[str, Any]:
    """Run the workers to their end; what worker 0 reports.

    Ray Train starts a lost group of workers again; its controller it does not (one write of its list of checkpoints that the
    store refuses is the end of it), so that is done here, as often.
    """
    from ray.train import ControllerError

    from undo_ray.train.worker import Job

    spec, kept = recipe.student, state / "train"
    (state / "failure.json").remove()  # of an earlier start: what it asked for may be mended
    follow = out.progress.tracker.following(f"round-{out.round:02d}") if out.progress.tracker else nullcontext()
    with follow as curves:
        job = Job(start, recipe.seed, spec, packed, plan, out.model, state, out.progress.board, curves)
        for left in reversed(range(spec.max_failures + 1)):
            try:
                _fit(job, kept)
                break
            except Exception as error:  # Ray Train has many types for a lost group; with a reason of ours, that is what counts
                _raise_failure(job.failure, spec, error)
                if not left or not isinstance(error, ControllerError) or FULL in str(error):
                    raise
                again = f"is started again from the last checkpoint, up to {left} times (student.max_failures)"
                why = str(error).splitlines()[-1]
                out.progress.say(f"round {out.round} · student: Ray Train's controller failed and {again}: {why}")
    _raise_failure(job.failure, spec, None)
    report: dict[str, Any] = job.report.read_json(REMEDY)
    return report


def _fit(job: Job, kept: Place) -> None:
    """Run Ray Train once over the job, from the last checkpoint below `kept`, in a thread: in the main one Ray Train 2.60
    would take Ctrl-C for itself, then and ever after."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from undo_ray.train.rendezvous import Inward
    from undo_ray.train.worker import work

    spec = job.spec
    known = kept / "train/checkpoint_manager_snapshot.json"  # Ray Train writes it in place: a kill or a full disk can cut it
    if known.exists():
        try:
            known.read_json(REMEDY)
        except UserError as error:
            raise Damaged(f"{known.uri}: Ray Train's list of checkpoints cannot be read", kept.uri) from error
    resources = {"CPU": spec.resources.cpus, **({"GPU": spec.resources.gpus} if spec.resources.gpus else {})}
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job},
        torch_config=Inward(backend="nccl" if spec.resources.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=spec.workers, use_gpu=spec.resources.gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name="train",  # a name Ray Train has seen goes on from its last checkpoint: a new driver finds the old one's
            storage_path=kept.path,
            storage_filesystem=kept.fs,
            failure_config=FailureConfig(max_failures=spec.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="undo_ray training")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _raise_failure(failure: Place, spec: Student, error: Exception | None) -> None:
    """Raise what a worker wrote before it ended, or that the system killed one for its memory."""
    from undo_ray.train import memory

    if failure.exists():
        known = failure.read_json(REMEDY)
        if known["damaged"]:
            raise Damaged(known["message"], known["damaged"]) from error
        raise UserError(known["message"], exit_code=known["exit_code"]) from error
    if error is not None and "OutOfMemory" in repr(error):
        raise UserError(
            f"training ran out of memory: a worker was killed for it; {memory.advice(spec, None)} (placement keys: the same "
            "run goes on)",
            exit_code=5,
        ) from error


def _check_in_vllm(uri: str, recipe: Recipe, probe: dict[str, Any]) -> None:
    """The engine that comes next loads the export; raises RuntimeError when it is another model to it."""
    import ray

    from undo_ray.train.export import vllm_differs

    engine, checked = recipe.student.engine, (probe["ids"], probe["logprobs"], recipe.student.trust_remote_code)
    task = ray.remote(max_calls=1)(vllm_differs)  # its process ends with it, and gives the memory back
    task = task.options(num_cpus=engine.resources.cpus, num_gpus=engine.resources.gpus)
    if wrong := got(task.remote(partial(models.local, uri, recipe.seed), engine, *checked)):
        raise RuntimeError(f"the exported student is not the trained one: {wrong}")
