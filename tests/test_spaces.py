import copy
import json
import multiprocessing
import pickle
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Dict, Discrete, Text
from gymnasium.spaces.utils import flatten_space
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from hypothesis import given
from hypothesis import strategies as st

from trace_envs.spaces import SharedTexts, UnicodeText

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
HOSTILE = ["", "\x00", "\ud83d\ude00", "\ud800 alone", "😀", "中文 عربى", "\u2028\r\n\x1b[0m", "x" * 100_000]


class EchoEnv(gym.Env[str, str]):
    """Says what it is told, for three turns."""

    def __init__(self, max_length: int = 1 << 20) -> None:
        self.observation_space = UnicodeText(max_length)
        self.action_space = UnicodeText()
        self.turn = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.turn = 0
        return f"hello {self.np_random.integers(1000)}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        return action, 0.0, self.turn >= 3, False, {}


class NestedEchoEnv(EchoEnv):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Dict({"text": UnicodeText(), "turn": Discrete(10)})  # type: ignore[assignment]

    def reset(self, **kwargs: Any) -> Any:
        text, info = super().reset(**kwargs)
        return {"text": text, "turn": 0}, info

    def step(self, action: str) -> Any:
        text, *rest = super().step(action)
        return {"text": text, "turn": self.turn}, *rest


@given(ANY_TEXT)
def test_any_text_belongs_and_survives_json(text: str) -> None:
    space = UnicodeText()
    assert text in space
    through_json = json.loads(json.dumps(space.to_jsonable([text, ""])))
    assert space.from_jsonable(through_json) == [text, ""]


def test_bounds() -> None:
    space = UnicodeText(3, min_length=1)
    assert "abc" in space
    assert "" not in space
    assert "abcd" not in space
    assert 3 not in space
    assert b"abc" not in space
    assert "x" * (1 << 20) in UnicodeText()
    assert "x" * ((1 << 20) + 1) not in UnicodeText()


def test_sample_is_seeded_short_and_varied() -> None:
    first, second = UnicodeText(seed=3), UnicodeText(seed=3)
    samples = [first.sample() for _ in range(300)]
    assert samples == [second.sample() for _ in range(300)]
    assert all(sample in first and len(sample) <= 32 for sample in samples)
    joined = "".join(samples)
    assert "" in samples
    assert any(c < " " for c in joined)
    assert any(c > "\u4e00" for c in joined)
    assert all(1 <= len(UnicodeText(2, min_length=1, seed=seed).sample()) <= 2 for seed in range(20))
    with pytest.raises(ValueError, match="neither mask"):
        first.sample(mask=(None, None))


def test_equality_representation_and_copies() -> None:
    space = UnicodeText(5, min_length=2)
    assert space == UnicodeText(5, min_length=2)
    assert space != UnicodeText(6, min_length=2)
    assert space != Text(5, min_length=2)
    assert Text(5, min_length=2) != space
    assert repr(space) == "UnicodeText(2, 5)"
    assert copy.deepcopy(space) == space
    assert pickle.loads(pickle.dumps(space)) == space
    assert flatten_space(space) is space
    assert not space.is_np_flattenable


def test_batching_functions() -> None:
    space = UnicodeText(seed=0)
    batch = batch_space(space, 3)
    assert isinstance(batch, gym.spaces.Tuple)
    assert batch.sample() in batch
    assert create_empty_array(space, 3) == ("", "", "")
    assert create_empty_array(space, 3) in batch
    assert create_empty_array(UnicodeText(9, min_length=2), 1) == ("  ",)
    assert concatenate(space, ["a", "😀"], create_empty_array(space, 2)) == ("a", "😀")
    assert list(iterate(batch, ("a", "b", "c"))) == ["a", "b", "c"]


def test_environment_passes_the_checker_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(EchoEnv(), skip_render_check=True)


def test_sync_vector() -> None:
    envs = SyncVectorEnv([EchoEnv] * 2)
    observations, _ = envs.reset(seed=0)
    assert observations in envs.observation_space
    for text in HOSTILE:
        envs.reset(seed=0)
        observations, *_ = envs.step((text, "other"))
        assert observations == (text, "other")
    envs.close()


@pytest.mark.parametrize("shared_memory", [True, False])
def test_async_vector(shared_memory: bool) -> None:
    envs = AsyncVectorEnv([EchoEnv] * 2, shared_memory=shared_memory)
    reference = SyncVectorEnv([EchoEnv] * 2)
    observations, _ = envs.reset(seed=0)
    assert observations == reference.reset(seed=0)[0]
    assert observations in envs.observation_space
    before = observations
    for text in [*HOSTILE, "short again"]:
        envs.reset(seed=0)
        observations, *_ = envs.step((text, text[::-1]))
        assert observations == (text, text[::-1])
    assert before == reference.reset(seed=0)[0], "an earlier batch changed"
    envs.close()
    reference.close()


def test_async_vector_without_copies_is_a_live_view() -> None:
    envs = AsyncVectorEnv([EchoEnv] * 3, copy=False)
    view, _ = envs.reset(seed=0)
    assert isinstance(view, SharedTexts)
    envs.step(("a", "b", "c"))
    assert list(view) == ["a", "b", "c"]
    assert (view[-1], view[:2], len(view)) == ("c", ("a", "b"), 3)
    assert copy.copy(view) == ("a", "b", "c")
    with pytest.raises(IndexError):
        view[3]
    envs.close()


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_async_vector_in_other_process_contexts(context: str) -> None:
    envs = AsyncVectorEnv([EchoEnv] * 2, context=context)
    envs.reset(seed=0)
    assert envs.step(("\ud800", "中" * 1000))[0] == ("\ud800", "中" * 1000)
    envs.close()


def test_async_vector_with_text_inside_a_dictionary() -> None:
    envs = AsyncVectorEnv([NestedEchoEnv] * 2)
    envs.reset(seed=0)
    observations, *_ = envs.step(("один", "two"))
    assert observations["text"] == ("один", "two")
    np.testing.assert_array_equal(observations["turn"], [1, 1])
    envs.close()


def test_async_autoreset_delivers_the_new_episode() -> None:
    envs = AsyncVectorEnv([EchoEnv] * 2)
    envs.reset(seed=0)
    for _ in range(3):
        observations, _, terminated, *_ = envs.step(("a", "b"))
    assert terminated.all()
    observations, *_ = envs.step(("ignored", "ignored"))
    assert all(text.startswith("hello") for text in observations)
    envs.close()


@pytest.mark.filterwarnings("ignore:.*ERROR")  # Gymnasium logs the worker's traceback as a warning
def test_too_long_observation_says_what_to_do() -> None:
    envs = AsyncVectorEnv([lambda: EchoEnv(max_length=20)])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="raise max_length"):
        envs.step(("x" * 21,))
    envs.close(terminate=True)


def test_make_vec_async_just_works() -> None:
    gym.register("TestEcho-v0", entry_point=EchoEnv)
    envs = gym.make_vec("TestEcho-v0", num_envs=4, vectorization_mode="async")
    observations, _ = envs.reset(seed=0)
    assert observations in envs.observation_space
    assert envs.step(["1", "2", "3", "4"])[0] == ("1", "2", "3", "4")
    envs.close()
    del gym.registry["TestEcho-v0"]
    assert multiprocessing.active_children() == []
