"""Attention over packed trees on a CPU, at the cost of attention over their paths.

Invariant: exactly softmax attention in which token i sees token j if and only if j <= i < ends[j]; blocks in which nobody sees
anybody are never multiplied.

A packed row falls into *segments*: consecutive tokens that the same later tokens see. Who sees a segment is an interval, from
itself to the end of its subtree, so queries and keys of every product are slices of the row and nothing is gathered. As in
FlashAttention (Dao et al., 2022, algorithms 1 and 2; Dao, 2023) sums of exponentials are carried from segment to segment, and
probabilities are not kept but made again in the backward pass from the logarithms of their sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

QUERIES, KEYS = 512, 1024
"""Most queries and keys of one product: what bounds the memory, with the number of heads."""
OWN = 128
"""Most queries of a product with keys of their own segment, half of which they do not see."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens that the same later tokens see.

    Attributes:
        start, stop: The tokens; each sees itself and those before it.
        end: Tokens from `stop` to here see all of them.
    """

    start: int
    stop: int
    end: int


def segments_of(ends: np.ndarray, *, keys: int = KEYS) -> list[Segment]:
    """Returns the segments of a packed row, in order.

    Args:
        ends: Index behind the last token of the subtree of each token's node, int64 [length].
        keys: Most tokens of a segment.
    """
    # Neighbours with the same end are on one path: a subtree that ends there cannot begin there.
    starts = np.flatnonzero(np.diff(ends, prepend=-1))
    stops = np.append(starts[1:], len(ends))
    found = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        for first in range(start, stop, keys):
            found.append(Segment(first, min(first + keys, stop), int(ends[start])))
    return found


def _blocks(segments: list[Segment], queries: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields which queries, `first` to `last`, meet which keys, `start` to `stop`; where they overlap it is in a triangle."""
    own = min(OWN, queries)
    for segment in segments:
        first = segment.start
        while first < segment.end:
            inside = first + own < segment.stop
            last = first + own if inside else min(first + queries, segment.end)
            yield first, last, segment.start, last if inside else segment.stop
            first = last


class _PathAttention(torch.autograd.Function):
    """Queries [key heads, length * group, d]; keys and values [key heads, length, d]."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # types are chosen here
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: list[Segment], queries: int
    ) -> Any:
        group, wide = q.shape[1] // k.shape[1], _wide(q)
        out = q.new_zeros(q.shape, dtype=wide)
        most = q.new_full((*q.shape[:2], 1), -torch.inf, dtype=wide)
        total = torch.zeros_like(most)
        for first, last, start, stop in _blocks(segments, queries):
            here, there = slice(first * group, last * group), slice(start, stop)
            scores = _scores(q[:, here], k[:, there], first - start, group)
            before = most[:, here]
            now = torch.maximum(before, scores.amax(-1, keepdim=True))
            p = scores.sub_(now).exp_()
            fade = torch.exp(before - now)
            total[:, here] = total[:, here] * fade + p.sum(-1, keepdim=True)
            out[:, here] = torch.baddbmm(out[:, here] * fade, p, v[:, there].to(wide))
            most[:, here] = now
        out = (out / total).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, most + total.log())
        ctx.segments, ctx.queries = segments, queries
        return out

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (grad,) = gradients
        q, k, v, out, sums = ctx.saved_tensors
        group, wide = q.shape[1] // k.shape[1], _wide(q)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        # Of each query: what the gradients of its probabilities have in common (Dao et al., 2022, equation 4).
        common = (grad.to(wide) * out).sum(-1, keepdim=True)
        for first, last, start, stop in _blocks(ctx.segments, ctx.queries):
            here, there = slice(first * group, last * group), slice(start, stop)
            p = _scores(q[:, here], k[:, there], first - start, group).sub_(sums[:, here]).exp_()
            dv[:, there].baddbmm_(p.transpose(1, 2), grad[:, here].to(wide))
            ds = p.mul_((grad[:, here] @ v[:, there].transpose(1, 2)).to(wide).sub_(common[:, here]))
            dq[:, here].baddbmm_(ds, k[:, there].to(wide))
            dk[:, there].baddbmm_(ds.transpose(1, 2), q[:, here].to(wide))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _wide(x: torch.Tensor) -> torch.dtype:
    """Returns the type that softmax is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(queries: torch.Tensor, keys: torch.Tensor, offset: int, group: int) -> torch.Tensor:
    """Returns scores, -inf where a key stands behind its query, [key heads, n * group, keys].

    Args:
        queries: [key heads, n * group, d].
        keys: [key heads, keys, d].
        offset: How far the first query stands behind the first key.
        group: Queries of one token.
    """
    scores = (queries @ keys.transpose(1, 2)).to(_wide(queries))
    n = keys.shape[1] - offset
    if n > 1:
        later = torch.ones(n, n, dtype=torch.bool, device=keys.device).triu_(1).repeat_interleave(group, 0)
        scores[:, : n * group, offset:].masked_fill_(later, -torch.inf)
    return scores


def path_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: list[Segment],
    scale: float,
    *,
    queries: int = QUERIES,
) -> torch.Tensor:
    """Attends along the paths of a packed row.

    Args:
        query: [heads, length, d].
        key: [key heads, length, d]; heads that share keys stand side by side, as transformers has them.
        value: [key heads, length, d].
        segments: Of the row (`segments_of`).
        scale: Of the scores.
        queries: Most queries of one product.

    Returns:
        [heads, length, d].
    """
    heads, length, d = query.shape
    # Under autocast a model's norms may leave queries and keys in another type than values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    group = heads // len(key)
    # [key heads, length, group, d]: a stretch of tokens is then one slice, whatever the group.
    q = (query * scale).view(len(key), group, length, d).transpose(1, 2).reshape(len(key), length * group, d)
    out = _PathAttention.apply(q, key.contiguous(), value.contiguous(), segments, queries)
    return out.view(len(key), length, group, d).transpose(1, 2).reshape(heads, length, d)
