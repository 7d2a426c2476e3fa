"""The stages that make text: explain(), attempt() and measure(), and test() at the end.

Each is a Ray Data pipeline: read rows -> an engine pool -> parse and grade on whatever CPUs there are -> Parquet. A row whose
generation failed keeps its place with its reason; a copy goes to quarantine. Figures are counted on the written rows, part by
part, so that the driver never holds rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from undo_ray import engines, gap, grading, models, prompts, tasks
from undo_ray.config import Engine, Recipe, Sampling
from undo_ray.gap import Gap, row_seed, score_json
from undo_ray.place import Place
from undo_ray.problems import test_name
from undo_ray.prompts import Case
from undo_ray.store import Stage
from undo_ray.types import ENGINE_ERROR, FORMAT, ROWS, SELECT, SHOW, TRAIN, TRUNCATED, Message, Row, UserError, Verdict

if TYPE_CHECKING:
    from ray.data import Dataset

GENERATIONS = "generations"
"""The column an engine adds and the judge takes away again."""


# -- the teacher --------------------------------------------------------------------------------------------------------


def explain(rows: Dataset, gap_ref: Any, recipe: Recipe, out: Stage) -> None:
    """The teacher writes a rationale for every training question (in round 0 for the show questions too).

    `gap_ref` refers to Δ(k-1), None in round 0. Fills `candidates`, `lesson` and the newest `history` entry.
    """
    import ray

    if recipe.gap.feedback == "none" or out.round == 0:
        gap_ref = None
    shown = 0
    if gap_ref is not None:
        condition = ray.remote(_conditioned).options(num_returns=2, num_cpus=0.5)
        gap_ref, shown_ref = condition.remote(gap_ref, recipe, out.round)
        shown = ray.get(shown_ref)
    permuted = _permuted(rows, recipe, out.round) if recipe.gap.feedback == "shuffled" and gap_ref is not None else None
    only_show = out.round == 0 and recipe.round0 != "run"  # the others' rationales are given
    asked = {SHOW} if only_show else {TRAIN, SHOW} if out.round == 0 else {TRAIN}
    render = partial(_Explain, gap_ref, permuted, recipe.teacher.template, recipe.gap.feedback, asked)
    judge = partial(_judge_rationales, k=out.round, recipe=recipe, template=recipe.teacher.template if gap_ref else None)
    seeds = partial(_seeds, recipe.seed, "rationale", out.round, recipe.teacher.samples)
    model = partial(models.local, recipe.teacher.model, recipe.seed)
    _generate(rows, recipe.teacher.engine, model, recipe.teacher.sampling, render, seeds, judge, out)
    counts = _count(out, _count_rationales)
    _figures(counts, out, recipe.teacher.engine, "teacher.engine")
    out.note(shown=shown, refused={key[2:]: n for key, n in sorted(counts.items()) if key.startswith("r:")})


def _conditioned(delta: Gap, recipe: Recipe, k: int) -> tuple[Gap, int]:
    """Δ as this round's prompts may show it: after the feedback control, and as many examples as the token budget holds."""
    from transformers import AutoConfig, AutoTokenizer

    cases = gap.shuffled(delta.shown, row_seed(recipe.seed, "shuffle", k)) if recipe.gap.feedback == "shuffled" else delta.shown
    directory, spec = models.local(recipe.teacher.model, recipe.seed), recipe.teacher
    tokenizer = AutoTokenizer.from_pretrained(directory)
    context = spec.engine.context or AutoConfig.from_pretrained(directory).max_position_embeddings
    # Beside the examples there must be room for the question's own history and for the answer.
    own = recipe.gap.history * (spec.sampling.max_tokens + recipe.student.sampling.max_tokens)
    budget = min(spec.prompt_tokens, context - own - spec.sampling.max_tokens)
    template = prompts.TEMPLATES[recipe.teacher.template]
    while cases:
        chat = template.render(cases, Case(""), "")
        if len(tokenizer(chat[0]["content"])["input_ids"]) <= budget:
            break
        cases = cases[:-1]
    return replace(delta, shown=tuple(cases)), len(cases)


class _Explain:
    """Row -> the chat that asks the teacher for a rationale."""

    def __init__(self, gap_ref: Any, permuted_ref: Any, template: str, feedback: str, asked: set[str]):
        import ray

        self.shown: Sequence[Case] = ray.get(gap_ref).shown if gap_ref is not None else ()
        self.permuted: dict[str, list[Row]] = ray.get(permuted_ref) if permuted_ref is not None else {}
        self.template = prompts.TEMPLATES[template] if gap_ref is not None else None
        self.feedback, self.asked = feedback, asked

    def __call__(self, row: Row) -> list[Message] | None:
        if row["split"] not in self.asked:
            return None
        instruction = tasks.get(row["task"]).instruction
        if self.template is None:
            return prompts.solve(prompts.question_text(row), instruction)
        own = prompts.own_case({**row, "history": self.permuted.get(row["id"], row["history"])})
        if self.feedback == "block":
            own = Case(own.question)
        return self.template.render(() if self.feedback == "history" else self.shown, own, instruction)


def _judge_rationales(row: Row, generations: list[Row], k: int, recipe: Recipe, template: str | None) -> tuple[Row, bool]:
    parse = prompts.TEMPLATES[template].parse if template else prompts.parse_solve
    candidates = []
    for generation in generations:
        diagnosis, rationale, verdict = judge(generation, row, parse)
        if rationale is None and recipe.lessons.keep_wrong:
            rationale = (generation["text"] or "").strip() or None
        candidate = {"round": k, **generation, "diagnosis": diagnosis, "rationale": rationale, "verdict": verdict}
        candidates.append({**candidate, "refused": gap.refusal(candidate, row["question"], recipe.lessons.keep_wrong)})
    good = any(candidate["refused"] is None for candidate in candidates)
    return explained(row, candidates, k, recipe.gap.history), good


def judge(
    generation: Row, row: Row, parse: Callable[[str], tuple[str | None, str | None]]
) -> tuple[str | None, str | None, dict[str, Any]]:
    """(diagnosis, the text that counts, verdict as a dict) of one generation for the problem in `row`."""
    if generation["engine_error"] is not None:
        return None, None, _verdict(Verdict(False, None, ENGINE_ERROR))
    if generation["finish_reason"] != "stop":
        return None, None, _verdict(Verdict(False, None, TRUNCATED))
    diagnosis, text = parse(generation["text"])
    if text is None:
        return diagnosis, None, _verdict(Verdict(False, None, FORMAT))
    return diagnosis, text, _verdict(grading.grade(text, row, tasks.get(row["task"]).kind))


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {"correct": verdict.correct, "answer": verdict.answer, "reason": verdict.reason}


def explained(row: Row, candidates: list[Row], k: int, keep: int) -> Row:
    """The row after round k's explanation: the first accepted candidate (else the first) becomes its newest history.

    A row that was not asked passes with its candidates of an earlier round cleared. `keep`: history entries kept.
    """
    if not candidates:
        return {**row, "candidates": []}
    accepted = [candidate for candidate in candidates if candidate["refused"] is None]
    chosen = (accepted or candidates)[0]
    entry = {
        "round": k,
        "rationale": chosen["rationale"],
        "diagnosis": chosen["diagnosis"],
        "rationale_verdict": chosen["verdict"],
        "attempt": None,
        "attempt_verdict": None,
    }
    lesson = {"round": k, "rationale": chosen["rationale"]} if accepted else row["lesson"]
    return {**row, "candidates": candidates, "lesson": lesson, "history": [*(row["history"] or ()), entry][-keep:]}


def _permuted(rows: Dataset, recipe: Recipe, k: int) -> Any:
    """Ref to id -> history with (attempt, verdict) pairs of each round permuted over all training questions.

    A control experiment on a set that fits one task's memory (about 2 kB a question).
    """
    import ray

    def permute(table_refs: list[Any]) -> dict[str, list[Row]]:
        histories: dict[str, list[Row]] = {}
        for table in ray.get(table_refs):
            for row in pa.table(table).select(["id", "split", "history"]).to_pylist():
                if row["split"] == TRAIN:
                    histories[row["id"]] = row["history"]
        return permuted_histories(histories, row_seed(recipe.seed, "shuffle", k))

    return ray.remote(permute).options(num_cpus=0.5).remote(rows.select_columns(["id", "split", "history"]).to_arrow_refs())


def permuted_histories(histories: dict[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Permute what students wrote and scored across questions, round by round, so that every round's totals stay."""
    out = {id: [dict(entry) for entry in history or ()] for id, history in sorted(histories.items())}
    rounds = {entry["round"] for history in out.values() for entry in history}
    for k in sorted(rounds):
        entries = [e for history in out.values() for e in history if e["round"] == k and e["attempt_verdict"] is not None]
        pairs = [(entry["attempt"], entry["attempt_verdict"]) for entry in entries]
        random.Random(row_seed(seed, k)).shuffle(pairs)
        for entry, (attempt, verdict) in zip(entries, pairs, strict=True):
            entry["attempt"], entry["attempt_verdict"] = attempt, verdict
    return out


# -- the student --------------------------------------------------------------------------------------------------------


def attempt(rows: Dataset, student: str, recipe: Recipe, out: Stage) -> None:
    """Student(k-1) attempts every training question, for the teacher of round k to see. Fills `attempt` and `history`."""
    _attempt(rows, student, recipe, out, (TRAIN,), out.round - 1)
    out.note(train=score_json(gap.score(_count(out, partial(_tally, splits=(TRAIN,))), TRAIN)))


def measure(rows: Dataset, student: str, recipe: Recipe, out: Stage) -> None:
    """Student(k) attempts the show and select questions: the stage's value is Δ(k) as JSON (`Gap.from_json`)."""
    kept = rows.map_batches(_validation, batch_format="pyarrow", zero_copy_batch=True)
    _attempt(kept, student, recipe, out, (SHOW, SELECT), out.round)
    counts = _count(out, partial(_tally, splits=(SHOW, SELECT)))
    show = out.written().map_batches(partial(_only, split=SHOW), batch_format="pyarrow").take_all()
    out.value = gap.measured(out.round, show, counts, recipe.data.shared).to_json()


def test(problems: Dataset, student: str, recipe: Recipe, out: Stage) -> None:
    """A model's answers to the test questions: the stage's value is {test name: Score as JSON}."""
    names = tuple(test_name(source) for source in recipe.data.tests)
    _attempt(problems, student, recipe, out, names, out.round)
    counts = _count(out, partial(_tally, splits=names))
    out.value = {name: score_json(gap.score(counts, name)) for name in names}


def _attempt(rows: Dataset, student: str, recipe: Recipe, out: Stage, splits: tuple[str, ...], k: int) -> None:
    spec = recipe.student
    render = partial(_Solve, splits)
    seeds = partial(_seeds, recipe.seed, "attempt", k, 1)
    judge = partial(_judge_attempt, k=k)
    model = partial(models.local, student, recipe.seed)
    _generate(rows, spec.engine, model, spec.sampling, render, seeds, judge, out)
    _figures(_count(out, partial(_count_attempts, splits=splits)), out, spec.engine, "student.engine")


class _Solve:
    """Row -> the plain question, for the splits asked."""

    def __init__(self, splits: tuple[str, ...]):
        self.splits = splits

    def __call__(self, row: Row) -> list[Message] | None:
        if row["split"] not in self.splits:
            return None
        return prompts.solve(prompts.question_text(row), tasks.get(row["task"]).instruction)


def _judge_attempt(row: Row, generations: list[Row], k: int) -> tuple[Row, bool]:
    for generation in generations:
        _, _, verdict = judge(generation, row, prompts.parse_solve)
        row = attempted(row, {"round": k, **generation, "verdict": verdict})
    return row, bool(generations) and row["attempt"]["verdict"]["correct"]


def attempted(row: Row, attempt: Row) -> Row:
    """The row with student(k)'s attempt, entered beside round k's rationale in its history."""
    row = {**row, "attempt": attempt}
    if row["split"] != TRAIN:
        return row
    history = [dict(entry) for entry in row["history"] or ()]
    if not history or history[-1]["round"] != attempt["round"]:
        # Round 0 was given (`round0`), or this question has no rationale in that round.
        empty = dict.fromkeys(("rationale", "diagnosis", "rationale_verdict"))
        history.append({"round": attempt["round"], **empty})
    history[-1].update(attempt=attempt["text"], attempt_verdict=attempt["verdict"])
    return {**row, "history": history}


def _validation(table: pa.Table) -> pa.Table:
    return table.filter(pa.array([split in (SHOW, SELECT) for split in table.column("split").to_pylist()], pa.bool_()))


def _only(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pa.array([found == split for found in table.column("split").to_pylist()], pa.bool_()))


# -- shared -------------------------------------------------------------------------------------------------------------


def _generate(
    rows: Dataset,
    engine: Engine,
    model: Callable[[], str],
    sampling: Sampling,
    render: Callable[[], engines.Render],
    seeds: Callable[[Row], list[int]],
    judge: Callable[[Row, list[Row]], tuple[Row, bool]],
    out: Stage,
) -> None:
    """rows -> blocks of one batch, so that replicas share the work -> engine -> judge -> committed Parquet."""
    out.progress.total(rows.count())
    blocks = rows.repartition(target_num_rows_per_block=engine.batch_size)
    answered = engines.generate(blocks, engine, model, sampling, render, GENERATIONS, seeds)
    well = "accepted" if out.name == "rationales" else "right"
    grade = partial(_judge, judge=judge, board=out.progress.board, well=well)
    out.write(answered.map_batches(grade, batch_format="pyarrow", zero_copy_batch=True))


def _judge(table: pa.Table, judge: Callable[[Row, list[Row]], tuple[Row, bool]], board: Any, well: str) -> pa.Table:
    """Judge a batch row by row (`judge` gives the new row, and whether it came out `well`) and tell the progress board."""
    rows, asked, good, tokens = [], 0, 0, 0
    for row in table.to_pylist():
        generations = row.pop(GENERATIONS)
        row, came_out_well = judge(row, generations)
        rows.append(row)
        asked += bool(generations)
        good += came_out_well
        tokens += sum(generation["completion_tokens"] for generation in generations)
    if board is not None:
        board.add.remote(done=len(rows), asked=asked, tokens=tokens, **{well: good})
    return pa.Table.from_pylist(rows, schema=ROWS)


def _seeds(seed: int, what: str, k: int, samples: int, row: Row) -> list[int]:
    """One seed per sample, from what it is for: independent of batch, replica and order."""
    return [row_seed(seed, what, k, row["id"], sample) for sample in range(samples)]


def _count(out: Stage, count: Callable[[Iterable[Row]], Counter[Any]]) -> Counter[Any]:
    """Add up a count over the files the stage wrote, one small task each."""
    import ray

    part = ray.remote(_count_file).options(num_cpus=0.5)
    total: Counter[Any] = Counter()
    for counts in ray.get([part.remote(out.rows / name, count) for name in out.row_files()]):
        total.update(counts)
    return total


def _count_file(file: Place, count: Callable[[Iterable[Row]], Counter[Any]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for batch in pq.ParquetFile(file.fs.open_input_file(file.path)).iter_batches(batch_size=1024):
        total.update(count(batch.to_pylist()))
    return total


def _tally(rows: Iterable[Row], splits: tuple[str, ...]) -> gap.Tally:
    return gap.tally(row for row in rows if row["split"] in splits)


def _count_rationales(rows: Iterable[Row]) -> Counter[str]:
    """Tokens, outcomes and refusals (`r:reason`) of this round's candidates."""
    counts: Counter[str] = Counter()
    for row in rows:
        for candidate in row["candidates"]:
            _add_generation(counts, candidate)
            if candidate["refused"]:
                counts["r:" + candidate["refused"]] += 1
        if row["candidates"]:
            counts["accepted"] += any(candidate["refused"] is None for candidate in row["candidates"])
    return counts


def _count_attempts(rows: Iterable[Row], splits: tuple[str, ...]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in rows:
        if row["split"] in splits:
            _add_generation(counts, row["attempt"])
            counts["accepted"] += row["attempt"]["verdict"]["correct"]
    return counts


def _add_generation(counts: Counter[str], generation: Row) -> None:
    counts["n"] += 1
    for key in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        counts[key] += generation[key]
    reason = generation["verdict"]["reason"]
    counts["errors"] += reason == ENGINE_ERROR
    counts["unparsed"] += reason is not None


def _figures(counts: Counter[str], out: Stage, engine: Engine, key: str) -> None:
    """Note the stage's token counts; quarantine rows the engine failed on, and fail when they are too many."""
    out.note(
        generations=counts["n"],
        good=counts["accepted"],
        unparsed=counts["unparsed"],
        engine_errors=counts["errors"],
        tokens={name: counts[f"{name}_tokens"] for name in ("prompt", "cached", "completion")},
        gpus=engine.replicas * engine.resources.gpus,
    )
    if not counts["errors"]:
        return
    place = out.quarantine
    place.remove()
    place.fs.create_dir(place.path, recursive=True)
    failed = out.written().map_batches(_failed, batch_format="pyarrow").materialize()
    failed.write_parquet(place.path, filesystem=place.fs)
    if counts["errors"] > engine.max_errors * counts["n"]:
        sample = failed.take(1)[0]
        errors = [generation["engine_error"] for generation in [*sample["candidates"], sample["attempt"]] if generation]
        raise UserError(
            f"{out.name}: the engine failed on {counts['errors']} of {counts['n']} generations (limit {key}.max_errors = "
            f"{engine.max_errors}); the first: {next(filter(None, errors))}; the rows are in {place.uri}",
            exit_code=1,
        )


def _failed(table: pa.Table) -> pa.Table:
    failed = [
        any(g and g["engine_error"] is not None for g in [*(row["candidates"] or ()), row["attempt"]])
        for row in table.to_pylist()
    ]
    return table.filter(pa.array(failed, pa.bool_()))
