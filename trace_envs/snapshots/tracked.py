"""`SnapshotWrapper`: what one puts around an environment in order to branch it by hand.

Invariant: `observation`, `info`, `turn` and `episode_return` are those of the moment where the environment is, whether it was
stepped there or restored.
"""

from __future__ import annotations

import copy
from typing import Any, SupportsFloat, TypeVar

import gymnasium as gym
from gymnasium.error import ClosedEnvironmentError

from trace_envs.snapshots import stack
from trace_envs.snapshots.adapters import adapter_for, env_id
from trace_envs.snapshots.record import EnvSnapshot, SnapshotUnsupportedError
from trace_envs.snapshots.replay import Replayable

Self = TypeVar("Self", bound="SnapshotWrapper")


class SnapshotWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Gives any environment `snapshot()`, `restore(snapshot, *, seed=None)` and `fork()`, and says where it is.

    Its snapshots hold, besides the moment, what was last seen there: observation, info, turn and return. Observation and info
    are copied at every step.

    Args:
        env: The environment, with whatever wrappers.
        replay: Where nothing else can carry the environment, restore it by repeating its actions: `Replayable` is put around
            the bare environment, inside of the wrappers, before its next reset.

    Raises:
        SnapshotUnsupportedError: Nothing can carry the environment; the message says what to add.
    """

    def __init__(self, env: gym.Env, replay: bool = False):
        gym.utils.RecordConstructorArgs.__init__(self, replay=replay)
        super().__init__(_branching(env, replay))
        self._observation: Any = None
        self._info: dict[str, Any] | None = None
        self._turn = 0
        self._return = 0.0
        self._closed = False

    @property
    def observation(self) -> Any:
        """What was last observed: a copy."""
        self._check_reset()
        return copy.deepcopy(self._observation)

    @property
    def info(self) -> dict[str, Any]:
        """The last info: a copy."""
        return copy.deepcopy(self._check_reset())

    @property
    def turn(self) -> int:
        """Steps taken in the episode."""
        self._check_reset()
        return self._turn

    @property
    def episode_return(self) -> float:
        """Sum of the episode's rewards so far."""
        self._check_reset()
        return self._return

    def _check_reset(self) -> dict[str, Any]:
        if self._closed:
            raise ClosedEnvironmentError(f"this {env_id(self.unwrapped)} was closed; make another environment")
        if self._info is None:
            raise RuntimeError("call reset() first")
        return self._info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._observation, self._info = self._copied(observation, "observation"), self._copied(info, "info")
        self._turn, self._return = 0, 0.0
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Takes one step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._turn += 1
        self._return += float(reward)
        self._observation, self._info = self._copied(observation, "observation"), self._copied(info, "info")
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Closes the environment; nothing can be restored into it afterwards."""
        self._closed = True
        super().close()

    def snapshot(self) -> EnvSnapshot:
        """Returns the present moment.

        Raises:
            SnapshotUnsupportedError: The environment's or a wrapper's state cannot be carried.
            RuntimeError: There was no reset.
            ClosedEnvironmentError: The environment was closed.
        """
        info = copy.deepcopy(self._check_reset())
        taken = stack.snapshot(self.env)
        if taken.adapter in ("own kind", stack.NESTED):  # nobody but the stack inside may open that
            taken = EnvSnapshot(taken.env_id, None, taken, adapter=stack.NESTED)
        return EnvSnapshot(
            taken.env_id,
            self._turn,
            taken.payload,
            taken.random_state,
            taken.wrappers,
            taken.adapter,
            taken.config,
            copy.deepcopy(self._observation),
            info,
            self._return,
            taken.version,
        )

    def restore(self, taken: EnvSnapshot, *, seed: int | None = None) -> None:
        """Returns to a moment.

        Args:
            taken: Taken through a `SnapshotWrapper` around an environment of the same id and wrappers.
            seed: New seed for whatever is random from here on; `None` repeats the future exactly.

        Raises:
            ValueError: The snapshot was not taken through a `SnapshotWrapper`, or is of another environment, other wrappers,
                or another schema version. The environment stays where it was.
            ReplayDivergenceError: The environment is restored by repeating its actions, and did not do the same again.
            ClosedEnvironmentError: The environment was closed.
        """
        if self._closed:
            self._check_reset()
        if isinstance(taken, EnvSnapshot) and (
            taken.info is None or taken.turn is None or taken.episode_return is None
        ):
            raise ValueError(
                f"the snapshot of {taken.env_id} does not hold the last info, turn and return, because it was not taken "
                f"through a SnapshotWrapper; take it by snapshot() of one, or restore it by trace_envs.restore(env.env, ...)"
            )
        inside = taken.payload if isinstance(taken, EnvSnapshot) and taken.adapter == stack.NESTED else taken
        stack.restore(self.env, inside, seed=seed)
        self._observation, self._info = copy.deepcopy(taken.observation), dict(copy.deepcopy(taken.info or {}))
        self._turn, self._return = int(taken.turn or 0), float(taken.episode_return or 0.0)

    def reseed(self, seed: int) -> None:
        """Gives whatever is random from here on a new seed; the moment stays."""
        stack.reseed(self.env, seed)

    def fork(self: Self) -> Self:
        """Returns an independent environment at the same moment."""
        twin = type(self)(stack.fork(self.env), **self._saved_kwargs)
        twin._observation, twin._info = copy.deepcopy((self._observation, self._info))
        twin._turn, twin._return, twin._closed = self._turn, self._return, self._closed
        return twin

    def _copied(self, value: Any, what: str) -> Any:
        try:
            return copy.deepcopy(value)
        except Exception as error:
            raise SnapshotUnsupportedError(
                f"the {what} of {env_id(self.unwrapped)} cannot be copied ({type(error).__name__}: {error}); let it hold plain "
                f"data, or put a wrapper around the environment that leaves out what is none, inside of SnapshotWrapper"
            ) from error


def _branching(env: gym.Env, replay: bool) -> gym.Env:
    """Returns the environment, with `Replayable` in its stack if it is allowed and needed."""
    wrappers, inner = stack.split(env)
    try:
        adapter_for(inner)
        return env
    except SnapshotUnsupportedError as error:
        if not replay:
            error.add_note("SnapshotWrapper(env, replay=True) puts Replayable where it belongs")
            raise
    twin = Replayable(inner)
    if not wrappers:
        return twin
    wrappers[-1].env = twin
    return env
