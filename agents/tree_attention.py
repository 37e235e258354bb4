"""Attention that sees ancestors only: unpatched decoders of transformers on packed rows.

Invariant: the hidden state of a token in a packed row is what it would be in a row that holds its path alone.

Three ways, one result: `paths` (`agents.path_attention`, for CPUs), `flex` (FlexAttention with a block mask, for GPUs) and
`dense` (SDPA with the whole mask, the reference: its cost grows with the square of the row). All enter through the registry of
attention functions of transformers or as a ready mask, so Qwen3, Llama and their kin need no patch; a probe says whether a
model is one of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from agents.path_attention import path_attention, segments_of

logger = logging.getLogger(__name__)

NAME = "trace_paths"
"""Of path attention in the registry of transformers."""
BUCKET = 512
"""Rows for FlexAttention are filled up to a multiple of this, so that few lengths are compiled."""
_NOT_SOFTMAX = ("sliding_window", "softcap", "s_aux")
"""What layers pass on if their attention is more than a softmax over all that is visible."""
_TOLERANCE = 1e-3
"""Of the probe, relative; in half precision rounding alone is more (see `_unfit`)."""
_warned: set[str] = set()


def _paths_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """In the form of the registry: from query [rows, heads, length, d] to [rows, length, heads, d]."""
    for name in _NOT_SOFTMAX:
        if kwargs.get(name) is not None:
            raise ValueError(f"its attention has {name}={kwargs[name]}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = [
        path_attention(q, k, v, s, scale) for q, k, v, s in zip(query, key, value, kwargs["tree_segments"], strict=True)
    ]
    return torch.stack(mixed).transpose(1, 2), None


AttentionInterface.register(NAME, _paths_forward)


def ancestor_mask(ends: torch.Tensor) -> torch.Tensor:
    """Returns which token (last axis) is visible to which (the one before), bool [rows, 1, length, length]."""
    at = torch.arange(ends.shape[1], device=ends.device)
    return ((at <= at[:, None]) & (at[:, None] < ends[:, None, :]))[:, None]


def block_mask(ends: torch.Tensor) -> Any:
    """Returns the same as a block mask for FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (q < ends[b, kv])

    rows, length = ends.shape
    return create_block_mask(visible, rows, None, length, length, device=ends.device)


@contextlib.contextmanager
def _attention(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def forward(
    decoder: Any, ids: torch.Tensor, positions: torch.Tensor, ends: torch.Tensor, *, how: str | None = None
) -> torch.Tensor:
    """Returns the last hidden states of packed rows, float [rows, length, d].

    Args:
        decoder: `model.get_decoder()` of a model that is `supported`.
        ids: Token ids, int64 [rows, length].
        positions: Of each token on its path, int64 [rows, length].
        ends: Index behind the subtree of each token's node, int64 [rows, length] (`agents.layout.MicroBatch`).
        how: `paths`, `flex` or `dense`; `None` takes `paths` on a CPU and `flex` on a GPU.
    """
    how = how or ("paths" if ids.device.type == "cpu" else "flex")
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if how == "dense":
        with _attention(decoder.config, "sdpa"):
            return decoder(**inputs, attention_mask=ancestor_mask(ends)).last_hidden_state
    if how == "paths":
        segments = [segments_of(row) for row in ends.cpu().numpy()]
        with _attention(decoder.config, NAME):
            return decoder(**inputs, tree_segments=segments).last_hidden_state
    length = ids.shape[1]
    filled = -(-length // BUCKET) * BUCKET
    pad = torch.nn.functional.pad
    own = torch.arange(length, filled, device=ids.device).expand(len(ids), -1) + 1
    inputs |= {"input_ids": pad(ids, (0, filled - length)), "position_ids": pad(positions, (0, filled - length))}
    with _attention(decoder.config, "flex_attention"):
        mask = block_mask(torch.cat([ends, own], 1))
        return decoder(**inputs, attention_mask=mask).last_hidden_state[:, :length]


def supported(model: Any) -> bool:
    """Returns whether packed rows give a model's own hidden states; if not, one warning says why.

    A sliding window could be wider than the probe, so the configuration is asked for that; all else shows in the probe.
    """
    reason = _unfit(model)
    name = type(model).__name__
    if reason and name not in _warned:
        _warned.add(name)
        logger.warning(
            "%s cannot read packed rows: %s; every rollout is computed whole, as by layout='flat'",
            name,
            reason,
        )
    return not reason


def _unfit(model: Any) -> str:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return f"it sees no further back than {config.sliding_window} tokens"
    if not model._supports_attention_backend:
        # Such as Bloom, whose bias by distance a probe in half precision could not tell from rounding.
        return "it takes no attention function from the registry of transformers"
    device = model.device
    # Root, its first child with a child of its own, and a second child.
    lengths, ends = [5, 4, 3, 6], [18, 12, 12, 18]
    generator = np.random.default_rng(0)
    parts = [generator.integers(config.vocab_size, size=n) for n in lengths]
    depth = [0, 5, 9, 5]
    ids = torch.from_numpy(np.concatenate(parts))[None].to(device)
    positions = torch.cat([torch.arange(d, d + n) for d, n in zip(depth, lengths, strict=True)])[None].to(device)
    limits = torch.from_numpy(np.repeat(ends, lengths))[None].to(device)
    decoder = model.get_decoder()
    tolerance = max(_TOLERANCE, 16 * torch.finfo(model.dtype).eps)
    try:
        with torch.no_grad():
            packed = forward(decoder, ids, positions, limits)[0]
            for path, places in (([0, 1, 2], slice(0, 12)), ([0, 3], [*range(5), *range(12, 18)])):
                row = torch.from_numpy(np.concatenate([parts[i] for i in path]))[None].to(device)
                flat = decoder(input_ids=row, use_cache=False).last_hidden_state[0]
                apart = (packed[places] - flat).abs().max() / flat.abs().max()
                if not apart < tolerance:
                    return f"its hidden states differ by {float(apart):.1g} of their size"
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
