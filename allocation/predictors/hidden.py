"""The default predictor: a small head on the policy's own hidden states.

Invariant: inputs are standardised by figures of the first batches, which stand still from then on: what was learned would
otherwise come to mean something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from allocation.predictor import Anchor
from allocation.predictors.inputs import input_matrix, input_width
from allocation.predictors.learned import LearnedPredictor, LearningConfig

_STANDARDISED_BATCHES = 20
_LEAST_DEVIATION = 1e-2
_CLIP = np.float32(5.0)


class HiddenStatePredictor(LearnedPredictor):
    """A two-layer head on the policy's last hidden states (TRACE, predictor).

    Ours, each found to help (benchmarks/predictor.py): it reads the mean of the hidden states at the ends of all prefixes
    along the path, since the latest alone forgets what came before; how sure the policy was of its actions
    (`counts_matrix`); and the words of the prompt, hashed, which tell kinds of prompts apart long before a head has learned
    to read them off a hidden state.

    Args:
        feature_dim: Size of a hidden state; 0 for none.
        words: Buckets that the words of the prompt are hashed into; 0 leaves them out.
        hidden: Width of the head.
        seed: Seeds initial weights and the order of replay.
        **learning: Fields of `LearningConfig`.
    """

    def __init__(
        self,
        feature_dim: int,
        *,
        words: int = 128,
        hidden: int = 32,
        seed: int = 0,
        **learning: Any,
    ):
        self.feature_dim, self.words = feature_dim, words
        width = input_width(feature_dim, words)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, last = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        with torch.no_grad():
            # The first predictions are near one half.
            last.weight.mul_(0.1)
        super().__init__(nn.Sequential(first, nn.GELU(), last), LearningConfig(**learning), seed)
        self._shift = np.zeros(width, np.float32)
        self._scale = np.ones(width, np.float32)

    def _columns(self, anchors: Sequence[Anchor]) -> tuple[np.ndarray, ...]:
        return (input_matrix(anchors, self.feature_dim, self.words),)

    def _inputs(self, columns: Sequence[np.ndarray]) -> list[torch.Tensor]:
        # What hardly varied at first may do so later, and would then be huge.
        return [torch.from_numpy(np.clip((columns[0] - self._shift) * self._scale, -_CLIP, _CLIP))]

    def _adapt(self) -> None:
        if self._clock < _STANDARDISED_BATCHES:
            x = np.concatenate([r.columns[0] for r in (self._roots, self._prefixes) if len(r)])
            self._shift = x.mean(axis=0)
            self._scale = 1 / (x.std(axis=0) + np.float32(_LEAST_DEVIATION))

    def state_dict(self) -> dict[str, Any]:
        """Returns what `LearnedPredictor` keeps, and the standardisation."""
        return super().state_dict() | {"shift": self._shift, "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self._shift, self._scale = np.asarray(state["shift"]), np.asarray(state["scale"])
