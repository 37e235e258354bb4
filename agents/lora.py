"""Low-rank adapters (LoRA, arXiv 2106.09685) inside a model of transformers, through `peft`.

Invariant: adapters are put into the model itself, which stays the object that everything else knows: it samples, is scored and
is saved as before, but only its adapters require gradients and only they are saved (`saved_part`).

Adapters are read from safetensors only, and nothing that comes with them is run.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from agents.learner_config import LoraConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What `peft` puts before the names of weights."""
_UNSUPPORTED = ("modules_to_save", "trainable_token_indices", "layer_replication", "megatron_config")
"""Settings of a saved adapter with which it would change more than the output of layers, or import a module by name."""


def add_adapters(model: Any, config: LoraConfig, seed: int) -> Any:
    """Puts fresh adapters into a model and freezes all its other weights. At first they change nothing: their output is zero.

    Args:
        model: A transformers causal language model; it keeps its mode (training or evaluation).
        config: Rank, scale and layers.
        seed: Seeds the adapters' weights; no global generator is touched.

    Returns:
        The model given.

    Raises:
        ImportError: `peft` is not installed.
        ValueError: The rank is below 1, a target is no layer of the model, or the model has adapters already.
    """
    peft = _peft()
    if config.rank < 1:
        raise ValueError(f"lora.rank must be at least 1 for a model with adapters, got {config.rank}")
    if has_adapters(model):
        raise ValueError(
            "the model has adapters already: leave lora.rank at 0 to go on training them, or start from a merged model "
            "(agents.lora.merge)"
        )
    known = target_names(model)
    if unknown := [name for name in config.targets if name not in known]:
        raise ValueError(f"lora.targets: the model has no linear layer {unknown[0]!r}; known: {', '.join(known)}")
    mode = model.training
    # peft draws the weights on the CPU, whatever device they go to.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model.add_adapter(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=list(config.targets or known),
                task_type="CAUSAL_LM",
            )
        )
    model.train(mode)
    return model


def target_names(model: Any) -> list[str]:
    """Returns the names of the linear layers that adapters can be put on: all but the output layer, sorted."""
    output = model.get_output_embeddings()
    return sorted(
        {
            n.rsplit(".", 1)[-1]
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear | Conv1D) and m is not output
        }
    )


def has_adapters(model: Any) -> bool:
    """Returns whether a model has adapters in it."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


@contextlib.contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Switches the adapters off while it lasts: the model is its base. Not for passes whose gradient is still to come."""
    # Switching off also freezes them, and switching on makes all of them require gradients.
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        for parameter in frozen:
            parameter.requires_grad_(False)


def merge(model: Any) -> Any:
    """Returns a copy of a model with its adapters added to its weights, none frozen, for engines that know no adapters."""
    _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            merged.set_submodule(name, module.get_base_layer())
    # What transformers remembers of adapters; without it the copy is saved as any model is.
    del merged.peft_config
    merged._hf_peft_config_loaded = False
    return merged.requires_grad_(True)


def is_adapter_folder(name: str) -> bool:
    """Returns whether a local folder holds adapters instead of a whole model."""
    return (Path(name).expanduser() / ADAPTER_CONFIG).is_file()


def adapter_base(folder: Path) -> str:
    """Returns the model that the adapters in a folder belong to: a shipped one, a local folder or a hub id.

    Raises:
        ValueError: They are no adapters that can be used here.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text())
        kind, base = config["peft_type"], config["base_model_name_or_path"]
        more = [name for name in _UNSUPPORTED if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no settings of adapters ({type(error).__name__}: {error})") from error
    if kind != "LORA":
        raise ValueError(f"the adapters in {folder} are of kind {kind}; only LORA can be used")
    if more:
        raise ValueError(
            f"the adapters in {folder} use {more[0]}, which cannot be used here; merge them into their model"
        )
    if not base or not isinstance(base, str):
        raise ValueError(
            f"{path} does not say which model the adapters belong to: set base_model_name_or_path to a model folder or a hub id"
        )
    if is_adapter_folder(base):
        raise ValueError(
            f"the adapters in {folder} belong to {base}, which is adapters itself; merge those into their model"
        )
    return base


def load_adapters(model: Any, folder: Path) -> Any:
    """Puts saved adapters into the model that they belong to, ready for sampling and for further training.

    Args:
        model: The model without adapters; it keeps its mode.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The model given.

    Raises:
        ImportError: `peft` is not installed.
        FileNotFoundError: The folder has no weights in safetensors.
        ValueError: The weights are damaged or do not fit the model.
    """
    peft = _peft()
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {ADAPTER_WEIGHTS}: adapters are read from safetensors only; save them so"
        )
    mode = model.training
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(weights).items()}
        # First weights are drawn before those of the file replace them.
        with torch.random.fork_rng(devices=[]):
            found = model.load_adapter(peft_config=config, adapter_state_dict=state, is_trainable=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"the adapters in {weights} cannot be read or do not fit their model ({error})") from error
    if wrong := sorted(found.missing_keys) + sorted(found.unexpected_keys):
        raise ValueError(f"the adapters in {weights} do not fit their model: only one of the two has {wrong[0]}")
    model.train(mode)
    return model


class Adapters:
    """The adapters of a model, to be saved alone.

    Args:
        model: A model with adapters in it.
    """

    def __init__(self, model: Any):
        self._model = model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that `agents.models.load_model` and `peft` read.

        The model's own `save_pretrained` writes the same, but asks the hub for the base model's settings every time.
        """
        from peft import get_peft_model_state_dict

        (config,) = self._model.peft_config.values()
        config.save_pretrained(str(folder))
        state = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        save_file({_PREFIX + name: t.contiguous() for name, t in state.items()}, Path(folder) / ADAPTER_WEIGHTS)


def saved_part(model: Any) -> Any:
    """Returns what of a model a checkpoint has to hold: its adapters, or the model itself if it has none."""
    return Adapters(model) if has_adapters(model) else model


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"low-rank adapters need peft ({error}): pip install 'trace-envs[lora]'") from error
    return peft
