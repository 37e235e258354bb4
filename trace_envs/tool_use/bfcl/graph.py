"""Object graphs as values: what a simulator holds, without the simulator.

Invariant: `thaw(freeze(objects))` has the same values, types, order and sharing as `objects`, and no part in common with them.

A graph is a tuple of nodes; node 0 is the dictionary of attributes. A node is its kind and its parts, which are atoms or
`("@", i)` for node i. So graphs are plain data: they compare, hash, pickle and go into snapshots like any tuple.
"""

from __future__ import annotations

import datetime
import marshal
import random
from collections.abc import Mapping
from typing import Any

Graph = tuple[tuple[Any, ...], ...]
_ATOMS = (str, int, float, bool, type(None))
_LISTS = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}


def freeze(attributes: Mapping[str, Any], classes: Mapping[str, type], before: Graph = ()) -> Graph:
    """Returns the graph of an object's attributes.

    Args:
        attributes: The attributes by name.
        classes: Classes of the objects that may be among them, by name; their attributes are all there is to them.
        before: An earlier graph; nodes that are as they were in it are shared with it.

    Raises:
        TypeError: A value is of a class that is not known here.
    """
    names: dict[Any, str] = {cls: name for name, cls in classes.items()}
    found: list[Any] = [dict(attributes)]
    numbers = {id(found[0]): 0}
    nodes: list[tuple[Any, ...]] = []

    def part(value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        if id(value) not in numbers:
            numbers[id(value)] = len(found)
            found.append(value)
        return ("@", numbers[id(value)])

    for value in found:  # which grows
        kind: Any = type(value)
        if kind is dict:
            node: tuple[Any, ...] = ("dict", *(item for key, v in value.items() for item in (key, part(v))))
        elif kind is set or kind is frozenset:
            node = (_LISTS[kind], *sorted(value, key=lambda item: (type(item).__name__, item)))
        elif kind in _LISTS:
            node = (_LISTS[kind], *map(part, value))
        elif kind is random.Random:
            node = ("random", *value.getstate())
        elif isinstance(value, datetime.datetime):
            node = ("time", value.isoformat())
        elif kind in names:
            node = (names[kind], *(item for key, v in vars(value).items() for item in (key, part(v))))
        else:
            raise TypeError(f"a simulator holds a {kind.__name__}, which cannot be kept as plain data")
        i = len(nodes)
        # By their bytes: to == 1, 1.0 and True are the same.
        if i < len(before) and marshal.dumps(before[i], 2) == marshal.dumps(node, 2):
            node = before[i]
        nodes.append(node)
    if len(nodes) == len(before) and all(a is b for a, b in zip(nodes, before, strict=True)):
        return before
    return tuple(nodes)


def thaw(graph: Graph, classes: Mapping[str, type]) -> dict[str, Any]:
    """Returns attributes as they were, made anew.

    Args:
        graph: What `freeze` returned.
        classes: As for `freeze`.
    """
    made: list[Any] = [_shell(node, classes) for node in graph]

    def whole(part: Any) -> Any:
        return made[part[1]] if type(part) is tuple else part

    for i in reversed(range(len(graph))):  # tuples stand before what they hold
        kind, *parts = graph[i]
        if kind == "dict":
            made[i].update(zip(parts[::2], map(whole, parts[1::2]), strict=True))
        elif kind == "list":
            made[i].extend(map(whole, parts))
        elif kind == "tuple":
            made[i] = tuple(map(whole, parts))
        elif kind in classes:
            vars(made[i]).update(zip(parts[::2], map(whole, parts[1::2]), strict=True))
    return made[0]


def _shell(node: tuple[Any, ...], classes: Mapping[str, type]) -> Any:
    kind, *parts = node
    if kind == "dict":
        return {}
    if kind in ("list", "tuple"):
        return []
    if kind in ("set", "frozenset"):
        return set(parts) if kind == "set" else frozenset(parts)
    if kind == "time":
        return datetime.datetime.fromisoformat(parts[0])
    if kind == "random":
        generator = random.Random()
        generator.setstate((parts[0], parts[1], parts[2]))
        return generator
    return object.__new__(classes[kind])
