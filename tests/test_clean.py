"""Clean data: what repeats what, against brute force, open-r1's rule and another exact join; and who gets which role."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from SetSimilaritySearch import all_pairs

from undo_ray import clean, config, problems
from undo_ray.problems import ranked, roles
from undo_ray.progress import Progress
from undo_ray.store import open_run
from undo_ray.types import UserError

NONE = clean.Tests([])

LONG = "A baker fills nine trays with twelve rolls each and sells all but seven of them"


def row(id: str, question: str, choices: list[str] | None = None, task: str = "made") -> dict[str, Any]:
    return {"id": id, "task": task, "question": question, "choices": choices, "split": "x"}


def texts_of(vocabulary: int, longest: int) -> st.SearchStrategy[list[str]]:
    """Texts of few different words, so that runs repeat."""
    word = st.integers(0, vocabulary - 1).map(lambda n: f"w{n}")
    return st.lists(st.lists(word, max_size=longest).map(" ".join), max_size=12)


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def kinds(findings: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(found["id"], found["kind"], found["match"]) for found in findings]


# -- words and runs -----------------------------------------------------------------------------------------------------


def test_equal_texts_ask_the_same() -> None:
    same = ["What is  T 0?", "what is t 0", "WHAT, is “t” 0 !", "\u2028what\u00a0is t\t0."]
    assert {clean.normal(text) for text in same} == {"what is t 0"}
    differing = ["Find $x - 3$.", "Find $x + 3$.", "Find $x-3$.", "Find (x - 3)."]
    assert len({clean.normal(text) for text in differing}) == 4, "signs of a formula are not punctuation"


def test_runs_are_hashed_the_same_in_every_process() -> None:
    code = f"from undo_ray import clean; print(*clean.runs([{LONG!r}, 'short'])[0].tolist())"
    done = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}, **PIPES)
        for seed in ("1", "2")
    ]
    value, owner = clean.runs([LONG, "short", "", LONG])
    assert len(value) == 2 * (len(LONG.split()) - 7) and sorted(set(owner.tolist())) == [0, 3]
    first = " ".join(map(str, value[owner == 0].tolist()))
    assert [process.stdout.strip() for process in done] == [first, first]
    assert (value[owner == 0] == value[owner == 3]).all() and len(set(value.tolist())) == len(value) // 2


PIPES: dict[str, Any] = {"capture_output": True, "text": True, "check": True}


@given(texts_of(3, 20))
@settings(deadline=None)
def test_runs_are_those_of_the_words(texts: list[str]) -> None:
    value, owner = clean.runs(texts)
    assert [len(grams(text)) for text in texts] == [len(set(value[owner == i].tolist())) for i in range(len(texts))]
    assert len(clean.hashes(texts)) == len(set().union(*map(grams, texts)))


# -- tests --------------------------------------------------------------------------------------------------------------


def test_a_shared_run_or_an_equal_text_is_found() -> None:
    tests = clean.Tests([row("t/0", f"{LONG}. How many are sold?"), row("t/1", "What is 2 + 3?"), row("t/2", "Who?")])
    asked = [
        row("a", "Once, " + LONG.upper() + "."),
        row("b", "what is 2 + 3"),
        row("c", "What is 2 - 3?"),
        row("d", " ".join(LONG.split()[2:9]) + " only seven words of it"),
        row("e", "One, two: " + " ".join(LONG.split()[-8:])),
    ]
    found = dict(tests.find(asked))
    assert kinds(list(found.values())) == [("a", "test_ngram", "t/0"), ("b", "test", "t/1"), ("e", "test_ngram", "t/0")]
    assert found[0]["ngram"] == "a baker fills nine trays with twelve rolls"
    assert found[4]["ngram"] == " ".join(LONG.split()[-8:]).casefold() and found[1]["ngram"] is None


def test_options_belong_to_a_question() -> None:
    tests = clean.Tests([row("t", "Which is a metal?", ["iron", "neon"])])
    asked = [
        row("same", "which is a metal", ["Iron", "Neon"]),
        row("other options", "Which is a metal?", ["gold", "wood"]),
        row("open", "Which is a metal?"),
    ]
    assert [index for index, _ in tests.find(asked)] == [0, 2]
    kept, _ = clean.distinct([*asked, row("again", "Which is a metal?", ["gold", "wood"])], None, NONE)
    assert [found["id"] for found in kept] == ["same", "other options", "open"]


@given(texts_of(3, 14), texts_of(3, 14))
@settings(deadline=None)
def test_what_is_found_is_what_brute_force_finds(held: list[str], asked: list[str]) -> None:
    tests = clean.Tests([row(f"t/{i}", text) for i, text in enumerate(held)])
    found = dict(tests.find([row(f"a/{i}", text) for i, text in enumerate(asked)]))
    shared = set().union(*map(grams, held))
    assert set(found) == {i for i, text in enumerate(asked) if text in held or grams(text) & shared}
    for index, finding in found.items():
        match = held[int(finding["match"][2:])]
        if finding["kind"] == "test":
            assert match == asked[index]
        else:
            assert tuple(finding["ngram"].split()) in grams(match) & grams(asked[index])


@pytest.fixture(scope="module")
def real(data_dir: Path) -> Callable[[str], list[dict[str, Any]]]:
    """Questions of a normalised file of the benchmarks."""

    def load(name: str) -> list[dict[str, Any]]:
        with (data_dir / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as file:
            return [row(f"{name}/{i}", json.loads(line)["question"]) for i, line in enumerate(file)]

    return load


TEST_FILES = ("gsm8k/test", "math/test", "svamp/test", "mmlu_pro/test", "strategyqa/test", "theoremqa/test")


REMOVED = {"gsm8k/train": (0, 115), "math/train": (67, 2147), "svamp/train": (0, 422), "strategyqa/train": (1, 0)}
"""Equal to a test question, sharing 8 words with one: the table of docs/tasks.md."""


@pytest.mark.parametrize("name", REMOVED)
def test_no_real_question_is_left_that_overlaps_by_the_rule_of_open_r1(real: Callable[..., Any], name: str) -> None:
    """Its `decontaminate.py`: lower case, split at spaces, 8 words. Ours also looks past punctuation: a few more go."""
    held = [found for file in TEST_FILES for found in real(file)]
    shared = set().union(*(grams(found["question"]) for found in held))
    rows = real(name)
    kept, removed = clean.distinct(rows, None, clean.Tests(held))
    assert len(kept) + len(removed) == len(rows)
    assert not [found["id"] for found in kept if grams(found["question"]) & shared]
    theirs = sum(bool(grams(found["question"]) & shared) for found in rows)
    ours = sum(finding["kind"].startswith("test") for finding in removed)
    assert theirs <= ours <= 1.1 * theirs + 30
    assert tuple(sum(finding["kind"] == kind for finding in removed) for kind in ("test", "test_ngram")) == REMOVED[name]
    assert len({found["id"] for found in kept}) == len(kept)


# -- near duplicates ----------------------------------------------------------------------------------------------------


def greedy(texts: list[str], fixed: int = 0) -> dict[int, int]:
    """Brute force: every text against all earlier ones that stay."""
    near: dict[int, int] = {}
    for later in range(fixed, len(texts)):
        for earlier in range(later):
            a, b = grams(texts[earlier]), grams(texts[later])
            if earlier not in near and a & b and 5 * len(a & b) >= 4 * len(a | b):
                near[later] = earlier
                break
    return near


@given(texts_of(2, 24), st.integers(0, 4))
@settings(deadline=None, max_examples=300)
def test_near_duplicates_are_those_of_brute_force(texts: list[str], fixed: int) -> None:
    # A copy with one word more is near when the text is long enough.
    texts = [*texts, *(text + " w0" for text in texts[:4])]
    fixed = min(fixed, len(texts))
    assert clean.near_duplicates(texts, fixed) == greedy(texts, fixed)


def test_near_duplicates_are_those_of_another_exact_join(real: Callable[..., Any]) -> None:
    rng = random.Random(0)
    texts = [found["question"] for name in ("math/train", "svamp/train") for found in real(name)]
    for _ in range(300):  # besides the few the sets have: copies with a word left out
        words = rng.choice(texts).split()
        del words[rng.randrange(len(words))]
        texts.append(" ".join(words))
    sets = [{tuple(words[i : i + 8]) for i in range(len(words) - 7)} for words in map(clean.words, texts)]
    full = [index for index, found in enumerate(sets) if found]
    pairs = all_pairs([sets[index] for index in full], similarity_func_name="jaccard", similarity_threshold=clean.NEAR)
    expected: dict[int, int] = {}
    for later, earlier in sorted((max(x, y), min(x, y)) for x, y, _ in pairs):
        if full[earlier] not in expected:
            expected.setdefault(full[later], full[earlier])
    assert clean.near_duplicates(texts) == expected and len(expected) > 50


def test_chunks_of_questions_are_one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join(random.Random(i).choices(words, k=30)) for i in range(40)]
    texts += [text + " more" for text in texts]
    held = clean.Tests([row("t", texts[7])])
    whole = clean.near_duplicates(texts), list(held.find([row(str(i), text) for i, text in enumerate(texts)]))
    monkeypatch.setattr(clean, "CHUNK", 7)
    monkeypatch.setattr(clean, "SLOTS", 64)  # every run shares its slot with others
    assert (clean.near_duplicates(texts), list(held.find([row(str(i), t) for i, t in enumerate(texts)]))) == whole
    assert whole[0] == {i + 40: i for i in range(40)}


# -- what stays ---------------------------------------------------------------------------------------------------------


def test_the_first_of_equals_stays() -> None:
    rows = [
        row("a", LONG),
        row("b", LONG.lower() + "."),
        row("c", "Short one?"),
        row("d", "short one"),
        row("e", LONG + " today"),
        row("f", LONG + " today, but not one more"),
        row("g", "Short two?"),
    ]
    kept, removed = clean.distinct(rows, None, NONE)
    assert [found["id"] for found in kept] == ["a", "c", "f", "g"]
    assert kinds(removed) == [("b", "duplicate", "a"), ("d", "duplicate", "c"), ("e", "duplicate_near", "a")]
    longer = f"{LONG} {LONG.replace('baker', 'cook')}"
    kept, removed = clean.distinct([row("x", longer + " today"), row("y", longer)], None, NONE, [row("v", longer + " now")])
    assert kept == [] and kinds(removed) == [("x", "validation_near", "v"), ("y", "validation_near", "v")]


def test_templated_questions_are_only_ever_equal() -> None:
    longer = f"{LONG} {LONG.replace('baker', 'cook')}"
    rows = [row("a", longer, task="t"), row("b", longer + " now", task="t"), row("c", longer, task="t")]
    tests = clean.Tests([row("t", longer + " today", task="t")], {"t"})
    kept, removed = clean.distinct(rows, None, tests)
    assert [found["id"] for found in kept] == ["a", "b"] and kinds(removed) == [("c", "duplicate", "a")]
    mixed = clean.Tests([row("t", longer + " today", task="other")], {"t"})
    assert not list(mixed.find(rows))
    exact = clean.Tests([row("t", longer + " today")], ngrams=False)
    assert kinds(clean.distinct([row("a", longer), row("b", longer + " now"), row("c", longer)], None, exact)[1]) == [
        ("c", "duplicate", "a")
    ]


def test_a_limit_is_reached_past_what_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "CHUNK", 2)
    rows = [row(str(i), f"Question {i // 4}?") for i in range(400)]
    whole, _ = clean.distinct(rows, None, NONE)
    for limit in (1, 10, 99, 100):
        kept, removed = clean.distinct(rows, limit, NONE)
        assert kept == whole[:limit] and len(removed) == 3 * (limit - 1), "those after the last one were not looked at"
    assert clean.distinct(rows, 101, NONE)[0] == whole


# -- lessons ------------------------------------------------------------------------------------------------------------


def test_a_lesson_leaks_what_its_own_problem_does_not_hold() -> None:
    held = clean.hashes([f"{LONG}. How many?", "A text of fewer words"])
    other = "We mix paint."
    assert clean.leaks(f"Note that {LONG}.", other, held) == "a baker fills nine trays with twelve rolls"
    assert clean.leaks(f"Note that {LONG}.", f"{LONG}, why?", held) is None
    assert clean.leaks(" ".join(LONG.split()[:7]), other, held) is None
    assert clean.leaks("a text of fewer words", other, held) is None
    assert clean.leaks(LONG, other, clean.hashes([])) is None
    own = " ".join(LONG.split()[:9])  # holds the first two runs alone
    assert clean.leaks(LONG, own, held) == " ".join(LONG.split()[2:10])


@given(texts_of(2, 14), texts_of(2, 14), texts_of(2, 14))
@settings(deadline=None)
def test_leaks_are_those_of_brute_force(held: list[str], lessons: list[str], own: list[str]) -> None:
    known = set().union(*map(grams, held))
    for lesson, problem in zip(lessons, own, strict=False):
        found = clean.leaks(lesson, problem, clean.hashes(held))
        expected = (grams(lesson) & known) - grams(problem)
        assert (found is None) == (not expected) and (found is None or tuple(found.split()) in expected)


# -- roles --------------------------------------------------------------------------------------------------------------


def rows_of(n: int, prefix: str = "t") -> list[dict[str, Any]]:
    return [row(f"{prefix}/{i}", f"What is {prefix} {i}?") for i in range(n)]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_order_of_a_draw_does_not_depend_on_that_of_the_rows() -> None:
    rows = rows_of(100)
    shuffled = random.Random(1).sample(rows, 100)
    assert ranked(rows, 0, "a") == ranked(shuffled, 0, "a")
    assert ranked(rows, 0, "a") != ranked(rows, 1, "a") != ranked(rows, 1, "b")
    # Pinned: another order would silently be another experiment.
    assert [found["id"] for found in ranked(rows, 0, "validation")][:3] == ["t/12", "t/62", "t/21"]


def ids(rows: list[dict[str, Any]], split: str) -> list[str]:
    return [found["id"] for found in rows if found["split"] == split]


def test_roles_are_disjoint() -> None:
    rows, removed = roles(rows_of(100), None, NONE, show=5, select=15, seed=0)
    assert removed == []
    assert [len(ids(rows, split)) for split in ("train", "show", "select")] == [80, 5, 15]
    assert len({found["id"] for found in rows}) == 100
    again, _ = roles(rows_of(100)[::-1], None, NONE, show=5, select=15, seed=0)
    assert again == rows
    limited, _ = roles(rows_of(100), None, NONE, show=5, select=15, seed=0, train_limit=7)
    assert ids(limited, "train") == ids(rows, "train")[:7]


def test_roles_from_a_validation_source() -> None:
    validation = [row(f"v/{i}", f"what is  T {i}!") for i in range(4)] + rows_of(10, "v2")
    rows, removed = roles(rows_of(100), validation, NONE, show=4, select=10, seed=0)
    assert Counter((found["split"], found["kind"]) for found in removed) == {("train", "validation"): 4}
    assert len(ids(rows, "train")) == 96
    assert sorted(ids(rows, "show") + ids(rows, "select")) == sorted(found["id"] for found in validation)


def test_repeated_questions_have_one_role() -> None:
    doubled = rows_of(50) + [{**found, "id": found["id"] + "b"} for found in rows_of(50)]
    rows, removed = roles(doubled, None, NONE, show=10, select=10, seed=0)
    assert len({found["question"] for found in rows}) == len(rows) == 50
    assert Counter(found["kind"] for found in removed) == {"validation": 20, "duplicate": 30}


def test_draws_have_their_size_after_removal() -> None:
    tests = clean.Tests([row(f"test/{i}", f"What is t {i}?") for i in range(0, 100, 3)])
    rows, removed = roles(rows_of(100), None, tests, show=5, select=15, seed=0, train_limit=40)
    assert [len(ids(rows, split)) for split in ("train", "show", "select")] == [40, 5, 15]
    assert not [found["id"] for found in rows if int(found["id"][2:]) % 3 == 0]
    assert {(found["split"], found["kind"]) for found in removed} == {("train", "test")}
    _, removed = roles(rows_of(50, "u"), rows_of(100), tests, show=5, select=15, seed=0)
    assert {(found["split"], found["kind"]) for found in removed} == {("validation", "test")}
    message = refusal(lambda: roles(rows_of(100), None, tests, show=5, select=70, seed=0))
    assert "there are 66 different questions (removed: 34 test)" in message
    everything = clean.Tests(rows_of(90, "u"))
    message = refusal(lambda: roles(rows_of(90, "u"), rows_of(9), everything, show=2, select=5, seed=0))
    assert "no training question is left beside 7 validation questions (removed: 90 test)" in message


def test_shared_draw() -> None:
    rows, _ = roles(rows_of(30), None, NONE, show=20, select=200, seed=0, shared=True)
    assert [len(ids(rows, split)) for split in ("train", "show", "select")] == [10, 20, 0]


def test_impossible_roles() -> None:
    message = refusal(lambda: roles(rows_of(50), None, NONE, show=20, select=50, seed=0))
    assert "validation larger than training: data.show + data.select = 70, but there are 50" in message
    assert "larger than its source" in refusal(lambda: roles(rows_of(50), rows_of(5, "v"), NONE, show=2, select=5, seed=0))
    assert "no training question is left" in refusal(lambda: roles(rows_of(50), None, NONE, show=20, select=30, seed=0))


# -- stages -------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_removed_is_in_the_record_and_listed_and_a_test_added_later_is_counted(tmp_path: Path, cluster: None) -> None:
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    asked = {f"{i}": f"How much is {i} and one?" for i in range(30)}
    asked |= {"copy": "how much is 3 and one", "leak": f"{LONG}. Why?", "added": "Is it two?"}
    held = {"0": f"{LONG}. How many?", "1": "How much is 5 and one?"}
    for name, questions in (("train", asked), ("test", held), ("late", {"0": asked["added"]})):
        rows = [{"id": id, "question": question, "answer": "1"} for id, question in questions.items()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(found) + "\n" for found in rows))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[data]\ntrain = "gsm8k"\ntests = ["gsm8k"]\ndir = "{tmp_path}/data"\nshow = 2\nselect = 3\n'
        '[teacher]\nmodel = "t"\n[student]\nmodel = "s"\ntokens = 10\n'
    )
    with pytest.raises(UserError, match="no question of gsm8k has a worked solution; set it to"):
        problems.check(config.load(recipe, ["teacher.hints=solution"]))
    late = f"gsm8k/{folder}/late.jsonl"
    run_dir = tmp_path / "run"

    log = io.StringIO()
    for tests in (["gsm8k"], ["gsm8k", late]):
        made = config.load(recipe, [f"data.tests={json.dumps(tests)}"])
        problems.check(made)
        with open_run(str(run_dir), made, {}, Progress(log)) as run:
            run.once("problems", problems.prepare, made)
            run.tests(made).once("problems", problems.prepare_tests, made)
            held = problems.held(run)
    assert clean.leaks(f"So {LONG}, and then some.", "", held), "a lesson may not quote a test question"
    assert clean.leaks(f"So {LONG}, and then some.", f"{LONG}. How many?", held) is None, "but its own"

    manifest = json.loads((run_dir / "problems/manifest.json").read_text())
    figures = manifest["figures"]
    # "How much is 3 and one?" may have been drawn for validation, then its copy repeats that.
    assert figures["removed"]["train"] in (
        {"test": 1, "test_ngram": 1, "duplicate": 1},
        {"test": 1, "test_ngram": 1, "validation": 1},
    )
    assert (figures["show"], figures["select"], figures["train"]) == (2, 3, 25)
    assert figures["sources"] == {"gsm8k/train": {"rows": 33}, "gsm8k/test": {"rows": 2}}
    [listed] = [file["name"] for file in manifest["files"] if file["name"].endswith("removed.jsonl")]
    found = {finding["id"]: finding for finding in lines(run_dir / "problems" / listed)}
    assert found["gsm8k/train/leak"]["match"] == "gsm8k/test/0" and found["gsm8k/train/5"]["kind"] == "test"
    assert found["gsm8k/train/leak"]["ngram"] == "a baker fills nine trays with twelve rolls"
    assert "questions; removed: train: " in log.getvalue() and "1 test_ngram" in log.getvalue()

    stages = [json.loads(path.read_text())["figures"] for path in sorted(run_dir.glob("tests/*/problems/manifest.json"))]
    overlaps = [stage["overlap"] for stage in stages]
    assert {} in overlaps and len(overlaps) == 2
    assert next(found for found in overlaps if found) == {late: {"train": {"test": 1}}}
    assert "late.jsonl: its like was not removed" in log.getvalue()


def test_the_miniature_world_is_drawn_as_ever() -> None:
    """Its questions are templated: none is removed, and the draws are those that its documented results stand on."""
    mini = config.load(Path(__file__).parent.parent / "jobs" / "recipes" / "mini.toml")
    rows, removed = problems._Sources(mini).roles()
    assert removed == [] and len(ids(rows, "train")) == 1000
    assert [ids(rows, split)[:2] for split in ("train", "show", "select")] == [
        [f"mini/train/{number}" for number in numbers] for numbers in ((63, 1631), (243, 286), (1768, 218))
    ]


def test_golds_that_nobody_can_read_as_mathematics_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "numina").mkdir()
    golds = ["\\frac{1}{2}", "7", "\\frac{1}{}+", "x^2 - 1", "\\begin{cases}"]
    rows = [{"id": f"{i}", "question": f"What is number {i}?", "answer": gold} for i, gold in enumerate(golds)]
    (tmp_path / "numina/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[data]\ntrain = "numina"\ndir = "{tmp_path}"\nshow = 1\nselect = 1\n'
        '[teacher]\nmodel = "t"\n[student]\nmodel = "s"\ntokens = 10\n'
    )
    sources = problems._Sources(config.load(recipe))
    kept, _ = sources.roles()
    assert sorted(row["answer"] for row in kept) == ["7", "\\frac{1}{2}", "x^2 - 1"]
    assert sources.figures["numina/train"] == {"rows": 3, "left out: gold answer is no readable mathematics": 2}


# -- copies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, share",
    [
        ("a b c d e f g h i j", 1.0),  # its three runs all stand in the source
        ("A, b c d e f g h i J.", 1.0),  # case and punctuation do not count
        ("a b c d e f g h x y", 1 / 3),
        ("x y a b c d e f g x", 0.0),  # seven words in a row are no run
        ("a b c d e f g h i x 1 2 3 4 5 6", 2 / 9),
        ("a b c", 0.0),  # too short for a run, and not the whole source
        ("q1 q2 q3 q4 q5 q6 q7 q8", 0.0),  # what the question says is no copy
    ],
)
def test_a_copy_is_measured_by_its_runs(text: str, share: float) -> None:
    source = "a b c d e f g h i j q1 q2 q3 q4 q5 q6 q7 q8"
    assert clean.copied(text, source, "q1 q2 q3 q4 q5 q6 q7 q8") == pytest.approx(share)


def test_a_short_copy_is_compared_whole() -> None:
    assert clean.copied("So 2 + 2 = 4.", "so 2 + 2 = 4", "What is 2 + 2?") == 1.0
    assert clean.copied("So 2 + 2 is 4.", "so 2 + 2 = 4", "What is 2 + 2?") == 0.0


def test_recorded_answers_are_no_copies_of_solutions_their_models_never_saw(data_dir: Path) -> None:
    def rows(name: str) -> list[dict[str, Any]]:
        return list(map(json.loads, filter(None, (data_dir / name).read_text(encoding="utf-8").split("\n"))))

    known = {row["id"]: row for row in rows("gsm8k/test.jsonl")}
    answers = [row for row in rows("graded/gsm8k_rho_cot.jsonl") if row["correct"]]
    copied = 0
    for answer in answers:
        problem = known[answer["question_id"]]
        solution = re.sub(r"<<.*?>>", "", problem["solution"])
        copied += clean.copied(answer["response"], solution, problem["question"]) >= clean.COPY
    assert len(answers) > 300 and copied <= 0.005 * len(answers)
