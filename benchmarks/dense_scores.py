"""Gradients of log-probabilities for the recording of dense forests.

Invariant: the ids that are scored are those that were sampled, in the context in which they were sampled, and every weight
takes part, through the prefix too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agents.layout import MicroBatch, grouped
from agents.scoring import Scorer as TokenScorer
from allocation import Node, Tree


@dataclass(frozen=True, slots=True)
class Weighted:
    """A sequence and what the log-prob of each sampled token counts.

    Attributes:
        ids: Token ids, int64 [n].
        positions: Of the sampled tokens, int64 [t].
        weight: One number for all of them.
    """

    ids: np.ndarray
    positions: np.ndarray
    weight: float


def path_ids(tree: Tree, node: Node) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the token ids from the prompt to the end of a node's action, and the positions of each action on the way."""
    parts: list[np.ndarray] = []
    positions, length = [], 0
    for step in tree.path(node):
        if step.sample is not None:
            positions.append(np.arange(length, length + len(step.sample.action_ids)))
            parts.append(step.sample.action_ids)
            length += len(step.sample.action_ids)
        if step is not node and step.context_ids is not None:
            parts.append(step.context_ids)
            length += len(step.context_ids)
    return np.concatenate(parts), positions


def _rows(batch: Sequence[Weighted]) -> MicroBatch:
    ids = np.zeros((len(batch), max(len(s.ids) for s in batch)), dtype=np.int64)
    for i, sequence in enumerate(batch):
        ids[i, : len(sequence.ids)] = sequence.ids
    row = np.repeat(np.arange(len(batch)), [len(s.positions) for s in batch])
    before = np.concatenate([s.positions for s in batch]) - 1
    nothing = np.zeros(0, dtype=np.int64)
    positions = np.tile(np.arange(ids.shape[1]), (len(batch), 1))
    return MicroBatch(ids, positions, None, row, before, np.arange(len(row)), nothing, nothing, nothing)


class Scorer:
    """Gradients with respect to all weights of a model, as one vector each.

    Args:
        model: A transformers causal language model in evaluation mode, on the CPU, in float32.
        micro_tokens: Padded tokens of a micro-batch.
    """

    def __init__(self, model: Any, micro_tokens: int = 4096):
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        self._tokens = TokenScorer(model)
        self._micro_tokens = micro_tokens

    def gradient(self, sequences: Sequence[Weighted]) -> torch.Tensor:
        """Returns the gradient of the weighted sum of the sequences' log-probs, float32 [size]."""
        self.model.zero_grad(set_to_none=True)
        for group in grouped([len(s.ids) for s in sequences], self._micro_tokens):
            batch = [sequences[i] for i in group]
            micro = _rows(batch)
            scored = torch.from_numpy(micro.ids[micro.row, micro.before + 1])
            weights = np.repeat([s.weight for s in batch], [len(s.positions) for s in batch]).astype(np.float32)
            (self._tokens(micro, scored).logprobs * torch.from_numpy(weights)).sum().backward()
        return self._collect()

    def score(self, ids: np.ndarray, positions: np.ndarray) -> tuple[torch.Tensor, float]:
        """Returns the gradient of the summed log-prob of some tokens, float32 [size], and their mean entropy in nats."""
        self.model.zero_grad(set_to_none=True)
        sequence = torch.from_numpy(ids)[None]
        at = torch.from_numpy(positions)
        logits = self.model(input_ids=sequence, use_cache=False).logits[0, at - 1].float()
        logprobs = torch.log_softmax(logits, -1)
        logprobs.gather(-1, sequence[0, at][:, None]).sum().backward()
        with torch.no_grad():
            entropy = float(-(logprobs.exp() * logprobs).sum(-1).mean())
        return self._collect(), entropy

    def _collect(self) -> torch.Tensor:
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.parameters])


class CountSketch:
    """Projects vectors so that inner products are kept on average (Charikar, Chen and Farach-Colton, 2002).

    Every coordinate goes to one bucket with a random sign; the buckets are of equal size.

    Args:
        size: Of a vector.
        buckets: Of a sketch.
        seed: Of buckets and signs.
    """

    def __init__(self, size: int, buckets: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self._sign = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        # A permutation and a fold: many times faster than adding to buckets at random.
        self._order = torch.randperm(size, generator=generator)
        self._padding = -size % buckets
        self.buckets = buckets

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns the sketch of a vector, float32 [buckets]."""
        folded = torch.nn.functional.pad((vector * self._sign)[self._order], (0, self._padding))
        return folded.view(-1, self.buckets).sum(0)


class Reference:
    """The policy gradient from rollouts that are not kept, in two halves that know nothing of each other.

    Args:
        scorer: For its gradients.
        prompts: Number of prompts that the objective is the mean over.
    """

    def __init__(self, scorer: Scorer, prompts: int):
        self._scorer, self._prompts = scorer, prompts
        self._halves = [torch.zeros(scorer.size, dtype=torch.float64) for _ in range(2)]

    def add(self, tree: Tree) -> tuple[int, int]:
        """Adds the root rollouts of one prompt; returns their numbers of successes and of rollouts."""
        leaves = tree.leaves()
        outcomes = [float(bool(leaf.is_correct)) for leaf in leaves]
        for half in range(2):
            mine = list(zip(leaves[half::2], outcomes[half::2], strict=True))
            n, total = len(mine), sum(r for _, r in mine)
            if n < 2:
                raise ValueError(f"prompt {tree.key!r} has {len(leaves)} reference rollouts; each half needs two")
            rows = []
            for leaf, outcome in mine:
                advantage = outcome - (total - outcome) / (n - 1)
                if advantage:
                    ids, positions = path_ids(tree, leaf)
                    rows.append(Weighted(ids, np.concatenate(positions), advantage / (n * self._prompts)))
            if rows:
                self._halves[half] += self._scorer.gradient(rows).double()
        return int(sum(outcomes)), len(outcomes)

    def gradient(self) -> torch.Tensor:
        """Returns the estimate from both halves, float32 [size]."""
        return ((self._halves[0] + self._halves[1]) / 2).float()

    def quality(self) -> dict[str, float]:
        """Returns squared norms and the reliability of the estimate, for `DenseForest.meta`."""
        a, b = self._halves
        inner, mean = float(a @ b), (a + b) / 2
        cosine = inner / max(float(a.norm() * b.norm()), 1e-300)
        return {
            "gradient_norm2": float(mean @ mean),
            "gradient_norm2_unbiased": inner,
            # Spearman and Brown: what the cosine of two estimates would be that each had all of the rollouts.
            "gradient_reliability": 2 * cosine / (1 + cosine),
        }
