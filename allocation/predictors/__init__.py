"""Predictors of success, by name.

Invariant: a predictor is known under one name; adding one is a class and an entry of `PREDICTORS`.
"""

from __future__ import annotations

from collections.abc import Callable

from allocation.predictor import Predictor
from allocation.predictors.counts import CountsPredictor, MeanPredictor
from allocation.predictors.ensemble import EnsemblePredictor
from allocation.predictors.hidden import HiddenStatePredictor
from allocation.predictors.learned import LearningConfig
from allocation.predictors.logistic import LogisticPredictor
from allocation.predictors.text import TextPredictor

__all__ = [
    "PREDICTORS",
    "CountsPredictor",
    "EnsemblePredictor",
    "HiddenStatePredictor",
    "LearningConfig",
    "LogisticPredictor",
    "MeanPredictor",
    "TextPredictor",
    "make_predictor",
]


def _ensemble(feature_dim: int, seed: int) -> Predictor:
    # A network and a regression on the same inputs err differently. A narrow prior: the network has the details.
    regression = LogisticPredictor(feature_dim, prior=300.0)
    return EnsemblePredictor([HiddenStatePredictor(feature_dim, seed=seed), regression])


PREDICTORS: dict[str, Callable[[int, int], Predictor]] = {
    "hidden_state": lambda feature_dim, seed: HiddenStatePredictor(feature_dim, seed=seed),
    "logistic": lambda feature_dim, seed: LogisticPredictor(feature_dim),
    "text": lambda feature_dim, seed: TextPredictor(seed=seed),
    "counts": lambda feature_dim, seed: CountsPredictor(),
    "ensemble": _ensemble,
}
"""Makes a predictor from the size of the policy's hidden states (0 where there are none) and a seed."""


def make_predictor(name: str, *, feature_dim: int = 0, seed: int = 0) -> Predictor:
    """Returns a predictor by name.

    Args:
        name: One of `PREDICTORS`.
        feature_dim: Size of the policy's hidden states, for predictors that read them; 0 where the engine gives none.
        seed: Seeds everything random.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in PREDICTORS:
        raise ValueError(f"unknown predictor {name!r}; known: {', '.join(PREDICTORS)}")
    return PREDICTORS[name](feature_dim, seed)
