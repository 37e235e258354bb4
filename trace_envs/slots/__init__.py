"""Rows of environments that are stepped and restored one by one, in this process or in processes of their own."""

from __future__ import annotations

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from trace_envs.slots.base import Opened, Result, SlotError, Slots
from trace_envs.slots.environment import Replay
from trace_envs.slots.local import LocalSlots
from trace_envs.slots.process import ProcessSlots

__all__ = ["LocalSlots", "Opened", "ProcessSlots", "Result", "SlotError", "Slots", "make_slots"]


def make_slots(envs: VectorEnv | gym.Env | Slots, *, replay: Replay = "auto") -> Slots:
    """Returns the slots of a vector environment, or of a single one.

    Args:
        envs: One of

            - a `SyncVectorEnv`: its environments are used as they are;
            - an `AsyncVectorEnv`: its environment functions, `context` and `daemon` are taken over by `ProcessSlots`, whose
              worker processes can take and restore snapshots; the vector itself is closed. Its other settings
              (`autoreset_mode`, `shared_memory`, `copy`, `max_concurrency`) do not apply;
            - a single environment;
            - slots, which are returned.
        replay: `"auto"` restores environments that nothing else can carry by repeating their actions, with a warning;
            `"never"` refuses them.

    Raises:
        TypeError: The environments inside cannot be stepped one by one.
        SnapshotUnsupportedError: They cannot be branched.
        ValueError: The vector is closed, or its environments are not alike, or reset themselves.
    """
    if isinstance(envs, Slots):
        return envs
    if isinstance(envs, gym.Env):
        return LocalSlots([envs], [envs.spec.make] if envs.spec is not None else None, replay=replay)
    if isinstance(envs, (SyncVectorEnv, AsyncVectorEnv)) and envs.closed:
        raise ValueError(f"the {type(envs).__name__} has been closed; make a new one")
    if isinstance(envs, SyncVectorEnv):
        return LocalSlots(envs.envs, envs.env_fns, replay=replay, owner=envs)
    if isinstance(envs, AsyncVectorEnv):
        if envs.worker is not None:
            raise TypeError(
                "the AsyncVectorEnv has a worker function of its own, which cannot take snapshots; make it without worker="
            )
        envs.close()
        return ProcessSlots(envs.env_fns, envs.context, envs.daemon, replay=replay)
    name = type(envs).__name__
    if isinstance(envs, gym.vector.VectorWrapper):
        raise TypeError(
            f"{name} wraps a whole vector, whose environments then cannot go their own ways; put a wrapper around each "
            f'environment instead: gym.make_vec(..., vectorization_mode="sync", wrappers=[...])'
        )
    if isinstance(envs, VectorEnv):
        raise TypeError(
            f"{name} computes all of its environments at once, so that they cannot go their own ways; make them one by one: "
            f'gym.make_vec(..., vectorization_mode="sync"), with wrappers=[...] for what was around it'
        )
    raise TypeError(
        f"expected a SyncVectorEnv, an AsyncVectorEnv or a single environment, got {name}; make one with "
        f'gym.make_vec(..., vectorization_mode="sync")'
    )
