"""What is believed about each prompt's success probability.

Invariant: a belief is a predictor's mean V worth kappa observations, plus the outcomes seen, each worth `decay` to the
power of its age in policy updates; both Beta parameters are finite and positive whatever was seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from allocation.contrast import FloatArray
from allocation.roots import IntArray

KAPPA_BOUNDS = (0.5, 100.0)
"""Least and greatest concentration that :func:`fit_kappa` returns, in observations."""

_SCHEMA = 1
_PRUNE_EVERY = 50
_NEGLIGIBLE = 1e-6


class BetaBeliefs:
    """Decayed success and failure counts by key, and the Beta beliefs that they make with a prediction.

    Source: docs/algorithm.md section 3.

    Args:
        decay: Factor in (0, 1] on every count at each policy update; 0.9 forgets half in about 6.6 updates.
        epsilon: Predictions are clipped to [epsilon, 1 - epsilon], in (0, 0.5), so that no belief is certain.
    """

    def __init__(self, decay: float = 0.9, epsilon: float = 1e-3) -> None:
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must lie in (0, 1], got {decay}")
        if not 0.0 < epsilon < 0.5:
            raise ValueError(f"epsilon must lie in (0, 0.5), got {epsilon}")
        self.retention = decay
        self.epsilon = epsilon
        self._clock = 0
        # Counts as of the policy update in the third place: decaying a million keys is then one addition to the clock.
        self._counts: dict[str, tuple[float, float, int]] = {}

    def __len__(self) -> int:
        """Number of keys that are remembered."""
        return len(self._counts)

    @property
    def clock(self) -> int:
        """Policy updates so far, that is calls of :meth:`decay`."""
        return self._clock

    def update(self, key: str, successes: float, failures: float) -> None:
        """Add outcomes of the current policy.

        Args:
            key: The prompt.
            successes: Sum of outcomes, >= 0; fractional for graded rewards.
            failures: Number of rollouts minus `successes`, >= 0.

        Raises:
            ValueError: If a count is negative or not finite; the key is named and nothing is changed.
        """
        if not (math.isfinite(successes) and math.isfinite(failures) and successes >= 0 and failures >= 0):
            raise ValueError(
                f"counts of {key!r} must be finite and >= 0, got successes={successes}, failures={failures}"
            )
        s, f = self.counts(key)
        self._counts[key] = (s + float(successes), f + float(failures), self._clock)

    def decay(self) -> None:
        """Age every count by one policy update, in amortised O(1) for each key.

        Every 50 updates the keys whose counts have faded below 1e-6 are forgotten: a stream of new prompts would fill the
        memory otherwise. They then count as never sampled.
        """
        self._clock += 1
        if self._clock % _PRUNE_EVERY == 0:
            self._counts = {k: e for k, e in self._counts.items() if max(self.counts(k)) >= _NEGLIGIBLE}

    def counts(self, key: str) -> tuple[float, float]:
        """Decayed (successes, failures) of one key; zeros if it was never seen."""
        s, f, stamp = self._counts.get(key, (0.0, 0.0, self._clock))
        factor = self.retention ** (self._clock - stamp)
        return s * factor, f * factor

    def belief(
        self, keys: Sequence[str], v: npt.ArrayLike, kappa: float | npt.ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        """Beta parameters kappa * V + successes and kappa * (1 - V) + failures.

        Args:
            keys: n prompts.
            v: float[n], predicted success probabilities in [0, 1], clipped to [epsilon, 1 - epsilon].
            kappa: Weight of the prediction in observations, > 0; one number or float[n].

        Returns:
            alpha float[n] and beta float[n], all > 0.

        Raises:
            ValueError: If a prediction is NaN or out of range (key and value are named), kappa is not positive, or
                lengths differ.
        """
        n = len(keys)
        mean = _check_predictions(v, keys)
        weight = np.asarray(kappa, dtype=np.float64)
        if weight.shape not in ((), (n,)) or not (np.isfinite(weight) & (weight > 0)).all():
            raise ValueError(f"kappa must be finite and > 0, one number or one for each of {n} keys, got {kappa!r}")
        mean = np.clip(mean, self.epsilon, 1.0 - self.epsilon)
        seen = np.array([self.counts(key) for key in keys], dtype=np.float64).reshape(n, 2)
        return weight * mean + seen[:, 0], weight * (1.0 - mean) + seen[:, 1]

    def last_sampled(self, keys: Sequence[str]) -> IntArray:
        """Policy update at which each key was last updated, int[n]; -1 if never or long forgotten."""
        return np.array([self._counts[k][2] if k in self._counts else -1 for k in keys], dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain data: schema, decay, epsilon, clock and [successes, failures, stamp] by key."""
        return {
            "schema": _SCHEMA,
            "decay": self.retention,
            "epsilon": self.epsilon,
            "clock": self._clock,
            "counts": {key: list(entry) for key, entry in self._counts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what :meth:`state_dict` returned.

        Raises:
            ValueError: If the schema is unknown or an entry is missing or malformed; nothing is changed then.
        """
        if state.get("schema") != _SCHEMA:
            raise ValueError(
                f"beliefs have schema {state.get('schema')!r}, this version reads {_SCHEMA}: start with fresh beliefs"
            )
        try:
            fresh = BetaBeliefs(float(state["decay"]), float(state["epsilon"]))
            fresh._clock = int(state["clock"])
            entries = dict(state["counts"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"beliefs are incomplete: {error!r}; start with fresh beliefs") from error
        for key, entry in entries.items():
            try:
                s, f, stamp = float(entry[0]), float(entry[1]), int(entry[2])
            except (IndexError, TypeError, ValueError) as error:
                raise ValueError(f"counts of {key!r} must be [successes, failures, stamp], got {entry!r}") from error
            if not (math.isfinite(s) and math.isfinite(f) and s >= 0 and f >= 0 and 0 <= stamp <= fresh._clock):
                raise ValueError(f"counts of {key!r} are out of range: {entry!r} at clock {fresh._clock}")
            fresh._counts[str(key)] = (s, f, stamp)
        self.retention, self.epsilon = fresh.retention, fresh.epsilon
        self._clock, self._counts = fresh._clock, fresh._counts


def fit_kappa(
    v: npt.ArrayLike,
    successes: npt.ArrayLike,
    failures: npt.ArrayLike,
    *,
    relative: npt.ArrayLike | None = None,
    epsilon: float = 1e-3,
) -> float:
    """Concentration kappa that makes the counts most likely under a beta-binomial with mean V.

    Large where the predictions hold, small where outcomes scatter around them more than chance would. Keys with fewer
    than two outcomes carry no information on it; without any information the lower bound is returned: trust counts, not
    predictions.

    Source: docs/algorithm.md section 3. A grid over log kappa finds the basin, golden section refines it, within
    :data:`KAPPA_BOUNDS`.

    Args:
        v: float[n], predicted success probabilities in [0, 1], clipped to [epsilon, 1 - epsilon].
        successes: float[n], >= 0.
        failures: float[n], >= 0.
        relative: float[n] > 0, the concentration of each prediction in units of the one that is fitted; `None` for all alike.
        epsilon: As in :class:`BetaBeliefs`.

    Returns:
        kappa within :data:`KAPPA_BOUNDS`, to about 0.1 %.

    Raises:
        ValueError: If the lengths differ or an entry is out of range.
    """
    mean = np.clip(_check_predictions(v, None), epsilon, 1.0 - epsilon)
    s, f = np.asarray(successes, dtype=np.float64), np.asarray(failures, dtype=np.float64)
    if s.shape != mean.shape or f.shape != mean.shape:
        raise ValueError(f"v, successes and failures differ in shape: {mean.shape}, {s.shape}, {f.shape}")
    if not (np.isfinite(s) & np.isfinite(f) & (s >= 0) & (f >= 0)).all():
        raise ValueError("successes and failures must be finite and >= 0")
    share = np.ones_like(mean) if relative is None else np.asarray(relative, dtype=np.float64)
    if share.shape != mean.shape or not (np.isfinite(share) & (share > 0)).all():
        raise ValueError("relative must be finite and > 0, one number for each prediction")
    # One outcome has likelihood V or 1-V whatever kappa is; decayed remnants below one must not pretend otherwise.
    informative = s + f > 1.0
    mean, s, f, share = mean[informative], s[informative], f[informative], share[informative]
    if not mean.size:
        return KAPPA_BOUNDS[0]

    def likelihood(log_kappa: float) -> float:
        kappa = math.exp(log_kappa) * share
        a, b = kappa * mean, kappa * (1.0 - mean)
        terms = log_gamma(a + s) - log_gamma(a) + log_gamma(b + f) - log_gamma(b)
        return float(np.sum(terms + log_gamma(kappa) - log_gamma(kappa + s + f)))

    grid = np.linspace(math.log(KAPPA_BOUNDS[0]), math.log(KAPPA_BOUNDS[1]), 33)
    best = int(np.argmax([likelihood(x) for x in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, grid.size - 1)])
    shrink = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - shrink * (high - low), low + shrink * (high - low)
    at_left, at_right = likelihood(left), likelihood(right)
    while high - low > 1e-3:
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - shrink * (high - low)
            at_left = likelihood(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + shrink * (high - low)
            at_right = likelihood(right)
    # The bounds themselves are candidates: golden section only comes near them.
    candidates = [float(grid[best]), (low + high) / 2.0]
    return min(max(math.exp(max(candidates, key=likelihood)), KAPPA_BOUNDS[0]), KAPPA_BOUNDS[1])


def fit_rho(v: npt.ArrayLike, successes: npt.ArrayLike, failures: npt.ArrayLike) -> float | None:
    """Correlation rho = 1 / (1 + kappa) of two outcomes of one prompt around its prediction, by :func:`fit_kappa`.

    Source: docs/algorithm.md section 1, `beta_binomial(rho)`.

    Args:
        v: float[n], predicted success probabilities in [0, 1].
        successes: float[n], successes of each prompt's group.
        failures: float[n], failures of it.

    Returns:
        rho, between 1 / 101 and 2 / 3 (:data:`KAPPA_BOUNDS`); `None` if no group has two outcomes, for then nothing is known.

    Raises:
        ValueError: As :func:`fit_kappa`.
    """
    total = np.asarray(successes, dtype=np.float64) + np.asarray(failures, dtype=np.float64)
    return 1.0 / (1.0 + fit_kappa(v, successes, failures)) if (total > 1.0).any() else None


def log_gamma(x: npt.ArrayLike) -> FloatArray:
    """Natural logarithm of the gamma function for x > 0, elementwise, to about 1e-13 relative to max(1, |log gamma|).

    Numpy has none. Stirling's series at x + 8, brought back by the recurrence.
    """
    z = np.asarray(x, dtype=np.float64)
    shift = np.ones_like(z)
    for j in range(8):
        shift = shift * (z + j)
    y = z + 8.0
    w = 1.0 / (y * y)
    series = (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w * (1 / 1680 - w * (1 / 1188 - w * 691 / 360360))))) / y
    return (y - 0.5) * np.log(y) - y + 0.5 * math.log(2.0 * math.pi) + series - np.log(shift)


def _check_predictions(v: npt.ArrayLike, keys: Sequence[str] | None) -> FloatArray:
    mean = np.asarray(v, dtype=np.float64)
    if mean.ndim != 1 or (keys is not None and mean.size != len(keys)):
        raise ValueError(
            f"v must be a vector{'' if keys is None else f' of {len(keys)} predictions'}, got shape {mean.shape}"
        )
    bad = ~((mean >= 0.0) & (mean <= 1.0))
    if bad.any():
        i = int(np.argmax(bad))
        name = f"entry {i}" if keys is None else repr(keys[i])
        raise ValueError(f"prediction for {name} is {mean[i]}, expected a probability in [0, 1]")
    return mean
