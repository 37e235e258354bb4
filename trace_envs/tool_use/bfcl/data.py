"""The tasks of BFCL v4, as the package `bfcl-eval` has them on disk.

Invariant: files are read, nothing of the package is imported here.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from trace_envs.schemas import dumps
from trace_envs.snapshots.codec import register
from trace_envs.tool_use.suite import ToolUseTask

INSTALL = "pip install --no-deps bfcl-eval==2026.3.23 mpmath"
CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
SPLITS = {"train": range(128), "validation": range(128, 160), "test": range(160, 200), "all": range(200)}
"""Indices of each split: the categories are variants of the same 200 conversations, so all are divided alike."""

DOCUMENTS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
"""Modules and function documents of the simulators, by class."""

MORE_FUNCTIONS = "{functions}\nI have updated some more functions you can choose from. What about now?"
"""What the official harness says when it gives held-back functions."""

_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}


@dataclass(frozen=True, slots=True)
class Program:
    """One call of a ground truth: the function, positional and named arguments."""

    name: str
    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class BFCLTask(ToolUseTask):
    """A conversation of BFCL. `level` is its number of user turns.

    Attributes:
        messages: The user's messages.
        truth: Calls of the ground truth, for each user turn.
        classes: Simulators involved, in the official order.
        initial: Their configurations, as JSON.
        missed: Functions that are held back until a user turn, by its number.
    """

    messages: tuple[str, ...] = ()
    truth: tuple[tuple[Program, ...], ...] = ()
    classes: tuple[str, ...] = ()
    initial: str = "{}"
    missed: tuple[tuple[int, tuple[str, ...]], ...] = ()


register(Program, "bfcl.Program")
register(BFCLTask, "bfcl.Task")


def package_folder() -> Path:
    """Returns where the package is.

    Raises:
        ImportError: It is not installed.
    """
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or spec.origin is None:
        raise ImportError(f"the suite 'bfcl-v4' needs the package bfcl-eval: {INSTALL}")
    return Path(spec.origin).parent


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise ValueError(
                            f"{path}, line {number}: {error}; install the package anew: {INSTALL}"
                        ) from error
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there; another release of bfcl-eval? {INSTALL}") from error


@lru_cache(maxsize=1)
def function_schemas() -> dict[str, list[dict[str, Any]]]:
    """Returns the tools of each simulator as OpenAI-style schemas."""
    folder = package_folder() / "data" / "multi_turn_func_doc"
    return {name: [_schema(doc) for doc in _lines(folder / f"{file}.json")] for name, file in DOCUMENTS.items()}


def _schema(document: dict[str, Any]) -> dict[str, Any]:
    parameters = _json_schema(document["parameters"])
    function = {"name": document["name"], "description": document["description"], "parameters": parameters}
    return {"type": "function", "function": function}


def _json_schema(rule: Any) -> Any:
    """Returns a rule of BFCL in the words of JSON Schema."""
    if isinstance(rule, list):
        return [_json_schema(item) for item in rule]
    if not isinstance(rule, dict):
        return rule
    renamed = {key: _json_schema(value) for key, value in rule.items()}
    kind = renamed.get("type")
    if isinstance(kind, str) and kind in _TYPES:
        if _TYPES[kind] is None:
            del renamed["type"]
        else:
            renamed["type"] = _TYPES[kind]
    return renamed


def parse_call(text: str) -> Program:
    """Reads a call such as `mv(source='a', destination='b')`; nothing is evaluated but literals.

    Raises:
        ValueError: It is anything else.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("it is no call of a function")
        positional = tuple(ast.literal_eval(argument) for argument in call.args)
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        if len(named) < len(call.keywords):
            raise ValueError("it takes arguments apart with **")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} cannot be read as a call: {error}") from error
    return Program(call.func.id, positional, named)


@lru_cache(maxsize=len(CATEGORIES))
def load_category(category: str) -> tuple[tuple[BFCLTask, ...], str]:
    """Returns the tasks of a category, in their order, and a digest of the files they are from.

    Raises:
        ImportError: The package is not installed.
        ValueError: A file is missing or damaged.
    """
    folder = package_folder() / "data"
    file = f"BFCL_v4_{category}.json"
    truths = {entry["id"]: entry["ground_truth"] for entry in _lines(folder / "possible_answer" / file)}
    try:
        tasks = tuple(_task(entry, truths[entry["id"]], category) for entry in _lines(folder / file))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder / file} is not as bfcl-eval has it ({error!r}): {INSTALL}") from error
    content = (folder / file).read_bytes() + (folder / "possible_answer" / file).read_bytes()
    return tasks, hashlib.blake2b(content, digest_size=16).hexdigest()


def _task(entry: dict[str, Any], truth: list[list[str]], category: str) -> BFCLTask:
    missed = tuple((int(turn), tuple(names)) for turn, names in sorted(entry.get("missed_function", {}).items()))
    held_back = dict(missed)
    known = {s["function"]["name"]: s for c in entry["involved_classes"] for s in function_schemas()[c]}
    messages = []
    for number, turn in enumerate(entry["question"]):
        if number in held_back:
            given = "\n".join(dumps(known[name]["function"]) for name in held_back[number])
            messages.append(MORE_FUNCTIONS.format(functions=given))
        else:
            messages.append("\n".join(message["content"] for message in turn))
    return BFCLTask(
        task_id=entry["id"],
        prompt=messages[0],
        category=category,
        level=len(messages),
        messages=tuple(messages),
        truth=tuple(tuple(parse_call(call) for call in calls) for calls in truth),
        classes=tuple(entry["involved_classes"]),
        initial=json.dumps(entry["initial_config"]),
        missed=missed,
    )
