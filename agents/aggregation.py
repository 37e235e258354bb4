"""What one token of each edge counts in the loss of a batch.

Invariant: denominators are those of the whole batch, never of a micro-batch, so that splitting a batch changes nothing.
"""

from __future__ import annotations

import numpy as np

from agents.advantages import Credit
from allocation.forest_table import ForestTable

AGGREGATIONS: tuple[str, ...] = ("prompt", "trajectory", "edge", "token")


def edge_coefficients(table: ForestTable, credit: Credit, aggregation: str) -> np.ndarray:
    """Returns what one token of each edge counts in the loss of the batch.

    * `prompt`: rollouts are averaged within a prompt, then prompts are averaged, so that the number of rollouts that a
      prompt was given is not a weight (docs/algorithm.md, section 1).
    * `trajectory`: every root rollout counts the same, whatever its prompt.
    * `edge`: every turn counts the same.
    * `token`: every token counts the same.

    The first two divide by the mean number of sampled tokens of a root-to-leaf path (`Tree.weights`, whatever the
    estimator weighs edges by), a constant of the batch, so that the step size means the same at any length. A tree
    counts `Tree.loss_weight` times its share, and one of weight 0 is not counted in any mean either: it was filtered
    out (`Allocator.loss_weights`). Other weights are in no mean, so that the scale of inverse probabilities is kept.

    Args:
        table: The batch.
        credit: Its credit.
        aggregation: One of `AGGREGATIONS`.

    Returns:
        Float64 [nodes].

    Raises:
        ValueError: The aggregation is unknown.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; known: {', '.join(AGGREGATIONS)}")
    share = np.array([t.loss_weight for t in table.trees], dtype=np.float64)
    counted, node_share, tokens = share > 0, share[table.tree], table.tokens
    alive = counted[table.tree]
    if aggregation == "token":
        return node_share / max(int(tokens[alive].sum()), 1)
    if aggregation == "edge":
        return node_share / (np.maximum(tokens, 1) * max(int((tokens[alive] > 0).sum()), 1))
    mass = np.ones(len(share))
    if aggregation == "trajectory":
        mass = np.maximum(table.num_children[table.start[:-1]], 1).astype(np.float64)
    mass = np.where(counted, mass, 0.0) / max(float(mass[counted].sum()), 1.0)
    per_tree = np.bincount(table.tree, weights=table.weights * tokens, minlength=len(share))
    return (mass * share)[table.tree] * credit.weight / max(float(mass @ per_tree), 1.0)
