"""What tests of wrappers share: environments, and a look at wrappers that knows nothing of the package's own."""

from __future__ import annotations

import copy
from functools import cache
from types import GeneratorType, ModuleType
from typing import Any

import gymnasium as gym
from gymnasium import wrappers as gw

from trace_envs.snapshots.wrappers import ALIKE

RECORDS = {"episode_count", "episode_start_time", "time_queue", "return_queue", "length_queue", "frame_list"}
CHECKS = {"checked_reset", "checked_step", "checked_data_reuse", "checked_render", "_previous_data"}

ALL_CHECKS = (
    "immutability",
    "random state",
    "global generators",
    "wrapper state",
    "restore and re-step",
    "repeated restore",
    "seeded restore",
    "branch independence",
    "digest",
    "sibling instance",
    "another process",
)
"""Of `check_snapshot`, in their order."""


@cache
def bare_pair(env_id: str) -> tuple[gym.Env, gym.Env]:
    """Two instances of a registered environment, bare."""
    return gym.make(env_id).unwrapped, gym.make(env_id).unwrapped


def cart(**kwargs: Any) -> gym.Env:
    return gym.make("CartPole-v1", **kwargs)


def half(observation: Any) -> Any:
    return observation / 2


def layers(env: gym.Env) -> list[gym.Wrapper]:
    found = []
    while isinstance(env, gym.Wrapper):
        found.append(env)
        env = env.env
    return found


def held(env: gym.Env) -> list[Any]:
    """Every attribute of every wrapper that may belong to the moment, copied; found without what the package knows of them."""
    return [
        copy.deepcopy(
            {
                name: value
                for name, value in vars(wrapper).items()
                if name not in ALIKE | RECORDS | CHECKS
                and not isinstance(value, gym.Env | gym.Space | GeneratorType | ModuleType)
                and not callable(value)
            }
        )
        for wrapper in layers(env)
    ]


def arrays(observation: Any) -> Any:
    """Tensors as arrays, which can be compared."""
    return observation.numpy() if type(observation).__name__ == "Tensor" else observation


def play(env: gym.Env, actions: list[Any]) -> list[Any]:
    """What an episode gives, and what the wrappers hold after each step."""
    seen: list[Any] = []
    for action in actions:
        observation, reward, terminated, truncated, info = copy.deepcopy(env.step(action))
        if isinstance(info.get("episode"), dict):
            assert info["episode"].pop("t", 0.0) >= 0
        seen.append((arrays(observation), reward, terminated, truncated, info, held(env)))
        if (terminated or truncated) and not isinstance(env, gw.Autoreset):
            break
    return seen


class Tally(gym.Wrapper):
    """Says itself what its state is; the rest could not be copied."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.seen: list[int] = []
        self.stream = (i for i in range(3))

    def step(self, action: Any) -> Any:
        self.seen.append(action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "seen": list(self.seen)}

    def get_wrapper_state(self) -> list[int]:
        return self.seen

    def set_wrapper_state(self, state: list[int]) -> None:
        self.seen = state
