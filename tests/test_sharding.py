"""What a training worker computes: packed rows against single chats, five ways to shard against one, and their state.

Workers here are two plain processes over gloo, without Ray: the same code, and a start costs a second.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import runs
import tiny
import torch

from undo_ray import config, loop
from undo_ray.config import Student
from undo_ray.train import export, model, sharding
from undo_ray.train.packing import rows_of, supervised_tokens
from undo_ray.train.tokens import _tokens_of
from undo_ray.types import UserError

CPU = torch.device("cpu")
TEXTS = [f"What is {i} + {i}? {i} + {i} = {2 * i}. The answer is {2 * i}" for i in range(60)]
STEPS = 20
TOLERANCE = 2e-4
"""Largest difference of a step's loss between modes in fp32, relative: sums in another order, carried over 20 steps."""


def spec(**keys: Any) -> Student:
    return Student.model_validate({"model": "m", "epochs": 1, "learning_rate": 3e-3, "warmup": 0.0, **keys})


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of small random models: Qwen2 with tied embeddings, Llama with untied ones."""
    home = tmp_path_factory.mktemp("students")
    return {kind: tiny.make(home / kind, kind, TEXTS, seed=3) for kind in ("qwen2", "llama")}


def chats(seed: int, count: int, vocabulary: int = 300) -> list[tuple[list[int], int]]:
    """(token ids, prompt length) of random chats of 3 to 40 tokens."""
    made = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 41, (count,), generator=made).tolist()
    return [
        (torch.randint(3, vocabulary, (n,), generator=made).tolist(), int(torch.randint(0, n - 1, (1,), generator=made)))
        for n in lengths
    ]


def row(chosen: list[tuple[list[int], int]]) -> dict[str, Any]:
    return {
        "input_ids": [token for ids, _ in chosen for token in ids],
        "lengths": [len(ids) for ids, _ in chosen],
        "prompts": [prompt for _, prompt in chosen],
    }


def alone(directory: str, ids: list[int], prompt: int) -> float:
    """Summed loss of one chat by plain transformers, no packing and no code of ours."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    labels = torch.tensor([[-100] * prompt + ids[prompt:]])
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([ids])).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_no_chat_of_a_row_sees_another(students: dict[str, str], kind: str) -> None:
    several = chats(1, 6)
    net = model.Scored(model.load(students[kind], spec()))
    singles = [alone(students[kind], *chat) for chat in several]
    together = float(net(model.batch(row(several), CPU)).detach())
    assert together == pytest.approx(sum(singles), abs=1e-4 * len(singles))
    for chat, single in zip(several, singles, strict=True):
        mixed = [several[0], chat, several[1]]
        rest = sum(alone(students[kind], *other) for other in (several[0], several[1]))
        assert float(net(model.batch(row(mixed), CPU)).detach()) - rest == pytest.approx(single, abs=1e-4 * len(chat[0]))


def test_a_sliding_window_is_kept_inside_each_chat() -> None:
    from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

    AttentionInterface.register(model.ATTENTION, model.packed_attention)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = MistralForCausalLM(MistralConfig(vocab_size=300, num_key_value_heads=1, sliding_window=8, **sizes)).eval()
    several = chats(2, 4)
    expected = 0.0
    for ids, prompt in several:
        logits = lm(input_ids=torch.tensor([ids])).logits[0, :-1]
        labels = torch.tensor(([-100] * prompt + ids[prompt:])[1:])
        expected += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").detach())
    lm.set_attn_implementation(model.ATTENTION)
    assert float(model.Scored(lm)(model.batch(row(several), CPU)).detach()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("piece", [2**25, 1000])
def test_the_loss_in_pieces_and_its_gradients_are_those_of_torch(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PIECE", piece)  # 3 positions at a time in the second case
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(16, 300), torch.randn(50, 16, requires_grad=True), torch.randint(0, 300, (50,))
    other, same = copy.deepcopy(head), hidden.detach().clone().requires_grad_()
    loss = model.head_loss(hidden, head, targets)
    expected = torch.nn.functional.cross_entropy(other(same), targets, reduction="sum")
    (loss * 0.25).backward()
    (expected * 0.25).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for ours, theirs in ((hidden, same), (head.weight, other.weight), (head.bias, other.bias)):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_recomputing_activations_changes_no_gradient(students: dict[str, str]) -> None:
    nets = [model.Scored(model.load(students["llama"], spec(gradient_checkpointing=again))) for again in (False, True)]
    for net in nets:
        net(model.batch(row(chats(4, 5)), CPU)).backward()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_adapters_are_merged_as_peft_merges_them(students: dict[str, str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    keys = spec(lora={"rank": 4, "alpha": 8})
    lm = model.load(students["qwen2"], keys)
    adapters = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    assert adapters and all(".lora_" in name for name in adapters), "nothing but the adapters trains"
    for p in adapters.values():
        torch.nn.init.normal_(p, std=0.1)
    reference = get_peft_model(
        AutoModelForCausalLM.from_pretrained(students["qwen2"], dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    reference.load_state_dict({f"base_model.model.{name}": p for name, p in lm.state_dict().items()})
    expected = reference.merge_and_unload().state_dict()
    merged = model.merged(lm.state_dict(), keys)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])


# -- five modes ---------------------------------------------------------------------------------------------------------


def curve(
    directory: str, keys: Student, state: Path | None = None, first: int = 0, device: torch.device = CPU
) -> tuple[list[float], dict[str, Any]]:
    """(losses of `STEPS` steps, the gathered model), of this process's share of the workers.

    With `state`, the steps from `first` go on from what a run before left there; else step 10 leaves it.
    """
    import torch.distributed as dist

    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sharded = sharding.shard(model.Scored(model.load(directory, keys)), keys, device)
    if first and state is not None:
        sharded.load(str(state))
    losses = []
    for step in range(first, STEPS):
        several = {(str(i), 0): chat for i, chat in enumerate(chats(100 + step, 9))}
        rows = rows_of(list(several), {key: len(ids) for key, (ids, _) in several.items()}, 64, workers)
        packed = [row([several[key] for key in chosen]) for chosen in rows]
        supervised = sum(map(supervised_tokens, packed))
        own, total = packed[rank::workers], torch.zeros((), device=device)
        for index, part in enumerate(own):
            with sharded.micro(last=index == len(own) - 1):
                loss = sharded.module(model.batch(part, device))
                sharded.backward(loss * (workers / supervised))
            total += loss.detach()
        norm = sharded.step(3e-3)
        assert norm > 0
        if workers > 1:
            dist.all_reduce(total)
        losses.append(float(total) / supervised)
        if step == 9 and state is not None and not first:
            sharded.save(str(state))
    return losses, sharded.gather()


def worker(rank: int, port: int, jobs: list[dict[str, Any]], out: Path) -> None:
    """Run jobs one after another on two workers; worker 0 writes what came out."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for index, job in enumerate(jobs):
        state = Path(job["state"]) if job.get("state") else None
        losses, whole = curve(job["directory"], spec(workers=2, **job["keys"]), state, job.get("first", 0))
        if rank == 0:
            (out / f"{index}.json").write_text(json.dumps(losses))
            torch.save(whole, out / f"{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_two(jobs: list[dict[str, Any]], out: Path) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    out.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(worker, (runs.free_ports(1)[0], jobs, out), nprocs=2)
    return [(json.loads((out / f"{i}.json").read_text()), torch.load(out / f"{i}.pt")) for i in range(len(jobs))]


def check(found: list[float], expected: list[float], tolerance: float = TOLERANCE) -> None:
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    assert worst <= tolerance, f"losses differ by {worst:.2g} of themselves: {found} against {expected}"


MODES = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="session")
def two_workers(students: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(losses, gathered model) of each model in each mode on two workers; `again`: of the steps after the state of step 10."""
    out = tmp_path_factory.mktemp("two")
    names = [(kind, mode) for kind in students for mode in MODES]
    jobs = [{"directory": students[kind], "keys": {"sharding": mode}, "state": str(out / kind / mode)} for kind, mode in names]
    for mode in ("fsdp2", "zero3"):
        names.append(("again", mode))
        jobs.append({**jobs[names.index(("qwen2", mode))], "first": 10})
    return {**dict(zip(names, on_two(jobs, out), strict=True)), ("state", ""): out}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_two_workers_learn_what_one_learns(
    students: dict[str, str], two_workers: dict[tuple[str, str], Any], kind: str, mode: str
) -> None:
    one, whole = curve(students[kind], spec(sharding="none"))
    losses, gathered = two_workers[kind, mode]
    assert one[-1] < one[0]
    check(losses, one)
    assert gathered.keys() == whole.keys()
    for name, tensor in gathered.items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mode", ["fsdp2", "zero3"])
def test_a_sharded_state_goes_on_where_it_was_left(two_workers: dict[tuple[str, str], Any], mode: str) -> None:
    check(two_workers["again", mode][0], two_workers["qwen2", mode][0][10:])


def test_a_process_killed_while_deepspeed_compiles_does_not_hang_the_next(two_workers: dict[tuple[str, str], Any]) -> None:
    code = (
        "import os; from pathlib import Path; from undo_ray.train.sharding import compile_once; compile_once()\n"
        "[built] = Path(os.environ['TORCH_EXTENSIONS_DIR']).glob('*/*.so')\n"
        "print(built.parent / 'lock')"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code]
    lock = Path(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1])
    lock.touch()  # what torch leaves behind then
    subprocess.run(command, env=environment, capture_output=True, check=True, timeout=120)
    assert not lock.exists()


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_one_worker_goes_on_from_the_state_of_two(
    students: dict[str, str], two_workers: dict[tuple[str, str], Any], mode: str
) -> None:
    state = two_workers["state", ""] / "qwen2" / mode
    losses, _ = curve(students["qwen2"], spec(sharding="none"), state, first=10)
    check(losses, two_workers["qwen2", mode][0][10:])


def test_adapters_and_half_precision_learn_in_every_mode(students: dict[str, str], tmp_path: Path) -> None:
    keys = {"dtype": "bfloat16", "lora": {"rank": 8, "alpha": 16}}
    one, _ = curve(students["llama"], spec(sharding="none", **keys))
    jobs = [{"directory": students["llama"], "keys": {"sharding": mode, **keys}} for mode in MODES]
    for losses, gathered in on_two(jobs, tmp_path / "out"):
        check(losses, one, tolerance=0.02)  # bfloat16 has 8 bits of mantissa
        assert any(".lora_B." in name and float(tensor.abs().max()) > 0 for name, tensor in gathered.items())


def built(kind: str, device: str = "meta", **more: Any) -> Any:
    """A small model of a transformers class; without weights on the device `meta`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **heads, **more}))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gemma", "olmo2"])
def test_a_decoder_of_plain_attention_is_trained_on_packed_chats_as_on_single_ones(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    directory = str(tmp_path)
    built(kind, "cpu").save_pretrained(directory)
    model.refuse(model.skeleton(directory))
    several = chats(4, 4)
    together = float(model.Scored(model.load(directory, spec()))(model.batch(row(several), CPU)).detach())
    assert together == pytest.approx(sum(alone(directory, *chat) for chat in several), rel=1e-5)


@pytest.mark.parametrize(
    "kind, more, why",
    [
        ("gemma2", {}, r"Gemma2ForCausalLM changes its logits after the head \(final_logit_softcapping\)"),
        ("gemma3", {"text_config": {"hidden_size": 64, "num_hidden_layers": 2}}, "reads more than text"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"mixes tokens by more than plain attention \(Conv1d\)"),
        ("gpt_oss", {}, r"mixes tokens by more than plain attention \(model\.layers\.0\.self_attn\.sinks\)"),
        ("mamba", {}, "cannot be replaced"),
    ],
)
def test_a_student_whose_chats_cannot_be_packed_is_refused(kind: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        model.refuse(built(kind, **more))


def test_such_a_student_is_refused_before_the_teacher_is_asked(students: dict[str, str], tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(students["qwen2"], start)
    (start / "config.json").write_text(json.dumps(built("gemma2").config.to_dict()))
    recipe = config.load(str(runs.ROOT / "jobs/recipes/mini.toml"), [f"student.model={start}"])
    with pytest.raises(UserError, match="Gemma2ForCausalLM changes its logits"):
        loop.checked(recipe, ("teacher", "student"), {})
    assert loop.checked(recipe, ("student",), {}), "it can be evaluated"


def test_a_chat_that_the_template_refuses_is_a_row_with_its_reason(students: dict[str, str], tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(students["qwen2"], start)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.CHATML
    (start / "chat_template.jinja").write_text(refuses)
    said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    chats = [said, [{"role": "system", "content": "Be brief."}, *said]]
    rows = [{"id": str(n), "round": 0, "messages": chat} for n, chat in enumerate(chats)]
    table = _tokens_of(pa.Table.from_pylist(rows), str(start), 0, False, 99, {})
    assert table["error"].to_pylist() == [None, "the student's chat template refuses this chat (no system turn)"]


@pytest.mark.parametrize(
    "odd, kept", [({"temperature": 0.9}, {"temperature": 0.9, "do_sample": True}), ({"pad_token_id": -1}, {})]
)
def test_a_generation_config_that_transformers_loads_and_would_not_save_stops_no_export(
    students: dict[str, str], tmp_path: Path, odd: dict[str, Any], kept: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    start = tmp_path / "start"
    shutil.copytree(students["qwen2"], start)
    file = start / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **odd}))
    lm = AutoModelForCausalLM.from_pretrained(start)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        lm.save_pretrained(tmp_path / "plain")
    export.write(dict(lm.state_dict()), str(start), str(tmp_path / "student"))
    found = json.loads((tmp_path / "student/generation_config.json").read_text())
    assert found.items() >= kept.items() and found["eos_token_id"] == json.loads(file.read_text())["eos_token_id"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").generation_config.pad_token_id != -1


def test_an_export_that_is_not_the_trained_model_is_found(students: dict[str, str], tmp_path: Path) -> None:
    net = model.Scored(model.load(students["qwen2"], spec()))
    ids = chats(7, 1)[0][0]
    with torch.no_grad():
        trained = net(model.batch(row([(ids, 1)]), CPU), loss=False)
    export.write({name: p.clone() for name, p in net.lm.state_dict().items()}, students["qwen2"], str(tmp_path / "good"))
    assert export.differs(str(tmp_path / "good"), ids, trained, exact=True) is None
    changed = {name: p * 1.05 if "down_proj" in name else p.clone() for name, p in net.lm.state_dict().items()}
    export.write(changed, students["qwen2"], str(tmp_path / "bad"))
    assert "loads another model" in str(export.differs(str(tmp_path / "bad"), ids, trained, exact=True))
    with pytest.raises(RuntimeError, match="lacks"):
        export.write({"model.norm.weight": changed["model.norm.weight"]}, students["qwen2"], str(tmp_path / "part"))
