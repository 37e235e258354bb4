"""How many tokens a rollout is expected to take, from a prompt or from an inner prefix to its end.

Invariant: every expected cost is finite and at least one token, and a function of batches that were learned from; nothing is
random, and nothing that happened after a prefix is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from allocation.contrast import FloatArray
from allocation.roots import BoolArray
from allocation.tree import Forest, Node, Tree

RIDGE = 50.0
"""Penalty on the squared coefficients, in rollouts."""

COEFFICIENT_DECAY = 0.95
MEAN_DECAY = 0.9
"""Factors by which older batches count less, for the coefficients and for the means of a depth and of a prompt."""

PRIOR_ROLLOUTS = 2.0
"""Weight of the shallower depth's mean in the mean of a depth, and of the mean of all prompts in that of a prompt."""

LARGEST_STATE = 256
"""Hidden states longer than this are projected to this many figures, or the closed form would cost too much."""

_NUM_FIGURES = 5
_SPREAD = (0.1, 10.0)


class CostModel:
    """Expected generated tokens of a rollout, learned from finished forests in closed form.

    The mean of its depth, times one plus a ridge regression on the turns left, the depth, the tool errors, the logarithm of the
    prompt's earlier root rollouts' tokens over the mean, and the hidden state scaled to unit mean square, where there is one.
    The regression is on tokens relative to the mean of the depth, so that shrinking it shrinks to that mean. Prompts and
    prefixes have coefficients of their own. Chosen by the error on batches not yet learned from: docs/algorithm.md section 2.

    What a rollout costs are the tokens generated; what has to be prefilled is not counted. An edge without tokens counts as
    one, so that a policy without tokens is charged by the turn.

    Attributes:
        ready: Whether a batch was learned from; until then all anchors cost 1.
    """

    def __init__(self) -> None:
        self.ready = False
        self._clock = 0
        self._depth_sum, self._depth_count = np.zeros(0), np.zeros(0)
        self._prompts: dict[str, tuple[float, float, int]] = {}  # decayed sum over mean, decayed count, clock
        self._state_dim = 0
        self._gram = np.zeros((2, _NUM_FIGURES, _NUM_FIGURES))
        self._moment = np.zeros((2, _NUM_FIGURES))
        self._coefficients = np.zeros((2, _NUM_FIGURES))

    def predict(self, trees: Sequence[Tree], nodes: Sequence[Node]) -> FloatArray:
        """Returns the expected tokens of a rollout from each anchor to its end, float64 [n], at least 1.

        Args:
            trees: The tree of each anchor.
            nodes: Roots or inner prefixes.

        Raises:
            ValueError: The hidden states are of another length than those learned from.
        """
        if not self.ready:
            return np.ones(len(nodes))
        return self._predict(self._inputs(trees, nodes), np.array([n.depth for n in nodes], dtype=np.int64))

    def update(self, forest: Forest) -> dict[str, float]:
        """Learns from a finished batch.

        Returns:
            Errors of the predictions that the batch would have met, had the policy not moved, each over anchors weighted by the
            rollouts behind them: `cost/bias` (predicted over observed), `cost/error` (mean absolute error over mean), and
            `cost/skill_of_roots`, `cost/skill_of_prefixes` (the share of the squared error of the mean by depth that is gone);
            and the observed `cost/root_tokens` of a rollout and `cost/prefix_tokens` of the rest of one. Nothing of a forest
            without terminals.
        """
        rows = [(tree, *row) for tree in forest for row in _tokens_to_end(tree)]
        if not rows:
            return {}
        trees, nodes = [row[0] for row in rows], [row[1] for row in rows]
        tokens, weight = np.array([row[2] for row in rows]), np.array([row[3] for row in rows])
        depth = np.array([n.depth for n in nodes], dtype=np.int64)
        is_root = depth == 0
        inputs = self._inputs(trees, nodes)
        report = {
            f"cost/{name}_tokens": float(np.average(tokens[at], weights=weight[at]))
            for name, at in (("root", is_root), ("prefix", ~is_root))
            if at.any()
        }
        if self.ready:
            report |= _report(self._predict(inputs, depth), self._means(depth), tokens, weight, is_root)

        size = max(int(depth.max()) + 1, self._depth_sum.size)
        for name, values in (("_depth_sum", weight * tokens), ("_depth_count", weight)):
            old = np.zeros(size)
            old[: getattr(self, name).size] = getattr(self, name)
            setattr(self, name, MEAN_DECAY * old + np.bincount(depth, weights=values, minlength=size))
        mean = self._means(depth)
        for head, at in enumerate((is_root, ~is_root)):
            x = inputs[at]
            weighted = x * weight[at, None]
            self._gram[head] = COEFFICIENT_DECAY * self._gram[head] + weighted.T @ x
            self._moment[head] = COEFFICIENT_DECAY * self._moment[head] + weighted.T @ (tokens[at] / mean[at] - 1.0)
            ridge = RIDGE * np.eye(x.shape[1])
            self._coefficients[head] = np.linalg.solve(self._gram[head] + ridge, self._moment[head])
        self._clock += 1
        for i in np.flatnonzero(is_root).tolist():
            total, count = self._prompt(trees[i].key)
            relative = float(weight[i] * tokens[i] / mean[i])
            self._prompts[trees[i].key] = (total + relative, count + float(weight[i]), self._clock)
        self.ready = True
        return report

    def _predict(self, inputs: FloatArray, depth: np.ndarray) -> FloatArray:
        factor = 1.0 + np.einsum("ij,ij->i", inputs, self._coefficients[(depth > 0).astype(np.int64)])
        return np.maximum(self._means(depth) * np.clip(factor, *_SPREAD), 1.0)

    def _means(self, depth: np.ndarray) -> FloatArray:
        """Mean tokens from each depth to the end; of a depth that was never seen, that of the deepest."""
        means, above = np.empty(self._depth_sum.size), None
        for d, (total, count) in enumerate(zip(self._depth_sum.tolist(), self._depth_count.tolist(), strict=True)):
            prior = 0.0 if above is None else PRIOR_ROLLOUTS
            above = max((total + prior * (above or 0.0)) / (count + prior), 1.0)
            means[d] = above
        return means[np.minimum(depth, means.size - 1)]

    def _prompt(self, key: str) -> tuple[float, float]:
        """A prompt's decayed sum of tokens over the mean, and its decayed number of root rollouts."""
        total, count, stamp = self._prompts.get(key, (0.0, 0.0, 0))
        factor = MEAN_DECAY ** (self._clock - stamp)
        return total * factor, count * factor

    def _inputs(self, trees: Sequence[Tree], nodes: Sequence[Node]) -> FloatArray:
        """What the regression sees of anchors, float64 [n, figures + hidden state]."""
        figures = np.ones((len(nodes), _NUM_FIGURES))
        known: dict[str, float] = {}
        for i, (tree, node) in enumerate(zip(trees, nodes, strict=True)):
            if tree.key not in known:
                total, count = self._prompt(tree.key)
                known[tree.key] = math.log((total + PRIOR_ROLLOUTS) / (count + PRIOR_ROLLOUTS))
            left = max(int(tree.info.get("max_turns", 0)) - node.depth, 0)
            figures[i, 1:] = known[tree.key], min(node.tool_errors, 4) / 4, left / 8, node.depth / 8
        lengths = {n.features.size for n in nodes if n.features is not None}
        if not self._state_dim and lengths:
            self._grow(max(lengths))
        if lengths - {self._state_dim}:
            raise ValueError(
                f"the cost model has learned from hidden states of length {self._state_dim}, got "
                f"{sorted(lengths - {self._state_dim})}: start with a fresh model, or load no state"
            )
        states = np.zeros((len(nodes), self._state_dim))
        for i, node in enumerate(nodes):
            if node.features is not None and np.isfinite(node.features).all():
                states[i] = node.features
        if self._state_dim > LARGEST_STATE:
            states = states @ _projection(self._state_dim)
        states /= np.maximum(np.sqrt((states**2).mean(axis=1, keepdims=True)), 1e-12) if states.size else 1.0
        return np.concatenate([figures, states], axis=1)

    def _grow(self, state_dim: int) -> None:
        """Makes room for hidden states; what was learned without them stays."""
        self._state_dim = state_dim
        more = min(state_dim, LARGEST_STATE)
        self._gram = np.pad(self._gram, ((0, 0), (0, more), (0, more)))
        self._moment = np.pad(self._moment, ((0, 0), (0, more)))
        self._coefficients = np.pad(self._coefficients, ((0, 0), (0, more)))

    def state_dict(self) -> dict[str, Any]:
        """Returns all that was learned, as arrays and plain data."""
        return {
            "clock": self._clock,
            "ready": self.ready,
            "depth_sum": self._depth_sum.copy(),
            "depth_count": self._depth_count.copy(),
            "prompts": {key: list(entry) for key, entry in self._prompts.items()},
            "state_dim": self._state_dim,
            "gram": self._gram.copy(),
            "moment": self._moment.copy(),
            "coefficients": self._coefficients.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._clock, self.ready, self._state_dim = int(state["clock"]), bool(state["ready"]), int(state["state_dim"])
        self._depth_sum, self._depth_count, self._gram, self._moment, self._coefficients = (
            np.array(state[name], dtype=np.float64)
            for name in ("depth_sum", "depth_count", "gram", "moment", "coefficients")
        )
        self._prompts = {key: (float(s), float(c), int(t)) for key, (s, c, t) in state["prompts"].items()}


def tokens_of(node: Node) -> int:
    """Returns the tokens generated on the edge into a node; 1 for a turn of a policy without tokens."""
    return 1 if node.sample is None else len(node.sample.action_ids)


def _tokens_to_end(tree: Tree) -> list[tuple[Node, float, float]]:
    """Each root or inner prefix with finished rollouts below: the mean tokens to the end, and the number of terminals.

    The mean is over children, as the tree's values are: many continuations at one prefix do not drown the others.
    """
    tokens, ends = np.zeros(len(tree.nodes)), np.zeros(len(tree.nodes))
    rows = []
    for node in reversed(tree.nodes):
        if node.terminal:
            ends[node.id] = 1.0
            continue
        below = [c for c in node.children if ends[c]]
        if below:
            tokens[node.id] = sum(tokens_of(tree.nodes[c]) + tokens[c] for c in below) / len(below)
            ends[node.id] = sum(ends[c] for c in below)
            rows.append((node, float(tokens[node.id]), float(ends[node.id])))
    return rows[::-1]


def _projection(dim: int) -> FloatArray:
    """A fixed random projection of hidden states; distances survive it (Johnson and Lindenstrauss)."""
    return np.random.default_rng(dim).standard_normal((dim, LARGEST_STATE)) / math.sqrt(LARGEST_STATE)


def _report(
    predicted: FloatArray, mean: FloatArray, tokens: FloatArray, weight: FloatArray, is_root: BoolArray
) -> dict[str, float]:
    total = float((weight * tokens).sum())
    report = {
        "cost/bias": float((weight * predicted).sum()) / total,
        "cost/error": float((weight * np.abs(predicted - tokens)).sum()) / total,
    }
    for name, at in (("roots", is_root), ("prefixes", ~is_root)):
        base = float((weight * (mean - tokens) ** 2)[at].sum())
        if base > 0.0:
            report[f"cost/skill_of_{name}"] = 1.0 - float((weight * (predicted - tokens) ** 2)[at].sum()) / base
    return report
