"""Recipes: hand-written TOML -> frozen pydantic models -> resolved JSON in the run directory.

Every key is of one of three kinds, written beside it:

- *identity* (the default): changes the result. A run directory refuses a recipe whose identity differs.
- *extendable*: may grow on resume (more rounds, another stop rule, more tests).
- *placement*: where and how wide it runs. Changes nothing about the result, may differ on resume.

`load(path, overrides)` is the only entry. This module imports neither torch nor ray nor vllm, so that `--help` and a bad recipe
answer at once.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from undo_ray.types import UserError
from undo_ray.written import secret_in

T = TypeVar("T")
Extendable = Annotated[T, "extendable"]
Placed = Annotated[T, "placement"]

MEMORY_KNOBS = set(
    "gpu_memory_utilization kv_cache_memory_bytes max_num_seqs max_num_batched_tokens enforce_eager "
    "distributed_executor_backend disable_log_stats".split()
)
"""Arguments of `vllm.LLM` that a person may have to change at 2 a.m. to fit the memory there is: placement, not identity."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Data(_Section):
    """Which problems are taught, which measure the loop, and which are kept for the end."""

    train: str
    """source of the training questions, `TASK[/SPLIT]` or `package.module:Task[/SPLIT]`"""
    validation: str | None = None
    """source of `show` and `select`; default: drawn from `train` by seed"""
    tests: Extendable[tuple[str, ...]] = Field((), strict=False)  # TOML has lists, no tuples
    """test sources, answered only when the loop has ended; the first is the primary test"""
    dir: Placed[str | None] = None
    """local folder with the benchmarks; default: the Hugging Face hub"""
    train_limit: PositiveInt | None = None
    """questions drawn from the training source by seed; default: all"""
    test_limit: Extendable[PositiveInt | None] = None
    """questions drawn from each test by seed; default: all"""
    clean: Literal["ngram", "exact"] = "ngram"
    """what counts as a repetition: a run of 8 words shared with a test and near duplicates too, or equal texts alone"""
    show: PositiveInt = 20
    """validation questions shown, scored, in every teacher prompt (paper: 20)"""
    select: NonNegativeInt = 200
    """validation questions that stop the loop and choose the round; never shown"""
    shared: bool = False
    """one validation set for both uses, as in the paper; marked in the report"""

    @property
    def tasks(self) -> frozenset[str]:
        """The tasks that the sources name."""
        return frozenset(text.strip().partition("/")[0] for text in (self.train, self.validation or self.train, *self.tests))

    @model_validator(mode="after")
    def _sets(self) -> Data:
        if not self.shared and self.select == 0:
            raise ValueError("data.select = 0 leaves nothing to choose between rounds; set it, or data.shared = true")
        return self


class Sampling(_Section):
    """How text is drawn from a model."""

    temperature: float = Field(0.0, ge=0)
    """0 is greedy decoding"""
    top_p: float = Field(1.0, gt=0, le=1)
    """nucleus sampling mass"""
    max_tokens: PositiveInt = 512
    """longest answer, tokens; longer output counts as `truncated`"""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), strict=False)
    """texts that end an answer, beside the model's own end; they are no part of it"""


class Placement(_Section):
    """Resources of one engine replica or one training worker."""

    cpus: float = Field(1.0, gt=0)
    """logical CPUs"""
    gpus: float = Field(0.0, ge=0)
    """GPUs"""


class Endpoint(_Section):
    """Where an OpenAI-compatible endpoint is and how hard it may be worked."""

    base_url: str = "https://api.openai.com/v1"
    """address up to `/v1`, without a key in it"""
    key_env: str = "OPENAI_API_KEY"
    """environment variable of the driver that holds the key; empty for a server that takes none"""
    concurrency: int = Field(64, ge=1, le=1000)
    """requests in flight"""
    send_seed: bool = True
    """send each sample's seed; false for a server that refuses the field"""
    requests_per_minute: PositiveInt | None = None
    """requests sent per minute, retries included"""
    timeout: float = Field(600.0, gt=0)
    """seconds for one request, from sending it to the last byte"""
    retries: int = Field(8, ge=0, le=100)
    """further tries of a request after 408, 409, 429, 5xx, a timeout or a lost connection"""

    @model_validator(mode="after")
    def _plain_address(self) -> Endpoint:
        if set("@?#") & set(self.base_url):
            raise ValueError(
                "base_url is written to the run directory: leave login and query out of it; the key goes through key_env"
            )
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url = {self.base_url!r} is no http(s) address; write it as http://HOST:PORT/v1")
        if not re.fullmatch(r"([A-Z_][A-Z0-9_]*)?", self.key_env):  # not repeated: it may be the key itself
            raise ValueError(
                "key_env is the name of an environment variable, in capitals, not a key; export the key and name it"
            )
        return self


class Engine(_Section):
    """What turns prompts into text. All kinds run as a Ray Data actor pool behind one function."""

    kind: Literal["transformers", "vllm", "openai"] = "transformers"
    """engine; vllm needs the `gpu` extra or vLLM's CPU build; openai is an endpoint, for the teacher alone"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """weights and activations"""
    replicas: Placed[PositiveInt] = 1
    """engines in the pool"""
    min_replicas: Placed[PositiveInt | None] = None
    """engines a stage begins with, and goes back to when idle; the pool grows to `replicas` as there is room; default: all"""
    tensor_parallel: Placed[PositiveInt] = 1
    """GPUs (vLLM workers) a layer of a replica is split over"""
    pipeline_parallel: Placed[PositiveInt] = 1
    """groups of layers of a replica, each on GPUs of its own"""
    nodes: Placed[PositiveInt] = 1
    """nodes a vLLM replica's GPUs lie on, for a model that one node does not hold; kept for the run"""
    batch_size: Placed[PositiveInt] = 64
    """rows handed to a replica at a time"""
    context: PositiveInt | None = None
    """longest prompt plus answer, tokens; default: the model's own"""
    chat_template_kwargs: dict[str, Any] = {}
    """variables of the model's chat template, as `{enable_thinking = false}`"""
    kwargs: dict[str, Any] = {}
    """further arguments of `vllm.LLM` (the memory knobs among them are placement), or fields of each request to an endpoint"""
    resources: Placed[Placement] = Placement()
    """per replica"""
    lifetime: Placed[Literal["stage", "run"]] = "stage"
    """engines start anew for every stage and leave their GPUs to the next, or stay up for the run on resources of their own"""
    start_seconds: Placed[float] = Field(1800.0, gt=0)
    """for an engine to come up, fetching the model apart; then it is started once more, and then the stage ends"""
    stall_seconds: Placed[float] = Field(600.0, gt=0)
    """without an engine step after which a vLLM replica counts as hung and is replaced"""
    max_errors: Placed[float] = Field(0.05, ge=0, le=1)
    """share of rows the engine may fail on before the stage fails"""

    @property
    def sequences(self) -> int:
        """Requests a vLLM replica works on at a time, where memory allows. vLLM is told: its own default depends on the GPU,
        which the driver does not see."""
        return int(self.kwargs.get("max_num_seqs", 256))

    @property
    def remote(self) -> bool:
        """Whether the model is behind an endpoint: no weights and no tokenizer of it are here."""
        return self.kind == "openai"

    @model_validator(mode="after")
    def _what_the_kind_takes(self) -> Engine:
        parts = self.tensor_parallel * self.pipeline_parallel
        if "trust_remote_code" in self.kwargs:
            raise ValueError(
                "kwargs.trust_remote_code: set teacher.trust_remote_code or student.trust_remote_code, which holds wherever "
                "that model is loaded"
            )
        if (loader := self.kwargs.get("load_format")) in ("pt", "npcache"):
            raise ValueError(f"kwargs.load_format = {loader!r} opens pickles, which can run code; models are safetensors alone")
        if self.kind == "transformers" and (self.kwargs or parts > 1):
            raise ValueError('kwargs, tensor_parallel and pipeline_parallel are for kind = "vllm"; remove them or change kind')
        if self.remote and (self.replicas > 1 or parts > 1 or self.resources.gpus or self.lifetime == "run"):
            raise ValueError(
                'kind = "openai" is one client without GPUs: leave out replicas, tensor_parallel, pipeline_parallel, lifetime '
                "and resources.gpus, and set endpoint.concurrency"
            )
        if parts > 1 and self.resources.gpus < parts:
            raise ValueError(
                f"tensor_parallel x pipeline_parallel = {parts} needs as many resources.gpus, not {self.resources.gpus:g}"
            )
        if self.resources.gpus > parts:
            raise ValueError(
                f"resources.gpus = {self.resources.gpus:g}, but tensor_parallel x pipeline_parallel = {parts}: the other GPUs "
                "would be paid for and idle; make both the same"
            )
        if self.nodes > 1 and (self.kind != "vllm" or self.lifetime != "run" or parts % self.nodes):
            raise ValueError(
                f'nodes = {self.nodes} needs kind = "vllm", lifetime = "run", and tensor_parallel x pipeline_parallel = '
                f"resources.gpus, as many on each node; it is {parts}, and resources.gpus {self.resources.gpus:g}"
            )
        if self.min_replicas is not None and (self.min_replicas > self.replicas or self.lifetime == "run"):
            raise ValueError(
                f"min_replicas = {self.min_replicas} is for a pool that grows to replicas = {self.replicas} within a stage; "
                'lower it, or remove it where lifetime = "run"'
            )
        return self


class TeacherEngine(Engine):
    """An engine that may be an endpoint."""

    endpoint: Placed[Endpoint] = Endpoint()
    """of kind = "openai" """

    @model_validator(mode="after")
    def _endpoint_is_used(self) -> TeacherEngine:
        if not self.remote and self.endpoint != Endpoint():
            raise ValueError(f'the section endpoint is for kind = "openai", not {self.kind!r}; remove it or change kind')
        return self


class Teacher(_Section):
    """Who explains."""

    model: str
    """hub id (`org/name@revision`), directory, URI, or `package.module:function` giving a directory; an endpoint's own name"""
    trust_remote_code: bool = False
    """run the Python code that comes in the model's directory, on every node that loads it"""
    template: Literal["prefix", "paper", "compact"] = "prefix"
    """layout of the prompt against Δ(k): shared part first; the paper's blocks; or the miniature world's"""
    samples: PositiveInt = 1
    """most rationales per question and round; the next is asked for where none was accepted, all at once for "shortest" """
    regenerate: Literal["all", "failed", "unstable"] = "all"
    """training questions explained again in round k > 0: all (paper); those student k-1 failed; those it is unsure of"""
    unstable_below: float = Field(0.75, gt=0, le=1)
    """pass rate over student.samples attempts below which a question counts as unstable"""
    hints: Literal["off", "answer", "solution", "cascade"] = "off"
    """what of the gold is shown where no sample was accepted: nothing, answer, solution, or one after the other; marked"""
    cache: Placed[bool | str] = False
    """reuse what such a teacher gave to the same prompt and seed in other runs: true: kept beside the run; or a folder"""
    sampling: Sampling = Sampling()
    """of rationales"""
    engine: TeacherEngine = TeacherEngine()
    """of rationales"""
    prompt_tokens: PositiveInt = 6000
    """token budget of the shown examples; whole examples are dropped beyond it and counted"""


class Lora(_Section):
    """Low-rank adapters in place of full fine-tuning; exported merged into the weights."""

    rank: NonNegativeInt = 0
    """of the adapters; 0 trains all weights"""
    alpha: PositiveInt = 16
    """an adapter counts alpha / rank times"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """before an adapter"""
    targets: tuple[str, ...] = Field((), strict=False)
    """names of the layers that get one; default: every linear layer but the head"""


class Student(_Section):
    """Who learns."""

    model: str
    """as teacher.model; the base every round starts from unless start = "previous" """
    trust_remote_code: bool = False
    """as teacher.trust_remote_code"""
    start: Literal["base", "previous"] = "base"
    """where round k's fine-tuning starts"""
    tokens: PositiveInt | None = None
    """training tokens per round (prompt and answer, no padding)"""
    epochs: float | None = Field(None, gt=0)
    """passes over the lessons per round; give this or tokens"""
    batch_size: PositiveInt = 16
    """chats per optimiser step, over all workers"""
    batch_tokens: PositiveInt | None = None
    """tokens per optimiser step in place of batch_size: a step ends with the chat that reaches them"""
    learning_rate: float = Field(1e-5, gt=0)
    """peak learning rate of AdamW"""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """learning-rate schedule"""
    warmup: float = Field(0.03, ge=0, lt=1)
    """share of the steps spent warming up"""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay"""
    beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW decay of the squared gradient; 0.95 suits short runs from nothing"""
    max_grad_norm: float = Field(1.0, gt=0)
    """gradient clipping, L2 norm"""
    max_length: PositiveInt = 2048
    """tokens; longer chats are left out of training and counted"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type that forward and backward passes compute in; master weights are fp32"""
    lora: Lora = Lora()
    """low-rank adapters"""
    held_out: float = Field(0.02, ge=0, lt=1)
    """share of the questions whose lessons are kept from training, to measure the student on before and after"""
    sharding: Placed[Literal["none", "ddp", "fsdp2", "zero2", "zero3"]] = "ddp"
    """how model and optimiser lie on the workers; docs/training.md says what each needs"""
    workers: Placed[PositiveInt] = 1
    """training workers, at an equal global batch"""
    micro_tokens: Placed[PositiveInt | None] = None
    """tokens per worker and forward pass: chats are packed to it; default: max_length"""
    kernels: Placed[Literal["torch", "liger"]] = "torch"
    """of norms and MLP: torch's, or Liger's fused ones on a GPU"""
    gradient_checkpointing: Placed[bool] = False
    """compute activations again in the backward pass in place of keeping them"""
    checkpoint_steps: Placed[PositiveInt | None] = None
    """steps between two checkpoints, beside checkpoint_minutes"""
    checkpoint_minutes: Placed[float] = Field(15.0, gt=0)
    """minutes between two checkpoints"""
    max_failures: Placed[NonNegativeInt] = 3
    """lost workers from which a round's training goes on at the last checkpoint"""
    resources: Placed[Placement] = Placement()
    """per training worker"""
    samples: PositiveInt = 1
    """attempts per training question and round; more than one gives the pass rate that regenerate = "unstable" goes by"""
    sampling: Sampling = Sampling()
    """of attempts, validation and tests"""
    engine: Engine = Engine()
    """of attempts, validation and tests"""

    @model_validator(mode="after")
    def _trained_here(self) -> Student:
        if self.engine.remote:
            raise ValueError('engine.kind = "openai": a student is trained and measured here; set "vllm" or "transformers"')
        return self

    @model_validator(mode="after")
    def _amount(self) -> Student:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give exactly one of student.tokens and student.epochs; `--set student.epochs=` unsets one")
        if self.sharding == "none" and self.workers > 1:
            raise ValueError(
                f'student.sharding = "none" trains on one worker, not {self.workers}; set "ddp", "fsdp2" or "zero3"'
            )
        if self.resources.gpus > 1:
            raise ValueError(
                f"student.resources.gpus = {self.resources.gpus:g}, but a training worker uses one GPU; raise student.workers"
            )
        return self


class Lessons(_Section):
    """Which accepted rationales a round trains on."""

    mode: Literal["replace", "latest", "accumulate"] = "replace"
    """this round's (paper); each question's newest; or all so far without duplicates"""
    select: Literal["first", "shortest"] = "first"
    """which accepted rationale of a question is its lesson: the first, or the shortest of teacher.samples"""
    keep_wrong: bool = False
    """also train on rationales with a wrong or missing answer: for trials, and marked in the report"""


class Gap(_Section):
    """What of Δ(k) the teacher is told."""

    feedback: Literal["real", "none", "shuffled", "block", "history"] = "real"
    """real; or a control: no feedback, scores permuted across problems, only the shown block, only own history"""
    history: PositiveInt = 2
    """most recent rounds of a question's own past kept in its row and its prompt"""


class Grading(_Section):
    """Bounds on the judging of one answer, in processes that can be killed; an answer past one of them is a `timeout`."""

    deadline: float = Field(5.0, gt=0)
    """seconds; longer, up to four times as long, on a machine that gives the grader less than a fifth of them"""
    memory: float = Field(1.0, ge=0.5)
    """GiB of address space"""


class Prices(_Section):
    """What things cost, in any one currency; where a price is given, records and report say what was spent."""

    prompt: float | None = Field(None, ge=0)
    """a million of the teacher's prompt tokens"""
    cached: float | None = Field(None, ge=0)
    """a million of these that came from the endpoint's cache; default: as prompt"""
    completion: float | None = Field(None, ge=0)
    """a million of the teacher's completion tokens"""
    gpu: float | None = Field(None, ge=0)
    """an hour of one GPU"""

    @model_validator(mode="after")
    def _both_ways(self) -> Prices:
        if (self.prompt is None) != (self.completion is None) or (self.cached is not None and self.prompt is None):
            raise ValueError("give both prompt and completion (and cached, if it has a price of its own), or none of them")
        return self


class Stop(_Section):
    """When to stop: validation (select) accuracy no longer rises."""

    patience: PositiveInt = 1
    """rounds in a row without a gain before stopping"""
    min_gain: float = Field(0.0, ge=0, le=1)
    """a gain counts only above this, as a fraction of 1"""


class Recipe(_Section):
    """A whole run."""

    seed: NonNegativeInt = 0
    """of draws, training order, sampling and made models"""
    rounds: Extendable[NonNegativeInt] = 3
    """most rounds after round 0"""
    round0: Annotated[str, Field(pattern=r"^(run|lessons:.+|student:.+)$")] = "run"
    """`run`; `lessons:PATH` trains round 0 on given chats; `student:PATH` takes a trained student as it is"""
    track: Placed[tuple[Literal["tensorboard", "wandb", "mlflow"], ...]] = Field((), strict=False)
    """where training curves and the rounds' figures go, beside the run directory"""
    data: Data
    teacher: Teacher
    student: Student
    lessons: Lessons = Lessons()
    gap: Gap = Gap()
    grading: Grading = Grading()
    prices: Placed[Prices] = Prices()
    stop: Extendable[Stop] = Stop()

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, tree: Any) -> Any:
        """First of all, for every other message may quote a value."""
        if reason := secret_in(tree):
            raise ValueError(reason)
        return tree

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        for name, part in (("teacher", self.teacher), ("student", self.student)):
            if part.engine.context and part.engine.context <= part.sampling.max_tokens:
                raise ValueError(
                    f"{name}.engine.context = {part.engine.context} leaves no room for a prompt beside "
                    f"{name}.sampling.max_tokens = {part.sampling.max_tokens}; raise it or lower max_tokens"
                )
        if self.teacher.samples > 1 and self.teacher.sampling.temperature == 0:
            raise ValueError("teacher.samples > 1 at teacher.sampling.temperature = 0 gives the same text each time; raise it")
        if self.lessons.select == "shortest" and self.teacher.samples == 1:
            raise ValueError('lessons.select = "shortest" has one rationale to choose from; set teacher.samples above 1')
        self._regenerating()
        if self.prices.prompt is not None and not self.teacher.engine.remote:
            raise ValueError("prices of tokens are what an endpoint charges, and teacher.engine.kind is none; give prices.gpu")
        if self.round0.startswith("student:") and self.lessons.mode == "latest":
            raise ValueError('lessons.mode = "latest" needs round-0 rationales; round0 = "student:…" has none')
        return self

    def room(self, context: int | None) -> int:
        """Tokens that the shown examples may take in a prompt of a teacher that reads `context`; None where it is not known.

        Raises UserError where there is room for none.
        """
        spec = self.teacher
        if not context:
            return spec.prompt_tokens
        # Beside the examples: the question's own history, a solution it may be hinted with, and the answer.
        answers = self.gap.history + (spec.hints in ("solution", "cascade")) + 1
        left = context - answers * spec.sampling.max_tokens - self.student.sampling.max_tokens
        if left <= 0 and self.gap.feedback in ("real", "shuffled", "block"):
            raise UserError(
                f"the teacher reads {context} tokens, and {answers} of its answers (teacher.sampling.max_tokens, gap.history) "
                "with one of the student's leave no room for examples; lower these, or raise teacher.engine.context"
            )
        return min(spec.prompt_tokens, left)

    def _regenerating(self) -> None:
        wanted, mode = self.teacher.regenerate, self.lessons.mode
        samples, temperature = self.student.samples, self.student.sampling.temperature
        if wanted != "all" and mode == "replace":
            raise ValueError(
                f'teacher.regenerate = "{wanted}" asks for some questions alone, and lessons.mode = "replace" would train on '
                'those alone; set lessons.mode = "latest", where the others keep their lesson'
            )
        if wanted != "all" and mode == "latest" and self.round0.startswith("lessons:"):
            raise ValueError(
                f'teacher.regenerate = "{wanted}" with round0 = "lessons:…" needs lessons.mode = "accumulate": given lessons '
                "belong to no question that could keep them"
            )
        if wanted == "unstable" and (samples == 1 or temperature == 0):
            raise ValueError(
                'teacher.regenerate = "unstable" needs a pass rate: set student.samples above 1 and '
                f"student.sampling.temperature above 0; they are {samples} and {temperature:g}"
            )
        if wanted != "unstable" and samples > 1:
            raise ValueError(
                f'student.samples = {samples} is for teacher.regenerate = "unstable" alone; nothing else looks at a second '
                "attempt"
            )


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `--set a.b=value` overrides (value in TOML; a bare word is a string; no value unsets the key).

    Raises UserError with one line naming the file, the key and the remedy.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}); give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error}); mend that line") from None
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: write it as --set section.key=value")
    try:
        value = tomllib.loads(f"value = {text or 0}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: {parent} is a value, not a section; see docs/recipe.md for the keys")
    if text:
        tree[last] = value
    else:
        tree.pop(last, None)


def one_line(error: ValidationError) -> str:
    """The first problem pydantic found, as `key: what is wrong; remedy`, with a count of the others."""
    first, *others = error.errors()
    key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    what = {
        "extra_forbidden": f"unknown key {key}; remove it or see docs/recipe.md for the keys there are",
        "missing": f"{key} is missing; add it",
        "value_error": f"{key}: {message}" if key else message,
    }.get(first["type"], f"{key or 'recipe'} = {first['input']!r}: {message}; see docs/recipe.md")
    return what + (f" (and {len(others)} more)" if others else "")


def leaves(section: BaseModel, prefix: str = "", kind: str = "identity") -> Iterator[tuple[str, str, Any]]:
    """Every key of a recipe as (dotted name, kind, value). A section's kind holds for all its keys."""
    for name, field in type(section).model_fields.items():
        own = next((str(mark) for mark in field.metadata if mark in ("extendable", "placement")), kind)
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.", own)
        else:
            yield f"{prefix}{name}", own, value


def identity(recipe: Recipe) -> dict[str, Any]:
    """The keys that change the result, with their values as JSON."""
    chosen = {key: value for key, kind, value in leaves(recipe) if kind == "identity"}
    for key in ("teacher.engine.kwargs", "student.engine.kwargs"):
        chosen[key] = {name: value for name, value in chosen[key].items() if name not in MEMORY_KNOBS}
    return dict(sorted(json.loads(json.dumps(chosen)).items()))


def digest(value: Any) -> str:
    """Short stable hash of a JSON-able value (first 16 hex digits of SHA-256)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
