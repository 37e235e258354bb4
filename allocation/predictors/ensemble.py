"""Several predictors as one, and what their disagreement says.

Invariant: the prediction is the plain mean of the members', and a member's state is untouched by the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from allocation.beliefs import KAPPA_BOUNDS
from allocation.contrast import FloatArray
from allocation.predictor import Anchor, Predictor


def kappa_of_spread(members: FloatArray, bounds: tuple[float, float] = KAPPA_BOUNDS) -> FloatArray:
    """Returns how many observations predictions are worth, by how far the members disagree: V (1 - V) / variance - 1.

    That is the concentration of the Beta distribution with their mean and variance.

    Args:
        members: Predictions of each member, float [members, n] in [0, 1].
        bounds: Least and greatest value returned.

    Returns:
        Float64 [n]; the greatest value where the members agree.
    """
    mean, variance = members.mean(axis=0), members.var(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        kappa = np.where(variance > 0, mean * (1 - mean) / variance - 1, np.inf)
    return np.clip(kappa, *bounds)


class EnsemblePredictor:
    """The mean of several predictors.

    Args:
        members: Predictors that differ in kind or in seed.

    Raises:
        ValueError: There are fewer than two.
    """

    def __init__(self, members: Sequence[Predictor]):
        if len(members) < 2:
            raise ValueError(f"an ensemble needs at least two members, got {len(members)}")
        self.members = tuple(members)

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the mean of the members' predictions, float64 [n]."""
        return self.predict_with_kappa(anchors)[0]

    def predict_with_kappa(self, anchors: Sequence[Anchor]) -> tuple[FloatArray, FloatArray]:
        """Returns the mean of the members' predictions, and what it is worth in observations; float64 [n] each.

        For the second see `kappa_of_spread`.
        """
        each = np.stack([np.asarray(m.predict(anchors), dtype=np.float64) for m in self.members])
        return each.mean(axis=0), kappa_of_spread(each)

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Teaches every member; returns the means of their figures."""
        figures: dict[str, list[float]] = {}
        for member in self.members:
            for name, value in member.update(anchors, values, weights).items():
                figures.setdefault(name, []).append(value)
        return {name: float(np.mean(found)) for name, found in figures.items()}

    @property
    def ready(self) -> bool:
        """Whether all members are."""
        return all(member.ready for member in self.members)

    def state_dict(self) -> dict[str, Any]:
        """Returns the members' states."""
        return {str(i): member.state_dict() for i, member in enumerate(self.members)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: It is that of an ensemble of another size.
        """
        if len(state) != len(self.members):
            raise ValueError(f"the state is of an ensemble of {len(state)} members, this one has {len(self.members)}")
        for i, member in enumerate(self.members):
            member.load_state_dict(state[str(i)])
