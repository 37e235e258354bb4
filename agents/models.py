"""Where models come from: the shipped tiny agent, a local folder, or a model hub.

Invariant: weights are read from safetensors only; no code that comes with a model is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from agents.lora import ADAPTER_CONFIG, adapter_base, load_adapters

ASSETS = Path(__file__).parent / "assets"
TINY = "tiny"
SHIPPED = {TINY: ASSETS / "tiny-multihop", "tiny-tools": ASSETS / "tiny-tools", "tiny-math": ASSETS / "tiny-math"}
"""Models that come with the package, by name."""
TINY_OF = {"TraceMultiHopQA-v0": TINY, "TraceToolUse-v0": "tiny-tools", "TraceMath-v0": "tiny-math"}
"""The tiny agent of each environment; where an environment has none, `tiny` is that of multi-hop questions."""
ENV_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    TINY: {"TraceMultiHopQA-v0": {"top_k": 2, "system_prompt": ""}},
    "tiny-tools": {"TraceToolUse-v0": {"system_prompt": "", "calls_per_turn": 1}},
    "tiny-math": {"TraceMath-v0": {"system_prompt": ""}},
}
"""How a shipped model was trained to be asked, by model and environment; it knows no other way."""


def shipped_for(model: str, env_id: str) -> str:
    """Returns the name of the tiny agent of an environment for `tiny`, and any other name as it is."""
    return TINY_OF.get(env_id, TINY) if model == TINY else model


def env_settings(model: str, env_id: str) -> dict[str, Any]:
    """Returns the arguments of the environment that a shipped model brings; none for any other model."""
    return ENV_SETTINGS.get(shipped_for(model, env_id), {}).get(env_id, {})


def model_source(name: str) -> str | Path:
    """Returns the folder of a shipped model, and any other name as it is."""
    return SHIPPED.get(name, name)


def load_model(name: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        name: `tiny` or another shipped warm start (`SHIPPED`), a local folder in transformers' format, or a hub id. A local
            folder may hold low-rank adapters alone: they are put into the model that they belong to and can be trained further.
        device: Where the model goes.
        dtype: A torch dtype by name, or `auto` for the one it was saved in.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: A local folder was named and is not there, or holds no `config.json`; or it holds adapters and their
            model is gone.
        ImportError: It holds adapters, and `peft` is not installed.
        ValueError: The weights are damaged, the adapters do not fit, or the device cannot be used here.
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
        source = str(Path(source).expanduser().resolve())
        if (Path(source) / ADAPTER_CONFIG).is_file():
            return _load_with_adapters(Path(source), device, dtype)
        if not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(
                f"{source} is no model folder (no config.json); --model takes one of {', '.join(SHIPPED)}, a folder saved "
                f"with save_pretrained, or a hub id"
            )
    # Bars for each file read or written would run through the live display and the plain lines of a log.
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not looks_local and find_adapter_config_file(source) is not None:
        # transformers would read such adapters from pickled weights, too.
        raise ValueError(
            f"{source} on the hub is adapters: download it (hf download {source} --local-dir FOLDER) and pass --model FOLDER"
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", use_safetensors=True
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {source}/model.safetensors cannot be read ({error})") from error
    # What adapters that are saved later say they belong to.
    model.name_or_path = name if name in SHIPPED else source
    return _in_own_memory(model.to(device).eval()), tokenizer


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a model, for engines that load the weights themselves; `name` as for `load_model`.

    Raises:
        FileNotFoundError: A local folder was named and is not there.
        OSError: The hub does not have the model or cannot be reached.
    """
    source = SHIPPED.get(name, name)
    if Path(source).expanduser().is_dir():
        return AutoTokenizer.from_pretrained(Path(source).expanduser().resolve())
    if str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} is no folder; --model takes one of {', '.join(SHIPPED)}, a folder or a hub id")
    return AutoTokenizer.from_pretrained(name)


def _load_with_adapters(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Returns the model that the adapters in a folder belong to, with them in it, and its tokenizer."""
    if any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{folder} holds adapters and a whole model: move {ADAPTER_CONFIG} or model.safetensors to a folder of its own"
        )
    base = adapter_base(folder)
    try:
        model, tokenizer = load_model(base, device=device, dtype=dtype)
    except OSError as error:
        raise FileNotFoundError(
            f"the adapters in {folder} belong to the model {base}, which cannot be loaded: put it back, or set "
            f"base_model_name_or_path in {ADAPTER_CONFIG} to where it is ({error})"
        ) from error
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return _in_own_memory(load_adapters(model, folder)), tokenizer


def _in_own_memory(model: Any) -> Any:
    """Copies weights that lie in the mapped file, wherever its header ends, to memory of their own; returns the model.

    A file written over would change them, and products of matrices may differ in their last bits with the alignment, so a
    resumed run might not go on bit for bit.
    """
    if model.device.type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model
