"""Snapshots of environments: values that can be kept, compared, sent to another process, and restored any number of times.

Invariant: a snapshot holds no reference to anything that a later step can change.

An environment of this package (or any environment that has the same three methods) is snapshotted by its own
`snapshot()`/`restore()`; whatever stands around it in a stack of Gymnasium wrappers is looked at wrapper by wrapper. A
wrapper whose state cannot be carried is named in a `SnapshotUnsupportedError`: nothing is ever restored by halves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym

SCHEMA_VERSION = 1


class SnapshotUnsupportedError(TypeError):
    """The environment, or a wrapper around it, cannot be snapshotted; the message says what to add."""


@dataclass(frozen=True, slots=True)
class EnvSnapshot:
    """One moment of one environment.

    Attributes:
        env_id: Registered id (or class name) of the environment that it was taken from.
        turn: Number of turns taken in the episode.
        payload: The environment's own immutable state.
        random_state: State of the environment's `np_random`, as its bit generator gives it.
        wrappers: For each stateful wrapper of the stack, outermost first: class name and its mutable attributes.
        version: Version of this record's layout.
    """

    env_id: str
    turn: int
    payload: Any
    random_state: Mapping[str, Any] | None = field(default=None, hash=False)
    wrappers: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=(), hash=False)
    version: int = SCHEMA_VERSION


@runtime_checkable
class Snapshotable(Protocol):
    """What an environment offers in order to be branched.

    `restore(snapshot, seed=s)` puts the environment back and gives everything random that follows a new seed, so that two
    branches of one prefix do not share their luck; without a seed, the future repeats exactly.
    """

    def snapshot(self) -> EnvSnapshot:
        """Returns the present moment as a value."""
        ...

    def restore(self, snapshot: EnvSnapshot, *, seed: int | None = None) -> None:
        """Returns to a moment."""
        ...


# Mutable attributes of Gymnasium's own wrappers that belong to an episode. A wrapper class that is not listed may hold no
# mutable state of its own beyond what every wrapper has.
_WRAPPER_STATE: dict[str, tuple[str, ...]] = {
    "TimeLimit": ("_elapsed_steps",),
    "OrderEnforcing": ("_has_reset",),
    "PassiveEnvChecker": (),
    "RecordEpisodeStatistics": (
        "episode_count",
        "episode_start_time",
        "episode_returns",
        "episode_lengths",
        "time_queue",
        "return_queue",
        "length_queue",
    ),
    "TransformObservation": (),
    "TransformReward": (),
    "TransformAction": (),
    "FilterObservation": (),
    "FlattenObservation": (),
}

# The checker looks at the first calls after it was made, and keeps what they returned in order to compare it with the
# next. A restored environment has had its first calls.
_CHECKED = {"checked_reset": True, "checked_step": True, "checked_data_reuse": True, "_previous_data": None}


def _stack(env: gym.Env) -> tuple[list[gym.Wrapper], gym.Env]:
    wrappers = []
    while isinstance(env, gym.Wrapper):
        wrappers.append(env)
        env = env.env
    return wrappers, env


def _wrapper_state(wrapper: gym.Wrapper) -> tuple[str, dict[str, Any]]:
    name = type(wrapper).__name__
    if name not in _WRAPPER_STATE or not type(wrapper).__module__.startswith("gymnasium."):
        raise SnapshotUnsupportedError(
            f"the wrapper {type(wrapper).__module__}.{name} may hold state that a snapshot would lose; remove it from the "
            f"stack, or snapshot the environment inside it (env.unwrapped)"
        )
    if name == "PassiveEnvChecker":
        return name, _CHECKED
    return name, {attribute: copy.copy(getattr(wrapper, attribute)) for attribute in _WRAPPER_STATE[name]}


@dataclass(frozen=True, slots=True)
class _Foreign:
    """What the `snapshot()` of an environment returned that has a kind of its own; it must be a value."""

    value: Any


def snapshot(env: gym.Env) -> EnvSnapshot:
    """Snapshots an environment through its whole stack of wrappers.

    Raises:
        SnapshotUnsupportedError: The environment has no `snapshot()`, or a wrapper's state cannot be carried.
    """
    wrappers, inner = _stack(env)
    if not isinstance(inner, Snapshotable):
        raise SnapshotUnsupportedError(
            f"{type(inner).__name__} cannot be branched: give it snapshot() and restore(snapshot, *, seed=None) "
            f"(see trace_envs.snapshots.Snapshotable)"
        )
    taken = inner.snapshot()
    if not isinstance(taken, EnvSnapshot):
        # An environment's own kind of snapshot travels as it is.
        name = inner.spec.id if inner.spec is not None else type(inner).__name__
        taken = EnvSnapshot(name, 0, _Foreign(taken))
    if not wrappers:
        return taken
    return replace(taken, wrappers=tuple(map(_wrapper_state, wrappers)))


def restore(env: gym.Env, taken: EnvSnapshot, *, seed: int | None = None) -> None:
    """Puts an environment and its wrappers back to a snapshot.

    Args:
        env: An environment with the same stack of wrappers as the one that the snapshot was taken from.
        taken: The snapshot.
        seed: New seed for whatever is random from here on; `None` repeats the future exactly.

    Raises:
        ValueError: The snapshot is of another environment, another stack of wrappers, or another schema version.
        SnapshotUnsupportedError: The environment has no `restore()`.
    """
    wrappers, inner = _stack(env)
    if not isinstance(inner, Snapshotable):
        raise SnapshotUnsupportedError(f"{type(inner).__name__} has no restore(snapshot, *, seed=None)")
    names = [type(w).__name__ for w in wrappers]
    expected = [name for name, _ in taken.wrappers]
    if names != expected:
        raise ValueError(
            f"the snapshot was taken through the wrappers {expected or 'none'}, this environment has {names or 'none'}; "
            f"take and restore it at the same level (env.unwrapped on both sides leaves wrappers alone)"
        )
    inner.restore(taken.payload.value if isinstance(taken.payload, _Foreign) else taken, seed=seed)
    for wrapper, (_, attributes) in zip(wrappers, taken.wrappers, strict=True):
        for name, value in attributes.items():
            setattr(wrapper, name, copy.copy(value))


def fork(env: gym.Env) -> gym.Env:
    """Returns an independent copy of an environment of this package, at the same moment.

    Raises:
        SnapshotUnsupportedError: The environment has no `fork()` of its own.
    """
    wrappers, inner = _stack(env)
    if wrappers:
        raise SnapshotUnsupportedError("fork() copies bare environments; call it on env.unwrapped")
    if not hasattr(inner, "fork"):
        raise SnapshotUnsupportedError(f"{type(inner).__name__} has no fork()")
    return inner.fork()
