"""The policy's loss on stored tokens.

Invariant: only sampled tokens are trained, each once; denominators are those of the whole batch, never of a micro-batch, so
that splitting a batch changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from agents.advantages import EdgeCredit
from allocation import Forest

Aggregation = Literal["prompt", "trajectory", "edge", "token"]
AGGREGATIONS: tuple[str, ...] = ("prompt", "trajectory", "edge", "token")


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds of the probability ratio: [1 - low, 1 + high] (DAPO's asymmetric clip; 0.2 / 0.28)."""

    low: float = 0.2
    high: float = 0.28


def clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, coefficients: torch.Tensor, clip: Clip
) -> tuple[torch.Tensor, dict[str, float]]:
    """PPO's clipped surrogate, summed with coefficients (Schulman et al., 2017, equation 7).

    Args:
        logprobs: Under the current weights, float [tokens].
        old_logprobs: Under the weights that sampled, float [tokens].
        advantages: Of each token's edge, float [tokens].
        coefficients: Share of each token in the batch's loss, float [tokens]; see `edge_coefficients`.
        clip: Bounds of the ratio.

    Returns:
        The loss (a sum: coefficients carry the denominators), and sums for the log: `clipped` and `kl` (k1, in nats).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = torch.clamp(ratio, 1 - clip.low, 1 + clip.high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        figures = {
            "clipped": float(((clipped * advantages) < (ratio * advantages)).sum()),
            "kl": float((old_logprobs - logprobs).sum()),
        }
    return -(coefficients * surrogate).sum(), figures


def edge_coefficients(forest: Forest, credits: list[EdgeCredit], aggregation: str) -> list[np.ndarray]:
    """Returns what one token of each edge counts in the loss of the batch.

    * `prompt`: rollouts are averaged within a prompt, then prompts are averaged, so that the number of rollouts that a
      prompt was given is not a weight (docs/algorithm.md, section 1).
    * `trajectory`: every root rollout counts the same, whatever its prompt.
    * `edge`: every turn counts the same.
    * `token`: every token counts the same.

    The first two divide by the mean number of sampled tokens of a root-to-leaf path, a constant of the batch, so that the
    step size means the same at any length. A tree counts `Tree.loss_weight` times its share, and one of weight 0 is not counted
    in any mean either: it was filtered out (`Allocator.loss_weights`).

    Args:
        forest: The batch.
        credits: One for each tree.
        aggregation: One of `AGGREGATIONS`.

    Returns:
        For each tree float64 [nodes].

    Raises:
        ValueError: The aggregation is unknown.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; known: {', '.join(AGGREGATIONS)}")
    lengths = [np.array([0 if n.sample is None else len(n.sample.action_ids) for n in t.nodes]) for t in forest]
    share = np.array([t.loss_weight for t in forest])
    counted = share > 0
    if aggregation == "token":
        total = sum(int(n.sum()) for n, c in zip(lengths, counted, strict=True) if c)
        return [np.full(len(n), s / max(total, 1)) for n, s in zip(lengths, share, strict=True)]
    if aggregation == "edge":
        total = sum(int((n > 0).sum()) for n, c in zip(lengths, counted, strict=True) if c)
        return [s / (np.maximum(n, 1) * max(total, 1)) for n, s in zip(lengths, share, strict=True)]
    mass = np.array([max(len(t.root.children), 1) if aggregation == "trajectory" else 1 for t in forest], dtype=float)
    mass *= share / max(float(mass[counted].sum()), 1.0)
    per_tree = [float((c.weight * n).sum()) for c, n in zip(credits, lengths, strict=True)]
    mean_tokens = max(float(np.dot(mass, per_tree)), 1.0)
    return [m * c.weight / mean_tokens for m, c in zip(mass, credits, strict=True)]
