"""How the miniature world's teacher comes about, and how good it is.

It learns to explain (`steps`, or a private `<think>` before a `terse` rationale) and to read feedback: it writes steps
when the scored examples say that the student fails on questions of this kind, or when the student failed on this very
question; otherwise it keeps the style of its previous rationale. The rule stands here alone: the loop does not know it.

Reading the examples by kind of question is the hard part for so small a model: left to itself it goes by how often the
student fails in all. Two things help. The loss covers each example's score, which can be foreseen only from earlier
examples of the same kind: some twenty lessons in the look-up per block instead of one. And one attention head is shown
where to look: from where a score or a style is decided to the earlier scores of the same kind. What to make of them it
finds out by itself.
"""

import random
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from undo_ray.mini import models, world
from undo_ray.mini.world import Case, Style

if TYPE_CHECKING:
    import torch

LENGTH = 704
"""Tokens in one training row: a prompt's shared part and as many questions after it as fit."""

WORDS = {word: i for i, word in enumerate(world.vocabulary())}
PAD, BOS, EOS, USER, ASSISTANT = (WORDS[w] for w in ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>"))
ASK = WORDS["score"]


def encode(text: str) -> list[int]:
    """The tokenizer's ids, without the tokenizer."""
    return [WORDS[word] for word in re.findall(world.WORD, text)]


# What the teacher is trained on


@dataclass(frozen=True)
class Block:
    """Scored examples, all of one student."""

    lines: tuple[str, ...]
    skills: tuple[str, ...]
    """The skill of each line."""
    failing: frozenset[str]
    """The skills of which at least half of the examples are wrong."""

    @property
    def text(self) -> str:
        """The lines as a prompt begins with them."""
        return "\n".join(self.lines)


def wrong(rng: random.Random, answer: int) -> str | None:
    """An answer like a student's wrong ones."""
    if rng.random() < 0.1:
        return None
    near = answer + rng.choice((-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20))
    return str(near) if near >= 0 and rng.random() < 0.5 else str(answer + rng.randint(1, 60))


def block(rng: random.Random, noise: float) -> Block:
    """12 to 20 examples of a student that fails on about half of the skills, any of them."""
    skills = list(world.SKILLS)
    failing = set(rng.sample(skills, rng.choices(range(len(skills) + 1), (1, 3, 12, 3, 1))[0]))
    size = rng.randint(12, 20)
    asked = [skill for skill in skills if rng.random() > noise / 2] or skills
    lines, drawn, wrongs = [], [], {skill: [0, 0] for skill in asked}
    for _ in range(size):
        case = world.draw(rng, rng.choice(asked))
        right = (case.skill not in failing) != (rng.random() < noise)
        tutor = str(case.answer) if rng.random() > noise / 4 else wrong(rng, case.answer)
        student = str(case.answer) if right else wrong(rng, case.answer)
        lines.append(world.example_line(case.question, tutor, right, student))
        drawn.append(case.skill)
        wrongs[case.skill][0] += not right
        wrongs[case.skill][1] += 1
    return Block(tuple(lines), tuple(drawn), frozenset(s for s, (bad, n) in wrongs.items() if n and 2 * bad >= n))


def wanted(case: Case, examples: Block | None, score: bool | None, before: Style | None) -> Style:
    """The rule: escalate on failure, otherwise keep the style."""
    if (examples and case.skill in examples.failing) or score is False:
        return "steps"
    return before or "terse"


@dataclass(frozen=True)
class Lesson:
    """One prompt's own part, and what the teacher should write."""

    case: Case
    line: str
    style: Style
    by_block: bool = False
    """Only the examples settle the style."""

    @property
    def target(self) -> str:
        """The teacher's whole text."""
        return self.case.rationale("steps") if self.style == "steps" else self.case.thought()


def lesson(rng: random.Random, examples: Block | None, split: str) -> Lesson:
    """A question, alone or with its history; a student often knows by heart what it was trained on, so its own score
    is mostly [1] even where the examples fail."""
    case = world.draw(rng, rng.choice(list(world.SKILLS)), split)
    if examples is None and rng.random() < 0.8:
        return Lesson(case, case.question, "terse")
    if examples and rng.random() < 0.2:
        return Lesson(case, f"question {case.question}", wanted(case, examples, None, None), True)
    failing = examples is None or case.skill in examples.failing
    score = rng.random() > (0.4 if failing else 0.15)
    before: Style | None = rng.choices(("terse", "steps", None), (6, 3, 2))[0]
    text = case.rationale(before) if before else None
    if text and rng.random() < 0.05:
        text = re.sub(r"\d+$", str(case.answer + rng.choice((1, 3, 10))), text)
    line = world.own_line(case.question, text, score, str(case.answer) if score else wrong(rng, case.answer))
    style = wanted(case, examples, score, before)
    return Lesson(case, line, style, examples is not None and score and before != "steps")


NOTHING, CONTEXT, OWN_SCORE, SCORE, TEXT, STYLE, STYLE_BY_BLOCK = range(7)
WEIGHTS = (0.0, 0.05, 0.3, 1.0, 1.0, 3.0, 6.0)
"""What each kind of target token counts in the loss."""


@dataclass
class Row:
    """One training sequence: a shared prompt beginning, then independent questions that each see it and themselves.

    Positions start again behind the shared part for every question, so each sees exactly what it will see alone.
    """

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    """Which kind of target each token is."""
    parts: list[int] = field(default_factory=list)
    """0 in the shared part, then 1, 2, ... per question, -1 in the padding."""
    positions: list[int] = field(default_factory=list)
    skills: list[int] = field(default_factory=list)
    """1, 2, ... for the skill that the token's line is about, 0 for none."""

    def add(self, ids: list[int], kinds: list[int], part: int, start: int, skill: str | None = None) -> None:
        """Append tokens of one part, whose positions begin at `start`."""
        self.ids += ids
        self.kinds += kinds
        self.parts += [part] * len(ids)
        self.positions += range(start, start + len(ids))
        self.skills += [1 + list(world.SKILLS).index(skill) if skill else 0] * len(ids)


def row(rng: random.Random, examples: Block | None, split: str = "train") -> Row:
    """Fill one row with questions."""
    out = Row()
    out.add([BOS, USER], [NOTHING, NOTHING], 0, 0)
    for line, skill in zip(examples.lines, examples.skills, strict=True) if examples else ():
        ids = encode(line)
        out.add(ids, [SCORE if before == ASK else CONTEXT for before in [PAD, *ids[:-1]]], 0, len(out.ids), skill)
    shared = len(out.ids)
    for part in range(1, LENGTH):
        one = lesson(rng, examples, split)
        prompt, answer = [*encode(one.line), ASSISTANT], [*encode(one.target), EOS]
        if len(out.ids) + len(prompt) + len(answer) > LENGTH:
            break
        kinds = [OWN_SCORE if before == ASK else NOTHING for before in [PAD, *prompt[:-1]]]
        kinds += [STYLE_BY_BLOCK if one.by_block else STYLE, *[TEXT] * (len(answer) - 1)]
        out.add(prompt + answer, kinds, part, shared, one.case.skill)
    missing = LENGTH - len(out.ids)
    out.add([PAD] * missing, [NOTHING] * missing, -1, 0)
    return out


def rows(rng: random.Random, n: int, share: float, split: str = "train") -> list[Row]:
    """`n` rows, this share of them with examples, of which up to 30 % do not follow their skill."""
    return [row(rng, block(rng, 0.3 * rng.random()) if rng.random() < share else None, split) for _ in range(n)]


# Training

GUIDED_LAYER = 2
"""The layer whose first head is shown where to look."""


def _dense_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Any, None]:
    """Attention written out: with a mask of this kind twice as fast on a CPU as torch's fused one (95 against 40 ms per
    layer and row batch, forward and backward)."""
    weights = (query @ key.transpose(-1, -2) * scaling + attention_mask).softmax(-1)
    if module.layer_idx == GUIDED_LAYER:
        module.guided = weights[:, 0]
    return (weights @ value).transpose(1, 2).contiguous(), None


@dataclass
class Step:
    """What one forward pass over a batch gives: logits, targets and their kinds, all without the first token."""

    logits: "torch.Tensor"
    targets: "torch.Tensor"
    kinds: "torch.Tensor"
    guidance: "torch.Tensor"
    """How little the guided head looks at earlier scores of the same skill (minus the logarithm of their weight)."""


def forward(model: Any, batch: list[Row]) -> Step:
    """Run the model over a batch of rows."""
    import torch

    names = ("ids", "positions", "parts", "kinds", "skills")
    ids, positions, parts, kinds, skills = (torch.tensor([getattr(r, name) for r in batch]) for name in names)
    mine = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == 0)
    seen = mine & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e9)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits

    deciding = (ids == ASK) | (ids == ASSISTANT)
    batch_at, query_at = deciding.nonzero(as_tuple=True)
    looks = model.model.layers[GUIDED_LAYER].self_attn.guided[batch_at, query_at].float()
    there = (kinds == SCORE)[batch_at] & seen[batch_at, query_at]
    there &= skills[batch_at] == skills[batch_at, query_at, None]
    found = (looks * there).sum(-1)[there.any(-1)]
    guidance = -(found + 1e-4).log().sum() / max(1, len(found))
    return Step(logits[:, :-1].float(), ids[:, 1:], kinds[:, 1:], guidance)


def _accuracy(model: Any, batch: list[Row]) -> dict[str, float]:
    """Teacher-forced token accuracy of what matters."""
    import torch

    with torch.inference_mode():
        step = forward(model, batch)
    right = (step.logits.argmax(-1) == step.targets).float()
    names = {"score": SCORE, "style": STYLE_BY_BLOCK, "text": TEXT}
    return {name: float(right[step.kinds == kind].mean()) for name, kind in names.items()}


@dataclass(frozen=True)
class Stage:
    """One stretch of training: warm-up, a constant rate to 40 %, then linearly to a twentieth."""

    tokens: int
    lr: float
    share: float
    """Of rows with examples."""

    def pace(self, done: float) -> float:
        """What of the learning rate holds when this share of the stage is done."""
        return self.lr * min(1.0, (done + 1e-3) / 0.03, max(0.05, (1 - done) / 0.6))


STAGES = (Stage(3_500_000, 3e-3, 0.75), Stage(2_500_000, 1.5e-3, 0.4))
"""First the look-up, then the arithmetic, which is learned mostly from questions alone."""


def train(out: str, seed: int, stages: tuple[Stage, ...] = STAGES, batch: int = 3) -> None:
    """Train a teacher from nothing and write it, in bfloat16, to `out`."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

    AttentionInterface.register("dense", _dense_attention)
    AttentionMaskInterface.register("dense", lambda attention_mask, **_: attention_mask)
    torch.manual_seed(seed)
    rng = random.Random(f"teacher {seed}")
    model: Any = LlamaForCausalLM._from_config(models.config(models.TEACHER, models.TEACHER_THETA), attn_implementation="dense")
    for stage in stages:
        _train(model, stage, rng, batch)
        write(model, out)


def _train(model: Any, stage: Stage, rng: random.Random, batch: int) -> None:
    """Muon for the matrices, AdamW for the rest, each with the same rate."""
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n or "lm_head" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=stage.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=stage.lr, weight_decay=0.05, betas=(0.9, 0.95)),
    ]
    weights = torch.tensor(WEIGHTS)
    held_out = rows(random.Random("held out"), 10, 0.75, "test")
    steps, begun = stage.tokens // (batch * LENGTH), time.monotonic()
    for i in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.pace(i / steps)
        step = forward(model, rows(rng, batch, stage.share))
        losses = torch.nn.functional.cross_entropy(step.logits.flatten(0, 1), step.targets.flatten(), reduction="none")
        weight = weights[step.kinds.flatten()]
        loss = (losses * weight).sum() / weight.sum() + step.guidance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if i % 50 == 49 or i == steps - 1:
            done = (i + 1) * batch * LENGTH
            rate = done / (time.monotonic() - begun)
            held = ", ".join(f"{name} {share:.2f}" for name, share in _accuracy(model, held_out).items())
            told = f"{done:>9,} tokens, {rate:6,.0f}/s, loss {loss.item():.3f}, of it guidance {step.guidance.item():.2f}"
            print(f"{told}; right on held-out questions: {held}", flush=True)


def write(model: Any, out: str) -> None:
    """A Hugging Face directory with bfloat16 weights."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    models.tokenizer().save_pretrained(out)


# Measuring


class Figures(dict[str, dict[str, float]]):
    """{skill: {measure: share}}; printed as a Markdown table."""

    def __str__(self) -> str:
        names = list(self["all"])
        lines = ["| skill | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {skill} | " + " | ".join(f"{row[n]:.2f}" for n in names) + " |" for skill, row in self.items()]
        return "\n".join(lines)


def figures(directory: str, per_skill: int = 50) -> Figures:
    """How good a teacher is, by skill, on test questions at greedy decoding; every figure is a share of `per_skill`.

    `terse right` and `steps right`: answers without feedback, and after the student failed on the very question.
    `failing -> steps` and `passing -> terse`: the style follows the rule where only the examples can settle it (own
    score [1], the rationale before terse, half of the skills failing). `answers right` is of these two together.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rng = random.Random("figures")
    cases = [world.draw(rng, skill, "test") for skill in world.SKILLS for _ in range(per_skill)]
    alone = [c.question for c in cases]
    failed = [world.own_line(c.question, c.rationale("terse"), False, wrong(rng, c.answer)) for c in cases]
    full, escalate = [], []
    for i, case in enumerate(cases):
        examples = _balanced(rng, case.skill, failing=i % 2 == 0)
        full.append(f"{examples.text}\n{world.own_line(case.question, case.rationale('terse'), True, str(case.answer))}")
        escalate.append(case.skill in examples.failing)
    terse, steps, both = (generate(model, prompts) for prompts in (alone, failed, full))

    out = Figures()
    for skill in world.SKILLS:
        mine = [i for i, c in enumerate(cases) if c.skill == skill]
        out[skill] = {
            "terse right": _share(_right(cases[i], terse[i], "terse") for i in mine),
            "steps right": _share(_right(cases[i], steps[i], "steps") for i in mine),
            "failing -> steps": _share(world.style_of(both[i]) == "steps" for i in mine if escalate[i]),
            "passing -> terse": _share(world.style_of(both[i]) == "terse" for i in mine if not escalate[i]),
            "answers right": _share(world.answer_of(both[i]) == str(cases[i].answer) for i in mine),
        }
    out["all"] = {name: _share(row[name] for row in out.values()) for name in out["add"]}
    return out


def _share(values: Any) -> float:
    values = list(values)
    return round(sum(values) / len(values), 3)


def _right(case: Case, text: str, style: Style) -> bool:
    return world.style_of(text) == style and world.answer_of(text) == str(case.answer)


def _balanced(rng: random.Random, skill: str, failing: bool) -> Block:
    """20 examples, half of the skills failing, one score in ten not as its skill: the loop's own case."""
    while True:
        examples = block(rng, 0.1)
        if len(examples.failing) == 2 and (skill in examples.failing) == failing:
            return examples


def generate(model: Any, prompts: list[str], batch: int = 25) -> list[str]:
    """Greedy answers to chats of one user message."""
    import torch

    tokenizer = models.tokenizer()
    texts: list[str] = []
    for i in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[i : i + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
