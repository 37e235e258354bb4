"""One optimiser step on a forest: the flat path, one row for each root-to-leaf path.

Invariant: an edge is trained in the first row that contains it and masked in every other; what is scored is, id for id, what
was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from agents.advantages import EdgeCredit
from agents.losses import Clip, clipped_policy_loss, edge_coefficients
from allocation import Forest, Tree


@dataclass(frozen=True, slots=True)
class Row:
    """One path as the learner sees it.

    Attributes:
        ids: Token ids, int64 [n].
        positions: Indices in `ids` of the tokens trained in this row, int64 [t]; never 0.
        old_logprobs, advantages, coefficients: Of those tokens, float32 [t].
    """

    ids: np.ndarray
    positions: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    coefficients: np.ndarray


def rows_of(tree: Tree, credit: EdgeCredit, coefficients: np.ndarray) -> Iterator[Row]:
    """Yields the rows of a tree.

    Paths that add nothing to train (all advantages zero) are left out, and so is what follows the last trained token of a row:
    nothing trained depends on it.
    """
    trained: set[int] = set()
    for leaf in tree.leaves():
        ids: list[np.ndarray] = []
        length = 0
        parts: list[tuple[np.ndarray, np.ndarray, float, float]] = []
        for node in tree.path(leaf):
            if node.sample is not None:
                n = len(node.sample.action_ids)
                if node.id not in trained and n and credit.advantage[node.id] != 0.0 and coefficients[node.id] != 0.0:
                    at = np.arange(length, length + n)
                    parts.append((at, node.sample.logprobs, credit.advantage[node.id], coefficients[node.id]))
                trained.add(node.id)
                ids.append(node.sample.action_ids)
                length += n
            if node.context_ids is not None and not node.terminal:
                ids.append(node.context_ids)
                length += len(node.context_ids)
        if parts:
            positions = np.concatenate([p[0] for p in parts])
            yield Row(
                np.concatenate(ids)[: positions[-1] + 1],
                positions,
                np.concatenate([p[1] for p in parts]),
                np.concatenate([np.full(len(p[0]), p[2], np.float32) for p in parts]),
                np.concatenate([np.full(len(p[0]), p[3], np.float32) for p in parts]),
            )


class _HasIds(Protocol):
    @property
    def ids(self) -> np.ndarray: ...


RowLike = TypeVar("RowLike", bound=_HasIds)


def micro_batches(rows: Sequence[RowLike], max_tokens: int) -> Iterator[list[RowLike]]:
    """Yields rows in groups of similar length with at most `max_tokens` padded tokens each (one row may exceed it)."""
    batch: list[RowLike] = []
    for row in sorted(rows, key=lambda r: len(r.ids)):
        if batch and len(row.ids) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class LogProbs:
    """Log-probs of given tokens under a causal language model, with logits only where they are needed.

    Args:
        model: A transformers causal language model. If its output layer alone turns last hidden states into its logits (no
            scaling, no soft cap), only the positions asked for go through it; this is checked once, on a probe.
    """

    def __init__(self, model: Any):
        self.model = model
        with torch.no_grad():
            probe = torch.arange(4, device=model.device)[None] % model.config.vocab_size
            was_training = model.training
            model.eval()
            direct = model.get_output_embeddings()(model.get_decoder()(input_ids=probe).last_hidden_state)
            self._direct = bool(torch.allclose(direct, model(input_ids=probe).logits, rtol=1e-4, atol=1e-5))
            model.train(was_training)

    def __call__(
        self, ids: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """Returns log p(ids[row, position] | ids[row, :position]) for each pair, float32 [pairs].

        Args:
            ids: Int64 [rows, length], padded on the right.
            rows: Int64 [pairs].
            positions: Int64 [pairs], at least 1.
            temperature: The sampling temperature, so that behaviour and current log-probs are of the same distribution.
        """
        if self._direct:
            hidden = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden[rows, positions - 1])
        else:
            logits = self.model(input_ids=ids, use_cache=False).logits[rows, positions - 1]
        logprobs = F.log_softmax(logits.float() / (temperature or 1.0), -1)
        return logprobs.gather(-1, ids[rows, positions][:, None])[:, 0]


def policy_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    forest: Forest,
    credits: list[EdgeCredit],
    *,
    aggregation: str = "prompt",
    clip: Clip | None = None,
    epochs: int = 1,
    max_grad_norm: float = 1.0,
    micro_tokens: int = 8192,
    temperature: float = 1.0,
    logprobs: Callable[..., torch.Tensor] | None = None,
) -> dict[str, float]:
    """Updates a model from a forest; gradients are accumulated over micro-batches and equal those of the whole batch.

    The model stays in the mode that it is in, which must be evaluation mode: the policy samples without dropout, so the
    gradient is that of the policy that sampled only without it; and dropout would draw from torch's global generator, which no
    checkpoint keeps.

    Args:
        model: A transformers causal language model, in evaluation mode.
        optimizer: Over its parameters.
        forest: The batch.
        credits: One for each tree.
        aggregation: See `agents.losses.edge_coefficients`.
        clip: Bounds of the ratio.
        epochs: Optimiser steps on the batch.
        max_grad_norm: Gradients are scaled down to this norm.
        micro_tokens: Padded tokens of a micro-batch.
        temperature: Sampling temperature of the stored log-probs.
        logprobs: A `LogProbs` of the model, to save the probe.

    Returns:
        Figures for the log.
    """
    clip = clip or Clip()
    logprobs = logprobs or LogProbs(model)
    coefficients = edge_coefficients(forest, credits, aggregation)
    rows = [r for t, c, w in zip(forest, credits, coefficients, strict=True) for r in rows_of(t, c, w)]
    tokens = sum(len(r.positions) for r in rows)
    figures = {"loss/policy": 0.0, "loss/grad_norm": 0.0, "loss/clip_share": 0.0, "loss/kl": 0.0, "loss/tokens": tokens}
    if not rows:
        return figures
    device = model.device
    for _ in range(epochs):
        optimizer.zero_grad(set_to_none=True)
        total, clipped, kl = 0.0, 0.0, 0.0
        for batch in micro_batches(rows, micro_tokens):
            ids = torch.zeros(len(batch), max(len(r.ids) for r in batch), dtype=torch.int64)
            for i, row in enumerate(batch):
                ids[i, : len(row.ids)] = torch.from_numpy(row.ids)
            index = np.concatenate([np.full(len(r.positions), i) for i, r in enumerate(batch)])
            new = logprobs(
                ids.to(device),
                torch.from_numpy(index).to(device),
                torch.from_numpy(np.concatenate([r.positions for r in batch])).to(device),
                temperature,
            )
            old, advantages, weights = (
                torch.from_numpy(np.concatenate([getattr(r, name) for r in batch])).to(device)
                for name in ("old_logprobs", "advantages", "coefficients")
            )
            loss, sums = clipped_policy_loss(new, old, advantages, weights, clip)
            loss.backward()
            total, clipped, kl = total + loss.item(), clipped + sums["clipped"], kl + sums["kl"]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite (loss {total}); lower the learning rate, or look at the last batch's rewards"
            )
        optimizer.step()
        figures |= {
            "loss/policy": total,
            "loss/grad_norm": float(norm),
            "loss/clip_share": clipped / tokens,
            "loss/kl": kl / tokens,
        }
    return figures
