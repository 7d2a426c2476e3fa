"""Any OpenAI-compatible endpoint as an engine: chats over HTTP, many in flight, hosted or `vllm serve`.

What the endpoint refuses for one chat is that row's `engine_error`; what no further request can mend (a wrong key, an unknown
model, an endpoint that is down) stops the stage. The key goes into request headers and nowhere else.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from openai import APIError, APIStatusError, AsyncOpenAI
from pydantic import SecretStr

from undo_ray.config import Sampling, TeacherEngine
from undo_ray.engines import generation
from undo_ray.types import Message, Row, UserError

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the first and before any further try; in between they double, each less a random part up to half."""

LONGEST_ASKED = 600.0
"""Seconds of a `Retry-After` that are waited at most."""

DOWN = 16
"""Requests in a row that were given up, from which on the endpoint is taken for down."""

AGAIN = (408, 409, 429)
"""Status codes, beside 5xx, after which a request is tried again."""

NO_USE = {
    401: "it does not accept {key}; export a valid key, or name its variable in teacher.engine.endpoint.key_env",
    402: "the account of {key} has no credit; add some, and the same command goes on",
    403: "{key} may not use the model {model}; give another teacher.model, or a key that may",
    404: "it has no model {model}, or nothing at this path; mend teacher.model or teacher.engine.endpoint.base_url (up to /v1)",
}
"""Status codes after which no other request would fare better, and the remedy."""

UNUSABLE = (APIError, TimeoutError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What the client and `_read` raise for anything but an answer: lost connections, timeouts, bodies that are none."""


class OpenAI:
    """One client; `answer` may be called from several threads, whose requests share the limits."""

    nodes: Sequence[str] = ()

    def __init__(self, model: str, engine: TeacherEngine, sampling: Sampling, key: SecretStr | None):
        """`model`: the endpoint's name for it."""
        spec = self.spec = engine.endpoint
        self.model, self.key = model, key.get_secret_value() if key else None
        self.named = f"the key in ${spec.key_env}" if self.key else "a request without a key"
        longest = {} if "max_completion_tokens" in engine.kwargs else {"max_tokens": sampling.max_tokens}
        stop = {"stop": list(sampling.stop)} if sampling.stop else {}
        self.fixed: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, **longest, **stop}
        template = {"chat_template_kwargs": engine.chat_template_kwargs} if engine.chat_template_kwargs else {}
        self.extra = {**template, **engine.kwargs}
        self.unanswered, self.next_turn = 0, 0.0
        self.pause = 60 / spec.requests_per_minute if spec.requests_per_minute else 0.0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name="undo_ray endpoint").start()
        asyncio.run_coroutine_threadsafe(self._open(), self.loop).result()

    async def _open(self) -> None:
        self.slots, self.turns = asyncio.Semaphore(self.spec.concurrency), asyncio.Lock()
        # Tries are counted and spaced here, for all requests together; a server that takes no key ignores the one sent.
        self.client = AsyncOpenAI(
            base_url=self.spec.base_url, api_key=self.key or "none", max_retries=0, timeout=self.spec.timeout
        )

    def end(self) -> None:
        """See `engines.Speaker`: the endpoint is not ours to end."""

    def answer(self, chats: Sequence[list[Message]], seeds: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """See `engines.Speaker`."""
        done: queue.SimpleQueue[tuple[int, Row] | Exception] = queue.SimpleQueue()
        asyncio.run_coroutine_threadsafe(self._answer(chats, seeds, done.put), self.loop)
        for _ in chats:
            found = done.get()
            if isinstance(found, Exception):
                raise found
            yield found

    async def _answer(
        self, chats: Sequence[list[Message]], seeds: Sequence[int], put: Callable[[tuple[int, Row] | Exception], None]
    ) -> None:
        async def one(index: int) -> None:
            put((index, await self._sample(chats[index], seeds[index])))

        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(chats)):
                    group.create_task(one(index))
        except ExceptionGroup as errors:  # the others were cancelled for the first
            put(errors.exceptions[0])

    async def _sample(self, chat: list[Message], seed: int) -> Row:
        async with self.slots:
            tried = 0
            while True:
                tried += 1
                async with self.turns:  # first come, first served
                    while (wait := self.next_turn - self.loop.time()) > 0:
                        await asyncio.sleep(wait)
                    self.next_turn = self.loop.time() + self.pause
                try:
                    found = _read(await asyncio.wait_for(self._request(chat, seed), self.spec.timeout))
                except UNUSABLE as error:
                    reason, status = self._words(error), getattr(error, "status_code", None)
                    self._stop_if_useless(error, status)
                    if status is not None and status not in AGAIN and 400 <= status < 500:
                        self.unanswered = 0
                        return generation(error=reason)
                    if tried > self.spec.retries:
                        self._give_up(reason)
                        return generation(error=f"{reason} (tried {tried} times)")
                    # An endpoint that asks for a rest gets it from all requests.
                    self.next_turn = max(self.next_turn, self.loop.time() + _asked_to_wait(error))
                    await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tried - 1)) * random.uniform(0.5, 1))
                else:
                    self.unanswered = 0
                    return found

    async def _request(self, chat: list[Message], seed: int) -> Any:
        seeded = {"seed": seed} if self.spec.send_seed else {}
        request = {"model": self.model, "messages": chat, **seeded, **self.fixed}
        return await self.client.chat.completions.create(**request, extra_body=self.extra)

    def _stop_if_useless(self, error: Exception, status: int | None) -> None:
        spent = isinstance(error, APIError) and error.code == "insufficient_quota"
        if (status := 402 if spent else status) in NO_USE:
            remedy = NO_USE[status].format(key=self.named, model=self.model)
            raise UserError(f"{self.spec.base_url}: {remedy} ({self._words(error)})") from None

    def _give_up(self, reason: str) -> None:
        self.unanswered += 1
        if self.unanswered >= DOWN:
            raise UserError(
                f"{self.spec.base_url}: no answer to {DOWN} requests in a row, each tried {self.spec.retries + 1} times "
                f"({reason}); see that the endpoint is up, or lower teacher.engine.endpoint.concurrency",
                exit_code=1,
            )

    def _words(self, error: Exception) -> str:
        """What went wrong, in a line without the key: endpoints quote what they were sent."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, TimeoutError):
            text = f"no answer within {self.spec.timeout:g} s"
        elif error.__cause__ is not None:  # what the client calls a connection error
            text += f" ({type(error.__cause__).__name__}: {' '.join(str(error.__cause__).split())})"
        return _clean(text.replace(self.key, "[key]") if self.key else text)[:500]


def _read(answer: Any) -> Row:
    """A generation from a chat completion, whose every part may be missing or of another type.

    Raises one of `UNUSABLE` when it holds no answer at all.
    """
    choice, usage = answer.choices[0], answer.usage
    said, thought = choice.message.content, _thought(choice.message)
    if not isinstance(said, str | None):
        raise TypeError("the answer's content is no text")
    cached = _number(getattr(usage, "prompt_tokens_details", None), "cached_tokens")
    counts = (_number(usage, "prompt_tokens"), cached, _number(usage, "completion_tokens"))
    if choice.finish_reason not in ("stop", "length"):
        return generation(None, None, *counts, error=f"the answer ended with {_clean(str(choice.finish_reason))[:100]}")
    # As an engine writes it that does not set a model's reasoning apart.
    text = f"<think>{thought}</think>{said or ''}" if thought else said or ""
    return generation(_clean(text), choice.finish_reason, *counts)


def _thought(message: Any) -> str | None:
    known = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
    return next((text for text in known if isinstance(text, str) and text), None)


def _number(part: Any, name: str) -> int:
    value = getattr(part, name, None)
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON can spell and Parquet cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _asked_to_wait(error: Exception) -> float:
    """Seconds of a `Retry-After` header, a number or a date; 0 where there is none that can be read."""
    if not isinstance(error, APIStatusError):
        return 0.0
    asked = error.response.headers.get("retry-after", "0")
    try:
        try:
            seconds = float(asked)
        except ValueError:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), LONGEST_ASKED)
