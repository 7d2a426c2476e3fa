"""ModelRef to local disk. A model is named by a hub id (`org/name` or `org/name@revision`), a directory, a URI, or
`package.module:function`, a function of the run's seed that returns a directory. Nothing else in undo_ray opens URIs of models.

`check` runs in the driver before any work, `local` on each node that loads the model. What transformers loads, it loads through
`tokenizer`, `config` and `weights`: safetensors, no pickle, and code that lies beside them only where the recipe trusts it
(`trust_remote_code`; transformers' own default asks whoever sits at the terminal).
"""

from __future__ import annotations

import hashlib
import os
import pkgutil
import re
import tempfile
from collections.abc import Iterable
from typing import Any

from undo_ray.place import Place, cache
from undo_ray.types import UserError, first_line

_MADE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py")


def local(ref: str, seed: int, weights: bool = True) -> str:
    """A directory on this node's disk that holds the model; downloads once per node, under a lock. `weights` False: what is
    only asked for its tokenizer or configuration is downloaded without them, since the node may have no room.

    Raises UserError when the reference leads to nothing that looks like a model (config.json and safetensors weights).
    """
    if _MADE.fullmatch(ref):
        directory = _make(ref, seed)
    elif "://" in ref:
        directory = _download(ref, weights)
    else:
        directory = _hub(ref, _FILES if weights else _FILES[1:]) if _is_hub(ref) else ref
    if weights:
        _looked_at(ref, os.listdir(directory) if os.path.isdir(directory) else ())
    return directory


def _looked_at(ref: str, names: Iterable[str]) -> None:
    """Raises UserError when a folder with these names is no model."""
    if "config.json" not in names:
        raise UserError(f"model {ref}: has no config.json; give a directory that transformers can load")
    if "adapter_config.json" in names:  # transformers would put it over the weights, vLLM not
        raise UserError(f"model {ref}: holds an adapter; merge it into the weights, or take its files away")
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"model {ref}: has no *.safetensors weights; save the model with save_pretrained")


def tokenizer(directory: str, trust: bool) -> Any:
    """The tokenizer of a directory that `local` gave. `trust`: run code that lies there."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)


def config(directory: str, trust: bool) -> Any:
    """Its configuration."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, trust_remote_code=trust)


def context(config: Any) -> int | None:
    """Tokens that a model of this configuration reads at most; None where it does not say. One that sees images too has a
    configuration of its own for text."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(longest) if longest else None


def weights(directory: str, trust: bool, **options: Any) -> Any:
    """Its causal language model; `options` of transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust, use_safetensors=True, **options)


def located(ref: str, fingerprint: str | None) -> str:
    """The reference as workers can use it: a relative directory becomes absolute, since their working directory is another, and
    a hub model's name gets the commit that `check` found, so that a node that comes later has the same."""
    if fingerprint and _COMMIT.fullmatch(fingerprint) and _is_hub(ref):
        return f"{ref.partition('@')[0]}@{fingerprint}"
    return os.path.abspath(ref) if os.path.isdir(ref) else ref


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after what the assistant says; None where there is none.

    Of a base model it may be another than its end of text: Qwen2.5 ends turns with `<|im_end|>` and texts with `<|endoftext|>`.
    """
    said = "What the assistant says."
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(token for token, what in added.items() if what.special)}
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    _, found, rest = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(said)
    for token in tokenizer(rest, add_special_tokens=False)["input_ids"] if found else ():
        if token in special:
            return int(token)
        if tokenizer.decode([token]).strip():
            break
    return None


def ends(tokenizer: Any, generation_config: Any) -> list[int]:
    """Tokens at which an answer ends: those the model names itself, and the one its chat template ends turns with."""
    own = generation_config.eos_token_id or tokenizer.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), turn_end(tokenizer)} - {None}
    return sorted(int(token) for token in found)


def check(ref: str, seed: int, key: str, trust: bool = False) -> str:
    """Fingerprint of a model's weights and tokenizer (and of its code, with `trust`), for the run's identity.

    A hub model's is its commit, and of a URI's weights only samples are read, so that the driver's node need not hold them.
    Raises UserError naming `key` when it is not a model, has code of its own that is not trusted, or its tokenizer has no chat
    template.
    """
    try:
        return _fingerprint(ref, seed, trust)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _fingerprint(ref: str, seed: int, trust: bool) -> str:
    if "://" in ref:
        place = Place(ref)
        _looked_at(ref, place.names())
        with tempfile.TemporaryDirectory() as directory:
            place.download(directory, _FILES[1:])
            _speaks(ref, directory, trust)
        return _weights_hash(place, trust)
    directory = local(ref, seed, weights=not _is_hub(ref))
    _speaks(ref, directory, trust)
    return os.path.basename(directory) if _is_hub(ref) else _weights_hash(Place(directory), trust)


def _speaks(ref: str, directory: str, trust: bool) -> None:
    """Raises UserError unless configuration and tokenizer load, and the tokenizer has a chat template."""
    for what, read in (("configuration", config), ("tokenizer", tokenizer)):
        try:
            made = read(directory, trust)
        except (OSError, ValueError, KeyError) as error:
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"{ref}: has code of its own, which is not run; read it and set trust_remote_code = true beside the model, "
                    "or give another"
                ) from None
            raise UserError(f"{ref}: its {what} does not load ({first_line(error)}); save one beside the weights") from None
    if not getattr(made, "chat_template", None):
        raise UserError(f"{ref}: its tokenizer has no chat template; use an instruct model, or save one with the tokenizer")


def _is_hub(ref: str) -> bool:
    return bool(_HUB.fullmatch(ref)) and not os.path.isdir(ref)


def _hub(ref: str, patterns: tuple[str, ...]) -> str:
    """Directory of a hub model's files that match, named by their commit."""
    from huggingface_hub import snapshot_download

    name, _, revision = ref.partition("@")
    try:
        return str(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises a dozen types; all mean that the model is not to be had
        raise UserError(
            f"model {ref}: no such directory, and the hub did not give it ({first_line(error)}); check the name"
        ) from None


def _make(ref: str, seed: int) -> str:
    try:
        return str(pkgutil.resolve_name(ref)(seed))
    except (ImportError, AttributeError) as error:
        raise UserError(f"model {ref}: {error}; write it as package.module:function") from None


def _download(uri: str, weights: bool) -> str:
    from filelock import FileLock

    place = Place(uri)
    # Of files that were written anew, a node must not keep the old ones while another has the new.
    version = [uri, *((name, info.size, info.mtime_ns) for name, info in place.files().items())]
    target = cache() / "models" / f"{hashlib.sha256(repr(version).encode()).hexdigest()[:24]}{'' if weights else '-light'}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / ".complete").exists():
            _looked_at(uri, place.names())
            target.mkdir(exist_ok=True)
            place.download(str(target), _FILES if weights else _FILES[1:])
            (target / ".complete").touch()
    return str(target)


def _weights_hash(model: Place, trust: bool) -> str:
    """Hash over names, sizes and 64 KiB samples of the model's files: seconds even for hundreds of GB, on a store too."""
    total, files = hashlib.sha256(), model.files()
    kept = [name for name in files if "/" not in name and name.endswith((".safetensors", ".json", ".jinja", ".model"))]
    for name in [*kept, *([name for name in files if name.endswith(".py")] if trust else ())]:
        size = files[name].size
        total.update(f"{os.path.basename(name)}:{size};".encode())
        with model.fs.open_input_file((model / name).path) as stream:
            for offset in sorted({0, size // 2, max(0, size - 65536)}):
                stream.seek(offset)
                total.update(stream.read(65536))
    return total.hexdigest()[:16]
