"""`Replayable`: restores an environment that nobody can copy by repeating what was done in it.

Invariant: either the environment has done again, to the last bit of every observation, reward and flag, what it did when the
snapshot was taken, or `ReplayDivergenceError` says at which turn it did not and the wrapper refuses to go on.
"""

from __future__ import annotations

import copy
import secrets
from dataclasses import dataclass
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np

from trace_envs.snapshots import codec
from trace_envs.snapshots.adapters.base import check_config, config_of, env_id
from trace_envs.snapshots.adapters.generators import reseed
from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.plain import class_name
from trace_envs.snapshots.record import SCHEMA_VERSION, EnvSnapshot, ReplayDivergenceError, SnapshotUnsupportedError
from trace_envs.state import History, turns_of

_UNCHANGING = frozenset({type(None), bool, int, float, complex, str, bytes})


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """How an episode began.

    Attributes:
        seed: Seed of the reset.
        options: Its options.
        observation: What it returned.
    """

    seed: int
    options: dict[str, Any] | None
    observation: Any


@dataclass(frozen=True, slots=True, eq=False)
class Stepped:
    """One turn: the action, and what the step returned without its info."""

    action: Any
    observation: Any
    reward: Any
    terminated: Any
    truncated: Any


@dataclass(frozen=True, slots=True)
class Reseeded:
    """The environment's generators were given a new seed."""

    seed: int


@dataclass(frozen=True, slots=True)
class SeedChain:
    """Where the seeds of resets without one come from.

    Attributes:
        entropy: The last explicit seed; before there was one, drawn from the operating system.
        drawn: How many seeds were drawn since.
    """

    entropy: int
    drawn: int = 0

    def next(self) -> tuple[int, SeedChain]:
        """Returns a seed, which any environment takes (31 bits), and the chain that goes on behind it."""
        words = np.random.SeedSequence(self.entropy, spawn_key=(self.drawn,)).generate_state(1)
        return int(words[0] >> 1), SeedChain(self.entropy, self.drawn + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """The payload of a snapshot: all that was done in an episode, and what came of it.

    Attributes:
        of: Class of the bare environment, as "module:qualname".
        start: The reset.
        history: Every `Stepped` and `Reseeded` since, newest first; branches share what they have in common.
        seeds: Seeds of the episodes to come.
    """

    of: str
    start: Start
    history: History | None
    seeds: SeedChain


for _cls, _tag in (
    (Start, "Start"),
    (Stepped, "Stepped"),
    (Reseeded, "Reseeded"),
    (SeedChain, "SeedChain"),
    (Past, "Past"),
):
    codec.register(_cls, f"replay.{_tag}")


class Replayable(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Gives an environment `snapshot()` and `restore(snapshot, *, seed=None)` by recording and repeating.

    `snapshot` takes constant time. `restore` takes a reset and as many steps as the snapshot is turns old, or only the
    missing ones if the present moment lies on the way there; to the present moment it costs nothing. `info` is neither
    recorded nor compared.

    Put it around the bare environment or around what `gym.make` returns, whose wrappers are then repeated with it, but inside
    of wrappers that keep records (`RecordEpisodeStatistics`): those outside see nothing of the turns that are repeated.

    Resets always have an explicit seed. One without is given the next of a chain that the last explicit seed began, so an
    environment that is reset with a seed and then without any goes through a fixed series of episodes, another one than
    without this wrapper.

    With a seed, `restore` gives a new state to the generators among the attributes of the bare environment (`np_random`
    first of all). Randomness that the environment keeps elsewhere, in C code for instance, goes on as it was.

    Args:
        env: The environment. What it does has to be a function of the seed and options of `reset` and of the actions.

    Attributes:
        replayed_turns: How many turns were repeated so far.

    Raises:
        SnapshotUnsupportedError: The environment's spec says that it is not deterministic.
    """

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        if env.spec is not None and env.spec.nondeterministic:
            raise SnapshotUnsupportedError(
                f"{env.spec.id} is registered with nondeterministic=True, so repeating its actions would not lead to the "
                f"same moment; give it snapshot() and restore(snapshot, *, seed=None) "
                f"(trace_envs.snapshots.Snapshotable), or register it without nondeterministic if it is not"
            )
        self.replayed_turns = 0
        self._of = class_name(type(env.unwrapped))
        self._seeds: SeedChain | None = None
        self._start: Start | None = None
        self._history: History | None = None
        self._turn = 0
        self._return = 0.0
        self._spaces = env.observation_space, env.action_space
        self._closed = False
        # Why there is no present moment; `None` if there is one.
        self._refusal: str | None = "reset() was not called yet; call it first"
        # A step raised, and may have done half of its work: the record still stands, but the environment may have left it.
        self._lost = False

    # Gymnasium's interface.

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; see the class for what happens without a seed."""
        if seed is not None:
            episode, seeds = int(seed), SeedChain(int(seed))
        else:
            episode, seeds = (self._seeds or SeedChain(secrets.randbits(64))).next()
        kept = _kept(options)
        self._refusal = "the last reset() failed; call reset() again"
        observation, info = self.env.reset(seed=episode, options=options)
        self._spaces = self.env.observation_space, self.env.action_space
        self._at(Past(self._of, Start(episode, kept, _kept(observation)), None, seeds), 0, 0.0)
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Takes one turn and records it.

        Raises:
            RuntimeError: There is no present moment: no `reset`, or the last `restore` failed.
            ValueError: The environment changed its spaces.
        """
        if self._refusal is not None:
            raise RuntimeError(f"{self._of} cannot step: {self._refusal}")
        kept, lost = _kept(action), self._lost
        self._lost = True
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._check_spaces()
        total = self._return + float(reward)
        stepped = Stepped(kept, _kept(observation), _kept(reward), _kept(terminated), _kept(truncated))
        self._history = History(stepped, self._history)  # type: ignore[arg-type]
        self._turn += 1
        self._return, self._lost = total, lost
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Closes the environment."""
        self._closed, self._refusal = True, "it is closed; make another"
        super().close()

    def _check_spaces(self) -> None:
        spaces = self.env.observation_space, self.env.action_space
        for name, before, now in zip(("observation_space", "action_space"), self._spaces, spaces, strict=True):
            if now is not before and now != before:
                raise ValueError(
                    f"{self._of} changed its {name} during an episode, from {before} to {now}; let it keep the same spaces "
                    f"from reset() on"
                )

    # Snapshots.

    def snapshot(self) -> EnvSnapshot:
        """Returns the present moment, in constant time.

        Raises:
            RuntimeError: There is no present moment: no `reset`, or the last `restore` failed.
        """
        if self._refusal is not None:
            raise RuntimeError(f"{self._of} cannot be snapshotted: {self._refusal}")
        assert self._start is not None and self._seeds is not None
        last = self._history
        while last is not None and type(last.turn) is Reseeded:
            last = last.before
        return EnvSnapshot(
            env_id(self),
            self._turn,
            Past(self._of, self._start, self._history, self._seeds),
            adapter="replay",
            config=config_of(self.env),
            observation=self._start.observation if last is None else last.turn.observation,
            episode_return=self._return,
        )

    def restore(self, snapshot: EnvSnapshot, *, seed: int | None = None) -> None:
        """Returns to a moment by repeating what led there.

        Args:
            snapshot: Taken from this environment or from another that was made in the same way.
            seed: New seed for the generators of the environment from here on; `None` repeats the future exactly. It is
                recorded, and repeated with the turns when a later moment is restored.

        Raises:
            ReplayDivergenceError: The environment did not do the same again. Nothing but `reset` and another `restore` works
                then.
            ValueError: The snapshot is of another environment, schema version or configuration, or was not taken through a
                `Replayable`; or the seed is negative. The environment stays where it was.
            RuntimeError: The environment is closed.
        """
        past = self._checked(snapshot, seed)
        events = self._missing(past)
        turn, total = self._turn, self._return
        if events is None:
            turn, total = 0, 0.0
            events = list[Any](turns_of(past.history))
            self._begin_again(past.start)
        for event in events:
            if isinstance(event, Reseeded):
                reseed(self.env.unwrapped, event.seed)
            else:
                turn += 1
                self._repeat(event, turn)
                total += float(event.reward)
        self._at(past, turn, total)
        if seed is not None:
            self._renew(int(seed))

    def _at(self, past: Past, turn: int, total: float) -> None:
        """Notes that the environment is where the record says."""
        self._start, self._history, self._seeds = past.start, past.history, past.seeds
        self._turn, self._return = turn, total
        self._refusal, self._lost = None, False

    def _renew(self, seed: int) -> None:
        """Gives the generators a new seed. It replaces one that was given at the same moment."""
        before = self._history
        if before is not None and isinstance(before.turn, Reseeded):
            before = before.before
        reseed(self.env.unwrapped, seed)
        self._history = History(Reseeded(seed), before)  # type: ignore[arg-type]
        self._seeds = SeedChain(seed)

    def _checked(self, snapshot: EnvSnapshot, seed: int | None) -> Past:
        """Returns what a snapshot holds, if it can be restored here."""
        if self._closed:
            raise RuntimeError(f"{self._of} cannot be restored: it is closed; make another")
        if snapshot.version != SCHEMA_VERSION:
            raise ValueError(
                f"the snapshot has schema version {snapshot.version}, this release reads version {SCHEMA_VERSION}"
            )
        if snapshot.env_id != env_id(self):
            raise ValueError(f"the snapshot is of {snapshot.env_id!r}, this environment is {env_id(self)!r}")
        past = snapshot.payload
        if not isinstance(past, Past):
            raise ValueError(
                f"the snapshot of {snapshot.env_id} was taken through the adapter {snapshot.adapter!r} and holds no actions to "
                f"repeat; take it through trace_envs.Replayable"
            )
        if past.of != self._of:
            raise ValueError(f"the snapshot is of a {past.of!r}, the environment is a {self._of!r}")
        check_config(self.env, snapshot)
        if seed is not None and seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        return past

    def _missing(self, past: Past) -> list[Any] | None:
        """Returns the events from the present moment to a past's, oldest first; `None` if they do not lie on one line."""
        if self._refusal is not None or self._lost or past.start is not self._start:
            return None
        events = []
        history = past.history
        while history is not self._history:
            if history is None:
                return None
            events.append(history.turn)
            history = history.before
        return events[::-1]

    def _begin_again(self, start: Start) -> None:
        """Repeats the reset."""
        self._refusal = "the last restore() failed; call reset(), or restore() another moment"
        try:
            observation, _ = self.env.reset(seed=start.seed, options=_kept(start.options))
        except Exception as error:
            raise self._raised(0, error) from error
        self._spaces = self.env.observation_space, self.env.action_space
        if (found := difference(start.observation, observation)) is not None:
            raise self._diverged(0, f"the first observation differs ({found})")

    def _repeat(self, event: Stepped, turn: int) -> None:
        """Repeats one turn and compares what comes of it."""
        self._refusal = "the last restore() failed; call reset(), or restore() another moment"
        try:
            observation, reward, terminated, truncated, _ = self.env.step(_kept(event.action))
            self._check_spaces()
        except Exception as error:
            raise self._raised(turn, error) from error
        self.replayed_turns += 1
        came = {"observation": observation, "reward": reward, "terminated": terminated, "truncated": truncated}
        for name, now in came.items():
            if (found := difference(getattr(event, name), now)) is not None:
                raise self._diverged(turn, f"the {name} differs ({found})")

    def _raised(self, turn: int, error: Exception) -> ReplayDivergenceError:
        return self._diverged(turn, f"it raised {type(error).__name__}: {error}")

    def _diverged(self, turn: int, what: str) -> ReplayDivergenceError:
        where = f"at turn {turn}" if turn else "at reset"
        return ReplayDivergenceError(
            turn,
            f"{self._of} did not do the same again when its actions were repeated: {where}, {what}; draw everything random "
            f"in it from self.np_random (no global generator, no clock, nothing that outlives reset), or give it snapshot() "
            f"and restore(snapshot, *, seed=None)",
        )


def _kept(value: Any) -> Any:
    """Returns a copy that no later change of the original reaches."""
    if type(value) in _UNCHANGING:
        return value
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.copy()
    return copy.deepcopy(value)
