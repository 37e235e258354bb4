"""The adapter that copies an environment's attributes, for environments that are plain Python.

Invariant: what is put back is every attribute that the environment had, and no other; aliases, cycles and references to
the environment itself are as they were. What it cannot vouch for it refuses, naming the attribute.

Left out of the moment: `spec` and `metadata`; declared tables (`declare_static`); windows, surfaces and clocks; the
environment's spaces, but for the state of their generators.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any

import gymnasium as gym

from trace_envs.snapshots import codec
from trace_envs.snapshots.adapters import generators
from trace_envs.snapshots.adapters.base import Foreign
from trace_envs.snapshots.adapters.copying import (
    ATOMS,
    Aliased,
    Copier,
    Encoded,
    customises_pickling,
    is_rendering,
    slots_of,
)
from trace_envs.snapshots.adapters.standins import Self, belongs
from trace_envs.snapshots.adapters.statics import fingerprint, statics_of
from trace_envs.snapshots.plain import class_name
from trace_envs.snapshots.record import SnapshotUnsupportedError

_NEVER = frozenset({"spec", "metadata"})


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of an environment at one moment.

    Attributes:
        of: Class of the environment, as "module:qualname".
        values: The attributes; what can change is copied.
        copied: Names of those values that have to be copied again when they are put back.
        spaces: For each attribute that is a space that was sampled from, the states of its generators.
        tables: Digest of the attributes declared static, which are not among the values; `None` if there are none.
    """

    of: str
    values: dict[str, Any] = field(hash=False)
    copied: tuple[str, ...]
    spaces: dict[str, tuple[generators.GeneratorState | None, ...]] = field(hash=False)
    tables: str | None


codec.register(Attributes, "adapters.Attributes")


@lru_cache(maxsize=512)
def _slots(cls: type) -> tuple[str, ...]:
    return tuple(name for name in slots_of(cls) if name not in _NEVER)


@lru_cache(maxsize=512)
def _name(cls: type) -> str:
    return class_name(cls)


class AttributeCopy(Foreign):
    """Copies the attributes of the bare environment."""

    name = "deepcopy"

    def why_not(self, env: gym.Env) -> str | None:
        """Looks at how the class is pickled, then tries a copy."""
        cls: type = type(env)
        custom = customises_pickling(cls)
        if custom is not None:
            return (
                f"{cls.__name__} customises pickling ({custom[0]} of {custom[1].__name__}), so a copy of it need not be "
                f"at the same moment"
            )
        try:
            self._values(env)
        except SnapshotUnsupportedError as error:
            return str(error)
        return None

    def state(self, env: gym.Env) -> Attributes:
        """Copies the attributes.

        Raises:
            SnapshotUnsupportedError: One cannot be copied; the message names it.
        """
        generators.touch(env)
        try:
            return self._values(env)
        except SnapshotUnsupportedError as error:
            raise SnapshotUnsupportedError(
                f"{error}; leave it out, give {type(env).__name__} snapshot() and restore(snapshot, *, seed=None), or wrap it "
                f"in trace_envs.Replayable(env)"
            ) from error

    def _values(self, env: gym.Env) -> Attributes:
        try:
            return self._taken(env, views=False)
        except Aliased:
            return self._taken(env, views=True)

    def _taken(self, env: gym.Env, *, views: bool) -> Attributes:
        cls: type = type(env)
        static = statics_of(cls)
        values = vars(env).copy() if hasattr(env, "__dict__") else {}
        for name in _slots(cls):
            if hasattr(env, name):
                values[name] = getattr(env, name)
        spaces, copied = {}, []
        copier = Copier([(env, Self.ENV)], keep=True, views=views)
        for name in [n for n, value in values.items() if type(value) not in ATOMS]:
            value = values[name]
            if name in static or name in _NEVER:
                del values[name]
            elif isinstance(value, gym.Space):
                if any(states := generators.space_states(value)):
                    spaces[name] = states
                del values[name]
            elif is_rendering(value):
                values[name] = None  # as it is before anything was drawn; whoever has a window keeps it
            else:
                values[name] = copier.attribute(name, value)
                if type(values[name]) not in ATOMS:
                    copied.append(name)
        copied.sort()
        return Attributes(_name(cls), values, tuple(copied), spaces, fingerprint(env, static))

    def adopt(self, env: gym.Env, payload: Any, seed: int | None) -> None:
        """Makes the attributes what they were; nothing is changed if one cannot be.

        Raises:
            ValueError: The attributes are of another class, or the declared tables of the two environments differ.
        """
        cls: type = type(env)
        if not isinstance(payload, Attributes) or payload.of != _name(cls):
            of = payload.of if isinstance(payload, Attributes) else type(payload).__name__
            raise ValueError(f"the snapshot holds the attributes of {of!r}, the environment is a {_name(cls)!r}")
        static = statics_of(cls)
        if payload.tables != fingerprint(env, static):
            raise ValueError(
                f"the snapshot is of a {cls.__name__} whose tables ({', '.join(sorted(static))}) differ from this one's; "
                f"make both with the same arguments"
            )
        for name, states in payload.spaces.items():
            space = getattr(env, name, None)
            if not isinstance(space, gym.Space) or len(list(generators.subspaces(space))) != len(states):
                raise ValueError(
                    f"the snapshot is of a {cls.__name__} with another {name} than this one's: {space!r:.80}"
                )
        try:
            values, used = self._thawed(env, payload, seed)
        except Encoded:
            payload = codec.revive(payload, lambda made: belongs(made, env))
            values, used = self._thawed(env, payload, seed)
        own = vars(env) if hasattr(env, "__dict__") else {}
        slots = _slots(cls)
        for name in own.keys() - values.keys():
            if not (name in static or name in _NEVER or isinstance(own[name], gym.Space) or is_rendering(own[name])):
                del own[name]
        for name in slots:
            if name in values:
                object.__setattr__(env, name, values.pop(name))
            elif hasattr(env, name):
                object.__delattr__(env, name)
        own.update(values)
        if seed is not None and "_np_random_seed" in own:
            own["_np_random_seed"] = seed
        for name in sorted(payload.spaces):  # checked above
            used = generators.set_space_states(getattr(env, name), payload.spaces[name], seed, used)

    @staticmethod
    def _thawed(env: gym.Env, payload: Attributes, seed: int | None) -> tuple[dict[str, Any], int]:
        """Returns the values to set, and how many generators the seed was used for."""
        values = payload.values.copy()
        own = vars(env) if hasattr(env, "__dict__") else {}
        known: list[tuple[object, object]] = [(Self.ENV, env)]
        frozen = values.get("_np_random")
        there = own.get("_np_random")
        keeps = seed is None and type(frozen) is generators.GeneratorState and generators.can_take(frozen, there)
        if keeps:
            known.append((frozen, there))
        copier = Copier(known, keep=False, seed=seed, trusts=lambda there: belongs(there, env))
        for name in payload.copied:
            value = values[name]
            if type(value) is FunctionType and getattr(own.get(name), "__code__", None) is value.__code__:
                values[name] = own[name]  # a function made inside another: each environment has its own
            else:
                values[name] = copier.attribute(name, value)
        for name in [n for n, value in own.items() if type(value) not in ATOMS and is_rendering(value)]:
            values.pop(name, None)
        if keeps:  # last: nothing is changed if something else cannot be
            assert isinstance(frozen, generators.GeneratorState)
            generators.thaw_into(frozen, there)
        return values, copier.met
