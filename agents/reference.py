"""The frozen model that a policy's divergence is measured from.

Invariant: a reference never changes while the policy learns, and asking it changes nothing: no gradient, no mode and no
generator of either model.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch

from agents.layout import MicroBatch
from agents.lora import has_adapters, is_adapter_folder, without_adapters
from agents.models import load_model
from agents.scoring import Scorer
from agents.tokenizer_checks import check_vocabulary


class Reference(Protocol):
    """Scores the tokens that a policy sampled."""

    def __call__(self, micro: MicroBatch, ids: torch.Tensor) -> torch.Tensor:
        """Returns the reference's log-probs of the scored tokens.

        Args:
            micro: The rows.
            ids: The scored tokens, int64 [t], in the order of `micro.token`.

        Returns:
            Float32 [t], in nats, without gradient, on the device of `ids`.
        """


class FrozenReference:
    """A second model.

    Args:
        model: What it is a frozen copy of; the model itself is left as it is.
        temperature: The sampling temperature, as the policy is scored.
        precision: `float32` or `bfloat16`, of the matrix products.

    Attributes:
        model: The copy, in evaluation mode; none of its parameters requires a gradient.
    """

    def __init__(self, model: Any, *, temperature: float = 1.0, precision: str = "float32"):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._scorer = Scorer(self.model, temperature=temperature, precision=precision)

    @torch.no_grad()
    def __call__(self, micro: MicroBatch, ids: torch.Tensor) -> torch.Tensor:
        """Returns log-probs, float32 [t]; see `Reference`."""
        return self._scorer(micro, ids).logprobs.to(ids.device)


class AdapterReference:
    """The policy without its low-rank adapters, so no second model is held.

    Args:
        model: The policy's model, with adapters in it (`agents.lora`).
        temperature: The sampling temperature, as the policy is scored.
        precision: `float32` or `bfloat16`, of the matrix products.

    Raises:
        ValueError: The model has no adapters.
    """

    def __init__(self, model: Any, *, temperature: float = 1.0, precision: str = "float32"):
        if not has_adapters(model):
            raise ValueError(
                "the model has no adapters to switch off: add them first (agents.lora.add_adapters), or use FrozenReference"
            )
        self.model = model
        self._scorer = Scorer(model, temperature=temperature, precision=precision)

    @torch.no_grad()
    def __call__(self, micro: MicroBatch, ids: torch.Tensor) -> torch.Tensor:
        """Returns log-probs, float32 [t]; see `Reference`."""
        with without_adapters(self.model):
            return self._scorer(micro, ids).logprobs.to(ids.device)


def make_reference(
    start: str, model: Any, tokenizer: Any, *, temperature: float = 1.0, precision: str = "float32"
) -> Reference:
    """Returns the reference of a run: the model that the run started from, also where it goes on from a checkpoint.

    Args:
        start: Name of that model, as `load_model` takes it.
        model: The policy's model as it is now.
        tokenizer: The policy's tokenizer.
        temperature: The sampling temperature.
        precision: Of the matrix products.

    Raises:
        ValueError: Their vocabularies differ.
    """
    if has_adapters(model) and not is_adapter_folder(start):
        return AdapterReference(model, temperature=temperature, precision=precision)
    # A run that started from adapters went on training those: without them the model is not what it started from.
    first, _ = load_model(start, device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))
    check_vocabulary(model, tokenizer, first)
    return FrozenReference(first, temperature=temperature, precision=precision)
