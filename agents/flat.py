"""The flat layout: one row for each root-to-leaf path, causal attention. The reference that others are held against.

Invariant: an edge is scored, and a prefix's value read, in the first row that contains it and in no other.
"""

from __future__ import annotations

import numpy as np

from agents.layout import NOTHING, Layout, Row, Wanted, deepest, grouped, padded, read_at, segment
from agents.tokens import EdgeTokens
from allocation.tree import Node


def flat_layout(tokens: EdgeTokens, values: np.ndarray, max_tokens: int) -> Layout:
    """Lays edges out as one row for each root-to-leaf path.

    Rows that score nothing and are asked for no value are left out, and so is what follows the last token that is needed.

    Args:
        tokens: The edges to score.
        values: Rows of the prefixes whose values are wanted, int64 [v].
        max_tokens: Padded tokens of a micro-batch, at most (one row may exceed it).
    """
    wanted = Wanted(tokens, values)
    rows: list[Row] = []
    for t in wanted.trees:
        tree, start, need = tokens.table.trees[t], int(tokens.table.start[t]), wanted.needed[t]
        done: set[int] = set()
        for leaf in deepest(tree, wanted.reached[t]):
            rows.append(_row(tree.path(leaf), start, need, done, wanted))
            done.update(node.id for node in tree.path(leaf))
    batches = grouped([len(r) for r in rows], max_tokens)
    return Layout(tuple(padded([rows[i] for i in b]) for b in batches), wanted.flat_tokens, wanted.unique_tokens)


def _row(path: list[Node], start: int, need: np.ndarray, done: set[int], wanted: Wanted) -> Row:
    """Returns the row of one path; nodes that are done were read in an earlier row."""
    ids, at, token = [NOTHING], [NOTHING], [NOTHING]
    value_at, value_node, length = [], [], 0
    for node in path:
        row, size = start + node.id, int(need[node.id])
        if node.id not in done:
            places, which = read_at(node, row, length, wanted)
            at.append(places)
            token.append(which)
            if row in wanted.values:
                value_at.append(length + size - 1)
                value_node.append(row)
        ids.append(segment(node)[:size])
        length += size
    return Row(
        np.concatenate(ids),
        np.arange(length),
        None,
        np.concatenate(at) - 1,
        np.concatenate(token),
        np.array(value_at, dtype=np.int64),
        np.array(value_node, dtype=np.int64),
    )
