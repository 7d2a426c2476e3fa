"""Lessons to tokens, once, in Ray tasks: which tokens carry loss, and which chats are kept for measuring alone."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads

from undo_ray import models
from undo_ray.config import Recipe, digest, identity
from undo_ray.place import Place
from undo_ray.types import Message, UserError

if TYPE_CHECKING:
    from ray.data import Dataset

Key = tuple[str, int]
"""A chat's name: (problem id, round of its rationale)."""

TOKENS = pa.schema(
    [
        ("id", pa.string()),
        ("round", pa.int64()),
        ("input_ids", pa.large_list(pa.int32())),  # of all lessons more than 2³¹ tokens, in one table
        ("prompt", pa.int32()),
        ("error", pa.string()),
    ]
)
"""A tokenised chat; the first `prompt` of its `input_ids` carry no loss. `error` says why there are no tokens."""


def content_key(lessons: Dataset, start: str, recipe: Recipe) -> str:
    """What a training run is made of, as a short hash: the lessons, the model it starts from, and every key that counts.

    Files of a committed stage never change, so their names stand for what is in them; rows in memory are hashed.
    """
    files = [path.split("/")[-3:] for path in sorted(lessons.input_files())]
    if not files:
        batches = lessons.iter_batches(batch_format="pyarrow")
        files = [[hashlib.sha256(repr(batch.to_pylist()).encode()).hexdigest() for batch in batches]]
    return digest([files, start, identity(recipe)])


def tokenise(lessons: Dataset, start: str, recipe: Recipe, place: Place) -> dict[str, Any]:
    """Write the lessons as `TOKENS` Parquet; returns {chats, too_long, sample}, the sample decoded with its mask.

    Raises UserError when a chat has no supervised tokens or none fits `student.max_length`.
    """
    place.remove()
    place.fs.create_dir(place.path, recursive=True)
    total, limit = lessons.count(), recipe.student.max_length
    template, trust = recipe.student.engine.chat_template_kwargs, recipe.student.trust_remote_code
    to_tokens = partial(_tokens_of, start=start, seed=recipe.seed, trust=trust, max_length=limit, template=template)
    lessons.map_batches(to_tokens, batch_format="pyarrow", zero_copy_batch=True).write_parquet(place.path, filesystem=place.fs)
    written = pads.dataset(place.path, filesystem=place.fs, schema=TOKENS)
    kept = written.count_rows()
    if kept == 0:
        raise UserError(f"student.max_length = {limit}: none of the {total} lessons fits; raise it", exit_code=2)
    if refused := written.to_table(filter=pads.field("error").is_valid(), columns=["error"]).to_pylist():
        raise UserError(f"{refused[0]['error']} ({len(refused)} of {total} lessons)", exit_code=2)
    [row] = written.head(1).to_pylist()
    return {
        "chats": kept,
        "too_long": total - kept,
        "sample": _shown(row, models.tokenizer(models.local(start, recipe.seed, weights=False), trust)),
    }


def _tokens_of(table: pa.Table, start: str, seed: int, trust: bool, max_length: int, template: dict[str, Any]) -> pa.Table:
    tokenizer = models.tokenizer(models.local(start, seed, weights=False), trust)
    rows = []
    for row in table.to_pylist():
        name = {"id": row["id"], "round": row["round"]}
        try:
            input_ids, prompt = supervised(tokenizer, row["messages"], **template)
        except Exception as error:  # a template raises what it likes: data, so that no task is tried again for it
            why = str(error) if isinstance(error, UserError) else f"the student's chat template refuses this chat ({error})"
            rows.append({**name, "input_ids": [], "prompt": 0, "error": why})
            continue
        if len(input_ids) <= max_length:
            rows.append({**name, "input_ids": input_ids, "prompt": prompt, "error": None})
    return pa.Table.from_pylist(rows, schema=TOKENS)


def supervised(tokenizer: Any, messages: list[Message], **template: Any) -> tuple[list[int], int]:
    """(token ids of the whole chat, how many of them are prompt), told apart by token prefix.

    `template`: further variables of the chat template, those the student is asked with.

    Raises UserError, showing the chat as the model would see it, when the template leaves the assistant nothing to learn or
    rewrites what came before it.
    """
    # Empty lines at the start would be one token with the line break that ends the prompt.
    messages = [*messages[:-1], {**messages[-1], "content": re.sub(r"^\s*\n", "", messages[-1]["content"])}]
    render = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False, **template)
    prompt = list(render(messages[:-1], add_generation_prompt=True))
    whole = list(render(messages))
    answer = tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)
    # Through the tokenizer once: normalisation and special tokens spelt out in the text are no fault of the template.
    content = tokenizer.decode(
        tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"], skip_special_tokens=True
    )
    if whole[: len(prompt)] != prompt or not answer.strip() or content.strip() not in answer:
        raise UserError(
            "the student's chat template drops or rewrites part of this chat, so the answer cannot be told from the prompt; "
            f"use another template. The chat as the model would see it: {tokenizer.decode(whole)!r}"
        )
    return whole, len(prompt)


def _shown(row: dict[str, Any], tokenizer: Any) -> str:
    """One chat as text, with what carries loss marked off."""
    prompt, answer = (tokenizer.decode(ids) for ids in (row["input_ids"][: row["prompt"]], row["input_ids"][row["prompt"] :]))
    return f"no loss on {_cut(prompt)!r}, loss on {_cut(answer)!r}"


def _cut(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def held_out(key: Key, seed: int, share: float) -> bool:
    """Whether a question is kept for measuring alone: a hash of (seed, problem id), so the same in every round."""
    hashed = hashlib.sha256(repr((seed, "held out", key[0])).encode()).digest()
    return int.from_bytes(hashed[:8], "big") < share * 2**64
