"""Tools as the typed methods that TRL makes its schemas from.

Invariant: what `transformers.utils.get_json_schema` reads from a method's signature and docstring is the tool's schema, as far
as type hints can say it; the rest of an argument's schema stands in its description, so a model is told all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Any, Literal, Union

from transformers.utils import get_json_schema

from trace_envs.schemas import Function, Tools, by_name

Call = Callable[[Any, str, dict[str, Any]], str]
"""Takes the object that a method is called on, the tool's name and the arguments; returns what the model is shown."""

RESERVED = frozenset({"reset", "get_reward"})
"""Methods that mean something else to TRL."""

_HINTS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "null": type(None),
}
_CHOICES = (str, int, float, bool, type(None))


def tool_methods(tools: Tools, call: Call) -> dict[str, Callable[..., str]]:
    """Returns a function for each tool, to be put into a class under its name.

    Args:
        tools: Schemas of the tools.
        call: What every method comes down to.

    Raises:
        ValueError: A tool cannot be such a method; the message says why.
    """
    return {name: _method(name, function, call) for name, function in by_name(tools).items()}


def _method(name: str, function: Function, call: Call) -> Callable[..., str]:
    if name in RESERVED or name.startswith("_"):
        raise ValueError(
            f"a tool named {name!r} cannot be offered through TRL, which takes {', '.join(sorted(RESERVED))} and names with an "
            "underscore in front for something else: rename the tool, or use rollout_func"
        )

    def method(self: Any, /, **arguments: Any) -> str:
        return call(self, name, arguments)

    parameters = function.get("parameters") or {}
    rules = parameters.get("properties", {})
    hints = {argument: _hint(rule) for argument, rule in rules.items()}
    method.__name__ = method.__qualname__ = name
    # No hint for what is returned: a schema would get a key "return", which tools do not have.
    method.__annotations__ = hints
    method.__signature__ = _signature(name, hints, parameters.get("required", ()))  # type: ignore[attr-defined]
    said = _words(function.get("description", "").strip()) or f"The tool {name}."
    notes = {argument: _one_line(rule.get("description", "")) or f"The {argument}." for argument, rule in rules.items()}
    method.__doc__ = _docstring(said, notes)
    derived = get_json_schema(method)["function"]["parameters"]
    for argument, rule in rules.items():
        if _substance(derived["properties"][argument]) != _substance(rule):
            notes[argument] += f" JSON schema: {_json(rule)}."
    if _substance(_outline(derived)) != _substance(_outline(parameters)):
        said += f" JSON schema of the arguments: {_json(parameters)}."
    method.__doc__ = _docstring(said, notes)
    return method


def _signature(name: str, hints: Mapping[str, Any], required: Any) -> Signature:
    receiver = Parameter("self", Parameter.POSITIONAL_ONLY)
    try:
        arguments = [
            Parameter(
                argument,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if argument in required else None,  # never read: what is not given is left out
                annotation=hint,
            )
            for argument, hint in hints.items()
        ]
        return Signature([receiver, *arguments], return_annotation=str)
    except ValueError as error:
        raise ValueError(
            f"the tool {name!r} cannot be a method in Python ({error}): rename that argument, or use rollout_func"
        ) from error


def _hint(rule: Mapping[str, Any]) -> Any:
    """Returns the type hint that says most of a schema."""
    choices = rule.get("enum")
    if choices and all(type(choice) in _CHOICES for choice in choices):
        return Literal.__getitem__(tuple(choices))  # type: ignore[attr-defined]
    kinds = rule.get("type", ())
    hints = [_hint_of_kind(kind, rule) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return Union.__getitem__(tuple(hints)) if hints else Any  # type: ignore[attr-defined]


def _hint_of_kind(kind: str, rule: Mapping[str, Any]) -> Any:
    if kind == "array":
        return list[_hint(rule["items"])] if isinstance(rule.get("items"), Mapping) else list  # type: ignore[misc]
    if kind == "object":
        values = rule.get("additionalProperties")
        return dict[str, _hint(values)] if isinstance(values, Mapping) else dict  # type: ignore[misc]
    return _HINTS.get(kind, Any)


def _docstring(said: str, notes: Mapping[str, str]) -> str:
    arguments = "".join(f"\n    {argument}: {note}" for argument, note in notes.items())
    return f"{said}\n\nArgs:{arguments}" if arguments else said


def _words(text: str) -> str:
    """Returns a description without what would mean something else in a Google-style docstring."""
    return re.sub(r"(Args|Returns|Raises|\(choices):", r"\1 :", text, flags=re.IGNORECASE)


def _one_line(text: str) -> str:
    return _words(" ".join(text.split()))


def _json(schema: Mapping[str, Any]) -> str:
    return _one_line(json.dumps({k: v for k, v in schema.items() if k != "description"}, ensure_ascii=False))


def _outline(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a schema of arguments says besides what each of them is; that there are no others goes without saying."""
    properties: dict[str, Any] = {name: {} for name in parameters.get("properties", {})}
    outline = {"type": "object", **parameters, "properties": properties}
    return {key: value for key, value in outline.items() if (key, value) != ("additionalProperties", False)}


def _substance(schema: Any) -> Any:
    """Returns a schema in a form in which two that admit the same values compare as equal, whatever they say in words."""
    if not isinstance(schema, Mapping):
        return schema
    kinds = schema.get("type", ())
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if schema.get("nullable"):
        kinds.add("null")
    same: dict[str, Any] = {"type": None if "enum" in schema else kinds, "required": set(schema.get("required", ()))}
    for key, value in schema.items():
        if key == "properties":
            same[key] = {name: _substance(rule) for name, rule in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, Mapping):
            same[key] = _substance(value)
        elif key not in ("type", "required", "nullable", "description"):
            same[key] = value
    return same
