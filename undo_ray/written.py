"""What may be shown and written down: text that steers no terminal, values that open no door.

Model output, datasets and endpoints are hostile input; recipes and addresses are copied into run directories, logs and reports,
which are shared. This module knows nothing of either: it looks at text alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_LOGIN = re.compile(r"\w[\w+.-]*://[^?#\s]*:[^?#\s]*@")
"""Up to the last @ before a query: a secret key with a slash in it is no host, but is a login all the same."""
_NAMED = re.compile(
    r"secret|passw|authorization|credential|signature|^(key|sig|token)$|(api|access|account|private|auth)[-_]?key"
    r"|(api|access|auth|bearer|hf|hub|security|session)[-_]?token",
    re.I,
)
_QUERY = re.compile(r"[?&]([^=&#\s]+)=[^&#\s]")
_VARIABLE = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|_KEY(_|$)|APIKEY")
SHORTEST = 8
"""Characters from which the value of such a variable is looked for: `TOKENIZERS_PARALLELISM=false` is none."""


def printable(text: str) -> str:
    """The text with whatever could steer a terminal spelt out: escape sequences, carriage returns, right-to-left marks.

    Example: `"\\x1b[2J"` becomes the six characters `\\x1b[2J`. Line ends stay.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


def secret_in(value: Any, name: str = "") -> str | None:
    """Why a value, named so, may not be written down: what it holds and the remedy, without repeating it; None when it may.

    Found are a login and a secret parameter in an address, an entry named like a secret in a table, and whatever a variable
    of the environment named like one holds. A secret that is none of these looks like any other text.
    """
    held = {
        known: variable
        for variable, known in os.environ.items()
        if _VARIABLE.search(variable) and len(known) >= SHORTEST and not os.path.exists(known)
    }
    for key, text in _texts(value, name):
        where = f"{key}: " if key else ""
        if _LOGIN.search(text):
            return f"{where}holds a login (user:password@), and is written to the run directory; {_ELSEWHERE}"
        if found := next((one for one in _QUERY.findall(text) if _NAMED.search(one)), None):
            return f"{where}holds a secret (the parameter {found}), and is written to the run directory; {_ELSEWHERE}"
        if text and "." in key and _NAMED.search(key.rpartition(".")[2]):
            return f"{where}is a secret by its name, and is written to the run directory; {_ELSEWHERE}"
        if found := next((variable for known, variable in held.items() if known in text), None):
            return f"{where}holds the value of ${found}, and is written to the run directory; leave it to the environment"
    return None


_ELSEWHERE = (
    "leave it out: keys come from the environment (AWS_SECRET_ACCESS_KEY, HF_TOKEN, the variable that endpoint.key_env names)"
)


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of everything in lists and tables, their keys included."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield name, str(key)
            yield from _texts(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item, name)
