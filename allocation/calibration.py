"""How good predicted success probabilities are.

Invariant: every measure is a plain function of predictions and outcomes in the order they were made; none looks ahead,
none changes its arguments, and what cannot be measured is NaN rather than a flattering number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from allocation.contrast import FloatArray
from allocation.roots import IntArray


@dataclass(frozen=True, slots=True)
class Reliability:
    """A reliability diagram: predictions in bins of equal width.

    Attributes:
        count: int[bins], predictions in each bin.
        predicted: float[bins], their mean; NaN in an empty bin.
        observed: float[bins], mean outcome; NaN in an empty bin.
    """

    count: IntArray
    predicted: FloatArray
    observed: FloatArray


def brier(v: npt.ArrayLike, outcome: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Mean squared error of predictions; 0 is best, 0.25 is what a constant 0.5 gets on binary outcomes.

    Args:
        v: float[n], predictions in [0, 1], n >= 1.
        outcome: float[n], outcomes or observed success rates in [0, 1].
        weights: float[n] >= 0 with a positive sum, such as the outcomes behind each rate. None: all alike.

    Raises:
        ValueError: If a vector is empty, the lengths differ, or an entry lies outside [0, 1].
    """
    p, y = _check(v, outcome)
    return float(np.average((p - y) ** 2, weights=None if weights is None else np.asarray(weights, dtype=np.float64)))


def running_mean(outcome: npt.ArrayLike, *, prior: float = 0.5) -> FloatArray:
    """Mean of `prior` and the outcomes before each one: (prior + sum_{j<i} y_j) / (1 + i); float[n]."""
    y = np.asarray(outcome, dtype=np.float64)
    before = np.concatenate([[0.0], np.cumsum(y)[:-1]]) if y.size else y
    return (prior + before) / (1.0 + np.arange(y.size))


def brier_skill(
    v: npt.ArrayLike,
    outcome: npt.ArrayLike,
    *,
    reference: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
) -> float:
    """Share of a reference's Brier score that the predictions save: 1 - brier(v) / brier(reference).

    1 is perfect, 0 no better than the reference, negative worse.

    Args:
        v: float[n], predictions in [0, 1], in the order they were made.
        outcome: float[n], outcomes in [0, 1].
        reference: float[n], predictions to beat. None: the :func:`running_mean` of earlier outcomes.
        weights: As in :func:`brier`.

    Returns:
        The skill; NaN if the reference is perfect.

    Raises:
        ValueError: As :func:`brier`.
    """
    base = brier(running_mean(outcome) if reference is None else reference, outcome, weights)
    return 1.0 - brier(v, outcome, weights) / base if base > 0.0 else float("nan")


def reliability(v: npt.ArrayLike, outcome: npt.ArrayLike, *, bins: int = 10) -> Reliability:
    """Mean prediction and mean outcome in `bins` equal-width bins over [0, 1]; the last bin includes 1.

    Raises:
        ValueError: As :func:`brier`; also if `bins` is below 1.
    """
    p, y = _check(v, outcome)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    where = np.minimum((p * bins).astype(np.int64), bins - 1)
    count = np.bincount(where, minlength=bins)
    some = np.where(count > 0, count, np.nan)
    predicted, observed = (np.bincount(where, weights=x, minlength=bins) / some for x in (p, y))
    return Reliability(count.astype(np.int64), predicted, observed)


def expected_calibration_error(v: npt.ArrayLike, outcome: npt.ArrayLike, *, bins: int = 10) -> float:
    """Mean over predictions of |mean prediction - mean outcome| in their bin of :func:`reliability`.

    Raises:
        ValueError: As :func:`reliability`.
    """
    r = reliability(v, outcome, bins=bins)
    return float(np.nansum(r.count * np.abs(r.predicted - r.observed)) / r.count.sum())


def auc(v: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Probability that a random success was predicted higher than a random failure, ties counting one half.

    Args:
        v: float[n], predictions in [0, 1].
        outcome: n outcomes, each exactly 0 or 1.

    Returns:
        The area under the ROC curve; NaN if all outcomes agree.

    Raises:
        ValueError: As :func:`brier`; also if an outcome is neither 0 nor 1.
    """
    p, y = _check(v, outcome)
    graded = (y != 0.0) & (y != 1.0)
    if graded.any():
        i = int(np.argmax(graded))
        raise ValueError(
            f"outcome[{i}] is {y[i]}, but AUC needs outcomes 0 or 1: pass the success flag, not a graded reward"
        )
    positives = int(y.sum())
    negatives = y.size - positives
    if not positives or not negatives:
        return float("nan")
    _, place, count = np.unique(p, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(count) - (count - 1) / 2.0
    rank_sum = float(mid_rank[place][y == 1.0].sum())
    return (rank_sum - positives * (positives + 1) / 2.0) / (positives * negatives)


def _check(v: npt.ArrayLike, outcome: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    p, y = np.asarray(v, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape or not p.size:
        raise ValueError(
            f"predictions and outcomes must be non-empty vectors of one length, got shapes {p.shape}, {y.shape}"
        )
    for name, x in (("prediction", p), ("outcome", y)):
        bad = ~((x >= 0.0) & (x <= 1.0))
        if bad.any():
            i = int(np.argmax(bad))
            raise ValueError(f"{name} {i} is {x[i]}, expected a number in [0, 1]")
    return p, y
