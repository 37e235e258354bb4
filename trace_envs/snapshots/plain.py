"""What values are made of, for those who compare, write and digest them.

Invariant: looking at a value runs none of its class's code and changes nothing.
"""

from __future__ import annotations

import contextlib
import random
import sys
from dataclasses import dataclass
from functools import lru_cache
from types import MemberDescriptorType
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class EncodedObject:
    """A plain Python object as it stands in bytes: the name of its class and its attributes, but no instance.

    Equal (`difference`, digest) to the object that it stands for.

    Attributes:
        class_name: `module:qualname`.
        attributes: Its attributes; other encoded objects, and itself, may be among their values.
    """

    class_name: str
    attributes: dict[str, Any]

    def __repr__(self) -> str:
        return f"EncodedObject({self.class_name!r}, {len(self.attributes)} attributes)"


@dataclass(frozen=True, slots=True)
class EncodedName:
    """A class, or a member of an enumeration, as it stands in bytes.

    Attributes:
        class_name: `module:qualname`.
        member: Name of the member; `None` for the class itself.
    """

    class_name: str
    member: str | None = None


def class_name(cls: type) -> str:
    """Returns `module:qualname`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def imported_class(name: str) -> type | None:
    """Returns the class of that `module:qualname` if its module is imported already; nothing is imported or run."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part) if isinstance(found, type) or found is not None else None
    return found if isinstance(found, type) else None


def is_plain(cls: type) -> bool:
    """Says whether instances keep their state in Python attributes alone, none in memory that C code looks after."""
    return not any("__new__" in vars(c) and not isinstance(vars(c)["__new__"], staticmethod) for c in cls.__mro__[:-1])


def why_not_plain(cls: type) -> str | None:
    """Returns `None` if attributes are all there is to an instance of a class, also to its class; else the reason."""
    if cls.__new__ is not object.__new__:
        return "it has a __new__ of its own"
    for name in ("__reduce__", "__reduce_ex__", "__getstate__"):
        if getattr(cls, name) is not getattr(object, name):
            return f"it customises pickling ({name})"
    for name in ("__setstate__", "__getnewargs__", "__getnewargs_ex__"):
        if hasattr(cls, name):
            return f"it customises pickling ({name})"
    if imported_class(class_name(cls)) is not cls:
        return "its class cannot be found by its name (it was made inside a function, or replaced)"
    return None


@lru_cache(maxsize=256)
def _slots(cls: type) -> dict[str, MemberDescriptorType]:
    """Returns what `__slots__` of a class and its bases made, by attribute name."""
    return {
        name: member
        for base in reversed(cls.__mro__)
        for name, member in vars(base).items()
        if isinstance(member, MemberDescriptorType) and base.__module__ != "builtins"
    }


def attributes_of(value: Any) -> dict[str, Any]:
    """Returns the attributes that an object holds itself, those of `__slots__` among them."""
    found: dict[str, Any] = {}
    for name, slot in _slots(type(value)).items():  # type: ignore[arg-type]
        with contextlib.suppress(AttributeError):  # never set
            found[name] = slot.__get__(value)
    with contextlib.suppress(AttributeError):  # no __dict__
        found.update(object.__getattribute__(value, "__dict__"))
    return found


def set_attributes(value: Any, attributes: dict[str, Any]) -> None:
    """Gives a bare instance of a plain class its attributes, past whatever its class does when they are set."""
    slots = _slots(type(value))  # type: ignore[arg-type]
    for name, attribute in attributes.items():
        if name in slots:
            slots[name].__set__(value, attribute)
        else:
            object.__getattribute__(value, "__dict__")[name] = attribute


def generator_state(value: Any) -> Any:
    """Returns the state of a random generator as plain data; `None` for anything else."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.BitGenerator):
        return value.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    # `SystemRandom` has no state to give.
    return value.getstate() if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom) else None
