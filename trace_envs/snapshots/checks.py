"""The checks that `check_snapshot` makes, one method each.

Invariant: every comparison is with an episode that was played without a restore, or between two restores of one moment; a
check passes by returning and fails by raising `SnapshotCheckError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np

from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.episodes import (
    GLOBAL_GENERATORS,
    Actions,
    Episode,
    Moment,
    Step,
    global_generators_kept,
    moment_of,
    play,
    random_state,
    state_difference,
    take_step,
    time_limit,
    wrapper_attributes,
)
from trace_envs.snapshots.record import EnvSnapshot, ReplayDivergenceError
from trace_envs.snapshots.stack import reseed, restore, snapshot

SEEDS = 1, 2
MISSING = "look for attributes that it leaves out, class attributes, module-level generators, caches"


class SnapshotCheckError(AssertionError):
    """An environment does not come back as it was.

    Attributes:
        check: Name of the check.
        turn: Turn of the episode at which the difference showed, from 1; 0 is the reset.
    """

    def __init__(self, check: str, turn: int, message: str):
        super().__init__(check, turn, message)
        self.check = check
        self.turn = turn
        self.message = message

    def __str__(self) -> str:
        return self.message


class Checks:
    """The checks of one environment.

    Args:
        env: The environment.
        rng: Draws the turns that are restored, and is handed to `actions`.
        actions: Source of actions.

    Attributes:
        name: Name of the check under way.
        episode: The episode that it looks at.
    """

    episode: Episode

    def __init__(self, env: gym.Env, rng: np.random.Generator, actions: Actions):
        self.env = env
        self.rng = rng
        self.actions = actions
        self.name = ""

    def _fail(self, turn: int, message: str) -> NoReturn:
        raise SnapshotCheckError(self.name, turn, f"check_snapshot: {self.name}: {message}")

    def _restore(self, turn: int, seed: int | None = None, env: gym.Env | None = None) -> Moment:
        """Restores a moment of the episode."""
        moment = self.episode.moments[turn]
        try:
            restore(self.env if env is None else env, moment.taken, seed=seed)
        except ReplayDivergenceError as error:
            raise SnapshotCheckError(self.name, error.turn, f"check_snapshot: {self.name}: {error}") from error
        return moment

    def _future(self, turn: int, seed: int | None = None, env: gym.Env | None = None) -> list[Step]:
        """Restores a moment and does again what was done from there."""
        self._restore(turn, seed, env)
        return play(self.env if env is None else env, self.episode.actions[turn:])

    def _compare(
        self, expected: Sequence[Step], got: Sequence[Step], start: int, what: str, advice: str | Callable[[], str]
    ) -> None:
        for turn, (left, right) in enumerate(zip(expected, got, strict=False), start + 1):
            found = difference(left, right)
            if found is not None:
                found = found.removeprefix(".")
                said = advice if isinstance(advice, str) else advice()
                if found.startswith("info"):
                    said += "; if it is a clock or a running number of no consequence, leave it out of info"
                self._fail(turn, f"turn {turn} of {what} differs: {found}; {said}")

    @property
    def chosen(self) -> list[int]:
        """Turns to restore: the first, the last but one, and two between."""
        last = len(self.episode.moments) - 1
        return sorted({0, last, *map(int, self.rng.integers(last + 1, size=2))})

    @property
    def middle(self) -> int:
        """A turn with something before it and something after, where the episode is long enough."""
        return len(self.episode.moments) // 2

    def immutability(self, when: str) -> None:
        """Snapshots taken before are what they were; `when` names what happened meanwhile and who should have copied."""
        for turn, moment in enumerate(self.episode.moments):
            if moment.taken.digest != moment.digest:
                self._fail(
                    turn, f"the snapshot taken at turn {turn} changed when {when} must copy what steps change in place"
                )

    def random_state(self) -> None:
        """`np_random` is where it was when the snapshot was taken."""
        moments = self.episode.moments
        first = moments[0].random_state
        moves = any(difference(first, moment.random_state) for moment in moments)
        # An environment that brings its own snapshots need not hold a generator that its episodes never use.
        if first is None or not (moves or moments[0].taken.adapter not in ("native", "own kind")):
            return
        for turn in self.chosen:
            self.env.reset(seed=self.episode.seed + 1)
            found = difference(self._restore(turn).random_state, random_state(self.env))
            if found is not None:
                self._fail(
                    turn,
                    f"after a restore to turn {turn} np_random is not where it was: {found}; the snapshot must hold it",
                )

    def global_generators(self) -> None:
        """What follows a restore does not depend on generators that all of the process shares."""
        with global_generators_kept():
            for turn in {0, self.middle}:
                for name, start in GLOBAL_GENERATORS.items():
                    futures = []
                    for seed in (1, 2, 1):
                        self._restore(turn)
                        start(seed)
                        futures.append(play(self.env, self.episode.actions[turn:]))
                    # Where the third differs from the first, there is another cause, which another check names.
                    if difference(futures[0], futures[2]) is None:
                        advice = f"the environment draws from {name}; draw from self.np_random instead"
                        what = f"a future from turn {turn}, repeated after that generator was seeded otherwise,"
                        self._compare(futures[0], futures[1], turn, what, advice)

    def restore_and_re_step(self) -> None:
        """What follows a restore is what followed the first time."""
        for turn in self.chosen:
            got = self._future(turn)
            self._compare(self.episode.steps[turn:], got, turn, f"a future repeated from turn {turn}", self._diagnosis)

    def _diagnosis(self) -> str:
        """Tells state that a snapshot misses from what no reset brings back either."""
        adapter, seed = self.episode.moments[0].taken.adapter, self.episode.seed
        self.env.reset(seed=seed)
        again = play(self.env, self.episode.actions)
        if difference(self.episode.steps, again) is None:
            return (
                f"the same actions from reset(seed={seed}) do give the same again, so the snapshot (adapter {adapter!r}) "
                f"misses part of the state: {MISSING}"
            )
        return (
            f"the environment has a source of randomness or state that its snapshot (adapter {adapter!r}) does not hold, and "
            f"that reset(seed={seed}) does not bring back either: look for module-level generators, class attributes, caches"
        )

    def wrapper_state(self) -> None:
        """The wrappers have the attributes that they had, and `TimeLimit` ends the episode at the right turn."""
        for turn in self.chosen:
            self._same_wrappers(self._restore(turn), turn)
            self._time_limit(turn)
            take_step(self.env, self.episode.actions[turn])

    def _same_wrappers(self, moment: Moment, turn: int) -> None:
        for (name, before), (_, now) in zip(moment.wrappers, wrapper_attributes(self.env), strict=True):
            found = difference(before, now)
            if found is not None:
                self._fail(turn, f"after a restore to turn {turn} the wrapper {name} has other attributes: {found}")

    def _time_limit(self, turn: int) -> None:
        """Moves the limit to the turn after the next: there, and not before, the episode must end."""
        limit: Any = time_limit(self.env)
        end = turn + 2
        if limit is None or end >= len(self.episode.moments):
            return
        most = limit._max_episode_steps
        self._restore(end)
        elapsed = limit._elapsed_steps
        self._restore(turn)
        try:
            limit._max_episode_steps = elapsed
            steps = play(self.env, self.episode.actions[turn:end])
        finally:
            limit._max_episode_steps = most
            self._restore(turn)
        if not any(step.terminated for step in steps) and [step.truncated for step in steps] != [False, True]:
            self._fail(end, f"restored to turn {turn}, a TimeLimit of {elapsed} steps does not truncate turn {end}")

    def seeded_restore(self) -> None:
        """What follows a restore with a seed is a function of the moment and the seed."""
        one, other = SEEDS
        turn = self.middle
        self._same_wrappers(self._restore(turn, one), turn)
        expected = play(self.env, self.episode.actions[turn:])
        same = f"turn {turn} restored with seed={one}"

        def again(got: list[Step], after: str, advice: str) -> None:
            self._compare(expected, got, turn, f"a future of {same}, repeated {after},", advice)

        again(self._future(turn, one), "at once", "restore(snapshot, seed=s) must make what follows a function of s")
        self._compare(
            self.episode.steps[turn:],
            self._future(turn),
            turn,
            f"a future from turn {turn}, repeated without a seed after restores with one,",
            "a restore without a seed must bring back the random state of the snapshot",
        )
        self.env.reset(seed=self.episode.seed + 1)
        self._future(0, other)
        advice = "what follows must be a function of the snapshot and the seed, whatever was done before"
        again(self._future(turn, one), f"after a reset and a restore with seed={other}", advice)
        self._restore(turn)
        reseed(self.env, one)
        got = play(self.env, self.episode.actions[turn:])
        again(got, "by a restore without a seed and reseed()", "both must give what is random the same seed")
        if turn:
            self._restore(turn - 1)
            take_step(self.env, self.episode.actions[turn - 1])
            reseed(self.env, one)
            got = play(self.env, self.episode.actions[turn:])
            again(
                got,
                "from a step to that turn and reseed()",
                "what is drawn must not depend on how a moment was reached",
            )

    def repeated_restore(self) -> None:
        """A moment can be restored again and again."""
        turn = self.middle
        for _ in range(2):
            self._restore(turn)
        for number in ("third", "fourth", "fifth"):
            self._compare(
                self.episode.steps[turn:],
                self._future(turn),
                turn,
                f"a future after the {number} restore to turn {turn}",
                "restore() must leave the snapshot, and all that it holds, as it was",
            )

    def branch_independence(self) -> None:
        """Two branches that are stepped in turns do not see each other."""
        turn = self.middle
        self._restore(turn)
        other: list[Any] = []
        futures = [self.episode.steps[turn:], list[Step]()]
        observation, info = self.episode.seen(turn)
        for _ in range(len(self.episode.actions) - turn):
            other.append(self.actions(self.rng, observation, info))
            futures[1].append(take_step(self.env, other[-1]))
            if futures[1][-1].over:
                break
            observation, info = futures[1][-1].observation, futures[1][-1].info
        branches = [self.episode.actions[turn:], other]
        now: list[EnvSnapshot] = [self.episode.moments[turn].taken] * 2
        for at in range(max(map(len, branches))):
            for branch in (0, 1):
                if at >= len(branches[branch]):
                    continue
                restore(self.env, now[branch])
                step = take_step(self.env, branches[branch][at])
                self._compare(
                    futures[branch][at : at + 1],
                    [step],
                    turn + at,
                    f"a branch from turn {turn}, stepped in turns with another,",
                    "the branches share something that a step changes: copy it in snapshot() and in restore()",
                )
                if not step.over:
                    now[branch] = snapshot(self.env)

    def digest(self, repeats: bool) -> None:
        """Digests are equal exactly when moments are; `repeats`: the same actions give the same again."""
        moments = self.episode.moments
        for turn in self.chosen:
            self._restore(turn)
            for what in ("after a restore", "the second time in a row"):
                found = moment_of(self.env)
                if found.digest != moments[turn].digest:
                    where = state_difference(moments[turn].taken, found.taken)
                    self._fail(turn, f"the digest of turn {turn} is another {what}: the snapshots differ in {where}")
            if repeats and turn + 1 < len(moments):
                take_step(self.env, self.episode.actions[turn])
                found = moment_of(self.env)
                if found.digest != moments[turn + 1].digest:
                    where = state_difference(moments[turn + 1].taken, found.taken)
                    self._fail(
                        turn + 1,
                        f"the digest of turn {turn + 1} is another when it is reached by the same action again: "
                        f"the snapshots differ in {where}; leave out what is no part of the moment, such as a clock",
                    )
        met: dict[str | None, int] = {}
        for turn, moment in enumerate(moments):
            first = met.setdefault(moment.digest, turn)
            found_here = difference(self.episode.seen(first)[0], self.episode.seen(turn)[0])
            if repeats and found_here is not None:
                self._fail(
                    turn,
                    f"turns {first} and {turn} have the same digest, but not the same observation: {found_here}; the snapshot "
                    f"misses what the observation is made of",
                )
