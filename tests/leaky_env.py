"""An environment with a hidden generator: part of its luck comes from a generator of the module, which no seed reaches."""

import gymnasium as gym
import numpy as np

_WIND = np.random.default_rng()


class LeakyEnv(gym.Env):
    """Walk along a line to the sixth field; from turn 3 on a gust may push one further or back."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn, self.place = 0, float(self.np_random.integers(3))
        return self._observation(), {}

    def step(self, action):
        self.turn += 1
        self.place += 2 * action - 1
        if self.turn >= 3:
            self.place += _WIND.normal()
        there = self.place >= 6
        return self._observation(), float(there), there, False, {}

    def _observation(self):
        return np.array([self.turn, self.place], np.float64)


def register():
    if "Leaky-v0" not in gym.registry:
        gym.register(id="Leaky-v0", entry_point="leaky_env:LeakyEnv", max_episode_steps=12)
