"""The digest of a value: equal exactly when `difference` finds nothing.

Invariant: the order of dictionaries and sets, sharing of equal parts, and the way a cycle is written make no difference.
"""

from __future__ import annotations

import json
from collections import Counter
from hashlib import blake2b
from typing import Any

from trace_envs.snapshots.table import Node, flatten

_SIZE = 16
_PAIRED, _UNORDERED = ("dict", "proxy"), ("set", "frozenset")


def digest(value: Any, name: str = "value") -> str:
    """Returns the digest of a value, in hex.

    Args:
        value: Anything that `codec.encode` takes.
        name: What it is called in errors.

    Raises:
        SnapshotUnsupportedError: Part of it is no plain data.
    """
    root, nodes = flatten(value, name, canonical=True)
    return _child(root, _digests(nodes)).hex()


def _digests(nodes: list[Node]) -> list[bytes]:
    """Returns the digest of each node: of its tag, its head and its children's digests.

    Nodes from which a cycle can be reached have no first child to begin with. They all begin alike, and each round tells
    apart those whose surroundings differ one step farther out, until a round tells nothing more apart. How many rounds
    that takes is a property of the value, not of how it is written down.
    """
    digests = [b""] * len(nodes)
    parents: list[list[int]] = [[] for _ in nodes]
    missing = [0] * len(nodes)
    for i, (_, _, children) in enumerate(nodes):
        for child in children:
            if isinstance(child, list):
                parents[child[0]].append(i)
                missing[i] += 1
    ready = [i for i, count in enumerate(missing) if count == 0]
    while ready:
        i = ready.pop()
        digests[i] = _combine(nodes[i], digests)
        for parent in parents[i]:
            missing[parent] -= 1
            if missing[parent] == 0:
                ready.append(parent)
    rest = [i for i, count in enumerate(missing) if count]
    kinds = 0
    while rest:
        after = [_combine(nodes[i], digests) for i in rest]
        for i, made in zip(rest, after, strict=True):
            digests[i] = made
        if len(Counter(after)) == kinds:
            break
        kinds = len(Counter(after))
    return digests


def _combine(node: Node, digests: list[bytes]) -> bytes:
    tag, head, children = node
    parts = [_child(child, digests) for child in children]
    if tag in _PAIRED:
        parts = sorted(key + value for key, value in zip(parts[::2], parts[1::2], strict=True))
    elif tag in _UNORDERED:
        parts.sort()
    return _hash(b"n", [tag, head], parts)


def _child(child: Any, digests: list[bytes]) -> bytes:
    return digests[child[0]] if isinstance(child, list) else _hash(b"s", child, [])


def _hash(kind: bytes, head: Any, parts: list[bytes]) -> bytes:
    text = json.dumps(head, ensure_ascii=False).encode("utf-8", "surrogatepass")
    made = blake2b(kind + len(text).to_bytes(8, "little") + text, digest_size=_SIZE)
    for part in parts:
        made.update(part)
    return made.digest()
