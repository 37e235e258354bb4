"""What stands, in a kept copy of an environment's attributes, for things that cannot be kept as they are.

Invariant: stand-ins are plain data; what they stand for is made or found when the copy is put back.
"""

from __future__ import annotations

import enum
import sys
from collections import deque
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np

from trace_envs.snapshots.adapters.generators import GeneratorState
from trace_envs.snapshots.codec import register
from trace_envs.snapshots.plain import EncodedName, EncodedObject, attributes_of


class Self(enum.Enum):
    """Stands, in a copy that is kept, where the original referred to the environment itself."""

    ENV = "the environment"


@dataclass(frozen=True, slots=True)
class Named:
    """Stands, in a copy that is kept, for a function or module that is found by its name.

    Attributes:
        module: Name of the module.
        path: Qualified name in it; empty for the module itself.
    """

    module: str
    path: str

    def is_known(self) -> bool:
        """Says whether this process has itself taken a snapshot that names it."""
        return self in _KNOWN


def name_of(value: Any) -> Named | None:
    """Returns the name by which a function or module is found again, `None` where there is none (a lambda, a closure)."""
    is_module = isinstance(value, ModuleType)
    named = Named(value.__name__, "") if is_module else Named(str(value.__module__), value.__qualname__)
    if found(named) is not value:
        return None
    _KNOWN.add(named)
    return named


def found(named: Named) -> Any:
    """Returns the function or module of a name, if it is imported already; `None` if there is none."""
    there: Any = sys.modules.get(named.module)
    for part in filter(None, named.path.split(".")):
        there = getattr(there, "__dict__", {}).get(part)
    return there if isinstance(there, FunctionType | BuiltinFunctionType | ModuleType) else None


_KNOWN: set[Named] = set()


@dataclass(frozen=True, slots=True)
class View:
    """Stands, in a copy that is kept, for an array that shares its memory with another.

    Attributes:
        memory: Copy of the bytes of the array that owns the memory.
        shape: Shape.
        dtype: Data type.
        offset: Where it begins in the memory, in bytes.
        strides: Strides, in bytes.
        writeable: Whether it may be written to.
    """

    memory: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    strides: tuple[int, ...]
    writeable: bool


def belongs(made: Any, env: gym.Env) -> bool:
    """Says whether a class or function may be among an environment's attributes: of the same package, or there now."""
    module = made.__name__ if isinstance(made, ModuleType) else str(made.__module__)
    if module.partition(".")[0] == type(env).__module__.partition(".")[0]:
        return True
    met: dict[int, Any] = {}
    pending = list(attributes_of(env).values())
    while pending:
        value = pending.pop()
        if id(value) in met or isinstance(value, gym.Space):
            continue
        met[id(value)] = value
        if type(value) is made or value is made:
            return True
        if isinstance(value, ModuleType | type):
            continue  # what a module or class has is not the environment's
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
        else:
            pending += attributes_of(value).values()
    return False


def holds_records(value: Any) -> bool:
    """Says whether a value was read from bytes and holds objects that are records still (`codec.revive`)."""
    met: dict[int, Any] = {}
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, EncodedObject | EncodedName):
            return True
        if isinstance(part, dict | list | tuple | set | frozenset | deque) and id(part) not in met:
            met[id(part)] = part
            pending += [*part, *part.values()] if isinstance(part, dict) else part
    return False


register(Self, "adapters.Self")
register(Named, "adapters.Named")
register(View, "adapters.View")
register(GeneratorState, "adapters.GeneratorState")
