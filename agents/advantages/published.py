"""Estimators as published: `grpo`, `tree_grpo`, `treepo`, `treerl`, `spo`.

Invariant: each is what its source computes, folded onto edges; each docstring says what the source does, what is different
here, and whether it is unbiased.

Where a source trains on whole rollouts, an edge that several of them share is there once for each, and its gradient is the
sum of theirs: `replicated` gives that sum from one edge. None of these estimators is unbiased on a tree: their baselines
contain the outcome that they are held against, which shrinks an edge that L of N rollouts share by (N - L)/(N - 1) against
an edge of one, and rollouts that share a prefix are counted as if they were independent. In all of them an edge without a
terminal below it gets 0.
"""

from __future__ import annotations

import numpy as np

from agents.advantages.base import (
    Credit,
    CreditConfig,
    bounded,
    group_std,
    register,
    without_rounding,
)
from allocation.forest_table import ForestTable


@register("grpo")
def grpo_credit(table: ForestTable, config: CreditConfig, values: np.ndarray | None = None) -> Credit:
    """Flat groups (GRPO, arXiv 2402.03300): every token of a rollout has its return minus the mean of its prompt's.

    The source samples whole rollouts of a prompt and divides by the group's standard deviation; `advantage_std` does so too,
    with a floor. On a tree each terminal counts as a rollout of its own, so a shared edge has the mean of its rollouts'
    advantages and their number as its weight. Without branches it is GRPO; its expectation is then (m - 1)/m of the gradient
    for m rollouts, since a return is part of its own mean, so it is unbiased up to the length of the step. With branches
    each edge is shrunk by a factor of its own.
    """
    return replicated(table, relative(table, table.tree[table.leaves], config), config)


@register("tree_grpo")
def tree_grpo_credit(table: ForestTable, config: CreditConfig, values: np.ndarray | None = None) -> Credit:
    """Tree-GRPO (arXiv 2509.21240): group-relative within a tree plus group-relative over all trees of a prompt.

    The source grows several trees for a prompt and gives every token of a rollout the sum of two GRPO advantages: that in the
    group of its own tree, and that in the group of all rollouts of the prompt, each divided by its group's standard
    deviation (here with `advantage_std`, and a floor). What it calls a tree is here the part of a prompt's tree below one first
    edge; the source may also branch at the prompt, which here makes one more such part. A part with one rollout has no
    advantage within itself.

    Biased: the first term sums to 0 over a first edge, so it says nothing of first edges while it doubles later ones, and
    both terms contain the outcome itself. Without branches it is `grpo`.
    """
    intra = relative(table, table.branch[table.leaves], config)
    inter = relative(table, table.tree[table.leaves], config)
    return replicated(table, intra + inter, config)


@register("treepo")
def treepo_credit(table: ForestTable, config: CreditConfig, values: np.ndarray | None = None) -> Credit:
    """TreePO (arXiv 2508.17445): the mean, over a rollout's ancestors, of its return minus the mean below that ancestor.

    Every prefix of a rollout, from the prompt on, defines a subgroup: the rollouts that share it. Every token of the rollout
    gets the plain mean over these subgroups of its return minus the subgroup's mean; subgroups of the rollout alone are
    left out. The released code can also weigh subgroups by their size; the plain mean, which the paper settles on, is what is
    computed here. A depth is a segment of fixed length there and a turn here. As in the source a prefix counts once for
    each depth, whether or not anything branched there. The source then whitens all tokens of the batch, as REINFORCE++ does:
    with `advantage_std` the batch's rollouts are divided here by their standard deviation, with a floor, but not centred again,
    because that would give prompts without any contrast an advantage; trees of `loss_weight` 0 do not count in it.

    Biased: a rollout's own outcome is in the mean of every subgroup, and the smaller, deeper ones shrink it more. Without
    branches it is `grpo`.
    """
    returns, leaf = table.returns, table.leaves
    size = table.leaves_below
    shared = size > 1
    mean = table.gathered(np.where(table.terminal, returns, 0.0)) / np.maximum(size, 1)
    up = table.parent[leaf]
    total, count = table.along(np.where(shared, mean, 0.0))[up], table.along(shared)[up]
    has = count > 0
    score = np.where(has, returns[leaf] - total / np.where(has, count, 1.0), 0.0)
    score = without_rounding(table, score, leaf)
    if config.advantage_std:
        alive = np.array([t.loss_weight > 0 for t in table.trees], dtype=bool)[table.tree[leaf]]
        score = score / group_std(score[alive], np.zeros(int(alive.sum()), dtype=np.int64), 1)
    return replicated(table, score, config)


@register("treerl")
def treerl_credit(table: ForestTable, config: CreditConfig, values: np.ndarray | None = None) -> Credit:
    """TreeRL (arXiv 2506.11902): ((V(n) - V(root)) + (V(n) - V(parent))) / sqrt(L(n)), V the mean over the L(n) rollouts below.

    The source adds a global and a local advantage of each step and divides by the root of the number of rollouts that the
    step is part of, because each of them is trained on and repeats it. Here the edge is there once, with that number as its
    weight, so that it counts sqrt(L(n)) times the sum. The released code first takes from each outcome the mean of all others,
    which multiplies everything by N/(N - 1), and trains on a choice of the rollouts; neither is done here. With `advantage_std`
    an edge is divided by the standard deviation of the prompt's outcomes.

    Biased: all three values contain what followed the edge, the local term is 0 wherever nothing branched, and the root of
    the number is a choice. Without branches it is `grpo`, with twice the advantage on first edges.
    """
    returns, edge = table.returns, ~table.is_root
    size = np.maximum(table.leaves_below, 1)
    value = table.gathered(np.where(table.terminal, returns, 0.0)) / size
    root, up = table.start[:-1][table.tree], np.where(edge, table.parent, 0)
    known = edge & (table.leaves_below > 0)
    advantage = np.where(known, 2.0 * value - value[root] - value[up], 0.0)
    advantage = without_rounding(table, advantage, np.arange(len(table))) / np.sqrt(size)
    if config.advantage_std:
        leaf = table.leaves
        advantage = advantage / group_std(returns[leaf], table.tree[leaf], len(table.trees))[table.tree]
    return Credit.of(bounded(advantage, config), rollout_share(table))


@register("spo")
def spo_credit(table: ForestTable, config: CreditConfig, values: np.ndarray | None = None) -> Credit:
    """SPO-tree (arXiv 2505.23564): A(p -> c) = V(c) - V(p), V the mean over the children.

    The source grows a tree with the same number of children at every node of a level, and trains on each segment once with
    its advantage among its siblings, optionally divided by their standard deviation (here with `advantage_std`, and a floor).
    Here a segment is a turn. The source only trains tokens whose probability is low and keeps segments for later updates;
    neither is done here. Edges weigh what their nodes do (`Tree.weights`), so that all depths count alike; with `edge` or
    `token` aggregation each segment or token counts the same, as in the source.

    Biased: V(p) contains V(c), which shrinks the advantage among k siblings by (k - 1)/k, and an edge without siblings gets 0,
    so that of a chain only the turn at its branch point learns. Where all nodes have k > 1 children it is (k - 1)/k of the
    gradient, since baselines of siblings alone are enough there.
    """
    value = table.values("reward")
    known = ~np.isnan(value) & ~table.is_root
    up = np.where(table.is_root, 0, table.parent)
    advantage = np.where(known, value - value[up], 0.0)
    advantage = without_rounding(table, advantage, np.arange(len(table)))
    if config.advantage_std:
        advantage = advantage / group_std(value[known], up[known], len(table))[up]
    return Credit.of(bounded(advantage, config), np.where(table.is_root, 0.0, table.weights))


def relative(table: ForestTable, group: np.ndarray, config: CreditConfig) -> np.ndarray:
    """Returns each rollout's return minus the mean of its group's, over their standard deviation if that is asked for.

    Args:
        table: The forest.
        group: Row that names the group of each rollout, int64 [leaves], in the order of `table.leaves`.
        config: Settings.

    Returns:
        Float64 [leaves].
    """
    returns = table.returns[table.leaves]
    size = np.maximum(np.bincount(group, minlength=len(table)), 1)
    mean = np.bincount(group, weights=returns, minlength=len(table)) / size
    score = without_rounding(table, returns - mean[group], table.leaves)
    return score / group_std(returns, group, len(table))[group] if config.advantage_std else score


def replicated(table: ForestTable, score: np.ndarray, config: CreditConfig) -> Credit:
    """Folds advantages of whole rollouts onto edges: as if each edge were there once for every rollout below it.

    Args:
        table: The forest.
        score: Advantage of each rollout, float64 [leaves], in the order of `table.leaves`.
        config: Bounds them (`advantage_clip`).
    """
    score = bounded(score, config)
    total = np.zeros((2, len(table)))
    total[0, table.leaves], total[1, table.leaves] = np.maximum(score, 0.0), np.minimum(score, 0.0)
    below = np.maximum(table.leaves_below, 1)
    up, down = (np.where(table.is_root, 0.0, table.gathered(x) / below) for x in total)
    return Credit(up, down, rollout_share(table))


def rollout_share(table: ForestTable) -> np.ndarray:
    """Returns the share of its tree's rollouts that pass through each edge, float64 [n]; 0 at roots."""
    leaves = np.maximum(np.bincount(table.tree[table.leaves], minlength=len(table.trees)), 1)
    return np.where(table.is_root, 0.0, table.leaves_below / leaves[table.tree])
