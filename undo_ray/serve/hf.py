"""A student with `transformers`: one request at a time per replica, over a small OpenAI-compatible application.

The application of `transformers serve` (5.19) is not used: it ignores fields it does not know (`n`, `logprobs`,
`max_completion_tokens`), draws nothing at a temperature, answers errors in FastAPI's shape, ends streams without `[DONE]`, has
no limit of the context, and lets any client load other models (`/load_model`) or unload this one (`/reset`).
"""

from __future__ import annotations

import asyncio
import copy
import json
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig

from undo_ray import models
from undo_ray.config import Engine

GREEDY = 1e-5
"""Temperatures below it are greedy decoding, as in vLLM."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Text(_Strict):
    type: Literal["text"]
    text: str


class Turn(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[Text]

    @property
    def plain(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool = False


class Chat(_Strict):
    """The body of a chat completion request, as far as this engine serves it: everything else is refused."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: str | None = None
    # The one value of each that asks for nothing, because clients send it.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class Refused(Exception):
    """What the client gets, in OpenAI's shape."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Answer:
    """What is generated for one request. `generate` calls it after each token, as a stopping criterion, in its own thread; the
    request's handler iterates over the pieces of text."""

    def __init__(self, tokenizer: Any, ends: set[int], stops: list[str]):
        self.tokenizer, self.ends, self.stops = tokenizer, ends, stops
        self.tokens: list[int] = []
        self.finish_reason = "length"
        self.over = threading.Event()
        """Nothing more is wanted: it ended, or the client left."""
        self._text, self._sent, self._cut = "", 0, False
        self._decoder = DecodeStream([], skip_special_tokens=True)
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[str | Exception | None]()

    def __call__(self, ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        if not self.over.is_set():
            self._add(int(ids[0, -1]))
        return torch.tensor([self.over.is_set()], device=ids.device)

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        before = len(self._text)
        self._text += self._piece(token)
        longest = max(map(len, self.stops), default=1)
        found = [at for at in (self._text.find(stop, max(0, before - longest + 1)) for stop in self.stops) if at >= 0]
        if found:
            self._text, self._cut = self._text[: min(found)], True
        if found or token in self.ends:
            self.finish_reason = "stop"
            self.over.set()
        self._send(len(self._text) - longest + 1)  # the last letters may be the beginning of a stop text

    def _piece(self, token: int) -> str:
        """The text that a token adds."""
        try:
            return self._decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        except Exception as error:
            # tokenizers 0.23 raises this where a token changes how those before it read (vllm#17448): go on from here.
            if "Invalid prefix" not in str(error):
                raise
            self._decoder = DecodeStream([], skip_special_tokens=True)
            return self._decoder.step(self.tokenizer.backend_tokenizer, token) or ""

    def _send(self, end: int) -> None:
        if end > self._sent:
            self._put(self._text[self._sent : end])
            self._sent = end

    def _put(self, piece: str | Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def close(self, error: Exception | None = None) -> None:
        """The last thing that `generate`'s thread does for it."""
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not self._cut and whole.startswith(self._text):
            self._text = whole  # with what is left of a character that was not finished
        self._send(len(self._text))
        self._put(error)

    async def __aiter__(self) -> AsyncIterator[str]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise Refused(f"the engine failed: {type(piece).__name__}: {piece}"[:500], status=500) from piece
            yield piece


class Transformers:
    """A replica."""

    def __init__(self, model: str, name: str, engine: Engine):
        directory = models.local(model, 0)
        torch.set_num_threads(max(1, int(engine.resources.cpus)))
        self.name, self.engine, self.born = name, engine, int(time.time())
        self.tokenizer = models.tokenizer(directory, trust=False)
        loaded = models.weights(directory, trust=False, dtype=getattr(torch, engine.dtype))
        self.model = loaded.to("cuda" if engine.resources.gpus else "cpu").eval()
        known = [longest for longest in (engine.context, models.context(self.model.config)) if longest]
        self.context = min(known, default=sys.maxsize)
        self.ends = set(models.ends(self.tokenizer, self.model.generation_config))
        pad = self.tokenizer.pad_token_id
        self.pad = min(self.ends) if pad is None else pad
        self.work = ThreadPoolExecutor(1)

    def __serve_build_asgi_app__(self) -> Starlette:
        """Called by Serve (see `ray.serve.ingress`)."""
        routes = [
            Route("/v1/models", self._list),
            Route("/v1/models/{name:path}", self._retrieve),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={Refused: _refuse, 404: _refuse, 405: _refuse, 500: _refuse})

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _retrieve(self, request: Request) -> Response:
        self._known(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        limits = {"max_model_len": self.context}  # as vLLM tells it
        return {"id": self.name, "object": "model", "created": self.born, "owned_by": "undo-ray", **limits}

    def _known(self, name: str) -> None:
        if name != self.name:
            raise Refused(f"The model {name!r} does not exist; this is {self.name!r}", "model", "model_not_found", 404)

    async def _chat(self, request: Request) -> Response:
        asked = _parsed(await request.body())
        self._known(asked.model)
        prompt = await asyncio.to_thread(self._prompt, asked)
        config = self._config(asked, len(prompt))
        answer = Answer(self.tokenizer, self.ends, asked.stops)
        self.work.submit(self._generate, prompt, config, asked.seed, answer)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return StreamingResponse(_events(answer, head, len(prompt) if usage else None), media_type="text/event-stream")
        try:
            text = "".join([piece async for piece in answer])
        finally:
            answer.over.set()
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
        choices = [{**choice, "finish_reason": answer.finish_reason}]
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": _usage(len(prompt), answer)})

    def _prompt(self, asked: Chat) -> list[int]:
        """Token ids of the chat. Raises Refused when it leaves no room for an answer."""
        chat = [{"role": turn.role, "content": turn.plain} for turn in asked.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **self.engine.chat_template_kwargs
            )
        except Exception as error:  # the template's own `raise_exception`, and whatever else a template does
            raise Refused(f"the model's chat template refuses these messages: {error}", "messages") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _config(self, asked: Chat, prompt: int) -> GenerationConfig:
        """What is not asked for is as the model's generation_config.json has it, as with vLLM."""
        room = self.context - prompt
        longest = asked.max_completion_tokens or asked.max_tokens or room
        if room < 1 or longest > self.context:
            what, param = (
                (f"the messages have {prompt}", "messages") if room < 1 else (f"{longest} were asked for", "max_tokens")
            )
            raise Refused(f"This model's context is {self.context} tokens; {what}", param, "context_length_exceeded")
        config = copy.deepcopy(self.model.generation_config)
        temperature = next(t for t in (asked.temperature, config.temperature, 1.0) if t is not None)
        config.do_sample = temperature >= GREEDY
        config.temperature = temperature if config.do_sample else None
        config.top_p = (asked.top_p or config.top_p or 1.0) if config.do_sample else None
        config.top_k = (config.top_k or 0) if config.do_sample else None
        config.max_length, config.max_new_tokens = None, min(longest, room)
        config.eos_token_id, config.pad_token_id = sorted(self.ends), self.pad
        return config

    def _generate(self, prompt: list[int], config: GenerationConfig, seed: int | None, answer: Answer) -> None:
        """In the one thread that generates."""
        error: Exception | None = None
        try:
            if not answer.over.is_set():
                torch.seed() if seed is None else torch.manual_seed(seed)
                ids = torch.tensor([prompt], device=self.model.device)
                with torch.inference_mode():
                    self.model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[answer]
                    )
        except Exception as failure:
            error = failure
        answer.close(error)


def _parsed(body: bytes) -> Chat:
    try:
        return Chat.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        message = f"{param or 'the body'}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            message = f"{param}: not supported by this server"
        raise Refused(message, param) from None


async def _refuse(request: Request, error: Exception) -> Response:
    if not isinstance(error, Refused):
        status = getattr(error, "status_code", 500)
        error = Refused(getattr(error, "detail", "internal error"), status=status)
    return JSONResponse(error.body, error.status)


def _usage(prompt: int, answer: Answer) -> dict[str, int]:
    done = len(answer.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}


async def _events(answer: Answer, head: dict[str, Any], usage_of: int | None) -> AsyncIterator[str]:
    """Server-sent events; with the usage where the number of prompt tokens is given."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        return event({**head, "object": "chat.completion.chunk", "choices": choices})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in answer:
            yield chunk({"content": piece})
        yield chunk({}, answer.finish_reason)
        if usage_of is not None:
            yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(usage_of, answer)})
        yield "data: [DONE]\n\n"
    except Refused as error:
        yield event(error.body)
    finally:
        answer.over.set()
