"""From the figures of single forests to means with intervals.

Invariant: a seed is the unit. Forests of one seed share a predictor, so intervals come from resampling seeds, never forests,
and two methods are compared on the same resampled seeds.

Intervals hold for the prompts and rollouts that were recorded; what another recording would have shown is seen by comparing
worlds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from allocation.arena.dense import MID, DenseForest
from allocation.arena.measures import signal_to_noise

Means = Mapping[str, np.ndarray]
"""By name of a figure, its mean over the forests of some seeds; float [...]."""

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def above(self, other: Interval) -> bool:
        """Returns whether it lies above another one without overlap."""
        return self.low > other.high


def _snr(m: Means, n: int) -> np.ndarray:
    return signal_to_noise(m["along"], m["along2"], m["norm2"], n)


def _mean(name: str) -> Callable[[Means, int], np.ndarray]:
    return lambda m, n: m[name]


METRICS: dict[str, Callable[[Means, int], np.ndarray]] = {
    "rollouts": _mean("rollouts"),
    "tokens": _mean("tokens"),
    "ratio_roots": _mean("ratio_roots"),
    "ratio_tree": _mean("ratio_tree"),
    "expected_ratio": _mean("expected_ratio"),
    "pairs_per_1k": lambda m, n: 1000 * m["pairs"] / m["tokens"],
    "root_regret": _mean("root_regret"),
    "prefix_regret": _mean("prefix_regret"),
    "cosine": _mean("cosine"),
    "snr": _snr,
    "snr_per_1k": lambda m, n: 1000 * _snr(m, n) / m["tokens"],
    "auc_roots": _mean("auc_roots"),
    "auc_prefixes": _mean("auc_prefixes"),
    "repeats": _mean("repeats"),
    "unspent": _mean("unspent"),
    "stopped": _mean("stopped"),
    "filtered": _mean("filtered"),
    "fallbacks": _mean("fallbacks"),
}
"""Figures of the table: each from the means of what was measured on single forests, and the number of forests behind them."""


class Sample:
    """What was measured on the forests of several seeds.

    Args:
        figures: By name, float [seeds, forests]; NaN where there is nothing to measure.
        seed: Of the resampling. Samples with as many seeds and the same `seed` are resampled alike, which pairs them.
    """

    def __init__(self, figures: Mapping[str, np.ndarray], seed: int = 0):
        self.seeds, self.forests = next(iter(figures.values())).shape
        rng = np.random.default_rng([seed, self.seeds])
        chosen = rng.integers(self.seeds, size=(RESAMPLES, self.seeds))
        each = {name: _nanmean(x, 1) for name, x in figures.items()}
        self._means = {name: _nanmean(x, 0) for name, x in each.items()}
        self._resampled = {name: _nanmean(x[chosen], 1) for name, x in each.items()}

    def interval(self, metric: str) -> Interval:
        """Returns a figure of `METRICS` with its interval."""
        return _interval(self._value(metric), self._spread(metric))

    def minus(self, other: Sample, metric: str) -> Interval:
        """Returns the paired difference of a figure to that of another sample with the same seeds."""
        if self.seeds != other.seeds:
            raise ValueError(f"paired samples need the same seeds, got {self.seeds} and {other.seeds}")
        return _interval(self._value(metric) - other._value(metric), self._spread(metric) - other._spread(metric))

    def over(self, other: Sample, metric: str) -> Interval:
        """Returns the paired ratio of a figure to that of another sample with the same seeds."""
        if self.seeds != other.seeds:
            raise ValueError(f"paired samples need the same seeds, got {self.seeds} and {other.seeds}")
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.float64(self._value(metric)) / other._value(metric)
            return _interval(float(ratio), self._spread(metric) / other._spread(metric))

    def _value(self, metric: str) -> float:
        return float(METRICS[metric](self._means, self.seeds * self.forests))

    def _spread(self, metric: str) -> np.ndarray:
        return METRICS[metric](self._resampled, self.seeds * self.forests)


def _nanmean(x: np.ndarray, axis: int) -> np.ndarray:
    known = ~np.isnan(x)
    count = known.sum(axis=axis)
    total = np.where(known, x, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _interval(mean: float, spread: np.ndarray) -> Interval:
    spread = spread[~np.isnan(spread)]
    if not spread.size:
        return Interval(mean, float("nan"), float("nan"))
    low, high = np.quantile(spread, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def gate_interval(dense: DenseForest, seed: int = 0) -> Interval:
    """Returns the gate of a record (`DenseForest.gate`, while the root is not mid), its interval from resampling prompts.

    Spines of one prompt have much in common, so an interval that takes them for independent would be too narrow.
    """
    value, root = dense.prefix_values().value, dense.root_values().value
    mid = (value >= MID[0]) & (value <= MID[1]) & ~dense.terminal & ~dense.continuation
    holds = np.zeros((dense.num_prompts, int(dense.rollout.max(initial=0)) + 1), dtype=bool)
    holds[dense.prompt[mid], dense.rollout[mid]] = True
    holds[(root >= MID[0]) & (root <= MID[1])] = False
    failed = np.flatnonzero(dense.terminal & ~dense.continuation & ~dense.is_correct)
    of, reached = dense.prompt[failed], holds[dense.prompt[failed], dense.rollout[failed]]
    total = np.bincount(of, minlength=dense.num_prompts).astype(float)
    found = np.bincount(of, reached, dense.num_prompts)
    chosen = np.random.default_rng(seed).integers(dense.num_prompts, size=(RESAMPLES, dense.num_prompts))
    with np.errstate(invalid="ignore"):
        return _interval(float(found.sum() / total.sum()), found[chosen].sum(axis=1) / total[chosen].sum(axis=1))


def equal_token_budget(
    tokens_of: Callable[[int], float], budget: int, target: float, *, tolerance: float = 0.02, steps: int = 3
) -> int:
    """Returns the budget in rollouts whose expected number of generated tokens is nearest to a target, of those tried.

    Tokens grow nearly in proportion to rollouts, so each step scales the last budget; a few steps settle it.

    Args:
        tokens_of: Mean tokens of a forest with a budget.
        budget: Where to start.
        target: Tokens to reach.
        tolerance: Relative distance to the target that is near enough.
        steps: Most budgets to try.
    """
    tried: dict[int, float] = {}
    for _ in range(steps):
        if budget in tried:
            break
        tried[budget] = tokens_of(budget)
        if abs(tried[budget] / target - 1) <= tolerance:
            break
        budget = max(1, round(budget * target / max(tried[budget], 1.0)))
    return min(tried, key=lambda b: abs(tried[b] - target))
