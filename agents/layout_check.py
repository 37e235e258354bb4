"""Is the packed layout right for this model? Loss and gradients of a batch, held against the flat layout's.

Invariant: what is compared is what training would use, the gradients in the parameters themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from agents.layout import Layout

logger = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Greatest relative difference, by precision: a product in bfloat16 is good to 8 bits, and layouts add up in another order."""


def check_layout(
    backward: Callable[[Layout], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    *,
    packed: Layout,
    flat: Layout,
    terms: float,
    precision: str,
) -> bool:
    """Compares loss and gradient of the packed layout with those of the flat one.

    Args:
        backward: Leaves the gradient of a layout in the parameters, in place of what was there, and returns the loss.
        parameters: What is trained.
        packed: The batch, packed.
        flat: The same batch, flat.
        terms: Size of the terms that the loss is the sum of: a loss may be close to zero though they are not.
        precision: `float32` or `bfloat16`.

    Returns:
        Whether there was something to compare: not if the batch has a loss or gradient that is not finite.

    Raises:
        RuntimeError: They differ by more than `TOLERANCE`.
    """
    losses, gradients = [], []
    for layout in (flat, packed):
        losses.append(float(backward(layout)))
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    norm = float(torch.nn.utils.get_total_norm(gradients[0]))
    apart = float(torch.nn.utils.get_total_norm([a - b for a, b in zip(*gradients, strict=True)]))
    if not torch.isfinite(torch.tensor([*losses, norm, apart])).all():
        return False
    found = {
        "loss": abs(losses[1] - losses[0]) / max(abs(losses[0]), terms, 1e-12),
        "gradient": apart / max(norm, 1e-12),
    }
    for name, difference in found.items():
        if difference > TOLERANCE[precision]:
            raise RuntimeError(
                f"check_layout: the packed {name} differs from the flat one by {difference:.2g} of its size, more than "
                f"{TOLERANCE[precision]:g}; train with layout='flat', which any causal model can"
            )
    logger.info("check_layout: packed and flat agree; loss within %.2g, gradient within %.2g", *found.values())
    return True
