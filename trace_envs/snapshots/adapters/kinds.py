"""What kinds of objects there are among an environment's attributes, and how each is copied.

Invariant: a class is copied only in a way that is known to lose nothing; the others are refused, and why is said.
"""

from __future__ import annotations

import copyreg
import ctypes
import enum
import random
import sys
import weakref
from functools import lru_cache
from types import GeneratorType
from typing import cast

import numpy as np

_C_DATA: type = ctypes._SimpleCData.__mro__[1]

ATOMS: frozenset[type] = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis), type(NotImplemented)}
    | {t for t in set(np.sctypeDict.values()) if t not in (np.object_, np.void)}
)
"""Types whose instances never change."""

# Packages whose classes customise pickling without losing anything; all other classes that do are refused.
_TRUSTED = frozenset({"numpy", "pygame", "torch"}) | sys.stdlib_module_names
# Of pygame; its rectangles, vectors and colours are data like any other.
_RENDERING = frozenset(
    {"Surface", "Clock", "Window", "Font", "Sound", "Channel", "Renderer", "Texture", "Image", "Joystick", "PixelArray"}
)
_PICKLING = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs_ex__", "__getnewargs__")
_SHARED = (type, enum.Enum, np.dtype, np.ufunc)


@lru_cache(maxsize=1024)
def _is_of_pygame(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "pygame" and kind.__name__ in _RENDERING


def is_rendering(value: object) -> bool:
    """Says whether a value is a window, surface, clock or the like, or a collection of such: never part of a moment."""
    kind: type = type(value)
    if kind is list or kind is tuple or kind is dict:
        parts = value.values() if isinstance(value, dict) else cast("list[object] | tuple[object, ...]", value)
        return len(parts) > 0 and all(map(is_rendering, parts))
    return _is_of_pygame(kind)


def customises_pickling(cls: type) -> tuple[str, type] | None:
    """Returns the first method by which a class customises how it is pickled, and the class it has it from; `None` if none."""
    for name in _PICKLING:
        for owner in cls.__mro__[:-1]:
            if name in vars(owner):
                return name, owner
    return None


def _is_trusted(name: str, owner: type) -> bool:
    """Says whether a class that customises pickling is known to lose nothing by it."""
    module = owner.__module__
    return (
        module.partition(".")[0] in _TRUSTED
        or module.startswith("gymnasium.spaces")
        # What dataclasses generate for frozen classes with slots.
        or getattr(vars(owner)[name], "__module__", None) == "dataclasses"
    )


@lru_cache(maxsize=1024)
def route_of(kind: type) -> tuple[str, str]:
    """Returns how instances of a class that has no handler are copied, and if not at all, why."""
    if _is_of_pygame(kind) or issubclass(kind, _SHARED):
        return "shared", ""
    if issubclass(kind, _C_DATA | ctypes.CDLL):
        return "refused", "holds memory that only C code knows the meaning of (ctypes)"
    if issubclass(kind, weakref.ref | weakref.ProxyType | weakref.CallableProxyType):
        return "refused", "refers weakly to something that a copy would not hold"
    if issubclass(kind, random.SystemRandom):
        return "refused", "draws from the operating system, so that no future repeats"
    if issubclass(kind, GeneratorType):
        return "refused", "is a running generator and cannot be copied"
    if issubclass(kind, np.memmap):
        return "refused", "is memory of a file, which every restored moment would still share"
    if hasattr(kind, "__del__"):
        return "refused", "has a finaliser (__del__), so it looks after something that a copy would share"
    if issubclass(kind, np.random.BitGenerator):
        return "refused", "cannot be given a new seed by itself; keep the np.random.Generator around it"
    if issubclass(kind, np.random.Generator | np.random.RandomState | random.Random):
        return "generator", ""
    if hasattr(kind, "__deepcopy__"):
        return "deepcopy", ""
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return "named tuple", ""
    custom = customises_pickling(kind)
    if custom is not None and kind not in copyreg.dispatch_table and not _is_trusted(*custom):
        return "refused", f"customises pickling ({custom[0]}) and may lose state when it is copied"
    if custom is None and kind.__new__ is object.__new__:
        try:
            object.__new__(kind)
        except TypeError:  # its instances are made by C code
            return "reduced", ""
        return "plain", ""
    return "reduced", ""


def name_of_class(cls: type) -> str:
    """Returns the full name of a class, for messages."""
    return f"{cls.__module__}.{cls.__qualname__}"
