"""Snapshots through wrappers that are not Gymnasium's."""

from __future__ import annotations

import inspect
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import minigrid.wrappers
import numpy as np
import pytest
from gymnasium import wrappers as gw
from stack_tools import Tally, cart, half, play

import trace_envs
from trace_envs import SnapshotUnsupportedError
from trace_envs.snapshots import EnvSnapshot
from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.wrappers import carried_state

# Other people's wrappers ----------------------------------------------------------------------------------------------


class Budget(gym.Wrapper):
    """Knows the environment inside and has a generator, a space and a function of its own."""

    __slots__ = ("left",)

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.inner, self.me = env.unwrapped, self
        self.rng = np.random.default_rng(3)
        self.left = 10
        self.noise = gym.spaces.Box(-1, 1, (2,), seed=4)
        self.log = [[0]]
        self.alias = self.log[0]
        self.look = lambda: self.left

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.left -= 1
        self.alias.append(self.look())
        draws = [self.rng.random(), self.noise.sample().tolist()]
        info = {**info, "draws": draws, "log": self.log[0], "bare": self.inner is self.unwrapped, "me": self.me is self}
        if self.left < 8:
            self.appeared = True
        return observation, reward, terminated, truncated, info


def test_an_unknown_wrapper_is_carried_by_its_attributes() -> None:
    env, sibling = Budget(cart()), Budget(cart())
    env.reset(seed=0)
    play(env, [0])
    taken = trace_envs.snapshot(env)
    expected = [info for *_, info, _ in play(env, [0, 1, 1])]
    assert all(info["bare"] and info["me"] for info in expected) and env.appeared
    again = pickle.loads(pickle.dumps(taken))
    for target, moment in ((env, taken), (sibling, taken), (sibling, again), (Budget(cart()), again)):
        trace_envs.restore(target, moment)
        assert not hasattr(target, "appeared") and target.alias is target.log[0]
        assert difference([info for *_, info, _ in play(target, [0, 1, 1])], expected) is None
    trace_envs.restore(env, taken)
    twin = trace_envs.fork(env)
    assert twin.rng is not env.rng and twin.noise is not env.noise and twin.me is twin and twin.inner is twin.unwrapped
    assert difference([info for *_, info, _ in play(twin, [0, 1, 1])], expected) is None
    assert env.left == 9
    seeded = []
    for target, seed in ((env, 5), (sibling, 5), (env, 6)):
        trace_envs.restore(target, taken, seed=seed)
        seeded.append([step[4]["draws"] for step in play(target, [0, 1])])
    trace_envs.restore(env, taken)
    trace_envs.reseed(env, 5)
    seeded.append([step[4]["draws"] for step in play(env, [0, 1])])
    assert seeded[0] == seeded[1] == seeded[3] != seeded[2]
    assert seeded[0][0][0] != env.np_random.random() and seeded[0][0] != expected[0]["draws"]


def test_a_wrapper_may_say_what_its_state_is() -> None:
    env = Tally(cart())
    env.reset(seed=0)
    play(env, [1, 0])
    taken = trace_envs.snapshot(env)
    for moment in (taken, taken, EnvSnapshot.from_bytes(taken.to_bytes())):
        assert [step[4]["seen"] for step in play(env, [1, 1])][-1] == [1, 0, 1, 1]
        trace_envs.restore(env, moment)
    assert carried_state(env)[0] == ("Tally", {"state": [1, 0]})


def test_a_subclass_has_the_state_of_its_base_and_its_own() -> None:
    class Counting(gw.RecordEpisodeStatistics):
        def __init__(self, env: gym.Env):
            super().__init__(env)
            self.calls = deque(maxlen=2)  # type: ignore[var-annotated]

        def step(self, action: Any) -> Any:
            self.calls.append(action)
            return super().step(action)

    env = Counting(cart(max_episode_steps=4))
    for _ in range(2):
        env.reset(seed=0)
        play(env, [1, 0])
    taken = trace_envs.snapshot(env)
    play(env, [1, 1])
    assert env.episode_count == 1
    for target in (env, Counting(cart(max_episode_steps=4))):
        trace_envs.restore(target, taken)
        assert list(target.calls) == [1, 0] and target.episode_lengths == 2
    assert env.episode_count == 1
    twin = trace_envs.fork(env)
    assert twin.return_queue is not env.return_queue and twin.calls is not env.calls
    assert difference(play(twin, [1, 1])[-1][:4], play(env, [1, 1])[-1][:4]) is None


@pytest.mark.parametrize("value", [(i for i in range(3)), gym.make("CartPole-v1").unwrapped.step, None])
def test_what_cannot_be_carried_is_named(value: Any) -> None:
    env = Tally(cart())
    env.reset(seed=0)
    other = gw.TransformReward(Budget(env), half)
    other.env.log.append(value)
    if inspect.isgenerator(value):
        with pytest.raises(
            SnapshotUnsupportedError, match=r"Budget cannot be carried: its attribute log\[1\].*get_wrapper"
        ):
            trace_envs.snapshot(other)
    else:
        trace_envs.snapshot(other)


MINIGRID: list[Callable[[gym.Env], gym.Env]] = [
    minigrid.wrappers.ImgObsWrapper,
    minigrid.wrappers.FullyObsWrapper,
    minigrid.wrappers.FlatObsWrapper,
    minigrid.wrappers.ActionBonus,
    minigrid.wrappers.PositionBonus,
    minigrid.wrappers.RGBImgPartialObsWrapper,
    minigrid.wrappers.DictObservationSpaceWrapper,
    minigrid.wrappers.ViewSizeWrapper,
    minigrid.wrappers.DirectionObsWrapper,
    minigrid.wrappers.SymbolicObsWrapper,
    minigrid.wrappers.StochasticActionWrapper,
    lambda env: minigrid.wrappers.ReseedWrapper(env, seeds=(1, 2, 3)),
    lambda env: gw.FrameStackObservation(minigrid.wrappers.ImgObsWrapper(minigrid.wrappers.FullyObsWrapper(env)), 3),
]


@pytest.mark.parametrize("wrap", MINIGRID, ids=lambda wrap: wrap.__name__)
def test_wrappers_of_minigrid(wrap: Callable[[gym.Env], gym.Env]) -> None:
    env, sibling = (wrap(gym.make("MiniGrid-DoorKey-5x5-v0")) for _ in range(2))
    env.reset(seed=0)
    actions = [2, 1, 2, 0, 2, 3, 5, 1, 2, 2]
    play(env, actions[:4])
    taken = trace_envs.snapshot(env)
    twin = trace_envs.fork(env)
    expected = play(env, actions[4:])
    for target, moment in ((env, taken), (sibling, EnvSnapshot.from_bytes(taken.to_bytes()))):
        trace_envs.restore(target, moment)
        assert difference(play(target, actions[4:]), expected) is None
    assert difference(play(twin, actions[4:]), expected) is None
