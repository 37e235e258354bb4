"""`SlotEnvironment`: one environment made ready to branch, as slots of every kind hold it.

Invariant: what it hands out is the caller's own: no later step of the environment changes an observation, info or snapshot
that was returned before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from trace_envs import snapshots
from trace_envs.env import ToolEnv
from trace_envs.slots.base import Opened, Result, SlotError
from trace_envs.snapshots import EnvSnapshot, SnapshotUnsupportedError, adapter_for
from trace_envs.snapshots.adapters import env_id
from trace_envs.snapshots.adapters.kinds import ATOMS
from trace_envs.snapshots.replay import Replayable
from trace_envs.snapshots.stack import split
from trace_envs.snapshots.wrappers import carried_state, restore_carried
from trace_envs.state import Task

Replay = Literal["auto", "never"]
_new: Callable[[Any, Any], Result] = tuple.__new__  # type: ignore[assignment]


def copied(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Returns a copy of arrays and of dicts, lists and tuples of them; anything else is what `leaf` makes of it.

    Environments may write each observation, and each info, into the same object.
    """
    if isinstance(value, np.ndarray):
        return copy.deepcopy(value) if value.dtype.hasobject else value.copy()
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, item in value.items():
            twin[key] = copied(item, leaf)
        return twin
    if isinstance(value, list):
        items = copy.copy(value)
        items[:] = [copied(item, leaf) for item in value]
        return items
    if isinstance(value, tuple):
        return tuple.__new__(type(value), [copied(item, leaf) for item in value])
    return leaf(value)


def copied_observation(value: Any) -> Any:
    """Returns an observation that is the caller's own, whatever it is made of."""
    return copied(value, lambda leaf: leaf if type(leaf) in ATOMS else copy.deepcopy(leaf))


def copied_info(value: Any) -> Any:
    """Returns an info that is the caller's own; objects in it that are no plain containers or arrays stay as they are.

    An info may hold anything, also what cannot be copied.
    """
    return copied(value, lambda leaf: leaf) if value else {}


@dataclass(frozen=True)
class Description:
    """What slots of one vector have to have in common, and what their driver wants to know of them.

    Attributes:
        env_id: Registered id or class name.
        wrappers: Names of the classes of the wrappers, outermost first.
        observation_space: Of the outermost wrapper.
        action_space: Of the outermost wrapper.
        metadata: Of the environment.
        replayed: Why the environment had to be wrapped in `Replayable`; `None` if it had not.
    """

    env_id: str
    wrappers: tuple[str, ...]
    observation_space: gym.Space
    action_space: gym.Space
    metadata: dict[str, Any]
    replayed: str | None

    def check_equal(self, slot: int, other: Description) -> None:
        """Checks that a snapshot of this environment can be restored into the one of another slot.

        Raises:
            ValueError: They are not equal; the message names the slot and what differs.
        """
        for name in ("env_id", "wrappers", "observation_space", "action_space"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"the environments of a vector must be alike, so that a snapshot of one can be restored into another: "
                    f"{name} is {_show(mine)} in slot 0 and {_show(theirs)} in slot {slot}; make all of them by one function"
                )


def _show(value: Any) -> str:
    return " > ".join(value) or "none" if isinstance(value, tuple) else repr(value)


def _layers(env: gym.Env) -> list[gym.Env]:
    """Returns every wrapper of a stack, outermost first, and the bare environment."""
    layers = [env]
    while isinstance(env, gym.Wrapper):
        env = env.env
        layers.append(env)
    return layers


class SlotEnvironment:
    """One environment and what is needed to branch it.

    Args:
        slot: Its slot, for messages.
        env: The environment; its stack is changed where `Replayable` has to be inserted.
        replay: Whether an environment that nothing else can carry may be restored by repeating its actions (`"auto"`), or
            is refused (`"never"`).

    Raises:
        SnapshotUnsupportedError: The environment cannot be branched.
        ValueError: It resets itself (`gymnasium.wrappers.Autoreset`), which trees forbid.
    """

    def __init__(self, slot: int, env: gym.Env, replay: Replay = "auto"):
        self.slot = slot
        self.env, replayed = _prepare(slot, env, replay)
        self._step = self.env.step
        layers = _layers(self.env)
        self._bare = bare = layers[-1]
        self._observation_space, self._action_space = bare.observation_space, bare.action_space
        self._replays = [layer for layer in layers if isinstance(layer, Replayable)]
        self.description = Description(
            env_id(bare),
            tuple(type(layer).__name__ for layer in layers[:-1]),
            self.env.observation_space,
            self.env.action_space,
            dict(self.env.metadata),
            replayed,
        )

    def open(
        self,
        seed: int | None,
        options: dict[str, Any] | None,
        carried: tuple[tuple[str, Mapping[str, Any]], ...] | None,
    ) -> Opened:
        """Resets and takes the first snapshot; see `Slots.open`."""
        env = self.env
        try:
            if carried is not None:
                restore_carried(env, carried)
            before = carried_state(env)
            observation, info = env.reset(seed=seed, options=options)
            self._check_spaces(whole=True)
            return Opened(
                copied_observation(observation), copied_info(info), snapshots.snapshot(env), _facts(env), before
            )
        except Exception as error:
            error.add_note(f"while opening an episode in slot {self.slot}")
            raise

    def restore(self, snapshot: EnvSnapshot, seed: int | None) -> None:
        """Returns to a moment; see `Slots.restore`."""
        try:
            snapshots.restore(self.env, snapshot, seed=seed)
        except Exception as error:
            error.add_note(f"while restoring slot {self.slot}")
            raise

    def reseed(self, seed: int) -> None:
        """Gives what is random from here on a new seed; see `Slots.reseed`."""
        try:
            snapshots.reseed(self.env, seed)
        except Exception as error:
            error.add_note(f"while reseeding slot {self.slot}")
            raise

    def step(self, action: Any, keep: bool) -> Result:
        """Takes one step; see `Slots.step_one`. Written for the commonest results, as it is in every step of every slot."""
        bare = self._bare
        try:
            observation, reward, terminated, truncated, info = self._step(action)
            # The commonest observation, without two calls.
            kept = observation.copy() if type(observation) is np.ndarray else copied_observation(observation)
            # An `is` for each step; the spaces themselves are compared only when they are other objects.
            if bare.observation_space is not self._observation_space or bare.action_space is not self._action_space:
                self._check_spaces()
            taken = snapshots.snapshot(self.env) if keep and not (terminated or truncated) else None
        except Exception as error:
            error.add_note(f"while stepping slot {self.slot}")
            raise
        # Past the constructor that a named tuple has in Python.
        return _new(
            Result,
            (
                kept,
                reward if type(reward) is float else float(reward),
                terminated if terminated is False else bool(terminated),
                truncated if truncated is False else bool(truncated),
                copied_info(info) if info else {},
                taken,
            ),
        )

    def replayed_turns(self) -> int:
        """Returns how many turns were repeated to restore this environment."""
        return sum(layer.replayed_turns for layer in self._replays)

    def _check_spaces(self, whole: bool = False) -> None:
        """Raises if a space is no longer what it was; `whole` looks at the wrappers' spaces as well."""
        bare, known = self._bare, self.description
        pairs = [
            ("observation_space", self._observation_space, bare.observation_space),
            ("action_space", self._action_space, bare.action_space),
        ]
        if whole:
            pairs += [
                ("observation_space", known.observation_space, self.env.observation_space),
                ("action_space", known.action_space, self.env.action_space),
            ]
        for name, before, now in pairs:
            if now is not before and now != before:
                raise SlotError(
                    self.slot,
                    f"the environment of slot {self.slot}, {known.env_id}, changed its {name} from {before!r} to {now!r}; "
                    f"under trees an environment has to keep the spaces that it was made with",
                )
        self._observation_space, self._action_space = bare.observation_space, bare.action_space


def _prepare(slot: int, env: gym.Env, replay: Replay) -> tuple[gym.Env, str | None]:
    """Returns the environment ready to branch, and why `Replayable` was inserted, `None` if it was not."""
    if any(isinstance(layer, gym.wrappers.Autoreset) for layer in _layers(env)):
        raise ValueError(
            f"the environment of slot {slot} has the wrapper Autoreset, which would reset an episode that a tree still "
            f"needs; make it without"
        )
    wrappers, inner = split(env)
    try:
        adapter_for(inner)
        return env, None
    except SnapshotUnsupportedError as error:
        if replay == "never" or (inner.spec is not None and inner.spec.nondeterministic):
            raise
        reason = str(error)
    twin = Replayable(inner)
    if not wrappers:
        return twin, reason
    wrappers[-1].env = twin
    return env, reason


def _facts(env: gym.Env) -> dict[str, Any]:
    inner = env.unwrapped
    task = getattr(getattr(inner, "state", None), "task", None)
    facts: dict[str, Any] = {}
    if isinstance(inner, ToolEnv) and isinstance(task, Task):
        facts["level"] = inner.level_of(task)
    limit = getattr(inner, "max_turns", None) or getattr(env.spec, "max_episode_steps", None)
    if limit is not None:
        facts["max_turns"] = int(limit)
    return facts | {name: getattr(task, name) for name in ("kind", "answers") if hasattr(task, name)}
