"""PPO's critic as the allocator's predictor of success.

Invariant: it learns nothing of its own. What it says of a batch that the critic has learned from is what the critic said
before, so that the allocator's report on it is of outcomes that it had not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.critic import Critic
from allocation.predictor import Anchor

MARGIN = 1e-3
"""Least distance of a prediction from 0 and 1; a value is no probability and may lie anywhere."""


class CriticPredictor:
    """Predicts success by the critic's value of the anchor's hidden state (`allocation.predictor.Predictor`).

    A value is the return that is expected from a prefix on. It is the chance of success where success is a reward of 1 at the
    end and there is no other, and no discount; with partial rewards it ranks prefixes by those.

    The head that predicts is a copy, taken at every `update`: the learner moves the critic before the allocator looks back at
    the batch. An anchor without a hidden state is a toss-up.

    Args:
        critic: The critic, trained by the learner.
        warmup: Updates before it is ready.
    """

    def __init__(self, critic: Critic, *, warmup: int = 5):
        self.critic = critic
        self.warmup = warmup
        self._updates = 0
        self._copy()

    def _copy(self) -> None:
        # Not a reference: the optimiser writes into the critic's own tensors.
        self._weight = self.critic.weight.detach().cpu().float().numpy().copy()
        self._bias = float(self.critic.bias.detach())

    @property
    def ready(self) -> bool:
        """Whether the critic was updated `warmup` times."""
        return self._updates >= self.warmup

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the predicted chance of success of each anchor, float64 [n] in [MARGIN, 1 - MARGIN]."""
        return np.clip(self._values(anchors), MARGIN, 1 - MARGIN)

    def _values(self, anchors: Sequence[Anchor]) -> np.ndarray:
        values = np.full(len(anchors), 0.5)
        known = [i for i, a in enumerate(anchors) if a.features is not None]
        if known:
            states = np.stack([anchors[i].features for i in known]).astype(np.float32)  # type: ignore[misc]
            if states.shape[1] != len(self._weight):
                raise ValueError(
                    f"the critic reads hidden states of size {len(self._weight)}, got {states.shape[1]}; "
                    "it must be made for the model that the policy samples from"
                )
            values[known] = states @ self._weight + self._bias
        return values

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Takes over what the learner has taught the critic; see `Predictor.update`.

        Returns:
            `predictor/outside`: share of the anchors whose values before were no probabilities; `predictor/bias`: mean of
            those values less what happened, by `weights`, the number of terminals behind each.
        """
        before = self._values(anchors)
        self._updates += 1
        self._copy()
        return {
            "predictor/outside": float(np.mean((before < 0) | (before > 1))),
            "predictor/bias": float(np.average(before - values, weights=weights)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the copy and the number of updates; the critic itself is part of the learner's state."""
        return {"weight": self._weight, "bias": self._bias, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        weight = np.asarray(state["weight"], dtype=np.float32)
        if weight.shape != self._weight.shape:
            raise ValueError(f"the state is of a critic of {weight.shape[0]} inputs, this one has {len(self._weight)}")
        self._weight, self._bias, self._updates = weight.copy(), float(state["bias"]), int(state["updates"])
