"""Which tokens carry loss, and in which order chats are trained on. No worker and no model: a real tokenizer alone."""

import hashlib
from collections import Counter
from typing import Any

import pytest

from undo_ray.config import Student
from undo_ray.train import supervised, training_order
from undo_ray.types import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_ASSISTANT = CHATML.replace("{{ message.content }}", "{{ message.content if message.role == 'user' else '' }}")
REWRITES = "{{ messages | length }} " + CHATML
STRIPS_THINKING = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")


def tokenizer(template: str) -> Any:
    """A byte-level tokenizer, the same for any text, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = {piece: i for i, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
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
    [(NO_ASSISTANT, "4"), (REWRITES, "4"), (STRIPS_THINKING, "<think>2 + 2</think> 4"), (CHATML, ""), (CHATML, " \n")],
    ids=["drops the answer", "rewrites the prompt", "strips part of the answer", "empty answer", "blank answer"],
)
def test_a_chat_whose_answer_cannot_be_told_from_the_prompt_is_refused_and_shown(template: str, answer: str) -> None:
    with pytest.raises(UserError, match="chat template drops or rewrites part of this chat") as caught:
        supervised(tokenizer(template), chat("What is 2 + 2?", answer))
    assert "What is 2 + 2?" in str(caught.value) and "\n" not in str(caught.value)


def student(**keys: Any) -> Student:
    return Student.model_validate({"model": "m", **keys})


LENGTHS = {(f"gsm8k/train/{i}", 0): 10 + i for i in range(10)}


def test_an_epoch_takes_every_chat_once_in_the_order_of_a_hash() -> None:
    order = training_order(LENGTHS, 7, student(epochs=1, batch_size=5))
    expected = sorted(LENGTHS, key=lambda key: hashlib.sha256(repr((7, 0, *key)).encode()).digest())
    assert order == expected


def test_the_order_is_the_same_for_any_order_of_files_and_any_number_of_workers() -> None:
    spec, backwards = student(epochs=2, batch_size=4), dict(reversed(LENGTHS.items()))
    assert training_order(backwards, 7, spec) == training_order(LENGTHS, 7, spec)
    assert training_order(LENGTHS, 7, student(epochs=2, batch_size=4, workers=4)) == training_order(LENGTHS, 7, spec)


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    order = training_order(LENGTHS, 7, student(epochs=2, batch_size=5))
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(LENGTHS)
    assert order[:10] != order[10:]
    assert training_order(LENGTHS, 8, student(epochs=2, batch_size=5)) != order


@pytest.mark.parametrize(
    "epochs, batch_size, chats",
    [(1, 5, 10), (1, 4, 12), (1, 16, 16), (0.5, 5, 5), (0.5, 4, 8), (0.01, 4, 4), (2.5, 5, 25), (3, 16, 32)],
)
def test_epochs_are_rounded_up_to_whole_batches(epochs: float, batch_size: int, chats: int) -> None:
    order = training_order(LENGTHS, 7, student(epochs=epochs, batch_size=batch_size))
    assert len(order) == chats
    times = Counter(order).values()
    assert max(times) - min(times) <= 1 if len(times) == 10 else max(times) == 1


@pytest.mark.parametrize("tokens", [1, 29, 30, 31, 100, 1000])
def test_tokens_end_with_the_first_batch_that_reaches_them(tokens: int) -> None:
    lengths = dict.fromkeys(LENGTHS, 10)
    order = training_order(lengths, 7, student(tokens=tokens, batch_size=3))
    assert len(order) % 3 == 0
    assert 10 * len(order) >= tokens > 10 * (len(order) - 3)


def test_one_chat_fills_a_batch_by_itself() -> None:
    assert training_order({("a", 0): 10}, 0, student(tokens=15, batch_size=4)) == [("a", 0)] * 4


def test_the_same_question_of_two_rounds_is_two_chats() -> None:
    order = training_order({("a", 0): 5, ("a", 1): 5}, 0, student(epochs=1, batch_size=2))
    assert sorted(order) == [("a", 0), ("a", 1)]
