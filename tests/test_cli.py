"""The command line: help and a bad recipe answer at once, and bad input ends in one line with its exit code.

Nothing here starts Ray: what a recipe, a folder or a model does wrong is found before, or in the first stage.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from undo_ray import cli, config, report
from undo_ray.progress import Progress
from undo_ray.store import open_run

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "ray", "vllm", "transformers", "datasets", "pyarrow.dataset")

RECIPE = """
[data]
train = "gsm8k/train"
tests = ["gsm8k"]
dir = "{data}"
show = 2
select = 3

[teacher]
model = "{model}"
template = "compact"

[student]
model = "{model}"
tokens = 1000
"""


def run(*command: str) -> tuple[int, str, str]:
    """A command in a process of its own, from the repository's root: exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def light(*arguments: str) -> tuple[int, str, str]:
    """`undo-ray ARGUMENTS` in a process of its own, which must not have imported anything heavy by its end."""
    code = (
        "import sys\n"
        "from undo_ray.cli import main\n"
        "try:\n"
        f"    code = main({list(arguments)!r})\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, f'imported {heavy}'\n"
        "sys.exit(code)\n"
    )
    return run("-c", code)


# -- at once ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["show", "--help"], ["mini", "train-teacher", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code, out, _ = light(*arguments)
    assert code == 0 and out.startswith("usage: undo-ray")


def test_the_version_is_that_of_the_package() -> None:
    import undo_ray

    assert light("--version") == run("-m", "undo_ray", "--version") == (0, f"undo-ray {undo_ray.__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["run", "r.toml", "--sett", "a=1"], ["mini", "train-teacher"]])
def test_wrong_arguments_end_with_the_usage(arguments: list[str]) -> None:
    code, _, err = light(*arguments)
    assert code == 2 and err.startswith("usage: undo-ray")


def test_a_bad_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("rounds = 2\nroundz = 3\n")
    code, out, err = light("run", str(path), "--run-dir", str(tmp_path / "run"))
    assert (code, out) == (2, "")
    assert err == f"undo-ray: {path}: data is missing; add it (and 3 more)\n"
    assert not (tmp_path / "run").exists()


def test_showing_what_is_no_run_imports_nothing_heavy(tmp_path: Path) -> None:
    code, out, err = light("show", str(tmp_path))
    assert (code, out) == (2, "")
    assert err == f"undo-ray: {tmp_path}: has no report.json; is it a run directory, and has the run finished?\n"


def test_the_job_takes_the_flags_of_the_command() -> None:
    assert run("jobs/undo.py", "--help") == light("run", "--help")


def test_the_job_ends_as_the_command_does(tmp_path: Path) -> None:
    job = run("jobs/undo.py", str(tmp_path / "none.toml"), "--set", "seed=1", "--run-dir", str(tmp_path / "run"), "-v")
    assert job[0] == 2
    assert job == light("run", str(tmp_path / "none.toml"), "--set", "seed=1", "--run-dir", str(tmp_path / "run"), "-v")


# -- bad input ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real model with its tokenizer and chat template."""
    import tiny

    return Path(tiny.make(tmp_path_factory.mktemp("models") / "tiny", "llama", ["How many pens are 2 and 3 pens?"]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with ten training questions and two test questions."""
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    for split, count in (("train", 10), ("test", 2)):
        rows = [{"id": str(i), "question": f"{split}: how many are {i} and 1?", "answer": str(i + 1)} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.parent


class Begun(Exception):
    """The loop was about to begin."""


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what needs a cluster: starting one, asking what it has, and the progress board on it."""
    from undo_ray import loop, placement

    monkeypatch.setattr(loop, "start_ray", lambda verbose: None)
    monkeypatch.setattr(placement, "check", lambda recipe, say: None)
    monkeypatch.setattr(Progress, "connect", lambda self, run: None)


@pytest.fixture
def no_loop(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from undo_ray import loop

    def begin(*_: Any) -> None:
        raise Begun

    monkeypatch.setattr(loop, "undo", begin)


class Command:
    """`undo-ray run` of one recipe in this process."""

    def __init__(self, folder: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]):
        self.recipe, self.run_dir, self.capsys = folder / "recipe.toml", folder / "run", capsys
        self.recipe.write_text(RECIPE.format(model=model, data=data))

    def __call__(self, *overrides: str) -> tuple[int, str, str]:
        sets = [part for override in overrides for part in ("--set", override)]
        code = cli.main(["run", str(self.recipe), "--run-dir", str(self.run_dir), *sets])
        return code, *self.capsys.readouterr()

    def refused(self, *overrides: str, code: int = 2) -> str:
        """The one line on stderr a run ends with, without the program's name."""
        found, out, err = self(*overrides)
        assert (found, out) == (code, ""), err
        *said, last = err.splitlines()
        assert all("undo-ray:" not in line for line in said)
        assert last.startswith("undo-ray: ")
        return last.removeprefix("undo-ray: ")


@pytest.fixture
def command(tmp_path: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    environment = dict(os.environ)  # the command quiets libraries through it
    yield Command(tmp_path, model, data, capsys)
    os.environ.clear()
    os.environ.update(environment)


def test_good_input_reaches_the_loop(command: Command, no_loop: None) -> None:
    with pytest.raises(Begun):
        command()


def emptied(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()


def without(*patterns: str) -> Any:
    def remove(model: Path) -> None:
        for pattern in patterns:
            for file in model.glob(pattern):
                file.unlink()

    return remove


def without_template(model: Path) -> None:
    without("chat_template.jinja")(model)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": None}))


def cut_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


def cut_config(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize("key", ["teacher.model", "student.model"])
@pytest.mark.parametrize(
    "damage, expected",
    [
        (emptied, "has no config.json; give a directory that transformers can load"),
        (without("*.safetensors"), "has no *.safetensors weights; save the model with save_pretrained"),
        (without("tokenizer*"), "its tokenizer does not load"),
        (without_template, "its tokenizer has no chat template; use an instruct model, or "),
    ],
    ids=["empty", "no weights", "no tokenizer", "no chat template"],
)
def test_a_folder_that_is_no_chat_model_is_named(
    command: Command, no_loop: None, model: Path, tmp_path: Path, key: str, damage: Any, expected: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    damage(broken)
    message = command.refused(f"{key}={broken}")
    assert message.startswith(f"{key}: ") and str(broken) in message and expected in message
    assert not command.run_dir.exists()


@pytest.mark.parametrize("damage", [cut_tokenizer, cut_config])
def test_a_model_with_an_unreadable_file_is_named(
    command: Command, no_loop: None, model: Path, tmp_path: Path, damage: Any
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    damage(broken)
    message = command.refused(f"student.model={broken}")
    assert message.startswith("student.model: ") and str(broken) in message


@pytest.mark.parametrize(
    "ref, expected",
    [
        ("/no/such/model", "has no config.json"),
        ("no-such-org/no-such-model", "no such directory, and the hub did not give it"),
        ("undo_ray.nothing:here", "write it as package.module:function"),
        ("undo_ray.mini.models:nothing", "write it as package.module:function"),
        ("file:///no/such/model", "has no config.json"),
        ("nowhere://model", "no file system for this URI"),
    ],
)
def test_a_model_that_leads_nowhere_is_named(command: Command, no_loop: None, ref: str, expected: str) -> None:
    message = command.refused(f"student.model={ref}")
    assert message.startswith("student.model: ") and ref in message and expected in message


def test_vllm_that_is_not_installed_is_named(command: Command, no_loop: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        """A finder of modules that does not find vllm."""

        def __init__(self, finder: Any):
            self.finder = finder

        def find_spec(self, name: str, *rest: Any) -> Any:
            return None if name.partition(".")[0] == "vllm" else self.finder.find_spec(name, *rest)

    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(finder) for finder in sys.meta_path])
    assert command.refused("teacher.engine.kind=vllm") == (
        'teacher.engine.kind = "vllm": vllm is not installed; install the gpu extra, or set it to "transformers"'
    )


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "data.train=gms8k",
            "task 'gms8k' is unknown; use one of gsm8k, math, mini, mmlu_pro, numina, strategyqa, svamp, theoremqa, "
            "or package.module:NAME for your own",
        ),
        ("data.validation=gms8k", "task 'gms8k' is unknown; use one of gsm8k, math, mini"),
        ("data.train=gsm8k/dev", "source 'gsm8k/dev': task gsm8k has no split 'dev'; use one of train, test"),
        ("data.train=my_tasks:MINE", "task 'my_tasks:MINE': no module 'my_tasks'; install it or put its folder on PYTHONPATH"),
        (
            "data.dir=/no/such/folder",
            "data folder /no/such/folder is not there; set data.dir to a folder with gsm8k/train.jsonl",
        ),
        ("data.train=svamp", "no file for svamp train in "),
        (
            "data.select=9",
            "validation larger than training: data.show + data.select = 11, but there are 10 different questions",
        ),
        ("data.select=8", "no training question is left beside 10 validation questions; lower data.show and data.select"),
    ],
)
def test_a_source_that_gives_no_questions_is_named(command: Command, no_ray: None, override: str, expected: str) -> None:
    assert command.refused(override).startswith(expected)


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"id": "x", "question": "how many?"}', "no column answer (there are id, question); gsm8k needs id, question, answer"),
        ('{"id": "0", "question": "how many?", "answer": "1"}', "id 'gsm8k/train/0' in rows 1 and 11; ids must differ"),
        ('{"id": "x", "question": " ", "answer": "1"}', "question must be a text that is not empty"),
        ('{"id": "x", "question": "how many?", "answer": "many"}', "answer 'many' is not a number; correct or drop the row"),
        ('{"id": "x"', "not JSON ("),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(
    command: Command, no_ray: None, data: Path, line: str, expected: str
) -> None:
    file = data / "gsm8k" / "train.jsonl"
    file.write_text(file.read_text() + line + "\n")
    message = command.refused()
    assert message.startswith(str(file)) and "11" in message and expected in message


def test_an_empty_split_is_named(command: Command, no_ray: None, data: Path) -> None:
    file = data / "gsm8k" / "train.jsonl"
    file.write_text("\n")
    assert command.refused() == f"{file}: split 'train' of gsm8k is empty; put rows in it or name another split"


@pytest.mark.parametrize(
    "tests, expected",
    [('["gms8k"]', "task 'gms8k' is unknown"), ('["gsm8k/dev"]', "no split 'dev'"), ('["gsm8k", "svamp"]', "svamp")],
)
def test_a_test_that_is_not_there_is_named_before_any_round(command: Command, no_loop: None, tests: str, expected: str) -> None:
    assert expected in command.refused(f"data.tests={tests}")


@pytest.mark.parametrize("tests", ['["gsm8k", "gsm8k/test"]', '["gsm8k/train"]'], ids=["twice", "the training questions"])
def test_a_test_named_twice_or_trained_on_is_refused(command: Command, no_loop: None, tests: str) -> None:
    assert "data.tests" in command.refused(f"data.tests={tests}")


# -- run directories ----------------------------------------------------------------------------------------------------


def test_a_run_of_another_identity_is_refused_with_key_and_both_values(command: Command, no_loop: None) -> None:
    with pytest.raises(Begun):
        command()
    before = (command.run_dir / "recipe.json").read_bytes()
    message = command.refused("seed=1", code=4)
    assert message.startswith(f"{command.run_dir}: this run has seed = 0, the recipe says 1; ")
    assert (command.run_dir / "recipe.json").read_bytes() == before
    assert not (command.run_dir / "lock.json").exists()


def test_a_model_that_was_changed_in_place_is_another_identity(
    command: Command, no_loop: None, model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    with pytest.raises(Begun):
        command(f"student.model={own}")
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert "this run has weights of student.model = " in command.refused(f"student.model={own}", code=4)


def test_a_folder_with_other_things_in_it_is_refused(command: Command, no_loop: None) -> None:
    command.run_dir.mkdir()
    (command.run_dir / "thesis.tex").write_text("years of work")
    assert command.refused(code=4) == f"{command.run_dir}: not empty and not a run directory; give another --run-dir"
    assert [path.name for path in command.run_dir.iterdir()] == ["thesis.tex"]


def test_a_finished_run_says_so_and_shows_its_table_without_starting_ray(
    command: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from undo_ray import loop, models

    recipe = config.load(command.recipe, ["data.tests=[]"])
    weights = {key: models.check(str(model), recipe.seed, key) for key in ("teacher.model", "student.model")}
    score = {"n": 3, "accuracy": 1 / 3, "low": 0.0615, "high": 0.7923, "unparsed": 0.0, "truncated": 0.0}
    figures = {
        "validation": score,
        "previous_train": None,
        "lessons": 5,
        "rationales": 5,
        "teacher_tokens": {"prompt": 10, "cached": 0, "completion": 20},
        "money": {"tokens": None, "gpus": None},
        "seconds": {"student": 1.0},
    }
    with open_run(str(command.run_dir), recipe, weights, Progress()) as held:
        report.write(held, [held.round(0).commit(**figures)], "rounds")

    def fail(verbose: bool) -> None:
        raise AssertionError("Ray was started for a finished run")

    monkeypatch.setattr(loop, "start_ray", fail)
    code, out, err = command("data.tests=[]")
    assert code == 0, err
    assert re.search(r"^0 \* +33\.3% \[6\.2%, 79\.2%\] of 3 +- +- +5 of 5", out, re.MULTILINE)
    assert out.endswith(f"\nrun: {command.run_dir}    report: {command.run_dir}/report.json\n")
    assert f"{command.run_dir}: this run is finished; raise `rounds` or give another --run-dir to do more" in err
    assert cli.main(["show", str(command.run_dir)]) == 0


def test_ctrl_c_says_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from undo_ray import loop

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "start_ray", interrupt)
    assert command.refused(code=130) == "stopped; the same command goes on from the last committed stage"
    assert not (command.run_dir / "lock.json").exists()
