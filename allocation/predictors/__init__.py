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
from allocation.predictors.text import TextPredictor

__all__ = [
    "PREDICTORS",
    "CountsPredictor",
    "EnsemblePredictor",
    "HiddenStatePredictor",
    "LearningConfig",
    "MeanPredictor",
    "TextPredictor",
    "make_predictor",
]


def _ensemble(feature_dim: int, seed: int) -> Predictor:
    # Two heads that read different things err differently; a third member that reads all text helps little and costs most.
    words_alone = HiddenStatePredictor(0, words=256, seed=seed + 1)
    return EnsemblePredictor([HiddenStatePredictor(feature_dim, seed=seed), words_alone])


PREDICTORS: dict[str, Callable[[int, int], Predictor]] = {
    "hidden_state": lambda feature_dim, seed: HiddenStatePredictor(feature_dim, seed=seed),
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
