"""Values as flat tables of nodes, and the classes that may stand in them.

Invariant: a table says all that `difference` would look at; shared references are shared and cycles closed in it, and making
it takes no recursion, so that depth does not matter.

A node is `[tag, head, children]`; a child is a JSON scalar or `[i]`, the i-th node. Nodes that cannot be changed stand behind
their parts, except for parts that can.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np

from trace_envs.snapshots import arrays
from trace_envs.snapshots.compare import show
from trace_envs.snapshots.errors import SnapshotUnsupportedError
from trace_envs.snapshots.plain import (
    EncodedName,
    EncodedObject,
    attributes_of,
    class_name,
    generator_state,
    why_not_plain,
)
from trace_envs.state import (
    EpisodeState,
    FinalAnswer,
    FormatError,
    History,
    Outcome,
    Task,
    ToolCall,
    ToolCalls,
    Turn,
    turns_of,
)

Node = list[Any]
_INLINE = 2**63  # larger integers get a node, in hexadecimal: their decimal digits take quadratic time
_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
TAGS: dict[str, type] = {}
_CLASSES: dict[type, str] = {}


def register(cls: type, tag: str) -> type:
    """Lets frozen dataclasses (and named tuples and enumerations) of a class be written under a tag and read as what they were.

    Args:
        cls: The class. Reading calls it with its fields as keywords.
        tag: What stands in the bytes; it must not change from one release to the next.

    Returns:
        The class.

    Raises:
        TypeError: Instances of the class can change.
        ValueError: The tag is another class's.
    """
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not (frozen or issubclass(cls, Enum) or hasattr(cls, "_fields")):
        raise TypeError(f"{class_name(cls)} is neither a frozen dataclass nor a named tuple nor an enumeration")
    other = TAGS.setdefault(tag, cls)
    if class_name(other) != class_name(cls):
        raise ValueError(f"the tag {tag!r} is that of {class_name(other)}; give {class_name(cls)} another")
    TAGS[tag], _CLASSES[cls] = cls, tag
    return cls


for _cls in (EpisodeState, Task, Turn, ToolCall, ToolCalls, FinalAnswer, FormatError, Outcome):
    register(_cls, _cls.__name__)


class _Open:
    """A node whose children are being looked at."""

    __slots__ = ("children", "node", "own", "parts", "step", "value")

    def __init__(self, value: Any, step: str, own: list[int], head: Any, parts: Iterator[tuple[str, Any]]):
        self.value, self.step, self.own, self.parts = value, step, own, parts
        self.children: list[Any] = []
        self.node: Node = [*head, self.children]


def flatten(value: Any, name: str, canonical: bool = False) -> tuple[Any, list[Node]]:
    """Returns the root (a child) and the nodes of a value.

    Args:
        value: The value.
        name: What it is called in errors.
        canonical: Leave out what makes no difference: which NaN it is, how a generator came to be where it is.
    """
    nodes: list[Node] = []
    # One list [index] for each value, shared by all who refer to it and filled in once its index is known. The values
    # are kept: some are made on the way, and their ids must not be given away.
    met: dict[int, tuple[list[int], Any]] = {}
    root: list[Any] = []
    stack: list[_Open] = [_Open(None, name, [], ("root", None), iter([("", value)]))]
    stack[0].children = root
    while stack:
        top = stack[-1]
        step, part = next(top.parts, ("", stack))
        if part is stack:
            stack.pop()
            if stack:
                top.own[0] = len(nodes)
                nodes.append(top.node)
            continue
        if _is_inline(part):
            top.children.append(part)
            continue
        if id(part) in met:
            top.children.append(met[id(part)][0])
            continue
        own = [-1]
        met[id(part)] = own, part
        top.children.append(own)
        try:
            head, parts = _take_apart(part, canonical)
        except _NotPlain as error:
            where = "".join(entry.step for entry in stack) + step
            raise SnapshotUnsupportedError(
                f"{where} is a {class_name(type(part)).replace(':', '.')}, which cannot be written as plain data: {error}. "
                f"Keep the state in plain data, NumPy arrays or plain Python objects, or register a frozen dataclass with "
                f"trace_envs.snapshots.codec.register(cls, tag)"
            ) from None
        stack.append(_Open(part, step, own, head, parts))
    return root[0], nodes


class _NotPlain(Exception):
    """Why a value cannot be written."""


def _is_inline(value: Any) -> bool:
    kind = type(value)
    if kind is int:
        return -_INLINE < value < _INLINE
    return value is None or kind is str or kind is bool or (kind is float and math.isfinite(value))


def _take_apart(value: Any, canonical: bool) -> tuple[tuple[str, Any], Iterator[tuple[str, Any]]]:
    """Returns tag and head of a node, and what it is made of with the steps that lead there."""
    kind = type(value)
    if kind in _SEQUENCES:
        return (_SEQUENCES[kind], None), ((f"[{i}]", part) for i, part in enumerate(value))
    if kind is dict or kind is MappingProxyType:
        items = dict(value).items()
        pairs = (pair for k, v in items for pair in ((f" key {show(k)}", k), (f"[{show(k)}]", v)))
        return ("dict" if kind is dict else "proxy", None), pairs
    if kind is deque:
        return ("deque", value.maxlen), ((f"[{i}]", part) for i, part in enumerate(value))
    if kind is History:
        return ("history", None), ((f"[{i}]", turn) for i, turn in enumerate(turns_of(value)))
    if kind in _CLASSES and not isinstance(value, Enum):
        names = getattr(kind, "_fields", None) or [field.name for field in dataclasses.fields(kind)]
        return ("record", [_CLASSES[kind], *names]), ((f".{name}", getattr(value, name)) for name in names)
    if kind is EncodedObject:
        return _object(value.class_name, value.attributes)
    if isinstance(value, np.ndarray) and kind is np.ndarray and value.dtype == object:
        return ("objects", list(value.shape)), (
            (f".flat[{i}]", part) for i, part in enumerate(value.reshape(-1).tolist())
        )
    head = _leaf(value, canonical)
    if head is not None:
        return head, iter(())
    reason = why_not_plain(kind)
    if reason is not None:
        raise _NotPlain(reason)
    return _object(class_name(kind), attributes_of(value))


def _object(name: str, attributes: dict[str, Any]) -> tuple[tuple[str, Any], Iterator[tuple[str, Any]]]:
    names = sorted(attributes)
    return ("object", [name, *names]), ((f".{name}", attributes[name]) for name in names)


def _leaf(value: Any, canonical: bool) -> tuple[str, Any] | None:
    """Returns tag and head of a value that has no parts, `None` for what is none of these."""
    kind = type(value)
    if kind is int:
        return "int", hex(value)
    if kind is float:
        return "float", "nan" if math.isnan(value) else repr(value)
    if kind is complex:
        return "complex", [arrays.text_of_float(value.real), arrays.text_of_float(value.imag)]
    if kind in (bytes, bytearray):
        return kind.__name__, arrays.text_of_bytes(value)
    if kind is range:
        return "range", [hex(n) for n in (value.start, value.stop, value.step)]
    try:
        if kind is np.ndarray:
            return "array", arrays.describe(value, canonical)
        if isinstance(value, np.character):
            return "characters", [kind.__name__, str.__str__(value) if kind is np.str_ else arrays.text_of_bytes(value)]
        if isinstance(value, np.generic):
            return "scalar", arrays.describe(np.asarray(value), canonical)
        if isinstance(value, np.dtype):
            return "dtype", arrays.describe_dtype(value)
    except ValueError as error:
        raise _NotPlain(str(error)) from None
    if isinstance(value, Enum):
        if kind in _CLASSES:
            return "enum", [_CLASSES[kind], value.name]
        return "name", [class_name(kind), value.name]
    if isinstance(value, type):
        return "name", [class_name(value), None]
    if kind is EncodedName:
        return "name", [value.class_name, value.member]
    state = generator_state(value)
    if state is None:
        return None
    inner = getattr(value, "bit_generator", getattr(value, "_bit_generator", value))
    if kind not in arrays.GENERATORS or (inner is not value and type(inner).__name__ not in arrays.BIT_GENERATORS):
        raise _NotPlain("only NumPy's own generators and random.Random are")
    sequence = None if canonical else _seed_sequence(getattr(inner, "seed_seq", None))
    return "generator", [kind.__name__, *flatten(state, "state", canonical), sequence]


def _seed_sequence(sequence: Any) -> Any:
    """Returns what the children that a generator will spawn depend on."""
    if type(sequence) is not np.random.SeedSequence or not 4 <= sequence.pool_size <= arrays.LARGEST_POOL:
        return None
    return [*flatten(dict(sequence.state), "seed_seq")]
