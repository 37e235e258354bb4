"""The packed layout: the nodes of trees in depth-first order, each token once.

Invariant: token j is visible to token i if and only if j <= i < ends[j], where `ends[j]` is the end of the subtree of j's node.
One integer a token says it all, since subtrees are intervals of a depth-first order (docs/algorithm.md, section 5).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from agents.layout import NOTHING, Layout, Row, Wanted, deepest, padded, read_at, segment
from agents.tokens import EdgeTokens
from allocation.tree import Node, Tree


def packed_layout(tokens: EdgeTokens, values: np.ndarray, max_tokens: int) -> Layout:
    """Lays edges out as trees, each token once.

    Trees stand one after the other in a row, as many as `max_tokens` allows, so that nothing is padded. What is not needed is
    left out: subtrees that score nothing and are asked for no value, and what follows the last token that is. A tree of more
    than `max_tokens` is split into several, which repeat the prefixes that they share.

    Args:
        tokens: The edges to score.
        values: Rows of the prefixes whose values are wanted, int64 [v].
        max_tokens: Padded tokens of a micro-batch, at most (one path may exceed it).
    """
    wanted = Wanted(tokens, values)
    rows: list[Row] = []
    for t in wanted.trees:
        tree, start, need = tokens.table.trees[t], int(tokens.table.start[t]), wanted.needed[t]
        done: set[int] = set()
        for nodes in _parts(tree, wanted.reached[t], need, max_tokens):
            rows.append(_row(nodes, start, need, done, wanted))
            done.update(node.id for node in nodes)
    packs: list[list[Row]] = []
    size = 0
    for one in rows:
        if not packs or size + len(one) > max_tokens:
            packs.append([])
            size = 0
        packs[-1].append(one)
        size += len(one)
    return Layout(tuple(padded([_joined(pack)]) for pack in packs), wanted.flat_tokens, wanted.unique_tokens)


def _joined(rows: list[Row]) -> Row:
    """Returns trees one after the other in one row; none sees another, since each ends before the next begins."""
    offset = np.cumsum([0, *(len(r) for r in rows)])
    moved = list(zip(rows, offset[:-1], strict=True))
    return Row(
        np.concatenate([r.ids for r in rows]),
        np.concatenate([r.positions for r in rows]),
        np.concatenate([r.ends + by for r, by in moved]),
        np.concatenate([r.before + by for r, by in moved]),
        np.concatenate([r.token for r in rows]),
        np.concatenate([r.value_at + by for r, by in moved]),
        np.concatenate([r.value_node for r in rows]),
    )


def _parts(tree: Tree, reached: np.ndarray, need: np.ndarray, max_tokens: int) -> Iterator[list[Node]]:
    """Yields the needed nodes of a tree in depth-first order, in parts that are trees of at most `max_tokens` tokens."""
    part: list[Node] = []
    held: set[int] = set()
    size = 0
    for leaf in deepest(tree, reached):
        path = tree.path(leaf)
        new = [node for node in path if node.id not in held]
        if part and size + int(need[[n.id for n in new]].sum()) > max_tokens:
            yield part
            part, held, size, new = [], set(), 0, path
        part += new
        held.update(node.id for node in new)
        size += int(need[[n.id for n in new]].sum())
    if part:
        yield part


def _row(nodes: list[Node], start: int, need: np.ndarray, done: set[int], wanted: Wanted) -> Row:
    """Returns the row of one tree; nodes that are done were read in an earlier row."""
    size = need[[n.id for n in nodes]]
    first = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
    place = {node.id: int(at) for node, at in zip(nodes, first[:-1], strict=True)}
    depth = np.zeros(len(nodes), dtype=np.int64)  # position on the path of a node's first token
    last = first[1:] - 1  # where the last token of a node's path stands; -1 if the path is empty
    end = first[1:].copy()
    index = {node.id: i for i, node in enumerate(nodes)}
    for i, node in enumerate(nodes):
        if node.parent is not None:
            depth[i] = depth[index[node.parent]] + need[node.parent]
            if not size[i]:
                last[i] = last[index[node.parent]]
    for i, node in reversed(list(enumerate(nodes))):
        if node.parent is not None:
            up = index[node.parent]
            end[up] = max(end[up], end[i])
    before, token, value_at, value_node = [NOTHING], [NOTHING], [], []
    for node in nodes:
        if node.id in done:
            continue
        row = start + node.id
        places, which = read_at(node, row, place[node.id], wanted)
        if len(places):
            assert node.parent is not None
            # What predicts the first token is the last one of its path, which may stand far before it.
            before += [last[[index[node.parent]]], places[:-1]]
            token.append(which)
        if row in wanted.values:
            value_at.append(last[index[node.id]])
            value_node.append(row)
    return Row(
        np.concatenate([segment(node)[: need[node.id]] for node in nodes]),
        np.arange(first[-1]) - np.repeat(first[:-1] - depth, size),
        np.repeat(end, size),
        np.concatenate(before),
        np.concatenate(token),
        np.array(value_at, dtype=np.int64),
        np.array(value_node, dtype=np.int64),
    )
