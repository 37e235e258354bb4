"""What a chat-completions server answered, read without trust.

Invariant: whatever bytes come, the outcome is a `Reply` whose fields have the types that they say, or an `Unusable` with one
short sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_CHARS = 1 << 18
"""Most characters of any text of a reply that are passed on; what is longer is cut."""

_CUT = frozenset({"length", "max_tokens", "model_length"})
_FAILED = frozenset({"error", "abort", "insufficient_system_resource"})
# How servers say that a conversation is too long: OpenAI's code, then llama.cpp, vLLM, SGLang, TGI, Gemini, Groq, Anthropic.
_TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|context (?:length|size|window)|max(?:imum)? (?:model|input|sequence) length"
    r"|max_new_tokens. must be|input token count|reduce the length|(?:prompt|input|request) is too (?:long|large)",
    re.IGNORECASE,
)


class Unusable(Exception):
    """An answer that is no reply; the message completes "the server ...".

    Attributes:
        again: Whether asking once more can help.
    """

    def __init__(self, message: str, *, again: bool = True):
        super().__init__(message)
        self.again = again


class TooLong(Exception):
    """The server says that the conversation does not fit into the model's context; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as it came: the arguments are the model's text, which need not be JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """An assistant's message.

    Attributes:
        content: What it says.
        reasoning: What it thought, where the server tells thoughts apart from the rest.
        calls: Tool calls, in order.
        finish_reason: `length` if a token limit cut it.
        stop: The stop string that ended it, from servers that say so.
        generated: Tokens sampled; `None` from a server that does not count.
        prefilled: Tokens of the prompt that did not come from a cache; 0 from a server that does not count.
    """

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    finish_reason: Literal["stop", "length"] = "stop"
    stop: str | None = None
    generated: int | None = None
    prefilled: int = 0


def read_reply(body: bytes) -> Reply:
    """Reads the body of an answer with status 200.

    An empty text is a reply if the server counts tokens for it: the model ended its turn at once.

    Raises:
        Unusable: It is no reply.
        TooLong: It is an error that says so; some servers send errors with status 200.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise Unusable("answers with something other than JSON") from None
    if not isinstance(answer, dict):
        raise Unusable(f"answers with a JSON {type(answer).__name__} where an object was expected")
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        if answer.get("error"):
            words = words_of(answer)
            raise TooLong(words) if too_long(words) else Unusable(f"answers with an error: {words}")
        raise Unusable("answers without choices[0].message")
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        raise Unusable("withholds the reply (its content filter)", again=False)
    if reason in _FAILED:
        raise Unusable(f"gave up on the reply (finish_reason {reason!r})")
    prompt, cached, generated = _usage(answer.get("usage"))
    content = message.get("content")
    if isinstance(content, list):  # parts, as some servers send them
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if content is None:
        content = message.get("refusal")
    calls = _calls(message.get("tool_calls"))
    reasoning = next((r for key in ("reasoning_content", "reasoning") if isinstance(r := message.get(key), str)), "")
    if content is not None and not isinstance(content, str):
        raise Unusable(f"answers with a message whose content is of type {type(content).__name__}")
    if not (content or calls or reasoning or generated) and (content is None or generated == 0):
        raise Unusable("answers with an empty message")
    return Reply(
        content=(content or "")[:MAX_CHARS],
        reasoning=reasoning[:MAX_CHARS],
        calls=calls,
        finish_reason="length" if reason in _CUT else "stop",
        stop=stop if isinstance(stop := choice.get("stop_reason"), str) else None,
        generated=generated,
        prefilled=max(0, prompt - cached),
    )


def read_models(body: bytes) -> list[str]:
    """Returns the names in a list of models; none if it is no such list."""
    try:
        listed = json.loads(body)
    except (ValueError, RecursionError):
        return []
    models = listed.get("data") if isinstance(listed, dict) else None
    entries = models if isinstance(models, list) else []
    return [m["id"] for m in entries if isinstance(m, dict) and isinstance(m.get("id"), str)]


def words_of(answer: Any) -> str:
    """Returns what an error says, of the shapes that servers give it: `error.message`, `error`, `message`, `detail`, any."""
    if isinstance(answer, Mapping):
        error = answer.get("error")
        inner = error if isinstance(error, Mapping) else answer
        found = next((w for k in ("message", "error", "detail") if isinstance(w := inner.get(k), str) and w), None)
        code = next((c for k in ("code", "type") if isinstance(c := inner.get(k), str)), "")
        if found is not None:
            return f"{found} ({code})" if code else found
    try:
        return answer if isinstance(answer, str) else json.dumps(answer)
    except RecursionError:
        return "an error that is nested too deeply to be shown"


def too_long(words: str) -> bool:
    """Returns whether an error says that the conversation does not fit into the model's context."""
    return _TOO_LONG.search(words) is not None


def _calls(found: Any) -> tuple[Call, ...]:
    if not found:
        return ()
    if not isinstance(found, list):
        raise Unusable(f"answers with tool_calls of type {type(found).__name__}")
    calls = []
    for entry in found:
        function = entry.get("function") if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("answers with a tool call that names no function")
        arguments = function.get("arguments")
        # Some servers send the object itself; none at all means no arguments.
        text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
        calls.append(Call(function["name"][:MAX_CHARS], text[:MAX_CHARS]))
    return tuple(calls)


def _usage(usage: Any) -> tuple[int, int, int | None]:
    """Returns the tokens of the prompt, those of them that came from a cache, and the tokens sampled."""
    if not isinstance(usage, dict):
        return 0, 0, None
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return _count(usage.get("prompt_tokens")) or 0, cached or 0, _count(usage.get("completion_tokens"))


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
