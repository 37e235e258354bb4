"""The critic of PPO: a value head on the policy's last hidden state, and what it learns from.

Invariant: a value is that of a prefix, before its next action, and is read where the prefix ends: at the last token that was
shown before the action is sampled (turn level; tokens within an action have no values of their own). Denominators are those of
the whole batch, so that splitting a batch changes nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from agents.advantages.base import STD_FLOOR
from allocation.forest_table import ForestTable

START = 0.5
"""Value of every prefix before the first update: half of a reward between 0 and 1, so that success and failure alike teach the
policy from the first batch on (from 0, failures would have advantages of 0 until the critic had learned)."""

INITIAL_SCALE = 0.01
"""Standard deviation of the first values around `START`, for hidden states of unit mean square."""


class Critic(torch.nn.Module):
    """Gives the value of a prefix, the return that is expected from there on, from the policy's hidden state at its end.

    An affine map: the hidden state is the input of the output layer, so what is hard to read off it is for the policy's own
    layers to learn, which the value loss trains with it.

    Args:
        hidden_size: Size of the policy's hidden states.
        seed: Seeds the first weights; no global generator is touched.
    """

    def __init__(self, hidden_size: int, seed: int):
        super().__init__()
        # A stream of its own: one that the same seed gave to something else would not be independent of it.
        first = np.random.default_rng([seed, 0xC217]).normal(scale=INITIAL_SCALE / hidden_size**0.5, size=hidden_size)
        self.weight = torch.nn.Parameter(torch.from_numpy(first).float())
        self.bias = torch.nn.Parameter(torch.tensor(START))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the values of prefixes, float32 [v], from their hidden states, float [v, d] of any precision."""
        return hidden.float() @ self.weight + self.bias


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    targets: torch.Tensor,
    coefficients: torch.Tensor,
    clip: float = 0.0,
) -> torch.Tensor:
    """Half the squared error, summed with coefficients.

    With `clip` the greater of two errors counts, that of the value and that of the old value moved towards it by at most `clip`
    (PPO's reference implementation; the paper, equation 9, has the plain error): a value that has moved further in the
    direction of its target is not pulled on.

    Args:
        values: Under the current weights, float [v].
        old_values: Under the weights that the batch was met with, float [v].
        targets: What they are drawn to, float [v], finite (`Credit.target`).
        coefficients: Share of each prefix in the loss, float [v]; see `value_coefficients`.
        clip: Bound on the move of a value; 0 for none.

    Returns:
        The loss (a sum: coefficients carry the denominators).
    """
    error = (values - targets).square()
    if clip:
        moved = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (moved - targets).square())
    return 0.5 * (coefficients * error).sum()


def value_coefficients(table: ForestTable, targets: np.ndarray) -> np.ndarray:
    """Returns what each prefix counts in the critic's loss.

    Prefixes are averaged within a prompt by their share of the tree (`Tree.weights`), then prompts are averaged; `aggregation`
    is for policies. Trees that the policy's loss leaves out count like all others: a critic that only met the prompts with
    mixed outcomes would take every prompt for such a one.

    Args:
        table: The batch.
        targets: What values are drawn to, float [n], NaN where there is nothing to learn (`Credit.target`).

    Returns:
        Float64 [n]: 0 where there is nothing to learn, else positive, and 1 in sum.
    """
    share = np.where(np.isnan(targets), 0.0, table.weights)
    mass = np.bincount(table.tree, weights=share, minlength=len(table.trees))
    prompts = max(int((mass > 0).sum()), 1)
    return share / (np.where(mass > 0, mass, 1.0)[table.tree] * prompts)


def explained_variance(values: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """Returns 1 - Var(target - value) / Var(target): 1 for a perfect critic, 0 for a constant, below 0 for a misleading one.

    Args:
        values: The critic's values before the update, float [n].
        targets: What happened, float [n].
        weights: Weight of each prefix, float [n]; only those with a positive weight are read (`value_coefficients`).

    Returns:
        The share; 0 where the targets hardly differ (a standard deviation below `STD_FLOOR`): there is nothing to explain.
    """
    used = weights > 0
    if not used.any():
        return 0.0
    values, targets, weights = values[used], targets[used], weights[used]

    def variance(x: np.ndarray) -> float:
        return float(np.average((x - np.average(x, weights=weights)) ** 2, weights=weights))

    total = variance(targets)
    return 0.0 if total < STD_FLOOR**2 else 1.0 - variance(targets - values) / total
