"""Values as plain data and back.

Invariant: `decode(encode(x))` equals `x` (`difference` finds nothing), with shared references shared and cycles closed;
`decode` runs no code of any class named in the data, imports nothing, and takes memory in proportion to the data.

What is written is the value's table of nodes (see `table`). Nodes that can be changed are made empty first and filled at the
end, the others are made in the table's order, parts before wholes. Objects of classes that were not registered come back
as inert `EncodedObject` records; `revive` makes instances of those that it is allowed to make.
"""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Callable
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np

from trace_envs.snapshots import arrays
from trace_envs.snapshots.errors import SnapshotFormatError, SnapshotUnsupportedError
from trace_envs.snapshots.plain import EncodedName, EncodedObject, imported_class, set_attributes, why_not_plain
from trace_envs.snapshots.table import TAGS, Node, flatten, register
from trace_envs.state import History

__all__ = ["EncodedName", "EncodedObject", "decode", "encode", "register", "revive"]

_MUTABLE = ("list", "set", "deque", "dict", "proxy", "object", "objects")


def encode(value: Any, name: str = "value") -> bytes:
    """Returns a value as JSON text (UTF-8; lone surrogates pass).

    Args:
        value: The value.
        name: What it is called in errors.

    Raises:
        SnapshotUnsupportedError: Part of it is no plain data; the message names the part and its class.
    """
    root, nodes = flatten(value, name)
    text = json.dumps({"root": root, "nodes": nodes}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def decode(data: bytes) -> Any:
    """Returns the value that `encode` wrote; objects as `EncodedObject`, classes as `EncodedName`.

    Raises:
        SnapshotFormatError: The data is not what `encode` writes, or holds a class that was not registered here.
    """
    try:
        table = json.loads(data.decode("utf-8", "surrogatepass"))
        return _Builder(table["nodes"], None).child(table["root"])
    except SnapshotFormatError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise SnapshotFormatError(f"the data is malformed ({type(error).__name__}: {error})") from error


def revive(value: Any, allowed: Callable[[type], bool]) -> Any:
    """Returns a copy of a decoded value in which encoded objects are instances, made without running their class's code.

    Args:
        value: What `decode` returned, or `EnvSnapshot.from_bytes` as the payload.
        allowed: Says of a class whether instances of it (or it itself) may be made.

    Raises:
        SnapshotUnsupportedError: A class is not imported, not allowed, or has taken to customising how it is made.
    """
    root, nodes = flatten(value, "payload")
    return _Builder(nodes, allowed).child(root)


DEEPEST, LARGEST = 500, 10_000_000
"""Bounds of immutable values in immutable values: depth, and number of parts where shared ones count each time."""


class _Builder:
    """Makes the values of a table.

    Args:
        nodes: The table.
        allowed: See `revive`; `None` keeps objects inert.
    """

    def __init__(self, nodes: list[Node], allowed: Callable[[type], bool] | None):
        self._allowed = allowed
        self._nodes = nodes
        self._values: dict[int, Any] = {}
        self._weights: dict[int, tuple[int, int]] = {}
        self._filled: dict[int, Any] = {}  # what is filled, where it is not the value itself
        for i, (tag, head, _) in enumerate(nodes):
            if tag in _MUTABLE:
                self._values[i] = self._shell(i, tag, head)
        for i, (tag, head, children) in enumerate(nodes):
            if tag not in _MUTABLE:
                self._weigh(i, tag, children)
                self._values[i] = self._whole(tag, head, children)
        # Sets and dictionaries look at their members, which must be whole.
        for i, (tag, head, children) in enumerate(nodes):
            if tag in _MUTABLE:
                self._fill(self._filled.get(i, self._values[i]), tag, head, [self.child(c) for c in children])

    def _weigh(self, i: int, tag: str, children: list[Any]) -> None:
        """Bounds what hashing has to walk through: how deep tuples lie in tuples, and how many there are written out."""
        if tag not in ("tuple", "frozenset", "record"):
            return
        below = [self._weights.get(c[0], (0, 1)) for c in children if isinstance(c, list)]
        depth, size = 1 + max((d for d, _ in below), default=0), len(children) + sum(s for _, s in below)
        if depth > DEEPEST or size > LARGEST:
            raise SnapshotFormatError("the data is malformed (tuples in tuples beyond measure)")
        self._weights[i] = depth, size

    def child(self, child: Any) -> Any:
        """Returns the value of a child. One that is not there yet would be part of itself: `LookupError`."""
        if not isinstance(child, list):
            return child
        (index,) = child
        return self._values[index]

    def _shell(self, i: int, tag: str, head: Any) -> Any:
        if tag == "deque":
            return deque(maxlen=head)
        if tag == "proxy":
            self._filled[i] = {}
            return MappingProxyType(self._filled[i])
        if tag == "objects":
            if math.prod(map(arrays.size, head)) != len(self._nodes[i][2]):
                raise SnapshotFormatError(f"the data is malformed (an array of shape {head} has other contents)")
            return np.empty(tuple(head), object)
        if tag == "object":
            if not all(isinstance(name, str) for name in head):
                raise SnapshotFormatError("the data is malformed (a name that is no string)")
            if self._allowed is None:
                return EncodedObject(head[0], {})
            return object.__new__(self._class(head[0], instances=True))
        return {"list": list, "set": set, "dict": dict}[tag]()

    def _class(self, name: str, instances: bool) -> type:
        cls = imported_class(name)
        if cls is None:
            raise SnapshotUnsupportedError(
                f"the snapshot holds a {name.replace(':', '.')}, and there is no such class among the modules imported here; "
                f"make the environment (which imports them) before restoring"
            )
        if self._allowed is not None and not self._allowed(cls):
            raise SnapshotUnsupportedError(
                f"the snapshot holds a {name.replace(':', '.')}, which is none of the classes that this environment's state "
                f"is made of; it is of another environment, or was not written by this package"
            )
        reason = why_not_plain(cls) if instances else None
        if reason is not None:
            raise SnapshotUnsupportedError(f"the snapshot holds a {name.replace(':', '.')}, and {reason}")
        return cls

    def _whole(self, tag: str, head: Any, children: list[Any]) -> Any:
        values = [self.child(c) for c in children]
        if tag == "tuple":
            return tuple(values)
        if tag == "frozenset":
            return frozenset(values)
        if tag == "record":
            return _record(head[0], dict(zip(head[1:], values, strict=True)))
        if tag == "history":
            history = None
            for turn in values:
                history = History(turn, history)
            return history
        if tag == "name":
            return self._named(EncodedName(*head))
        return _LEAVES[tag](head)

    def _named(self, name: EncodedName) -> Any:
        if self._allowed is None:
            return name
        cls = self._class(name.class_name, instances=False)
        return cls if name.member is None else vars(cls)["_member_map_"][name.member]

    @staticmethod
    def _fill(value: Any, tag: str, head: Any, values: list[Any]) -> None:
        if tag in ("list", "deque"):
            value.extend(values)
        elif tag == "set":
            value.update(values)
        elif tag in ("dict", "proxy"):
            value.update(zip(values[::2], values[1::2], strict=True))
            arrays.check_generator_state(value)
        elif tag == "objects":
            flat = value.reshape(-1)
            for i, part in enumerate(values):
                flat[i] = part
        else:
            attributes = dict(zip(head[1:], values, strict=True))
            if isinstance(value, EncodedObject):
                value.attributes.update(attributes)
            else:
                try:
                    set_attributes(value, attributes)
                except AttributeError as error:
                    raise SnapshotUnsupportedError(
                        f"the snapshot holds a {head[0]} of another release ({error})"
                    ) from None


def _record(tag: str, fields: dict[str, Any]) -> Any:
    cls = TAGS.get(tag)
    if cls is None or issubclass(cls, Enum):
        raise SnapshotFormatError(
            f"the snapshot holds a record {tag!r} that nobody registered here; import the package that defines it first"
        )
    try:
        return cls(**fields)
    except TypeError as error:
        raise SnapshotFormatError(f"the snapshot's record {tag!r} is of another release ({error})") from None


def _enum(head: Any) -> Any:
    tag, name = head
    cls = TAGS.get(tag)
    if cls is None or not issubclass(cls, Enum):
        raise SnapshotFormatError(f"the snapshot holds a member of an enumeration {tag!r} that nobody registered here")
    return cls[name]


def _generator(head: Any) -> Any:
    kind, root, nodes, sequence = head
    state = _Builder(nodes, None).child(root)
    if kind == "Random":
        generator = random.Random(0)
        generator.setstate(state)
        return generator
    arrays.check_generator_state(state)
    seed = None
    if sequence is not None:
        seed = arrays.seed_sequence(_Builder(sequence[1], None).child(sequence[0]))
    return arrays.generator(kind, state, seed)


_LEAVES: dict[str, Callable[[Any], Any]] = {
    "int": lambda head: int(head, 16),
    "float": float,
    "complex": lambda head: complex(*map(float, head)),
    "bytes": arrays.bytes_of_text,
    "bytearray": lambda head: bytearray(arrays.bytes_of_text(head)),
    "range": lambda head: range(*(int(n, 16) for n in head)),
    "array": arrays.array,
    "characters": lambda head: np.str_(head[1]) if head[0] == "str_" else np.bytes_(arrays.bytes_of_text(head[1])),
    "scalar": lambda head: arrays.array(head)[()],
    "dtype": arrays.dtype,
    "enum": _enum,
    "generator": _generator,
}
