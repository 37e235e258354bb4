"""Environments of this package and of others, bare and under stacks of wrappers, pass `check_snapshot`."""

import ale_py
import gymnasium as gym
import lock_env
import minigrid
import numpy as np
import pytest
from gymnasium.wrappers import (
    DelayObservation,
    FilterObservation,
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    RenderCollection,
    StickyAction,
    TimeLimit,
    TransformObservation,
)
from stack_tools import ALL_CHECKS

from trace_envs.snapshots.check import check_snapshot
from trace_envs.snapshots.replay import Replayable

lock_env.register()
gym.register_envs((ale_py, minigrid))  # both register on import

EVERYTHING = set(ALL_CHECKS)

ENVIRONMENTS = {
    "TraceMultiHopQA-v0": {"search_dropout": 0.3},
    "Lock-v0": {},
    "CartPole-v1": {},
    "FrozenLake-v1": {},
    "Taxi-v4": {},
    "Blackjack-v1": {},
    "MountainCarContinuous-v0": {},
    "Acrobot-v1": {},
    "Pendulum-v1": {},
    "CliffWalking-v1": {"is_slippery": True},
    "InvertedPendulum-v5": {},
    "Ant-v5": {},
    "ALE/Pong-v5": {},
    "ALE/Breakout-v5": {"frameskip": (2, 5)},
    "MiniGrid-DoorKey-5x5-v0": {},
    "MiniGrid-Dynamic-Obstacles-5x5-v0": {},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_comes_back_exactly(name):
    # A step of an emulator takes as long as a hundred of a cart.
    effort = {"turns": 8, "episodes": 2} if name.startswith("ALE/") else {}
    report = check_snapshot(gym.make(name, **ENVIRONMENTS[name]), **effort)
    assert report.env_id == name and report.turns >= 6
    assert set(report.passed) == EVERYTHING and not report.skipped


def cart_pole(**kwargs):
    return gym.make("CartPole-v1", **kwargs)


def double(observation):
    return 2 * observation


STACKS = {
    "TimeLimit": lambda: TimeLimit(cart_pole(), 7),
    "RecordEpisodeStatistics": lambda: RecordEpisodeStatistics(cart_pole(max_episode_steps=6)),
    "TransformObservation": lambda: TransformObservation(cart_pole(), double, cart_pole().observation_space),
    "FrameStackObservation": lambda: FrameStackObservation(cart_pole(), 3),
    "NormalizeObservation": lambda: NormalizeObservation(cart_pole(max_episode_steps=9)),
    "all": lambda: RecordEpisodeStatistics(
        FrameStackObservation(
            NormalizeObservation(TimeLimit(TransformObservation(gym.make("Pendulum-v1"), double, None), 9)), 4
        )
    ),
    "NormalizeReward": lambda: NormalizeReward(gym.make("Pendulum-v1")),
    "StickyAction": lambda: StickyAction(cart_pole(), 0.5, (1, 4)),
    "DelayObservation": lambda: DelayObservation(cart_pole(), 2),
    "rendered": lambda: RenderCollection(cart_pole(render_mode="rgb_array")),
    "frames": lambda: FrameStackObservation(gym.make("ALE/Pong-v5"), 3),
    "grids": lambda: FrameStackObservation(
        FilterObservation(gym.make("MiniGrid-Dynamic-Obstacles-5x5-v0"), ["image", "direction"]), 2
    ),
    "text": lambda: RecordEpisodeStatistics(TimeLimit(gym.make("Lock-v0"), 5), stats_key="statistics"),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_comes_back_exactly(name):
    report = check_snapshot(STACKS[name](), make=STACKS[name], another_process=name == "all")
    assert set(report.passed) >= EVERYTHING - {"another process"}


REPLAYED = {
    "inside": lambda: TimeLimit(Replayable(gym.make("FrozenLake-v1")), 9),
    "outside": lambda: Replayable(FrameStackObservation(gym.make("FrozenLake-v1", max_episode_steps=9), 3)),
    "drawn from np_random": lambda: Replayable(gym.make("Blackjack-v1")),
}


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replayed_environment_comes_back_exactly(name):
    report = check_snapshot(REPLAYED[name](), make=REPLAYED[name], another_process=name == "inside")
    assert set(report.passed) >= EVERYTHING - {"another process"}


@pytest.mark.parametrize("seed", range(5))
def test_other_episodes_do_as_well(seed):
    """Longer episodes of other seeds, with actions that go on: a policy of a kind, not samples."""

    def upright(rng, observation, info):
        return int(observation[2] + observation[3] > 0) if rng.random() < 0.9 else int(rng.integers(2))

    report = check_snapshot(cart_pole(), seed=100 * seed, turns=60, episodes=2, actions=upright, another_process=False)
    assert report.turns > 60 and report.skipped.keys() == {"another process"}


def test_an_array_that_is_written_again_and_again_is_no_difference():
    array = np.zeros(4, np.float32)

    def write(observation):
        array[:] = observation
        return array

    env = TransformObservation(cart_pole(), write, None)
    assert "restore and re-step" in check_snapshot(env, another_process=False).passed
