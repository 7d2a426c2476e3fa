"""The driver. `undo` is the loop; `run` is everything around it: checks, Ray, the run directory, the report."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from undo_ray import engines, gap, models, placement, problems, report, train
from undo_ray.config import Recipe, identity
from undo_ray.engines.kept import release
from undo_ray.gap import Gap
from undo_ray.generate import attempt, explain, measure, test
from undo_ray.lessons import accept
from undo_ray.place import Json
from undo_ray.progress import Progress
from undo_ray.store import Run, known_identity, open_run
from undo_ray.track import Tracker
from undo_ray.train import finetune
from undo_ray.types import UserError

if TYPE_CHECKING:
    from ray.data import Dataset


def undo(recipe: Recipe, run: Run) -> list[Json]:
    """The loop. Returns the rounds' records.

    What the paper (arXiv 2504.02521) leaves open, and what is done here:

    1. Every round fine-tunes the base model anew (`student.start`), on this round's rationales alone (`lessons.mode`).
    2. Every training question is explained again in every round, whether or not the student got it right
       (`teacher.regenerate`).
    3. Two validation sets: `show` feeds prompts, `select` stops the loop. The paper uses one of 20 questions for both; its
       standard error of 11 points cannot tell rounds apart (`data.shared = true` reproduces it).
    4. The result is the best round on `select`, not the last.
    5. The teacher answers the show questions once, in round 0; the gold answer is in no prompt (`teacher.hints`).
    6. Rounds stop when `select` accuracy has not beaten its best for `stop.patience` rounds.
    """
    asked = run.once("problems", problems.prepare, recipe)
    student, gap_ref, rows, lessons, records = resume(run, asked, recipe)

    for k in range(len(records), recipe.rounds + 1):  # k = 0 has no gap: standard distillation
        step = run.round(k)
        if k > 0:
            if gap.converged([record["validation"]["accuracy"] for record in records], **dict(recipe.stop)):
                break
            rows = step.once("attempts", attempt, rows, student, recipe)
        rows = step.once("rationales", explain, rows, gap_ref, recipe)
        lessons = step.once("lessons", accept, rows, lessons, recipe)
        start = student if recipe.student.start == "previous" else recipe.student.model
        student = step.once("student", finetune, lessons, start, recipe)
        delta = Gap.from_json(step.once("measure", measure, rows, student, recipe))
        gap_ref = ray.put(delta)
        records.append(step.commit(**report.round_figures(step, delta)))  # written last: it exists, the round is done
        run.progress.say(report.round_line(records[-1]))
        run.progress.tracker.record(records[-1])
    return records


def resume(run: Run, asked: Dataset, recipe: Recipe) -> tuple[str, Any, Dataset, Dataset | None, list[Json]]:
    """(student, Δ ref, rows, lessons, records) after the last finished round; those of a new run where there is none.

    An object ref dies with its driver, so Δ is put again.
    """
    records = run.records()
    if not records:
        return recipe.student.model, None, asked, None, records
    last = run.round(len(records) - 1)
    run.progress.say(f"{run.place.uri}: rounds 0 to {len(records) - 1} are done, going on from there")
    delta = Gap.from_json(last.made("measure"))
    return last.made("student"), ray.put(delta), last.made("rationales"), last.made("lessons"), records


def run(recipe: Recipe, run_dir: str, verbose: bool = False) -> Json:
    """Run a recipe to its end, or go on with it, and return its report (see docs/run-directory.md for the schema).

    Raises UserError with one line for whatever the person running it can mend; what is committed stays.
    """
    with open_run(run_dir, recipe, checked(recipe, ("teacher", "student"), known_identity(run_dir)), Progress()) as held:
        held.mend()
        if known := report.finished(held.place, recipe):
            held.progress.say(f"{run_dir}: this run is finished; raise `rounds` or give another --run-dir to do more")
            return known
        with working(recipe, held, placement.asked(recipe), verbose) as recipe:
            try:
                records = undo(recipe, held)
            except UserError as error:
                if error.exit_code == 3 and (records := held.records()):
                    finish(recipe, held, records, "no_lessons")
                raise
            return finish(recipe, held, records, "rounds" if len(records) > recipe.rounds else "converged")


def evaluate(recipe: Recipe, run_dir: str, verbose: bool = False) -> Json:
    """`student.model` as it is on the recipe's tests, with a run's prompts, engine and graders: {model, tests: scores}.

    The run directory is one of its own; a killed evaluation goes on as a run does. Raises UserError as `run` does.
    """
    if not recipe.data.tests:
        raise UserError("data.tests is empty: there is nothing to evaluate on; name tests in the recipe")
    with open_run(run_dir, recipe, checked(recipe, ("student",), known_identity(run_dir)), Progress()) as held:
        held.mend()
        with working(recipe, held, placement.asked(recipe, training=False), verbose) as recipe:
            held.once("problems", problems.prepare, recipe)
            found = {"model": recipe.student.model, "tests": measured(recipe, held)[1]}
        held.lease.check()
        (held.place / "evaluation.json").write_json(found)
        return found


def checked(recipe: Recipe, roles: Sequence[str], known: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprints of the weights behind what the recipe names for these roles, once their engines are known to be there.

    `known` is the identity of a run that goes on: of a hub model it keeps the commit, though its branch may have moved since.
    """
    refs = {f"{role}.model": getattr(recipe, role).model for role in roles if not getattr(recipe, role).engine.remote}
    if "teacher" in roles and recipe.round0.startswith("student:"):
        refs["round0"] = recipe.round0.removeprefix("student:")
    for role in roles:
        engines.check(getattr(recipe, role).engine, f"{role}.engine")
    wanted = identity(recipe)
    trust = {key: getattr(recipe, "teacher" if key == "teacher.model" else "student").trust_remote_code for key in refs}
    refs |= {
        # Whose code is run, whatever a run directory says: that of the recipe's own revision.
        key: models.located(ref, known.get(f"weights of {key}"))
        for key, ref in refs.items()
        if known.get(key) == wanted[key] and not trust[key]
    }
    found = {key: models.check(ref, recipe.seed, key, trust[key]) for key, ref in refs.items()}
    if "teacher" in roles and not known:
        train.check(refs["student.model"], recipe)
    return found


@contextmanager
def working(recipe: Recipe, held: Run, asks: Sequence[placement.Ask], verbose: bool) -> Iterator[Recipe]:
    """While the block runs, Ray is up, holds what is asked, and is followed. Yields the recipe as workers find its models."""
    progress = held.progress
    progress.tracker = Tracker(recipe.track, held.place.uri, identity(recipe), progress.say)  # a missing package stops here
    try:
        if not held.begun():
            problems.check(recipe)
        start_ray(verbose)
        placement.check(asks, progress.say)
        progress.connect(held.place.uri)
        yield located(recipe, held.identity)
    finally:
        progress.tracker.close()
        release(held.engines)


def located(recipe: Recipe, known: Mapping[str, Any]) -> Recipe:
    """The recipe with its models as workers find them; the run's identity, `known`, has their fingerprints."""
    roles = ("student",) if recipe.teacher.engine.remote else ("teacher", "student")
    update: Json = {}
    for role in roles:
        part, fingerprint = getattr(recipe, role), known.get(f"weights of {role}.model")
        update[role] = part.model_copy(update={"model": models.located(part.model, fingerprint)})
    given, _, ref = recipe.round0.partition(":")
    round0 = f"student:{models.located(ref, known.get('weights of round0'))}" if given == "student" else recipe.round0
    return recipe.model_copy(update={**update, "round0": round0})


def finish(recipe: Recipe, run: Run, records: list[Json], stopped: str) -> Json:
    """The tests, read only now, for the base model and every round; then the report."""
    if recipe.data.tests:
        asked, _ = measured(recipe, run)
        tests = run.tests(recipe)
        for record in records:
            student = run.round(record["round"]).made("student")
            tests.once(f"round-{record['round']:02d}", test, asked, student, recipe)
    return report.write(run, records, stopped)


def measured(recipe: Recipe, run: Run) -> tuple[Dataset, Json]:
    """The test questions, and the scores of the untrained student on them."""
    tests = run.tests(recipe)
    asked = tests.once("problems", problems.prepare_tests, recipe)
    return asked, tests.once("base", test, asked, recipe.student.model, recipe)


def start_ray(verbose: bool) -> None:
    """Join the cluster RAY_ADDRESS names (a job's environment does), else start one on this machine.

    Raises UserError when no Ray answers at that address, or none that takes this user's token.
    """
    own: Json = {}
    if not (address := os.environ.get("RAY_ADDRESS")):
        # Logical CPUs: with fewer than four, pipelines on a small machine starve beside Train's controller.
        own = {"address": "local", "num_cpus": max(4, os.cpu_count() or 1), "include_dashboard": False}
    level = logging.INFO if verbose else logging.ERROR
    # Else Ray 2.60 warns that hiding GPUs from tasks that ask for none will end; this chooses the coming behaviour now.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address:
        _reach(address)
    inward = _on_loopback() if not address or _inward(address) else nullcontext()
    with nullcontext() if verbose else _held_back(), inward:
        try:
            ray.init(**own, log_to_driver=verbose, logging_level=level)  # in C++ it announces that it was told to be quiet
        except ConnectionError as error:
            why = str(error.__cause__ or error).splitlines()[-1]
            raise UserError(f"RAY_ADDRESS={address}: cannot join this Ray: {why}", exit_code=5) from error
    if own and (token := Path.home() / ".ray" / "auth_token").is_file():
        token.chmod(0o600)  # Ray 2.60 makes it readable for everybody, and it opens every port

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.use_datasource_v2 = False  # Ray 2.60: it costs each stage 5 s more on two cores than the first reader
    # Ray 2.60 ends a pipeline in which no block was finished for half an hour. Nodes that come, weights and long answers take
    # longer, and engines have time-outs of their own (`start_seconds`, `stall_seconds`).
    context.execution_no_progress_timeout_s = -1
    context.execution_options.preserve_order = True  # a stage that is run again makes the same batches
    for name in ("ray.data", "ray.train", "ray.tune"):
        # What fails there raises here as well: else its traceback comes twice, before the one line that matters.
        logging.getLogger(name).setLevel(level if verbose else logging.CRITICAL)


def _reach(address: str) -> None:
    """Raise UserError when nothing listens at HOST:PORT; Ray 2.60 would try for more than ten minutes."""
    if not (there := _host_port(address)):
        return
    try:
        socket.create_connection(there, timeout=10).close()
    except OSError as error:
        why = f"no Ray answers there ({error.strerror or error})"
        remedy = "start the cluster, or unset RAY_ADDRESS to work on this machine alone"
        raise UserError(f"RAY_ADDRESS={address}: {why}; {remedy}", exit_code=5) from error


def _inward(address: str) -> bool:
    """Whether a Ray is on the loopback interface of this machine alone, as one that was started by `start_ray` is."""
    if not (there := _host_port(address)) or there[0] not in ("127.0.0.1", "localhost"):
        return False
    with socket.socket() as outer:
        return outer.connect_ex((ray.util.get_node_ip_address(), there[1])) != 0


def _host_port(address: str) -> tuple[str, int] | None:
    """HOST:PORT taken apart; None of another form, such as `auto` or `ray://…`."""
    host, _, port = address.rpartition(":")
    return (host, int(port)) if port.isdecimal() and "//" not in host else None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started, or joined, here is on 127.0.0.1 alone.

    Ray 2.60 listens on all interfaces unless the node's address is the loopback one, and makes 127.0.0.1 the machine's outer
    address wherever it is asked for by argument; on systems without clusters it takes it by itself. Token authentication is
    Ray's default for such a start and stays on.
    """
    from ray._private import ray_constants

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # of training workers, which would take the host name's address
    plain, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = plain


@contextmanager
def _held_back() -> Iterator[None]:
    """What this process writes to stderr meanwhile, below Python too, is shown only when it fails without a UserError."""
    sys.stderr.flush()
    plain = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            kept.seek(0)
            os.write(plain, kept.read())
            raise
        finally:
            os.dup2(plain, 2)
            os.close(plain)
