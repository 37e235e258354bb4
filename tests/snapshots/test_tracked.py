"""Forks, and `SnapshotWrapper`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import lock_env
import numpy as np
import pytest
from gymnasium import wrappers as gw
from stack_tools import Tally, cart, half, play

import trace_envs
from trace_envs import Replayable, SnapshotUnsupportedError, SnapshotWrapper
from trace_envs.snapshots import EnvSnapshot
from trace_envs.snapshots.compare import difference

lock_env.register()

# Forks ----------------------------------------------------------------------------------------------------------------


def test_an_environment_without_a_spec_is_forked_by_its_attributes() -> None:
    bare = cart().unwrapped
    bare.spec = None
    env = gw.TimeLimit(bare, 5)
    env.reset(seed=0)
    env.step(1)
    twin = trace_envs.fork(env)
    assert twin.unwrapped is not bare and twin.np_random is not env.np_random
    assert twin.observation_space is not env.observation_space
    expected = play(twin, [1, 0, 1, 1]), twin.reset()
    assert difference((play(env, [1, 0, 1, 1]), env.reset()), expected) is None


@pytest.mark.parametrize("env_id", ["Hopper-v5", "FrozenLake-v1", "Taxi-v4", "Lock-v0"])
def test_registered_environments_are_forked(env_id: str) -> None:
    env = gw.RecordEpisodeStatistics(gym.make(env_id), stats_key="statistics")
    env.action_space.seed(3)
    env.reset(seed=2)
    actions = [env.action_space.sample() for _ in range(8)]
    play(env, actions[:3])
    twin = trace_envs.fork(env)
    assert str(twin) == str(env) and twin.spec == env.spec and twin.unwrapped is not env.unwrapped
    futures = []
    for someone in (twin, env):
        steps = play(someone, actions[3:])
        steps[-1][4].pop("statistics", None)
        futures.append((steps, someone.reset()))
    assert difference(futures[0], futures[1]) is None


class StateOnly(gym.Env):
    """Its state is all that it gives away."""

    observation_space = action_space = gym.spaces.Discrete(100)

    def __init__(self) -> None:
        self.count = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return 0, {}

    def step(self, action: int) -> Any:
        self.count += action
        return self.count, 1.0, False, False, {}

    def get_state(self) -> int:
        return self.count

    def set_state(self, state: int) -> None:
        self.count = state


def test_what_cannot_be_forked_says_what_to_do() -> None:
    env = gw.TimeLimit(StateOnly(), 5)
    env.reset(seed=0)
    with pytest.raises(SnapshotUnsupportedError, match=r"StateOnly cannot be forked.*gymnasium\.register.*fork\(\)"):
        trace_envs.fork(env)


def test_a_replayed_environment_is_forked() -> None:
    env = gw.TimeLimit(Replayable(cart().unwrapped), 9)
    env.reset(seed=0)
    play(env, [1, 0])
    twin = trace_envs.fork(env)
    assert isinstance(twin.env, Replayable) and twin.unwrapped is not env.unwrapped
    assert difference([s[:5] for s in play(twin, [1, 1])], [s[:5] for s in play(env, [1, 1])]) is None


# SnapshotWrapper ------------------------------------------------------------------------------------------------------


def test_snapshot_wrapper_says_where_it_is() -> None:
    env = SnapshotWrapper(gw.FrameStackObservation(cart(), 2))
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.snapshot()
    first, _ = env.reset(seed=0)
    root = env.snapshot()
    observation, *_, info = env.step(1)
    observation[:] = 99.0  # the caller's own
    info["more"] = 1
    left = env.snapshot()
    assert left.turn == 1 and left.episode_return == 1.0 and left.info == {} and 99.0 not in left.observation
    env.step(0)
    for taken in (left, EnvSnapshot.from_bytes(left.to_bytes())):
        env.restore(taken)
        assert difference(env.observation, left.observation) is None
        assert (env.info, env.turn, env.episode_return) == ({}, 1, 1.0)
    twin = env.fork()
    assert twin.turn == 1 and difference(twin.observation, env.observation) is None
    assert difference(play(twin, [1, 1]), play(env, [1, 1])) is None
    env.restore(root, seed=3)
    assert difference(env.observation, first) is None and env.turn == 0 and twin.turn == 3
    with pytest.raises(ValueError, match="not taken through a SnapshotWrapper"):
        env.restore(trace_envs.snapshot(env.env))
    assert env.turn == 0
    trace_envs.restore(env.env, root)  # the other way round it goes
    assert gym.make(env.spec).spec == env.spec


class OwnKind(StateOnly):
    """Its snapshots are integers."""

    def snapshot(self) -> int:
        return self.count

    def restore(self, snapshot: int, *, seed: int | None = None) -> None:
        assert type(snapshot) is int
        self.count = snapshot


def test_snapshots_of_any_kind_travel_through_wrappers() -> None:
    env = SnapshotWrapper(gw.TimeLimit(SnapshotWrapper(gw.TimeLimit(OwnKind(), 9)), 7))
    for outside in (env, gw.TimeLimit(env, 8), SnapshotWrapper(env)):
        outside.reset(seed=0)
        outside.step(2)
        taken = trace_envs.snapshot(outside)
        outside.step(3)
        for moment in (taken, EnvSnapshot.from_bytes(taken.to_bytes())):
            trace_envs.restore(outside, moment)
            assert env.unwrapped.count == 2 and env.turn == env.env.env.turn == 1 and env.observation == 2
            assert outside.step(4)[0] == 6


def test_snapshot_wrapper_between_other_wrappers() -> None:
    make = lambda: gw.TimeLimit(gw.TransformObservation(SnapshotWrapper(gw.TimeLimit(cart(), 8)), half, None), 5)  # noqa: E731
    env = make()
    env.reset(seed=0)
    env.step(1)
    taken = trace_envs.snapshot(env)
    assert taken.observation is None and taken.turn == 1
    expected = play(env, [0, 1, 0, 1])
    assert expected[-1][3]
    for target, moment in ((env, taken), (make(), taken)):
        trace_envs.restore(target, moment)
        assert target.env.env.turn == 1
        assert difference(play(target, [0, 1, 0, 1]), expected) is None
    with pytest.raises(ValueError, match="same level"):
        trace_envs.restore(env.env, taken)


class Pickled(StateOnly, gym.utils.EzPickle):
    """Nothing but its actions leads to its states."""

    get_state = set_state = None  # type: ignore[assignment]


def test_snapshot_wrapper_may_replay() -> None:
    with pytest.raises(SnapshotUnsupportedError, match="EzPickle") as caught:
        SnapshotWrapper(gw.TimeLimit(Pickled(), 5))
    assert "replay=True" in caught.value.__notes__[0]
    env = SnapshotWrapper(gw.TimeLimit(Pickled(), 5), replay=True)
    assert isinstance(env.env.env, Replayable)
    env.reset(seed=0)
    env.step(2)
    taken = env.snapshot()
    env.step(3)
    env.restore(taken)
    assert env.observation == 2 and env.turn == 1 and env.step(4)[0] == 6
    assert isinstance(SnapshotWrapper(cart(), replay=True).env.env.env, gw.PassiveEnvChecker)
    assert SnapshotWrapper(cart(), replay=True).env.env.env.env is not None


def test_an_info_that_cannot_be_copied_is_named() -> None:
    env = SnapshotWrapper(gw.TransformReward(Tally(cart()), half))
    env.reset(seed=0)
    env.unwrapped.step = lambda action: (np.zeros(4), 0.0, False, False, {"stream": (i for i in ())})
    with pytest.raises(SnapshotUnsupportedError, match=r"the info of CartPole-v1 cannot be copied.*plain data"):
        env.step(1)
