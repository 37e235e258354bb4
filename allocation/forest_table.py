"""A forest's nodes as flat arrays, so that what is computed along trees is computed for all of them at once.

Invariant: nodes stand in the order of trees, and within a tree in that of their ids, so a parent stands before its children
and `Tree.nodes[i]` of tree t is row `start[t] + i`. A table is a picture of the moment: it is not changed when a tree grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from allocation.tree import Forest, Node, Tree


@dataclass(frozen=True)
class ForestTable:
    """The nodes of a forest, one row each.

    Attributes:
        trees: The trees.
        start: First row of each tree and the number of all rows, int64 [trees + 1].
        tree: Position of the node's tree in `trees`, int64 [n].
        parent: Row of the parent, -1 at roots, int64 [n].
        depth: Turns taken, int64 [n].
        rollout: Number within the tree of the rollout that made the edge into the node, -1 at roots, int64 [n].
        reward: Of the edge into the node, float64 [n].
        terminal: Whether the episode ended there, bool [n].
        success: Whether it ended with success, bool [n].
        tokens: Sampled tokens of the edge into the node, int64 [n].
    """

    trees: tuple[Tree, ...]
    start: np.ndarray
    tree: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    rollout: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    success: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, forest: Forest | Sequence[Tree]) -> ForestTable:
        """Reads a forest, or some trees."""
        trees = tuple(forest)
        sizes = np.array([len(t.nodes) for t in trees], dtype=np.int64)
        start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        nodes = [n for t in trees for n in t.nodes]
        tree = np.repeat(np.arange(len(trees)), sizes)
        parent = np.array([-1 if n.parent is None else n.parent for n in nodes], dtype=np.int64)
        return cls(
            trees,
            start,
            tree,
            np.where(parent < 0, -1, parent + start[tree]),
            np.array([n.depth for n in nodes], dtype=np.int64),
            np.array([n.rollout for n in nodes], dtype=np.int64),
            np.array([n.reward for n in nodes], dtype=np.float64),
            np.array([n.terminal for n in nodes], dtype=bool),
            np.array([bool(n.is_correct) for n in nodes], dtype=bool),
            np.array([0 if n.sample is None else len(n.sample.action_ids) for n in nodes], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.parent)

    def node(self, row: int) -> Node:
        """Returns the node of a row."""
        tree = int(self.tree[row])
        return self.trees[tree].nodes[row - self.start[tree]]

    @property
    def is_root(self) -> np.ndarray:
        """Which rows are roots, bool [n]."""
        return self.parent < 0

    @cached_property
    def levels(self) -> tuple[np.ndarray, ...]:
        """Rows by depth: roots, then the nodes one turn further, and so on; each int64 [k] in rising order."""
        order = np.argsort(self.depth, kind="stable")
        ends = np.cumsum(np.bincount(self.depth))
        return tuple(np.split(order, ends[:-1])) if len(self) else ()

    @cached_property
    def num_children(self) -> np.ndarray:
        """Number of children, int64 [n]."""
        return np.bincount(self.parent[~self.is_root], minlength=len(self))

    @cached_property
    def branch(self) -> np.ndarray:
        """Row of the node that the first edge of the path to each node leads to, its own at roots, int64 [n]."""
        out = np.arange(len(self))
        for rows in self.levels[2:]:
            out[rows] = out[self.parent[rows]]
        return out

    @cached_property
    def phase(self) -> np.ndarray:
        """Which planning decided on the rollout that made the edge (`Tree.phases`), -1 at roots, int64 [n]."""
        out = np.full(len(self), -1, dtype=np.int64)
        for t, tree in enumerate(self.trees):
            rows = slice(self.start[t] + 1, self.start[t + 1])
            out[rows] = np.array(tree.phases, dtype=np.int64)[self.rollout[rows]]
        return out

    @cached_property
    def returns(self) -> np.ndarray:
        """Sum of rewards from the root to each node, float64 [n]."""
        return self.along(self.reward)

    @cached_property
    def leaves(self) -> np.ndarray:
        """Rows of the terminals, int64 [leaves]."""
        return np.flatnonzero(self.terminal)

    @cached_property
    def leaves_below(self) -> np.ndarray:
        """Number of terminals at or below each node, int64 [n]."""
        return self.gathered(self.terminal.astype(np.float64)).astype(np.int64)

    @cached_property
    def weights(self) -> np.ndarray:
        """Each node's share of its tree, 1 at the root and divided evenly among children, float64 [n] (`Tree.weights`)."""
        weight = np.ones(len(self))
        for rows in self.levels[1:]:
            up = self.parent[rows]
            weight[rows] = weight[up] / self.num_children[up]
        return weight

    def values(self, kind: Literal["reward", "success"] = "reward") -> np.ndarray:
        """Returns bottom-up values, float64 [n], NaN where no terminal lies below (`Tree.values`)."""
        return self.mean_up(self.returns if kind == "reward" else self.success.astype(np.float64))

    def mean_up(self, leaf_values: np.ndarray) -> np.ndarray:
        """Returns the value of terminals as given, and of other nodes the mean over their children's.

        Args:
            leaf_values: Float64 [n]; only those of terminals are read.

        Returns:
            Float64 [n]; NaN where no terminal lies below.
        """
        value = np.where(self.terminal, leaf_values, np.nan)
        total, count = np.zeros(len(self)), np.zeros(len(self))
        for rows in reversed(self.levels):
            inner = rows[count[rows] > 0]
            value[inner] = total[inner] / count[inner]
            known = rows[~np.isnan(value[rows]) & ~self.is_root[rows]]
            np.add.at(total, self.parent[known], value[known])
            np.add.at(count, self.parent[known], 1)
        return value

    def along(self, x: np.ndarray) -> np.ndarray:
        """Returns sums over the path from the root to each node, both included, float64 [n]."""
        out = np.array(x, dtype=np.float64)
        for rows in self.levels[1:]:
            out[rows] += out[self.parent[rows]]
        return out

    def gathered(self, x: np.ndarray) -> np.ndarray:
        """Returns sums over the subtree of each node, itself included, float64 [n]."""
        out = np.array(x, dtype=np.float64)
        for rows in reversed(self.levels[1:]):
            np.add.at(out, self.parent[rows], out[rows])
        return out

    def children_sum(self, x: np.ndarray) -> np.ndarray:
        """Returns sums over the children of each node, float64 [n]."""
        edges = np.flatnonzero(~self.is_root)
        return np.bincount(self.parent[edges], weights=np.asarray(x, dtype=np.float64)[edges], minlength=len(self))

    def per_tree(self, x: np.ndarray) -> list[np.ndarray]:
        """Returns an array of rows cut into those of each tree (views)."""
        return [x[a:b] for a, b in zip(self.start[:-1], self.start[1:], strict=True)]
