"""The run directory: stages run once, nothing half done is believed, one driver at a time; on disk, `file://` and S3.

The S3 service is moto's, on localhost. Ray takes no part: the stages here write Parquet with pyarrow and return values.
"""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from undo_ray import lease, loop
from undo_ray.config import Recipe
from undo_ray.place import Place
from undo_ray.progress import Progress
from undo_ray.store import Run, Stage, known_identity, open_run
from undo_ray.types import Damaged, UserError

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = {"teacher.model": "aaaa", "student.model": "bbbb"}


def recipe(**changes: Any) -> Recipe:
    plain: dict[str, Any] = {
        "data": {"train": "gsm8k", "tests": ["gsm8k"]},
        "teacher": {"model": "big/teacher"},
        "student": {"model": "small/student", "tokens": 1000},
    }
    return Recipe.model_validate({**plain, **changes})


def opened(place: Place, changes: dict[str, Any] | None = None, weights: dict[str, str] = WEIGHTS) -> Any:
    """The context manager a driver holds its run directory with."""
    return open_run(place.uri, recipe(**(changes or {})), weights, Progress(open(os.devnull, "w")))


def numbers(count: int, out: Stage) -> None:
    """A stage that writes `count` rows in one file, and returns what it wrote as its value."""
    out.rows.fs.create_dir(out.rows.path, recursive=True)
    table = pa.table({"n": list(range(count))})
    pq.write_table(table, f"{out.rows.path}/000000.parquet", filesystem=out.rows.fs)
    out.value = {"sum": sum(range(count))}
    out.note(count=count)


def never(out: Stage) -> None:
    raise AssertionError("a committed stage was run again")


def names(place: Place) -> list[str]:
    """Every file below, without the lease and what is for looking at alone."""
    return [name for name in place.files() if name not in ("lock.json", "progress.json")]


def contents(place: Place) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in names(place) if name != "recipe.json"}


def refused(act: Callable[[], Any]) -> str:
    """The one line a run directory is refused with."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 4
    return message


def enter(place: Place, changes: dict[str, Any] | None = None, weights: dict[str, str] = WEIGHTS) -> None:
    with opened(place, changes, weights):
        pass


# -- places -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["path", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A run directory that is not there yet: a path, a `file://` URI, an `s3://` URI."""
    if request.param == "path":
        return Place(str(tmp_path / "run"))
    if request.param == "file":
        return Place((tmp_path / "run").as_uri())
    address = request.getfixturevalue("s3")
    return Place(f"s3://runs/{tmp_path.name}/run?endpoint_override={address}&scheme=http&region=us-east-1")


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "run"))


@pytest.mark.parametrize(
    "uri, below",
    [
        ("/runs/a", "/runs/a/b"),
        ("/runs/a/", "/runs/a/b"),
        ("s3://bucket/a", "s3://bucket/a/b"),
        ("s3://bucket/a?region=x&scheme=http", "s3://bucket/a/b?region=x&scheme=http"),
        ("/runs/what?", "/runs/what?/b"),
    ],
)
def test_a_place_below_a_uri_keeps_its_options(uri: str, below: str) -> None:
    assert (Place(uri) / "b").uri == below == (Place(uri) / "c").beside("b").uri


def test_a_uri_that_nothing_can_open_is_refused() -> None:
    with pytest.raises(UserError, match=r"^nowhere://a.*: no file system for this URI \(.*\); use a path, s3://, gs:// or"):
        enter(Place("nowhere://a"))


def test_bytes_and_json_come_back_as_written(place: Place) -> None:
    value = {"text": "Δ \ud800 \u2028 </s>", "n": [1, 2.5, None, True]}
    (place / "a" / "b.json").write_json(value)
    assert (place / "a" / "b.json").read_json("") == value
    (place / "a" / "b.json").write_bytes(b"\x00\xff")
    assert (place / "a" / "b.json").read_bytes() == b"\x00\xff"
    assert names(place) == ["a/b.json"]
    (place / "a").remove()
    assert not (place / "a" / "b.json").exists()
    (place / "a").remove()  # of nothing: nothing happens


def test_an_uploaded_folder_is_there_with_its_subfolders(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "model"
    (source / "deep").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "deep" / "weights").write_bytes(b"w" * 100_000)
    (place / "model").upload(str(source))
    assert names(place) == ["model/config.json", "model/deep/weights"]
    assert (place / "model" / "deep" / "weights").read_bytes() == b"w" * 100_000


# -- once ---------------------------------------------------------------------------------------------------------------


def test_a_stage_runs_once_and_returns_the_same_ever_after(place: Place) -> None:
    with opened(place) as run:
        step = run.round(0)
        assert step.once("measure", numbers, 10) == {"sum": 45}
        assert step.once("measure", never) == {"sum": 45}
    with opened(place) as run:
        assert run.round(0).once("measure", never) == {"sum": 45}
        assert run.round(0).made("measure") == {"sum": 45}
        assert run.round(1).once("measure", numbers, 3) == {"sum": 3}


def test_a_stage_that_makes_nothing_but_files_for_a_model_returns_where_they_are(place: Place, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")

    def train(out: Stage) -> None:
        out.model.upload(str(tmp_path / "export"))

    with opened(place) as run:
        made = run.round(0).once("student", train)
    assert (Place(made) / "config.json").read_bytes() == b"{}"
    with opened(place) as run:
        assert run.round(0).once("student", never) == made


def test_a_manifest_tells_files_rows_figures_and_by_whom(place: Place) -> None:
    with opened(place) as run:
        run.round(2).once("measure", numbers, 10)
        token = run.lease.token
    folder = place / "round-02" / "measure"
    manifest = (folder / "manifest.json").read_json("")
    [file] = manifest["files"]
    data = (folder / file["name"]).read_bytes()
    assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (manifest["kind"], manifest["rows"], manifest["figures"]) == ("rows", 10, {"count": 10})
    assert manifest["token"] == token
    assert manifest["seconds"] >= 0 and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest["written"])


def test_a_stage_that_failed_is_done_anew_and_its_leftovers_are_gone(place: Place) -> None:
    def half(out: Stage) -> None:
        numbers(3, out)
        raise UserError("the engine broke")

    with opened(place) as run:
        step = run.round(0)
        step.once("rationales", numbers, 4)
        kept = contents(place)
        with pytest.raises(UserError, match="the engine broke"):
            step.once("measure", half)
        assert len(names(place / "round-00" / "measure")) == 1
    with opened(place) as run:
        assert run.round(0).once("measure", numbers, 5) == {"sum": 10}
    left = names(place / "round-00" / "measure")
    assert len(left) == 2 and left[0] == "manifest.json" and left[1].endswith("/rows/000000.parquet")
    assert kept.items() <= contents(place).items()


def test_values_with_half_a_surrogate_pair_do_not_break_a_stage(place: Place) -> None:
    def value(out: Stage) -> None:
        out.value = {"text": "\ud83d and \udc00"}
        out.note(sample="\ud800")

    with opened(place) as run:
        run.round(0).once("measure", value)
        run.round(0).commit(error="\udfff")
    with opened(place) as run:
        assert run.round(0).made("measure") == {"text": "\ud83d and \udc00"}


def test_records_are_read_back_in_order_up_to_the_first_round_not_done(place: Place) -> None:
    with opened(place) as run:
        assert run.records() == []
        for k in (0, 1):
            step = run.round(k)
            step.once("measure", numbers, k)
            step.commit(validation={"accuracy": k / 10}, figures=step.manifests["measure"]["figures"])
        run.round(3).commit()
    with opened(place) as run:
        records = run.records()
    assert [(record["round"], record["validation"]) for record in records] == [(0, {"accuracy": 0.0}), (1, {"accuracy": 0.1})]
    assert records[1]["figures"] == {"count": 1}
    assert records[0]["fingerprint"] == records[1]["fingerprint"]


def test_starts_are_counted_and_the_first_is_no_resume(place: Place) -> None:
    for expected in range(3):
        with opened(place) as run:
            assert run.resumes == expected
    known = (place / "recipe.json").read_json("")
    assert [start["pid"] for start in known["starts"]] == [os.getpid()] * 3
    assert known["recipe"]["student"]["model"] == "small/student"
    assert known["versions"]["pyarrow"] == pa.__version__


def test_what_one_try_leaves_for_the_next_outlives_it_and_is_gone_with_the_commit(place: Place) -> None:
    def killed(out: Stage) -> None:
        (out.resume.made() / "step-7").write_bytes(b"state")
        raise KeyboardInterrupt

    def goes_on(out: Stage) -> None:
        assert (out.resume / "step-7").read_bytes() == b"state"
        numbers(3, out)

    with opened(place) as run, pytest.raises(KeyboardInterrupt):
        run.once("student", killed)
    with opened(place) as run:
        assert run.once("student", goes_on) == {"sum": 3}
    with opened(place) as run:
        assert run.once("student", never) == {"sum": 3}
    assert not [name for name in names(place) if "step-7" in name]


# -- what cannot be believed --------------------------------------------------------------------------------------------


def damaged(place: Place, name: str, damage: Callable[[bytes], bytes]) -> Place:
    """A run with round 0 done, one file of which was changed afterwards. `name` may hold `*` for the try."""
    with opened(place) as run:
        run.round(0).once("measure", numbers, 10)
        run.round(0).commit(validation={"accuracy": 0.5})
    [found] = [known for known in names(place) if re.fullmatch(name.replace("*", "[^/]+"), known)]
    (place / found).write_bytes(damage((place / found).read_bytes()))
    return place / found


def measure_again(place: Place) -> None:
    with opened(place) as run:
        run.records()
        run.round(0).once("measure", never)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-20],
        lambda data: b"\x80\x81",
        lambda data: b"[]",
        lambda data: b"{}",
        lambda data: b"null",
        lambda data: data.replace(b'"files": [', b'"files": [7, '),
    ],
    ids=["empty", "cut", "binary", "list", "object", "null", "files"],
)
def test_a_corrupt_manifest_is_named_and_nothing_is_deleted(local: Place, damage: Any) -> None:
    file = damaged(local, "round-00/measure/manifest.json", damage)
    before = contents(local)
    message = refused(lambda: measure_again(local))
    assert message.startswith(f"{file.uri}: ")
    assert "run the same command" in message
    assert contents(local) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-20],
        lambda data: b"[]",
        lambda data: b"{}",
        lambda data: data.replace(b'"round": 0', b'"round": 1'),
    ],
    ids=["empty", "cut", "list", "object", "other round"],
)
def test_a_corrupt_record_is_named_and_nothing_is_deleted(local: Place, damage: Any) -> None:
    file = damaged(local, "round-00/record.json", damage)
    before = contents(local)
    message = refused(lambda: measure_again(local))
    assert message.startswith(f"{file.uri}: ")
    assert "run the same command" in message
    assert contents(local) == before


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-4], lambda data: data + b"x", lambda data: b""], ids=["cut", "longer", "empty"]
)
def test_a_changed_data_file_is_named_with_both_sizes(local: Place, damage: Any) -> None:
    file = damaged(local, r"round-00/measure/*/rows/000000\.parquet", damage)
    before, size = contents(local), len(file.read_bytes())
    message = refused(lambda: measure_again(local))
    assert message.startswith(f"{file.uri}: {size} bytes, the manifest says ")
    assert contents(local) == before


def test_a_data_file_that_is_gone_is_named(place: Place) -> None:
    file = damaged(place, r"round-00/measure/*/rows/000000\.parquet", lambda data: data)
    file.fs.delete_file(file.path)
    assert refused(lambda: measure_again(place)).startswith(f"{file.uri}: missing, the manifest says ")


def test_a_record_without_its_stage_says_so(place: Place) -> None:
    damaged(place, "round-00/record.json", lambda data: data)
    (place / "round-00" / "measure").remove()
    with opened(place) as run:
        message = refused(lambda: run.round(0).made("measure"))
    assert message.startswith(f"{(place / 'round-00' / 'measure').uri}: ") and "move record.json" in message


def test_what_is_damaged_is_set_aside_and_made_again_and_the_rest_is_kept(place: Place) -> None:
    def make(run: Run) -> Any:
        step = run.round(0)
        step.once("rationales", numbers, 10)
        step.once("measure", numbers, 4)
        return step

    def done(run: Run) -> None:
        make(run).commit(validation={"accuracy": 0.5}, seconds={"rationales": 1.0, "measure": 1.0})

    with opened(place) as run:
        done(run)
    kept = {name: data for name, data in contents(place).items() if "measure" in name}
    [cut] = [name for name in names(place) if name.startswith("round-00/rationales/try-")]
    broken, record = (place / cut).read_bytes()[:-4], (place / "round-00/record.json").read_bytes()
    (place / cut).write_bytes(broken)
    with opened(place) as run:
        run.mend()
        assert run.records() == []
        done(run)
        assert len(run.records()) == 1
        run.mend()
        run.round(0).once("rationales", never)
    found = contents(place)
    assert kept.items() <= found.items()
    aside = {name: data for name, data in found.items() if name.startswith("damaged/")}
    assert sorted(aside.values(), key=len)[-1] in (broken, record) and {broken, record} <= set(aside.values())


@pytest.mark.parametrize("moves", range(3))
def test_what_was_being_set_aside_at_a_kill_is_found_again(local: Place, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """Report, record and stage go; the kill comes before each of them."""

    def do(run: Run) -> None:
        run.round(0).once("rationales", numbers, 10)
        run.round(0).commit(validation={"accuracy": 0.5})
        (local / "report.json").write_json({"stopped": "rounds"})

    with opened(local) as run:
        do(run)
    [cut] = [name for name in names(local) if name.startswith("round-00/rationales/try-")]
    (local / cut).write_bytes((local / cut).read_bytes()[:-4])
    plain, left = Place.move, moves

    def move(self: Place, to: Place) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        plain(self, to)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched, opened(local) as run:
        patched.setattr(Place, "move", move)
        run.mend()
    with opened(local) as run:
        run.mend()
        assert run.records() == [] and not (local / "report.json").exists()
        do(run)
        run.mend()
        assert len(run.records()) == 1 and (local / "report.json").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data.replace(b'"round": 0', b'"round": 1')], ids=["cut", "other round"]
)
def test_a_record_that_cannot_be_read_is_set_aside_and_rebuilt(place: Place, damage: Any) -> None:
    file = damaged(place, "round-00/record.json", damage)
    cut = file.read_bytes()
    with opened(place) as run:
        run.mend()
        assert run.records() == []
        run.round(0).once("measure", never)
    assert cut in [data for name, data in contents(place).items() if name.startswith("damaged/")]


def test_what_a_stage_cannot_read_of_its_own_is_set_aside_and_the_stage_done_without_it(place: Place) -> None:
    def killed(out: Stage) -> None:
        (out.resume / "state/step-7").write_bytes(b"half")
        raise KeyboardInterrupt

    def goes_on(out: Stage) -> None:
        if (out.resume / "state/step-7").exists():
            raise Damaged("step-7: cannot be read", (out.resume / "state").uri)
        numbers(3, out)

    with opened(place) as run, pytest.raises(KeyboardInterrupt):
        run.once("student", killed)
    with opened(place) as run:
        assert run.once("student", goes_on) == {"sum": 3}
    assert [data for name, data in contents(place).items() if name.startswith("damaged/")] == [b"half"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"identity": 7, "starts": []}'])
def test_a_corrupt_recipe_of_the_run_is_named(local: Place, content: bytes) -> None:
    enter(local)
    (local / "recipe.json").write_bytes(content)
    message = refused(lambda: enter(local))
    assert message.startswith(f"{local.uri}/recipe.json: ") and "--run-dir" in message
    assert (local / "recipe.json").read_bytes() == content


# -- whose directory it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, key, old, new",
    [
        ({"seed": 5}, "seed", "0", "5"),
        ({"student": {"model": "small/other", "tokens": 1000}}, "student.model", '"small/student"', '"small/other"'),
        ({"student": {"model": "small/student", "epochs": 2.0}}, "student.epochs", "null", "2.0"),
    ],
)
def test_another_identity_is_refused_with_the_key_and_both_values(
    place: Place, changes: Any, key: str, old: str, new: str
) -> None:
    enter(place)
    before = (place / "recipe.json").read_bytes()
    message = refused(lambda: enter(place, changes))
    assert message.startswith(f"{place.uri}: this run has {key} = {old}, the recipe says {new}; ")
    assert "give another --run-dir, or set the key back" in message
    assert (place / "recipe.json").read_bytes() == before
    enter(place)  # and its own recipe still has it


def test_other_weights_behind_the_same_name_are_another_identity(local: Place) -> None:
    enter(local)
    message = refused(lambda: enter(local, weights={**WEIGHTS, "student.model": "cccc"}))
    assert 'weights of student.model = "bbbb", the recipe says "cccc"' in message


def test_more_rounds_other_tests_and_another_placement_go_on(place: Place) -> None:
    enter(place)
    data = {"train": "gsm8k", "tests": ["gsm8k", "svamp"], "dir": "/data"}
    enter(place, {"rounds": 9, "data": data, "teacher": {"model": "big/teacher", "engine": {"replicas": 2}}})
    assert (place / "recipe.json").read_json("")["recipe"]["rounds"] == 9


def test_a_folder_with_other_things_in_it_is_refused_and_left_as_it_was(place: Place) -> None:
    (place / "thesis" / "chapter.tex").write_bytes(b"years of work")
    message = refused(lambda: enter(place))
    assert message == f"{place.uri}: not empty and not a run directory; give another --run-dir"
    assert contents(place) == {"thesis/chapter.tex": b"years of work"}
    assert not (place / "lock.json").exists()


def test_a_file_in_place_of_the_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for name in ("notes", "notes/run"):
        assert refused(lambda name=name: enter(Place(str(tmp_path / name)))).startswith(f"{tmp_path / name}")
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_bucket_that_is_not_there_is_refused(s3: str) -> None:
    uri = f"s3://no-such-bucket/run?endpoint_override={s3}&scheme=http&region=us-east-1"
    assert "no-such-bucket" in refused(lambda: enter(Place(uri)))


# -- one driver at a time -----------------------------------------------------------------------------------------------

HOLD = """
    import sys, time
    from undo_ray.config import Recipe
    from undo_ray.progress import Progress
    from undo_ray.store import open_run

    recipe = Recipe.model_validate_json(sys.argv[2])
    with open_run(sys.argv[1], recipe, {"teacher.model": "aaaa", "student.model": "bbbb"}, Progress()):
        print("held", flush=True)
        time.sleep(60)
"""


def held_by(place: Place) -> tuple[int, str]:
    """Process id and token of the driver that holds a run directory."""
    lock = (place / "lock.json").read_json("")
    return lock["pid"], lock["token"]


def driver(code: str, place: Place, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), place.uri, recipe().model_dump_json(), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture
def holder(place: Place) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `place`."""
    process = driver(HOLD, place)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_driver_is_refused_with_pid_host_and_since_until_the_first_is_dead(
    place: Place, holder: subprocess.Popen[str]
) -> None:
    message = refused(lambda: enter(place))
    assert re.match(
        rf"{re.escape((place / 'lock.json').uri)}: held by pid {holder.pid} on {re.escape(socket.gethostname())} "
        r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ; wait for it, or stop it and run the same command$",
        message,
    )
    holder.kill()
    while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:  # dead, but its parent has not asked yet
        time.sleep(0.01)
    with opened(place) as run:
        assert held_by(place) == (os.getpid(), run.lease.token)
    holder.wait()


def test_a_dead_drivers_directory_is_free_once_it_is_reaped(place: Place, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert held_by(place)[0] == holder.pid
    with opened(place) as run:
        assert held_by(place) == (os.getpid(), run.lease.token)
    assert not (place / "lock.json").exists()


NOBODY = 2**22 + 1
"""A process id that Linux gives to no process."""


def lease_of_another(place: Place, **known: Any) -> None:
    """Turn the lease into one of another driver: of this machine, and dead, unless `known` says otherwise."""
    lock = (place / "lock.json").read_json("")
    (place / "lock.json").write_json({**lock, "token": "0" * 32, "pid": NOBODY, **known})


@pytest.mark.parametrize("ahead", [-1000, 0, 1000])
def test_the_lease_of_another_machine_is_respected_until_it_is_not_renewed(
    local: Place, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Whatever its clock says."""
    with opened(local):
        content = (local / "lock.json").read_bytes()
    (local / "lock.json").write_bytes(content)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 6)
    stop = threading.Event()

    def renew() -> None:
        lease_of_another(local, host="elsewhere", machine="another", pid=1, renewed=time.time() + ahead)

    def work() -> None:
        while not stop.wait(0.1):
            renew()

    renew()
    driver = threading.Thread(target=work)
    driver.start()
    try:
        assert "held by pid 1 on elsewhere since" in refused(lambda: enter(local))
    finally:
        stop.set()
        driver.join()
    assert held_by(local) == (1, "0" * 32)
    began = time.monotonic()
    with opened(local) as run:
        assert held_by(local) == (os.getpid(), run.lease.token)
    assert time.monotonic() - began >= 2, "as long as a holder may be late with its sign of life"


def test_a_host_of_the_same_name_is_not_taken_for_this_machine(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers of a machine may share its name; in each the other's process ids are nobody's."""
    with opened(local):
        content = (local / "lock.json").read_bytes()
    (local / "lock.json").write_bytes(content)
    lease_of_another(local, machine="another")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 30)
    threading.Timer(1, lease_of_another, (local,), {"machine": "another", "renewed": time.time() + 1}).start()
    assert f"held by pid {NOBODY} on {socket.gethostname()} since" in refused(lambda: enter(local))


def test_of_drivers_that_find_a_dead_lease_together_one_takes_the_directory(local: Place) -> None:
    with opened(local):
        content = (local / "lock.json").read_bytes()
    for _ in range(100):
        (local / "lock.json").write_bytes(content)
        lease_of_another(local)
        together, taken = threading.Barrier(6), list[lease.Lease]()

        def take(together: threading.Barrier = together, taken: list[lease.Lease] = taken) -> None:
            together.wait()
            with contextlib.suppress(UserError):
                taken.append(lease.Lease.take(local, print))

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [holder] = taken
        holder.check()
        holder.release()
    assert not [name for name in local.names() if name.startswith("lock.json")]


def test_a_driver_that_died_as_it_took_over_holds_nobody_up_for_long(local: Place) -> None:
    with opened(local):
        content = (local / "lock.json").read_bytes()
    (local / "lock.json").write_bytes(content)
    lease_of_another(local)
    claim = Path(local.path, f"lock.json.{'0' * 32}.dead")
    claim.touch()
    assert "another driver takes this run directory at the same time" in refused(lambda: enter(local))
    os.utime(claim, (0, time.time() - lease.LEASE_SECONDS - 1))
    with opened(local) as run:
        run.lease.check()
    assert not claim.exists()


def test_a_lease_that_was_never_written_whole_holds_nobody_up(place: Place) -> None:
    (place / "lock.json").write_bytes(b'{"token": "')
    with opened(place) as run:
        assert held_by(place) == (os.getpid(), run.lease.token)


def test_a_driver_that_wakes_up_after_another_took_over_cannot_commit(place: Place) -> None:
    with opened(place) as asleep:
        step = asleep.round(0)
        step.once("rationales", numbers, 3)
        committed = contents(place)
        lease_of_another(place)
        with opened(place) as heir:
            message = refused(lambda: step.once("measure", numbers, 4))
            assert message.endswith(
                f"pid {os.getpid()} on {socket.gethostname()} has taken this run directory over; this driver stops"
            )
            refused(lambda: step.commit())
            assert committed.items() <= contents(place).items()
            assert not (place / "round-00" / "measure" / "manifest.json").exists()
            assert not (place / "round-00" / "record.json").exists()
            assert heir.round(0).once("rationales", never) == {"sum": 3}
            assert heir.round(0).once("measure", numbers, 5) == {"sum": 10}
        with opened(place):
            asleep.lease.release()  # the one that woke up leaves: what it no longer holds stays
            assert (place / "lock.json").exists()


def renewal(run_dir: Place, after: float = 0.0) -> float:
    """When the lease was last renewed, once that is later than `after`."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        renewed = (run_dir / "lock.json").read_json("")["renewed"]
        if renewed > after:
            return float(renewed)
        time.sleep(0.005)
    raise AssertionError("the lease was not renewed")


def test_a_lease_is_renewed_while_it_is_held(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    with opened(local) as run:
        renewal(local, after=renewal(local))
        run.lease.check()


def test_a_passing_storage_error_does_not_end_the_renewals(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    with opened(local):
        lock, aside, loop = (Path(local.path) / name for name in ("lock.json", "aside", "loop"))
        last = renewal(local, after=renewal(local))  # the next is 0.1 s away
        # Each step is atomic: a lock that is gone for a moment would be one that somebody else took away.
        os.link(lock, aside)
        loop.symlink_to(lock)
        loop.replace(lock)  # reading it fails, but not because it is gone
        time.sleep(0.3)
        aside.replace(lock)
        renewal(local, after=last)


# -- SIGKILL at any moment ----------------------------------------------------------------------------------------------

DRIVE = """
    import os, signal, sys
    from undo_ray.config import Recipe
    from undo_ray.progress import Progress
    from undo_ray.store import open_run

    left = int(sys.argv[3])

    def deadly(function):
        def call(*arguments, **options):
            global left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **options)
        return call

    for name in ("link", "unlink", "replace", "fsync"):  # all that changes what others see of a small file
        setattr(os, name, deadly(getattr(os, name)))

    def value(n, out):
        out.value = n

    recipe = Recipe.model_validate_json(sys.argv[2])
    with open_run(sys.argv[1], recipe, {"teacher.model": "aaaa", "student.model": "bbbb"}, Progress()) as run:
        step = run.round(0)
        step.once("first", value, 1)
        step.once("second", value, 2)
        step.commit()
    print(left, flush=True)
"""


def test_after_a_sigkill_at_any_moment_the_same_command_goes_on(tmp_path: Path) -> None:
    whole = driver(DRIVE, Place(str(tmp_path / "whole")), "1000")
    assert whole.stdout is not None
    moments = 1000 - int(whole.communicate()[0])
    assert whole.returncode == 0 and moments >= 8
    failures = {}
    for first in range(0, moments, 2):  # two at a time
        drivers = {
            moment: driver(DRIVE, Place(str(tmp_path / f"run{moment}")), str(moment))
            for moment in range(first, min(first + 2, moments))
        }
        for moment, process in drivers.items():
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            place = Place(str(tmp_path / f"run{moment}"))
            committed = {path for path in ("first", "second") if (place / "round-00" / path / "manifest.json").exists()}
            try:
                with opened(place) as run:
                    step = run.round(0)
                    for value, name in enumerate(("first", "second"), 1):
                        function = never if name in committed else lambda out, value=value: setattr(out, "value", value)
                        assert step.once(name, function) == value
                    step.commit()
                    assert [record["round"] for record in run.records()] == [0]
            except Exception as error:
                failures[moment] = f"{type(error).__name__}: {error}"
    assert not failures, "\n" + "\n".join(f"killed at moment {moment}: {error}" for moment, error in failures.items())


def test_a_run_goes_on_with_the_hub_commits_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home, commits = tmp_path / "hub/models--org--model", {"old": "0" * 40, "new": "1" * 40}
    for seed, commit in enumerate(commits.values()):
        tiny.make(home / "snapshots" / commit, "llama", ["a few words"], seed=seed)
    main = home / "refs/main"
    main.parent.mkdir()
    main.write_text(commits["old"])
    models = {role: {"model": "org/model"} for role in ("teacher", "student")}
    spec = recipe(teacher=models["teacher"], student={**models["student"], "tokens": 1000})

    def begin(name: str) -> dict[str, str]:
        run_dir = str(tmp_path / name)
        found = loop.checked(spec, ("teacher", "student"), known_identity(run_dir))
        with open_run(run_dir, spec, found, Progress()):
            return found

    known = begin("run")
    assert known == {"teacher.model": commits["old"], "student.model": commits["old"]}
    main.write_text(commits["new"])
    assert begin("run") == known
    assert begin("another")["teacher.model"] == commits["new"]
