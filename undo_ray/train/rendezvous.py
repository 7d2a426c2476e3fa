"""torch's rendezvous of training workers on loopback, where they are told to meet there."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_inward)
        super().on_start(worker_group, backend_config)


@dataclass
class Inward(TorchConfig):
    """A `TorchConfig` whose rank 0 listens on 127.0.0.1 alone when that is its address.

    torch's `TCPStore` listens on all interfaces, whatever its host, unless it is given a socket (`master_listen_fd`); neither
    `init_process_group` nor Ray Train (2.60) passes one on.
    """

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def _inward() -> None:
    """In a worker, before its process group is made."""
    from torch.distributed import TCPStore

    def store(host_name: str, port: int, *, is_master: bool, **options: Any) -> Any:
        if is_master and host_name == "127.0.0.1":
            options["master_listen_fd"] = socket.create_server((host_name, port)).detach()
        return TCPStore(host_name, port, is_master=is_master, **options)

    # `torch.distributed.rendezvous` is a function; the module of that name is found here alone.
    sys.modules["torch.distributed.rendezvous"].TCPStore = store  # type: ignore[attr-defined]
