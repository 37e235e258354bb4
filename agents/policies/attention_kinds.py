"""Which keys a model's layers attend to: all before a token, or those within a window.

Invariant: a model whose layers keep something else than keys and values by position is refused, not sampled wrongly.
"""

from __future__ import annotations

from typing import Any

KNOWN = {"full_attention", "sliding_attention"}


def attention_of(model: Any) -> tuple[int | None, bool]:
    """Returns how masks are to be made for a transformers model.

    Returns:
        The window of its layers with sliding attention (`None` if it has none), and whether the model takes a mask for each
        kind of layer; if not, all layers are of one kind.

    Raises:
        ValueError: It is a recurrent model, or has layers of another kind.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if model._is_stateful or kinds - KNOWN:
        what = ", ".join(sorted(kinds - KNOWN)) or "a recurrent state"
        raise ValueError(
            f"{type(model).__name__} keeps no keys and values by position in some layers ({what}), so its rollouts cannot be "
            "branched by --policy transformers; use --policy vllm"
        )
    window = getattr(config, "sliding_window", None)
    if kinds:
        return (window if "sliding_attention" in kinds else None), True
    return window, False
