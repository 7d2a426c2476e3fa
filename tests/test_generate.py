"""What a text becomes in its row: judged, entered in the history, counted. Pure functions, but for the copies in quarantine."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from undo_ray import clean, config, gap, generate, prompts
from undo_ray.config import Engine, Recipe
from undo_ray.grading.pool import shared
from undo_ray.lessons import _to_lessons
from undo_ray.progress import Progress
from undo_ray.store import Stage, open_run
from undo_ray.types import ROWS, UserError

ROOT = Path(__file__).parent.parent
QUESTION = {
    "id": "gsm8k/train/1",
    "task": "gsm8k",
    "split": "train",
    "question": "A pen costs $2. What do 3 pens cost?",
    "answer": "6",
    "choices": None,
    "subject": None,
    "level": None,
    "solution": None,
    "answer_type": None,
}
ROW: dict[str, Any] = {**QUESTION, "history": [], "candidates": [], "attempt": None, "resampled": [], "lesson": None}


def generation(text: str | None, finish: str | None = "stop", error: str | None = None) -> dict[str, Any]:
    return {
        "text": text,
        "finish_reason": finish,
        "prompt_tokens": 7,
        "cached_tokens": 3,
        "completion_tokens": 5,
        "engine_error": error,
    }


def verdict(correct: bool, answer: str | None = None, reason: str | None = None) -> dict[str, Any]:
    return {"correct": correct, "answer": answer, "reason": reason}


# -- asked --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", sorted(prompts.TEMPLATES))
@pytest.mark.parametrize(
    ("feedback", "examples", "own"), [("real", True, True), ("block", True, False), ("history", False, True)]
)
def test_each_half_of_the_feedback_stands_alone(cluster: None, template: str, feedback: str, examples: bool, own: bool) -> None:
    import ray

    case = prompts.Case("How far?", ((0, "Far, 12."),), "12", "Near, 3.", "3", False)
    entry = {"round": 0, "rationale": "3 x 2 = 6", "rationale_verdict": verdict(True, "6"), "diagnosis": None}
    row = {**ROW, "history": [{**entry, "attempt": "Maybe 5.", "attempt_verdict": verdict(False, "5")}]}
    sets = [f"teacher.template={template}", f"gap.feedback={feedback}"]
    [message] = generate._Explain(config.load(ROOT / "jobs/recipes/gsm8k.toml", sets), ray.put((case,)))(row)
    assert QUESTION["question"] in message["content"]
    assert ("How far?" in message["content"]) is examples
    assert ("3 x 2 = 6" in message["content"]) is own


# -- judged -------------------------------------------------------------------------------------------------------------


def judge(given: dict[str, Any], parse: Any) -> Any:
    [found] = generate.judged([(ROW, given)], parse, shared(5.0, 1.0), {"gsm8k"})
    return found


def test_verdicts_stay_with_their_generations() -> None:
    texts = ["#### 6", None, "#### 5", "<think>", "#### 7", "#### 6"]
    given = [(ROW, generation(text, "stop", None if text else "broken")) for text in texts]
    found = generate.judged(given, prompts.parse_solve, shared(5.0, 1.0), {"gsm8k"})
    assert [(verdict["answer"], verdict["reason"]) for _, _, verdict in found] == [
        ("6", None),
        (None, "engine_error"),
        ("5", None),
        (None, "format"),
        ("7", None),
        ("6", None),
    ]


@pytest.mark.parametrize(
    "given, diagnosis, text, expected",
    [
        (generation("3 x 2 = 6\n#### 6"), None, "3 x 2 = 6\n#### 6", verdict(True, "6")),
        (generation("#### $6.00"), None, "#### $6.00", verdict(True, "6.00")),
        (generation("3 + 2 = 5\n#### 5"), None, "3 + 2 = 5\n#### 5", verdict(False, "5")),
        (generation("<think>6?</think>\n#### 5"), "6?", "#### 5", verdict(False, "5")),
        (generation("no idea"), None, "no idea", verdict(False, None, "no_answer")),
        (generation(""), None, None, verdict(False, None, "format")),
        (generation("<think>6</think>"), "6", None, verdict(False, None, "format")),
        (generation("3 x 2 = 6\n#### 6", "length"), None, None, verdict(False, None, "truncated")),
        (generation(None, None, "out of memory"), None, None, verdict(False, None, "engine_error")),
        (generation("#### 6", "stop", "late failure"), None, None, verdict(False, None, "engine_error")),
    ],
)
def test_a_generation_is_judged_by_its_rows_own_task(given: Any, diagnosis: Any, text: Any, expected: Any) -> None:
    assert judge(given, prompts.parse_solve) == (diagnosis, text, expected)


def test_an_answer_in_the_diagnosis_is_not_graded() -> None:
    given = generation("The right answer is #### 6\n### new_answer\n3 + 2 = 5\n#### 5")
    assert judge(given, prompts.parse_new_answer) == ("The right answer is #### 6", "3 + 2 = 5\n#### 5", verdict(False, "5"))


def test_without_its_heading_a_new_answer_is_kept_as_diagnosis_and_not_graded() -> None:
    given = generation("3 x 2 = 6\n#### 6")
    assert judge(given, prompts.parse_new_answer) == ("3 x 2 = 6\n#### 6", None, verdict(False, None, "format"))


# -- explained ----------------------------------------------------------------------------------------------------------


def candidate(name: str, refused: str | None, round: int = 1) -> dict[str, Any]:
    return {
        **generation(name),
        "round": round,
        "hint": None,
        "diagnosis": f"diagnosis {name}",
        "rationale": f"rationale {name}",
        "verdict": verdict(refused is None, "6"),
        "refused": refused,
    }


def past(round: int) -> dict[str, Any]:
    return {
        "round": round,
        "rationale": f"rationale of {round}",
        "diagnosis": None,
        "rationale_verdict": verdict(True, "6"),
        "attempt": f"attempt of {round}",
        "attempt_verdict": verdict(False, "5"),
    }


def test_the_first_accepted_candidate_becomes_lesson_and_history() -> None:
    row = generate.explained(ROW, [candidate("a", "wrong"), candidate("b", None), candidate("c", None)], 1, keep=2)
    assert row["lesson"] == {"round": 1, "hint": None, "rationale": "rationale b"}
    assert row["history"] == [
        {
            "round": 1,
            "rationale": "rationale b",
            "diagnosis": "diagnosis b",
            "rationale_verdict": verdict(True, "6"),
            "attempt": None,
            "attempt_verdict": None,
        }
    ]
    assert [found["rationale"] for found in row["candidates"]] == ["rationale a", "rationale b", "rationale c"]


def test_the_shortest_accepted_candidate_becomes_the_lesson_where_the_recipe_says_so() -> None:
    texts = {"long": "a long one", "short": "short", "same": "SHORT", "wrong": "no"}
    found = [{**candidate(name, "wrong" if name == "wrong" else None), "rationale": text} for name, text in texts.items()]
    row = generate.explained(ROW, found, 1, keep=2, select="shortest")
    assert row["lesson"]["rationale"] == row["history"][-1]["rationale"] == "short"
    assert generate.explained(ROW, found, 1, keep=2)["lesson"]["rationale"] == "a long one"
    assert generate.explained(ROW, found[3:], 1, keep=2, select="shortest")["lesson"] is None


def test_samples_are_asked_for_one_after_another_unless_they_have_to_be_compared() -> None:
    def waves(*more: str) -> list[tuple[list[object], str | None]]:
        sets = ["teacher.samples=3", "teacher.sampling.temperature=0.7", *more]
        return [(list(asked), hint) for asked, hint in generate._waves(config.load(ROOT / "jobs/recipes/gsm8k.toml", sets))]

    assert waves() == [([0], None), ([1], None), ([2], None)]
    assert waves("lessons.select=shortest") == [([0, 1, 2], None)]
    assert waves("teacher.samples=1") == [([0], None)]
    assert waves("teacher.samples=1", "teacher.hints=answer") == [([0], None), (["answer"], "answer")]
    assert waves("lessons.select=shortest", "teacher.hints=cascade") == [
        ([0, 1, 2], None),
        (["answer"], "answer"),
        (["solution"], "solution"),
    ]


def test_without_an_accepted_candidate_the_first_is_remembered_and_the_old_lesson_stays() -> None:
    lesson = {"round": 0, "rationale": "old"}
    row = generate.explained({**ROW, "lesson": lesson}, [candidate("a", "wrong"), candidate("b", "frame")], 1, keep=2)
    assert row["history"][-1]["rationale"] == "rationale a"
    assert row["lesson"] == lesson


def test_the_history_keeps_its_newest_entries_oldest_first() -> None:
    row = generate.explained({**ROW, "history": [past(0), past(1)]}, [candidate("a", None, 2)], 2, keep=2)
    assert [entry["round"] for entry in row["history"]] == [1, 2]


def test_a_lesson_may_quote_its_own_question_and_no_held_one(cluster: None) -> None:
    import ray

    foreign = "nine ships leave the old harbour every day at noon"
    held_ref = ray.put(clean.hashes([foreign, ROW["question"]]))
    recipe = config.load(ROOT / "jobs/recipes/gsm8k.toml")
    texts = [f"As {foreign}, it is 6.", f"{ROW['question']} It is 6.", "nine ships leave the old harbour. 6"]
    generations = [generation(text) for text in texts]
    judged = [(None, text, verdict(True, "6")) for text in texts]
    row = generate._judge_rationales(ROW, generations, judged, 0, recipe, held_ref)
    assert [found["refused"] for found in row["candidates"]] == ["leak", None, None]
    assert generate.explained(row, row["candidates"], 0, keep=2)["lesson"]["rationale"] == texts[1]


def test_a_copy_of_the_solution_is_refused_where_it_was_shown(cluster: None) -> None:
    solution = "Each pen costs 2 dollars and there are 3 pens, so we multiply 2 by 3 and get 6 dollars in all."
    other = "To buy three pens at two dollars each we add two dollars three times over, which makes 6."
    recipe = config.load(ROOT / "jobs/recipes/gsm8k.toml")
    row = {**ROW, "solution": solution}
    texts = [solution, f"{solution[:-1]}, that is 6.", other, "By the reference solution it is 6."]
    judged = [(None, text, verdict(True, "6")) for text in texts]
    refused = {}
    for hint in ("solution", "answer", None):
        found = generate._judge_rationales(row, [generation(text) for text in texts], judged, 0, recipe, hint=hint)
        assert {candidate["hint"] for candidate in found["candidates"]} == {hint}
        refused[hint] = [candidate["refused"] for candidate in found["candidates"]]
    assert refused == {
        "solution": ["copy", "copy", None, "hint"],
        "answer": [None, None, None, "hint"],
        None: [None, None, None, None],
    }


def test_candidates_of_this_round_are_added_to_and_those_of_an_earlier_one_go() -> None:
    recipe = config.load(ROOT / "jobs/recipes/gsm8k.toml")
    row = {**ROW, "candidates": [candidate("old", None, 0), candidate("first", "wrong", 1)]}
    found = generate._judge_rationales(row, [generation("#### 6")], [(None, "#### 6", verdict(True, "6"))], 1, recipe)
    assert [given["text"] for given in found["candidates"]] == ["first", "#### 6"]


def test_a_hinted_rationale_makes_a_marked_lesson_and_is_counted() -> None:
    hinted = [{**candidate("a", "wrong"), "hint": "answer"}, {**candidate("b", None), "hint": "solution"}]
    row = generate.explained(ROW, [candidate("plain", "wrong"), *hinted], 1, keep=2)
    assert row["lesson"] == {"round": 1, "hint": "solution", "rationale": "rationale b"}
    [lesson] = lessons([row], 1, "replace")
    assert lesson["hint"] == "solution"
    totals = gap.total(gap.tally([row], "candidates"))
    assert [totals[f"{what} {hint}"] for hint in ("answer", "solution") for what in ("hinted", "accepted")] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    "split, hint, open", [("train", "answer", True), ("train", "solution", False), ("show", "answer", False)]
)
def test_hints_are_for_training_questions_that_have_them(split: str, hint: str, open: bool) -> None:
    row = {**ROW, "split": split, "candidates": [candidate("a", "wrong")]}
    assert generate._unsettled(row, hint) is open
    assert generate._unsettled(row, None) is True
    assert generate._unsettled({**row, "candidates": [candidate("b", None)]}, None) is False


def test_a_row_that_was_not_asked_loses_its_old_candidates_alone() -> None:
    before = {**ROW, "split": "select", "history": [past(0)], "candidates": [candidate("a", None, 0)]}
    assert generate.explained(before, [], 1, keep=1) == {**before, "candidates": []}


def test_a_row_without_history_column_values_begins_one() -> None:
    row = generate.explained({**ROW, "history": None}, [candidate("a", None, 0)], 0, keep=2)
    assert [entry["round"] for entry in row["history"]] == [0]


# -- attempted ----------------------------------------------------------------------------------------------------------


def answer(round: int, text: str | None = "#### 5") -> dict[str, Any]:
    return {"round": round, **generation(text), "verdict": verdict(False, "5")}


def test_an_attempt_is_entered_beside_the_rationale_of_its_round() -> None:
    waiting = {**past(1), "attempt": None, "attempt_verdict": None}
    row = generate.attempted({**ROW, "history": [past(0), waiting]}, [answer(1)])
    assert row["history"] == [past(0), {**waiting, "attempt": "#### 5", "attempt_verdict": verdict(False, "5")}]
    assert row["attempt"] == answer(1)


@pytest.mark.parametrize("history", [None, [], [past(0)]])
def test_an_attempt_of_a_round_without_rationale_gets_an_entry_of_its_own(history: Any) -> None:
    row = generate.attempted({**ROW, "history": history}, [answer(1)])
    assert [entry["round"] for entry in row["history"]] == [*(entry["round"] for entry in history or ()), 1]
    assert row["history"][-1] == {
        "round": 1,
        "rationale": None,
        "diagnosis": None,
        "rationale_verdict": None,
        "attempt": "#### 5",
        "attempt_verdict": verdict(False, "5"),
    }


def test_of_several_attempts_the_first_counts_and_the_first_wrong_one_is_what_the_teacher_sees() -> None:
    right, wrong = (
        {**answer(1, text), "verdict": verdict(good, text[-1])} for good, text in ((True, "#### 6"), (False, "#### 5"))
    )
    row = generate.attempted({**ROW, "history": [past(1)]}, [right, wrong, right])
    assert (row["attempt"], row["resampled"]) == (right, [wrong, right])
    assert (row["history"][-1]["attempt"], row["history"][-1]["attempt_verdict"]["correct"]) == ("#### 5", False)
    assert generate.attempted(row, [right, right])["history"][-1]["attempt"] == "#### 6"


def test_a_question_left_alone_for_rounds_keeps_its_explained_rounds_and_the_newest_attempt() -> None:
    row = {**ROW, "history": [past(0), past(1)], "lesson": {"round": 1, "rationale": "kept"}}
    for k in (2, 3, 4):
        row = generate.attempted(generate.explained(row, [], k, keep=2), [answer(k)])
    assert [entry["round"] for entry in row["history"]] == [0, 1, 4] and row["lesson"] == {"round": 1, "rationale": "kept"}
    case = prompts.own_case(row)
    assert [round for round, _ in case.before] == [0, 1] and case.student == "#### 5"
    row = generate.explained(row, [candidate("a", None, 5)], 5, keep=2)
    assert [entry["round"] for entry in row["history"]] == [1, 5]


@pytest.mark.parametrize("split", ["show", "select", "gsm8k"])
def test_only_training_questions_have_their_attempts_in_a_history(split: str) -> None:
    before = {**ROW, "split": split, "history": [past(0)]}
    assert generate.attempted(before, [answer(1)]) == {**before, "attempt": answer(1)}


def test_no_row_is_changed_in_place() -> None:
    row = {**ROW, "history": [past(0), {**past(1), "attempt": None, "attempt_verdict": None}]}
    before = copy.deepcopy(row)
    generate.attempted(row, [answer(1)])
    generate.explained(row, [candidate("a", None, 2)], 2, keep=1)
    assert row == before


def test_what_the_stages_make_of_a_row_fits_the_schema_of_rows() -> None:
    row = generate.explained(ROW, [candidate("a", None, 0), candidate("b", "wrong", 0)], 0, keep=2)
    row = generate.attempted(row, [answer(0)])
    row = generate.explained(row, [candidate("c", "truncated", 1)], 1, keep=2)
    assert pa.Table.from_pylist([row], schema=ROWS).to_pylist() == [row]


# -- the shuffled control -----------------------------------------------------------------------------------------------


def histories() -> dict[str, list[dict[str, Any]]]:
    """40 questions with rounds 0 and 1; some not explained in round 1, some not attempted yet."""
    out: dict[str, list[dict[str, Any]]] = {}
    for i in range(40):
        first = {**past(0), "attempt": f"{i} in 0", "attempt_verdict": verdict(i % 3 == 0, str(i))}
        second = {**past(1), "attempt": f"{i} in 1", "attempt_verdict": verdict(i % 2 == 0, str(i))}
        if i % 8 == 7:
            second |= {"attempt": None, "attempt_verdict": None}
        out[f"q{i}"] = [first] if i % 5 == 4 else [first, second]
    return out


def of_round(found: dict[str, list[dict[str, Any]]], k: int) -> list[Any]:
    entries = [entry for history in found.values() for entry in history if entry["round"] == k]
    return sorted((entry["attempt"] or "", str(entry["attempt_verdict"])) for entry in entries)


@pytest.mark.parametrize("k", [0, 1])
def test_permuting_keeps_the_totals_of_every_round(k: int) -> None:
    assert of_round(generate.permuted_histories(histories(), 1), k) == of_round(histories(), k)


def test_permuting_moves_attempts_with_their_verdicts_and_leaves_the_teachers_part() -> None:
    before, after = histories(), generate.permuted_histories(histories(), 1)
    moved = 0
    for id, history in before.items():
        for old, new in zip(history, after[id], strict=True):
            teacher = ("round", "rationale", "diagnosis", "rationale_verdict")
            assert [old[key] for key in teacher] == [new[key] for key in teacher]
            if old["attempt_verdict"] is None:
                assert new["attempt"] is None and new["attempt_verdict"] is None
            else:
                assert new["attempt"].split(" in ")[0] == new["attempt_verdict"]["answer"]
                moved += old["attempt"] != new["attempt"]
    assert moved > 50  # of 67


def test_permuting_depends_on_the_seed_and_not_on_the_order_of_the_rows() -> None:
    backwards = dict(reversed(histories().items()))
    assert generate.permuted_histories(backwards, 1) == generate.permuted_histories(histories(), 1)
    assert generate.permuted_histories(histories(), 2) != generate.permuted_histories(histories(), 1)


def test_permuting_leaves_what_it_was_given_alone() -> None:
    given = histories()
    generate.permuted_histories(given, 1)
    assert given == histories()
    assert generate.permuted_histories({"a": None}, 1) == {"a": []}  # type: ignore[dict-item]


# -- lessons ------------------------------------------------------------------------------------------------------------


def lessons(rows: list[dict[str, Any]], k: int, mode: str) -> list[dict[str, Any]]:
    recipe = config.load(ROOT / "jobs/recipes/gsm8k.toml", [f"lessons.mode={mode}"])
    made: list[dict[str, Any]] = _to_lessons(pa.Table.from_pylist(rows, schema=ROWS), k, recipe).to_pylist()
    return made


def test_a_lesson_is_the_plain_question_and_the_rationale() -> None:
    [lesson] = lessons([{**ROW, "lesson": {"round": 1, "rationale": "3 x 2 = 6\n#### 6"}}], 1, "replace")
    assert lesson == {
        "id": "gsm8k/train/1",
        "round": 1,
        "hint": None,
        "messages": [
            {
                "role": "user",
                "content": "A pen costs $2. What do 3 pens cost?\n\nReason step by step, then give the final answer as a "
                "number on a last line of its own: #### <number>",
            },
            {"role": "assistant", "content": "3 x 2 = 6\n#### 6"},
        ],
    }


@pytest.mark.parametrize("mode, expected", [("replace", ["b"]), ("accumulate", ["b"]), ("latest", ["a", "b"])])
def test_the_mode_says_which_questions_bring_a_lesson(mode: str, expected: list[str]) -> None:
    rows = [
        {**ROW, "id": "a", "lesson": {"round": 0, "rationale": "old"}},
        {**ROW, "id": "b", "lesson": {"round": 1, "rationale": "new"}},
        {**ROW, "id": "c"},
        {**ROW, "id": "d", "split": "show", "lesson": {"round": 1, "rationale": "never taught"}},
        {**ROW, "id": "e", "split": "select", "lesson": {"round": 1, "rationale": "never taught"}},
    ]
    assert [lesson["id"] for lesson in lessons(rows, 1, mode)] == expected


# -- counting -----------------------------------------------------------------------------------------------------------


def test_rationales_are_counted_with_their_refusals() -> None:
    broken = {**candidate("d", "engine_error"), "verdict": verdict(False, None, "engine_error")}
    rows = [
        {**ROW, "candidates": [candidate("a", "wrong"), candidate("b", None)]},
        {**ROW, "candidates": [candidate("c", "frame"), broken], "split": "show"},
        {**ROW, "candidates": []},
    ]
    counts = gap.tally(rows, "candidates")
    assert gap.total(counts) == Counter(
        {
            "generations": 4,
            "n": 4,
            "asked": 2,
            "good": 1,
            "broken": 1,
            "failed": 1,
            "correct": 1,
            "prompt_tokens": 28,
            "cached_tokens": 12,
            "completion_tokens": 20,
            "unparsed": 1,
            "engine_error": 1,
            "refused wrong": 1,
            "refused frame": 1,
            "refused engine_error": 1,
        }
    )
    assert (gap.total(counts, "show")["n"], gap.total(counts, "train")["good"], gap.total(counts, "select")["n"]) == (2, 1, 0)


def test_attempts_are_counted_where_a_row_has_one() -> None:
    right = {**answer(1), "verdict": verdict(True, "6")}
    cut = {**answer(1), "verdict": verdict(False, None, "truncated")}
    totals = gap.total(gap.tally([{**ROW, "attempt": found} for found in (right, answer(1), cut, None)]))
    expected = {"n": 3, "good": 1, "correct": 1, "unparsed": 1, "truncated": 1}
    assert {what: totals[what] for what in expected} == expected and totals["completion_tokens"] == 15


def test_a_score_rests_on_first_attempts_and_tokens_on_all() -> None:
    right, broken = ({**answer(1), "verdict": found} for found in (verdict(True, "6"), verdict(False, None, "engine_error")))
    totals = gap.total(gap.tally([{**ROW, "attempt": right, "resampled": [answer(1), broken]}]))
    expected = {
        "n": 1,
        "correct": 1,
        "good": 1,
        "unparsed": 0,
        "generations": 3,
        "broken": 1,
        "failed": 1,
        "completion_tokens": 15,
    }
    assert {what: totals[what] for what in expected} == expected


def test_a_row_that_fails_however_often_it_is_asked_is_one_failed_row() -> None:
    broken = {**candidate("d", "engine_error"), "verdict": verdict(False, None, "engine_error")}
    rows = [{**ROW, "candidates": [broken] * 4}, *[{**ROW, "candidates": [candidate("a", None)]}] * 9]
    totals = gap.total(gap.tally(rows, "candidates"))
    assert (totals["failed"], totals["asked"], totals["broken"], totals["generations"]) == (1, 10, 4, 13)


def test_every_sample_of_a_row_has_a_seed_of_its_own_that_batches_do_not_change() -> None:
    seeds = generate._seeds(0, "rationale", 1, range(3), ROW)
    assert len(set(seeds)) == 3
    assert generate._seeds(0, "rationale", 1, range(2), {**ROW, "split": "show"}) == seeds[:2]
    assert not set(generate._seeds(0, "rationale", 2, range(3), ROW)) & set(seeds)
    assert not set(generate._seeds(0, "attempt", 1, range(3), ROW)) & set(seeds)


def test_a_student_that_is_trained_again_answers_for_itself(cluster: None, tmp_path: Path) -> None:
    """Its stage was cut off half-way through `measure`, and then its weights were found damaged."""
    import ray.data

    from undo_ray.mini import models

    rows = [
        {**ROW, "id": f"m{n}", "task": "mini", "split": ("show", "select")[n % 2], "question": f"what is {n} + 3 ?"}
        for n in range(8)
    ]
    made = {"engine": {"batch_size": 8}, "sampling": {"max_tokens": 8}}
    recipe = Recipe.model_validate(
        {"data": {"train": "mini"}, "teacher": {"model": "t"}, "student": {"model": "s", "tokens": 1000, **made}}
    )
    asked = ray.data.from_arrow(pa.Table.from_pylist(rows, schema=ROWS))

    def cut_off(student: str, out: Stage) -> None:
        generate.measure(asked, student, recipe, out)
        raise RuntimeError("a node was lost")

    first, again = models.student(0), models.teacher(0)
    with open_run(str(tmp_path / "run"), recipe, {}, Progress()) as run:
        step = run.round(0)
        with pytest.raises(RuntimeError):
            step.once("measure", cut_off, first)
        assert list((tmp_path / "run").glob("round-00/measure/resume/generations/*/done/*.parquet"))
        step.once("measure", generate.measure, asked, again, recipe)
        assert step.manifests["measure"]["figures"]["resumed"] == 0


# -- quarantine ---------------------------------------------------------------------------------------------------------


def test_rows_the_engine_failed_on_are_copied_apart_and_too_many_of_them_fail_the_stage(cluster: None, tmp_path: Path) -> None:
    import ray.data

    broken = {**answer(0), **generation(None, None, "out of memory"), "verdict": verdict(False, None, "engine_error")}
    rows = [{**ROW, "id": f"q{i}", "attempt": broken if i in (3, 7) else answer(0)} for i in range(10)]

    def attempts(limit: float, out: Stage) -> None:
        files = out.write(ray.data.from_arrow(pa.Table.from_pylist(rows, schema=ROWS)))
        generate._figures(gap.total(gap.tally(rows)), files, out, Engine(max_errors=limit), "student", out.resume)

    recipe = Recipe.model_validate(
        {"data": {"train": "gsm8k"}, "teacher": {"model": "t"}, "student": {"model": "s", "tokens": 1000}}
    )
    with open_run(str(tmp_path / "run"), recipe, {}, Progress()) as run:
        step = run.round(1)
        with pytest.raises(UserError) as caught:
            step.once("attempts", attempts, 0.1)
        place = tmp_path / "run/quarantine/round-01-attempts"
        assert str(caught.value) == (
            "attempts: the engine failed on 2 of 10 rows (limit student.engine.max_errors = 0.1); the first: "
            f"out of memory; the rows are in {place}"
        )
        assert caught.value.exit_code == 1 and not (tmp_path / "run/round-01/attempts/manifest.json").exists()
        step.once("attempts", attempts, 0.2)
        assert step.manifests["attempts"]["figures"]["engine_errors"] == 2
        copies = pq.read_table(place)
        assert copies.schema.remove_metadata() == ROWS and sorted(copies.column("id").to_pylist()) == ["q3", "q7"]
        with pytest.raises(UserError):
            run.round(2).once("attempts", attempts, 0.1)
        rows = [{**row, "attempt": answer(0)} for row in rows]  # the endpoint is back, and answers all of them
        run.round(2).once("attempts", attempts, 0.1)
        assert not (tmp_path / "run/quarantine/round-02-attempts").exists()
