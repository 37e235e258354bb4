"""A chat-completions server that may fail in any way, asked with bounds on how many, how often and for how long.

Invariant: until the server has answered one request as it should, whatever it does instead is raised, in one sentence that
says what to change; after that a request that fails costs its own branch and nothing else. The key is in no sentence.

Two layers ask again. The client of `openai` repeats requests that were dropped, that stalled, or that were refused for now
(408, 409, 429, 5xx), with growing pauses and as `Retry-After` says; answers that are no reply are asked for again here. Both
draw on the same `max_retries`. Once `BREAK_AFTER` requests in a row have failed for good, the server counts as gone: requests
fail at once, and every `PAUSE` seconds one is sent, without repetition, to see whether it is back.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

from agents.policies.openai_reply import Reply, TooLong, Unusable, read_models, read_reply, too_long, words_of

try:
    from aiolimiter import AsyncLimiter
    from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, Timeout
except ImportError as error:
    raise ImportError(
        f"asking a server needs the package {error.name!r}: pip install 'trace-envs[openai]'", name=error.name
    ) from error

BREAK_AFTER = 5
"""Requests in a row that fail for good before the server counts as gone."""
PAUSE = 30.0
"""Seconds between the requests that are sent to a server that counts as gone."""
CONNECT_TIMEOUT = 10.0
MAX_BYTES = 64 << 20
"""Longest answer that is read."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
SHORTEST_KEY = 5
"""What is given as a key and is shorter is none (`x` for a local server), and may stand anywhere in an error message."""

_ABOUT_THE_REQUEST = (400, 413, 422)
_WORDS = 300


class Unanswered(Exception):
    """There is no reply to one request, and there will be none.

    Attributes:
        reason: `context` if the conversation is too long for the model, else `error`.
    """

    def __init__(self, reason: Literal["context", "error"], note: str):
        super().__init__(note)
        self.reason, self.note = reason, note


class ChatServer:
    """Asks one server.

    Args:
        client: The client, with the key; its own limits are replaced by those given here.
        key_env: Environment variable that the key is from, for error messages.
        max_concurrency: Most requests under way at once.
        requests_per_minute: Most requests that are begun in a minute, evenly spread; `None` for no limit. What the client
            repeats is not counted.
        timeout: Seconds that the server may be silent before it answers, and that the answer may then take to arrive.
        max_retries: Times that a request is repeated.
    """

    def __init__(
        self,
        client: AsyncOpenAI,
        *,
        key_env: str,
        max_concurrency: int,
        requests_per_minute: float | None,
        timeout: float,
        max_retries: int,
    ):
        self._client = client.with_options(timeout=Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)))
        self._key_env, self._timeout, self._max_retries = key_env, timeout, max_retries
        self.url = str(client.base_url)
        self._places = asyncio.Semaphore(max_concurrency)
        # One at a time: a bucket for a whole minute would let all of it go at once.
        self._limiter = None if requests_per_minute is None else AsyncLimiter(1, 60 / requests_per_minute)
        self._meeting = asyncio.Lock()
        self._models: list[str] | None = None
        self._served = False
        self._failures, self._next_probe = 0, 0.0

    async def models(self) -> list[str]:
        """Returns the names of the models that the server lists; none from a server that lists none.

        Raises:
            ConnectionError: The server cannot be reached.
        """
        async with self._meeting:
            if self._models is None:
                self._models = await self._list_models()
        return self._models

    async def ask(self, body: dict[str, Any]) -> Reply:
        """Sends a request for a chat completion.

        Raises:
            Unanswered: This request gets no reply.
            ValueError: The first request was refused: key, model, address or another setting is wrong.
            ConnectionError: The server cannot be reached, or does not answer the first request as it should.
        """
        if not self._served:
            await self.models()
        async with self._places:
            retries = self._retries()
            failure = await self._ask(body, retries)
        if isinstance(failure, Reply):
            return failure
        raise failure

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _retries(self) -> int:
        """Returns how often the next request may be repeated.

        Raises:
            Unanswered: The server counts as gone.
        """
        if self._failures < BREAK_AFTER:
            return self._max_retries
        if (now := time.monotonic()) < self._next_probe:
            raise Unanswered("error", f"The last {self._failures} requests failed; this one was not sent.")
        self._next_probe = now + PAUSE
        return 0

    async def _ask(self, body: dict[str, Any], retries: int) -> Reply | Exception:
        """Returns the reply, or what is to be raised."""
        left, pause = retries, FIRST_PAUSE
        while True:
            if self._limiter is not None:
                await self._limiter.acquire()
            try:
                answer, repeated = await self._send(body, left)
                reply = read_reply(answer) if isinstance(answer, bytes) else answer
            except Unusable as error:
                reply = error
            except TooLong as error:
                return self._too_long(str(error))
            except APIStatusError as error:
                return self._refused(error)
            except APIConnectionError as error:
                return self._unreached(error, left + 1)
            if isinstance(reply, Reply):
                self._served, self._failures = True, 0
                return reply
            left -= repeated + 1
            if not reply.again:
                self._served = True
                return Unanswered("error", f"The server {self._clean(str(reply))}.")
            if left < 0:
                hint = "; correct --base-url if this is no chat-completions server (its address often ends in /v1)"
                return self._failed(ConnectionError, str(reply), hint)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _send(self, body: dict[str, Any], retries: int) -> tuple[bytes | Unusable, int]:
        """Returns the answer to one request, or why it did not arrive whole, and how often the client repeated it."""
        client = self._client.with_options(max_retries=retries)
        rest = {key: value for key, value in body.items() if key not in ("model", "messages")}
        request = client.chat.completions.with_streaming_response.create(
            model=body["model"], messages=body["messages"], extra_body=rest
        )
        async with request as response:
            return await self._read(response), response.retries_taken

    async def _read(self, response: Any) -> bytes | Unusable:
        answer = bytearray()
        try:
            async with asyncio.timeout(self._timeout):
                async for chunk in response.iter_bytes():
                    answer += chunk
                    if len(answer) > MAX_BYTES:
                        return Unusable(f"answers with more than {MAX_BYTES >> 20} MiB")
        except TimeoutError:
            return Unusable(f"takes more than {self._timeout:g} s to send its answer")
        except Exception as error:  # of whichever HTTP library the client is built on
            return Unusable(f"breaks off its answer ({type(error).__name__})")
        return bytes(answer)

    async def _list_models(self) -> list[str]:
        client = self._client.with_options(max_retries=min(self._max_retries, 1))
        try:
            async with client.models.with_streaming_response.list() as response:
                answer = await self._read(response)
                return read_models(answer) if isinstance(answer, bytes) else []
        except (APIStatusError, APITimeoutError):
            return []  # many servers list nothing, and a busy one may be slow to
        except APIConnectionError as error:
            failure = self._unreached(error, 1)
        raise failure  # outside of any `except`: an exception of the client holds the request and its key

    def _too_long(self, words: str) -> Unanswered:
        self._failures = 0
        return Unanswered("context", f"The conversation is too long for the model: {self._clean(words)}")

    def _refused(self, error: APIStatusError) -> Exception:
        """Returns what to raise for an answer with an error status, after the client's repetitions."""
        status, words = error.status_code, words_of(error.body) if error.body else "no explanation"
        if status == 413 or (status in (*_ABOUT_THE_REQUEST, 500) and too_long(words)):
            return self._too_long(words)
        if status in _ABOUT_THE_REQUEST and (self._served or "content_filter" in words):
            return Unanswered("error", f"The server refuses the conversation (HTTP {status}): {self._clean(words)}")
        what = f"answers with HTTP {status} ({self._clean(words)})"
        if status in (401, 403):
            return self._failed(ValueError, what, f"; put a key that it takes into the variable {self._key_env}")
        if status in (404, 405):
            return self._failed(ValueError, what, f"; correct --model or --base-url: it lists {self._listed()}")
        if status == 429:
            return self._failed(ConnectionError, what, "; lower --requests-per-minute or raise --max-retries")
        if status < 500:
            return self._failed(
                ValueError, what, f"; change the setting that it names (models that it lists: {self._listed()})"
            )
        return self._failed(ConnectionError, what, "; see its log")

    def _unreached(self, error: APIConnectionError, times: int) -> Exception:
        if isinstance(error, APITimeoutError):
            what = f"gave no answer within {self._timeout:g} s, asked {times} times"
            return self._failed(ConnectionError, what, "; raise --timeout if it is only slow")
        cause = self._clean(str(error.__cause__)) or "connection error"
        return self._failed(ConnectionError, f"cannot be reached ({cause})", "; start it, or correct --base-url")

    def _failed(self, kind: type[Exception], what: str, hint: str) -> Exception:
        """Counts a failure and returns what to raise for it."""
        if not self._served:
            return kind(f"the server at {self.url} {self._clean(what)}{hint}")
        self._failures += 1
        self._next_probe = time.monotonic() + PAUSE
        return Unanswered("error", f"The server {self._clean(what)}.")

    def _listed(self) -> str:
        models = self._models or []
        more = f" and {len(models) - 8} more" if len(models) > 8 else ""
        return self._clean(", ".join(models[:8]) + more) or "no models"

    def _clean(self, words: str) -> str:
        """Returns an excerpt that fits into a sentence, without the key, which some servers repeat."""
        if len(self._client.api_key) >= SHORTEST_KEY:
            words = words.replace(self._client.api_key, "[key]")
        words = " ".join("".join(c if c.isprintable() else " " for c in words[: 4 * _WORDS]).split())
        return words if len(words) <= _WORDS else f"{words[:_WORDS]}..."
