"""`LocalSlots`: environments in this process.

Invariant: the environments are those that were given, stack of wrappers and all; nothing is added but `Replayable` where
nothing else can carry an environment, and that is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from trace_envs.slots.base import Opened, Result, SlotError, Slots
from trace_envs.slots.environment import Description, Replay, SlotEnvironment
from trace_envs.snapshots import EnvSnapshot


def check_alike(descriptions: Sequence[Description]) -> None:
    """Checks that snapshots can travel between slots, and warns, once for all of them, of environments that are replayed.

    Raises:
        ValueError: The environments differ; the message names the slot.
    """
    first = descriptions[0]
    for slot, other in enumerate(descriptions):
        first.check_equal(slot, other)
    if first.replayed is not None:
        warnings.warn(
            f"{first.env_id} is restored by repeating its actions (trace_envs.Replayable was put around it), which takes as "
            f"long as the turns did: {first.replayed}",
            UserWarning,
            stacklevel=4,  # who called make_slots
        )


class LocalSlots(Slots):
    """Environments in this process, stepped one after the other.

    Args:
        envs: The environments.
        make: How to make another for each slot, where that is known.
        replay: `"auto"` restores environments that nothing else can carry by repeating their actions, with a warning;
            `"never"` refuses them.
        owner: The vector that the environments are of; it is closed with them.

    Raises:
        SnapshotUnsupportedError: An environment cannot be branched.
        ValueError: The environments differ, are the same object, or reset themselves.
    """

    def __init__(
        self,
        envs: Sequence[gym.Env],
        make: Sequence[Callable[[], gym.Env]] | None = None,
        *,
        replay: Replay = "auto",
        owner: VectorEnv | None = None,
    ):
        slots: dict[int, int] = {}
        for slot, env in enumerate(envs):
            before = slots.setdefault(id(env.unwrapped), slot)
            if before != slot:
                raise ValueError(
                    f"slots {before} and {slot} are the same environment; each slot needs one of its own: the function that "
                    f"makes it has to return a new one each time"
                )
        self._slots = [SlotEnvironment(slot, env, replay) for slot, env in enumerate(envs)]
        self._make, self._replay, self._owner = make, replay, owner
        self._closed = False
        self._replayed = 0  # by environments that have been replaced
        self._replaying = "Replayable" in self._slots[0].description.wrappers  # all stacks are alike
        self.num_slots = len(self._slots)
        self._first = first = self._slots[0].description
        self.spec, self.metadata = self._slots[0].env.spec, first.metadata
        self.observation_space, self.action_space = first.observation_space, first.action_space
        check_alike([slot.description for slot in self._slots])

    @property
    def envs(self) -> list[gym.Env]:
        """The environments, one for each slot."""
        return [slot.env for slot in self._slots]

    def _open(self) -> list[SlotEnvironment]:
        if self._closed or (self._owner is not None and self._owner.closed):
            raise RuntimeError("the environments have been closed; make new ones")
        return self._slots

    def open(
        self,
        slot: int,
        seed: int | None,
        options: dict[str, Any] | None = None,
        carried: tuple[tuple[str, Mapping[str, Any]], ...] | None = None,
    ) -> Opened:
        """Resets one environment."""
        return self._open()[slot].open(seed, options, carried)

    def restore(self, slot: int, snapshot: EnvSnapshot, seed: int | None) -> None:
        """Puts one environment back; errors are raised at once."""
        self._open()[slot].restore(snapshot, seed)

    def reseed(self, slot: int, seed: int) -> None:
        """Gives one environment a new seed."""
        self._open()[slot].reseed(seed)

    def step(self, actions: Mapping[int, Any], keep: Collection[int] = ()) -> dict[int, Result]:
        """Steps the environments named, one after the other; the first exception ends it."""
        slots, keep = self._open(), set(keep)
        return {slot: slots[slot].step(action, slot in keep) for slot, action in actions.items()}

    def step_one(self, slot: int, action: Any, keep: bool, timeout: float | None = None) -> Result:
        """Steps one environment; `timeout` has no effect."""
        return self._open()[slot].step(action, keep)

    def replayed_turns(self) -> int:
        """Returns how many turns were repeated."""
        if not self._replaying:  # the usual case, asked for after every tree
            return self._replayed
        return self._replayed + sum(slot.replayed_turns() for slot in self._slots)

    def replace(self, slot: int) -> None:
        """Makes another environment; the one before is not closed, as it may hang: it is left to whoever still runs it."""
        before = self._open()[slot]
        if self._make is None:
            raise SlotError(
                slot,
                f"the environment of slot {slot} cannot be replaced, as it is not known how to make another; give a vector "
                f"(gym.make_vec) instead of an environment, or one that gym.make made",
            )
        fresh = SlotEnvironment(slot, self._make[slot](), self._replay)
        self._first.check_equal(slot, fresh.description)
        self._replayed += before.replayed_turns()
        self._slots[slot] = fresh

    def close(self) -> None:
        """Closes the environments, all of them even if one raises; again has no effect."""
        if self._closed:
            return
        self._closed = True
        if self._owner is not None:
            self._owner.closed = True
        close_all(slot.env.close for slot in self._slots)


def close_all(calls: Iterable[Callable[[], Any]]) -> None:
    """Makes every call, then raises the first exception."""
    first: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first
