"""A student with vLLM: its own OpenAI server application, in the replica instead of behind a socket.

`ray.serve.llm` (Ray 2.60) wraps the same application and engine: docs/decisions.md says why it is not used.
"""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

from undo_ray import models
from undo_ray.config import Engine

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class VLLM:
    """A replica. The engine is a process of its own (`EngineCore`), which ends with the replica, killed or not."""

    async def __init__(self, model: str, name: str, engine: Engine):  # type: ignore[misc]  # Serve awaits it
        directory = await asyncio.to_thread(models.local, model, 0)
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        for key, value in _arguments(directory, name, engine).items():
            assert hasattr(self.args, key), f"vLLM has no argument {key}"
            setattr(self.args, key, value)
        self._opened = build_async_engine_client(self.args)  # a context manager: held, or the engine would end
        self.client = await self._opened.__aenter__()

    async def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve (see `ray.serve.ingress`)."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self.client.get_supported_tasks()
        app = build_app(self.args, tasks, self.client.model_config)
        await init_app_state(self.client, app.state, self.args, tasks)
        app.state.server = SimpleNamespace()  # a broken engine makes vLLM tell its uvicorn to stop; here check_health sees it
        return app

    async def check_health(self) -> None:
        """Called by Serve: a replica whose engine died is replaced."""
        await self.client.check_health()


def _arguments(directory: str, name: str, engine: Engine) -> dict[str, Any]:
    """Of vLLM's server, by their names on the parsed command line."""
    from undo_ray.engines.vllm import arguments

    return {
        **arguments(directory, engine),
        "served_model_name": [name],
        "trust_remote_code": False,
        "disable_fastapi_docs": True,
        "default_chat_template_kwargs": engine.chat_template_kwargs or None,
    }
