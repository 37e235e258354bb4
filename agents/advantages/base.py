"""What an estimator gives: to every edge its advantage, split by sign, and its share of the tree's gradient.

Invariant: the loss meets each sampled token once, whatever the estimator. One that gives every rollout through an edge an
advantage of its own (as if the edge were replicated once a leaf) is folded into two numbers an edge, the mean of the positive
parts and the mean of the negative parts: for a positive advantage PPO's clipped term is A min(ratio, 1 + high), for a
negative one A max(ratio, 1 - low), so the sum over rollouts depends on nothing else (docs/algorithm.md, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from allocation.forest_table import ForestTable
from allocation.tree import Forest, Tree

STD_FLOOR = 0.05
"""Least standard deviation that advantages are divided by."""

ROUNDING = 1e-12
"""A difference smaller than this share of a prompt's largest return is the rounding of a mean, and counts as 0."""


@dataclass(frozen=True, slots=True)
class Credit:
    """What the loss needs to know of a forest's edges; row i belongs to the edge into node i of a `ForestTable`.

    Attributes:
        up: Mean of max(A, 0) over the rollouts that share the edge, float64 [n], >= 0; 0 at roots.
        down: Mean of min(A, 0) over them, float64 [n], <= 0; 0 at roots.
        weight: Share of its tree's gradient that the edge has, float64 [n]; 0 at roots. For most estimators the weights of the
            edges at one depth sum to 1 in a tree whose branches all reach that depth.
        target: What a critic's value of each prefix is drawn to, float64 [n], NaN where there is nothing to learn; `None`
            without a critic.
    """

    up: np.ndarray
    down: np.ndarray
    weight: np.ndarray
    target: np.ndarray | None = None

    @classmethod
    def of(cls, advantage: np.ndarray, weight: np.ndarray, target: np.ndarray | None = None) -> Credit:
        """Returns the credit of an estimator that gives an edge one advantage, float64 [n]."""
        return cls(np.maximum(advantage, 0.0), np.minimum(advantage, 0.0), weight, target)

    @property
    def advantage(self) -> np.ndarray:
        """Mean advantage of each edge, float64 [n]."""
        return self.up + self.down


@dataclass(frozen=True, slots=True)
class CreditConfig:
    """Settings of the estimators.

    Attributes:
        advantage_std: Divide by a standard deviation with a floor (`STD_FLOOR`): of the prompt's outcomes, one for all edges
            of a prompt; of the batch's advantages, less their mean, for `gae`. Estimators whose source defines a
            normalisation of its own use that: each says so.
        advantage_clip: Bound on the absolute advantage of every rollout, or of every edge where an edge has but one; it
            applies after the division and before rollouts are folded onto edges. 0 for none.
        two_phase_beta: What a continuation counts against a root rollout, in `two_phase`.
        gamma: Discount for each turn, in `gae`.
        gae_lambda: Of `gae`: 1 gives returns minus values, 0 one-turn differences.
    """

    advantage_std: bool = False
    advantage_clip: float = 0.0
    two_phase_beta: float = 0.5
    gamma: float = 1.0
    gae_lambda: float = 1.0


Estimator = Callable[[ForestTable, CreditConfig, "np.ndarray | None"], Credit]
"""A table, settings, and a critic's values of the prefixes (float64 [n]; `None` unless it needs them) to credit."""

ESTIMATORS: dict[str, Estimator] = {}
"""Estimators by name; filled by the modules of this package (`register`)."""


def register(name: str) -> Callable[[Estimator], Estimator]:
    """Enters an estimator under a name."""

    def enter(estimator: Estimator) -> Estimator:
        ESTIMATORS[name] = estimator
        return estimator

    return enter


def bounded(advantage: np.ndarray, config: CreditConfig) -> np.ndarray:
    """Returns advantages within `advantage_clip`."""
    return np.clip(advantage, -config.advantage_clip, config.advantage_clip) if config.advantage_clip else advantage


def without_rounding(table: ForestTable, advantage: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns advantages, with 0 where one is nothing but the rounding of a mean of equal outcomes (`ROUNDING`).

    Args:
        table: The forest.
        advantage: Differences of returns, float64 [k].
        rows: The row that each belongs to, int64 [k].
    """
    largest = np.zeros(len(table.trees))
    np.maximum.at(largest, table.tree[table.leaves], np.abs(table.returns[table.leaves]))
    return np.where(np.abs(advantage) > ROUNDING * largest[table.tree[rows]], advantage, 0.0)


def group_std(x: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """Returns the standard deviation within each group, with a floor.

    Args:
        x: Float64 [k].
        group: Number of the group of each, int64 [k].
        count: Number of groups.

    Returns:
        Float64 [count], at least `STD_FLOOR`: that of groups with nothing in them.
    """
    size = np.maximum(np.bincount(group, minlength=count), 1)
    mean = np.bincount(group, weights=x, minlength=count) / size
    square = np.bincount(group, weights=(x - mean[group]) ** 2, minlength=count) / size
    return np.maximum(np.sqrt(square), STD_FLOOR)


def estimate(
    forest: Forest | Sequence[Tree] | ForestTable,
    name: str = "tree",
    config: CreditConfig | None = None,
    *,
    values: np.ndarray | None = None,
) -> Credit:
    """Returns the credit of a forest's edges.

    Args:
        forest: Finished trees, or their table.
        name: One of `ESTIMATORS`.
        config: Settings.
        values: A critic's values of the prefixes, float [n], for `gae`.

    Raises:
        ValueError: The name is unknown, or `gae` was given no values.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}")
    table = forest if isinstance(forest, ForestTable) else ForestTable.of(forest)
    return ESTIMATORS[name](table, config or CreditConfig(), values)
