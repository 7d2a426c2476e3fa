"""The miniature world: its language, its splits, its models."""

import re
from pathlib import Path

import pytest

from undo_ray.mini import models, world

CASES = world.cases("train", 400, seed=0) + world.cases("test", 400, seed=0)


def answer_again(question: str, skill: str) -> int:
    """The answer from the question's text, without the generator."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if skill == "tens":
        return int(str(numbers[0])[0])
    if skill == "most":
        return sorted(numbers)[-1]
    return numbers[0] + (numbers[1] if skill == "add" else -numbers[1])


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDO_RAY_CACHE", str(tmp_path))


def test_tokenizer_gives_every_text_back(tokenizer):
    for case in CASES:
        texts = [case.question, case.rationale("terse"), case.rationale("steps"), case.thought()]
        texts += [
            world.example_line(case.question, str(case.answer), True, None),
            world.own_line(case.question, case.rationale("steps"), False, "12"),
        ]
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_teacher_training_and_tokenizer_agree(tokenizer):
    from undo_ray.mini import teacher

    for case in CASES[:100]:
        assert teacher.encode(case.thought()) == tokenizer(case.thought())["input_ids"]


def test_splits_share_no_numbers():
    for seed in range(3):
        train, test = (world.cases(split, 400, seed) for split in ("train", "test"))
        assert not {(c.skill, c.numbers) for c in train} & {(c.skill, c.numbers) for c in test}


def test_problems_follow_from_the_seed():
    rows = world.problems("train", 100, seed=1)
    assert rows == world.problems("train", 100, seed=1) != world.problems("train", 100, seed=2)
    assert rows[:50] == world.problems("train", 50, seed=1)
    assert rows[17]["id"] == "mini/train/17"
    assert len({row["question"] for row in rows}) == 100
    assert {row["subject"] for row in rows} == set(world.SKILLS)
    with pytest.raises(ValueError, match="validation"):
        world.problems("validation", 1, seed=0)


def test_rationales_are_right():
    for case in CASES:
        answer = str(answer_again(case.question, case.skill))
        for style in ("terse", "steps"):
            text = case.rationale(style)
            assert world.answer_of(text) == answer
            assert world.style_of(text) == style
            for sides in re.findall(r"(\d+(?: [+-] \d+)+) = (\d+)", text):
                terms = re.findall(r"-?\d+", sides[0].replace("- ", "-"))
                assert sum(map(int, terms)) == int(sides[1])
        assert world.public(case.thought()) == case.rationale("terse")
        assert world.style_of(case.thought()) == "terse"


def test_feedback_lines():
    assert world.example_line("q?", "4", False, None) == "example q? tutor 4 score [0] student none"
    assert world.own_line("q?", None, True, "4") == "question q? before none score [1] student 4"


def test_chat_template(tokenizer):
    chat = [{"role": "user", "content": CASES[0].question}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == f"<bos> <user> {CASES[0].question} <assistant>"
    chat.append({"role": "assistant", "content": CASES[0].thought()})
    both = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, mask in zip(both["input_ids"], both["assistant_masks"], strict=True) if mask]
    assert both["input_ids"][: len(ids)] == ids
    assert tokenizer.decode(learned) == f"{CASES[0].thought()} <eos>"


def test_student_is_written_once_and_follows_from_its_seed():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = Path(models.student(0))
    weights = (first / "model.safetensors").read_bytes()
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert models.student(0) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert (Path(models.student(1)) / "model.safetensors").read_bytes() != weights
    first.rename(first.with_name("moved"))
    assert (Path(models.student(0)) / "model.safetensors").read_bytes() == weights
    assert {p.name for p in first.parent.iterdir()} == {first.name, "moved", Path(models.student(1)).name}

    model = AutoModelForCausalLM.from_pretrained(first)
    assert model.config.head_dim == 32
    assert 3e5 < model.num_parameters() < 5e5
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(first)(CASES[0].question) == models.tokenizer()(CASES[0].question)


def test_shipped_teacher():
    from transformers import AutoModelForCausalLM

    from undo_ray.mini import teacher

    directory = Path(models.teacher(0))
    assert sum(p.stat().st_size for p in directory.iterdir()) < 6_000_000
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert (model.config.head_dim, model.config.vocab_size) == (32, len(world.vocabulary()))
    fresh = world.cases("test", 100, seed=7)
    texts = teacher.generate(model.float().eval(), [case.question for case in fresh])
    right = [world.answer_of(t) == str(c.answer) for t, c in zip(texts, fresh, strict=True)]
    assert sum(right) >= 90
    assert {world.style_of(text) for text in texts} == {"terse"}
