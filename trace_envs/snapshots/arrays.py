"""Arrays, bytes and random generators as JSON, the leaves of the codec.

Invariant: nothing is allocated before the data at hand was found to fill it, and no generator gets a state that could lead it
outside its own memory.
"""

from __future__ import annotations

import base64
import math
import random
import re
from typing import Any

import numpy as np

BIT_GENERATORS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
GENERATORS: tuple[type, ...] = (np.random.Generator, np.random.RandomState, random.Random, *BIT_GENERATORS.values())
LARGEST_POOL = 1024
_MOST_EMPTY = 1 << 16  # elements of no bytes that an array may have
_TYPE = re.compile(r"[<>|=]?[biufcmMSUV]\d{1,18}(\[\d{0,9}[a-zA-Zμ]{1,8}\])?|[<>|=]?[mM]8")
# How far these generators have got in their buffers; they trust it without looking.
_POSITIONS = {"MT19937": ("state", "pos", 624), "Philox": (None, "buffer_pos", 4)}


def text_of_bytes(data: Any) -> str:
    """Returns bytes as Base64."""
    return base64.b64encode(data).decode("ascii")


def bytes_of_text(text: str) -> bytes:
    """Inverse of `text_of_bytes`."""
    return base64.b64decode(text, validate=True)


def text_of_float(value: float) -> str:
    """Returns a float so that `float` reads back the same bits (every NaN as one)."""
    return "nan" if math.isnan(value) else repr(value)


def size(value: Any) -> int:
    """Returns a length that was read, if it can be one."""
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a length, got {value!r:.40}")
    return value


def describe_dtype(dtype: np.dtype) -> Any:
    """Returns a dtype as JSON.

    Raises:
        ValueError: It holds objects, or is not one of NumPy's own.
    """
    if dtype.names is not None and dtype.fields is not None:
        placed = [(name, dtype.fields[name]) for name in dtype.names]
        titles = [field[2] if len(field) == 3 else None for _, field in placed]
        if any(not isinstance(title, str | None) for title in titles):
            raise ValueError("arrays with fields whose titles are not strings are not")
        return ["record", dtype.itemsize, [[name, describe_dtype(f[0]), f[1]] for name, f in placed], titles]
    if dtype.subdtype is not None:
        return ["block", describe_dtype(dtype.subdtype[0]), list(dtype.subdtype[1])]
    if dtype.hasobject or not _TYPE.fullmatch(dtype.str):
        raise ValueError(f"arrays of dtype {dtype} are not")
    return dtype.str


def dtype(head: Any) -> np.dtype:
    """Inverse of `describe_dtype`."""
    if isinstance(head, str):
        if not _TYPE.fullmatch(head):
            raise ValueError(f"expected a dtype, got {head!r:.40}")
        return np.dtype(head)
    if head[0] == "block":
        return np.dtype((dtype(head[1]), tuple(map(size, head[2]))))
    _, itemsize, fields, titles = head
    names, formats, offsets = zip(*fields, strict=True) if fields else ((), (), ())
    made = {
        "names": list(names),
        "formats": list(map(dtype, formats)),
        "offsets": list(map(size, offsets)),
        "titles": titles,
    }
    return np.dtype(made | {"itemsize": size(itemsize)})  # type: ignore[call-overload]


def describe(array: np.ndarray, canonical: bool) -> list[Any]:
    """Returns dtype, shape and content of an array as JSON.

    Args:
        array: The array.
        canonical: Leave out what makes no difference: which NaN it is, what stands between the fields of a record.

    Raises:
        ValueError: It holds objects, or elements of no bytes beyond reason.
    """
    kind = describe_dtype(array.dtype)
    if array.dtype.itemsize == 0 and array.size > _MOST_EMPTY:
        raise ValueError(f"{array.size} elements of no bytes are not")
    return [kind, list(array.shape), _canonical(array) if canonical else text_of_bytes(array.tobytes())]


def _canonical(array: np.ndarray) -> Any:
    if array.dtype.names is not None:
        return [_canonical(np.asarray(array[name])) for name in array.dtype.names]
    if array.dtype.kind == "c":
        return [_canonical(array.real), _canonical(array.imag)]
    if array.dtype.kind == "f":
        if array.dtype.itemsize > 8:  # with bytes that mean nothing
            return ["nan" if np.isnan(x) else repr(x) for x in array.reshape(-1)]
        array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
    return text_of_bytes(array.tobytes())


def array(head: Any) -> np.ndarray:
    """Inverse of `describe`."""
    kind, shape, text = dtype(head[0]), tuple(map(size, head[1])), bytes_of_text(head[2])
    count = math.prod(shape)
    if count * kind.itemsize != len(text) or (kind.itemsize == 0 and count > _MOST_EMPTY) or len(shape) > 32:
        raise ValueError(f"an array of shape {head[1]!r:.40} and dtype {kind} does not have {len(text)} bytes")
    if count == 0 or kind.itemsize == 0:
        if math.prod(n for n in shape if n) > 1 << 40:
            raise ValueError(f"an array cannot have the shape {head[1]!r:.40}")
        made = np.ndarray(shape, kind, buffer=bytearray(1))
        made.flags.writeable = True
        return made
    return np.ndarray(shape, kind, buffer=bytearray(text))


def check_generator_state(state: Any) -> None:
    """Refuses a bit generator's state that would lead it outside its own memory; lets pass what is no such state."""
    if not isinstance(state, dict) or state.get("bit_generator") not in _POSITIONS:
        return
    inner, name, most = _POSITIONS[state["bit_generator"]]
    position = (state if inner is None else state[inner])[name]
    if not 0 <= int(position) <= most:
        raise ValueError(f"a generator's {name} must be from 0 to {most}, got {position!r:.40}")


def seed_sequence(state: dict[str, Any]) -> np.random.SeedSequence:
    """Returns a seed sequence as it was."""
    if not 4 <= state["pool_size"] <= LARGEST_POOL:
        raise ValueError(
            f"a seed sequence's pool_size must be from 4 to {LARGEST_POOL}, got {state['pool_size']!r:.40}"
        )
    return np.random.SeedSequence(**state)


def generator(kind: str, state: Any, seed: np.random.SeedSequence | None) -> Any:
    """Returns a generator of NumPy's that goes on from a state.

    Args:
        kind: Name of its class.
        state: As the generator itself gave it.
        seed: Where it came from, if that is known.
    """
    bits = BIT_GENERATORS[state["bit_generator"]](0 if seed is None else seed)
    if kind == "RandomState":
        made = np.random.RandomState(bits)
        made.set_state(state)
        return made
    bits.state = state
    if kind == "Generator":
        return np.random.Generator(bits)
    if kind != type(bits).__name__:
        raise ValueError(f"expected a generator, got {kind!r:.40}")
    return bits
