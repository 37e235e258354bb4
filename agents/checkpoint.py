"""Checkpoints: everything that a run needs to go on as if it had never stopped.

Invariant: a checkpoint directory either is complete or does not exist: it is written under another name, flushed to disk and
renamed; one that it replaces is set aside under a third name and removed last. Arrays are in safetensors, all else in JSON;
nothing that is read is ever executed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT_VERSION = 1
_ASIDE = ".replaced-"
_TENSOR, _PAIRS, _NUMPY = "__tensor__", "__pairs__", "__numpy__"


class CheckpointError(ValueError):
    """A checkpoint is damaged, foreign, or of another version; the message names the file."""


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replaces arrays by references, and collects them."""
    if isinstance(value, torch.Tensor | np.ndarray):
        # Tensors that share memory are refused by safetensors; a checkpoint keeps each as its own.
        # The number keeps apart what has the same path, such as {"a/b": x} and {"a": {"b": y}}.
        name = f"{len(tensors)}:{path}"
        tensors[name] = torch.as_tensor(value).detach().cpu().clone().contiguous()
        return {_TENSOR: name, _NUMPY: isinstance(value, np.ndarray)}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) for k in value):
            return {k: _flatten(v, f"{path}/{k}", tensors) for k, v in value.items()}
        return {_PAIRS: [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path or 'the state'} holds a {type(value).__name__}, which a checkpoint cannot keep")


def _restore(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            tensor = tensors[value[_TENSOR]]
            return tensor.numpy() if value[_NUMPY] else tensor
        if _PAIRS in value:
            return {k: _restore(v, tensors) for k, v in value[_PAIRS]}
        return {k: _restore(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    directory: Path, update: int, model: Any, tokenizer: Any, state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Writes a checkpoint and removes the oldest ones.

    Args:
        directory: Where checkpoints live; the new one is `update-<number>` in it.
        update: Number of policy updates done.
        model: Saved as a transformers folder, so that a checkpoint can be loaded like any model.
        tokenizer: Saved beside it.
        state: Arrays and plain data, nested.
        keep: How many checkpoints stay.

    Returns:
        The checkpoint's directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final, temporary = directory / f"update-{update:06d}", directory / f".writing-{update:06d}"
    aside = directory / f"{_ASIDE}{update:06d}"
    _recover(directory)
    for stale in directory.glob(".writing-*"):
        shutil.rmtree(stale)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    tensors: dict[str, torch.Tensor] = {}
    plain = _flatten(state, "", tensors)
    save_file(tensors, temporary / "trainer.safetensors")
    (temporary / "trainer.json").write_text(json.dumps({"version": FORMAT_VERSION, "update": update, "state": plain}))
    for file in temporary.iterdir():
        _sync(file)
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    _sync(directory)
    shutil.rmtree(aside, ignore_errors=True)
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def _recover(directory: Path) -> None:
    """Puts back a checkpoint that was set aside for a new one that a crash kept from taking its place."""
    for aside in directory.glob(f"{_ASIDE}*"):
        final = directory / f"update-{aside.name.removeprefix(_ASIDE)}"
        if final.exists():
            shutil.rmtree(aside)
        else:
            os.replace(aside, final)


def list_checkpoints(directory: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    _recover(directory)
    return sorted(p for p in directory.glob("update-*") if p.is_dir())


def load_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """Reads a checkpoint's trainer state.

    Returns:
        The number of updates done, and the state.

    Raises:
        CheckpointError: A file is missing, cut short, or of another version.
    """
    try:
        record = json.loads((path / "trainer.json").read_text())
        if not isinstance(record, dict):
            raise ValueError("trainer.json holds no record")
        if record.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint {path} has version {record.get('version')}, this release reads version {FORMAT_VERSION}"
            )
        return int(record["update"]), _restore(record["state"], load_file(path / "trainer.safetensors"))
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({error} is missing); remove it to use an earlier one"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({error}); remove it to use an earlier one"
        ) from error
