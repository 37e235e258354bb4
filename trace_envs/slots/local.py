"""`LocalSlots`: environments in this process.

Invariant: the environments are those that were given, stack of wrappers and all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gymnasium as gym

from trace_envs import snapshots
from trace_envs.slots.base import Opened, Result, SlotError, Slots
from trace_envs.snapshots import EnvSnapshot


def open_episode(
    env: gym.Env,
    seed: int | None,
    options: dict[str, Any] | None,
    carried: tuple[tuple[str, Mapping[str, Any]], ...] | None = None,
) -> Opened:
    """Resets an environment and takes the first snapshot; see `Slots.open`."""
    observation, info = env.reset(seed=seed, options=options)
    task = getattr(getattr(env.unwrapped, "state", None), "task", None)
    facts: dict[str, Any] = {}
    limit = getattr(env.unwrapped, "max_turns", None) or getattr(env.spec, "max_episode_steps", None)
    if limit is not None:
        facts["max_turns"] = int(limit)
    facts |= {name: getattr(task, name) for name in ("hops", "kind") if hasattr(task, name)}
    return Opened(observation, info, snapshots.snapshot(env), facts)


class LocalSlots(Slots):
    """Environments in this process, stepped one after the other.

    Args:
        envs: The environments.
        make: How to make another for each slot, where that is known.
    """

    def __init__(self, envs: Sequence[gym.Env], make: Sequence[Callable[[], gym.Env]] | None = None):
        self.envs = list(envs)
        self._make = make
        self.num_slots = len(self.envs)
        first = self.envs[0]
        self.spec, self.metadata = first.spec, first.metadata
        self.observation_space, self.action_space = first.observation_space, first.action_space

    def open(self, slot, seed, options=None, carried=None) -> Opened:  # type: ignore[no-untyped-def]
        """Resets one environment."""
        return open_episode(self.envs[slot], seed, options, carried)

    def restore(self, slot: int, snapshot: EnvSnapshot, seed: int | None) -> None:
        """Puts one environment back."""
        snapshots.restore(self.envs[slot], snapshot, seed=seed)

    def reseed(self, slot: int, seed: int) -> None:
        """Gives one environment a new seed."""
        snapshots.reseed(self.envs[slot], seed)

    def step(self, actions: Mapping[int, Any], keep: Collection[int] = ()) -> dict[int, Result]:
        """Steps the environments named."""
        results = {}
        for slot, action in actions.items():
            env = self.envs[slot]
            observation, reward, terminated, truncated, info = env.step(action)
            taken = None if terminated or truncated or slot not in keep else snapshots.snapshot(env)
            results[slot] = Result(observation, float(reward), bool(terminated), bool(truncated), info, taken)
        return results

    def replayed_turns(self) -> int:
        """Returns how many turns were repeated."""
        return 0

    def replace(self, slot: int) -> None:
        """Makes another environment; the one before is left to whoever still runs it."""
        if self._make is None:
            raise SlotError(slot, f"the environment of slot {slot} cannot be replaced: it is not known how to make another")
        self.envs[slot] = self._make[slot]()

    def close(self) -> None:
        """Closes the environments."""
        for env in self.envs:
            env.close()
