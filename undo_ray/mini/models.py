"""The miniature world's tokenizer, its shipped teacher and its fresh students: all plain Hugging Face directories."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undo_ray.mini import world

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' <assistant> ' }}"
    "{% generation %}{{ message['content'] + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' <user> ' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)

CONTEXT = 1024
TEACHER_THETA, STUDENT_THETA = 5e5, 1e4
"""The teacher looks things up over hundreds of tokens, where slowly turning positions help; the student only nearby."""
TEACHER = {"hidden_size": 160, "num_attention_heads": 5, "num_hidden_layers": 4, "intermediate_size": 480}
STUDENT = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 288}


def tokenizer() -> "PreTrainedTokenizerFast":
    """Words and single digits; decoding joins digits to numbers and puts signs where people put them."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(world.vocabulary())}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(world.WORD), "isolated")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),  # joins words with spaces
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])"), ""),
            decoders.Replace(Regex(r" (?=[.,:?])"), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def config(shape: dict[str, int], theta: float) -> "LlamaConfig":
    """A Llama over the world's words. Heads are 32 wide, the least that vLLM's CPU attention takes; the embeddings are
    not tied, because vLLM reloads tied ones wrongly on CPU."""
    from transformers import LlamaConfig

    pad, bos, eos = (world.SPECIAL.index(token) for token in ("<pad>", "<bos>", "<eos>"))
    return LlamaConfig(
        vocab_size=len(world.vocabulary()),
        num_key_value_heads=shape["num_attention_heads"],
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
        **shape,
    )


def teacher(seed: int) -> str:
    """The teacher that comes with the package; there is one, so the seed changes nothing."""
    return str(Path(__file__).parent / "teacher")


def student(seed: int) -> str:
    """A student that knows nothing: written once into the cache, then always the same directory."""
    cache = Path(os.environ.get("UNDO_RAY_CACHE") or Path.home() / ".cache" / "undo_ray")
    recipe = json.dumps([STUDENT, STUDENT_THETA, CONTEXT, CHAT_TEMPLATE, world.WORD, world.vocabulary()], sort_keys=True)
    target = cache / f"mini-student-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}-{seed}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=target.name, dir=cache)
        _write_student(scratch, seed)
        os.chmod(scratch, 0o755)
        try:
            os.rename(scratch, target)
        except OSError:  # another process was first: its student is the same
            shutil.rmtree(scratch)
    return str(target)


def _write_student(directory: str, seed: int) -> None:
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config(STUDENT, STUDENT_THETA))
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
