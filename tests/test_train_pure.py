"""Which tokens carry loss, which chats a step takes and how they are packed, and what the loop decides. No model, no Ray."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from undo_ray.config import Student
from undo_ray.place import Place
from undo_ray.train import memory, worker
from undo_ray.train.packing import CHUNK, Steps, pack, rows_of, training_steps
from undo_ray.train.tokens import TOKENS, held_out, supervised
from undo_ray.types import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_ASSISTANT = CHATML.replace("{{ message.content }}", "{{ message.content if message.role == 'user' else '' }}")
REWRITES = "{{ messages | length }} " + CHATML
THINKS = (  # as Qwen3's: what a turn thought is taken apart and written anew
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and '</think>' in message.content %}"
    "{% set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "<think>\n{{ thought }}\n</think>\n\n{{ message.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_THINKING = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")


def tokenizer(template: str) -> Any:
    """A byte-level tokenizer, in which two line breaks are one token, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("Ċ", "Ċ")]))
    inner.normalizer = normalizers.NFC()  # as Qwen's
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = template
    return made


def chat(question: str, answer: str) -> Any:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("question, answer", [("What is 2 + 2?", "2 + 2 = 4"), ("¿Δ?", "  é\n\n#### 4 "), ("<|im_end|>", "1")])
def test_the_loss_lies_on_the_answer_and_its_end_alone(question: str, answer: str) -> None:
    made = tokenizer(CHATML)
    ids, prompt = supervised(made, chat(question, answer))
    assert made.decode(ids[:prompt]) == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert made.decode(ids[prompt:]) == f"{answer}<|im_end|>\n"


@pytest.mark.parametrize("lines", ["\n", "\n\n", " \n\n"])
def test_empty_lines_before_an_answer_are_no_token_of_the_prompt(lines: str) -> None:
    made = tokenizer(CHATML)
    assert made.decode(made("\n\n")["input_ids"]) == "\n\n" and len(made("\n\n")["input_ids"]) == 1
    assert supervised(made, chat("2 + 2?", lines + " 4")) == supervised(made, chat("2 + 2?", " 4"))


def test_text_that_the_tokenizer_normalises_is_still_a_lesson() -> None:
    made = tokenizer(CHATML)
    ids, prompt = supervised(made, chat("Estimate y\u0302.", "y\u0302 = 4"))  # y and a combining circumflex: one letter in NFC
    assert made.decode(ids[prompt:]) == "\u0177 = 4<|im_end|>\n"


def test_the_name_of_a_special_token_in_a_text_does_not_stop_the_training() -> None:
    made = tokenizer(CHATML)
    ids, prompt = supervised(made, chat("What ends a turn?", "The text <|im_end|> does."))
    assert 0 < prompt < len(ids)


def test_the_prompt_in_training_is_the_prompt_of_the_engine() -> None:
    from undo_ray.engines import prompt_ids

    made = tokenizer(CHATML)
    ids, prompt = supervised(made, chat("What is 2 + 2?", "4"))
    assert ids[:prompt] == prompt_ids(made, [{"role": "user", "content": "What is 2 + 2?"}])


@pytest.mark.parametrize(
    "template, answer",
    [
        (NO_ASSISTANT, "4"),
        (REWRITES, "4"),
        (STRIPS_THINKING, "<think>2 + 2</think> 4"),
        (THINKS, "<think>2 + 2</think> 4"),
        (CHATML, ""),
        (CHATML, " \n"),
    ],
    ids=["drops the answer", "rewrites the prompt", "strips part", "rewrites thoughts", "empty answer", "blank answer"],
)
def test_a_chat_whose_answer_cannot_be_told_from_the_prompt_is_refused_and_shown(template: str, answer: str) -> None:
    with pytest.raises(UserError, match="chat template drops or rewrites part of this chat") as caught:
        supervised(tokenizer(template), chat("What is 2 + 2?", answer))
    assert "What is 2 + 2?" in str(caught.value) and "\n" not in str(caught.value)


def student(**keys: Any) -> Student:
    return Student.model_validate({"model": "m", **keys})


LENGTHS = {(f"gsm8k/train/{i}", 0): 10 + i for i in range(10)}


def order(lengths: dict[Any, int], seed: int, spec: Student) -> list[Any]:
    return [key for step in training_steps(lengths, seed, spec) for key in step]


def test_an_epoch_takes_every_chat_once_in_the_order_of_a_hash() -> None:
    expected = sorted(LENGTHS, key=lambda key: hashlib.sha256(repr((7, 0, *key)).encode()).digest())
    assert order(LENGTHS, 7, student(epochs=1, batch_size=5)) == expected


def test_the_order_is_the_same_for_any_order_of_files_and_any_number_of_workers() -> None:
    spec, backwards = student(epochs=2, batch_size=4), dict(reversed(LENGTHS.items()))
    assert training_steps(backwards, 7, spec) == training_steps(LENGTHS, 7, spec)
    assert training_steps(LENGTHS, 7, student(epochs=2, batch_size=4, workers=4)) == training_steps(LENGTHS, 7, spec)


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    both = order(LENGTHS, 7, student(epochs=2, batch_size=5))
    assert sorted(both[:10]) == sorted(both[10:]) == sorted(LENGTHS)
    assert both[:10] != both[10:]
    assert order(LENGTHS, 8, student(epochs=2, batch_size=5)) != both


@pytest.mark.parametrize(
    "epochs, batch_size, chats",
    [(1, 5, 10), (1, 4, 12), (1, 16, 16), (0.5, 5, 5), (0.5, 4, 8), (0.01, 4, 4), (2.5, 5, 25), (3, 16, 32)],
)
def test_epochs_are_rounded_up_to_whole_batches(epochs: float, batch_size: int, chats: int) -> None:
    found = order(LENGTHS, 7, student(epochs=epochs, batch_size=batch_size))
    assert len(found) == chats
    times = Counter(found).values()
    assert max(times) - min(times) <= 1 if len(times) == 10 else max(times) == 1


@pytest.mark.parametrize("tokens", [1, 29, 30, 31, 100, 1000])
def test_tokens_end_with_the_first_batch_that_reaches_them(tokens: int) -> None:
    steps = training_steps(dict.fromkeys(LENGTHS, 10), 7, student(tokens=tokens, batch_size=3))
    assert all(len(step) == 3 for step in steps)
    assert 30 * len(steps) >= tokens > 30 * (len(steps) - 1)


def test_a_batch_in_tokens_ends_with_the_chat_that_reaches_it() -> None:
    steps = training_steps(LENGTHS, 7, student(epochs=3, batch_tokens=40))
    for step in steps:
        assert sum(LENGTHS[key] for key in step) >= 40 > sum(LENGTHS[key] for key in step[:-1])
    assert sum(map(len, steps)) >= 30


def test_one_chat_fills_a_batch_by_itself() -> None:
    assert training_steps({("a", 0): 10}, 0, student(tokens=15, batch_size=4)) == [[("a", 0)] * 4]


def test_the_same_question_of_two_rounds_is_two_chats() -> None:
    assert sorted(order({("a", 0): 5, ("a", 1): 5}, 0, student(epochs=1, batch_size=2))) == [("a", 0), ("a", 1)]


# -- rows ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 80), st.integers(1, 5))
def test_every_chat_lies_in_one_row_and_no_row_is_overfull(sizes: list[int], room: int, workers: int) -> None:
    lengths = {(str(i), 0): size for i, size in enumerate(sizes)}
    rows = rows_of(list(lengths), lengths, room, workers)
    assert sorted(key for row in rows for key in row) == sorted(lengths)
    assert max(sum(lengths[key] for key in row) for row in rows) <= max(room, *sizes)
    assert len(rows) % workers == 0, "all workers compute the same number of rows"


def test_a_step_repeats_a_chat_in_its_rows_as_often_as_it_takes_it() -> None:
    assert rows_of([("a", 0)] * 4, {("a", 0): 10}, 20, 2) == [[("a", 0)] * 2] * 2


def test_rows_are_as_even_as_they_can_be() -> None:
    lengths = {(str(i), 0): size for i, size in enumerate([50, 30, 30, 20, 10, 10, 10])}
    assert [sum(lengths[key] for key in row) for row in rows_of(list(lengths), lengths, 100, 2)] == [80, 80]


def packed(tmp_path: Path, workers: int, **keys: Any) -> tuple[Place, dict[str, Any]]:
    """Twenty chats, tokenised, as two or more files of Parquet and packed; chat i is 5 + i tokens that all are i."""
    rows = [{"id": f"c{i}", "round": 0, "input_ids": [i] * (5 + i), "prompt": 3, "error": None} for i in range(20)]
    (tmp_path / "tokens").mkdir(exist_ok=True)
    for part, chosen in enumerate((rows[12:], rows[:12])):
        pq.write_table(pa.Table.from_pylist(chosen, schema=TOKENS), tmp_path / f"tokens/{part}.parquet")
    place = Place(str(tmp_path / f"packed-{workers}"))
    spec = student(epochs=8, batch_size=2, workers=workers, held_out=0.2, max_length=64, **keys)
    return place, pack(Place(str(tmp_path / "tokens")), spec, 3, place)


def test_packed_files_hold_the_steps_whatever_the_workers(tmp_path: Path) -> None:
    spec = student(epochs=8, batch_size=2)
    held = {f"c{i}" for i in range(20) if held_out((f"c{i}", 0), 3, 0.2)}
    lengths = {(f"c{i}", 0): 5 + i for i in range(20) if f"c{i}" not in held}
    steps = training_steps(lengths, 3, spec)
    assert 0 < len(held) < 10 and len(steps) > CHUNK, "more than one file"
    for workers in (1, 3):
        place, plan = packed(tmp_path, workers)
        assert plan["steps"] == len(steps) and plan["held_out"] == len(held)
        assert plan["tokens"] == sum(lengths[key] for step in steps for key in step)
        readers = [Steps(place, rank, workers) for rank in range(workers)]
        for step in (0, 1, CHUNK - 1, CHUNK, len(steps) - 1, 2):
            found = [reader[step] for reader in readers]
            rows = [row for own, _ in found for row in own]
            assert sorted(id for row in rows for id in row["ids"]) == sorted(id for id, _ in steps[step])
            assert len({len(own) for own, _ in found}) == 1
            for row in rows:
                start = 0
                for id, length in zip(row["ids"], row["lengths"], strict=True):
                    assert row["input_ids"][start : start + length] == [int(id[1:])] * length
                    start += length
                assert start == len(row["input_ids"])
            expected = sum(lengths[key] - 3 for key in steps[step])
            assert {supervised for _, supervised in found} == {expected}
        measured = [id for reader in readers for row in reader.held_out()[0] for id in row["ids"]]
        assert sorted(measured) == sorted(held)


def test_a_question_is_held_out_in_every_round_or_in_none() -> None:
    chosen = [held_out((f"p{i}", 0), 1, 0.1) for i in range(2000)]
    assert chosen == [held_out((f"p{i}", 5), 1, 0.1) for i in range(2000)]
    assert 150 < sum(chosen) < 250 and chosen != [held_out((f"p{i}", 0), 2, 0.1) for i in range(2000)]


# -- the loop's arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_after_the_warm_up_the_learning_rate_is_that_of_transformers(schedule: str) -> None:
    import torch
    from transformers import get_scheduler

    spec = student(epochs=1, schedule=schedule, warmup=0.1, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=5, num_training_steps=50)
    for step in range(50):
        if step >= 5:
            assert worker.learning_rate(step, 50, spec) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    rising = [worker.learning_rate(step, 50, spec) for step in range(5)]
    assert rising == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5]), "no step is wasted at 0"


@pytest.mark.parametrize(
    "losses, norm, expected",
    [
        ([2.0, float("nan")], 1.0, "loss nan"),
        ([2.0, 1.9], float("inf"), "gradient norm inf"),
        ([2.0], 0.0, "the gradient is zero"),
        ([2.0] * 10 + [9.0] * 5, 1.0, "exploded from 2 to 9"),
    ],
)
def test_training_that_went_wrong_is_told_with_what_was_seen(losses: list[float], norm: float, expected: str) -> None:
    assert expected in str(worker.unhealthy(losses, norm))


@pytest.mark.parametrize("losses", [[2.0] * 10 + [30.0], [0.1] * 20, [5.0, 9.0, 9.0, 9.0], [2.0] * 20 + [5.0] * 9])
def test_one_hard_batch_is_no_explosion(losses: list[float]) -> None:
    assert worker.unhealthy(losses, 1.0) is None


def test_a_storage_error_that_passes_is_no_failure_and_one_that_stays_is() -> None:
    calls: list[int] = []

    def shaky() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("the store is away")

    worker.retried(shaky, wait=0.0)
    assert len(calls) == 3

    def broken() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        worker.retried(broken, wait=0.0)


def test_out_of_memory_is_told_from_other_errors_and_names_the_knobs_with_their_values() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert worker.out_of_memory(caught.value) and worker.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert not worker.out_of_memory(RuntimeError("shapes do not match"))
    advice = memory.advice(student(epochs=1, sharding="ddp", workers=2, micro_tokens=4096), None)
    assert all(
        part in advice
        for part in ("student.micro_tokens below 4096", "student.gradient_checkpointing=true", "now ddp", "more than 2 workers")
    )


@pytest.mark.parametrize(
    ("layout", "earlier", "goes_on"),
    [
        (("ddp", 1), ("ddp", 4), True),
        (("fsdp2", 1), ("fsdp2", 4), True),
        (("none", 1), ("fsdp2", 2), True),
        (("zero3", 2), ("zero3", 2), True),
        (("zero3", 1), ("zero3", 2), False),
        (("fsdp2", 2), ("zero2", 2), False),
        (("zero2", 2), ("ddp", 2), False),
    ],
)
def test_another_layout_goes_on_where_its_state_can_be_read_and_says_so_where_not(
    layout: tuple[str, int], earlier: tuple[str, int], goes_on: bool
) -> None:
    said = worker.refusal(layout, earlier)
    if goes_on:
        assert said is None
    else:
        assert said is not None and f"{layout[0]} on {layout[1]}" in said and f"{earlier[0]} on {earlier[1]}" in said
