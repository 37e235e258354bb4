"""Tool schemas: reading JSON that a model wrote, checking it against a tool's parameters, describing tools in words.

Invariant: what a model wrote is only ever data here. Nothing in it raises anything but :class:`JSONRefused`, and every
excerpt of it that goes into a message is short and printable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Function = Mapping[str, Any]
"""The inner part of a tool: `{"name", "description", "parameters"}`, where `parameters` is a JSON schema."""

Tools = Sequence[Mapping[str, Any]]
"""OpenAI-style tools: `{"type": "function", "function": Function}`."""

MAX_JSON_DEPTH = 64
"""Values nested deeper are refused, so that any code may walk arguments recursively."""

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_EXACT: dict[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}
_EXAMPLES: dict[str, Any] = {"string": "...", "integer": 1, "number": 1.5, "boolean": True, "array": [], "null": None}


class JSONRefused(ValueError):
    """A text is not a JSON object that may be used; the message completes "The text ..."."""


def by_name(tools: Tools) -> dict[str, Function]:
    """Returns the functions of the tools under their names."""
    return {tool["function"]["name"]: tool["function"] for tool in tools}


def loads_object(text: str) -> dict[str, Any]:
    """Parses a JSON object strictly: no NaN, nothing infinite, no deep nesting; the last of duplicate keys counts.

    Raises:
        JSONRefused: The text is anything else.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise JSONRefused("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise JSONRefused(f"is not valid JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # a refused number, or an integer of more digits than Python converts
        raise JSONRefused(f"is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise JSONRefused(f"must be a JSON object, not {kind_of(value)}")
    layer = [item for item in value.values() if isinstance(item, dict | list)]
    for _ in range(MAX_JSON_DEPTH):
        if not layer:
            return value
        inner = [item for outer in layer for item in (outer.values() if isinstance(outer, dict) else outer)]
        layer = [item for item in inner if isinstance(item, dict | list)]
    raise JSONRefused(f"is nested more than {MAX_JSON_DEPTH} levels deep")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def dumps(value: Any) -> str:
    """Writes JSON in one line, with text in its own script rather than in escapes.

    Raises:
        ValueError: The value holds something that JSON cannot express.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not expressible as JSON: {error}") from error


def check_value(value: Any, schema: Mapping[str, Any], where: str = "") -> str | None:
    """Checks a parsed JSON value against the part of JSON Schema that tools use.

    That is `type`, `enum`, `required`, `properties`, `additionalProperties` and `items`; other keywords and unknown
    types are taken as satisfied.

    Args:
        value: A value, nested at most `MAX_JSON_DEPTH` levels.
        schema: Its schema.
        where: What messages call the value; empty for a call's arguments as a whole.

    Returns:
        What is wrong, naming the argument, or `None`.
    """
    types = schema.get("type", ())
    types = [types] if isinstance(types, str) else list(types)
    if types and not any(_has_type(value, name) for name in types):
        return f"{where or 'arguments'} must be {_article(' or '.join(types))}, not {kind_of(value)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} must be one of {', '.join(show(choice) for choice in schema['enum'][:20])}, not {show(value)}"
    if isinstance(value, dict):
        return _check_object(value, schema, where)
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for index, item in enumerate(value):
            if wrong := check_value(item, schema["items"], f"{where}[{index}]"):
                return wrong
    return None


def _check_object(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    properties = schema.get("properties", {})
    inside = f" in {where}" if where else ""
    for name in schema.get("required", ()):
        if name not in value:
            return f"missing argument {show(name)}{inside}"
    others = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in properties:
            rule = properties[name]
            kind = rule.get("type")
            if kind.__class__ is str and _EXACT.get(kind) is item.__class__ and "enum" not in rule:
                continue  # nearly all arguments; the long way says the same
        elif others is False:
            known = ", ".join(show(known) for known in list(properties)[:20]) or "none"
            return f"unknown argument {show(name)}{inside}; known: {known}"
        else:
            rule = others if isinstance(others, Mapping) else {}
        if wrong := check_value(item, rule, f"argument {show(name)}{inside}"):
            return wrong
    return None


def _has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool) and name in ("number", "integer"):
        return False  # to Python a bool is an int, to JSON it is not
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(name, (object,)))


def kind_of(value: Any) -> str:
    """Returns what a JSON value is, with its article: "a string", "null"."""
    if value is None:
        return "null"
    names = ("boolean", "integer", "number", "string", "array", "object")
    return _article(next((name for name in names if _has_type(value, name)), type(value).__name__))


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if noun != "null" else noun


def show(value: Any, limit: int = 60) -> str:
    """Returns a short, printable excerpt: control characters, surrogates and line breaks escaped."""
    if isinstance(value, str):
        return repr(value[:limit]) + ("..." if len(value) > limit else "")
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def signature(name: str, function: Function) -> str:
    """Returns a tool in one line: `search(query: string, top_k: integer (optional))`."""
    parameters = function.get("parameters") or {}
    required = parameters.get("required", ())
    parts = []
    for argument, rule in parameters.get("properties", {}).items():
        types = rule.get("type", "any")
        types = types if isinstance(types, str) else " or ".join(types)
        parts.append(f"{argument}: {types}" + ("" if argument in required else " (optional)"))
    return f"{name}({', '.join(parts)})"


def describe(functions: Mapping[str, Function]) -> str:
    """Returns the schemas for a system prompt, one JSON object a line."""
    return "\n".join(dumps(dict(function)) for function in functions.values())


def text_argument(function: Function) -> str | None:
    """Returns the argument that a bare string stands for: the only required one, or the only one, if it is a string."""
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties", {})
    required = list(parameters.get("required", ()))
    names = required or list(properties)
    if len(names) != 1 or properties.get(names[0], {}).get("type", "string") != "string":
        return None
    return names[0]


def example_call(functions: Mapping[str, Function]) -> tuple[str, dict[str, Any]]:
    """Returns the first tool's name, with a placeholder for each argument that it needs."""
    name, function = next(iter(functions.items()))
    parameters = function.get("parameters") or {}
    needed = parameters.get("required", ()) or list(parameters.get("properties", {}))[:1]
    return name, _placeholder({"type": "object", "properties": parameters.get("properties", {}), "required": needed})


def _placeholder(schema: Mapping[str, Any]) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "string")
    kind = kind if isinstance(kind, str) else kind[0]
    if kind == "object":
        rules = schema.get("properties", {})
        return {name: _placeholder(rules.get(name, {})) for name in schema.get("required", ())}
    return _EXAMPLES.get(kind, "...")
