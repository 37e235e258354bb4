"""What predictors that learn by gradient steps share: replay, steps, readiness, state.

Invariant: all that the next prediction depends on is in `state_dict`; a restored predictor goes on bit for bit. Nothing is
drawn from a global generator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from allocation.predictor import Anchor
from allocation.predictors.replay import Replay


@dataclass(frozen=True)
class LearningConfig:
    """Settings of a predictor that learns.

    Attributes:
        lr: Step size of AdamW.
        weight_decay: Of AdamW.
        steps: Gradient steps after each batch of rollouts.
        batch_size: Rows of each memory (roots, prefixes) in a step.
        capacity: Rows kept in each memory; old rows are from old policies.
        age_decay: Factor in (0, 1] on a row's chance to be drawn, for each policy update since it was made.
        loss: `mse` (paper) or `log`.
        warmup_roots: Root rows to be seen before the predictor is ready.

    Raises:
        ValueError: A number is out of range or the loss unknown.
    """

    lr: float = 3e-4
    weight_decay: float = 1e-2
    steps: int = 20
    batch_size: int = 128
    capacity: int = 4096
    age_decay: float = 0.99
    loss: Literal["mse", "log"] = "mse"
    warmup_roots: int = 32

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.weight_decay >= 0):
            raise ValueError(f"need lr > 0 and weight_decay >= 0, got {self.lr} and {self.weight_decay}")
        if self.steps < 0 or self.batch_size < 1 or self.capacity < 1 or self.warmup_roots < 0:
            raise ValueError(
                f"need steps >= 0, batch_size >= 1, capacity >= 1 and warmup_roots >= 0, got {self.steps}, "
                f"{self.batch_size}, {self.capacity} and {self.warmup_roots}"
            )
        if not 0 < self.age_decay <= 1:
            raise ValueError(f"age_decay must lie in (0, 1], got {self.age_decay}")
        if self.loss not in ("mse", "log"):
            raise ValueError(f"unknown loss {self.loss!r}; known: mse, log")


class LearnedPredictor(ABC):
    """A network trained on tree values (TRACE, predictor).

    Ours: roots and prefixes are drawn from separate memories in equal numbers, because roots are few and prefixes many and
    either swamps the other when they are mixed; and older rows are drawn less often, because they tell of older policies.

    Args:
        network: Gives a logit for each row, float [n, 1]; made by the subclass from a generator of its own.
        config: See `LearningConfig`.
        seed: Seeds the order of replay.
    """

    def __init__(self, network: nn.Module, config: LearningConfig, seed: int):
        self.config = config
        self._network = network
        self._optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self._rng = np.random.default_rng([seed, 0x7261CE])
        self._roots = Replay(config.capacity, config.age_decay)
        self._prefixes = Replay(config.capacity, config.age_decay)
        self._clock = 0
        self._roots_seen = 0

    @abstractmethod
    def _columns(self, anchors: Sequence[Anchor]) -> tuple[np.ndarray, ...]:
        """Returns what is kept of anchors, arrays with one entry an anchor each."""

    def _inputs(self, columns: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Returns the columns of some rows as the network is given them."""
        return [torch.from_numpy(column) for column in columns]

    @abstractmethod
    def _adapt(self) -> None:
        """Learns what is learned otherwise than by gradient steps, after a batch has joined the memories."""

    @property
    def ready(self) -> bool:
        """Whether `warmup_roots` root rows were seen."""
        return self._clock > 0 and self._roots_seen >= self.config.warmup_roots

    @torch.no_grad()
    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the predicted chance of success of each anchor, float64 [n]."""
        if not len(anchors):
            return np.zeros(0)
        logit = self._network(*self._inputs(self._columns(anchors)))[:, 0]
        return torch.sigmoid(logit.double()).numpy()

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Adds one batch to the memories and takes `steps` gradient steps; see `Predictor.update`.

        Returns:
            Mean loss over the steps, and the mean age of the rows drawn, in policy updates, by kind.
        """
        columns = self._columns(anchors)
        target, weight = np.asarray(values, np.float32), np.asarray(weights, np.float32)
        is_root = np.array([a.depth == 0 for a in anchors], dtype=bool)
        for replay, at in ((self._roots, is_root), (self._prefixes, ~is_root)):
            replay.add([c[at] for c in columns], target[at], weight[at], self._clock)
        self._roots_seen += int(is_root.sum())
        self._adapt()
        total = 0.0
        if len(self._roots) or len(self._prefixes):
            for _ in range(self.config.steps):
                total += self._step()
        ages = {
            f"predictor/age_of_{name}": replay.mean_age(self._clock)
            for name, replay in (("roots", self._roots), ("prefixes", self._prefixes))
        }
        self._clock += 1
        return {"predictor/loss": total / max(self.config.steps, 1)} | ages

    def _step(self) -> float:
        """Takes one step on rows of both memories in one pass, each weighted to a mean of its own; returns their sum."""
        drawn = [
            (replay, replay.draw(self._rng, self.config.batch_size))
            for replay in (self._roots, self._prefixes)
            if len(replay)
        ]
        columns = [np.concatenate([r.columns[i][at] for r, at in drawn]) for i in range(len(drawn[0][0].columns))]
        target = torch.from_numpy(np.concatenate([r.target[at] for r, at in drawn]))
        weight = torch.from_numpy(np.concatenate([r.weight[at] / r.weight[at].sum() for r, at in drawn]))
        logit = self._network(*self._inputs(columns))[:, 0]
        if self.config.loss == "log":
            each = nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
        else:
            each = (torch.sigmoid(logit) - target) ** 2
        loss = (each * weight).sum()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Returns weights, optimiser state, memories, generator and counters as arrays and plain data."""
        return {
            "network": {k: v.numpy().copy() for k, v in self._network.state_dict().items()},
            "optimizer": {
                str(i): {k: torch.as_tensor(v).numpy().copy() for k, v in s.items()}
                for i, s in self._optimizer.state_dict()["state"].items()
            },
            "roots": self._roots.state_dict(),
            "prefixes": self._prefixes.state_dict(),
            "roots_seen": self._roots_seen,
            "clock": self._clock,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            RuntimeError: It is of a network of another shape.
        """
        self._network.load_state_dict({k: torch.as_tensor(v) for k, v in state["network"].items()})
        optimizer = self._optimizer.state_dict()
        # Copies: the optimiser would go on writing into the arrays that it was given.
        optimizer["state"] = {int(i): {k: torch.tensor(v) for k, v in s.items()} for i, s in state["optimizer"].items()}
        self._optimizer.load_state_dict(optimizer)
        self._clock, self._roots_seen = int(state["clock"]), int(state["roots_seen"])
        # The rows' chances are those of the last update.
        self._roots.load_state_dict(state["roots"], max(self._clock - 1, 0))
        self._prefixes.load_state_dict(state["prefixes"], max(self._clock - 1, 0))
        self._rng.bit_generator.state = state["rng"]
