"""Dense forests: so many recorded rollouts of a few prompts that values and the policy gradient are nearly known.

Invariant: what was recorded does not change and what is derived from it is derived here, once; nothing in a file is ever
executed, and a file that is not whole is not loaded.

A prompt has *spines*, root rollouts drawn independently, and at each inner prefix of each spine *continuations* drawn from
there. Apart from those, *reference* rollouts were drawn from each prompt; they are not in the record themselves. The true
gradient was estimated from them alone, so that a forest replayed from the record is independent of its noise.

Nodes are turns, numbered so that a parent comes before its children; roots are prompts, not nodes. Every recorded edge has a
*score*, the gradient of the log-probability of its action's tokens with respect to all weights; identical edges (the same
tokens after the same tokens) share one row of scores. Scores are kept as their inner product with the true gradient and their
squared norm, both exact, and a count sketch (Charikar et al., 2002) with `sketch.shape[1]` buckets, from which norms and inner
products of sums are estimated without bias.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from allocation.arena.intervals import proportion_interval
from allocation.contrast import FloatArray
from allocation.roots import BoolArray, IntArray

FORMAT = "dense forest"
VERSION = 1
MID = (0.2, 0.8)
"""Values within these bounds, both included, are *mid*: a rollout from there is likely to end either way."""

_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    # name: (kinds of dtype, axes); axes of one name must agree in size.
    "keys": ("U", ("prompts",)),
    "hops": ("i", ("prompts",)),
    "prompt_tokens": ("i", ("prompts",)),
    "reference_successes": ("i", ("prompts",)),
    "reference_count": ("i", ("prompts",)),
    "root_features": ("f", ("prompts", "features")),
    "prompt": ("i", ("nodes",)),
    "parent": ("i", ("nodes",)),
    "rollout": ("i", ("nodes",)),
    "continuation": ("b", ("nodes",)),
    "terminated": ("b", ("nodes",)),
    "truncated": ("b", ("nodes",)),
    "is_correct": ("b", ("nodes",)),
    "tool_error": ("b", ("nodes",)),
    "reward": ("f", ("nodes",)),
    "action_tokens": ("i", ("nodes",)),
    "context_tokens": ("i", ("nodes",)),
    "edge_row": ("i", ("nodes",)),
    "features": ("f", ("nodes", "features")),
    "dot": ("f", ("edges",)),
    "norm2": ("f", ("edges",)),
    "entropy": ("f", ("edges",)),
    "sketch": ("i", ("edges", "buckets")),
    "sketch_scale": ("f", ("edges",)),
}


@dataclass(frozen=True, eq=False, slots=True)
class Values:
    """Chances of success with 95 % Wilson intervals.

    Attributes:
        value: float64 [n]; NaN where nothing is known.
        low, high: Ends of the interval, float64 [n].
        count: Rollouts that it was estimated from, int64 [n].
    """

    value: FloatArray
    low: FloatArray
    high: FloatArray
    count: IntArray


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a prefix stage can pay (docs/algorithm.md, "When the prefix stage can pay").

    Attributes:
        failed: Failed spines.
        with_mid_prefix: Share of them that hold a mid-value prefix.
        while_root_is_not_mid: Share of them that hold one while the prompt's own value is not mid; under about 20 % expect
            nothing from the prefix stage.
        interval: 95 % Wilson interval of `while_root_is_not_mid`. Spines of one prompt are correlated: it is too narrow.
        flips: Share of continuations that end otherwise than the spine which they leave.
    """

    failed: int
    with_mid_prefix: float
    while_root_is_not_mid: float
    interval: tuple[float, float]
    flips: float


@dataclass(frozen=True, eq=False)
class DenseForest:
    """A record; P prompts, n nodes, E different edges, d features, D buckets.

    Attributes:
        meta: Where it comes from: family, env_id, env_kwargs, model, temperature, seeds, versions; and of the gradient
            `gradient_norm2` (squared norm of the estimate that `dot` refers to), `gradient_norm2_unbiased` (without the share
            that is noise) and `gradient_reliability` (expected cosine of that estimate with another such one).
        keys: Name of each prompt, str [P].
        hops: Number of hops, 0 where tasks have none, int [P].
        prompt_tokens: Tokens of each prompt, int [P].
        reference_successes, reference_count: Outcomes of the reference rollouts, int [P].
        root_features: The policy's last hidden state at the prompt's end, reduced, float [P, d].
        prompt: Prompt of each node, int [n].
        parent: Node before it, -1 for a first turn, int [n].
        rollout: Number of the rollout within its prompt, spines first, int [n].
        continuation: Whether a continuation made the edge into the node, bool [n].
        terminated, truncated, is_correct, tool_error: As of `allocation.tree.Node`, bool [n].
        reward: Reward of the edge, float [n].
        action_tokens: Tokens that the policy sampled at the turn, int [n].
        context_tokens: Tokens shown after it, int [n].
        edge_row: Row of the edge's score, -1 if no token was sampled, int [n].
        features: Hidden state at the node's end, reduced, float [n, d]; zeros at terminals.
        dot: Inner product of a score with the true gradient, float [E].
        norm2: Squared norm of a score, float [E].
        entropy: Mean entropy of the positions that were sampled, in nats, float [E].
        sketch: Count sketch of the score in units of `sketch_scale`, int8 [E, D].
        sketch_scale: float [E].
    """

    meta: dict[str, Any]
    keys: npt.NDArray[np.str_]
    hops: IntArray
    prompt_tokens: IntArray
    reference_successes: IntArray
    reference_count: IntArray
    root_features: FloatArray
    prompt: IntArray
    parent: IntArray
    rollout: IntArray
    continuation: BoolArray
    terminated: BoolArray
    truncated: BoolArray
    is_correct: BoolArray
    tool_error: BoolArray
    reward: FloatArray
    action_tokens: IntArray
    context_tokens: IntArray
    edge_row: IntArray
    features: FloatArray
    dot: FloatArray
    norm2: FloatArray
    entropy: FloatArray
    sketch: npt.NDArray[np.int8]
    sketch_scale: FloatArray

    def __post_init__(self) -> None:
        _check(self)

    # What there is.

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        return len(self.keys)

    @cached_property
    def terminal(self) -> BoolArray:
        """Which nodes are terminals, bool [n]."""
        return self.terminated | self.truncated

    @cached_property
    def depth(self) -> IntArray:
        """Turns taken at each node, int64 [n]."""
        depth = np.ones(len(self.parent), dtype=np.int64)
        for node, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                depth[node] = depth[parent] + 1
        return depth

    @cached_property
    def tool_errors(self) -> IntArray:
        """Malformed or refused calls up to each node, int64 [n]."""
        total = self.tool_error.astype(np.int64)
        for node, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                total[node] += total[parent]
        return total

    @cached_property
    def children(self) -> list[list[int]]:
        """Nodes one turn further than each node, ascending."""
        below: list[list[int]] = [[] for _ in self.parent]
        for node, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                below[parent].append(node)
        return below

    @cached_property
    def outcome(self) -> FloatArray:
        """How the rollout that made each node ended, 0.0 or 1.0, float64 [n]."""
        ends = np.zeros((self.num_prompts, int(self.rollout.max(initial=0)) + 1))
        ends[self.prompt[self.terminal], self.rollout[self.terminal]] = self.is_correct[self.terminal]
        return ends[self.prompt, self.rollout]

    # What is known of it.

    def root_values(self) -> Values:
        """Returns the chance of success of each prompt, from its spines and reference rollouts."""
        spine = self.terminal & ~self.continuation
        successes = np.bincount(self.prompt[spine], self.is_correct[spine], self.num_prompts) + self.reference_successes
        return _values(successes, np.bincount(self.prompt[spine], minlength=self.num_prompts) + self.reference_count)

    def prefix_values(self) -> Values:
        """Returns the chance of success from each inner node, from all rollouts that passed through the same prefix.

        Equal prefixes, those whose edges share a row, are one: whichever rollout came there, what it did next was drawn from
        the same distribution. A terminal has its own outcome.
        """
        prefix = np.where(self.edge_row >= 0, self.edge_row, len(self.dot) + np.arange(len(self.parent)))
        # A rollout is an observation of every prefix that it was drawn from or passed through: those that it went through
        # itself, and for a continuation its anchor, but nothing above that, where it was not drawn.
        successes, count = np.zeros(len(self.dot) + len(self.parent)), np.zeros(len(self.dot) + len(self.parent))
        np.add.at(successes, prefix, self.outcome)
        np.add.at(count, prefix, 1)
        first = np.flatnonzero(self.continuation & (self.rollout != self.rollout[self.parent]))
        np.add.at(successes, prefix[self.parent[first]], self.outcome[first])
        np.add.at(count, prefix[self.parent[first]], 1)
        return _values(successes[prefix], count[prefix])

    def gate(self) -> Gate:
        """Returns whether a prefix stage can pay here."""
        value, root = self.prefix_values().value, self.root_values().value
        mid = (value >= MID[0]) & (value <= MID[1]) & ~self.terminal & ~self.continuation
        spines = np.flatnonzero(self.terminal & ~self.continuation & ~self.is_correct)
        held = set(zip(self.prompt[mid].tolist(), self.rollout[mid].tolist(), strict=True))
        has = np.array(
            [pair in held for pair in zip(self.prompt[spines].tolist(), self.rollout[spines].tolist(), strict=True)],
            dtype=bool,
        )
        root_mid = (root >= MID[0]) & (root <= MID[1])
        reached = has & ~root_mid[self.prompt[spines]]
        low, high = proportion_interval(np.array([reached.sum()]), np.array([len(spines)]))
        first = np.flatnonzero(self.continuation & (self.rollout != self.rollout[self.parent]))
        flips = self.outcome[first] != self.outcome[self.parent[first]]
        n = max(len(spines), 1)
        return Gate(
            len(spines),
            float(has.sum() / n),
            float(reached.sum() / n),
            (float(low[0]), float(high[0])),
            float(flips.mean()) if flips.size else float("nan"),
        )

    # Files.

    def save(self, path: str | Path) -> None:
        """Writes one compressed `.npz`."""
        head = json.dumps({"format": FORMAT, "version": VERSION, **self.meta}, sort_keys=True)
        arrays = {name: getattr(self, name) for name in _KINDS}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, meta=np.frombuffer(head.encode(), dtype=np.uint8), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> DenseForest:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, of another kind or of a newer version; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no recorded forest {path}; benchmarks/record_dense.py makes one")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(bytes(arrays.pop("meta")).decode())
            kind, version = meta.pop("format"), meta.pop("version")
        except (OSError, EOFError, KeyError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged or no recorded forest ({error}); record it again") from error
        if kind != FORMAT or version != VERSION:
            raise ValueError(
                f"{path} holds a {kind!r} of version {version}, this release reads {FORMAT!r} of {VERSION}"
            )
        missing = [f.name for f in fields(cls) if f.name not in (*arrays, "meta")]
        extra = sorted(set(arrays) - set(_KINDS))
        if missing or extra:
            raise ValueError(f"{path} is damaged: arrays missing {missing}, not known {extra}; record it again")
        try:
            return cls(meta, **arrays)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; record it again") from error


def _values(successes: npt.ArrayLike, counted: npt.ArrayLike) -> Values:
    s, count = np.asarray(successes, dtype=np.float64), np.asarray(counted, dtype=np.int64)
    low, high = proportion_interval(s, count)
    return Values(np.where(count > 0, s / np.maximum(count, 1), np.nan), low, high, count)


def _check(dense: DenseForest) -> None:
    """Refuses arrays that do not fit together."""
    sizes: dict[str, int] = {}
    for name, (kinds, axes) in _KINDS.items():
        array = getattr(dense, name)
        if array.dtype.kind not in kinds or array.ndim != len(axes):
            raise ValueError(
                f"{name} must be an array of kind {kinds!r} with axes {axes}, got {array.dtype}{array.shape}"
            )
        for axis, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{name} has {size} {axis}, expected {sizes[axis]}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} holds a value that is not finite")
    prompts, nodes, edges = sizes["prompts"], sizes["nodes"], sizes["edges"]
    own = np.arange(nodes)
    inner = dense.parent >= 0
    for name, bad in {
        "prompt": (dense.prompt < 0) | (dense.prompt >= prompts),
        "parent": (dense.parent < -1) | (dense.parent >= own),
        "edge_row": (dense.edge_row < -1) | (dense.edge_row >= edges),
        "rollout": dense.rollout < 0,
        "terminated": dense.terminated & dense.truncated,
        "action_tokens": dense.action_tokens < 0,
        "context_tokens": dense.context_tokens < 0,
    }.items():
        if bad.any():
            raise ValueError(f"{name} is out of range at node {int(np.argmax(bad))}")
    terminal = dense.terminated | dense.truncated
    above = dense.parent[inner]
    if terminal[above].any() or (dense.prompt[above] != dense.prompt[inner]).any():
        raise ValueError("a node follows a terminal, or a node of another prompt")
    ends = {
        (p, r) for p, r, t in zip(dense.prompt.tolist(), dense.rollout.tolist(), terminal.tolist(), strict=True) if t
    }
    if len(ends) != int(terminal.sum()) or len(ends) != len(
        {*zip(dense.prompt.tolist(), dense.rollout.tolist(), strict=True)}
    ):
        raise ValueError("a rollout has no terminal, or several")
