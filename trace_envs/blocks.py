"""Stretches of a turn that claim to be actions: found, read and written.

Invariant: nothing here knows a format; reading takes time linear in the text and ends with an action, a record or `Malformed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from sys import intern
from typing import Any, NamedTuple

from trace_envs.schemas import Function, JSONRefused, check_value, dumps, loads_object, show, signature, text_argument
from trace_envs.state import FinalAnswer, ToolCall

THINK, END_THINK = "<think>", "</think>"
Known = Mapping[str, Function]


class Malformed(Exception):
    """Why a turn is not an action; `ActionFormat.parse` turns it into a `FormatError`."""


class Block(NamedTuple):
    """A stretch of text that claims to be an action: the tag or tool name it stands under, and what it holds."""

    tag: str
    body: str


# Finding blocks ------------------------------------------------------------------------------------------------------


def outside_thoughts(text: str) -> str:
    """Returns the text without its thoughts, by the rule that `trace_envs.actions` states."""
    if "think>" not in text:
        return text
    end = text.find(END_THINK)
    position = end + len(END_THINK) if end >= 0 and text.find(THINK, 0, end) < 0 else 0
    parts = []
    while (start := text.find(THINK, position)) >= 0:
        parts.append(text[position:start])
        end = text.find(END_THINK, start)
        if end < 0:
            raise Malformed("<think> is not closed. Close it with </think> and act after it.")
        position = end + len(END_THINK)
    parts.append(text[position:])
    return "\n".join(parts)


def tagged(text: str, tags: Sequence[str]) -> list[Block]:
    """Finds `<tag>...</tag>` from left to right; what is inside one block cannot begin another."""
    # The next beginning of each tag, nearest first. Only a tag that was passed is searched again, from where the block
    # ended, so each tag reads the text once.
    ahead = [(start, tag) for tag in dict.fromkeys(tags) if (start := text.find(f"<{tag}>")) >= 0]
    heapify(ahead)
    blocks = []
    position = 0
    while ahead:
        start, tag = heappop(ahead)
        if start >= position:
            start += len(tag) + 2
            position = text.find(f"</{tag}>", start)
            if position < 0:
                raise Malformed(f"<{tag}> is not closed. End it with </{tag}>.")
            blocks.append(Block(tag, text[start:position]))
        if (start := text.find(f"<{tag}>", position)) >= 0:
            heappush(ahead, (start, tag))
    return blocks


def stray_end(text: str, tags: Sequence[str]) -> str:
    """Names the first tag that ends without having begun; empty if there is none."""
    return next((f": </{tag}> without <{tag}> before it" for tag in tags if f"</{tag}>" in text), "")


# Reading blocks ------------------------------------------------------------------------------------------------------


def read_answer(body: str) -> FinalAnswer:
    """Reads an answer, which must not be empty."""
    if not (text := body.strip()):
        raise Malformed("The answer is empty. Give the answer itself, or call a tool.")
    return FinalAnswer(text)


def call_of_body(block: Block, known: Known, where: str) -> ToolCall:
    """Reads a call whose tool is known from its tag: a JSON object, or the one string that the tool needs."""
    function = function_of(block.tag, known)
    body = block.body.strip()
    if body.startswith("{"):
        arguments = read_object(body, where, f"Expected {signature(block.tag, function)}.")
    elif not body:
        arguments = {}
    elif (argument := text_argument(function)) is not None:
        arguments = {argument: body}
    else:
        raise Malformed(f"{where} must be a JSON object of arguments. Expected {signature(block.tag, function)}.")
    return checked_call(block.tag, arguments, known)


def checked_call(name: str, arguments: dict[str, Any], known: Known) -> ToolCall:
    """Returns the call if the tool exists and takes these arguments."""
    function = function_of(name, known)
    parameters = function.get("parameters") or {}
    if "additionalProperties" not in parameters:
        # JSON Schema admits unknown properties unless told otherwise; a tool does not, unless told otherwise.
        parameters = {"additionalProperties": False, **parameters}
    if wrong := check_value(arguments, parameters):
        raise Malformed(f"{show(name)}: {wrong}. Expected {signature(name, function)}.")
    # Names are the same in thousands of calls; each is kept once.
    return ToolCall(intern(name), {intern(argument): value for argument, value in arguments.items()})


def read_object(text: str, where: str, expected: str) -> dict[str, Any]:
    """Reads a JSON object; an error says where it stands and what was expected."""
    try:
        return loads_object(text)
    except JSONRefused as error:
        raise Malformed(f"{where} {error}. {expected}") from None


def function_of(name: str, known: Known) -> Function:
    """Returns the tool of that name."""
    if name not in known:
        tools = ", ".join(list(known)[:20]) or "none"
        raise Malformed(f"Unknown tool {show(name)}; the tools are: {tools}.")
    return known[name]


# Writing blocks ------------------------------------------------------------------------------------------------------


def bodies(call: ToolCall) -> Iterator[str]:
    """Yields ways to write arguments under a tag or line that names the tool."""
    arguments = dict(call.arguments)
    if not arguments:
        yield ""
    elif len(arguments) == 1 and isinstance(value := next(iter(arguments.values())), str):
        yield value
    yield dumps(arguments)
    yield without_tags(dumps(arguments))


def without_tags(body: str) -> str:
    """Spells every `<` of a JSON text as an escape: it can only stand inside a string."""
    return body.replace("<", "\\u003c")


def tools_of(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Returns tools that take exactly the arguments of the calls; of two calls of one tool, what only one has is optional."""
    tools = []
    for name in dict.fromkeys(call.name for call in calls):
        taken = [call.arguments for call in calls if call.name == name]
        properties: dict[str, Any] = {argument: {} for arguments in taken for argument in arguments}
        required = [argument for argument in properties if all(argument in arguments for arguments in taken)]
        parameters = {"properties": properties, "required": required}
        tools.append({"type": "function", "function": {"name": name, "parameters": parameters}})
    return tools
