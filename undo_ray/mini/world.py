"""The miniature world's language: questions, the two ways to explain them, and every word there is.

Four skills. From terse rationales (`so ...`) a very small student learns `most` and `tens` but not the sums of `add`
and `sub`; from those that write their steps out (`steps: ...`) it learns all four. All is plain Python and follows
from the seed. Two numbers never stand side by side: the tokenizer joins neighbouring digits when it decodes.
"""

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Style = Literal["terse", "steps"]

NAMES = ("tom", "ann", "sam", "eva", "ben", "mia", "leo", "zoe")
THINGS = ("cups", "pens", "books", "coins", "stones", "shells", "cards", "apples")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
FRAME = "example question tutor student score before none [0] [1] <think> </think>"
WORD = r"\[[01]\]|</?[a-z]+>|[0-9]|[a-z]+|[^\sa-z0-9]"
"""What one token is: a score, a tag, one digit, a word, or one sign."""

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Skill:
    """One kind of question: how to draw its numbers, ask it, answer it, and explain it in either style."""

    draw: Callable[[random.Random], Numbers]
    phrasings: tuple[str, ...]
    answer: Callable[[Numbers], int]
    terse: Callable[[Numbers], str]
    steps: Callable[[Numbers], str]


def _draw_sub(rng: random.Random) -> Numbers:
    a = rng.randint(20, 99)
    return a, rng.randint(10, a - 10)


def _draw_most(rng: random.Random) -> Numbers:
    return tuple(rng.sample(range(1, 10), 3))


def _add_steps(n: Numbers) -> str:
    (a, b), (x, y) = (divmod(v, 10) for v in n)
    carry = (b + y) // 10
    return f"units {b} + {y} = {b + y} carry {carry}. tens {a} + {x} + {carry} = {a + x + carry}."


def _sub_steps(n: Numbers) -> str:
    (a, b), (x, y) = (divmod(v, 10) for v in n)
    borrow = int(b < y)
    top = b + 10 * borrow
    return f"units {top} - {y} = {top - y} borrow {borrow}. tens {a} - {x} - {borrow} = {a - x - borrow}."


def _most_steps(n: Numbers) -> str:
    a, b, c = n
    return f"of {a} and {b} the larger is {max(a, b)}. of {max(a, b)} and {c} the larger is {max(n)}."


SKILLS: dict[str, Skill] = {
    "add": Skill(
        draw=lambda rng: (rng.randint(10, 99), rng.randint(10, 99)),
        phrasings=(
            "{n} has {a} {o} and finds {b} more. how many {o} are there in all?",
            "a box holds {a} {o} and a bag holds {b}. how many {o} are there in all?",
            "{n} buys {a} {o} and {m} buys {b}. how many {o} do they have in all?",
        ),
        answer=sum,
        terse=lambda n: f"{n[0]} + {n[1]} = {sum(n)}.",
        steps=_add_steps,
    ),
    "sub": Skill(
        draw=_draw_sub,
        phrasings=(
            "{n} has {a} {o} and loses {b}. how many {o} are left?",
            "there are {a} {o} and {n} takes {b} away. how many {o} are left?",
            "{n} had {a} {o} and sold {b}. how many {o} does {n} have left?",
        ),
        answer=lambda n: n[0] - n[1],
        terse=lambda n: f"{n[0]} - {n[1]} = {n[0] - n[1]}.",
        steps=_sub_steps,
    ),
    "most": Skill(
        draw=_draw_most,
        phrasings=(
            "{n} has {a} {o}, {m} has {b} and {k} has {c}. how many has the one with the most?",
            "{n} counts {a} {o}, {m} counts {b} and {k} counts {c}. how many {o} are the most?",
        ),
        answer=max,
        terse=lambda n: f"the largest is {max(n)}.",
        steps=_most_steps,
    ),
    "tens": Skill(
        draw=lambda rng: (rng.randint(10, 99),),
        phrasings=(
            "{n} wears the number {a}. what is its first digit?",
            "the bus of {n} and {m} is number {a}. what is the first digit?",
            "{n} writes {a} on a card. which is the first digit?",
        ),
        answer=lambda n: n[0] // 10,
        terse=lambda n: f"the first digit is {n[0] // 10}.",
        steps=lambda n: f"tens of {n[0]} is {n[0] // 10}. units is {n[0] % 10}.",
    ),
}


@dataclass(frozen=True)
class Case:
    """One question with what its generator knows about it."""

    skill: str
    numbers: Numbers
    question: str

    @property
    def answer(self) -> int:
        """The right answer."""
        return SKILLS[self.skill].answer(self.numbers)

    def rationale(self, style: Style) -> str:
        """The right rationale in this style."""
        skill = SKILLS[self.skill]
        if style == "terse":
            return f"so {skill.terse(self.numbers)} ans {self.answer}"
        return f"steps: {skill.steps(self.numbers)} ans {self.answer}"

    def thought(self) -> str:
        """What a teacher without feedback writes: the steps in private, then the terse rationale."""
        return f"<think> {self.rationale('steps')} </think> {self.rationale('terse')}"


def _for_test(skill: str, numbers: Numbers) -> bool:
    """A quarter of all number combinations belong to the tests, whatever the seed."""
    return zlib.crc32(f"{skill} {numbers}".encode()) % 4 == 0


def draw(rng: random.Random, skill: str, split: str = "train") -> Case:
    """One random question of a skill; the numbers of the two splits never meet."""
    kind = SKILLS[skill]
    numbers = kind.draw(rng)
    while _for_test(skill, numbers) != (split == "test"):
        numbers = kind.draw(rng)
    words = dict(zip("nmk", rng.sample(NAMES, 3), strict=True), o=rng.choice(THINGS))
    values = dict(zip("abc", numbers, strict=False))
    return Case(skill, numbers, rng.choice(kind.phrasings).format(**words, **values))


def cases(split: str, n: int, seed: int) -> list[Case]:
    """`n` different questions, the skills in turn."""
    if split not in ("train", "test"):
        raise ValueError(f"the miniature world has the splits train and test, not {split!r}")
    rng = random.Random(f"{split} {seed}")
    found: dict[str, Case] = {}
    while len(found) < n:
        case = draw(rng, list(SKILLS)[len(found) % len(SKILLS)], split)
        found.setdefault(case.question, case)
    return list(found.values())


def problems(split: str, n: int, seed: int) -> list[dict[str, str]]:
    """The questions as rows. `subject` is the skill: for error profiles alone, no prompt shows it. `solution` is terse."""
    return [
        {
            "id": f"mini/{split}/{i}",
            "question": case.question,
            "answer": str(case.answer),
            "subject": case.skill,
            "solution": case.rationale("terse"),
        }
        for i, case in enumerate(cases(split, n, seed))
    ]


def public(text: str) -> str:
    """What of a teacher's text is the rationale: all that follows its private thought."""
    return text.rpartition("</think>")[2].strip()


def style_of(text: str) -> str:
    """`steps`, `terse`, or `other` for a text that begins like neither."""
    first = re.match(WORD, public(text))
    return {"so": "terse", "steps": "steps"}.get(first[0] if first else "", "other")


def answer_of(text: str) -> str | None:
    """The number after the last `ans`."""
    found = re.findall(r"\bans (\d+)", public(text))
    return found[-1] if found else None


def example_line(question: str, tutor: str | None, score: bool, student: str | None) -> str:
    """One scored example; the score stands before the student's answer so that nothing in the line gives it away."""
    return f"example {question} tutor {tutor or 'none'} score [{score:d}] student {student or 'none'}"


def own_line(question: str, before: str | None, score: bool, student: str | None) -> str:
    """The asked question with its own history."""
    return f"question {question} before {before or 'none'} score [{score:d}] student {student or 'none'}"


def vocabulary() -> list[str]:
    """Every token of the world, the special ones first, always in the same order."""
    rng = random.Random(0)
    texts = [FRAME, "0123456789", *NAMES, *THINGS]
    for name, skill in SKILLS.items():
        texts += [re.sub(r"{\w}", "", phrasing) for phrasing in skill.phrasings]
        texts += [draw(rng, name).thought()]
    words = dict.fromkeys(token for text in texts for token in re.findall(WORD, text))
    return [*SPECIAL, *words]
