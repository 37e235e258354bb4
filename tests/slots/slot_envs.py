"""Environments for the tests of slots: one that misbehaves on demand, and one that nothing but replay can carry."""

import os
import threading
import time

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle

COUNT, RAISE, DIE, HANG, GROW, RAISE_UNSENDABLE, UNSENDABLE_INFO = range(7)


class UnsendableError(Exception):
    def __init__(self, code):
        super().__init__(code)
        self.lock = threading.Lock()


class CounterEnv(gym.Env):
    """Counts its turns; writes every observation and info into the same objects."""

    def __init__(self, unsendable=False, high=100, slow=0.0):
        self.observation_space = gym.spaces.Dict({"count": gym.spaces.Box(0, high, (1,), np.int64)})
        self.action_space = gym.spaces.Discrete(7)
        self._observation = {"count": np.zeros(1, np.int64)}
        self._info = {"past": [], "pair": (np.zeros(1, np.int64), "text")}
        self._unsendable, self._slow = unsendable, slow
        self.closed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._put(0 if seed is None else seed)
        return self._observation, self._info

    def _put(self, count):
        self._observation["count"][0] = self._info["pair"][0][0] = count
        self._info["past"][:] = range(count)

    def step(self, action):
        count = int(self._observation["count"][0])
        if action == RAISE:
            raise ValueError(f"no step after {count}")
        if action == RAISE_UNSENDABLE:
            raise UnsendableError(count)
        if action == DIE:
            os._exit(7)
        if action == HANG:
            time.sleep(60)
        if action == GROW:
            self.action_space = gym.spaces.Discrete(8)
        self._put(count + 1)
        time.sleep(self._slow)
        info = {**self._info, "lock": threading.Lock()} if action == UNSENDABLE_INFO else self._info
        return self._observation, 1.0, count + 1 >= 50, False, info

    def snapshot(self):
        return (lambda: None, threading.Lock()) if self._unsendable else int(self._observation["count"][0])

    def restore(self, snapshot, *, seed=None):
        if snapshot < 0:
            raise ValueError(f"there is no count {snapshot}")
        self._put(snapshot)

    def close(self):
        self.closed = True


class SealedEnv(gym.Env, EzPickle):
    """Customises pickling, so that a copy of it would be reset; it can only be replayed."""

    def __init__(self, bonus=0):
        EzPickle.__init__(self, bonus)
        self.observation_space, self.action_space = gym.spaces.Discrete(1000), gym.spaces.Discrete(2)
        self.total = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.total = int(self.np_random.integers(10))
        return self.total, {}

    def step(self, action):
        self.total += int(action) + int(self.np_random.integers(3))
        return self.total, 0.0, False, False, {}


def broken_env():
    raise OSError("no such simulator")


def shape(result):
    """What a result says, without the snapshot, whose payload two adapters' environments may hold as different objects."""
    return result.observation, result.reward, result.terminated, result.truncated, result.info
