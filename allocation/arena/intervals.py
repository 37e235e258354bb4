"""Confidence intervals of proportions.

Invariant: an interval lies within [0, 1] and holds the observed proportion.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from allocation.contrast import FloatArray

Z95 = 1.959963984540054
"""Quantile of the normal distribution for 95 % on both sides."""


def proportion_interval(
    successes: npt.ArrayLike, count: npt.ArrayLike, *, z: float = Z95
) -> tuple[FloatArray, FloatArray]:
    """Returns the ends of Wilson's score interval (Wilson, 1927), float64 [n] each; [0, 1] where nothing was counted.

    Args:
        successes: float [n], between 0 and `count`.
        count: float [n], >= 0.
        z: Normal quantile; the default is for 95 %.
    """
    s, n = np.asarray(successes, dtype=np.float64), np.asarray(count, dtype=np.float64)
    if s.shape != n.shape or (s < 0).any() or (s > n).any():
        raise ValueError("successes must lie between 0 and count, entry by entry")
    some = np.maximum(n, 1.0)
    p = s / some
    middle = (p + z * z / (2 * some)) / (1 + z * z / some)
    half = z / (1 + z * z / some) * np.sqrt(p * (1 - p) / some + z * z / (4 * some * some))
    # Rounding must not put the end that is 0 or 1 exactly on the wrong side of the proportion.
    low, high = np.clip(np.minimum(middle - half, p), 0, 1), np.clip(np.maximum(middle + half, p), 0, 1)
    return np.where(n > 0, low, 0.0), np.where(n > 0, high, 1.0)
