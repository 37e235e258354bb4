"""Conversations as chat-completions servers take them, and their replies as the text of one action.

Invariant: a reply becomes text that the environment reads as the call that was made, or refuses with an error observation of
its own; no reply raises, and none is read as another call or as an answer that it was not.

As text (`plain_messages`) the assistant's turns are sent as they were written. A tool's result is sent as a user's message
within `<tool_response>` tags: OpenAI and others take the role `tool` only after `tool_calls`, and some templates drop it
without a word. It is also how the templates of Qwen models render that role, to the letter.

As tool calls (`native_messages`) a turn that calls a tool is taken apart into `content` and `tool_calls`, and what the
environment answered becomes the `tool` message with the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from agents.policies.openai_reply import Call, Reply
from trace_envs.actions import ActionFormat
from trace_envs.blocks import END_THINK, THINK
from trace_envs.messages import Messages, encodable, native_messages
from trace_envs.schemas import JSONRefused, Tools, dumps, loads_object, show
from trace_envs.state import FormatError, ToolCall, ToolCalls

__all__ = ["ToolRole", "encodable", "native_messages", "plain_messages", "text_of"]

ToolRole = Literal["user", "tool"]


def plain_messages(messages: Messages, tool_role: ToolRole = "user") -> list[dict[str, Any]]:
    """Returns a conversation without tool calls, every text of it encodable.

    Args:
        messages: The environment's.
        tool_role: `user` wraps results as described above; `tool` sends them in that role, for local servers with a template
            that renders it in its own way.
    """
    sent = []
    for message in messages:
        role, text = message["role"], encodable(message["content"])
        if role == "tool" and tool_role == "user":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        sent.append({"role": role, "content": text})
    return sent


def text_of(
    reply: Reply, tools: Tools, action_format: ActionFormat, stop: Sequence[str] = (), max_calls: int = 1
) -> str:
    """Returns a reply as the text of one action.

    Thoughts that the server told apart come first, as `<think>...</think>`. Of several tool calls as many are
    taken as the environment takes in a turn. A stop string that the server cut off is put back where it completes an action.

    Args:
        reply: The reply.
        tools: Schemas of the tools.
        action_format: How the environment will read the text.
        stop: The stop strings that were sent.
        max_calls: Calls that one turn may make.
    """
    thought = _thought(reply.reasoning.strip())
    if reply.calls:
        if len(reply.calls) > 1 and max_calls > 1:
            text = _calls_text(thought, reply.content.strip(), reply.calls[:max_calls], tools, action_format)
            if text is not None:
                return text
        return _call_text(thought, reply.content.strip(), reply.calls[0], tools, action_format)
    text = thought + reply.content
    if reply.finish_reason != "stop" or not stop:
        return text
    if reply.stop is not None:
        return text if text.endswith(reply.stop) or reply.stop not in stop else text + reply.stop
    if isinstance(action_format.parse(text, tools), FormatError):
        for end in stop:
            if not isinstance(action_format.parse(text + end, tools), FormatError):
                return text + end
    return text


def _thought(reasoning: str) -> str:
    for tag in (THINK, END_THINK):
        reasoning = reasoning.replace(tag, tag.replace("<", "‹"))  # what is inside must not end the block
    return f"{THINK}\n{reasoning}\n{END_THINK}\n" if reasoning else ""


def _calls_text(
    thought: str, content: str, calls: Sequence[Call], tools: Tools, action_format: ActionFormat
) -> str | None:
    """Returns several calls as text; `None` if one of them cannot be read, and the first is all that can be taken."""
    try:
        wanted = ToolCalls(tuple(ToolCall(c.name, loads_object(c.arguments.strip() or "{}")) for c in calls))
    except JSONRefused:
        return None
    for before in dict.fromkeys((content, "")):
        try:
            text = thought + action_format.render(before, wanted)
        except ValueError:
            continue
        if action_format.parse(text, tools, max_calls=len(calls)) == wanted:
            return text
    return None


def _call_text(thought: str, content: str, call: Call, tools: Tools, action_format: ActionFormat) -> str:
    """Returns a call as text: as it was made if it can be read, else as something that is refused for what is wrong with it."""
    try:
        wanted: ToolCall | None = ToolCall(call.name, loads_object(call.arguments.strip() or "{}"))
    except JSONRefused:
        wanted = None
    refused = []
    for before in dict.fromkeys((content, "")):  # without the content if it holds something that reads as an action
        try:
            text = thought + (_raw(call, before) if wanted is None else action_format.render(before, wanted))
        except ValueError:
            continue
        action = action_format.parse(text, tools)
        if action == wanted:
            return text
        if isinstance(action, FormatError):
            refused.append(text)
    excerpt = f"The call of {show(call.name)} with {show(call.arguments)} cannot be read."
    return refused[0] if refused else thought + excerpt.replace("<", "‹")


def _raw(call: Call, before: str) -> str:
    """Returns a call whose arguments are no JSON object, so that the environment says what is wrong with them."""
    return f'{before}\n<tool_call>{{"name": {dumps(call.name)}, "arguments": {call.arguments}}}</tool_call>'.strip()
