"""A whole run whose directory is behind a URI: stages, training and report, on an S3 service on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import runs
import tiny

from undo_ray import config, loop, models
from undo_ray.place import Place


def test_two_rounds_go_through_on_s3_and_the_same_command_again_says_they_are_done(on_s3: tuple[str, str]) -> None:
    uri, output = on_s3
    assert uri in output
    place = Place(uri)
    report = (place / "report.json").read_json("")
    assert [record["round"] for record in report["rounds"]] == [0, 1]
    assert all(record["lessons"] > 20 and record["validation"]["n"] == 12 for record in report["rounds"])
    for stage in ("problems", "round-00/rationales", "round-01/attempts", "round-01/rationales"):
        assert (place / stage / "manifest.json").read_json("")["rows"] == 72
    student = place / report["student"]
    model = student / (student / "manifest.json").read_json("")["try"] / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(model.files())

    def contents() -> dict[str, bytes]:
        return {name: (place / name).read_bytes() for name in place.files() if name not in ("recipe.json", "progress.json")}

    before = contents()
    assert "lock.json" not in before, "the run directory is given back at the end"
    assert "this run is finished" in runs.run("mini", uri, *runs.SHUFFLED)
    assert contents() == before


def test_an_object_that_s3_does_not_copy_by_itself_is_moved(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undo_ray.place.LARGEST_COPY", 10)
    folder = Place(f"s3://runs/large?endpoint_override={s3}&scheme=http&region=us-east-1")
    kept = {"part/large": bytes(range(256)) * 1000, "small": b"few"}
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    folder.move(there := folder.beside("moved"))
    assert not folder.files() and {name: (there / name).read_bytes() for name in there.files()} == kept


def test_a_hub_model_is_the_same_on_every_node() -> None:
    one, other = "0f1e2d" + 34 * "0", "3c4b5a" + 34 * "0"
    assert models.located("org/student", one) == models.located("org/student@main", one) == f"org/student@{one}"
    assert models.located("org/student@main", "refs/pr/7") == "org/student@main", "a commit, and nothing that moves"
    given = config.load(runs.ROOT / "jobs/recipes/math.toml").model_copy(update={"round0": "student:org/first"})
    found = loop.located(given, {"weights of round0": one, "weights of teacher.model": other})
    assert found.round0 == f"student:org/first@{one}" and found.teacher.model.endswith(f"@{other}")


def test_a_driver_knows_a_model_behind_a_uri_without_its_weights(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDO_RAY_CACHE", str(tmp_path / "cache"))
    directory, uri = tiny.make(tmp_path / "model", "llama", ["a few words"]), "s3://runs/model"
    uri += f"?endpoint_override={s3}&scheme=http&region=us-east-1"
    Place(uri).upload(directory)
    known = models.check(uri, 0, "student.model")
    assert known == models.check(directory, 0, "student.model"), "the same model, wherever it lies"
    light = models.local(uri, 0, weights=False)
    assert models.tokenizer(light, False)("a few words") == models.tokenizer(directory, False)("a few words")
    assert not list(tmp_path.glob("cache/**/*.safetensors"))
    assert Path(models.local(uri, 0), "model.safetensors").read_bytes() == Path(directory, "model.safetensors").read_bytes()
    weights = Place(uri) / "model.safetensors"
    time.sleep(1.1)  # S3 has the time of a write to the second
    weights.write_bytes(weights.read_bytes()[:-8] + b"another.")
    assert models.check(uri, 0, "student.model") != known
    assert Path(models.local(uri, 0), "model.safetensors").read_bytes() == weights.read_bytes(), "no node keeps the old ones"
