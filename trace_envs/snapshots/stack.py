"""Snapshots through a whole stack of Gymnasium wrappers.

Invariant: an environment is checked before it is changed; a restore that is refused leaves everything where it was.

The stack is walked from outside to the first environment (or wrapper) that has `snapshot()` and `restore()` of its own, or to
the bare environment, which an adapter carries; whatever stands around it is looked at wrapper by wrapper.
"""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym

from trace_envs.snapshots.adapters import adapter_for, env_id
from trace_envs.snapshots.record import SCHEMA_VERSION, EnvSnapshot, Snapshotable, SnapshotUnsupportedError
from trace_envs.snapshots.wrappers import restore_wrapper, turns_and_return, wrapper_state


def split(env: gym.Env) -> tuple[list[gym.Wrapper], gym.Env]:
    """Returns the wrappers of a stack, outermost first, and what they stand around."""
    wrappers = []
    while isinstance(env, gym.Wrapper) and not isinstance(env, Snapshotable):
        wrappers.append(env)
        env = env.env
    return wrappers, env


def snapshot(env: gym.Env) -> EnvSnapshot:
    """Snapshots an environment through its whole stack of wrappers.

    Raises:
        SnapshotUnsupportedError: The environment's or a wrapper's state cannot be carried; the message says what to add.
    """
    wrappers, inner = split(env)
    taken = adapter_for(inner).take(inner)
    if not wrappers:
        return taken
    turn, total = turns_and_return(wrappers)
    return replace(
        taken,
        turn=turn if taken.turn is None else taken.turn,
        episode_return=total if taken.episode_return is None else taken.episode_return,
        wrappers=tuple(map(wrapper_state, wrappers)),
    )


def restore(env: gym.Env, taken: EnvSnapshot, *, seed: int | None = None) -> None:
    """Puts an environment and its wrappers back to a snapshot.

    Args:
        env: An environment with the same stack of wrappers as the one that the snapshot was taken from.
        taken: The snapshot.
        seed: New seed for whatever is random from here on; `None` repeats the future exactly.

    Raises:
        ValueError: The snapshot is of another environment, another stack of wrappers, or another schema version.
        SnapshotUnsupportedError: The environment cannot be restored.
        ReplayDivergenceError: The environment is restored by repeating its actions, and did not do the same again.
    """
    if not isinstance(taken, EnvSnapshot):
        raise TypeError(f"expected an EnvSnapshot, as trace_envs.snapshot(env) returns it, got {type(taken).__name__}")
    if taken.version != SCHEMA_VERSION:
        raise ValueError(f"the snapshot has schema version {taken.version}, this release reads version {SCHEMA_VERSION}")
    wrappers, inner = split(env)
    names = [type(w).__name__ for w in wrappers]
    expected = [name for name, _ in taken.wrappers]
    if names != expected:
        raise ValueError(
            f"the snapshot was taken through the wrappers {expected or 'none'}, this environment has {names or 'none'}; "
            f"take and restore it at the same level (env.unwrapped on both sides leaves wrappers alone)"
        )
    if taken.env_id != env_id(inner):
        raise ValueError(f"the snapshot is of {taken.env_id!r}, this environment is {env_id(inner)!r}")
    adapter_for(inner).put(inner, taken, seed)
    for wrapper, (_, attributes) in zip(wrappers, taken.wrappers, strict=True):
        restore_wrapper(wrapper, attributes)  # type: ignore[arg-type]


def reseed(env: gym.Env, seed: int) -> None:
    """Gives whatever is random from here on a new seed; the moment stays: `restore(env, snapshot(env), seed=seed)`."""
    _, inner = split(env)
    adapter_for(inner).renew(inner, seed)


def fork(env: gym.Env) -> gym.Env:
    """Returns an independent copy of an environment of this package, at the same moment.

    Raises:
        SnapshotUnsupportedError: The environment has no `fork()` of its own.
    """
    wrappers, inner = split(env)
    if wrappers:
        raise SnapshotUnsupportedError("fork() copies bare environments; call it on env.unwrapped")
    if not hasattr(inner, "fork"):
        raise SnapshotUnsupportedError(f"{type(inner).__name__} has no fork()")
    return inner.fork()
