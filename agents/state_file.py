"""Nested state on disk: arrays in safetensors, all else in JSON.

Invariant: what is read equals what was written, in type, dtype, shape and bits, and is never executed; each array comes back in
memory of its own, mapped from no file and shared with no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PLAIN, ARRAYS = "trainer.json", "trainer.arrays"
"""The second is a safetensors file by another name: engines take every `*.safetensors` in a model's folder for its weights."""
_TENSOR, _ARRAY, _SCALAR, _PAIRS, _TUPLE = "__tensor__", "__array__", "__scalar__", "__pairs__", "__tuple__"
_MARKS = (_TENSOR, _ARRAY, _SCALAR, _PAIRS, _TUPLE)
_NUMBERS = "biufc"
"""Kinds of numpy's dtypes that safetensors knows: bool, integers, floats and complex numbers."""
# Not in safetensors: complex numbers of double precision, and numpy's long double.
_UNKNOWN = (torch.complex128, torch.complex32)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes a state into a folder.

    Args:
        folder: It gets `trainer.json` and `trainer.arrays`.
        state: Tensors, numpy arrays and scalars, mappings (with keys of any plain type), lists, tuples, text, numbers, booleans
            and `None`, nested.

    Raises:
        TypeError: It holds something else; the message says where.
        OSError: It cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = flatten(state, "", tensors)
    try:
        save_file(tensors, folder / ARRAYS)
    except SafetensorError as error:  # which is what a full disk gives
        raise OSError(f"{folder / ARRAYS}: {error}") from error
    (folder / PLAIN).write_text(json.dumps(plain))


def read_state(folder: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote; tensors are on the CPU.

    Raises:
        ValueError: A file is missing or damaged.
    """
    try:
        return restore(json.loads((folder / PLAIN).read_text()), load_file(folder / ARRAYS))
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except (OSError, TypeError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replaces arrays by references to them.

    Args:
        value: A state or a part of it.
        path: Where in the state it is, for names and messages.
        tensors: Collects the arrays, as contiguous tensors that share memory with nothing.

    Returns:
        What JSON can hold.

    Raises:
        TypeError: It holds what no checkpoint can keep.
    """

    def kept(mark: str, tensor: torch.Tensor) -> dict[str, str]:
        # The number keeps apart what has the same path, such as {"a/b": x} and {"a": {"b": y}}.
        name = f"{len(tensors)}:{path}"
        tensors[name] = tensor
        return {mark: name}

    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.dtype in _UNKNOWN:
            raise TypeError(
                f"{path} holds a tensor of {value.dtype} and {value.layout}, which a checkpoint cannot keep"
            )
        whole = value.detach().cpu().resolve_conj().resolve_neg()
        return kept(_TENSOR, whole.clone(memory_format=torch.contiguous_format))
    if isinstance(value, np.str_):
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in _NUMBERS or value.dtype.itemsize > 8:
            raise TypeError(f"{path} holds a numpy array of {value.dtype}, which a checkpoint cannot keep")
        native = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
        return kept(_ARRAY if isinstance(value, np.ndarray) else _SCALAR, torch.from_numpy(native))
    if isinstance(value, Mapping):
        if all(isinstance(k, str) for k in value) and not any(k in _MARKS for k in value):
            return {str(k): flatten(v, f"{path}/{k}", tensors) for k, v in value.items()}
        return {_PAIRS: [[_key(k, f"{path}/{k}"), flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list):
        return [flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path or 'the state'} holds a {type(value).__name__}, which a checkpoint cannot keep")


def _key(key: Any, path: str) -> Any:
    """Returns the key of a mapping as JSON can hold it."""
    arrays: dict[str, torch.Tensor] = {}
    plain = flatten(key, path, arrays)
    if arrays:
        raise TypeError(
            f"{path} has a key of numpy or torch, which a checkpoint cannot keep; make it a plain number or text"
        )
    return plain


def restore(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Returns what `flatten` was given: mappings as dicts, subclasses of tuples and numbers as the plain ones.

    Raises:
        KeyError: An array is missing.
    """
    if isinstance(value, list):
        return [restore(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]].clone()
    if _ARRAY in value:
        return tensors[value[_ARRAY]].numpy().copy()
    if _SCALAR in value:
        return tensors[value[_SCALAR]].numpy()[()]
    if _PAIRS in value:
        return {restore(k, {}): restore(v, tensors) for k, v in value[_PAIRS]}
    if _TUPLE in value:
        return tuple(restore(v, tensors) for v in value[_TUPLE])
    return {k: restore(v, tensors) for k, v in value.items()}
