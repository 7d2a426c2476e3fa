"""Clean data: which questions repeat one another, and which share too much text with a test. Pure.

Two questions are the same when their words are, options of a multiple-choice question included. A training or
validation question overlaps with a test when they share a run of 8 words: the rule of open-r1's `scripts/decontaminate.py`
and of s1 (arXiv 2501.19393), which also ignores punctuation at the edges of words here. Two training questions are near
duplicates when the Jaccard similarity of their sets of 8-word runs is at least 0.8; one of fewer than 8 words has no such
run and is only ever compared whole. Runs are hashed to 64 bits, the same in every process.

A lesson written after a hint is a near copy of the reference solution when at least half of its runs stand there.

Questions of a templated task (`tasks.Task.templated`) share runs by construction: only equal ones count there.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from undo_ray.prompts import question_text
from undo_ray.types import Row

if TYPE_CHECKING:
    import numpy as np

    Hashes = np.ndarray[Any, np.dtype[np.uint64]]
    Indices = np.ndarray[Any, Any]

NGRAM: Final = 8
"""Words in a run."""
NEAR: Final = 0.8
"""Jaccard similarity from which two questions are near duplicates."""
CHUNK: Final = 5_000
"""Questions hashed at a time: bounds the memory that any number of them needs."""
COPY: Final = 0.5
"""Share of its runs (see `copied`) from which a lesson is a near copy of the reference solution."""
SLOTS: Final = 1 << 26
"""Bytes of the table that tells runs which occur once from those that may occur again."""

_EDGES: Final = ".,;:!?\"'`$“”‘’"
_MULTIPLIER: Final = 0x9E3779B97F4A7C15  # odd, so no word of a run is multiplied away; that of Knuth's multiplicative hash


def words(text: str) -> list[str]:
    """The words of a text: split at spaces, without letter case and punctuation at their edges; `$x$,` is `x`."""
    return [word.strip(_EDGES) or word for word in text.casefold().split()]


def normal(text: str) -> str:
    """A text without letter case, spacing and punctuation beside words: equal texts ask the same."""
    return " ".join(word for word in words(text) if word.strip(_EDGES))


def _key(text: str) -> bytes:
    return blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


@lru_cache(maxsize=1 << 16)
def _code(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def runs(texts: Iterable[str]) -> tuple[Hashes, Indices]:
    """(hashes, index of the text) of every run of 8 words, in the order of the texts and of their words."""
    import numpy as np

    codes, lengths = array("Q"), array("q")
    for text in texts:
        found = words(text)
        lengths.append(len(found))
        codes.extend(map(_code, found))
    code = np.frombuffer(codes, np.uint64) if codes else np.zeros(0, np.uint64)
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), np.frombuffer(lengths, np.int64) if lengths else 0)
    count = max(0, len(code) - NGRAM + 1)
    value = np.zeros(count, np.uint64)
    for k in range(NGRAM):
        value *= np.uint64(_MULTIPLIER)
        value += code[k : k + count]
    whole = owner[:count] == owner[NGRAM - 1 :] if count else np.zeros(0, bool)
    return value[whole], owner[:count][whole]


def hashes(texts: Iterable[str]) -> Hashes:
    """The different runs of all texts, sorted: what `leaks` looks lessons up in."""
    import numpy as np

    return np.unique(runs(texts)[0])


def _place(value: Hashes, held: Hashes) -> tuple[Indices, Indices]:
    """(index in the sorted `held`, whether it is there) of every value."""
    import numpy as np

    place = np.searchsorted(held, value)
    place[place == len(held)] = 0
    return place, held[place] == value if len(held) else np.zeros(len(value), bool)


def leaks(text: str, own: str, held: Hashes) -> str | None:
    """The first run of 8 words that `text` shares with `held` (see `hashes`) and that `own` does not hold; None is clean.

    `own` is the text of the problem that `text` was written for: what it quotes of that is no leak.
    """
    import numpy as np

    value, _ = runs([text])
    found = np.flatnonzero(_place(value, held)[1] & ~np.isin(value, runs([own])[0]))
    return " ".join(words(text)[found[0] : found[0] + NGRAM]) if len(found) else None


def copied(text: str, source: str, own: str) -> float:
    """Share of the runs of 8 words of `text` that `source` holds too; those of `own`, the text of its problem, do not count.

    A text without such runs is compared whole: 1 when its words are those of `source`, else 0.
    """
    import numpy as np

    value, _ = runs([text])
    value = value[~np.isin(value, runs([own])[0])]
    if not len(value):
        return float(normal(text) == normal(source))
    return float(np.isin(value, runs([source])[0]).mean())


class Tests:
    """Test questions, for looking up others among them."""

    def __init__(self, rows: Sequence[Row], templated: Collection[str] = (), ngrams: bool = True):
        """`rows` have `id`, `task`, `question`, `choices`. Only equal questions are found of the tasks in `templated`, and
        of all without `ngrams`."""
        import numpy as np

        self.ids = [row["id"] for row in rows]
        self.templated, self.ngrams = templated, ngrams
        self.equal: dict[bytes, str] = {}
        for row in rows:
            # With and without options: an open question may ask what a multiple-choice test does.
            for text in (question_text(row), row["question"]):
                self.equal.setdefault(_key(text), row["id"])
        value, owner = runs(row["question"] if self.compares(row) else "" for row in rows)
        self.held, first = np.unique(value, return_index=True)
        self.owner = owner[first]

    def compares(self, row: Row) -> bool:
        """Whether runs of this row's words say something."""
        return self.ngrams and row["task"] not in self.templated

    def find(self, rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
        """(index, finding) of the rows that ask or overlap with a test question; a finding is as `distinct` gives it."""
        import numpy as np

        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            value, owner = runs(row["question"] if self.compares(row) else "" for row in chunk)
            place, found = _place(value, self.held)
            hit = np.flatnonzero(found)
            shared = dict(zip(owner[hit][::-1].tolist(), hit[::-1].tolist(), strict=True))  # the first of each row
            for index, row in enumerate(chunk):
                if (match := self.equal.get(_key(question_text(row)))) is not None:
                    yield start + index, _finding(row, "test", match)
                elif index in shared:
                    at = shared[index] - int(np.searchsorted(owner, index))
                    gram = " ".join(words(row["question"])[at : at + NGRAM])
                    yield start + index, _finding(row, "test_ngram", self.ids[self.owner[place[shared[index]]]], gram)


def _finding(row: Row, kind: str, match: str, gram: str | None = None) -> Row:
    return {"id": row["id"], "kind": kind, "match": match, "ngram": gram}


def distinct(rows: Sequence[Row], limit: int | None, tests: Tests, before: Sequence[Row] = ()) -> tuple[list[Row], list[Row]]:
    """The first `limit` rows (None: all) that are clean, and a finding for every row passed over on the way.

    A finding is {id, kind, match, ngram}: the kinds are `test` and `test_ngram` (see `Tests`), `validation` and
    `validation_near` (repeats a row of `before`), `duplicate` and `duplicate_near` (repeats an earlier row); `match` is
    the id of what it repeats, `ngram` the first shared run.
    """
    taken = len(rows) if limit is None else min(len(rows), limit + limit // 8 + CHUNK)
    while True:
        findings = _findings(rows[:taken], tests, before)
        if taken == len(rows) or taken - len(findings) >= (limit or 0):
            break
        taken = min(len(rows), 2 * taken)  # what is found of a row depends on those before it alone
    kept: list[Row] = []
    removed: list[Row] = []
    for index, row in enumerate(rows[:taken]):
        if len(kept) == limit:
            break
        if index in findings:
            removed.append(findings[index])
        else:
            kept.append(row)
    return kept, removed


def _findings(rows: Sequence[Row], tests: Tests, before: Sequence[Row]) -> dict[int, Row]:
    found = dict(tests.find(rows))
    all_rows = [*before, *rows]
    seen: dict[bytes, int] = {}
    alone = []  # positions in all_rows of those that repeat nothing word by word
    for position, row in enumerate(all_rows):
        index = position - len(before)
        if index in found:
            continue
        first = seen.setdefault(_key(question_text(row)), position)
        if first == position or index < 0:
            alone.append(position)
        else:
            kind = "validation" if first < len(before) else "duplicate"
            found[index] = _finding(row, kind, all_rows[first]["id"])
    texts = [question_text(all_rows[position]) if tests.compares(all_rows[position]) else "" for position in alone]
    for later, earlier in near_duplicates(texts, fixed=len(before)).items():
        first, position = alone[earlier], alone[later]
        kind = "validation_near" if first < len(before) else "duplicate_near"
        found[position - len(before)] = _finding(all_rows[position], kind, all_rows[first]["id"])
    return found


def near_duplicates(texts: Sequence[str], fixed: int = 0) -> dict[int, int]:
    """Index of every text that is a near duplicate of an earlier one that stays -> the first such one.

    Exact, by prefix filtering (Bayardo et al. 2007, "Scaling up all pairs similarity search"): texts too few of whose runs
    occur elsewhere are dropped, and of the others the rarest runs alone are indexed. The first `fixed` texts stay whatever
    they repeat. Memory: a fixed table, and what those others need.
    """
    import numpy as np

    # How often a run occurs, up to 2, by a part of its hash. Two runs in one slot only keep more texts for the exact count.
    table = np.zeros(SLOTS, np.uint8)
    for _, value, _, _ in _sets(texts):
        slot, count = np.unique(value % SLOTS, return_counts=True)
        table[slot] = np.minimum(table[slot] + count, 2)
    sizes, values, owners = [], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for start, value, owner, size in _sets(texts):
        keep = _promising(owner, table[value % SLOTS] > 1, size)
        sizes += size.tolist()
        values.append(value[keep])
        owners.append(owner[keep] + start)
    del table
    value, owner, size = np.concatenate(values), np.concatenate(owners), np.array(sizes, np.int64)
    while True:
        _, inverse, count = np.unique(value, return_inverse=True, return_counts=True)
        keep = _promising(owner, count[inverse] > 1, size)
        if keep.all():
            break
        value, owner = value[keep], owner[keep]

    order = np.lexsort((value, count[inverse], owner))  # text by text, the rarest first
    value, owner = value[order], owner[order]
    members, starts = np.unique(owner, return_index=True)
    ends = [*starts[1:].tolist(), len(value)]
    sets: dict[int, frozenset[int]] = {}
    index: dict[int, list[int]] = defaultdict(list)
    near: dict[int, int] = {}
    for later, start, end in zip(members.tolist(), starts.tolist(), ends, strict=False):
        own, n = value[start:end].tolist(), sizes[later]
        prefix, mine = own[: len(own) - math.ceil(NEAR * n) + 1], frozenset(own)
        for earlier in sorted({other for run in prefix for other in index[run]}) if later >= fixed else ():
            common = len(mine & sets[earlier])
            if common >= NEAR * (n + sizes[earlier] - common):
                near[later] = earlier
                break
        else:
            sets[later] = mine
            for run in prefix:
                index[run].append(later)
    return near


def _sets(texts: Sequence[str]) -> Iterator[tuple[int, Hashes, Indices, Indices]]:
    """Chunk by chunk: the first text's index; its runs, each once a text, with their text's index in the chunk; the number
    of different runs of each text."""
    import numpy as np

    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        value, owner = runs(chunk)
        order = np.lexsort((value, owner))
        value, owner = value[order], owner[order]
        new = np.ones(len(value), bool)
        new[1:] = (value[1:] != value[:-1]) | (owner[1:] != owner[:-1])
        yield start, value[new], owner[new], np.bincount(owner[new], minlength=len(chunk))


def _promising(owner: Indices, shared: Indices, size: Indices) -> Indices:
    """Which runs still matter: shared ones, of texts with enough of them. J(a, b) >= t needs |a & b| >= t * max(|a|, |b|)."""
    import numpy as np

    enough = np.bincount(owner[shared], minlength=len(size)) >= NEAR * size
    return np.asarray(shared & enough[owner])
