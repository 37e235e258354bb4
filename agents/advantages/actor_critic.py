"""Estimator `gae`: generalized advantage estimation along the paths of a tree, each edge once (PPO with a critic).

Invariant: an edge's advantage is the mean, by tree weights, of what textbook GAE gives it on each root-to-leaf path through it;
without branches it is textbook GAE.
"""

from __future__ import annotations

import numpy as np

from agents.advantages.base import STD_FLOOR, Credit, CreditConfig, register
from allocation.forest_table import ForestTable


def valued_prefixes(table: ForestTable) -> np.ndarray:
    """Returns the rows whose values `gae` reads and gives targets for: prefixes with an ended episode below, int64 [v]."""
    return np.flatnonzero(~table.terminal & (table.leaves_below > 0))


@register("gae")
def gae_credit(table: ForestTable, config: CreditConfig, values: np.ndarray | None = None) -> Credit:
    """PPO's advantages (Schulman et al., 2016, equation 16; Schulman et al., 2017, equation 11), turns being the steps.

    For the edge p -> c: delta = r(c) + gamma V(c) - V(p), and A = delta + gamma lambda (mean of A over the children of c).
    Rewards count wherever they are given. An episode that ended has no value left, whether it was terminated or truncated:
    the turn limit is part of the task and an outcome reward judges what was done by then. A branch without an end is left
    out of every mean and has no advantage, as in the other estimators. Values are drawn to the lambda-returns,
    V(p) + mean of A over the children of p.

    With lambda = 1, V is a baseline that knows nothing of the action: the estimate is unbiased whatever the critic, as long as
    it did not see the batch, and allocation is exogenous. It is the gradient of the discounted return, up to PPO's customary
    omission of gamma^depth. With lambda < 1 it is biased unless V is exact, under `flip` and other allocation by outcomes it
    is biased as `tree` is, and `advantage_std` scales it by figures of the same batch.

    `advantage_std` takes the batch's mean off and divides by the batch's standard deviation, with a floor, as implementations
    of PPO do (Huang et al., 2022, detail 7), here over the whole batch and not over each minibatch: edges count their share
    of their tree, trees their weight in the loss. `advantage_clip` bounds what comes of it. Targets are from before both.

    Args:
        table: The forest.
        config: Settings.
        values: The critic's values, float [n]; read at `valued_prefixes`.

    Raises:
        ValueError: There are no values, or not one for each row, or one that is read is not finite.
    """
    if values is None:
        raise ValueError("estimator 'gae' needs a critic's values of the prefixes: pass values=, float [nodes]")
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(table),):
        raise ValueError(f"values must be one a node, shape ({len(table)},), got {values.shape}")
    prefixes = valued_prefixes(table)
    bad = prefixes[~np.isfinite(values[prefixes])]
    if len(bad):
        where = f"node {table.node(bad[0]).id} of tree {table.trees[table.tree[bad[0]]].key!r}"
        raise ValueError(f"values must be finite at all prefixes, got {values[bad[0]]} for {where}")
    value = np.zeros(len(table))
    value[prefixes] = values[prefixes]

    edge = ~table.is_root & (table.leaves_below > 0)
    parent = np.where(edge, table.parent, 0)
    advantage = np.where(edge, table.reward + config.gamma * value - value[parent], 0.0)
    siblings = np.maximum(table.children_sum(edge), 1.0)
    below = np.zeros(len(table))
    for rows in reversed(table.levels):
        advantage[rows] += np.where(edge[rows], config.gamma * config.gae_lambda * below[rows], 0.0)
        rows = rows[edge[rows]]
        np.add.at(below, table.parent[rows], advantage[rows] / siblings[table.parent[rows]])
    target = np.full(len(table), np.nan)
    target[prefixes] = value[prefixes] + below[prefixes]

    if config.advantage_std:
        share = np.array([t.loss_weight for t in table.trees], dtype=np.float64)
        advantage = np.where(
            edge, _standardised(advantage, np.where(edge, share[table.tree] * table.weights, 0.0)), 0.0
        )
    if config.advantage_clip:
        advantage = np.clip(advantage, -config.advantage_clip, config.advantage_clip)
    return Credit.of(advantage, np.where(table.is_root, 0.0, table.weights), target)


def _standardised(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns x less its mean, over its standard deviation with a floor, both by weights; float64 [n]."""
    total = weights.sum()
    if not total > 0:
        return x
    centred = x - weights @ x / total
    return centred / max(float(np.sqrt(weights @ centred**2 / total)), STD_FLOOR)
