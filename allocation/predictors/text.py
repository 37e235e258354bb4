"""A predictor that reads text, for engines that give no hidden states.

Invariant: its memory is bounded whatever texts come: a prefix is kept as the buckets of the first words of its prompt and of
its latest turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from allocation.predictor import NUM_COUNTS, Anchor, counts_matrix
from allocation.predictors.hashing import word_ids
from allocation.predictors.learned import LearnedPredictor, LearningConfig


class _Encoder(nn.Module):
    """Mean word embedding of each part, attention over the parts, a two-layer head."""

    def __init__(self, buckets: int, parts: int, width: int, hidden: int):
        super().__init__()
        # Bucket 0 stands for no word.
        self.words = nn.EmbeddingBag(buckets + 1, width, mode="mean", padding_idx=0)
        self.places = nn.Parameter(0.1 * torch.randn(parts, width))
        self.score = nn.Linear(width, 1)
        last = nn.Linear(hidden, 1)
        self.head = nn.Sequential(nn.Linear(2 * width + NUM_COUNTS, hidden), nn.GELU(), last)
        with torch.no_grad():
            self.words.weight.mul_(0.3)
            last.weight.mul_(0.1)

    def forward(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Returns logits [n, 1] for word buckets [n, parts, words] and counts [n, NUM_COUNTS]."""
        some = ids[..., 0] > 0
        parts = self.words(ids.flatten(0, 1).int()).unflatten(0, some.shape)
        score = self.score(torch.tanh(parts + self.places))[..., 0]
        # Without any words at all the weights are even and the parts zeros.
        weight = torch.softmax(score.masked_fill(~some, -1e4), -1)
        pooled = (weight[..., None] * (parts + self.places * some[..., None])).sum(-2)
        return self.head(torch.cat([parts[:, 0], pooled, counts], -1))


class TextPredictor(LearnedPredictor):
    """A small encoder of its own over the text of a prefix: hashed words, a mean for each part, attention over the parts.

    The parts are the prompt and the latest actions and observations. Beside them it reads the figures of `counts_matrix`.

    Args:
        buckets: Buckets that words are hashed into, at most 32,767.
        width: Size of a word's embedding.
        turns: Latest turns that are read.
        words: Words that are read of each part.
        hidden: Width of the head.
        seed: Seeds initial weights and the order of replay.
        **learning: Fields of `LearningConfig`; unless given, `lr` is 1e-3, since few of the steps move any one embedding, and
            `batch_size` 64.
    """

    def __init__(
        self,
        *,
        buckets: int = 1024,
        width: int = 16,
        turns: int = 2,
        words: int = 24,
        hidden: int = 32,
        seed: int = 0,
        **learning: Any,
    ):
        if not 1 <= buckets <= np.iinfo(np.int16).max:
            raise ValueError(f"buckets must be between 1 and {np.iinfo(np.int16).max}, got {buckets}")
        if turns < 0 or words < 1:
            raise ValueError(f"need turns >= 0 and words >= 1, got {turns} and {words}")
        self.buckets, self.turns, self.words = buckets, turns, words
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Encoder(buckets, 1 + 2 * turns, width, hidden)
        super().__init__(network, LearningConfig(**{"lr": 1e-3, "batch_size": 64, **learning}), seed)

    def _columns(self, anchors: Sequence[Anchor]) -> tuple[np.ndarray, ...]:
        ids = np.zeros((len(anchors), 1 + 2 * self.turns, self.words), np.int16)
        for row, anchor in zip(ids, anchors, strict=True):
            text = anchor.text
            latest = text[1:][len(text[1:]) - 2 * self.turns :] if len(text) > 2 * self.turns else text[1:]
            # The latest turn has the last places, so that a place means how long ago a turn was.
            first = row.shape[0] - len(latest)
            for place, part in ((0, text[0] if text else ""), *enumerate(latest, first)):
                found = word_ids(part, self.buckets)[: self.words]
                row[place, : len(found)] = found + 1
        return ids, counts_matrix(anchors)

    def _adapt(self) -> None:
        """Nothing: embeddings learn their own scale."""
