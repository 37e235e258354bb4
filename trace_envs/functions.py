"""Typed Python functions as tools.

Invariant: what a model may pass to a function is what its signature says, no more: the schema is made from the signature, and
calls are checked against the schema before they come here.

A tool function takes the world first and returns the new world and a result; it never changes the world that it is given:

    def deposit(world: dict, account: str, amount: int) -> tuple[dict, str]:
        '''Puts whole euros into an account.'''
        if account not in world:
            raise ToolError(f"there is no account {account!r}")
        return {**world, account: world[account] + amount}, "done"
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse

from trace_envs.schemas import dumps
from trace_envs.state import ToolCall

_PLAIN: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}


class ToolError(Exception):
    """Raised by a tool function that refuses; the agent is shown the message."""


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the OpenAI-style schema of a tool function.

    The name is the function's; the description is its docstring's first line, those of the arguments are in its `Args` section
    (Google style). Arguments with a default are optional. Types are `str`, `int`, `float`, `bool`, `None`, lists and
    string-keyed dictionaries of such, `Literal`, and unions.

    Args:
        function: Its first parameter is the world, which no call passes.

    Raises:
        TypeError: An argument has no type, or one that JSON does not know; or the function takes no world, or `*args`.
    """
    name = function.__name__
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (parameters[0].POSITIONAL_ONLY, parameters[0].POSITIONAL_OR_KEYWORD):
        raise TypeError(f"tool {name!r} must take the world as its first parameter")
    hints = get_type_hints(function)
    doc = parse(inspect.getdoc(function) or "", style=DocstringStyle.GOOGLE)
    described = {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}
    properties, required = {}, []
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"tool {name!r}: {parameter} cannot be passed by name; give it a name and a type")
        if parameter.name not in hints:
            raise TypeError(
                f"tool {name!r}: argument {parameter.name!r} has no type; annotate it, such as {parameter.name}: str"
            )
        rule = type_schema(hints[parameter.name], f"tool {name!r}: argument {parameter.name!r}")
        if described.get(parameter.name):
            rule = {**rule, "description": described[parameter.name]}
        properties[parameter.name] = rule
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    description = " ".join((doc.short_description or "").split())
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def type_schema(annotation: Any, where: str) -> dict[str, Any]:
    """Returns the JSON schema of a type.

    Args:
        annotation: The type.
        where: What an error says it belongs to.

    Raises:
        TypeError: JSON has no such type.
    """
    if annotation in _PLAIN:
        return {"type": _PLAIN[annotation]}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        kinds = sorted({_PLAIN[type(choice)] for choice in arguments})
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(arguments)}
    if origin in (Union, types.UnionType):
        parts = [type_schema(argument, where) for argument in arguments]
        if all(set(part) == {"type"} for part in parts):
            return {"type": [part["type"] for part in parts]}
        # A union of one detailed type and null is all that the checks of arguments can say of more.
        detailed = [part for part in parts if part != {"type": "null"}]
        if len(detailed) == 1 and "enum" not in detailed[0]:
            return {**detailed[0], "type": [detailed[0]["type"], "null"]}
    if origin in (list, Sequence) and len(arguments) == 1:
        return {"type": "array", "items": type_schema(arguments[0], where)}
    if origin in (dict, Mapping) and arguments[:1] == (str,):
        return {"type": "object", "additionalProperties": type_schema(arguments[1], where)}
    raise TypeError(
        f"{where} is of type {annotation!r}, which no JSON schema expresses; use str, int, float, bool, list or dict"
    )


class FunctionTools:
    """Tool functions under their names.

    Args:
        functions: See the module; their names must differ.

    Attributes:
        schemas: One for each function, in order.

    Raises:
        TypeError: A function cannot be a tool; the message says why.
        ValueError: Two functions have the same name.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]]):
        self.schemas = [tool_schema(function) for function in functions]
        self._functions = {function.__name__: function for function in functions}
        if len(self._functions) < len(functions):
            raise ValueError(f"two tools have the same name: {', '.join(sorted(f.__name__ for f in functions))}")
        self._integers = {
            schema["function"]["name"]: frozenset(
                name
                for name, rule in schema["function"]["parameters"]["properties"].items()
                if rule["type"] == "integer"
            )
            for schema in self.schemas
        }

    def call(self, world: Any, call: ToolCall) -> tuple[Any, str, bool]:
        """Calls a function: the new world, the result as text (JSON unless it is a string), and whether it refused."""
        whole = self._integers[call.name]
        # To JSON 3.0 is an integer, to Python it is not.
        arguments = {name: int(value) if name in whole else value for name, value in call.arguments.items()}
        try:
            world, result = self._functions[call.name](world, **arguments)
        except ToolError as error:
            return world, f"Error: {error}", True
        return world, result if isinstance(result, str) else dumps(result), False
