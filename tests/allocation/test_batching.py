import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.batching import batch_observations, placeholder, single_actions, value
from trace_envs.snapshots.compare import difference
from trace_envs.spaces import UnicodeText

# Gymnasium warns of single numbers in a Box without dimensions.
pytestmark = pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")

SINGLE = [
    spaces.Discrete(5),
    spaces.Discrete(3, start=-1),
    spaces.Box(-1, 1, (2, 3), np.float32),
    spaces.Box(-1, 1, (), np.float64),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.MultiBinary(4),
    spaces.MultiDiscrete([3, 4]),
    spaces.Text(8),
    UnicodeText(),
    spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2,)))),
    spaces.Dict({"move": spaces.Discrete(4), "force": spaces.Box(0, 1, (2,)), "say": spaces.Text(5)}),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SINGLE), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_a_batch_taken_apart_and_put_together_is_the_same(space, num_envs, seed):
    batched = batch_space(space, num_envs)
    batched.seed(seed)
    batch = batched.sample()
    items = single_actions(batch, batched, num_envs)
    assert len(items) == num_envs and all(item in space for item in items)
    together = batch_observations(items, space)
    assert together in batched and difference(together, batch) is None
    again = single_actions(list(items), batched, num_envs)
    assert difference(again, items) is None


@pytest.mark.parametrize("space", SINGLE, ids=repr)
def test_an_idle_slot_shows_an_element_of_the_space(space):
    assert placeholder(space) in space
    assert difference(placeholder(space), placeholder(space)) is None


def test_values_share_no_memory():
    array = np.arange(3)
    given = {"a": array, "b": (array, [array, "text"], np.float32(2)), "c": None}
    kept = value(given)
    before = value(kept)
    array[:] = 9
    assert difference(kept, before) is None and kept["a"].tolist() == [0, 1, 2]
    assert kept["b"][1][0].tolist() == [0, 1, 2]


def test_a_batch_shares_no_memory_with_its_parts():
    parts = [np.zeros(2, np.float32), np.ones(2, np.float32)]
    batch = batch_observations(parts, spaces.Box(0, 1, (2,)))
    parts[0][:] = 5
    assert batch.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (spaces.Discrete(3), "01", "TypeError: a text is one action"),
        (spaces.Discrete(3), 1, "the actions are no batch"),
        (spaces.Discrete(3), np.zeros(3, int), "expected 2 actions, one for each slot, got 3"),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"b": np.zeros(2, int)}, "KeyError: 'a'"),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"a": np.zeros(1, int)}, "expected 2 actions"),
        (spaces.Text(3), ("one",), "expected 2 actions"),
    ],
)
def test_what_is_no_batch_is_refused(space, actions, message):
    with pytest.raises(ValueError, match=message):
        single_actions(actions, batch_space(space, 2), 2)


@pytest.mark.parametrize(
    ("space", "bad"),
    [
        (spaces.Box(0, 1, (2,)), np.zeros(3, np.float32)),
        (spaces.Box(0, 1, (2,)), "text"),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"b": 1}),
    ],
)
def test_an_observation_outside_its_space_is_named(space, bad):
    with pytest.raises(ValueError, match="observation of slot 1 does not fit the environment's observation_space"):
        batch_observations([space.sample(), bad], space)


def test_idle_slots_do_not_move_the_generator_of_a_space():
    space = gym.spaces.Dict({"text": UnicodeText()})
    space.seed(3)
    twin = gym.spaces.Dict({"text": UnicodeText()})
    twin.seed(3)
    placeholder(space)
    assert space.sample() == twin.sample()
