"""`Slots`: a row of environments, each of which goes its own way.

Invariant: nothing is reset or restored unless it was asked for; what happens in one slot does not depend on the others.

Drivers of trees use this instead of a vector environment, which steps all of its environments at once and resets them by
itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium as gym

from trace_envs.snapshots import EnvSnapshot


class Result(NamedTuple):
    """What one step gave; `snapshot` is `None` where none was asked for or the episode is over."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    snapshot: EnvSnapshot | None


@dataclass(frozen=True, slots=True)
class Opened:
    """An episode just begun.

    Attributes:
        observation: First observation.
        info: First info.
        snapshot: The first moment.
        facts: What is known of the task and worth keeping (plain data): `max_turns`, `level`, `kind`, `answers` where they
            exist.
        carried: State that the wrappers brought with them from earlier episodes, to open this episode again as it was
            (`NormalizeObservation` keeps its means); empty where no wrapper brings any.
    """

    observation: Any
    info: dict[str, Any]
    snapshot: EnvSnapshot
    facts: dict[str, Any] = field(default_factory=dict)
    carried: tuple[tuple[str, Mapping[str, Any]], ...] = ()


class SlotError(RuntimeError):
    """An environment of a slot failed in a way that is not an exception of its own (its process died, it hung).

    Attributes:
        slot: The slot.
    """

    def __init__(self, slot: int, message: str):
        super().__init__(slot, message)
        self.slot = slot
        self.message = message

    def __str__(self) -> str:
        return self.message


class Slots(ABC):
    """Environments that are opened, restored and stepped one by one.

    Attributes:
        num_slots: Number of environments.
        spec: Their spec, where they have one.
        observation_space: Of one environment.
        action_space: Of one environment.
        metadata: Of one environment.
    """

    num_slots: int
    spec: gym.envs.registration.EnvSpec | None
    observation_space: gym.Space
    action_space: gym.Space
    metadata: dict[str, Any]

    @abstractmethod
    def open(
        self,
        slot: int,
        seed: int | None,
        options: dict[str, Any] | None = None,
        carried: tuple[tuple[str, Mapping[str, Any]], ...] | None = None,
    ) -> Opened:
        """Resets one environment.

        Args:
            slot: Which.
            seed: Passed to `reset`.
            options: Passed to `reset`.
            carried: `Opened.carried` of an episode that is to begin as it did then.
        """

    @abstractmethod
    def restore(self, slot: int, snapshot: EnvSnapshot, seed: int | None) -> None:
        """Puts one environment back to a snapshot taken in any slot; see `trace_envs.restore`.

        Environments in processes of their own are restored while the caller goes on, all at the same time; what goes wrong
        there is raised by the next call on the slot.
        """

    def settle(self, slot: int, timeout: float | None = None) -> None:
        """Waits for what `restore` and `reseed` began in a slot; nothing to do where they are finished when they return.

        Raises:
            TimeoutError: It took longer than `timeout` seconds; `replace` the slot before it is used again.
            Exception: Whatever going back raised.
        """
        return

    @abstractmethod
    def reseed(self, slot: int, seed: int) -> None:
        """Gives what is random from here on a new seed; see `trace_envs.reseed`. Errors come as those of `restore` do."""

    @abstractmethod
    def step(self, actions: Mapping[int, Any], keep: Collection[int] = ()) -> dict[int, Result]:
        """Steps the environments named, all at the same time where they have processes of their own.

        What is returned is the caller's own: observations, and the containers and arrays of infos, are copies. When an
        environment raises, what other environments gave in the same call is lost; `step_one` keeps each apart.

        Args:
            actions: An action for each slot that is to step.
            keep: Those of them whose snapshot is wanted after the step, if the episode goes on.

        Raises:
            Exception: Whatever an environment raised, with a note that names the slot.
        """

    @abstractmethod
    def step_one(self, slot: int, action: Any, keep: bool, timeout: float | None = None) -> Result:
        """Steps one environment; slots may be stepped at the same time from different threads.

        Args:
            slot: Which.
            action: What to do there.
            keep: Whether the snapshot is wanted after the step, if the episode goes on.
            timeout: Seconds to wait for an environment in a process of its own. Environments in this process cannot be
                interrupted: there it has no effect, and a caller that must not wait steps them in a thread.

        Raises:
            TimeoutError: The step took longer; `replace` the slot before it is used again.
            Exception: Whatever the environment raised, with a note that names the slot.
        """

    @abstractmethod
    def replayed_turns(self) -> int:
        """Returns how many turns have been repeated so far to restore states."""

    @abstractmethod
    def replace(self, slot: int) -> None:
        """Puts a new environment in the place of one that hangs or died.

        Raises:
            SlotError: It is not known how to make another.
        """

    @abstractmethod
    def close(self) -> None:
        """Closes the environments."""
