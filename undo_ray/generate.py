"""The stages that make text: explain(), attempt() and measure(), and test() at the end.

Each is a Ray Data pipeline: read rows -> an engine pool -> parse and grade on whatever CPUs there are -> Parquet. explain() is
several of them where the teacher may be asked again: each asks about the rows that those before left without an accepted
rationale, in full batches; all others go past the engines. A row whose generation failed stays, with its reason; a copy goes to
quarantine. Figures are counted on the written rows, part by part, so that the driver never holds rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from undo_ray import clean, engines, gap, models, prompts, tasks
from undo_ray.config import Engine, Recipe, Student, Teacher, digest
from undo_ray.engines.journal import busy, finished, interrupted, replicas, share, starts
from undo_ray.gap import Gap, row_seed
from undo_ray.grading.pool import Job, Pool, shared
from undo_ray.place import Place, absolute, plain_rows
from undo_ray.problems import held, test_name
from undo_ray.prompts import Case, Parse
from undo_ray.store import Stage, dataset, split_rows
from undo_ray.types import ENGINE_ERROR, FORMAT, HISTORY, ROWS, SELECT, SHOW, TRAIN, TRUNCATED, Message, Row, UserError, Verdict

if TYPE_CHECKING:
    from ray.data import Dataset

GENERATIONS = "generations"
"""The column an engine adds and the judge takes away again."""

Judged = tuple[str | None, str | None, dict[str, Any]]
"""(diagnosis, the text that counts, verdict as a dict) of one generation."""

ROLES = {"teacher": ("candidates", "accepted"), "student": ("attempt", "right")}
"""Whose text a stage makes: the column it fills, what a good row is called."""

DECIDED_BY = ["split", "answer", "solution", "attempt", "resampled", "candidates"]
"""Columns that say whether a teacher is asked about a row."""


# -- the teacher --------------------------------------------------------------------------------------------------------


def explain(rows: Dataset, gap_ref: Any, recipe: Recipe, out: Stage) -> None:
    """The teacher writes a rationale for the training questions (in round 0 for the show questions too).

    `gap_ref` refers to Δ(k-1), None in round 0. Fills `candidates`, `lesson` and the newest `history` entry of the rows it asks
    about (see `_asked`).
    """
    import numpy as np
    import ray

    k, spec, feedback = out.round, recipe.teacher, recipe.gap.feedback
    _resumed(out, spec.model)
    tokenizer, budget = _reader(recipe)
    cases: tuple[Case, ...] = ()
    shown_ref = permuted_ref = None
    parse: Parse = prompts.parse_solve
    if k and feedback != "none":
        delta = ray.get(gap_ref)
        cases = _shown(delta, recipe, k, tokenizer, budget)
        if len(cases) < len(delta.shown):
            room = f"{budget:,} tokens (the least of teacher.prompt_tokens and what the teacher's context leaves)"
            out.progress.say(f"{len(cases)} of {len(delta.shown)} examples are shown: {room} hold no more")
        shown_ref = ray.put(cases)
        permuted_ref = _permuted(rows, recipe, k) if feedback == "shuffled" else None
        parse = prompts.TEMPLATES[spec.template].parse
    # Of the shown examples the teacher has read every word, answers included.
    read = [text for case in cases for text in (case.question, *(answer for _, answer in case.before), case.student) if text]
    held_ref = ray.put(np.union1d(held(out.ledger), clean.hashes(read))) if recipe.data.clean == "ngram" else None
    asks: Callable[[Row], bool] = partial(_asked, k=k, recipe=recipe)
    waves, total = _waves(recipe), 0
    parts: list[Dataset] = []
    for number, (samples, hint) in enumerate(waves, 1):
        asks = partial(_unsettled, hint=hint) if parts else asks
        count = _where(rows.select_columns(DECIDED_BY), asks, True).count()
        parts.append(_where(rows, asks, False))
        rows = _where(rows, asks, True)
        if not count:
            break
        total += count
        out.progress.total(total)
        seeds = partial(_seeds, recipe.seed, "rationale", k, samples)
        render = partial(_Explain, recipe, shown_ref, permuted_ref, hint)
        judge = partial(_judge_rationales, k=k, recipe=recipe, held_ref=held_ref, hint=hint)
        rows = _answered(rows, recipe, "teacher", spec.model, render, parse, judge, seeds, out)
        if number < len(waves):  # executed before the next begins: one pool of engines at a time, and no row asked in vain
            files = out.write(rows, f"waves/{number}")
            if number == 1:  # all rows asked about: an engine that fails on too many is not asked again
                _counted(files, out, spec.engine, "teacher", spec.model)
            rows = dataset(files)
    close = partial(_closed, k=k, keep=recipe.gap.history, select=recipe.lessons.select)
    files = out.write(rows.union(*parts).map_batches(close, batch_format="pyarrow"))
    (out.place / "waves").remove()
    prefix = _prefix(recipe, _Explain(recipe, shown_ref), tokenizer)
    totals = gap.total(_counted(files, out, spec.engine, "teacher", spec.model, prefix or 0))
    possible = (prefix or 0) * (totals["generations"] - totals["broken"])
    out.note(prefix={"tokens": prefix, "cached": round(totals["prefix_tokens"] / possible, 4) if possible else None})
    if cache := _cache(out, recipe, "teacher"):
        _shared(_journal(out, spec.model), cache, out)
    refused = {what.removeprefix("refused "): n for what, n in sorted(totals.items()) if what.startswith("refused ")}
    hints = [hint for _, hint in waves if hint]
    hinted = {hint: {"asked": totals[f"hinted {hint}"], "accepted": totals[f"accepted {hint}"]} for hint in hints}
    out.note(asked=totals["asked"], hinted=hinted, shown=len(cases), refused=refused)


def _shared(journal: Place, cache: Place, out: Stage) -> None:
    """Put what the stage's engines made into the cache; what they took from there counts as reused, and not as made."""
    reused = share(journal, cache)
    free = {name: sum(generation[f"{name}_tokens"] for generation in reused) for name in out.figures["tokens"]}
    tokens = {name: count - free[name] for name, count in out.figures["tokens"].items()}
    out.note(tokens=tokens, reused={"generations": len(reused), **free})


def _asked(row: Row, k: int, recipe: Recipe) -> bool:
    """Whether round k's teacher is asked about a row. Reads its columns `DECIDED_BY` alone."""
    if k:
        return row["split"] == TRAIN and gap.asks_again(row, recipe.teacher.regenerate, recipe.teacher.unstable_below)
    # Where round 0 is given, so are the rationales of its training questions.
    return row["split"] == SHOW or (row["split"] == TRAIN and recipe.round0 == "run")


def _unsettled(row: Row, hint: str | None) -> bool:
    """Whether a row that was asked about has no accepted rationale of this round yet, and the gold that a hint would show.

    Only training questions are hinted at: those of `show` are no lessons, and stand in every later prompt.
    """
    return not gap.good(row, "candidates") and (hint is None or (row["split"] == TRAIN and bool(row[hint])))


Wave = tuple[Sequence[object], str | None]
"""(samples of a question that are asked for at once, what of its gold is shown: `answer`, `solution` or None)."""


def _waves(recipe: Recipe) -> list[Wave]:
    """What is asked in turn, each wave for the questions that the earlier ones left without an accepted rationale."""
    n, hints = recipe.teacher.samples, recipe.teacher.hints
    plain = [range(n)] if recipe.lessons.select == "shortest" else [range(i, i + 1) for i in range(n)]
    shown = {"off": [], "cascade": ["answer", "solution"]}.get(hints, [hints])
    return [*((samples, None) for samples in plain), *(((hint,), hint) for hint in shown)]


def _where(rows: Dataset, test: Callable[[Row], bool], wanted: bool) -> Dataset:
    """The rows that pass a test of their columns `DECIDED_BY`, or those that do not."""

    def kept(table: pa.Table) -> pa.Table:
        return table.filter(pa.array([test(row) is wanted for row in table.select(DECIDED_BY).to_pylist()], pa.bool_()))

    return rows.map_batches(kept, batch_format="pyarrow", zero_copy_batch=True)


def _shown(delta: Gap, recipe: Recipe, k: int, tokenizer: Any, budget: int) -> tuple[Case, ...]:
    """Δ's examples as this round's prompts show them: after the feedback control, and as many as the budget of tokens holds.

    Without a tokenizer they are counted by bytes, on the high side.
    """
    cases = gap.shuffled(delta.shown, row_seed(recipe.seed, "shuffle", k)) if recipe.gap.feedback == "shuffled" else delta.shown
    render = prompts.TEMPLATES[recipe.teacher.template].render

    def tokens(text: str) -> float:
        return len(tokenizer(text)["input_ids"]) if tokenizer else len(text.encode()) / BYTES_PER_TOKEN

    while cases and tokens(render(cases, Case(""), "")[0]["content"]) > budget:
        cases = cases[:-1]
    return cases


BYTES_PER_TOKEN = 2.5
"""Of a text whose tokenizer is not here. Measured on questions and solutions with a tokenizer of 129,000 words that splits
numbers into digits: GSM8K 3.9 and 2.4, MATH 3.0 and 2.7."""


def _reader(recipe: Recipe) -> tuple[Any, int]:
    """(the teacher's tokenizer, None behind an endpoint; tokens that the examples may take in a prompt).

    Raises UserError where the teacher's context has no room for any: asked in round 0, before anything was spent.
    """
    spec, tokenizer, context = recipe.teacher, None, recipe.teacher.engine.context
    if not spec.engine.remote:
        directory, trust = models.local(spec.model, recipe.seed, weights=False), spec.trust_remote_code
        tokenizer = models.tokenizer(directory, trust)
        context = context or models.context(models.config(directory, trust))
    return tokenizer, recipe.room(context)


def _prefix(recipe: Recipe, render: engines.Render, tokenizer: Any) -> int | None:
    """Tokens with which all prompts of a round begin, up to the question; None behind an endpoint.

    That is what the prompts of two questions share that differ from the first letter on.
    """
    if tokenizer is None:
        return None
    spec = recipe.teacher
    task = tasks.parse_source(recipe.data.train, TRAIN)[0].reference
    rows = [{"id": "", "task": task, "question": text, "choices": None, "history": None} for text in ("A", "7")]
    first, other = (engines.prompt_ids(tokenizer, render(row) or [], **spec.engine.chat_template_kwargs) for row in rows)
    return next((n for n, (one, two) in enumerate(zip(first, other, strict=False)) if one != two), min(len(first), len(other)))


class _Explain:
    """Row -> the chat that asks the teacher for a rationale: against Δ, or plainly where there is none (`shown_ref` None).

    `hint`: the column of the row's gold that the chat shows.
    """

    def __init__(self, recipe: Recipe, shown_ref: Any, permuted_ref: Any = None, hint: str | None = None):
        import ray

        self.plain, self.feedback, self.hint = shown_ref is None, recipe.gap.feedback, hint
        self.shown: Sequence[Case] = () if self.plain or self.feedback == "history" else ray.get(shown_ref)
        self.permuted: dict[str, list[Row]] = ray.get(permuted_ref) if permuted_ref is not None else {}
        self.template, self.tasks = prompts.TEMPLATES[recipe.teacher.template], recipe.data.tasks

    def __call__(self, row: Row) -> list[Message]:
        instruction = tasks.of(row, self.tasks).instruction
        hint = self.template.hint(self.hint, row[self.hint]) if self.hint else None
        if self.plain:
            return prompts.solve(prompts.question_text(row), instruction, hint)
        own = prompts.own_case({**row, "history": self.permuted.get(row["id"], row["history"])})
        own = Case(own.question) if self.feedback == "block" else own
        return self.template.render(self.shown, replace(own, hint=hint), instruction)


def _judge_rationales(
    row: Row,
    generations: list[Row],
    judged: list[Judged],
    k: int,
    recipe: Recipe,
    held_ref: Any = None,
    hint: str | None = None,
) -> Row:
    import ray

    compared = held_ref is not None and generations and not tasks.of(row, recipe.data.tasks).templated
    runs = ray.get(held_ref) if compared else None
    candidates = _of_round(row, k)
    for generation, (diagnosis, rationale, verdict) in zip(generations, judged, strict=True):
        if rationale is None and recipe.lessons.keep_wrong:
            rationale = (generation["text"] or "").strip() or None
        candidate = {"round": k, "hint": hint, **generation, "diagnosis": diagnosis, "rationale": rationale, "verdict": verdict}
        refused = gap.refusal(candidate, row["question"], recipe.lessons.keep_wrong)
        if refused is None and runs is not None and row["split"] == TRAIN:
            refused = "leak" if clean.leaks(rationale or "", prompts.question_text(row), runs) else None
        if refused is None and hint == "solution":
            share = clean.copied(rationale or "", row["solution"], prompts.question_text(row))
            refused = "copy" if share >= clean.COPY else None
        candidates.append({**candidate, "refused": refused})
    return {**row, "candidates": candidates}


def _of_round(row: Row, k: int) -> list[Row]:
    """A row's candidates of round k; those of an earlier round are still there when it begins."""
    return [candidate for candidate in row["candidates"] or () if candidate["round"] == k]


def _closed(table: pa.Table, k: int, keep: int, select: str) -> pa.Table:
    """Every row after round k's last rationale."""
    rows = [explained(row, _of_round(row, k), k, keep, select) for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, schema=ROWS)


def explained(row: Row, candidates: list[Row], k: int, keep: int, select: str = "first") -> Row:
    """The row after round k's explanation: the selected accepted candidate (else the first) becomes its newest history.

    A row that was not asked passes with its candidates of an earlier round cleared: it keeps its lesson. `keep`: history
    entries kept, those of rounds in which it was explained.
    """
    if not candidates:
        return {**row, "candidates": []}
    accepted = gap.selected(candidates, select)
    chosen = accepted or candidates[0]
    teacher = {"rationale": chosen["rationale"], "diagnosis": chosen["diagnosis"], "rationale_verdict": chosen["verdict"]}
    history = [*_told(row), _entry(k, **teacher)][-keep:]
    lesson = {name: chosen[name] for name in ("round", "hint", "rationale")} if accepted else row["lesson"]
    return {**row, "candidates": candidates, "lesson": lesson, "history": history}


def _told(row: Row) -> list[Row]:
    """The history without rounds that only have an attempt: a newer entry takes their place."""
    return [dict(entry) for entry in row["history"] or () if entry["rationale"] is not None]


def _entry(k: int, **known: Any) -> Row:
    """Round k in a question's history; what is not known yet is None."""
    return {**dict.fromkeys(field.name for field in HISTORY), "round": k, **known}


def _permuted(rows: Dataset, recipe: Recipe, k: int) -> Any:
    """Ref to id -> history with (attempt, verdict) pairs of each round permuted over all training questions.

    A control experiment on a set that fits one task's memory (about 2 kB a question).
    """
    import ray

    def permute(table_refs: list[Any]) -> dict[str, list[Row]]:
        found = [row for table in ray.get(table_refs) for row in table.to_pylist() if row["split"] == TRAIN]
        return permuted_histories({row["id"]: row["history"] for row in found}, row_seed(recipe.seed, "shuffle", k))

    return ray.remote(permute).options(num_cpus=0.5).remote(rows.select_columns(["id", "split", "history"]).to_arrow_refs())


def permuted_histories(histories: dict[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Permute what students wrote and scored across questions, round by round, so that every round's totals stay."""
    out = {id: [dict(entry) for entry in history or ()] for id, history in sorted(histories.items())}
    attempted = [entry for history in out.values() for entry in history if entry["attempt_verdict"] is not None]
    for k in sorted({entry["round"] for entry in attempted}):
        entries = [entry for entry in attempted if entry["round"] == k]
        pairs = [(entry["attempt"], entry["attempt_verdict"]) for entry in entries]
        random.Random(row_seed(seed, k)).shuffle(pairs)
        for entry, (attempt, verdict) in zip(entries, pairs, strict=True):
            entry.update(attempt=attempt, attempt_verdict=verdict)
    return out


# -- the student --------------------------------------------------------------------------------------------------------


def attempt(rows: Dataset, student: str, recipe: Recipe, out: Stage) -> None:
    """Student(k-1) attempts every training question, for the teacher of round k to see.

    Fills `attempt`, `history` and, with `student.samples` above 1, `resampled`.
    """
    counts = answer(rows, student, recipe, (TRAIN,), out.round - 1, out, recipe.student.samples)
    out.note(train=asdict(gap.score(counts, TRAIN)))


def measure(rows: Dataset, student: str, recipe: Recipe, out: Stage) -> None:
    """Student(k) attempts the show and select questions: the stage's value is Δ(k) as JSON (`Gap.from_json`)."""
    from ray.data.expressions import col

    kept = rows.filter(expr=col("split").is_in([SHOW, SELECT]))
    counts = answer(kept, student, recipe, (SHOW, SELECT), out.round, out)
    out.value = gap.measured(out.round, split_rows(out.files(), SHOW), counts, recipe.data.shared).to_json()


def test(problems: Dataset, student: str, recipe: Recipe, out: Stage) -> None:
    """A model's answers to the test questions: the stage's value is {test name: Score as JSON}."""
    names = [test_name(source) for source in recipe.data.tests]
    counts = answer(problems, student, recipe, names, out.round, out)
    out.value = {name: asdict(gap.score(counts, name)) for name in names}


def answer(
    rows: Dataset, student: str, recipe: Recipe, splits: Collection[str], k: int, out: Stage, samples: int = 1
) -> gap.Tally:
    """Student(k)'s answers to the questions of these splits, and their tally; training questions enter them in `history`."""
    seeds, judge = partial(_seeds, recipe.seed, "attempt", k, range(samples)), partial(_judge_attempt, k=k)
    _resumed(out, student)
    out.progress.total(rows.count())
    render = partial(_solver, splits, recipe.data.tasks)
    files = out.write(_answered(rows, recipe, "student", student, render, prompts.parse_solve, judge, seeds, out))
    return _counted(files, out, recipe.student.engine, "student", student)


def _solver(splits: Collection[str], named: Collection[str]) -> engines.Render:
    """Row -> the plain question, for the splits asked. `named`: the recipe's tasks."""

    def solve(row: Row) -> list[Message] | None:
        if row["split"] not in splits:
            return None
        return prompts.solve(prompts.question_text(row), tasks.of(row, named).instruction)

    return solve


def _judge_attempt(row: Row, generations: list[Row], judged: list[Judged], k: int) -> Row:
    attempts = [{"round": k, **given, "verdict": verdict} for given, (_, _, verdict) in zip(generations, judged, strict=True)]
    return attempted(row, attempts) if attempts else row


def attempted(row: Row, attempts: Sequence[Row]) -> Row:
    """The row with student(k)'s attempts, the first of which counts; one is entered in its history, beside round k's rationale.

    That is the first one that is not right, if any: what a question is explained again for is what its teacher must see.
    """
    row = {**row, "attempt": attempts[0], "resampled": list(attempts[1:])}
    if row["split"] != TRAIN:
        return row
    shown = next((attempt for attempt in attempts if not attempt["verdict"]["correct"]), attempts[0])
    history = [dict(entry) for entry in row["history"] or ()]
    if not history or history[-1]["round"] != shown["round"]:
        # Round 0 was given (`round0`), or the teacher was not asked about this question in that round.
        history = [*_told(row), _entry(shown["round"])]
    history[-1].update(attempt=shown["text"], attempt_verdict=shown["verdict"])
    return {**row, "history": history}


# -- shared -------------------------------------------------------------------------------------------------------------


def _journal(out: Stage, model: str) -> Place:
    """Where the engines of a stage keep what they finish: a folder for each model, since a student that was damaged is trained
    again, and may then answer otherwise."""
    return out.resume / "generations" / digest(model)


def _cache(out: Stage, recipe: Recipe, role: str) -> Place | None:
    """Where generations of the teacher are shared between runs: a folder for each that answers alike."""
    spec = recipe.teacher
    if role != "teacher" or spec.cache is False:
        return None
    folder = out.ledger.place.beside(".generations") if spec.cache is True else absolute(str(spec.cache))
    alike = ("teacher.sampling.", "teacher.engine.", "weights of teacher.model")
    known = {key: value for key, value in out.ledger.identity.items() if key.startswith(alike)}
    return folder / digest([known, [spec.model, spec.engine.endpoint.base_url] if spec.engine.remote else None])


def _resumed(out: Stage, model: str) -> None:
    """Note and say what an earlier start of this stage left in the journal, once what cannot be read there is set aside."""
    journal = _journal(out, model)
    known = finished(journal, lambda file: out.ledger.set_aside(file, f"{file.uri}: not a whole Parquet file"))
    begun = interrupted(journal)
    out.note(resumed=known, interrupted={"driver": begun})
    if known:
        out.progress.say(f"{known} generations of an earlier start are used as they are; {begun} were in flight and are lost")


def _answered(
    rows: Dataset,
    recipe: Recipe,
    role: str,
    model: str,
    render: Callable[[], engines.Render],
    parse: Parse,
    judge: Callable[[Row, list[Row], list[Judged]], Row],
    seeds: Callable[[Row], list[int]],
    out: Stage,
) -> Dataset:
    """rows -> blocks of one batch, so that replicas share the work -> engine -> judge -> rows; executed when written."""
    spec: Teacher | Student = getattr(recipe, role)
    column, well = ROLES[role]
    blocks = rows.repartition(target_num_rows_per_block=spec.engine.batch_size)
    local = partial(str, model) if spec.engine.remote else partial(models.local, model, recipe.seed)
    cache, trust = _cache(out, recipe, role), spec.trust_remote_code
    work = engines.Work(role, spec.engine, local, spec.sampling, render, GENERATIONS, seeds, _journal(out, model), cache, trust)
    answered = engines.generate(blocks, work, out.ledger.engines)
    grade = partial(_judge, parse=parse, judge=judge, column=column, well=well, recipe=recipe, board=out.progress.board)
    return answered.map_batches(grade, batch_format="pyarrow", zero_copy_batch=True)


def _seeds(seed: int, draw: str, k: int, samples: Iterable[object], row: Row) -> list[int]:
    """One seed per sample, from what it is for: independent of batch, replica and order."""
    return [row_seed(seed, draw, k, row["id"], sample) for sample in samples]


def judged(generations: Sequence[tuple[Row, Row]], parse: Parse, pool: Pool, named: Collection[str]) -> list[Judged]:
    """What each generation is worth, given as (problem row, generation). `named`: the recipe's tasks."""
    found: list[tuple[str | None, str | None, Verdict | None]] = []
    jobs: list[Job] = []
    for row, generation in generations:
        if generation["engine_error"] is not None:
            found.append((None, None, Verdict(False, None, ENGINE_ERROR)))
        elif generation["finish_reason"] != "stop":
            found.append((None, None, Verdict(False, None, TRUNCATED)))
        else:
            diagnosis, text = parse(generation["text"])
            found.append((diagnosis, text, Verdict(False, None, FORMAT) if text is None else None))
            jobs += [(text, row, tasks.of(row, named).kind)] if text is not None else []
    verdicts = iter(pool.grade(jobs))
    return [(diagnosis, text, asdict(verdict or next(verdicts))) for diagnosis, text, verdict in found]


def _judge(
    table: pa.Table,
    parse: Parse,
    judge: Callable[[Row, list[Row], list[Judged]], Row],
    column: str,
    well: str,
    recipe: Recipe,
    board: Any,
) -> pa.Table:
    """Grade a batch, have each row take its verdicts, and tell the progress board how many came out `well`."""
    asked = [(row, row.pop(GENERATIONS)) for row in table.to_pylist()]
    pairs = [(row, generation) for row, generations in asked for generation in generations]
    pool = shared(recipe.grading.deadline, recipe.grading.memory)
    verdicts = iter(judged(pairs, parse, pool, recipe.data.tasks))
    rows, seen = [], Counter({well: 0})
    for row, generations in asked:
        rows.append(judge(row, generations, list(islice(verdicts, len(generations)))))
        seen.update(done=1, asked=bool(generations), tokens=sum(generation["completion_tokens"] for generation in generations))
        seen.update(errors=any(generation["engine_error"] is not None for generation in generations))
        seen[well] += bool(generations) and gap.good(rows[-1], column)
    if board is not None:
        board.add.remote(**seen)
    return pa.Table.from_pylist(rows, schema=ROWS)


def _counted(files: list[Place], out: Stage, engine: Engine, role: str, model: str, prefix: int = 0) -> gap.Tally:
    """The tally of what a stage wrote, its figures noted. `prefix`: see `gap.tally`."""
    import ray

    count = ray.remote(_count).options(num_cpus=0.5)
    counts = sum(ray.get([count.remote(file, ROLES[role][0], prefix) for file in files]), gap.Tally())
    _figures(gap.total(counts), files, out, engine, role, _journal(out, model))
    return counts


def _count(file: Place, column: str, prefix: int) -> gap.Tally:
    """The tally of one file of a stage."""
    columns = ["split", "subject", column, "resampled"]
    batches = pq.ParquetFile(file.path, filesystem=file.fs).iter_batches(1024, columns=columns)
    return sum((gap.tally(plain_rows(batch, file.uri), column, prefix) for batch in batches), gap.Tally())


def _figures(totals: Counter[str], files: list[Place], out: Stage, engine: Engine, role: str, journal: Place) -> None:
    """Note the stage's token counts; quarantine rows the engine failed on, and fail when they are too many."""
    failures, failed = totals["broken"], totals["failed"]
    out.note(generations=totals["generations"], good=totals["good"], unparsed=totals["unparsed"], engine_errors=failures)
    tokens = {name: totals[f"{name}_tokens"] for name in ("prompt", "cached", "completion")}
    begun, at_work = starts(journal), busy(journal)
    # A pool may not have grown to all, and a replica that went may have been followed by another.
    out.note(tokens=tokens, gpus=min(engine.replicas, replicas(begun)) * engine.resources.gpus)
    out.note(engine_start_seconds=round(max((start["seconds"] for start in begun), default=0.0), 3))
    out.note(engine_seconds=round(at_work, 3))
    lost = sum(start["interrupted"] for start in begun)
    out.note(interrupted={**out.figures.get("interrupted", {"driver": 0}), "engines": lost})
    place = out.quarantine
    place.remove()  # an earlier start's, too: what failed then may have succeeded now
    if not failures:
        return
    column = ROLES[role][0]
    copies = dataset(files).map_batches(partial(_failed, column=column), batch_format="pyarrow").materialize()
    copies.write_parquet(place.made().path, filesystem=place.fs)
    if failed > engine.max_errors * totals["asked"]:
        raise UserError(
            f"{out.name}: the engine failed on {failed} of {totals['asked']} rows (limit {role}.engine.max_errors = "
            f"{engine.max_errors}); the first: {_errors(copies.take(1)[0], column)[0]}; the rows are in {place.uri}",
            exit_code=1,
        )


def _errors(row: Row, column: str) -> list[str]:
    return [generation["engine_error"] for generation in gap.made(row, column) if generation["engine_error"] is not None]


def _failed(table: pa.Table, column: str) -> pa.Table:
    return table.filter(pa.array([bool(_errors(row, column)) for row in table.to_pylist()], pa.bool_()))
