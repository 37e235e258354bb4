"""Rows of environments that are stepped and restored one by one, in this process or in processes of their own."""

from trace_envs.slots.base import Opened, Result, SlotError, Slots
from trace_envs.slots.local import LocalSlots

__all__ = ["LocalSlots", "Opened", "Result", "SlotError", "Slots", "make_slots"]


def make_slots(envs):  # type: ignore[no-untyped-def]
    """Returns the slots of a vector environment, or of a single one.

    Args:
        envs: A `SyncVectorEnv` (its environments are used as they are) or an environment.

    Raises:
        TypeError: The environments inside cannot be stepped one by one.
    """
    import gymnasium as gym

    if isinstance(envs, Slots):
        return envs
    if isinstance(envs, gym.Env):
        return LocalSlots([envs], [envs.spec.make] if envs.spec is not None else None)
    if isinstance(envs, gym.vector.SyncVectorEnv):
        return LocalSlots(envs.envs, envs.env_fns)
    raise TypeError(
        f"expected a SyncVectorEnv or a single environment, got {type(envs).__name__}; make it with "
        f'gym.make_vec(..., vectorization_mode="sync")'
    )
