"""What a predictor of success is, what it may look at, and what it is taught.

Invariant: a predictor informs the allocator and nothing else; no prediction ever enters a loss of the policy. Nothing that an
anchor says was decided after its prefix ended, but for `tree_successes` and `tree_failures`, which are zero unless a method
that looks at outcomes anyway asks for them.

One model serves prompts and prefixes alike (TRACE, predictor). The models are in `allocation.predictors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from allocation.calibration import auc, brier, brier_skill, expected_calibration_error
from allocation.contrast import FloatArray
from allocation.tree import Forest, Node, Tree

NUM_COUNTS = 12
"""Figures of an anchor that are not its hidden state; see `counts_matrix`."""

DEPTH_GROUPS: tuple[tuple[str, int, int], ...] = (
    ("depth_0", 0, 0),
    ("depth_1", 1, 1),
    ("depth_2_3", 2, 3),
    ("depth_4_up", 4, 1 << 30),
)
"""Depths that are reported together: name, least and greatest depth."""

_FEWEST_ROWS = 8


class Anchor(NamedTuple):
    """What a predictor may look at.

    Attributes:
        features: Hidden state at the end of the prefix, float32 [d], or `None`.
        depth: Turns taken.
        turns_left: Turns that remain.
        tool_errors: Malformed or refused calls so far.
        successes: Decayed successes of the prompt in earlier batches.
        failures: Likewise its failures.
        tree_successes: Successes of this tree's root rollouts that did not pass through the prefix; 0 unless asked for, since
            an allocation that looks at them is not exogenous.
        tree_failures: Likewise failures.
        last_logprob: Mean log-probability of the tokens of the latest action, in nats; 0 at roots and without tokens.
        least_logprob: The least of those means along the path.
        total_logprob: The sum of those means along the path.
        path_features: Mean of the hidden states at the ends of the prefixes along the path, this one included, float32 [d];
            `None` if there are none.
        prompt: The first observation as text.
        render: Gives `text` when it is asked for.
    """

    features: np.ndarray | None
    depth: int
    turns_left: int
    tool_errors: int
    successes: float = 0.0
    failures: float = 0.0
    tree_successes: float = 0.0
    tree_failures: float = 0.0
    last_logprob: float = 0.0
    least_logprob: float = 0.0
    total_logprob: float = 0.0
    path_features: np.ndarray | None = None
    prompt: str = ""
    render: Callable[[], tuple[str, ...]] = tuple

    @property
    def text(self) -> tuple[str, ...]:
        """The prompt, then action and observation of each turn. Rendered at each call, so that most predictors pay nothing."""
        return self.render()


def counts_matrix(anchors: Sequence[Anchor]) -> np.ndarray:
    """Returns what anchors are beside hidden states and text, float32 [n, NUM_COUNTS], each figure of the order of one.

    Depth and turns left in eighths, tool errors (up to four) in fourths, whether it is a root; then, of the prompt's earlier
    outcomes and of this tree's other root rollouts each, the success rate with one success and one failure added, and a third
    of the logarithm of one plus the number of outcomes; then the log-probabilities, latest, least, sum and mean over turns.
    """
    raw = np.array([a[1:11] for a in anchors], dtype=np.float64).reshape(len(anchors), 10)
    depth, left, errors, s, f, ts, tf, last, least, total = raw.T
    seen, tree_seen = s + f, ts + tf
    columns = (
        depth / 8,
        left / 8,
        np.minimum(errors, 4) / 4,
        depth == 0,
        (s + 1) / (seen + 2),
        np.log1p(seen) / 3,
        (ts + 1) / (tree_seen + 2),
        np.log1p(tree_seen) / 3,
        last,
        least,
        total,
        total / np.maximum(depth, 1),
    )
    return np.stack(columns, axis=1).astype(np.float32)


class Predictor(Protocol):
    """Estimates the chance of success."""

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the predicted chance of success of each anchor, float64 [n] in (0, 1)."""
        ...

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Learns from the anchors of one batch, after which the policy was updated.

        Args:
            anchors: Roots (depth 0) and inner prefixes; they are not kept.
            values: Tree values of the anchors, float [n] in [0, 1].
            weights: Number of terminals behind each value, float [n].

        Returns:
            Figures for the log.
        """
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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def path_text(tree: Tree, node: Node) -> tuple[str, ...]:
    """Returns the prompt, then action and observation of each turn up to a node; what is no text as its `repr`."""
    path = tree.path(node)
    parts = [path[0].observation]
    for step in path[1:]:
        parts += [step.action, step.observation]
    return tuple(map(_text, parts))


def anchor_of(
    tree: Tree,
    node: Node,
    counts: tuple[float, float] = (0.0, 0.0),
    tree_counts: tuple[float, float] = (0.0, 0.0),
) -> Anchor:
    """Returns what a predictor sees of a node. For many nodes `anchors_of` is the faster way to the same.

    Args:
        tree: Its tree; `tree.info["max_turns"]` gives the turn limit where the environment has one.
        node: The prefix.
        counts: Decayed successes and failures of the prompt in earlier batches.
        tree_counts: Successes and failures of the tree's root rollouts that did not pass through the node (`other_outcomes`).
    """
    path = tree.path(node)
    states = [n.features for n in path if n.features is not None]
    sure = [float(n.sample.logprobs.mean()) for n in path if n.sample is not None and len(n.sample.logprobs)]
    total = 0.0
    for value in sure:
        total += value
    return Anchor(
        node.features,
        node.depth,
        max(int(tree.info.get("max_turns", 0)) - node.depth, 0),
        node.tool_errors,
        *counts,
        *tree_counts,
        sure[-1] if sure else 0.0,
        min(sure, default=0.0),
        total,
        _mean(states),
        _text(tree.root.observation),
        partial(path_text, tree, node),
    )


def _mean(states: Sequence[np.ndarray]) -> np.ndarray | None:
    if not states:
        return None
    total = states[0].astype(np.float32)
    for state in states[1:]:
        total = total + state
    return total / np.float32(len(states))


class _PathFigures:
    """What the anchors of one tree share: figures that run along the path, each computed once a node."""

    def __init__(self, tree: Tree):
        self.tree = tree
        self.limit = int(tree.info.get("max_turns", 0))
        self.prompt = _text(tree.root.observation)
        self._known: dict[int, tuple[float, float, float, np.ndarray | None, int]] = {}

    def of(self, node: Node) -> tuple[float, float, float, np.ndarray | None, int]:
        """Returns latest, least and total log-probability, and sum and number of hidden states."""
        missing: list[Node] = []
        at: Node | None = node
        while at is not None and at.id not in self._known:
            missing.append(at)
            at = None if at.parent is None else self.tree.nodes[at.parent]
        found = (0.0, 0.0, 0.0, None, 0) if at is None else self._known[at.id]
        for step in reversed(missing):
            last, least, total, states, count = found
            if step.sample is not None and len(step.sample.logprobs):
                last = float(step.sample.logprobs.mean())
                # Where no turn before this one had tokens, the zeros are no log-probabilities.
                least, total = (min(least, last) if total else last), total + last
            if step.features is not None:
                new = step.features.astype(np.float32)
                states, count = (new if states is None else states + new), count + 1
            self._known[step.id] = found = (last, least, total, states, count)
        return found

    def anchor(self, node: Node, counts: tuple[float, float], tree_counts: tuple[float, float]) -> Anchor:
        last, least, total, states, number = self.of(node)
        return Anchor(
            node.features,
            node.depth,
            max(self.limit - node.depth, 0),
            node.tool_errors,
            *counts,
            *tree_counts,
            last,
            least,
            total,
            None if states is None else states / np.float32(number),
            self.prompt,
            partial(path_text, self.tree, node),
        )


def anchors_of(
    trees: Sequence[Tree],
    nodes: Sequence[Node],
    counts: Callable[[str], tuple[float, float]],
    *,
    tree_outcomes: bool = False,
) -> list[Anchor]:
    """Returns what a predictor sees of nodes.

    Args:
        trees: The tree of each node; nodes of one tree stand together.
        nodes: Roots or prefixes.
        counts: Gives a prompt's decayed successes and failures in earlier batches by its key.
        tree_outcomes: Whether anchors know how the other root rollouts of their tree ended.
    """
    anchors = []
    figures: _PathFigures | None = None
    others: FloatArray | None = None
    for tree, node in zip(trees, nodes, strict=True):
        if figures is None or figures.tree is not tree:
            figures, seen = _PathFigures(tree), counts(tree.key)
            others = other_outcomes(tree) if tree_outcomes else None
        known = (0.0, 0.0) if others is None else (float(others[node.id, 0]), float(others[node.id, 1]))
        anchors.append(figures.anchor(node, seen, known))
    return anchors


def other_outcomes(tree: Tree) -> FloatArray:
    """Counts, for each node, the outcomes of root rollouts that did not pass through it; zeros at the root.

    Returns:
        Float64 [nodes, 2], successes and failures.
    """
    below = np.zeros((len(tree.nodes), 2))
    for node in reversed(tree.nodes):
        if node.terminal and node.origin == "root":
            below[node.id, 0 if node.is_correct else 1] += 1
        if node.parent is not None:
            below[node.parent] += below[node.id]
    return below[0] - below


def training_set(forest: Forest) -> list[tuple[Tree, Node, float, float]]:
    """Lists the anchors of a forest with their bottom-up success value and the number of terminals below them."""
    rows = []
    for tree in forest:
        nodes = tree.nodes
        value = tree.values("success").tolist()
        leaves = [0.0] * len(nodes)
        for node in reversed(nodes):
            leaves[node.id] += node.terminal
            if node.parent is not None:
                leaves[node.parent] += leaves[node.id]
        rows += [(tree, n, value[n.id], leaves[n.id]) for n in nodes if leaves[n.id] and not n.terminal]
    return rows


def fit_report(
    predicted: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    base: float,
    depths: np.ndarray | None = None,
) -> dict[str, float]:
    """Compares predictions made before training with what happened.

    Args:
        predicted: Predictions, float [n].
        values: Tree values, float [n].
        weights: Terminals behind each value, float [n].
        base: The running mean before this batch, the baseline of the skill score.
        depths: Turns taken at each anchor, int [n]; `None` for no figures by depth.

    Returns:
        `predictor/brier`, `skill` (1 - brier / brier of the running mean), `ece` and `auc` (values above one half against the
        rest), each over all anchors; `skill` and `auc` also by `DEPTH_GROUPS`, where there are at least 8 anchors.
    """
    report = {
        "predictor/brier": brier(predicted, values, weights),
        "predictor/ece": expected_calibration_error(predicted, values),
        **_skill_and_auc(predicted, values, weights, base, ""),
    }
    if depths is not None:
        for name, low, high in DEPTH_GROUPS:
            at = (depths >= low) & (depths <= high)
            if at.sum() >= _FEWEST_ROWS:
                report |= _skill_and_auc(predicted[at], values[at], weights[at], base, f"/{name}")
    return report


def _skill_and_auc(
    predicted: np.ndarray, values: np.ndarray, weights: np.ndarray, base: float, where: str
) -> dict[str, float]:
    skill = brier_skill(predicted, values, reference=np.full_like(predicted, base), weights=weights)
    # A perfect running mean leaves nothing to beat it by.
    report = {f"predictor/skill{where}": 0.0 if np.isnan(skill) else skill}
    labels = values > 0.5
    if labels.any() and not labels.all():
        report[f"predictor/auc{where}"] = auc(predicted, labels)
    return report
