"""`EnvSnapshot`: one moment of one environment, as a value.

Invariant: a snapshot holds no reference to anything that a later step can change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

SCHEMA_VERSION = 2


class SnapshotUnsupportedError(TypeError):
    """The environment, or a wrapper around it, cannot be snapshotted; the message says what to add."""


class ReplayDivergenceError(RuntimeError):
    """An environment that is restored by repeating its actions did not do the same again.

    Attributes:
        turn: The turn, from 1, whose result differed; 0 is the reset.
    """

    def __init__(self, turn: int, message: str):
        super().__init__(turn, message)
        self.turn = turn
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class EnvSnapshot:
    """One moment of one environment.

    Attributes:
        env_id: Registered id (or class name) of the environment that it was taken from.
        turn: Number of turns taken in the episode; `None` where neither the environment nor a wrapper counts them.
        payload: The environment's own state, as its adapter keeps it.
        random_state: State of the environment's `np_random`, as its bit generator gives it, where the payload does not hold it.
        wrappers: For each wrapper of the stack, outermost first: class name and its mutable attributes.
        adapter: Name of the adapter that took it.
        config: What has to be equal in an environment that it is restored into (data set, limits, ...), plain data.
        observation: Last observation, where it is known.
        info: Last info, where it is known.
        episode_return: Sum of rewards so far, where it is known.
        version: Version of this record's layout.
    """

    env_id: str
    turn: int | None
    payload: Any
    random_state: Mapping[str, Any] | None = field(default=None, hash=False)
    wrappers: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=(), hash=False)
    adapter: str = "native"
    config: Mapping[str, Any] | None = field(default=None, hash=False)
    observation: Any = field(default=None, hash=False)
    info: Mapping[str, Any] | None = field(default=None, hash=False)
    episode_return: float | None = None
    version: int = SCHEMA_VERSION


@runtime_checkable
class Snapshotable(Protocol):
    """What an environment (or a wrapper, for everything inside it) offers in order to be branched.

    `restore(snapshot, seed=s)` puts the environment back and gives everything random that follows a new seed, so that two
    branches of one prefix do not share their luck; without a seed, the future repeats exactly.
    """

    def snapshot(self) -> Any:
        """Returns the present moment as a value."""
        ...

    def restore(self, snapshot: Any, *, seed: int | None = None) -> None:
        """Returns to a moment."""
        ...
