"""What an adapter is: a way to carry the state of one kind of environment.

Invariant: an adapter either carries a state exactly or says why it cannot; it never guesses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import gymnasium as gym

from trace_envs.snapshots.record import EnvSnapshot


def env_id(env: gym.Env) -> str:
    """Returns the registered id of an environment, or the name of its class."""
    return env.spec.id if env.spec is not None else type(env).__name__


class Adapter(ABC):
    """Takes and puts back the state of bare environments. Adapters hold no state of their own."""

    name: ClassVar[str]

    @abstractmethod
    def why_not(self, env: gym.Env) -> str | None:
        """Returns `None` if this adapter can carry the environment, else the reason in a few words."""

    @abstractmethod
    def take(self, env: gym.Env) -> EnvSnapshot:
        """Returns the present moment.

        Raises:
            SnapshotUnsupportedError: Part of the state cannot be carried; the message names it.
        """

    @abstractmethod
    def put(self, env: gym.Env, taken: EnvSnapshot, seed: int | None) -> None:
        """Returns to a moment; with a seed, what is random from there on is new and a function of the seed."""

    def renew(self, env: gym.Env, seed: int) -> None:
        """Gives what is random from here on a new seed; equal to `put` at the present moment."""
        self.put(env, self.take(env), seed)


class Native(Adapter):
    """The environment's own `snapshot()` and `restore(snapshot, *, seed=None)`."""

    name = "native"

    def why_not(self, env: gym.Env) -> str | None:
        """Looks for the two methods."""
        missing = [m for m in ("snapshot", "restore") if not callable(getattr(env, m, None))]
        return f"it has no {' and no '.join(f'{m}()' for m in missing)}" if missing else None

    def take(self, env: gym.Env) -> EnvSnapshot:
        """An environment's own kind of snapshot travels as it is."""
        taken: Any = env.snapshot()  # type: ignore[attr-defined]
        return taken if isinstance(taken, EnvSnapshot) else EnvSnapshot(env_id(env), None, taken, adapter="own kind")

    def put(self, env: gym.Env, taken: EnvSnapshot, seed: int | None) -> None:
        """Calls the environment's `restore`."""
        env.restore(taken.payload if taken.adapter == "own kind" else taken, seed=seed)  # type: ignore[attr-defined]
