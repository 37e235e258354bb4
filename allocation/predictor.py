"""One model that estimates the chance of success at prompts and at prefixes alike.

Invariant: a predictor informs the allocator and nothing else; no prediction ever enters a loss of the policy.

The default reads the policy's own last hidden state at the end of a prefix, which sampling yields for nothing, next to a few
counts. It is trained on bottom-up tree values (TRACE, predictor). Ours: roots and prefixes are replayed from separate
buffers, because roots are few and prefixes many and either swamps the other when they are mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from allocation.calibration import auc, brier, brier_skill
from allocation.tree import Forest, Node, Tree

NUM_COUNTS = 6


@dataclass(frozen=True, slots=True)
class Anchor:
    """What a predictor may look at.

    Attributes:
        features: Hidden state at the end of the prefix, float32 [d], or `None`.
        depth: Turns taken.
        turns_left: Turns that remain.
        tool_errors: Malformed or refused calls so far.
        successes, failures: Decayed counts of the prompt's earlier outcomes.
    """

    features: np.ndarray | None
    depth: int
    turns_left: int
    tool_errors: int
    successes: float = 0.0
    failures: float = 0.0

    def vector(self) -> np.ndarray:
        """Returns the input of the head, float32 [d + NUM_COUNTS]."""
        seen = self.successes + self.failures
        counts = np.array(
            [
                self.depth / 8,
                self.turns_left / 8,
                min(self.tool_errors, 4) / 4,
                (self.successes + 1) / (seen + 2),
                np.log1p(seen) / 3,
                float(self.depth == 0),
            ],
            dtype=np.float32,
        )
        return counts if self.features is None else np.concatenate([self.features.astype(np.float32), counts])


class Predictor(Protocol):
    """Estimates the chance of success."""

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the predicted chance of success of each anchor, float64 [n] in (0, 1)."""
        ...

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Learns from anchors with their tree values, and returns figures about the fit before and after."""
        ...

    @property
    def ready(self) -> bool:
        """Whether enough was seen to trust it; until then allocation is uniform."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns numpy arrays and plain data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        ...


class MeanPredictor:
    """Predicts the running mean of all outcomes: the baseline that a predictor has to beat.

    Args:
        decay: Factor by which older batches count less.
    """

    def __init__(self, decay: float = 0.9):
        self._decay = decay
        self._sum, self._count = 0.5, 1.0

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the same number for every anchor."""
        return np.full(len(anchors), self._sum / self._count)

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Folds in the values of one batch."""
        self._sum = self._decay * self._sum + float((weights * values).sum())
        self._count = self._decay * self._count + float(weights.sum())
        return {}

    @property
    def ready(self) -> bool:
        """Never: with one number for all there is nothing to allocate by."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Returns the two sums."""
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the two sums."""
        self._sum, self._count = float(state["sum"]), float(state["count"])


class _Replay:
    """A ring of the latest rows."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.x = np.zeros((0, 0), np.float32)
        self.y = np.zeros(0, np.float32)
        self.w = np.zeros(0, np.float32)

    def add(self, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> None:
        if len(x):
            old = self.x if len(self.x) else np.zeros((0, x.shape[1]), np.float32)
            self.x = np.concatenate([old, x])[-self.capacity :]
            self.y = np.concatenate([self.y, y])[-self.capacity :]
            self.w = np.concatenate([self.w, w])[-self.capacity :]

    def __len__(self) -> int:
        return len(self.y)


class HiddenStatePredictor:
    """A two-layer head on the policy's hidden state (TRACE, predictor).

    Args:
        feature_dim: Size of the hidden state; 0 for counts alone.
        hidden: Width of the head.
        lr: Step size of AdamW.
        steps: Gradient steps after each batch of rollouts.
        batch_size: Rows of each buffer in a step.
        capacity: Rows kept in each buffer; old rows are from old policies, so this is also the memory's length.
        loss: `mse` (paper) or `log`.
        warmup_roots: Root rows to be seen before `ready`.
        seed: Seeds initial weights and the order of replay.
    """

    def __init__(
        self,
        feature_dim: int,
        *,
        hidden: int = 64,
        lr: float = 2e-3,
        steps: int = 20,
        batch_size: int = 64,
        capacity: int = 4096,
        loss: Literal["mse", "log"] = "mse",
        warmup_roots: int = 32,
        seed: int = 0,
    ):
        self.feature_dim, self.steps, self.batch_size, self.loss = feature_dim, steps, batch_size, loss
        self.warmup_roots = warmup_roots
        self._roots_seen = 0
        self._rng = np.random.default_rng([seed, 0x7261CE])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._head = nn.Sequential(
                nn.LayerNorm(feature_dim + NUM_COUNTS),
                nn.Linear(feature_dim + NUM_COUNTS, hidden),
                nn.GELU(),
                nn.Linear(hidden, 1),
            )
        self._optimizer = torch.optim.AdamW(self._head.parameters(), lr=lr, weight_decay=1e-2)
        self._roots, self._prefixes = _Replay(capacity), _Replay(capacity)

    @property
    def ready(self) -> bool:
        """Whether `warmup_roots` root rows were seen."""
        return self._roots_seen >= self.warmup_roots

    def _inputs(self, anchors: Sequence[Anchor]) -> np.ndarray:
        # Zeros stand for a hidden state that nobody computed, such as that of a prompt too long for the model.
        x = np.zeros((len(anchors), self.feature_dim + NUM_COUNTS), np.float32)
        for row, anchor in zip(x, anchors, strict=True):
            vector = anchor.vector()
            if anchor.features is not None and len(vector) != len(row):
                got = len(vector) - NUM_COUNTS
                raise ValueError(f"the predictor was made for hidden states of size {self.feature_dim}, got {got}")
            row[-len(vector) :] = vector
        return x

    @torch.no_grad()
    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the predicted chance of success of each anchor, float64 [n]."""
        if not len(anchors):
            return np.zeros(0)
        return torch.sigmoid(self._head(torch.from_numpy(self._inputs(anchors)))[:, 0].double()).numpy()

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Adds one batch to the replay and takes `steps` gradient steps.

        Args:
            anchors: Roots (depth 0) and inner prefixes.
            values: Tree values of the anchors, float [n] in [0, 1].
            weights: Number of terminals behind each value, float [n].

        Returns:
            Mean loss over the steps.
        """
        x = self._inputs(anchors)
        y, w = values.astype(np.float32), weights.astype(np.float32)
        is_root = np.array([a.depth == 0 for a in anchors], dtype=bool)
        self._roots.add(x[is_root], y[is_root], w[is_root])
        self._prefixes.add(x[~is_root], y[~is_root], w[~is_root])
        self._roots_seen += int(is_root.sum())
        total = 0.0
        for _ in range(self.steps):
            loss = torch.zeros(())
            for replay in (self._roots, self._prefixes):
                if len(replay):
                    rows = self._rng.integers(len(replay), size=min(self.batch_size, len(replay)))
                    loss = loss + self._loss(replay, rows)
            if loss.requires_grad:
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
                total += loss.item()
        return {"predictor/loss": total / max(self.steps, 1)}

    def _loss(self, replay: _Replay, rows: np.ndarray) -> torch.Tensor:
        logit = self._head(torch.from_numpy(replay.x[rows]))[:, 0]
        target, weight = torch.from_numpy(replay.y[rows]), torch.from_numpy(replay.w[rows])
        if self.loss == "log":
            each = nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
        else:
            each = (torch.sigmoid(logit) - target) ** 2
        return (each * weight).sum() / weight.sum()

    def state_dict(self) -> dict[str, Any]:
        """Returns weights, optimiser state, replay and generator as arrays and plain data."""
        optimizer = self._optimizer.state_dict()
        return {
            "head": {k: v.numpy().copy() for k, v in self._head.state_dict().items()},
            "optimizer": {
                str(i): {k: torch.as_tensor(v).numpy().copy() for k, v in s.items()}
                for i, s in optimizer["state"].items()
            },
            "replay": {
                name: {"x": r.x, "y": r.y, "w": r.w}
                for name, r in (("roots", self._roots), ("prefixes", self._prefixes))
            },
            "roots_seen": self._roots_seen,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._head.load_state_dict({k: torch.as_tensor(v) for k, v in state["head"].items()})
        optimizer = self._optimizer.state_dict()
        # Copies: the optimiser would go on writing into the arrays that it was given.
        optimizer["state"] = {int(i): {k: torch.tensor(v) for k, v in s.items()} for i, s in state["optimizer"].items()}
        self._optimizer.load_state_dict(optimizer)
        for replay, name in ((self._roots, "roots"), (self._prefixes, "prefixes")):
            rows = state["replay"][name]
            replay.x, replay.y, replay.w = rows["x"], rows["y"], rows["w"]
        self._roots_seen = int(state["roots_seen"])
        self._rng.bit_generator.state = state["rng"]


def anchor_of(tree: Tree, node: Node, counts: tuple[float, float] = (0.0, 0.0)) -> Anchor:
    """Returns what a predictor sees of a node.

    Args:
        tree: Its tree; `tree.info["max_turns"]` gives the turn limit where the environment has one.
        node: The prefix.
        counts: Decayed successes and failures of the prompt in earlier batches.
    """
    limit = int(tree.info.get("max_turns", 0))
    return Anchor(node.features, node.depth, max(limit - node.depth, 0), node.tool_errors, *counts)


def training_set(forest: Forest) -> list[tuple[Tree, Node, float, float]]:
    """Lists the anchors of a forest with their bottom-up success value and the number of terminals below them."""
    rows = []
    for tree in forest:
        value = tree.values("success")
        leaves = np.zeros(len(tree.nodes))
        for node in reversed(tree.nodes):
            leaves[node.id] += node.terminal
            if node.parent is not None:
                leaves[node.parent] += leaves[node.id]
        rows += [
            (tree, n, float(value[n.id]), float(leaves[n.id]))
            for n in tree.nodes
            if not n.terminal and n.children and not np.isnan(value[n.id])
        ]
    return rows


def fit_report(predicted: np.ndarray, values: np.ndarray, weights: np.ndarray, base: float) -> dict[str, float]:
    """Compares predictions made before training with what happened.

    Args:
        predicted: Predictions, float [n].
        values: Tree values, float [n].
        weights: Terminals behind each value, float [n].
        base: The running mean before this batch, the baseline of the skill score.

    Returns:
        `brier`, `skill` (1 - brier / brier of the running mean) and `auc` (values above one half against the rest).
    """
    skill = brier_skill(predicted, values, reference=np.full_like(predicted, base), weights=weights)
    # A perfect running mean leaves nothing to beat it by.
    report = {
        "predictor/brier": brier(predicted, values, weights),
        "predictor/skill": 0.0 if np.isnan(skill) else skill,
    }
    labels = values > 0.5
    if labels.any() and not labels.all():
        report["predictor/auc"] = auc(predicted, labels)
    return report
