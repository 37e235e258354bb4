"""Rows to judge predictors by: the forests of a policy that is being trained, once collected, kept in a file.

Invariant: a row says what a predictor could have known when its forest was collected, and what came of it; the rows of an
update come from the policy before that update.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from agents.config import TrainConfig
from agents.evaluate import make_vector
from agents.policies import TransformersPolicy, collect
from agents.trainer import TaskDeck, Trainer
from allocation import Forest, Tree, TreeAllocationWrapper, UniformAllocator
from allocation.contrast import FloatArray
from allocation.methods.base import Allocator
from allocation.predictor import Anchor, anchors_of, training_set
from allocation.roots import IntArray

SOURCES = ("chosen", "uniform")
"""Whose forests: those that the run's allocator chose and the policy learned from, and evenly sampled ones beside them."""

_COLUMNS = ("depth", "turns_left", "tool_errors", "tree_successes", "tree_failures")
_LOGPROBS = ("last_logprob", "least_logprob", "total_logprob")


class DenseAllocator(Allocator):
    """A few prompts, and several continuations at every prefix of their root rollouts: outcomes to measure chance by.

    Args:
        prompts: Number of prompts.
        roots: Root rollouts of each.
        continuations: Continuations from each inner prefix.
    """

    name = "dense"

    def __init__(self, prompts: int, roots: int, continuations: int):
        self._prompts, self._roots, self._continuations = prompts, roots, continuations

    def pool_size(self, budget: int) -> int:
        """As many prompts as it samples."""
        return self._prompts

    def root_budget(self, budget: int) -> int:
        """The same number of rollouts for each."""
        return self._prompts * self._roots

    def allocate_prefixes(
        self, tree: Tree, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """Every inner prefix gets the same, as far as the budget goes."""
        inner = [n for n in tree.nodes if n.depth and not n.terminal and n.children]
        return [] if wave else [(n.id, self._continuations) for n in inner[: budget // self._continuations]]

    def max_rollouts(self, tree: Tree) -> int:
        """No further root rollouts."""
        return self._roots


@dataclass(frozen=True)
class Rows:
    """The recording of one run.

    Attributes:
        update: Policy updates before the row's forest, int [n]; rows stand in this order.
        source: Position in `SOURCES`, int [n].
        tree: Number of the row's tree, int [n].
        parent: Row of the prefix one turn before, -1 at a root, int [n].
        counts: Depth, turns left, tool errors, successes and failures of the tree's other root rollouts, float [n, 5].
        logprobs: Log-probabilities of the path: latest, least, total; float [n, 3].
        features: Hidden states, float32 [n, d].
        value: Tree values, float [n].
        weight: Terminals below, float [n].
        texts: Action and observation that led to the row, or nothing and the prompt.
        keys: By tree, its prompt.
        outcomes: By tree, successes and failures of its root rollouts, float [trees, 2].
        chance: By source and depth (the last for all deeper ones), mean of V (1 - V), float [2, depths].
    """

    update: IntArray
    source: IntArray
    tree: IntArray
    parent: IntArray
    counts: FloatArray
    logprobs: FloatArray
    features: np.ndarray
    value: FloatArray
    weight: FloatArray
    texts: list[tuple[str, str]]
    keys: list[str]
    outcomes: FloatArray
    chance: FloatArray

    def text(self, row: int) -> tuple[str, ...]:
        """Returns the text of a row's path, as `allocation.predictor.path_text` does."""
        parts: list[str] = []
        while self.parent[row] >= 0:
            parts = [*self.texts[row], *parts]
            row = int(self.parent[row])
        return (self.texts[row][1], *parts)

    def anchors(
        self, rows: IntArray, counts: Callable[[str], tuple[float, float]], tree_outcomes: bool = False
    ) -> Iterator[Anchor]:
        """Yields what a predictor saw at some rows; see `allocation.predictor.anchors_of`."""
        total: dict[int, tuple[np.ndarray, int]] = {}

        def path(row: int) -> tuple[np.ndarray, int]:
            if row not in total:
                above = path(int(self.parent[row])) if self.parent[row] >= 0 else (np.float32(0), 0)
                total[row] = (above[0] + self.features[row], above[1] + 1)
            return total[row]

        for row in rows.tolist():
            depth, left, errors, *others = self.counts[row].tolist()
            summed, number = path(row)
            yield Anchor(
                self.features[row],
                int(depth),
                int(left),
                int(errors),
                *counts(self.keys[self.tree[row]]),
                *(others if tree_outcomes else (0.0, 0.0)),
                *self.logprobs[row].tolist(),
                summed / np.float32(number),
                self.text(row)[0],
                partial(self.text, row),
            )

    def save(self, path: Path) -> None:
        """Writes one compressed file; hidden states in half precision."""
        texts = json.dumps({"texts": self.texts, "keys": self.keys}).encode()
        arrays = {k: v for k, v in self.__dict__.items() if k not in ("texts", "keys")}
        arrays["features"] = self.features.astype(np.float16)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, texts=np.frombuffer(texts, np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
        texts = json.loads(arrays.pop("texts").tobytes())
        arrays["features"] = arrays["features"].astype(np.float32)
        return cls(**arrays, texts=[tuple(t) for t in texts["texts"]], keys=texts["keys"])


class _Recorder:
    """Gathers rows forest by forest."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._columns: dict[str, list] = {
            k: [] for k in ("update", "source", "tree", "parent", "counts", "logprobs", "features", "value", "weight")
        }
        self._texts: list[tuple[str, str]] = []
        self._keys: list[str] = []
        self._outcomes: list[tuple[int, int]] = []
        self._noise: list[tuple[int, int, float]] = []

    def add(self, forest: Forest, update: int, source: int) -> None:
        training = training_set(forest)
        trees, nodes = [r[0] for r in training], [r[1] for r in training]
        anchors = anchors_of(trees, nodes, lambda key: (0.0, 0.0), tree_outcomes=True)
        place: dict[tuple[int, int], int] = {}
        number = {id(tree): len(self._keys) + i for i, tree in enumerate(forest)}
        for (tree, node, value, weight), anchor in zip(training, anchors, strict=True):
            row = len(self._texts)
            place[tree.index, node.id] = row
            text = anchor.text
            self._texts.append((text[-2] if node.depth else "", text[-1]))
            values = {
                "update": update,
                "source": source,
                "tree": number[id(tree)],
                "parent": -1 if node.parent is None else place[tree.index, node.parent],
                "counts": [getattr(anchor, name) for name in _COLUMNS],
                "logprobs": [getattr(anchor, name) for name in _LOGPROBS],
                # A prompt too long for the model has no hidden state.
                "features": np.zeros(self._width, np.float16) if node.features is None else node.features,
                "value": value,
                "weight": weight,
            }
            for name, column in self._columns.items():
                column.append(values[name])
        self._keys += [tree.key for tree in forest]
        self._outcomes += [tree.outcome_counts("root") for tree in forest]

    def add_dense(self, forest: Forest, source: int, depths: int) -> None:
        """Estimates V (1 - V) without bias from the outcomes of independent rollouts that left the same anchor."""
        for tree in forest:
            ends: dict[int, list[bool]] = {}
            for leaf in tree.leaves():
                node = leaf
                while node.parent is not None and node.rollout == leaf.rollout:
                    node = tree.nodes[node.parent]
                ends.setdefault(node.id, []).append(bool(leaf.is_correct))
            for anchor, outcomes in ends.items():
                if len(outcomes) > 1:
                    depth = min(tree.nodes[anchor].depth, depths - 1)
                    self._noise.append((source, depth, float(np.var(outcomes, ddof=1))))

    def rows(self, depths: int) -> Rows:
        columns = {k: np.array(v) for k, v in self._columns.items()}
        columns["features"] = columns["features"].astype(np.float32)
        chance = np.full((len(SOURCES), depths), np.nan)
        for source in range(len(SOURCES)):
            for depth in range(depths):
                found = [v for s, d, v in self._noise if (s, d) == (source, depth)]
                if found:
                    chance[source, depth] = np.mean(found)
        return Rows(
            **columns,
            texts=self._texts,
            keys=self._keys,
            outcomes=np.array(self._outcomes, dtype=np.float64),
            chance=chance,
        )


def record(config: TrainConfig, *, dense_every: int, dense_prompts: int, log: Callable[[str], None]) -> Rows:
    """Trains a policy and keeps what there was to predict.

    Args:
        config: The run; its directory gets the usual logs.
        dense_every: Updates between two measurements of chance, each on even prompts and on those that the allocator chose.
        dense_prompts: Prompts of such a measurement.
        log: Is told of the progress.
    """
    depths = 7
    dense = DenseAllocator(dense_prompts, 4, 3)
    dense_budget = dense_prompts * 4 * (1 + 3 * depths)
    with closing(Trainer(config)) as trainer:
        recorder = _Recorder(int(trainer.model.config.hidden_size))
        policy = TransformersPolicy(
            trainer.model, trainer.tokenizer, max_new_tokens=config.max_new_tokens, seed=config.seed + 1
        )
        settings = (config.env_id, config.num_envs, trainer.env_kwargs)
        with closing(make_vector(*settings)) as one, closing(make_vector(*settings)) as two:
            deck = TaskDeck(one.envs[0].unwrapped.task_ids())  # type: ignore[attr-defined]
            allocator = UniformAllocator(config.group_size)
            even = TreeAllocationWrapper(one, allocator=allocator, budget=config.budget, roots=deck)
            many = TreeAllocationWrapper(two, allocator=dense, budget=dense_budget, roots=deck)
            for update in range(config.updates):
                policy.reset_cache()
                recorder.add(collect(even, policy, seed=2 * update), update, 1)
                figures = trainer.train_step()
                recorder.add(trainer.envs.forest, update, 0)
                if update % dense_every == dense_every - 1:
                    policy.reset_cache()
                    recorder.add_dense(collect(many, policy, seed=2 * update + 1), 1, depths)
                    starts = [tree.start for tree in trainer.envs.forest][:dense_prompts]
                    recorder.add_dense(collect(many, policy, seed=2 * update + 1, roots=starts), 0, depths)
                log(f"update {update + 1}/{config.updates}: success {figures['train/success']:.2f}")
    return recorder.rows(depths)
