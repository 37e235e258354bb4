"""How a learner's weights reach a vLLM engine.

Invariant: after a load the engine computes with the weights that the learner has, adapters merged, rounded to the engine's
dtype and to nothing else; the learner's model is only read.

Two ways: *direct* hands the tensors over within the process, *file* writes a safetensors file that every worker reads. Both end
in the worker's own `reload_weights`, which loads layer by layer into the memory that CUDA graphs remember.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

WEIGHTS = "model.safetensors"
WORKER = "agents.policies.weight_sync.WeightReceiver"
"""What an engine is given as `worker_extension_cls`, so that `load_direct` and `load_file` find their other end."""


def engine_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a model's weights as a checkpoint names them, adapters merged, tied weights once.

    One layer at a time: what has to be computed (merged adapters, experts split as in the checkpoint) takes a layer's memory.

    Args:
        model: A transformers causal language model, with or without adapters (`agents.lora`).
    """
    for _, layer in groupby(_merged_weights(model), key=lambda named: _layer_of(named[0])):
        yield from revert_weight_conversion(model, dict(layer)).items()


def _layer_of(name: str) -> str:
    """Returns the part of a weight's name up to the number of its layer, if it is in one."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _merged_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    adapted = dict(_adapted_layers(model))
    for name, tensor in model.state_dict().items():
        owner, _, rest = name.partition(".base_layer.")
        if owner in adapted and rest:
            yield f"{owner}.{rest}", _with_adapters(adapted[owner], tensor) if rest == "weight" else tensor
        elif ".lora_" not in name and name not in model.all_tied_weights_keys:
            yield name, tensor


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    if not any(".base_layer." in name for name, _ in model.named_parameters()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


@torch.no_grad()
def _with_adapters(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Returns a layer's weight with its adapters added, as `agents.lora.merge` adds them."""
    merged = weight.clone()
    for name in layer.active_adapters:
        merged += layer.get_delta_weight(name).to(weight.dtype)
    return merged


def load_direct(engine: Any, model: Any) -> None:
    """Hands the weights to an engine whose worker is in this process.

    Args:
        engine: A vLLM `LLM` made with `worker_extension_cls=WORKER`.
        model: The learner's.
    """
    engine.collective_rpc("receive_weights", args=(engine_weights(model),))


def write_weights(model: Any, folder: Path) -> Path:
    """Writes the weights for `receive_file` and returns the file."""
    path = folder / WEIGHTS
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in engine_weights(model)}, path)
    return path


class WeightReceiver:
    """What vLLM's workers are given besides their own methods; each worker calls it on itself."""

    def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces the model's weights."""
        worker: Any = self
        model = worker.get_model()
        _let_experts_be_packed_again(model)
        worker.reload_weights(weights_iterator=weights)
        _renew_tied_layers(model)

    def receive_file(self, path: str) -> None:
        """Replaces the model's weights by those in a safetensors file."""
        with safe_open(path, framework="pt") as weights:
            self.receive_weights((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118


# What `reload_weights` of vLLM 0.32 leaves undone where layers keep packed copies of their weights, as they do on a CPU:


def _let_experts_be_packed_again(model: torch.nn.Module) -> None:
    """Has a CPU's mixture of experts take the next weights for its first, which are the only ones that it packs."""
    from vllm.platforms import current_platform

    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if current_platform.is_cpu() and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


@torch.no_grad()
def _renew_tied_layers(model: torch.nn.Module) -> None:
    """Has an output layer that is tied to the embedding pack the new weights, which were loaded into the embedding alone."""
    seen: set[int] = set()
    for module in model.modules():
        weight, method = module._parameters.get("weight"), getattr(module, "quant_method", None)
        if weight is None or method is None:
            continue
        if id(weight) in seen:
            method.process_weights_after_loading(module)
        seen.add(id(weight))
