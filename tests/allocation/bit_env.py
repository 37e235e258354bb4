"""A small foreign environment for the tests: guess a row of bits, with numbers instead of text.

Each observation hints at the next bit and is wrong with a chance of `noise`, drawn from the state's key and turn. Two wrong
guesses end the episode; it is a success if at most one guess was wrong at the end.
"""

from dataclasses import dataclass, replace

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv

from allocation import TraceAllocator, TraceConfig, TreeAllocationWrapper
from trace_envs.snapshots import EnvSnapshot


@dataclass(frozen=True)
class BitState:
    secret: tuple[int, ...]
    key: int
    guesses: tuple[int, ...] = ()

    @property
    def wrong(self):
        return sum(g != s for g, s in zip(self.guesses, self.secret, strict=False))


class BitEnv(gym.Env):
    def __init__(self, turns=4, noise=0.3, verdict=True, as_dict=False):
        self.turns, self.noise, self.verdict, self.as_dict = turns, noise, verdict, as_dict
        box = gym.spaces.Box(-1, turns, (2,), np.int64)
        self.observation_space = gym.spaces.Dict({"bits": box}) if as_dict else box
        self.action_space = gym.spaces.Discrete(2)
        self.state = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        secret = tuple(int(b) for b in self.np_random.integers(2, size=self.turns))
        self.state = BitState(secret, int(self.np_random.integers(2**31)))
        return self._observation(), {"turn": 0}

    def step(self, action):
        self.state = state = replace(self.state, guesses=(*self.state.guesses, int(action)))
        over = state.wrong > 1 or len(state.guesses) == self.turns
        info = {"turn": len(state.guesses)}
        if over and self.verdict:
            info["is_correct"] = state.wrong <= 1
        return self._observation(), float(over and state.wrong <= 1), over, False, info

    def _observation(self):
        turn = len(self.state.guesses)
        if turn == self.turns:
            hint = -1
        else:
            flipped = np.random.default_rng([self.state.key, turn]).random() < self.noise
            hint = self.state.secret[turn] ^ int(flipped)
        bits = np.array([turn, hint])
        return {"bits": bits} if self.as_dict else bits

    def snapshot(self):
        return EnvSnapshot("BitEnv", len(self.state.guesses), self.state)

    def restore(self, snapshot, *, seed=None):
        self.state = snapshot.payload if seed is None else replace(snapshot.payload, key=seed)


class DepthPredictor:
    """Known from the start, and different at every depth."""

    ready = True

    def predict(self, anchors):
        return np.array([0.35 + 0.1 * a.depth for a in anchors])

    def update(self, anchors, values, weights):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def bit_vector(num_envs=4, **kwargs):
    return SyncVectorEnv([lambda: BitEnv(**kwargs)] * num_envs)


def trace(**config):
    return TraceAllocator(DepthPredictor(), TraceConfig(**({"continuations": 1.0, "cap_per_rollout": None} | config)))


def wrapped(num_envs=4, budget=32, allocator=None, **kwargs):
    env = {k: kwargs.pop(k) for k in ("turns", "noise", "verdict", "as_dict") if k in kwargs}
    return TreeAllocationWrapper(bit_vector(num_envs, **env), allocator=allocator or trace(), budget=budget, **kwargs)


def follow_hints(observations, rng, trust=0.8):
    hints = observations["bits"][:, 1] if isinstance(observations, dict) else observations[:, 1]
    return [int(h) if h >= 0 and rng.random() < trust else int(rng.integers(2)) for h in hints]


def run(envs: TreeAllocationWrapper, seed=0, trust=0.8):
    """The loop of ARCHITECTURE.md."""
    rng = np.random.default_rng(seed)
    obs, _ = envs.reset(seed=seed)
    while envs.active.any():
        obs, _, _, _, _ = envs.step(follow_hints(obs, rng, trust))
    return envs.forest


def shape(forest):
    """Everything that was sampled, as plain data."""
    return [
        (
            t.key,
            [(n.parent, n.depth, n.origin, n.rollout, n.action, n.reward, n.terminal, n.is_correct) for n in t.nodes],
        )
        for t in forest
    ]
