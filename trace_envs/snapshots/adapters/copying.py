"""Copies of object graphs, one memo for all of a graph, that say where they cannot be made.

Invariant: a copy either has the same structure as the original (aliases, cycles, views of arrays) and shares with it only
what cannot change, or is refused with the path of what stands in the way.

`copy.deepcopy` does not say where it failed, trusts every class that customises pickling (Gymnasium's `EzPickle` makes a
*new* object from the constructor's arguments), separates arrays from their views, and takes several times as long.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium as gym
import numpy as np

from trace_envs.snapshots.adapters import generators
from trace_envs.snapshots.adapters.generators import GeneratorState
from trace_envs.snapshots.adapters.kinds import ATOMS, customises_pickling, is_rendering, name_of_class, route_of
from trace_envs.snapshots.adapters.standins import Named, Self, View, found, name_of
from trace_envs.snapshots.plain import EncodedName, EncodedObject
from trace_envs.snapshots.record import SnapshotUnsupportedError

__all__ = ["ATOMS", "Aliased", "Copier", "Encoded", "Self", "customises_pickling", "is_rendering", "slots_of"]

_PLAIN: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes whose instances were found to be nothing but their attributes."""


class Aliased(Exception):
    """Two arrays share memory; the copy has to be made again with `views`."""


class Encoded(Exception):
    """The kept copy was read from bytes, and its objects are records still (`codec.revive`)."""


class Copier:
    """One copy of one graph.

    Args:
        known: Objects that are not copied, and what takes their place.
        seed: Seed of the generators that `GeneratorState`s become when a kept copy is turned back; `None` keeps their state.
        keep: Make a copy to be kept (generators become `GeneratorState`s) rather than one to be used.
        views: Keep arrays that share memory as such (`View`), rather than raise `Aliased` where there are any.
        trusts: Says of a function or module that a kept copy names, but none that was made here, whether it may be used.
    """

    __slots__ = ("_alive", "_flat", "_memories", "_path", "keep", "memo", "met", "seed", "trusts", "views")

    def __init__(
        self,
        known: list[tuple[object, object]],
        *,
        keep: bool,
        seed: int | None = None,
        views: bool = False,
        trusts: Callable[[Any], bool] = lambda _: False,
    ):
        self.memo: dict[int, Any] = {id(original): copied for original, copied in known}
        self.keep = keep
        self.seed = seed
        self.views = views
        self.trusts = trusts
        self.met = 0
        self._memories: set[int] = set()
        self._flat: dict[int, np.ndarray] = {}
        self._path: list[str] = []
        self._alive: list[object] = [original for original, _ in known]

    def attribute(self, name: str, value: Any) -> Any:
        """Returns the copy of one attribute of the environment.

        Raises:
            SnapshotUnsupportedError: It cannot be copied; the message names what, and where it is.
        """
        self._path[:] = [name]
        try:
            return self.copy(value)
        except RecursionError:
            raise self.refusal(f"env.{name}", "is nested too deeply to be copied") from None

    def refusal(self, where: str, why: str) -> SnapshotUnsupportedError:
        """Returns the error to raise."""
        return SnapshotUnsupportedError(f"{where} {why}")

    def _failure(self, value: Any, error: Exception) -> SnapshotUnsupportedError:
        why = f"({name_of_class(type(value))}) cannot be copied ({type(error).__name__}: {error})"
        return self.refusal(self._here(), why)

    def _here(self) -> str:
        return "env." + "".join(self._path)

    def copy(self, value: Any) -> Any:
        """Returns the copy of a value of any kind."""
        kind: type = type(value)
        if kind in ATOMS:
            return value
        if (known := self.memo.get(id(value), self)) is not self:
            return known
        handler = _HANDLERS.get(kind)
        return handler(self, value) if handler is not None else self._other(value, kind)

    def _inside(self, step: str, value: Any) -> Any:
        if type(value) in ATOMS:
            return value
        self._path.append(step)
        copied = self.copy(value)
        self._path.pop()
        return copied

    def _remember(self, value: Any, copied: Any) -> Any:
        self.memo[id(value)] = copied
        self._alive.append(value)
        return copied

    def _list(self, value: list) -> list:
        copied: list = self._remember(value, [])
        copied.extend([x if type(x) in ATOMS else self._inside(f"[{i}]", x) for i, x in enumerate(value)])
        return copied

    def _tuple(self, value: tuple) -> tuple:
        parts = [x if type(x) in ATOMS else self._inside(f"[{i}]", x) for i, x in enumerate(value)]
        if (known := self.memo.get(id(value))) is not None:  # a cycle led back here
            return known
        same = all(a is b for a, b in zip(parts, value, strict=True))
        return self._remember(value, value if same else tuple(parts))

    def _dict(self, value: dict) -> dict:
        copied: dict = self._remember(value, {})
        for key, x in value.items():
            copied[key if type(key) in ATOMS else self._inside(".keys()", key)] = (
                x if type(x) in ATOMS else self._inside(f"[{key!r:.40}]", x)
            )
        return copied

    def _set(self, value: set | frozenset) -> set | frozenset:
        if all(type(x) in ATOMS for x in value):
            return self._remember(value, value.copy())
        return self._remember(value, type(value)([self._inside("{...}", x) for x in value]))

    def _array(self, value: np.ndarray) -> Any:
        if self.keep:
            owner = value if type(value.base) is not np.ndarray else value.base
            if owner.base is not None and owner.flags.writeable and not isinstance(owner.base, np.ndarray | bytes):
                of = name_of_class(type(owner.base))
                why = f"is an array in memory of a {of}, which a copy would not be; keep np.array(it)"
                raise self.refusal(self._here(), why)
            if self.views and owner.flags.forc and not owner.dtype.hasobject:
                return self._remember(value, self._as_view(value, owner))
            if id(owner) in self._memories:
                raise Aliased
            self._memories.add(id(owner))
        copied = self._remember(value, value.copy(order="K"))
        if value.dtype.hasobject:
            for where in np.ndindex(value.shape):
                copied[where] = self._inside(str(list(map(int, where))), value[where])
        if not value.flags.writeable:
            copied.flags.writeable = False
        return copied

    def _as_view(self, value: np.ndarray, owner: np.ndarray) -> View:
        flat = self._flat.get(id(owner))
        if flat is None:
            self._flat[id(owner)] = flat = owner.reshape(-1, order="A").view(np.uint8).copy()
        offset = value.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        return View(flat, value.shape, value.dtype, offset, value.strides, value.flags.writeable)

    def _view(self, value: View) -> Any:
        if self.keep:
            return value
        plain = isinstance(value.dtype, np.dtype) and not value.dtype.hasobject
        if not plain or type(value.memory) is not np.ndarray or value.memory.dtype != np.uint8:
            raise ValueError(f"the snapshot is damaged: {self._here()} looks at memory that is none of an array's")
        memory = self.copy(value.memory)
        view: np.ndarray = np.ndarray(value.shape, value.dtype, memory, value.offset, value.strides)
        view.flags.writeable = value.writeable
        return self._remember(value, view)

    def _method(self, value: MethodType) -> MethodType:
        return MethodType(value.__func__, self._inside(".__self__", value.__self__))

    def _bytearray(self, value: bytearray) -> bytearray:
        return self._remember(value, bytearray(value))

    def _frozen(self, value: GeneratorState) -> Any:
        if self.keep:
            return value
        made = generators.thaw(value) if self.seed is None else generators.seeded(value.kind, self.seed, self.met)
        self.met += 1
        return self._remember(value, made)

    def _name(self, value: Any) -> Any:
        if self.keep and (named := name_of(value)) is not None:
            return named
        owner = getattr(value, "__self__", None)
        if isinstance(value, BuiltinFunctionType) and type(owner) not in ATOMS and not isinstance(owner, ModuleType):
            of = name_of_class(type(owner))
            why = f"is a method of a {of}, which would stay that of the original; look it up when it is called"
            raise self.refusal(self._here(), why)
        for cell in getattr(value, "__closure__", None) or ():
            held = cell.cell_contents if _is_filled(cell) else None
            # An attribute itself is left to the environment that has one like it.
            if self.memo.get(id(held)) is Self.ENV and len(self._path) > 1:
                raise self.refusal(self._here(), "is a function around the environment itself; make it a method")
            if not self.keep and isinstance(held, gym.Env) and held is not self.memo.get(id(Self.ENV)):
                raise self.refusal(self._here(), "is a function around another environment; make it a method")
        return value

    def _by_name(self, value: Named) -> Any:
        if self.keep:
            return value
        name = f"{value.module}.{value.path}".rstrip(".")
        there = found(value)
        if there is None:
            raise self.refusal(self._here(), f"is {name}, which is not imported here; import it before restoring")
        # Bytes may come from anywhere: they must not hand an environment just any function to call.
        if not value.is_known() and not self.trusts(there):
            raise self.refusal(self._here(), f"is {name}, which is none of the functions of this environment's package")
        return there

    def _encoded(self, value: Any) -> Any:
        raise Encoded

    def _other(self, value: Any, kind: type) -> Any:
        route, why = route_of(kind)
        if route == "plain":
            return self._plain(value, kind)
        if route == "shared":
            return value
        if route == "refused":
            raise self.refusal(self._here(), f"is a {name_of_class(kind)}, which {why}")
        if route == "generator":
            return self._remember(value, self._generator(value, kind))
        if route == "deepcopy":
            return self._deepcopy(value)
        if route == "named tuple":
            return self._remember(value, tuple.__new__(kind, self._tuple(tuple(value))))
        try:
            reducer = copyreg.dispatch_table.get(kind)
            reduced = reducer(value) if reducer is not None else value.__reduce_ex__(4)
        except Exception as error:
            raise self._failure(value, error) from error
        return value if isinstance(reduced, str) else self._reduced(value, reduced)

    def _generator(self, value: Any, kind: type) -> GeneratorState:
        if not generators.is_generator(value):
            raise self.refusal(
                self._here(), f"is a {name_of_class(kind)}, a kind of generator that cannot be given a new seed"
            )
        if isinstance(value, np.random.Generator):
            if id(value.bit_generator) in self._memories:
                raise self.refusal(
                    self._here(), "draws from the bit generator of another attribute; share the generator"
                )
            self._memories.add(id(value.bit_generator))
        return generators.freeze(value)

    def _deepcopy(self, value: Any) -> Any:
        try:
            # With one memo for all: tensors that share memory go on sharing it.
            return self._remember(value, copy.deepcopy(value, self.memo))
        except Exception as error:
            raise self._failure(value, error) from error

    def _plain(self, value: Any, kind: type) -> Any:
        if kind not in _PLAIN:
            try:
                object.__reduce_ex__(value, 4)  # refuses what holds more than its attributes: connections, handles
            except TypeError as error:
                raise self._failure(value, error) from error
            _PLAIN.add(kind)
        copied = self._remember(value, object.__new__(kind))
        own = getattr(value, "__dict__", None)
        if own is not None:
            target = copied.__dict__
            for name, x in own.items():
                target[name] = x if type(x) in ATOMS else self._inside(f".{name}", x)
        for name in slots_of(kind):
            if (x := getattr(value, name, self)) is not self:
                object.__setattr__(copied, name, self._inside(f".{name}", x))
        return copied

    def _reduced(self, value: Any, reduced: Any) -> Any:
        """Makes a copy as `copy.deepcopy` would from what `__reduce_ex__` returned, through this copier."""
        function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        try:
            copied = self._remember(value, function(*[self._inside("()", x) for x in arguments]))
            if state is not None:
                state = self._inside(".__getstate__()", state)
                if hasattr(copied, "__setstate__"):
                    copied.__setstate__(state)
                else:
                    own, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                    vars(copied).update(own or {})
                    for name, x in (slots or {}).items():
                        setattr(copied, name, x)
            for i, x in enumerate(items or ()):
                copied.append(self._inside(f"[{i}]", x))
            for key, x in pairs or ():
                copied[self._inside(".keys()", key)] = self._inside(f"[{key!r:.40}]", x)
        except (SnapshotUnsupportedError, Aliased, Encoded, RecursionError):
            raise
        except Exception as error:
            raise self._failure(value, error) from error
        self._alive.append(reduced)  # ids of temporary objects stay taken while the copy is made
        return copied


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (asked for its effect)
    except ValueError:
        return False
    return True


def slots_of(cls: type) -> list[str]:
    """Returns the names of all slots of a class and its bases, private names as they are stored."""
    return copyreg._slotnames(cls)  # type: ignore[attr-defined, no-any-return]


_HANDLERS: dict[type, Callable[[Any, Any], Any]] = {
    list: Copier._list,
    tuple: Copier._tuple,
    dict: Copier._dict,
    set: Copier._set,
    frozenset: Copier._set,
    np.ndarray: Copier._array,
    bytearray: Copier._bytearray,
    MethodType: Copier._method,
    GeneratorState: Copier._frozen,
    View: Copier._view,
    FunctionType: Copier._name,
    BuiltinFunctionType: Copier._name,
    ModuleType: Copier._name,
    Named: Copier._by_name,
    EncodedObject: Copier._encoded,
    EncodedName: Copier._encoded,
}
