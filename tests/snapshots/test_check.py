"""Each check of `check_snapshot` catches an environment that was built to fail it, and names the turn."""

import itertools
import os
import random
import sys
from dataclasses import dataclass

import gymnasium as gym
import leaky_env
import numpy as np
import pytest
from broken_envs import (
    DrawsFromNumpy,
    DrawsFromPython,
    ForgetsItsGenerator,
    ForgetsItsPlace,
    GivesItsState,
    GivesTickets,
    Hashes,
    HoldsALock,
    InfoWithAClock,
    InnerOnly,
    KeepsTheSeed,
    KnowsItsProcess,
    LimitOfOurOwn,
    MadeByChance,
    NeedsAReset,
    Noisy,
    NoisyWithAClock,
    OnceInARow,
    OneBuffer,
    OneStateForAll,
    SeedsAtRandom,
    SeedsByEpisode,
    SeedsByRestores,
    SeedsByTheWay,
    Stamped,
    StampedSteps,
    TakesTheSnapshot,
    Walk,
)
from gymnasium.wrappers import TimeLimit
from stack_tools import ALL_CHECKS

from trace_envs.snapshots import ReplayDivergenceError
from trace_envs.snapshots.check import SnapshotCheckError, check_snapshot
from trace_envs.snapshots.replay import Replayable


@pytest.fixture(autouse=True, scope="module")
def _registered():
    leaky_env.register()
    for cls in (Walk, Hashes, GivesTickets, MadeByChance):
        gym.register(id=f"Check{cls.__name__}-v0", entry_point=f"broken_envs:{cls.__name__}", max_episode_steps=8)
    for cls in (Noisy, NoisyWithAClock):
        gym.register(id=f"Check{cls.__name__}-v0", entry_point=f"broken_envs:{cls.__name__}", nondeterministic=True)
    yield
    for cls in (Walk, Hashes, GivesTickets, MadeByChance, Noisy, NoisyWithAClock):
        del gym.registry[f"Check{cls.__name__}-v0"]


def test_a_right_environment_passes_every_check():
    env = gym.make("CheckWalk-v0")
    report = check_snapshot(env)
    assert report.passed == ALL_CHECKS and not report.skipped
    assert (report.env_id, report.adapter, report.episodes, report.turns) == ("CheckWalk-v0", "own kind", 3, 24)
    # It is left reset.
    assert env.unwrapped.state["turn"] == 0


@pytest.mark.parametrize(
    ("make", "check", "turn", "message"),
    [
        (GivesItsState, "immutability", 0, r"the snapshot taken at turn 0 changed .* snapshot\(\) must copy"),
        (TakesTheSnapshot, "immutability", 0, r"the snapshot taken at turn 0 changed .* restore\(\) must copy"),
        (
            ForgetsItsGenerator,
            "random state",
            0,
            "restore to turn 0 np_random is not where it was: .*snapshot must hold",
        ),
        (
            DrawsFromNumpy,
            "global generators",
            4,
            r"turn 4 of a future from turn 0, .* differs: observation\[1\]: .* != .*; the environment draws from numpy's "
            r"global generator \(np\.random\)",
        ),
        (DrawsFromPython, "global generators", 1, r"draws from Python's global generator \(the module random\)"),
        (
            ForgetsItsPlace,
            "restore and re-step",
            1,
            r"turn 1 of a future repeated from turn 0 differs: observation\[1\]: .* != .*; the same actions from "
            r"reset\(seed=0\) do give the same again, so the snapshot \(adapter 'own kind'\) misses part of the state",
        ),
        (InfoWithAClock, "restore and re-step", 1, r"differs: info\['at'\]: .*if it is a clock"),
        (OnceInARow, "repeated restore", 5, r"turn 5 of a future after the third restore to turn 4 differs"),
        (
            lambda: InnerOnly(TimeLimit(Walk(), 50)),
            "wrapper state",
            0,
            r"restore to turn 0 the wrapper TimeLimit has other attributes: \['_elapsed_steps'\]: 0 != \d",
        ),
        (
            lambda: InnerOnly(LimitOfOurOwn(Walk(), 50)),
            "wrapper state",
            2,
            "restored to turn 0, a TimeLimit of .* does not truncate turn 2",
        ),
        (SeedsAtRandom, "seeded restore", 5, r"turn 4 restored with seed=1, repeated at once, differs"),
        (
            SeedsByEpisode,
            "seeded restore",
            5,
            "after a reset and a restore with seed=2, differs.* whatever was done before",
        ),
        (SeedsByRestores, "seeded restore", 5, r"by a restore without a seed and reseed\(\), differs"),
        (
            SeedsByTheWay,
            "seeded restore",
            5,
            r"from a step to that turn and reseed\(\), differs.* how a moment was reached",
        ),
        (KeepsTheSeed, "seeded restore", 5, "without a seed after restores with one, differs"),
        (
            OneBuffer,
            "branch independence",
            6,
            "turn 6 of a branch from turn 4, stepped in turns with another, differs",
        ),
        (
            Stamped,
            "digest",
            0,
            r"the digest of turn 0 is another after a restore: the snapshots differ in payload\['number'\]: 1 != ",
        ),
        (
            StampedSteps,
            "digest",
            1,
            r"digest of turn 1 is another when it is reached .*\['at'\].* such as a clock",
        ),
        (
            GivesTickets,
            "digest",
            1,
            r"turns 0 and 1 have the same digest, but not the same observation: \[0\]: 0\.0 != 1\.0",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_check_catches_what_it_is_for(make, check, turn, message):
    with pytest.raises(SnapshotCheckError, match=f"^check_snapshot: {check}: .*{message}") as caught:
        check_snapshot(make(), make=make, another_process=False)
    assert (caught.value.check, caught.value.turn) == (check, turn)


@pytest.mark.parametrize(
    ("make", "turn", "message"),
    [
        (OneStateForAll, 5, "stepped in turns with another environment .* differs.* the two share what a step changes"),
        (
            MadeByChance,
            5,
            r"turn 4, restored in another environment .* differs: observation\[1\].* what the first environment",
        ),
        (NeedsAReset, 4, "in another environment of the same kind, which was never reset, raised AttributeError"),
    ],
)
def test_another_environment_shows_what_the_first_one_hides(make, turn, message):
    with pytest.raises(SnapshotCheckError, match=message) as caught:
        check_snapshot(make(), make=make, another_process=False)
    assert (caught.value.check, caught.value.turn) == ("sibling instance", turn)


def test_another_process_shows_what_this_one_hides():
    message = r"another process: turn 5 of a future of turn 4, restored in another process, differs: .*order of sets"
    with pytest.raises(SnapshotCheckError, match=message) as caught:
        check_snapshot(gym.make("CheckHashes-v0"), episodes=1)
    assert (caught.value.check, caught.value.turn) == ("another process", 5)


def test_what_is_of_one_process_does_not_belong_in_a_snapshot():
    message = (
        r"digest of turn 4, restored in another process, is another: the snapshots differ in payload\['process'\]: \d"
    )
    with pytest.raises(SnapshotCheckError, match=message):
        check_snapshot(KnowsItsProcess(), make=KnowsItsProcess, episodes=1)


@dataclass(frozen=True)
class Place:
    state: dict
    random: dict


class KeepsARecord(Walk):
    """Its snapshots are of a class that bytes do not bring back."""

    def snapshot(self):
        return Place(**super().snapshot())

    def restore(self, snapshot, *, seed=None):
        super().restore({"state": snapshot.state | {}, "random": snapshot.random}, seed=seed)


class Exits(Walk):
    def restore(self, snapshot, *, seed=None):
        if "test_check" not in sys.modules or sys.modules["test_check"].__dict__.get("HERE") is None:
            os._exit(3)
        super().restore(snapshot, seed=seed)


HERE = None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (KeepsARecord, r"restore\(\) raised .*plain data, or of classes registered with \S+codec\.register"),
        (Exits, r"step\(\) raised exit status 3"),
    ],
)
def test_what_fails_in_another_process_is_said(make, message, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "HERE", "this process")
    with pytest.raises(SnapshotCheckError, match=f"turn 4 was to be restored and played there, but {message}"):
        check_snapshot(make(), make=make, episodes=1)


@pytest.mark.parametrize("arguments", [{"turns": 0}, {"episodes": 0}])
def test_nothing_cannot_be_checked(arguments):
    with pytest.raises(ValueError, match="turns and episodes must be at least 1, got"):
        check_snapshot(Walk(), **arguments)


def test_a_hidden_generator_is_named_with_its_turn():
    message = (
        r"restore and re-step: turn 3 of a future repeated from turn 0 differs: observation\[1\]: .* != .*; "
        r"the environment has a source of randomness .* snapshot \(adapter '\w+'\) does not hold.* module-level generators"
    )
    with pytest.raises(SnapshotCheckError, match=message) as caught:
        check_snapshot(gym.make("Leaky-v0"))
    assert caught.value.turn == 3


class Counts(Walk):
    """Whatever happens from turn 4 on never happens again."""

    count = itertools.count()

    def noise(self):
        return float(next(self.count)) if self.state["turn"] >= 4 else 0.0


def test_a_replay_that_diverges_is_named_with_its_turn():
    with pytest.raises(
        SnapshotCheckError, match=r"check_snapshot: random state: .*at turn 4, the observation differs"
    ) as caught:
        check_snapshot(Replayable(Counts()))
    assert caught.value.turn == 4 and isinstance(caught.value.__cause__, ReplayDivergenceError)
    with pytest.raises(SnapshotCheckError, match="turn 3") as caught:
        check_snapshot(Replayable(gym.make("Leaky-v0")))
    assert caught.value.turn == 3


def test_a_nondeterministic_environment_is_compared_only_where_it_was_restored():
    report = check_snapshot(gym.make("CheckNoisy-v0"), another_process=False)
    assert report.passed == ("immutability", "random state", "wrapper state", "digest", "sibling instance")
    assert set(report.skipped) == set(ALL_CHECKS) - set(report.passed)
    assert "spec.nondeterministic" in report.skipped["restore and re-step"]
    with pytest.raises(SnapshotCheckError, match="digest of turn 0 is another"):
        check_snapshot(gym.make("CheckNoisyWithAClock-v0"), another_process=False)


def test_what_cannot_be_checked_is_said():
    report = check_snapshot(Walk(), episodes=1)
    assert set(report.skipped) == {"sibling instance", "another process"}
    assert "no spec" in report.skipped["sibling instance"] and "pass make" in report.skipped["another process"]
    report = check_snapshot(Walk(), episodes=1, make=Walk, another_process=False)
    assert report.skipped == {"another process": "another_process=False"}
    report = check_snapshot(HoldsALock(), episodes=1, make=HoldsALock)
    assert set(report.skipped) == {"immutability", "digest", "another process"}
    assert all("lock" in reason for reason in report.skipped.values())
    unsendable = (x for x in ())
    report = check_snapshot(Walk(), episodes=1, make=lambda: (unsendable, Walk())[1])
    assert "cannot be sent" in report.skipped["another process"]
    report = check_snapshot(Walk(), episodes=1, make=OnlyHere(Walk))
    assert report.skipped["another process"].startswith("the environment cannot be made there (RuntimeError: not here")


class OnlyHere:
    """Makes environments in this process alone."""

    def __init__(self, cls):
        self.cls = cls

    def __call__(self):
        return self.cls()

    def __reduce__(self):
        return _nowhere, ()


def _nowhere():
    def make():
        raise RuntimeError("not here")

    return make


def test_nothing_but_the_environment_is_disturbed():
    env = gym.make("CheckWalk-v0")
    env.action_space.seed(5)
    expected = [env.action_space.sample() for _ in range(5)]
    env.action_space.seed(5)
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    check_snapshot(env, episodes=1, another_process=False)
    assert (np.random.get_state()[1] == numpy_state).all() and random.getstate() == python_state  # noqa: NPY002
    assert [env.action_space.sample() for _ in range(5)] == expected


class Allows(Walk):
    """Says in its infos what may be done."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"legal": [0, 1]}

    def step(self, action):
        *others, info = super().step(action)
        return *others, info | {"legal": [0, 1]}


def test_actions_may_be_chosen():
    seen = []

    def choose(rng, observation, info):
        seen.append((observation.copy(), info))
        return int(rng.integers(2)) if info["legal"] else 0

    check_snapshot(Allows(), actions=choose, episodes=1, turns=1)
    assert len(seen) == 2
    seen.clear()
    check_snapshot(Allows(), actions=choose, episodes=1, turns=3)
    assert [observation[0] for observation, _ in seen[:3]] == [0, 1, 2]
    first = len(seen)
    seen.clear()
    check_snapshot(Allows(), actions=choose, episodes=2, turns=3)
    assert len(seen) == 2 * first
