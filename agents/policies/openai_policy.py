"""A policy that asks any OpenAI-compatible chat-completions server: vLLM, transformers serve, llama.cpp, OpenAI, OpenRouter.

Invariant: samples hold text and counts, never token ids, so this policy evaluates and cannot train. Every context gets a
sample, whatever the server does, once it has answered one request as it should (`openai_server`).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Literal
from urllib.parse import urlsplit

from agents.policies.loop_thread import LoopThread
from agents.policies.openai_messages import ToolRole, native_messages, plain_messages, text_of
from agents.policies.openai_reply import Reply
from agents.policies.openai_server import AsyncOpenAI, ChatServer, Unanswered
from agents.policies.paths import NO_IDS
from agents.policies.sampling import Sampling
from allocation import Context, Sample
from trace_envs.actions import get_format

NO_KEY = "no-key"
OPENAI_HOST = "api.openai.com"


class OpenAIPolicy:
    """Samples actions from a model behind a server.

    `act` asks for all the contexts that it is given at once and blocks; `asynchronous` gives the form that `AsyncRunner` asks
    branch by branch. Both work from any thread, inside or outside a running event loop: requests run in a thread of the
    policy's own, and share its limits.

    Args:
        model: What the server calls the model; `None` for the only one that it lists.
        base_url: Address of the server, such as `http://localhost:8000/v1`; `None` for the environment variable
            `OPENAI_BASE_URL`, or OpenAI's own.
        api_key_env: Environment variable with the key. A server with an address of its own may need none.
        max_new_tokens: Token limit of one action. vLLM refuses a request whose prompt leaves less room than that: the rollout
            ends with the reason `context`.
        temperature: 0 is greedy.
        top_p: Share of the probability that is kept. Settings that OpenAI's interface does not have (`top_k`, penalties) are
            the server's own, which it may take from the model's `generation_config.json`; `extra_body` sets them.
        stop: Strings that end an action. They belong to it, but servers cut them off: one that completes an action is put back.
        seed: Each request has a seed of its own, made of this one, the conversation, and how often it was asked about.
        action_format: The environment's.
        native_tools: Send the tools' schemas, and translate tool calls in both directions; otherwise the environment's system
            prompt explains the format, and calls are read from the text.
        tool_role: Without native tools, the role of a tool's result; see `openai_messages.plain_messages`.
        max_concurrency: Most requests under way at once.
        requests_per_minute: Most requests that are begun in a minute; `None` for no limit.
        timeout: Seconds that the server may be silent before it answers, and that the answer may then take to arrive.
        max_retries: Times that a request is repeated, with growing pauses or as `Retry-After` says, when the server drops it,
            stalls, refuses it for now, or answers with something that is no reply.
        extra_body: Further fields of every request; they replace those of the same name.

    Attributes:
        model: What the server calls the model.

    Raises:
        ValueError: A setting is out of range, there is no key, or the server does not list exactly one model to choose.
        ConnectionError: The model is to be chosen and the server cannot be reached.
        ImportError: The packages of the extra `openai` are not installed.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        action_format: str = "hermes",
        native_tools: bool = False,
        tool_role: ToolRole = "user",
        max_concurrency: int = 16,
        requests_per_minute: float | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
        extra_body: dict[str, Any] | None = None,
    ):
        if isinstance(stop, str):
            raise ValueError(f"stop must be a sequence of strings, got {stop!r}")
        self._sampling = Sampling(max_new_tokens, temperature, top_p, stop=tuple(stop), seed=seed)
        for name, number in (("requests_per_minute", requests_per_minute), ("timeout", timeout)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be above 0, got {number}")
        for name, number, least in (("max_concurrency", max_concurrency, 1), ("max_retries", max_retries, 0)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if tool_role not in ("user", "tool"):
            raise ValueError(f"tool_role must be 'user' or 'tool', got {tool_role!r}")
        self._format, self._native, self._tool_role = get_format(action_format), native_tools, tool_role
        self._extra = dict(extra_body or {})
        self._asked: Counter[bytes] = Counter()
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        client = AsyncOpenAI(api_key=_key(api_key_env, base_url), base_url=base_url)
        self._at_openai = client.base_url.host == OPENAI_HOST
        self._server = ChatServer(
            client,
            key_env=api_key_env,
            max_concurrency=max_concurrency,
            requests_per_minute=requests_per_minute,
            timeout=timeout,
            max_retries=max_retries,
        )
        self._thread = LoopThread("openai policy")
        self.model = self._only_model() if model is None else model

    def act(self, contexts: Sequence[Context]) -> list[Sample]:
        """Returns one action for each context, in order.

        Raises:
            ValueError: The environments give no chat messages, or the server refuses the very first request.
            ConnectionError: The server does not answer the very first request as it should.
        """
        bodies = [self._body(context) for context in contexts]
        answers = self._thread.wait(self._ask_all(bodies))
        return [self._sample(context, answer) for context, answer in zip(contexts, answers, strict=True)]

    def asynchronous(self) -> AsyncOpenAIPolicy:
        """Returns the same policy for `AsyncRunner`."""
        return AsyncOpenAIPolicy(self)

    async def act_on(self, context: Context) -> Sample:
        """Returns one action; what `asynchronous` gives calls it.

        Raises:
            ValueError: As `act`.
            ConnectionError: As `act`.
        """
        return self._sample(context, await self._thread.run(self._ask(self._body(context))))

    def close(self) -> None:
        """Closes the connections; the policy cannot be used any more, in neither form."""
        if not self._thread.closed:
            self._thread.wait(self._server.close())
            self._thread.close()

    def _only_model(self) -> str:
        listed = self._thread.wait(self._server.models())
        if len(listed) != 1:
            names = ", ".join(listed[:8]) or "none"
            raise ValueError(f"--model must say which model of {self._server.url} is meant; it lists {names}")
        return listed[0]

    def _body(self, context: Context) -> dict[str, Any]:
        """Returns the request for a context."""
        messages, tools = context.info.get("messages"), context.info.get("tools") or []
        if messages is None:
            raise ValueError("this policy needs environments that give info['messages'] (OpenAI-style chat messages)")
        sampling = self._sampling
        body: dict[str, Any] = {"model": self.model}
        if self._native:
            body["messages"] = native_messages(
                messages, tools, self._format, max_calls=context.info.get("max_calls", 1)
            )
            if tools:
                body["tools"] = tools
        else:
            body["messages"] = plain_messages(messages, self._tool_role)
        if self._at_openai:
            # Newer models there take no other name of the limit, and of the others only what differs from the default.
            body["max_completion_tokens"] = sampling.max_new_tokens
            body |= {n: v for n in ("temperature", "top_p") if (v := getattr(sampling, n)) != 1}
        else:
            body |= {
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        body["seed"] = self._seed(body["messages"])
        return body | self._extra

    def _seed(self, messages: list[dict[str, Any]]) -> int:
        """Returns the seed of a request: other branches of a prefix get other ones, in whatever order they come."""
        conversation = blake2b(json.dumps(messages).encode(), digest_size=8).digest()
        self._asked[conversation] += 1
        what = f"{self._sampling.seed} {self._asked[conversation]} ".encode() + conversation
        return (
            int.from_bytes(blake2b(what, digest_size=8).digest()) >> 33
        )  # 31 bits: servers keep it in a signed integer

    async def _ask(self, body: dict[str, Any]) -> Reply | Unanswered:
        try:
            return await self._server.ask(body)
        except Unanswered as none:
            return none

    async def _ask_all(self, bodies: list[dict[str, Any]]) -> list[Reply | Unanswered]:
        tasks = [asyncio.ensure_future(self._ask(body)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    def _sample(self, context: Context, answer: Reply | Unanswered) -> Sample:
        logprobs = NO_IDS.astype("float32")
        if isinstance(answer, Unanswered):
            return Sample("", NO_IDS, logprobs, NO_IDS, finish_reason=answer.reason, generated=0, note=answer.note)
        tools, max_calls = context.info.get("tools") or [], context.info.get("max_calls", 1)
        text = text_of(answer, tools, self._format, self._sampling.stop, max_calls)
        reason: Literal["stop", "length"] = answer.finish_reason
        return Sample(
            text,
            NO_IDS,
            logprobs,
            NO_IDS,
            finish_reason=reason,
            prefilled=answer.prefilled,
            generated=answer.generated,
        )


class AsyncOpenAIPolicy:
    """The form of an `OpenAIPolicy` that is asked branch by branch.

    Args:
        policy: The policy; it is closed there.
    """

    def __init__(self, policy: OpenAIPolicy):
        self._policy = policy

    async def act(self, context: Context) -> Sample:
        """Returns one action; see `OpenAIPolicy.act`."""
        return await self._policy.act_on(context)


def _key(name: str, base_url: str | None) -> str:
    """Returns the key, and says what is wrong with the key or the address without repeating either."""
    if base_url is not None:
        parts = urlsplit(base_url)
        if "@" in parts.netloc:
            raise ValueError(f"--base-url must hold no user name or password: put a key into the variable {name}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--base-url must be an address such as http://localhost:8000/v1, got {base_url!r}")
    key = os.environ.get(name, "").strip()
    if not key and base_url is None:
        raise ValueError(
            f"there is no key in the environment variable {name}: set it, or name a server with --base-url"
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the key in the environment variable {name} holds characters that no key has: set it again")
    return key or NO_KEY
