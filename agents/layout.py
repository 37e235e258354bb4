"""Layouts: how the tokens of a forest are laid out for a model, flat or packed.

Invariant: whatever the layout, every trained token is predicted from the tokens of its own path and of no other, at the
positions that they have on the path, and exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.tokens import EdgeTokens
from allocation.tree import Node, Tree

NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of tokens that go through the model together.

    Attributes:
        ids: Token ids, int64 [rows, length], padded on the right.
        positions: Position of each token on its path, int64 [rows, length].
        ends: Index behind the last token of the subtree of each token's node, int64 [rows, length] (of padding: its own index
            plus 1, so that it sees itself alone); `None` for flat rows, where attention is causal.
        row, before: Where the token stands whose hidden state predicts a scored token, int64 [t] each.
        token: Which token of `EdgeTokens` is scored, int64 [t].
        value_row, value_at: Where the ends of prefixes stand whose values a critic is asked for, int64 [v] each.
        value_node: Their rows in the table, int64 [v].
    """

    ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray | None
    row: np.ndarray
    before: np.ndarray
    token: np.ndarray
    value_row: np.ndarray
    value_at: np.ndarray
    value_node: np.ndarray


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch of edges, laid out.

    Attributes:
        micro_batches: In the order in which they are computed.
        flat_tokens: Tokens that the flat layout of the same edges holds, padding not counted.
        unique_tokens: Tokens that have to be computed at least once.
    """

    micro_batches: tuple[MicroBatch, ...]
    flat_tokens: int
    unique_tokens: int

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return sum(m.ids.size for m in self.micro_batches)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a micro-batch before padding; fields as in `MicroBatch`.

    Raises:
        ValueError: Something is read before the first token.
    """

    ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray | None
    before: np.ndarray
    token: np.ndarray
    value_at: np.ndarray
    value_node: np.ndarray

    def __post_init__(self) -> None:
        if min(self.before.min(initial=0), self.value_at.min(initial=0)) < 0:
            raise ValueError(
                "a path begins with a sampled token or an empty prompt, so nothing stands before it that a model could "
                "read; give the root of every tree context_ids of at least one token"
            )

    def __len__(self) -> int:
        return len(self.ids)


class Wanted:
    """What a layout has to read: scored edges and prefixes with values, and what that needs of each tree.

    Args:
        tokens: The edges to score.
        values: Rows of the prefixes whose values are wanted, int64 [v].

    Attributes:
        first: First token in `tokens` of each scored edge, by row.
        values: The prefixes' rows.
        trees: Positions of the trees with anything to read, rising.
        reached: By tree: whether a node's segment has to be computed, bool [nodes]; it may be one without tokens.
        needed: By tree: how many tokens of each node's segment have to be computed, int64 [nodes]. All of them where something
            below is read or the prefix has a value to give; the action alone where nothing but the edge is scored; none
            elsewhere.
    """

    def __init__(self, tokens: EdgeTokens, values: np.ndarray):
        self.tokens = tokens
        self.first = dict(zip(tokens.rows.tolist(), tokens.start[:-1].tolist(), strict=True))
        self.values = set(np.asarray(values, dtype=np.int64).tolist())
        rows = np.concatenate([tokens.rows, np.asarray(values, dtype=np.int64)])
        self.trees: list[int] = np.unique(tokens.table.tree[rows]).tolist()
        self.reached: dict[int, np.ndarray] = {}
        self.needed: dict[int, np.ndarray] = {}
        for t in self.trees:
            tree, start = self.tokens.table.trees[t], int(self.tokens.table.start[t])
            need = np.zeros(len(tree.nodes), dtype=np.int64)
            reached = np.zeros(len(tree.nodes), dtype=bool)
            above: set[int] = set()
            for node in reversed(tree.nodes):
                row = start + node.id
                if node.id in above or row in self.values:
                    need[node.id] = node.num_tokens if not node.terminal else num_sampled(node)
                elif row in self.first:
                    need[node.id] = num_sampled(node)
                else:
                    continue
                reached[node.id] = True
                if node.parent is not None:
                    above.add(node.parent)
            self.needed[t], self.reached[t] = need, reached

    @property
    def unique_tokens(self) -> int:
        """Different tokens that have to be computed."""
        return int(sum(need.sum() for need in self.needed.values()))

    @property
    def flat_tokens(self) -> int:
        """Tokens of one row for each of the deepest nodes that are needed: what the flat layout holds."""
        total = 0
        for t, need in self.needed.items():
            tree = self.tokens.table.trees[t]
            length = np.zeros(len(need), dtype=np.int64)
            for node in tree.nodes:
                length[node.id] = need[node.id] + (0 if node.parent is None else length[node.parent])
            total += int(length[[node.id for node in deepest(tree, self.reached[t])]].sum())
        return total


def num_sampled(node: Node) -> int:
    """Returns the number of sampled tokens of the edge into a node."""
    return 0 if node.sample is None else len(node.sample.action_ids)


def segment(node: Node) -> np.ndarray:
    """Returns the ids that a node adds to its path, int64 [n]: its action, then what was shown after it (not at a terminal)."""
    action = NOTHING if node.sample is None else node.sample.action_ids
    shown = NOTHING if node.context_ids is None or node.terminal else node.context_ids
    return np.concatenate([action, shown]).astype(np.int64)


def deepest(tree: Tree, reached: np.ndarray) -> list[Node]:
    """Returns the nodes that are reached and below which none is, in depth-first order."""
    found = []
    stack = [tree.root]
    while stack:
        node = stack.pop()
        below = [tree.nodes[c] for c in node.children if reached[c]]
        stack += reversed(below)
        if not below:
            found.append(node)
    return found


def grouped(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Returns indices of rows in groups of similar length, of at most `max_tokens` padded tokens (one row may exceed it)."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[i] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def padded(rows: Sequence[Row]) -> MicroBatch:
    """Returns rows as one micro-batch."""
    length = max(len(r) for r in rows)
    at = np.arange(length)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    positions = np.tile(at, (len(rows), 1))
    ends = None if rows[0].ends is None else np.tile(at + 1, (len(rows), 1))
    for i, row in enumerate(rows):
        ids[i, : len(row)], positions[i, : len(row)] = row.ids, row.positions
        positions[i, len(row) :] = 0
        if ends is not None and row.ends is not None:
            ends[i, : len(row)] = row.ends
    return MicroBatch(
        ids,
        positions,
        ends,
        np.repeat(np.arange(len(rows)), [len(r.before) for r in rows]),
        np.concatenate([r.before for r in rows]),
        np.concatenate([r.token for r in rows]),
        np.repeat(np.arange(len(rows)), [len(r.value_at) for r in rows]),
        np.concatenate([r.value_at for r in rows]),
        np.concatenate([r.value_node for r in rows]),
    )


def read_at(node: Node, row: int, place: int, wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the tokens of an edge stand that is scored, and which tokens they are; empty for any other edge.

    Args:
        node: The edge's node.
        row: Its row in the table.
        place: Index of its first token.
        wanted: What is read.
    """
    if row not in wanted.first:
        return NOTHING, NOTHING
    offset = np.arange(num_sampled(node))
    return place + offset, wanted.first[row] + offset
