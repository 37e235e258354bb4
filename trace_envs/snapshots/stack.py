"""Snapshots through a whole stack of Gymnasium wrappers.

Invariant: everything is checked, and every copy made, before anything is changed; a restore that is refused leaves the
environment and its wrappers where they were.

The stack is walked from outside to the first environment (or wrapper) that has `snapshot()` and `restore()` of its own, or to
the bare environment, which an adapter carries; whatever stands around it is looked at wrapper by wrapper.
"""

from __future__ import annotations

import gymnasium as gym
from gymnasium.error import ClosedEnvironmentError

from trace_envs.arguments import random_seed
from trace_envs.snapshots import codec
from trace_envs.snapshots.adapters import adapter_for, env_id
from trace_envs.snapshots.forks import forks_itself, rewrapped, twin_of
from trace_envs.snapshots.record import SCHEMA_VERSION, EnvSnapshot
from trace_envs.snapshots.wrappers import kind_of, split

__all__ = ["fork", "reseed", "restore", "snapshot", "split"]


codec.register(EnvSnapshot, "EnvSnapshot")

NESTED = "nested"
"""In place of an adapter's name: the payload is a snapshot by which something further inside is restored."""


def snapshot(env: gym.Env) -> EnvSnapshot:
    """Snapshots an environment through its whole stack of wrappers.

    Raises:
        SnapshotUnsupportedError: The environment's or a wrapper's state cannot be carried; the message says what to add.
    """
    wrappers, inner = split(env)
    if not isinstance(inner, gym.Env):
        raise TypeError(f"expected a Gymnasium environment, got {type(env).__name__}")
    taken = adapter_for(inner).take(inner)
    if not wrappers:
        return taken
    turn, observation, info, total = taken.turn, taken.observation, taken.info, taken.episode_return
    if isinstance(inner, gym.Wrapper) and (info is not None or taken.wrappers):
        # A snapshot through a stack of its own: it goes back to that wrapper as it is.
        taken, info = EnvSnapshot(taken.env_id, turn, taken, adapter=NESTED), None
    states = []
    for wrapper in reversed(wrappers):
        kind = kind_of(wrapper)
        states.append((type(wrapper).__name__, kind.take(wrapper, env)))
        if kind.hides:
            observation = None if "observation" in kind.hides else observation
            total = None if "reward" in kind.hides else total
        if kind.counts:
            turns, so_far = kind.counted(wrapper)
            turn = turn if taken.turn is not None else turns
            total = total if so_far is None else so_far
    states.reverse()
    return EnvSnapshot(
        taken.env_id,
        turn,
        taken.payload,
        taken.random_state,
        tuple(states),
        taken.adapter,
        taken.config,
        observation,
        info,
        total,
        taken.version,
    )


def restore(env: gym.Env, taken: EnvSnapshot, *, seed: int | None = None) -> None:
    """Puts an environment and its wrappers back to a snapshot.

    Records of what has happened stay what they are: the queues and the count of `RecordEpisodeStatistics`, recorded frames.

    Args:
        env: An environment with the same stack of wrappers as the one that the snapshot was taken from.
        taken: The snapshot.
        seed: New seed for whatever is random from here on; `None` repeats the future exactly.

    Raises:
        ValueError: The snapshot is of another environment, another stack of wrappers, or another schema version.
        SnapshotUnsupportedError: The environment cannot be restored.
        ReplayDivergenceError: The environment is restored by repeating its actions, and did not do the same again.
        ClosedEnvironmentError: The environment was closed.
    """
    if not isinstance(taken, EnvSnapshot):
        raise TypeError(f"expected an EnvSnapshot, as trace_envs.snapshot(env) returns it, got {type(taken).__name__}")
    if taken.version != SCHEMA_VERSION:
        raise ValueError(
            f"the snapshot has schema version {taken.version}, this release reads version {SCHEMA_VERSION}"
        )
    if seed is not None:
        seed = random_seed(seed)
    wrappers, inner = split(env)
    names = [type(wrapper).__name__ for wrapper in wrappers]
    expected = [name for name, _ in taken.wrappers]
    if not wrappers and expected:
        names = _names_inside(inner)
    if names != expected:
        raise ValueError(
            f"the snapshot was taken through the wrappers {expected or 'none'}, this environment has {names or 'none'}; "
            f"take and restore it at the same level (env.unwrapped on both sides leaves wrappers alone)"
        )
    if taken.env_id != env_id(inner) and taken.env_id != env_id(inner.unwrapped):
        raise ValueError(f"the snapshot is of {taken.env_id!r}, this environment is {env_id(inner)!r}")
    for wrapper in wrappers:
        if isinstance(wrapper, gym.wrappers.PassiveEnvChecker) and wrapper.close_called:
            raise ClosedEnvironmentError(f"this {taken.env_id} was closed; make another environment to restore into")
    adapter = adapter_for(inner)
    ready = [
        kind_of(wrapper).ready(wrapper, state, env, seed)
        for wrapper, (_, state) in zip(wrappers, taken.wrappers, strict=False)  # none if the inner one has them
    ]
    adapter.put(inner, taken.payload if wrappers and taken.adapter == NESTED else taken, seed)
    for apply in ready:
        apply()


def _names_inside(inner: gym.Env) -> list[str]:
    """Returns the wrappers that something with snapshots of its own answers for."""
    wrappers: list[gym.Wrapper] = []
    while isinstance(inner, gym.Wrapper) and not wrappers:
        wrappers, inner = split(inner.env)
    return [type(wrapper).__name__ for wrapper in wrappers]


def reseed(env: gym.Env, seed: int) -> None:
    """Gives whatever is random from here on a new seed; the moment stays: `restore(env, snapshot(env), seed=seed)`.

    Raises:
        SnapshotUnsupportedError: The environment's or a wrapper's state cannot be carried.
    """
    wrappers, inner = split(env)
    adapter = adapter_for(inner)
    # Gymnasium's own wrappers draw from the environment's generator.
    others = [(wrapper, kind) for wrapper in wrappers if (kind := kind_of(wrapper)).draws]
    ready = [kind.ready(wrapper, kind.take(wrapper, env), env, seed) for wrapper, kind in others]
    adapter.renew(inner, seed)
    for apply in ready:
        apply()


def fork(env: gym.Env) -> gym.Env:
    """Returns an independent environment at the same moment, with wrappers of its own; see `trace_envs.snapshots.forks`.

    Args:
        env: The environment; it stays as it is.

    Raises:
        SnapshotUnsupportedError: The environment or a wrapper can neither be made again nor copied; the message says what to
            add.
    """
    wrappers, inner = split(env)
    if not isinstance(inner, gym.Env):
        raise TypeError(f"expected a Gymnasium environment, got {type(env).__name__}")
    if not forks_itself(inner):
        taken = snapshot(env)
        twin = rewrapped(wrappers, inner, twin_of(inner), env)
        restore(twin, taken)
        return twin
    twin = inner.fork()  # type: ignore[attr-defined]
    if wrappers:
        states = [kind_of(wrapper).take(wrapper, env) for wrapper in wrappers]
        twin = rewrapped(wrappers, inner, twin, env)
        for wrapper, state in zip(split(twin)[0], states, strict=True):
            kind_of(wrapper).ready(wrapper, state, twin, None)()
    return twin
