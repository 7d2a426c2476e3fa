"""What a killed engine or driver costs: rows in flight, and nothing that was finished."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import runs
import tiny

from undo_ray import engines
from undo_ray.config import Engine, Sampling, digest
from undo_ray.engines import journal, kept
from undo_ray.engines.journal import Journal, key
from undo_ray.place import Place
from undo_ray.types import UserError

TEACHER = "undo_ray.mini.models:teacher"
GENERATION = {"text": "4", "finish_reason": "stop", "prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 2}


def chat(n: int) -> list[Any]:
    return [{"role": "user", "content": f"count {n}"}]


def generation(text: str) -> dict[str, Any]:
    return {**GENERATION, "text": text, "engine_error": None}


def test_what_one_life_finished_the_next_takes_once(tmp_path: Path) -> None:
    place, keys = Place(str(tmp_path)), [key(chat(i), 7) for i in range(3)]
    first = Journal(place, "a")
    first.add(keys[0], generation("zero"))
    first.add(keys[1], generation("one"))
    assert journal.finished(place) == 0, "the second came within FLUSH of the first"
    first.flush()
    assert journal.finished(place) == 2
    second = Journal(place, "b")
    assert second.take(keys[1]) == generation("one") and second.take(keys[2]) is None
    assert second.take(keys[1]) is None, "a row is answered once"


def test_a_finished_generation_is_on_disk_when_another_comes_after_the_flush_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "FLUSH", 0.05)
    one = Journal(Place(str(tmp_path)), "a")
    time.sleep(0.06)
    one.add(key(chat(1), 0), generation("x"))
    assert journal.finished(Place(str(tmp_path))) == 1


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_what_a_stage_shared_another_takes_and_does_not_share_again(where: str, s3: str, tmp_path: Path) -> None:
    away = Place(f"s3://runs/{tmp_path.name}/cache?endpoint_override={s3}&scheme=http&region=us-east-1")
    places, cache = [Place(str(tmp_path / name)) for name in ("one", "two")], Place(str(tmp_path / "cache"))
    cache = away if where == "s3" else cache
    keys, made = [key(chat(n), 0) for n in range(4)], []
    for number, place in enumerate(places):
        life = Journal(place, "a", cache)
        for n in range(2 + number):
            if life.take(keys[n]) is None:
                life.add(keys[n], generation(f"{place.uri} {n}"))
                made.append(n)
        assert life.take(keys[3]) is None
        life.flush()
        reused = journal.share(place, cache)
        assert [found["text"] for found in reused] == [f"{places[0].uri} {n}" for n in range(2)] * number
    assert made == [0, 1, 2]
    shared = {line["key"]: line["generation"]["text"] for line in journal.shared(cache)}
    assert shared == {keys[n]: f"{places[n // 2].uri} {n}" for n in range(3)}
    # A replica that is killed and started again finds what it took from the cache in its own journal, once.
    again = Journal(places[1], "a", cache)
    assert [again.take(keys[n])["text"] for n in range(3)] == [f"{places[n // 2].uri} {n}" for n in range(3)]  # type: ignore[index]


def test_a_cache_is_in_files_that_arrow_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SHARED", 4)
    place, cache = Place(str(tmp_path / "one")), Place(str(tmp_path / "cache"))
    life = Journal(place, "a")
    for n in range(10):
        life.add(key(chat(n), 0), generation(str(n)))
    life.flush()
    journal.share(place, cache)
    assert sorted(len(pq.read_table(tmp_path / "cache" / name)) for name in cache.names()) == [2, 4, 4]
    assert {line["generation"]["text"] for line in journal.shared(cache)} == {str(n) for n in range(10)}


def test_another_seed_or_prompt_is_another_generation() -> None:
    longer = [*chat(1), {"role": "assistant", "content": "1"}]
    assert len({key(chat(1), 0), key(chat(1), 1), key(chat(12), 0), key(longer, 0)}) == 4


def test_rows_in_flight_at_a_death_go_apart_in_ever_smaller_groups(tmp_path: Path) -> None:
    """By hand: 100 rows in flight, row 42 kills. Groups of 12, then of 1; then it is known."""
    place, keys = Place(str(tmp_path)), [key(chat(i), 0) for i in range(120)]

    def live() -> list[list[int]]:
        """A life: works on group after group, and dies in the first one that holds row 42."""
        here = Journal(place, "a")
        asked = [i for i in range(120) if not here.killed(keys[i])]
        groups = [[asked[i] for i in group] for group in here.groups([keys[i] for i in asked])]
        for group in groups:
            with here.flight([keys[i] for i in group]):
                if 42 in group:
                    raise RuntimeError("killed by row 42")
        return groups

    with pytest.raises(RuntimeError), Journal(place, "a").flight(keys[:100]):
        raise RuntimeError("killed by row 42")
    sizes = []
    for _ in range(10):
        try:
            groups = live()
            break
        except RuntimeError:
            sizes.append(max(len(g) for g in Journal(place, "a").groups(keys[:100])))
    assert sizes == [12, 12], "the other groups of the first split stay as they were"
    assert sorted(i for group in groups for i in group) == [i for i in range(120) if i != 42]
    assert Journal(place, "a").killed(keys[42]) and not Journal(place, "a").killed(keys[41])
    assert not Journal(place, "b").killed(keys[42]), "another replica has its own deaths"


def test_rows_that_were_in_flight_at_deaths_hold_up_the_others_until_each_has_been_answered(tmp_path: Path) -> None:
    place, keys = Place(str(tmp_path)), [key(chat(i), 0) for i in range(4)]
    with pytest.raises(RuntimeError), Journal(place, "a").flight(keys):
        raise RuntimeError("preempted")
    second = Journal(place, "a")
    second.add(keys[0], generation("zero"))
    second.add(keys[1], generation("one"))
    second.flush()
    with pytest.raises(RuntimeError), second.flight(keys[2:]):
        raise RuntimeError("preempted again")
    third = Journal(place, "a")  # the first two rows have left the stage: nobody asks for them again
    assert not isinstance(third.turn, nullcontext)
    third.add(keys[2], generation("two"))
    third.add(keys[3], {**generation(""), "engine_error": "too long"})
    assert isinstance(third.turn, nullcontext)
    third.flush()
    assert journal.finished(place) == 3, "one that failed is asked for again by the next start"


def test_replicas_are_those_that_a_pool_had_at_once(tmp_path: Path) -> None:
    """One after another: a pool of one, whose replica was started again, a pool of two, and a pool of one."""
    place = Place(str(tmp_path))
    for pool, replica in ("pa", "pa", "qb", "qc", "rd"):
        Journal(place, replica).started(1.0, pool)
    assert len(journal.starts(place)) == 5 and journal.replicas(journal.starts(place)) == 2


def test_a_row_that_was_alone_in_an_engine_killed_once_is_asked_again(tmp_path: Path) -> None:
    place, one = Place(str(tmp_path)), key(chat(1), 0)
    for deaths in (1, 2):
        with pytest.raises(RuntimeError), Journal(place, "a").flight([one]):
            raise RuntimeError("the node went away")
        assert Journal(place, "a").killed(one) == (deaths == 2)


def test_a_node_that_goes_is_held_against_no_row(tmp_path: Path) -> None:
    """Of an engine on two nodes, besides its replica's."""
    place, one, gone = Place(str(tmp_path)), key(chat(1), 0), list[str]()
    for spot in ("spot-a", "spot-b", "spot-c"):
        life = Journal(place, "a", node="here", alive={"here", "there", spot})
        assert not life.killed(one) and isinstance(life.turn, nullcontext)
        life.started(1.0, "pool", ["there", spot])
        with pytest.raises(RuntimeError), life.flight([one]):
            raise RuntimeError("the node went away")
        gone.append(spot)
    [*_, last] = sorted(journal.starts(place), key=lambda start: float(start["ready"]))
    assert last["interrupted"] == 1, "it counts as what a kill costs"
    for deaths in (1, 2):
        life = Journal(place, "a", node="here", alive={"here", "there"})
        life.started(1.0, "pool", ["there"])
        with pytest.raises(RuntimeError), life.flight([one]):
            raise RuntimeError("killed by the row")
        assert Journal(place, "a", node="here", alive={"here", "there"}).killed(one) == (deaths == 2)


def test_deaths_after_which_all_was_answered_end_no_stage(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    for life in range(journal.DEATHS + 1):
        here = Journal(place, "a")
        with pytest.raises(OSError), here.flight([key(chat(life), 0)]):
            raise OSError("the memory was short")
        here.add(key(chat(life), 0), generation("answered by the next"))
        here.flush()
    Journal(place, "a")


def test_rows_that_were_found_to_kill_their_engine_end_no_stage(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    for row in range(journal.DEATHS):
        for _ in range(2):
            with pytest.raises(OSError), Journal(place, "a").flight([key(chat(row), 0)]):
                raise OSError("killed by the row")
    assert all(Journal(place, "a").killed(key(chat(row), 0)) for row in range(journal.DEATHS))


def test_a_process_that_is_killed_as_its_engine_starts_is_a_try_that_failed(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    Journal(place, "a", node="n1").starting("teacher")
    Journal(place, "a", node="n2").starting("teacher")  # the first node went: that is no failure
    Journal(place, "a", node="n2").starting("teacher")
    Journal(place, "b", node="n2").starting("teacher")
    with pytest.raises(
        UserError, match=r"the teacher's engine did not start, 2 times: its process was killed while it started"
    ):
        Journal(place, "a", node="n2").starting("teacher")
    up = Journal(place, "b", node="n2")
    up.starting("teacher")
    up.started(1.0, "pool")
    for _ in range(2):  # tries in a row
        Journal(place, "b", node="n2").starting("teacher")


def test_an_engine_that_dies_whatever_it_is_given_ends_the_stage(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    for _ in range(journal.DEATHS + 1):
        with pytest.raises(OSError), Journal(place, "a").flight([key(chat(1), 0), key(chat(2), 0)]):
            raise OSError("no driver")
    with pytest.raises(UserError, match=r"the engine died 25 times, .* OSError: no driver; lower engine\.batch_size"):
        Journal(place, "a")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.make(tmp_path_factory.mktemp("model"), "llama", [f"count {i}" for i in range(50)], seed=3)


def work(model: str, place: Path, kind: str, render: Any, max_tokens: int) -> engines.Work:
    vllm = {"kwargs": {"max_num_seqs": 16}, "batch_size": 16}  # else all rows are in it at once and end together
    return engines.Work(
        name="teacher",
        engine=Engine(kind=kind, context=512, **(vllm if kind == "vllm" else {"batch_size": 4})),
        model=partial(str, model),
        sampling=Sampling(temperature=1.0, max_tokens=max_tokens),
        render=lambda: render,
        column="out",
        seeds=lambda row: [row["n"]],
        journal=Place(str(place)),
    )


def asker() -> Any:
    """Row -> chat; made here so that it travels to workers, which do not know this file."""

    def ask(row: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"count {row['n']}"}]

    return ask


def children(name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            found += [child] if name in " ".join(child.cmdline()) else []
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_killed_engine_is_replaced_and_its_finished_rows_are_not_asked_again(
    cluster: None, model: str, tmp_path: Path
) -> None:
    """The vLLM engine is killed from outside when half of the rows are finished."""
    pytest.importorskip("vllm")
    import threading

    import ray.data

    place, rows = Place(str(tmp_path / "journal")), [{"n": n} for n in range(96)]
    killed: list[set[bytes]] = []

    def kill() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if journal.finished(place) >= 40:
                [victim] = children("MapWorker(MapBatches(Replica)")
                os.kill(victim.pid, signal.SIGKILL)
                killed.append({line["key"] for line in journal.lines(place)})
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    blocks = ray.data.from_items(rows, override_num_blocks=6)
    found = engines.generate(blocks, work(model, tmp_path / "journal", "vllm", asker(), 64), {}).take_all()
    thread.join()
    assert sorted(row["n"] for row in found) == list(range(96)), "each row once"
    assert all(row["out"][0]["engine_error"] is None for row in found)
    assert killed, "the engine was killed"
    written = [line["key"] for line in journal.lines(place)]
    assert len(written) == len(set(written)) == 96, "no row was finished twice"
    assert len(killed[0]) >= 40
    first, second = sorted(start["interrupted"] for start in journal.starts(place))
    assert first == 0 < second <= 96 - len(killed[0]), "what was in flight is counted"


@pytest.mark.parametrize("lifetime", [pytest.param("stage", marks=pytest.mark.slow), "run"])
def test_a_row_that_kills_its_engine_is_given_up_and_the_others_are_answered(
    cluster: None, model: str, tmp_path: Path, lifetime: str
) -> None:
    import ray.data
    from transformers import AutoTokenizer

    deadly = engines.prompt_ids(AutoTokenizer.from_pretrained(model), asker()({"n": 5}))

    def dies_of_it() -> str:
        """The model's directory; from here on this process ends when the model is given that prompt."""
        import transformers

        plain = transformers.GenerationMixin.generate

        def generate(self: Any, input_ids: Any, attention_mask: Any, **others: Any) -> Any:
            for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
                if [token for token, kept in zip(ids, mask, strict=True) if kept] == deadly:
                    os._exit(9)
            return plain(self, input_ids=input_ids, attention_mask=attention_mask, **others)

        transformers.GenerationMixin.generate = generate
        return model

    blocks = ray.data.from_items([{"n": n} for n in range(12)], override_num_blocks=3)
    job, held = work(model, tmp_path / "journal", "transformers", asker(), 4), kept.Held()
    engine = job.engine.model_copy(update={"lifetime": lifetime})
    job = dataclasses.replace(job, model=dies_of_it, engine=engine)
    found = {row["n"]: row["out"][0] for row in engines.generate(blocks, job, held).take_all()}
    kept.release(held)
    assert set(found) == set(range(12))
    assert {n for n, out in found.items() if out["engine_error"] is not None} == {5}
    assert found[5]["engine_error"] == "the engine died twice of this row, the last time with it alone"


def test_a_killed_driver_leaves_what_was_finished_to_the_next(joined: None, tmp_path: Path) -> None:
    sets = ["rounds=0", "data.train_limit=120", "data.select=8", "data.show=4", "data.tests=[]", "student.tokens=2000"]
    sets += ["teacher.engine={batch_size = 8}", "student.engine={batch_size = 32}"]
    stage = tmp_path / "run/round-00/rationales"
    process, done = runs.start("mini", tmp_path / "run", *sets), Place(str(stage / "resume/generations" / digest(TEACHER)))
    deadline = time.monotonic() + 240
    while journal.finished(done) < 24:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (stage / "manifest.json").exists()
    kept = {line["key"]: line["generation"]["text"] for line in journal.lines(done)}
    output = runs.until(runs.start("mini", tmp_path / "run", *sets), stage / "manifest.json")
    used = re.search(r"(\d+) generations of an earlier start are used as they are", output)
    assert used and int(used[1]) >= len(kept), "an engine may have finished more before it saw that its driver was gone"
    figures = json.loads((stage / "manifest.json").read_text())["figures"]
    assert figures["resumed"] == int(used[1])
    lost = re.search(r"(\d+) were in flight and are lost", output)
    assert lost and figures["interrupted"] == {"driver": int(lost[1]), "engines": 0} and int(lost[1]) <= 8  # one batch
    rows = runs.rows(tmp_path / "run", "round-00/rationales")
    texts = [row["candidates"][0]["text"] for row in rows if row["candidates"]]
    assert len(texts) == 124 and set(kept.values()) <= set(texts)
    assert not (stage / "resume").exists()
