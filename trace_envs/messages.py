"""An environment's conversation as servers with tool calls take it, and as OpenAI's fine-tuning does.

Invariant: every text of what is returned can be encoded as UTF-8, and every tool message answers the call right before it.

A turn that calls tools is taken apart into `content` and `tool_calls`, and what the environment answered becomes `tool`
messages with the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trace_envs.actions import ActionFormat
from trace_envs.schemas import Tools, dumps
from trace_envs.state import Action, ToolCall, ToolCalls

Messages = Sequence[Mapping[str, Any]]
"""OpenAI-style chat messages."""


def native_messages(
    messages: Messages, tools: Tools, action_format: ActionFormat, max_calls: int = 1
) -> list[dict[str, Any]]:
    """Returns a conversation with tool calls, every text of it encodable.

    Args:
        messages: The environment's; the assistant's are texts of the action format.
        tools: Schemas of the tools.
        action_format: How those texts are read.
        max_calls: Calls that one turn may make.
    """
    sent: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of the calls that wait for their results
    for message in messages:
        role, text = message["role"], encodable(message["content"])
        if role == "assistant":
            # Results that were empty, which environments leave out and servers insist on.
            sent += [_result(name, "") for name in waiting]
            waiting = []
            action = action_format.parse(text, tools, max_calls=max_calls)
            calls = action.calls if isinstance(action, ToolCalls) else (action,) if isinstance(action, ToolCall) else ()
            if calls:
                first = len(sent)
                waiting = [f"call_{first}" if i == 0 else f"call_{first}_{i}" for i in range(len(calls))]
                sent.append(_calling(waiting, _before(text, action, tools, action_format, max_calls), calls))
            else:
                sent.append({"role": role, "content": text})
        elif waiting:
            sent.append(_result(waiting.pop(0), text))
        else:
            sent.append({"role": "user" if role == "tool" else role, "content": text})
    return sent + [_result(name, "") for name in waiting]


def encodable(text: str) -> str:
    """Returns a text that UTF-8 can encode: pairs of surrogates joined, lone ones replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _calling(names: Sequence[str], content: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    made = [
        {
            "id": name,
            "type": "function",
            "function": {"name": call.name, "arguments": encodable(dumps(dict(call.arguments)))},
        }
        for name, call in zip(names, calls, strict=True)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def _result(name: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": text}


def _before(text: str, action: Action, tools: Tools, action_format: ActionFormat, max_calls: int) -> str:
    """Returns what a turn says before its calls.

    They begin at the last place from which the rest of the turn still reads as those calls. What follows them is left out.
    """
    first = action.calls[0] if isinstance(action, ToolCalls) else action
    name = first.name if isinstance(first, ToolCall) else ""
    marker = {"hermes": "<tool_call>", "tags": f"<{name}>", "react": "Action:"}[action_format.name]
    start = text.rfind(marker)
    while start >= 0 and action_format.parse(text[start:], tools, max_calls=max_calls) != action:
        start = text.rfind(marker, 0, start)
    before = text[: max(start, 0)].strip()
    return before.removeprefix("Thought:").strip() if action_format.name == "react" else before
