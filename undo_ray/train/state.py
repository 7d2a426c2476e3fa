"""Training state is read back as tensors and plain values: a checkpoint is pickles, and whoever can write a run directory must
not run code by one. What a file names beyond the lists here is refused before it is made."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from undo_ray.types import UserError

_DESCRIPTION = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": set(
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
        "_MEM_FORMAT_ENCODING".split()
    ),
    "torch.serialization": {"_get_layout"},
}
"""What torch's description of a distributed checkpoint is made of, by module, beside types of numbers (`torch.float32`)."""


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTION.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")


@contextmanager
def guarded(directory: str, kinds: Sequence[type] = ()) -> Iterator[None]:
    """Around the loading of a checkpoint, in which `torch.load` then takes tensors, plain values and `kinds` alone, whatever it
    is asked for. Raises UserError when it, or a description of the checkpoint, met anything else."""
    forced = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch; DeepSpeed and torch's checkpoints ask for everything
    before = {forced: os.environ[forced]} if forced in os.environ else {}
    os.environ[forced] = "1"
    try:
        for path in Path(directory).glob("*.metadata"):
            with path.open("rb") as file:
                _Description(file).load()
        with torch.serialization.safe_globals(list(kinds)):
            yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        found = re.search(r"UnpicklingError: (.*)", f"{type(error).__name__}: {error}")
        if not found:
            raise
        raise UserError(
            f"a training checkpoint is damaged or could run code ({found[1][:200]}); delete the folder `resume` of the "
            "student's stage to train this round from its start",
            exit_code=4,
        ) from error
    finally:
        del os.environ[forced]
        os.environ.update(before)
