"""Answers that want to hang, crash, grow, or run something; and graders of our own that try to break out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from undo_ray.types import Verdict

DEEP = 100_000

TEXTS = {
    "power": "9**9**9**9",
    "tower": "$5^(5^(5^(5^5)))$",
    "tower in a box": r"\boxed{5^{5^{5^{5^5}}}}",
    "factorial": r"\boxed{10000!!!!}",
    "sum": r"\boxed{\sum_{n=1}^{100000000} \frac{1}{n}}",
    "binomial": r"\boxed{\binom{10^9}{5\cdot 10^8}}",
    "memory": r"\boxed{10^{10^{10}} - 10^{10^{10}-1}}",
    "a million digits": "1" * 1_000_000,
    "a million digits in a box": r"\boxed{" + "7" * 1_000_000 + "}",
    "braces": "{" * DEEP + "1" + "}" * DEEP,
    "braces in a box": r"\boxed{" + "{" * DEEP + "1" + "}" * DEEP + "}",
    "open braces": r"\boxed{" * DEEP,
    "deep fractions": r"\boxed{" + r"\frac{1}{" * 200 + "2" + "}" * 200 + "}",
    "fractions": r"\boxed{" + r"\frac{1}{1+" * 18 + "2" + "}" * 18 + "}",
    "roots": r"\boxed{" + r"\sqrt" * 100 + "{2}}",
    "file": r"\boxed{\input{/etc/passwd}}",
    "unbalanced": r"\boxed{\frac{1}{2",
    "NUL": "\x00" * 1000 + r"\boxed{1}",
    "controls": "".join(map(chr, range(32))) + r"\boxed{\x07 3}",
    "lone surrogates": "\ud800 \\boxed{\ud800}",
    "right to left": "\u202e\\boxed{1}\u202c",
    "boxes": r"\boxed{1} " * 10_000,
    "dollars": "$" * DEEP,
    "formulas": "$a" * DEEP,
    "statements": "the answer is " * 10_000,
    "spaces": " " * 1_000_000,
    "signs": r"\boxed{" + r"1\pm 1" * 60 + "}",
}
"""None of them states 18."""


def payloads(canary: Path) -> list[str]:
    """Python that makes the canary file, in every place where a parser might evaluate it."""
    python = f"__import__('pathlib').Path('{canary}').touch()"
    shell = f"__import__('os').system('touch {canary}')"
    lam = f"(lambda: {python})()"
    comprehension = f"[{python} for _ in (1,)]"
    forms = ["{}", "${}$", r"\boxed{{{}}}", r"The final answer is ${}$.", "#### {}", "answer: {}", r"\(x = {}\)", r"\[{}\]"]
    bodies = [
        python,
        shell,
        lam,
        comprehension,
        f"1+{python}",
        rf"\text{{{python}}}",
        rf"\mathrm{{{shell}}}",
        rf"\frac{{{python}}}{{2}}",
    ]
    return [form.format(body) for form in forms for body in bodies]


def escape(text: str, problem: Mapping[str, Any]) -> Verdict:
    """A grader that tries what `text` names; its answer says whether it was stopped, and by what."""
    target = str(problem["answer"])

    def connect() -> None:
        socket.create_connection(("127.0.0.1", int(target)), timeout=2)

    attempts: dict[str, Callable[[], object]] = {
        "write": lambda: Path(target).write_text("here"),
        "append": lambda: os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        "remove": lambda: os.remove(target),
        "rename": lambda: os.rename(target, target + ".moved"),
        "mkdir": lambda: os.mkdir(target),
        "link": lambda: os.symlink("/", target),
        "run": lambda: subprocess.run(["touch", target], check=True),
        "shell": lambda: 0 if os.system(f"touch {target}") == 0 else _raise("the shell did not start"),
        "fork": os.fork,
        "socket": socket.socket,
        "connect": connect,
        "kill": lambda: os.kill(os.getppid(), signal.SIGTERM),
        "memory": lambda: bytearray(4 << 30),
    }
    try:
        attempts[text]()
    except Exception as error:
        return Verdict(False, f"stopped: {type(error).__name__}")
    return Verdict(True, "escaped")


def _raise(text: str) -> None:
    raise OSError(text)


def environment(text: str, problem: Mapping[str, Any]) -> Verdict:
    """A grader that reports what it can see of the secrets around it."""
    with open("/proc/self/environ", "rb") as file:
        seen = file.read().decode("utf-8", "replace") + repr(sorted(os.environ.items()))
    return Verdict(text in seen, ",".join(sorted(os.environ)))


def hang(text: str, problem: Mapping[str, Any]) -> Verdict:
    """A grader that never ends on `hang` and `sleep`, dies on `die` and `exit`, and is right on everything else."""
    while text == "hang":
        pass
    if text == "sleep":
        time.sleep(3600)
    if text == "die":
        os.abort()
    if text == "exit":
        sys.exit(3)
    if text == "slow":
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
    return Verdict(True, text)
