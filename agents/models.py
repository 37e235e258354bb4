"""Where models come from: the shipped tiny agent, a local folder, or a model hub.

Invariant: weights are read from safetensors only; no code that comes with a model is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

ASSETS = Path(__file__).parent / "assets"
SHIPPED = {"tiny": ASSETS / "tiny-multihop"}
"""Models that come with the package, by name."""
ENV_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"TraceMultiHopQA-v0": {"top_k": 2, "system_prompt": ""}},
}
"""How a shipped model was trained to be asked, by model and environment; it knows no other way."""


def env_settings(model: str, env_id: str) -> dict[str, Any]:
    """Returns the arguments of the environment that a shipped model brings; none for any other model."""
    return ENV_SETTINGS.get(model, {}).get(env_id, {})


def load_model(name: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        name: `tiny` (the shipped warm start), a local folder in transformers' format, or a hub id.
        device: Where the model goes.
        dtype: A torch dtype by name, or `auto` for the one it was saved in.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: A local folder was named and is not there, or holds no `config.json`.
        ValueError: The weights are damaged, or the device cannot be used here.
        OSError: The hub does not have the model or cannot be reached.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, as it was built
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device {device!r} cannot be used here ({reason}); --device cpu always can") from error
    source = str(SHIPPED.get(name, name))
    looks_local = name in SHIPPED or name.startswith((".", "/", "~")) or Path(name).exists()
    if looks_local:
        source = str(Path(source).expanduser())
        if not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(
                f"{source} is no model folder (no config.json); --model takes one of {', '.join(SHIPPED)}, a folder saved "
                f"with save_pretrained, or a hub id"
            )
    # Bars for each file read or written would run through the live display and the plain lines of a log.
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", use_safetensors=True
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {source}/model.safetensors cannot be read ({error})") from error
    return model.to(device).eval(), tokenizer
