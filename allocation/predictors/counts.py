"""Predictors that only count.

Invariant: what they predict is a ratio of counts that can be worked out by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from allocation.predictor import Anchor


class MeanPredictor:
    """Predicts the running mean of all outcomes: the baseline that a predictor has to beat.

    Args:
        decay: Factor by which older batches count less.
    """

    def __init__(self, decay: float = 0.9):
        self._decay = decay
        self._sum, self._count = 0.5, 1.0

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the same number for every anchor."""
        return np.full(len(anchors), self._sum / self._count)

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Folds in the values of one batch."""
        self._sum = self._decay * self._sum + float((weights * values).sum())
        self._count = self._decay * self._count + float(weights.sum())
        return {}

    @property
    def ready(self) -> bool:
        """Never: with one number for all there is nothing to allocate by."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Returns the two sums."""
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the two sums."""
        self._sum, self._count = float(state["sum"]), float(state["count"])


class CountsPredictor:
    """Predicts the mean of a Beta belief from counts alone; nothing is learned.

    The counts are the prompt's earlier outcomes and, where the method lets anchors know them, those of the other root rollouts
    of the same tree.

    Args:
        prior: Weight, in outcomes, of a success rate of one half; 2 is the uniform Beta(1, 1).
    """

    def __init__(self, prior: float = 2.0):
        if not prior > 0:
            raise ValueError(f"prior must be positive, got {prior}")
        self.prior = prior
        self._ready = False

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns (prior / 2 + successes) / (prior + outcomes) for each anchor, float64 [n]."""
        counts = np.array(
            [(a.successes + a.tree_successes, a.failures + a.tree_failures) for a in anchors], dtype=np.float64
        ).reshape(len(anchors), 2)
        return (self.prior / 2 + counts[:, 0]) / (self.prior + counts.sum(axis=1))

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Notes that there are counts from now on."""
        self._ready = self._ready or len(anchors) > 0
        return {}

    @property
    def ready(self) -> bool:
        """Whether there are any counts."""
        return self._ready

    def state_dict(self) -> dict[str, Any]:
        """Returns whether there are counts; the counts themselves belong to the allocator."""
        return {"ready": self._ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._ready = bool(state["ready"])
