"""Copies of what a wrapper holds, for wrappers of any kind.

Invariant: a copy shares nothing that can change with the wrapper that it was made of, and refers to the environments of the
stack by their place in it; so it fits any stack of the same wrappers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import gymnasium as gym
import numpy as np

from trace_envs.snapshots import codec
from trace_envs.snapshots.adapters.copying import ATOMS, Aliased, Copier, Encoded
from trace_envs.snapshots.adapters.standins import belongs, name_of
from trace_envs.snapshots.plain import attributes_of
from trace_envs.snapshots.record import SnapshotUnsupportedError

_SPAWN = (
    1 << 16
)  # keeps wrappers' generators apart from the environment's, which are children 0, 1, ... of the same seed


@dataclass(frozen=True, slots=True)
class Layer:
    """Stands, in a copy that is kept, for an environment of the stack.

    Attributes:
        index: 0 is the bare environment, 1 the innermost wrapper, and so on.
    """

    index: int


@dataclass(frozen=True, slots=True)
class Closure:
    """Stands, in a copy that is kept, for a function that was made inside another: each wrapper has its own.

    Attributes:
        name: Module, qualified name and line.
    """

    name: str


codec.register(Layer, "wrappers.Layer")
codec.register(Closure, "wrappers.Closure")


def _closure(value: Any) -> Closure | None:
    """Returns what stands for a function that cannot be found by its name; `None` for anything else."""
    if type(value) is not FunctionType or name_of(value) is not None:
        return None
    return Closure(f"{value.__module__}:{value.__qualname__}:{value.__code__.co_firstlineno}")


def layers_of(env: gym.Env) -> list[gym.Env]:
    """Returns the environments of a stack, from the bare environment to the outermost wrapper."""
    layers = [env]
    while isinstance(env, gym.Wrapper):
        env = env.env
        layers.append(env)
    return layers[::-1]


def seed_of(seed: int, index: int) -> int:
    """Returns the seed of a wrapper's own generators.

    Args:
        seed: Seed of the restore.
        index: The wrapper's place in the stack, from inside.
    """
    words = np.random.SeedSequence(seed, spawn_key=(_SPAWN, index)).generate_state(4)
    return int.from_bytes(words.tobytes(), "little")


class _WrapperCopier(Copier):
    """Copies attributes of a wrapper; environments of its stack become `Layer`s, and `Layer`s these environments."""

    __slots__ = ("layers", "wrapper")

    def __init__(self, wrapper: gym.Wrapper, layers: list[gym.Env], *, keep: bool, **arguments: Any):
        known: list[tuple[object, object]] = [(env, Layer(i)) for i, env in enumerate(layers)] if keep else []
        super().__init__(known, keep=keep, **arguments)
        self.layers, self.wrapper = layers, wrapper

    def _other(self, value: Any, kind: type) -> Any:
        if kind is Layer and not self.keep:
            if not 0 <= value.index < len(self.layers):
                raise self.refusal(self._here(), f"is the environment {value.index} of a stack of {len(self.layers)}")
            return self.layers[value.index]
        return super()._other(value, kind)

    def refusal(self, where: str, why: str) -> SnapshotUnsupportedError:
        """Names the wrapper and says what to add."""
        cls = type(self.wrapper)
        return SnapshotUnsupportedError(
            f"the wrapper {cls.__module__}.{cls.__qualname__} cannot be carried: its attribute {where.removeprefix('env.')} "
            f"{why}. Give the wrapper get_wrapper_state() and set_wrapper_state(state), or remove it from the stack"
        )


def _is_atomic(values: Mapping[str, Any]) -> bool:
    for value in values.values():  # noqa: SIM110 (a third of the time of `all`)
        if type(value) not in ATOMS:
            return False
    return True


def keep(wrapper: gym.Wrapper, values: Mapping[str, Any], top: gym.Env) -> dict[str, Any]:
    """Returns a copy of attributes that stays as it is.

    Args:
        wrapper: Whose they are.
        values: The attributes.
        top: The outermost environment of the stack.

    Raises:
        SnapshotUnsupportedError: One cannot be copied; the message names wrapper and attribute.
    """
    if _is_atomic(values):
        return dict(values)
    layers = layers_of(top)
    try:
        return _kept(_WrapperCopier(wrapper, layers, keep=True), values)
    except Aliased:
        return _kept(_WrapperCopier(wrapper, layers, keep=True, views=True), values)


def _kept(copier: Copier, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if type(value) in ATOMS else _closure(value) or copier.attribute(name, value)
        for name, value in values.items()
    }


def use(
    wrapper: gym.Wrapper, kept: Mapping[str, Any], top: gym.Env, seed: int | None = None
) -> tuple[dict[str, Any], int]:
    """Returns a copy of kept attributes that a wrapper may have for its own, and how many generators it has.

    Args:
        wrapper: Who will have them.
        kept: What `keep` returned, or what was read from bytes.
        top: The outermost environment of the wrapper's stack.
        seed: Seed of generators among them; `None` keeps their state.

    Raises:
        SnapshotUnsupportedError: They hold what was not made in this process and cannot be found in the wrapper.
    """
    if _is_atomic(kept):
        return dict(kept), 0
    layers = layers_of(top)
    try:
        return _used(wrapper, kept, layers, seed)
    except Encoded:
        return _used(wrapper, codec.revive(dict(kept), lambda made: belongs(made, wrapper)), layers, seed)


def _used(
    wrapper: gym.Wrapper, kept: Mapping[str, Any], layers: list[gym.Env], seed: int | None
) -> tuple[dict[str, Any], int]:
    own = attributes_of(wrapper)
    copier = _WrapperCopier(wrapper, layers, keep=False, seed=seed, trusts=lambda there: belongs(there, wrapper))
    values = {}
    for name, value in kept.items():
        if type(value) is Closure:
            values[name] = own.get(name)
            if _closure(values[name]) != value:
                raise copier.refusal(name, f"was the function {value.name}, which it is no more")
        else:
            values[name] = value if type(value) in ATOMS else copier.attribute(name, value)
    return values, copier.met
