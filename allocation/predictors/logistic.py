"""A logistic regression on the policy's hidden states that is fitted anew after each batch.

Invariant: after every `update` the weights are the optimum of a strictly convex function of what is remembered: nothing depends
on the order in which rows came, on a step size or on chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from allocation.predictor import Anchor
from allocation.predictors.inputs import input_matrix, input_width
from allocation.predictors.replay import Replay

_LEAST_DEVIATION = 1e-2
_CLIP = 5.0
_MOST_STEPS = 100


class LogisticPredictor:
    """Log-odds linear in the hidden states along the path, the words of the prompt and the counts of an anchor (ours).

    A policy that learns within a hundred updates is a moving target, and the first batches hold few outcomes. A network that
    takes some gradient steps after each batch then still says what it said at its start when it is first asked, and given more
    steps it learns single outcomes by heart (docs/when_it_pays.md). Here a Gaussian prior on the weights says how much a few
    outcomes may be believed, and the fit is complete after the first batch.

    Minimised is the cross-entropy to the tree values, a row counting `weight * age_decay**age`, all prefixes together as much
    as all roots (the prefixes of a rollout share one outcome), plus `prior / 2` times the squared norm of the weights of the
    standardised inputs.

    Args:
        feature_dim: Size of a hidden state; 0 for none.
        words: Buckets that the words of the prompt are hashed into; 0 leaves them out.
        prior: Precision of the Gaussian prior on a weight, in outcomes; a weight is of the order of its inverse root.
        age_decay: Factor in (0, 1] on what a row counts, for each policy update since it was made.
        capacity: Rows kept of roots, and of prefixes.
        warmup_roots: Root rows to be seen before the predictor is ready.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        feature_dim: int,
        *,
        words: int = 128,
        prior: float = 30.0,
        age_decay: float = 0.9,
        capacity: int = 4096,
        warmup_roots: int = 8,
    ):
        if not (prior > 0 and np.isfinite(prior)):
            raise ValueError(f"prior must be positive, got {prior}")
        if warmup_roots < 0:
            raise ValueError(f"warmup_roots must be >= 0, got {warmup_roots}")
        self.feature_dim, self.words, self.prior, self.warmup_roots = feature_dim, words, prior, warmup_roots
        width = input_width(feature_dim, words)
        self._roots, self._prefixes = Replay(capacity, age_decay), Replay(capacity, age_decay)
        self._shift, self._scale = np.zeros(width), np.ones(width)
        self._weights = np.zeros(width + 1)  # the last one is the constant
        self._clock = self._roots_seen = 0

    @property
    def ready(self) -> bool:
        """Whether `warmup_roots` root rows were seen."""
        return self._clock > 0 and self._roots_seen >= self.warmup_roots

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the predicted chance of success of each anchor, float64 [n]."""
        if not len(anchors):
            return np.zeros(0)
        rows = self._standardised(input_matrix(anchors, self.feature_dim, self.words))
        return torch.sigmoid(torch.from_numpy(rows @ self._weights)).numpy()

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Adds one batch to the memories and fits the weights to them; see `Predictor.update`.

        Returns:
            Mean cross-entropy of what is remembered after the fit, in nats, and the mean age of the rows by kind.
        """
        x = input_matrix(anchors, self.feature_dim, self.words)
        target, weight = np.asarray(values, np.float32), np.asarray(weights, np.float32)
        is_root = np.array([a.depth == 0 for a in anchors], dtype=bool)
        for replay, at in ((self._roots, is_root), (self._prefixes, ~is_root)):
            replay.add([x[at]], target[at], weight[at], self._clock)
        self._roots_seen += int(is_root.sum())
        figures = {"predictor/loss": self._fit()} | {
            f"predictor/age_of_{name}": replay.mean_age(self._clock)
            for name, replay in (("roots", self._roots), ("prefixes", self._prefixes))
        }
        self._clock += 1
        return figures

    def _standardised(self, x: np.ndarray) -> np.ndarray:
        # What hardly varied so far may do so later, and would then be huge.
        return np.concatenate([np.clip((x - self._shift) * self._scale, -_CLIP, _CLIP), np.ones((len(x), 1))], axis=1)

    def _fit(self) -> float:
        memories = [replay for replay in (self._roots, self._prefixes) if len(replay)]
        if not memories:
            return 0.0
        x = np.concatenate([replay.columns[0] for replay in memories]).astype(np.float64)
        self._shift, self._scale = x.mean(axis=0), 1 / (x.std(axis=0) + _LEAST_DEVIATION)
        counts = [replay.weights(self._clock) for replay in memories]
        outcomes = counts[0].sum()  # of the roots, if there are any
        rows = torch.from_numpy(self._standardised(x))
        target = torch.from_numpy(np.concatenate([replay.target for replay in memories]).astype(np.float64))
        count = torch.from_numpy(np.concatenate([c * (outcomes / c.sum()) for c in counts]))
        total = float(count.sum())
        weights = torch.from_numpy(self._weights.copy()).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=_MOST_STEPS, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def entropy() -> torch.Tensor:
            each = torch.nn.functional.binary_cross_entropy_with_logits(rows @ weights, target, reduction="none")
            return (count * each).sum() / total

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            found = entropy() + self.prior / (2 * total) * weights[:-1].square().sum()
            found.backward()
            return found

        optimizer.step(loss)
        self._weights = weights.detach().numpy().copy()
        with torch.no_grad():
            return float(entropy())

    def state_dict(self) -> dict[str, Any]:
        """Returns weights, standardisation, memories and counters as arrays and plain data."""
        return {
            "weights": self._weights.copy(),
            "shift": self._shift,
            "scale": self._scale,
            "roots": self._roots.state_dict(),
            "prefixes": self._prefixes.state_dict(),
            "roots_seen": self._roots_seen,
            "clock": self._clock,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: It is of a predictor of other inputs.
        """
        weights = np.asarray(state["weights"], np.float64)
        if weights.shape != self._weights.shape:
            raise ValueError(
                f"the state has {len(weights)} weights, this predictor {len(self._weights)}: it is of another model or `words`"
            )
        self._weights = weights.copy()
        self._shift, self._scale = np.asarray(state["shift"]), np.asarray(state["scale"])
        self._clock, self._roots_seen = int(state["clock"]), int(state["roots_seen"])
        self._roots.load_state_dict(state["roots"], max(self._clock - 1, 0))
        self._prefixes.load_state_dict(state["prefixes"], max(self._clock - 1, 0))
