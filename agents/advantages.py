"""From a forest to the weight and advantage of every edge.

Invariant: every edge is given one advantage and one weight, so that the loss meets each sampled token once; advantages are
computed tree by tree from the outcomes alone, never from predictions.

Conventions (docs/algorithm.md, section 4): the edge p -> c is stored at node c; V^ are bottom-up values (leaf: its return,
inner node: mean of its children); w(root) = 1 and w(child) = w(parent) / #children.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from allocation import Tree

STD_FLOOR = 0.05


@dataclass(frozen=True, slots=True)
class EdgeCredit:
    """What the loss needs to know of a tree's edges.

    Attributes:
        advantage: Advantage of the edge into each node, float64 [nodes]; 0 at the root.
        weight: Share of the tree's gradient that the edge has, float64 [nodes]; 0 at the root. The weights of the edges at
            one depth sum to 1 in a tree whose branches all reach that depth.
    """

    advantage: np.ndarray
    weight: np.ndarray


def tree_credit(tree: Tree, *, std: bool = False) -> EdgeCredit:
    """The default estimator, `tree`: A(p -> c) = V^(c) - B with leave-subtree-out baselines.

    For each ancestor u of c, from the root to p, b_u is the mean of V^ over the children of u that are not on the path; it
    knows nothing of what followed c. B mixes the b_u that exist (u has other children) in proportion to the number of those
    children, so the root is always part of the mix and a chain of single children is still given credit. Unbiased when
    whether and how often a prefix is branched does not depend on what happened after it; `flip` allocation looks at
    outcomes, and that biases it (docs/algorithm.md, section 4).

    Args:
        tree: A finished tree.
        std: Divide by the standard deviation of the prompt's root values, with a floor (one scale for all edges of a prompt).
    """
    value = tree.values("reward")
    n = len(tree.nodes)
    advantage = np.zeros(n)
    # Sums over the path so far of (number of other children) * b_u, and of the numbers.
    total, count = np.zeros(n), np.zeros(n)
    for node in tree.nodes[1:]:
        parent = tree.nodes[node.parent]  # type: ignore[index]
        others = [value[c] for c in parent.children if c != node.id and not np.isnan(value[c])]
        total[node.id] = total[parent.id] + sum(others)
        count[node.id] = count[parent.id] + len(others)
        if count[node.id] > 0 and not np.isnan(value[node.id]):
            advantage[node.id] = value[node.id] - total[node.id] / count[node.id]
    if std:
        advantage /= max(_root_std(tree, value), STD_FLOOR)
    weight = tree.weights()
    weight[0] = 0.0
    return EdgeCredit(advantage, weight)


def grpo_credit(tree: Tree, *, std: bool = True) -> EdgeCredit:
    """Flat groups, `grpo` (Shao et al., 2024): every token of a rollout has its return minus the mean of the group's.

    On a tree each leaf counts as a rollout of its own, so a shared edge has the mean of its leaves' advantages and their
    number as its weight. Without branches it is GRPO; with `std` the group is divided by its standard deviation.
    """
    returns = tree.returns()
    leaves = tree.leaves()
    group = np.array([returns[n.id] for n in leaves])
    scale = max(float(group.std()), STD_FLOOR) if std else 1.0
    n = len(tree.nodes)
    total, count = np.zeros(n), np.zeros(n)
    for leaf in leaves:
        score = (returns[leaf.id] - group.mean()) / scale if len(group) > 1 else 0.0
        for node in tree.path(leaf)[1:]:
            total[node.id] += score
            count[node.id] += 1
    below = np.maximum(count, 1)
    return EdgeCredit(total / below, count / max(len(leaves), 1))


def _root_std(tree: Tree, value: np.ndarray) -> float:
    children = [value[c] for c in tree.root.children if not np.isnan(value[c])]
    return float(np.std(children)) if children else 0.0


ESTIMATORS: dict[str, Callable[..., EdgeCredit]] = {"tree": tree_credit, "grpo": grpo_credit}
"""Estimators by name."""


def get_estimator(name: str) -> Callable[..., EdgeCredit]:
    """Returns an estimator by name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]
