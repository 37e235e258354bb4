"""State that copying attributes would get wrong: it is carried rightly, or refused by name; and bytes that lie."""

import random
import sqlite3
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pygame
import pytest
import torch

import trace_envs
from trace_envs.snapshots import EnvSnapshot, SnapshotUnsupportedError
from trace_envs.snapshots.adapters.generators import GeneratorState, thaw
from trace_envs.snapshots.adapters.standins import View, belongs
from trace_envs.snapshots.codec import decode, encode
from trace_envs.snapshots.errors import SnapshotFormatError


class Machine(gym.Env):
    """Does what the functions that it is given say."""

    observation_space, action_space = gym.spaces.Box(-1e9, 1e9, (1,), np.float64), gym.spaces.Discrete(2)

    def __init__(self, begin, move, see):
        self.program = begin, move, see
        begin(self)

    def see(self):
        return np.array([float(self.program[2](self))])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.program[0](self)
        return self.see(), {}

    def step(self, action):
        self.program[1](self)
        return self.see(), 0.0, False, False, {}


def tensors(env):
    env.whole = torch.zeros(4)
    env.part = env.whole[:2]


def shapes(env):
    env.box, env.speed = pygame.Rect(0, 0, 1, 1), pygame.Vector2(0, 0)


def move_shapes(env):
    env.box.x += 1
    env.speed.x += 2


CARRIED = {
    "tensors": (tensors, lambda env: env.part.add_(1), lambda env: env.whole.sum()),
    "shapes": (shapes, move_shapes, lambda env: env.box.x + env.speed.x),
}


@pytest.mark.parametrize("program", CARRIED.values(), ids=CARRIED)
def test_what_shares_memory_or_comes_from_pygame_is_state(program):
    env, sibling, plain = (Machine(*program) for _ in range(3))
    plain.reset(seed=0)
    seen = [float(plain.step(0)[0][0]) for _ in range(6)]
    env.reset(seed=0)
    env.step(0), env.step(0)
    taken = trace_envs.snapshot(env)
    for someone in (env, env, sibling):
        trace_envs.restore(someone, taken)
        assert [float(someone.step(0)[0][0]) for _ in range(4)] == seen[2:]


def closure(env):
    env.places = [0]
    env.moves = {0: lambda: env.places.append(1)}


def two_generators(env):
    env.first = np.random.default_rng(0)
    env.second = np.random.Generator(env.first.bit_generator)


def push(env):
    env.stack = []
    env.push = env.stack.append


class OwnRandom(random.Random):
    pass


REFUSED = {
    r"env\.link \(sqlite3\.Connection\) cannot be copied": lambda env: setattr(
        env, "link", sqlite3.connect(":memory:")
    ),
    r"env\.moves.* function around the environment itself": closure,
    r"env\.second draws from the bit generator of another": two_generators,
    r"env\.push is a method of a builtins\.list": push,
    r"env\.dice is a .*OwnRandom, a kind of generator that cannot be given a new seed": lambda env: setattr(
        env, "dice", OwnRandom(0)
    ),
    r"env\.bits is a .*PCG64, which cannot be given a new seed by itself": lambda env: setattr(
        env, "bits", np.random.PCG64(0)
    ),
}


@pytest.mark.parametrize(("message", "begin"), REFUSED.items())
def test_what_copying_would_get_wrong_is_refused(message, begin):
    env = Machine(begin, lambda env: None, lambda env: 0)
    env.reset(seed=0)
    with pytest.raises(SnapshotUnsupportedError, match=message):
        trace_envs.snapshot(env)


def test_a_refused_restore_leaves_the_generator_where_it_was():
    env = gym.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    taken = trace_envs.snapshot(env)
    env.reset()
    there = env.np_random.bit_generator.state
    values = dict(taken.payload.values)
    damaged = View(np.zeros(8, np.uint8), (1,), np.dtype(object), 0, (8,), True)
    values["state"] = damaged
    payload = replace(taken.payload, values=values, copied=(*taken.payload.copied, "state"))
    with pytest.raises(ValueError, match=r"damaged: env\.state looks at memory"):
        trace_envs.restore(env, EnvSnapshot(taken.env_id, 0, payload, None, (), "deepcopy", taken.config))
    assert env.np_random.bit_generator.state == there
    with pytest.raises(ValueError, match="non-negative"):
        trace_envs.restore(env, taken, seed=-1)
    assert env.np_random.bit_generator.state == there


def test_generator_states_that_would_leave_their_memory_are_refused():
    key = np.zeros(624, np.uint32)
    for state in (("MT19937", key, 10**9), {"bit_generator": "MT19937", "state": {"key": key, "pos": 10**9}}):
        with pytest.raises(ValueError, match=r"damaged|must be from 0 to"):
            thaw(GeneratorState("MT19937", state))


def test_a_module_among_the_attributes_vouches_for_itself_alone():
    import os

    env = Machine(lambda env: setattr(env, "np", np), lambda env: None, lambda env: 0)
    assert belongs(np, env) and not belongs(os.system, env) and not belongs(os, env)


def test_tuples_in_tuples_have_a_bound():
    deep = ()
    for _ in range(400):
        deep = (deep,)
    assert decode(encode({deep: 1}, "x")) == {deep: 1}
    wide = ()
    for _ in range(60):
        wide = (wide, wide)
    with pytest.raises(SnapshotFormatError, match="beyond measure"):
        decode(encode([wide], "x"))
