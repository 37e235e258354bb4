"""Which keys a model's layers attend to, and whether it can be given rows of different lengths at all.

Invariant: a model that would not compute in a ragged batch what it computes for each row alone is refused, not sampled wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from agents.policies.ragged_cache import RaggedCache

KINDS = {"full_attention", "sliding_attention"}
FUNCTIONS = {"sdpa", "eager"}
"""Attention functions of transformers that add a mask to the scores."""


@dataclass(frozen=True, slots=True)
class Attention:
    """How the layers of a transformers model attend.

    Attributes:
        window: Keys that layers with sliding attention see; `None` if there are none.
        mixed: Whether the model takes a mask for each kind of layer; if not, all layers are of one kind.
        dtype: Of the model.
    """

    window: int | None
    mixed: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any) -> Attention:
        """Reads it from a model's configuration.

        Raises:
            ValueError: It is a recurrent model, has layers of another kind, or an attention function that takes no masks.
        """
        config, name = model.config.get_text_config(), type(model).__name__
        kinds = set(getattr(config, "layer_types", None) or ())
        # GPT-Neo has a name of its own for them, and its windows are none of its mask's.
        odd = kinds - KINDS | set(getattr(config, "attention_layers", None) or ()) - {"global"}
        if model._is_stateful or odd:
            what = ", ".join(sorted(odd)) or "a recurrent state"
            raise ValueError(
                f"{name} has layers that take no keys and values by position with a mask ({what}), so its rollouts cannot be "
                "branched by --policy transformers; use --policy vllm"
            )
        if config._attn_implementation not in FUNCTIONS:
            raise ValueError(
                f"{name} was loaded with attn_implementation={config._attn_implementation!r}, which takes no mask for rows of "
                "different lengths; load it with attn_implementation='sdpa'"
            )
        window = getattr(config, "sliding_window", None)
        if kinds:
            return cls(window if "sliding_attention" in kinds else None, True, model.dtype)
        return cls(window, False, model.dtype)

    def inputs(self, cache: RaggedCache, ids: torch.Tensor) -> dict[str, Any]:
        """Returns the arguments of a forward pass that puts ids, int64 [rows, new], behind the rows of a cache."""
        full, near, position = cache.prepare(ids.shape[1], self.dtype, self.window)
        mask = {"full_attention": full, "sliding_attention": near} if self.mixed else near
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position,
            "past_key_values": cache,
            "use_cache": True,
        }


@torch.inference_mode()
def check_attention(model: Any, attention: Attention) -> None:
    """Computes two short rows of different lengths together, and each alone, and compares.

    The window of sliding attention may be longer than these rows; it is taken from the configuration.

    Raises:
        ValueError: The logits differ, or the model does not take what it is given.
    """
    was_training = model.training
    model.eval()
    try:
        reason = _unfit(model, attention)
    finally:
        model.train(was_training)
    if reason:
        raise ValueError(
            f"{type(model).__name__} cannot compute rows of different lengths together ({reason}), so its rollouts cannot be "
            "sampled by --policy transformers; use --policy vllm"
        )


def _unfit(model: Any, attention: Attention) -> str:
    config, device = model.config.get_text_config(), model.device
    ids = torch.arange(1, 12, device=device) * 7 % config.vocab_size
    rows, counts = [ids[:5], ids[5:]], [4, 3]
    longest = int(getattr(config, "max_position_embeddings", 1 << 30))
    if longest < max(map(len, rows)):
        return ""  # Too short a model for two turns, let alone for a mistake.
    # Half precision rounds differently in other shapes, and a mixture of experts may then choose others.
    tolerance = 1e-3 if attention.dtype == torch.float32 else 0.2
    try:
        alone = [model(input_ids=row[None], use_cache=False).logits[0, -1].float() for row in rows]
        cache = RaggedCache(config.num_hidden_layers, torch.zeros(2, dtype=torch.int64, device=device), 8, longest)
        first = torch.stack([rows[0][:4], torch.cat([rows[1][:3], ids[:1]])])
        model(**attention.inputs(cache, first), logits_to_keep=1)
        cache.lengths = torch.tensor(counts, device=device)
        # What is left of them, the shorter row filled up.
        left = torch.stack([torch.cat([rows[0][4:], ids[:2]]), rows[1][3:]])
        logits = model(**attention.inputs(cache, left), logits_to_keep=3).logits.float()
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for row, at, expected in zip(logits, (0, 2), alone, strict=True):
        apart = float((row[at] - expected).abs().max() / expected.abs().max())
        if not apart < tolerance:
            return f"its logits differ by {apart:.1g} of their size"
    return ""
