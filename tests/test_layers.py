"""Who imports whom, read off the syntax trees; what the light modules pull in; how long driver and package are."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "undo_ray"

LAYERS = (
    ("written",),
    ("types",),
    ("config", "frame", "prompts", "grading", "progress"),
    ("place", "track"),
    ("lease",),
    ("gap", "store"),
    ("tasks", "models", "clean"),
    ("problems", "engines", "train"),
    ("generate", "lessons", "placement"),
    ("report", "regrade"),
    ("loop", "plan", "serve", "status"),
    ("cli",),
    ("__main__",),
)
"""Imports point downwards only: a module may import those of the rows above its own, and no other of its row."""

NEVER = {
    "engines": {"prompts", "gap", "frame", "grading", "tasks", "store"},  # text in, text out
    "train": {"prompts", "gap", "frame", "grading", "tasks", "engines"},  # chats in, model out
    "gap": {"store", "config"},  # pure
    "store": {"gap", "prompts", "tasks", "models"},
}
"""Closer than the rows: what a module must know nothing of."""

LIGHT = ("types", "config", "prompts", "frame", "grading", "gap")
HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "datasets")

CODE_LINES = 8_300
DRIVER_LINES = 40


def modules() -> dict[str, Path]:
    """Dotted name below `undo_ray` -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imported(path: Path, within: str) -> set[str]:
    """Dotted names below `undo_ray` that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write undo_ray.…"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "undo_ray":
                while rest and rest not in MODULES:  # a name inside a module
                    rest = rest.rpartition(".")[0]
                found.add(rest)
    return {name for name in found if name and name != within}


def part(name: str) -> str:
    return name.partition(".")[0]


OUTSIDE_MINI = [name for name in MODULES if name and part(name) != "mini"]


def test_every_module_has_its_layer() -> None:
    assert {part(name) for name in OUTSIDE_MINI} == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("name", OUTSIDE_MINI)
def test_imports_point_downwards(name: str) -> None:
    below: set[str] = set()
    for layer in LAYERS:
        if part(name) in layer:
            break
        below.update(layer)
    wrong = {other for other in imported(MODULES[name], name) if part(other) not in {*below, part(name), "mini"}}
    assert not wrong, f"undo_ray.{name} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("name", [name for name in OUTSIDE_MINI if part(name) in NEVER])
def test_engines_training_and_gap_know_nothing_of_one_another(name: str) -> None:
    assert not {part(other) for other in imported(MODULES[name], name)} & NEVER[part(name)]


def test_only_its_task_and_the_command_line_import_the_miniature_world() -> None:
    found = {name for name in OUTSIDE_MINI if any(part(other) == "mini" for other in imported(MODULES[name], name))}
    assert found == {"tasks.mini", "cli"}


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) == "mini"])
def test_the_miniature_world_imports_no_part_of_the_loop(name: str) -> None:
    known = {part(other) for other in imported(MODULES[name], name)}
    assert known <= {"mini", "types", "prompts", "grading", "tasks", "frame", "gap"}


def test_only_the_loop_imports_the_loop_and_the_command_line_it() -> None:
    importers = {name for name in MODULES if "loop" in imported(MODULES[name], name)}
    assert importers == {"cli"}


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_pulls_in_nothing_heavy(name: str) -> None:
    code = f"import sys, undo_ray.{name}; print(*sorted(set({HEAVY!r}) & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_the_driver_fits_one_screen() -> None:
    tree = ast.parse(MODULES["loop"].read_text(encoding="utf-8"))
    [undo] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "undo"]
    assert undo.end_lineno is not None
    assert undo.end_lineno - undo.body[0].lineno + 1 <= DRIVER_LINES


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    source = path.read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            code.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(code)


def test_lines_of_code_are_counted_as_one_would_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    code = ['x = """a', 'b"""  # counted: code', "def f():", "    return (", "        1", "    )"]
    path.write_text("\n".join(['"""Doc.', "", 'More."""', "# comment", *code[:3], '    "doc"', "", *code[3:]]))
    assert code_lines(path) == len(code)


def test_the_package_without_the_miniature_world_stays_small() -> None:
    counts = {name or "__init__": code_lines(MODULES[name]) for name in ["", *OUTSIDE_MINI]}
    assert sum(counts.values()) <= CODE_LINES, sorted(counts.items(), key=lambda item: -item[1])
