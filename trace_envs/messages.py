"""An environment's conversation as servers with tool calls take it, and as OpenAI's fine-tuning does.

Invariant: every text of what is returned can be encoded as UTF-8, and every tool message answers the call right before it.

A turn that calls a tool is taken apart into `content` and `tool_calls`, and what the environment answered becomes the `tool`
message with the same id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trace_envs.actions import ActionFormat
from trace_envs.schemas import Tools, dumps
from trace_envs.state import ToolCall

Messages = Sequence[Mapping[str, Any]]
"""OpenAI-style chat messages."""


def native_messages(messages: Messages, tools: Tools, action_format: ActionFormat) -> list[dict[str, Any]]:
    """Returns a conversation with tool calls, every text of it encodable.

    Args:
        messages: The environment's; the assistant's are texts of the action format.
        tools: Schemas of the tools.
        action_format: How those texts are read.
    """
    sent: list[dict[str, Any]] = []
    open_call = ""  # id of the call that waits for its result
    for message in messages:
        role, text = message["role"], encodable(message["content"])
        if role == "assistant":
            if open_call:  # its result was empty, which environments leave out and servers insist on
                sent.append(_result(open_call, ""))
            action = action_format.parse(text, tools)
            open_call = f"call_{len(sent)}" if isinstance(action, ToolCall) else ""
            if isinstance(action, ToolCall):
                sent.append(_calling(open_call, _before(text, action, tools, action_format), action))
            else:
                sent.append({"role": role, "content": text})
        elif open_call:
            sent.append(_result(open_call, text))
            open_call = ""
        else:
            sent.append({"role": "user" if role == "tool" else role, "content": text})
    if open_call:
        sent.append(_result(open_call, ""))
    return sent


def encodable(text: str) -> str:
    """Returns a text that UTF-8 can encode: pairs of surrogates joined, lone ones replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _calling(name: str, content: str, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": encodable(dumps(dict(call.arguments)))}
    calls = [{"id": name, "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _result(name: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": text}


def _before(text: str, call: ToolCall, tools: Tools, action_format: ActionFormat) -> str:
    """Returns what a turn says before its call.

    The call begins at the last place from which the rest of the turn still reads as that call. What follows it is left out.
    """
    marker = {"hermes": "<tool_call>", "tags": f"<{call.name}>", "react": "Action:"}[action_format.name]
    start = text.rfind(marker)
    while start >= 0 and action_format.parse(text[start:], tools) != call:
        start = text.rfind(marker, 0, start)
    before = text[: max(start, 0)].strip()
    return before.removeprefix("Thought:").strip() if action_format.name == "react" else before
