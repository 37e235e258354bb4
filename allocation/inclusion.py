"""How likely each prompt of a pool was to be opened, and what its tree therefore counts in the loss.

Invariant: under `ips` the mean of the weighted losses over the trees of a batch estimates the mean loss over the pool, whatever
the values that the prompts were chosen by; the number of a prompt's rollouts never enters its weight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from allocation.contrast import FloatArray
from allocation.roots import BoolArray, RootPlan

REWEIGHTS = ("none", "clipped", "ips")


def inclusion_probabilities(
    plan: Callable[[np.random.Generator], RootPlan], draws: int, rng: np.random.Generator
) -> FloatArray:
    """Estimates the chance that each prompt gets rollouts, over exploration and ties.

    pi_i = e + (1 - e) P(opened | not explored), with e the chance to be explored, which is known and the same for all. The
    second factor is the share of plans, drawn afresh, that open the prompt among those that do not explore it. It is 1 or 0
    without error for prompts that are above or below the margin in every plan. Its standard error is at most
    0.5 / sqrt(draws), and pi_i is never below e.

    Source: docs/algorithm.md section 1; Horvitz and Thompson (1952).

    Args:
        plan: Makes the plan of the root stage once more from the generator that it is given.
        draws: Plans to draw, at least 1.
        rng: Generator of all draws.

    Returns:
        float64 [n] in [0, 1]. 0 for a prompt that no plan opened, which without exploration is any prompt off the margin.

    Raises:
        ValueError: `draws` is less than 1.
    """
    if draws < 1:
        raise ValueError(f"inclusion probabilities need at least 1 draw, got {draws}")
    plans = [plan(rng) for _ in range(draws)]
    explored = np.array([p.explored for p in plans])
    opened = np.array([p.counts > 0 for p in plans])
    chance = plans[0].explore_chance
    left_out = (~explored).sum(axis=0)
    # A prompt that every plan explored leaves nothing to be estimated but is opened for certain.
    given = np.where(left_out > 0, (opened & ~explored).sum(axis=0) / np.maximum(left_out, 1), 1.0)
    return chance + (1.0 - chance) * given


def inclusion_weights(
    probability: FloatArray, opened: BoolArray, *, reweight: str = "ips", clip: float = 5.0
) -> FloatArray:
    """Returns what the trees of the opened prompts count in the loss.

    `ips` gives n_opened / (pi_i n_pool): the mean of weight times loss over the opened prompts is the Horvitz-Thompson
    estimate of the mean loss over the pool, unbiased where the probabilities are exact. `clipped` cuts these
    weights at `clip` and divides them by their mean (Hajek): the variance is bounded, the mean weight is 1, and rarely opened
    prompts count too little.

    Args:
        probability: float64 [n] of the pool, positive at the opened prompts.
        opened: bool [n].
        reweight: A name of `REWEIGHTS`; `none` gives ones.
        clip: Largest weight before the division, for `clipped`.

    Returns:
        float64 [n]; 0 at prompts that were not opened.

    Raises:
        ValueError: The name is unknown, `clip` is not positive, or an opened prompt has probability 0.
    """
    if reweight not in REWEIGHTS:
        raise ValueError(f"unknown reweight {reweight!r}; known: {', '.join(REWEIGHTS)}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    weights = np.zeros(probability.size)
    if reweight == "none":
        weights[opened] = 1.0
        return weights
    if not (probability[opened] > 0).all():
        raise ValueError("an opened prompt has inclusion probability 0: set explore above 0, or draw more plans")
    weights[opened] = opened.sum() / (probability[opened] * probability.size)
    if reweight == "clipped" and opened.any():
        weights = np.minimum(weights, clip)
        weights /= weights[opened].mean()
    return weights


def weight_report(weights: FloatArray) -> dict[str, float]:
    """Returns how uneven the loss weights of a batch's trees are; of a batch without trees nothing.

    Args:
        weights: float64 [n] of the trees, at least 0.

    Returns:
        `reweight/max_weight`, and `reweight/effective_prompts`: (sum w)^2 / sum w^2, the number of trees of equal weight that
        would give a mean as precise (Kish 1965).
    """
    square = float((weights**2).sum())
    if square == 0.0:
        return {}
    return {
        "reweight/max_weight": float(weights.max()),
        "reweight/effective_prompts": float(weights.sum()) ** 2 / square,
    }
