"""Options of the loop that the other runs leave at their defaults, through whole small runs, and one that is killed often."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import runs


@pytest.mark.usefixtures("joined")
def test_a_run_killed_in_every_stage_of_round_1_ends_like_one_that_was_not(shuffled: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = runs.start("mini", run_dir, *runs.SHUFFLED)
    while not any(run_dir.glob("round-00/student/resume/*/train/train/*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # Ctrl-C in training, which Ray Train would have for itself
    assert "stopped; the same command goes on from the last committed stage" in runs.finish(process, code=130)
    stages = ("attempts", "rationales", "lessons", "student", "measure")
    for stage in stages:
        runs.kill_in(runs.start("mini", run_dir, *runs.SHUFFLED), run_dir / "round-01" / stage)
    runs.run("mini", run_dir, *runs.SHUFFLED)
    assert runs.timeless(runs.report(run_dir)) == runs.timeless(runs.report(shuffled))
    assert runs.report(run_dir)["resumes"] == 1 + len(stages)


def test_accumulated_lessons_are_those_of_all_rounds_without_duplicates(shuffled: Path) -> None:
    first, both = runs.rows(shuffled, "round-00/lessons"), runs.rows(shuffled, "round-01/lessons")
    texts = {(row["id"], row["messages"][-1]["content"]) for row in both}
    assert {(row["id"], row["messages"][-1]["content"]) for row in first} <= texts
    assert len({(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in both}) == len(both)


def test_a_shared_validation_set_is_marked_and_is_the_shown_one(shuffled: Path) -> None:
    report = runs.report(shuffled)
    assert report["shared_validation"] is True and report["feedback"] == "shuffled"
    assert report["rounds"][0]["validation"]["n"] == 12
    assert {row["split"] for row in runs.rows(shuffled, "problems")} == {"train", "show"}


def test_the_student_before_training_on_goes_on_from_the_previous_one(shuffled: Path) -> None:
    losses = [record["training"]["loss"] for record in runs.report(shuffled)["rounds"]]
    assert losses[1]["first"] < losses[0]["first"] - 0.5, losses


@pytest.mark.slow
def test_given_lessons_make_round_0_and_feedback_none_asks_the_plain_question(shuffled: Path, tmp_path: Path) -> None:
    chats = [{"messages": row["messages"]} for row in runs.rows(shuffled, "round-00/lessons")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    run_dir = tmp_path / "run"
    options = (f"round0=lessons:{tmp_path}/chats.jsonl", "gap.feedback=none", "lessons.mode=latest")
    runs.run("mini", run_dir, *runs.SMALL, *options)
    assert len(runs.rows(run_dir, "round-00/lessons")) == len(chats)
    asked = {row["split"] for row in runs.rows(run_dir, "round-00/rationales") if row["candidates"]}
    assert asked == {"show"}, "the training questions' rationales are given"
    plain = runs.rows(shuffled, "round-00/rationales")
    tokens = {row["id"]: row["candidates"][0]["prompt_tokens"] for row in plain if row["candidates"]}
    explained = [row for row in runs.rows(run_dir, "round-01/rationales") if row["candidates"] and row["id"] in tokens]
    assert len(explained) > 30
    assert all(row["candidates"][0]["prompt_tokens"] == tokens[row["id"]] for row in explained)


@pytest.mark.slow
def test_a_given_student_is_measured_as_it_is_and_the_shown_examples_stand_alone(shuffled: Path, tmp_path: Path) -> None:
    manifest = json.loads((shuffled / "round-01/student/manifest.json").read_text())
    student = shuffled / "round-01/student" / manifest["try"] / "model"
    run_dir = tmp_path / "run"
    runs.run("mini", run_dir, *runs.SMALL, f"round0=student:{student}", "gap.feedback=block")
    given = next(run_dir.glob("round-00/student/try-*/model/model.safetensors"))
    assert given.read_bytes() == (student / "model.safetensors").read_bytes()
    prompts = [row["candidates"][0]["prompt_tokens"] for row in runs.rows(run_dir, "round-01/rationales") if row["candidates"]]
    assert runs.report(run_dir)["rounds"][1]["shown"] == 12
    assert min(prompts) > 12 * 15


def test_more_replicas_than_the_cluster_holds_are_refused_before_any_work(tmp_path: Path) -> None:
    output = runs.run("mini", tmp_path / "run", *runs.SMALL, "teacher.engine.replicas=999", code=5)
    last = output.splitlines()[-1]
    assert (
        'teacher.engine: needs 999 × (0.5 CPUs) at a time, beside student.engine (lifetime = "run"); the cluster has ' in last
    )
    assert not (tmp_path / "run/problems").exists()


def test_an_address_where_no_ray_answers_is_told_at_once(tmp_path: Path) -> None:
    address = f"127.0.0.1:{runs.free_ports(1)[0]}"
    process = runs.start("mini", tmp_path / "run", environment={"RAY_ADDRESS": address})
    [line] = runs.finish(process, code=5).splitlines()
    assert line.startswith(f"undo-ray: RAY_ADDRESS={address}: no Ray answers there (Connection refused); start the cluster, or")
