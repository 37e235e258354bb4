"""What is recorded stays what it was, whatever environments, policies and callers do with the objects they are given."""

import os
import signal
import subprocess

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from allocation import AsyncRunner, Root, TreeAllocationWrapper
from trace_envs.slots import ProcessSlots, SlotError


class Grabby(gym.Env):
    """Writes into its actions and takes its options apart."""

    observation_space = gym.spaces.Box(-100, 100, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.turn = float((options or {}).pop("level", 0)), 0
        return np.array([self.place]), {}

    def step(self, action):
        action *= 0.5
        self.place += float(action[0])
        self.turn += 1
        return np.array([self.place]), 0.0, self.turn >= 4, False, {"tool_calls": ["not a count"]}


def always(total_reward, info):
    return True


def roots():
    return [Root(seed, {"level": 7}) for seed in range(4)]


def actions_of(forest):
    return {float(node.action[0]) for tree in forest for node in tree.nodes[1:]}


def test_the_wrapper_keeps_actions_and_options():
    envs = TreeAllocationWrapper(SyncVectorEnv([Grabby] * 3), budget=12, success=always)
    given = roots()
    envs.reset(seed=0, options={"roots": given})
    buffer = np.empty((3, 1))
    while envs.active.any():
        buffer[:] = 0.8
        *_, info = envs.step(buffer)
        buffer[:] = np.nan
        if "final_obs" in info:
            for observation in info["final_obs"][info["_final_obs"]]:
                observation[:] = np.nan
    for _ in range(2):
        assert actions_of(envs.forest) == {0.8} and given == roots()
        assert envs.forest.verify().paths == 12


def test_the_runner_keeps_actions_and_options():
    buffer = np.empty(1)

    async def policy(context):
        buffer[:] = 0.8
        return buffer

    given = roots()
    runner = AsyncRunner(SyncVectorEnv([Grabby] * 3), budget=12, success=always)
    forest = runner.run_sync(policy, seed=0, roots=given)
    assert actions_of(forest) == {0.8} and given == roots()
    assert forest.verify().paths == 12


def test_environments_in_use_are_not_verified_in():
    vector = gym.make_vec("CartPole-v1", 3, "sync")
    envs = TreeAllocationWrapper(vector, budget=12, success=always)
    envs.reset(seed=0)
    envs.step(np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"pass another one"):
        envs.forest.verify(vector)
    assert envs.forest.verify(gym.make("CartPole-v1")).turns > 0


def test_a_verdict_that_fails_loses_no_edge():
    def no_verdict(total_reward, info):
        raise ValueError("no verdict today")

    class Short(Grabby):
        def step(self, action):
            observation, reward, _, truncated, info = super().step(action)
            return observation, reward, True, truncated, info

    envs = TreeAllocationWrapper(SyncVectorEnv([Short] * 4), allocator="grpo", budget=4, success=no_verdict)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="no verdict today"):
        envs.step(np.zeros((4, 1)))
    assert sum(len(tree.nodes) - 1 for tree in envs.forest) == envs.forest.ledger.environment_turns == 4


class DownAtFirst(gym.Env):
    """Its first restore fails; its step, if asked to, leaves a process behind and dies."""

    observation_space, action_space = gym.spaces.Discrete(10), gym.spaces.Discrete(2)

    def __init__(self):
        self.restores = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return 0, {}

    def step(self, action):
        if action == 1:
            subprocess.Popen(["sleep", "614.159"], close_fds=False)
            os.kill(os.getpid(), signal.SIGKILL)
        self.turn += 1
        return self.turn, 0.0, self.turn > 3, False, {}

    def snapshot(self):
        return self.turn

    def restore(self, snapshot, *, seed=None):
        self.restores += 1
        if self.restores == 1:
            raise OSError("the tool server is down for a moment")
        self.turn = snapshot


def test_a_restore_that_failed_does_not_outlive_its_forest():
    slots = ProcessSlots([DownAtFirst] * 2, "spawn")
    envs = TreeAllocationWrapper(slots, allocator="grpo", budget=4, success=always)
    envs.reset(seed=0)
    with pytest.raises(OSError, match="down for a moment"):
        envs.step([0, 0])
    envs.reset(seed=1)
    while envs.active.any():
        envs.step([0, 0])
    assert envs.forest.num_leaves == 4
    envs.close()


def test_a_dead_process_is_noticed_though_one_of_its_children_lives():
    slots = ProcessSlots([DownAtFirst], "fork")
    try:
        opened = slots.open(0, 0)
        with pytest.raises(OSError, match="down for a moment"):
            slots.restore(0, opened.snapshot, 0)
            slots.settle(0)
        with pytest.raises(SlotError, match="died"):
            slots.step({0: 1})
    finally:
        slots.close()
        subprocess.run(["pkill", "-f", "^sleep 614.159$"], check=False)
