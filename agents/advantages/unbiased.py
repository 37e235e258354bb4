"""Estimators of this project: `tree` and `two_phase` (docs/algorithm.md, section 4).

Invariant: an edge's baseline depends on nothing that followed the edge.
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


@register("tree")
def tree_credit(table: ForestTable, config: CreditConfig, values: np.ndarray | None = None) -> Credit:
    """The default: A(p -> c) = V^(c) - B with leave-subtree-out baselines.

    For each ancestor u of c, from the root to p, b_u is the mean of V^ over the children of u that are not on the path; it
    knows nothing of what followed c. B mixes the b_u that exist (u has other children) in proportion to the number of those
    children, so the root is always part of the mix and a chain of single children is still given credit. Each edge has the
    weight of its node, `Tree.weights`. Unbiased when whether and how often a prefix is branched does not depend on what
    happened after it; `flip` allocation looks at outcomes, and that biases it (docs/algorithm.md, section 4).

    With `advantage_std` all edges of a prompt are divided by the standard deviation of the values of its first edges.
    """
    value = table.values("reward")
    known = ~np.isnan(value)
    edge = ~table.is_root
    up = np.where(edge, table.parent, 0)
    filled = np.where(known, value, 0.0)
    # Of the parent's other children: sum of values, and number.
    total = np.where(edge, table.children_sum(filled)[up] - filled, 0.0)
    count = np.where(edge, table.children_sum(known)[up] - known, 0.0)
    total, count = table.along(total), table.along(count)
    has = edge & known & (count > 0)
    advantage = np.where(has, filled - total / np.where(has, count, 1.0), 0.0)
    advantage = without_rounding(table, advantage, np.arange(len(table)))
    if config.advantage_std:
        first = np.flatnonzero((table.depth == 1) & known)
        advantage = advantage / group_std(value[first], table.tree[first], len(table.trees))[table.tree]
    return Credit.of(bounded(advantage, config), np.where(edge, table.weights, 0.0))


@register("two_phase")
def two_phase_credit(table: ForestTable, config: CreditConfig, values: np.ndarray | None = None) -> Credit:
    """Each rollout credits only the edges that it made, against rollouts that it had no part in; unbiased under any rule.

    A rollout of return R starts at its anchor H, the parent of its first edge, and was decided on in some phase
    (`Tree.phases`). Its own edges get R minus the mean over the others of its group, which are those of the same anchor and
    phase, and over the outcomes of all rollouts of earlier phases that passed through H. With m rollouts in phase 0, those
    weigh 1/m each and all later ones `two_phase_beta`/m. In phase 0 there are root rollouts only, so they have a leave-one-out
    baseline, as in RLOO (Ahmadian et al., 2024), and give the gradient of J; a later rollout gives that of V(H). As m is known
    before anything is sampled, the estimate has the expectation

        grad J + (beta / m) * (sum over the later rollouts of grad V(their anchors))

    wave by wave, under every rule that decides from finished phases, with anchors taken as given; beta = 0 leaves grad J. Only
    `prompt` and `trajectory` aggregation keep these weights. A rollout without anything to compare with gets 0, and so does
    one that reached no terminal.

    With `advantage_std` all edges of a prompt are divided by the standard deviation of its outcomes in phase 0.
    """
    returns, trees = table.returns, len(table.trees)
    edges = np.flatnonzero(~table.is_root)
    # Rollouts are numbered over the whole table, in the order of trees and of their numbers within the tree.
    number = table.tree[edges] * (table.rollout.max(initial=0) + 1) + table.rollout[edges]
    rollouts, of_edge = np.unique(number, return_inverse=True)
    is_first = table.rollout[table.parent[edges]] != table.rollout[edges]
    first = np.zeros(len(rollouts), dtype=np.int64)
    first[of_edge[is_first]] = edges[is_first]
    anchor, phase, tree = table.parent[first], table.phase[first], table.tree[first]
    outcome = np.full(len(first), np.nan)
    ends = table.terminal[edges]
    outcome[of_edge[ends]] = returns[edges[ends]]
    known = ~np.isnan(outcome)
    filled = np.where(known, outcome, 0.0)
    _, group = np.unique(anchor * (phase.max(initial=0) + 1) + phase, return_inverse=True)
    total = np.bincount(group, weights=filled)[group] - filled
    count = np.bincount(group, weights=known)[group] - known
    for p in np.unique(phase[phase > 0]):
        earlier = table.terminal & (table.phase < p)
        now = phase == p
        total[now] += table.gathered(np.where(earlier, returns, 0.0))[anchor[now]]
        count[now] += table.gathered(earlier)[anchor[now]]
    has = known & (count > 0)
    advantage = np.where(has, filled - total / np.where(has, count, 1.0), 0.0)
    advantage = without_rounding(table, advantage, first)
    if config.advantage_std:
        base = known & (phase == 0)
        advantage = advantage / group_std(outcome[base], tree[base], trees)[tree]
    share = np.where(phase == 0, 1.0, config.two_phase_beta)
    share = share / np.maximum(np.bincount(tree[phase == 0], minlength=trees), 1)[tree]
    weight, own = np.zeros(len(table)), np.zeros(len(table))
    weight[edges] = share[of_edge]
    # Where the weight is 0 there is nothing to train.
    own[edges] = np.where(share > 0, bounded(advantage, config), 0.0)[of_edge]
    return Credit.of(own, weight)
