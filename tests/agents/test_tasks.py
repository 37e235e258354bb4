"""Pools of training tasks by level."""

from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trace_envs  # noqa: F401  # registers the environments
from agents.config import TrainConfig
from agents.tasks import pool_of_levels, task_ids

ENV = gym.make("TraceMath-v0", category="word", disable_env_checker=True)


def levels(ids):
    return Counter(ENV.unwrapped.level_of(ENV.unwrapped.pick_task(np.random.default_rng(0), i)) for i in ids)


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ((), {n: 250 for n in range(1, 7)}),
        ((1,), {1: 250}),
        ((4, 2, 0, 0, 0, 1), {1: 250, 2: 125, 6: 62}),
        ((0, 0.5, 0.5), {2: 250, 3: 250}),
    ],
)
def test_levels_have_their_shares(shares, counts):
    assert levels(pool_of_levels("TraceMath-v0", ENV, shares)) == counts


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_a_pool_is_part_of_the_data_set_in_its_order_and_some_level_is_whole(shares):
    ids, pool = task_ids("TraceMath-v0", ENV), pool_of_levels("TraceMath-v0", ENV, shares)
    places = {task_id: i for i, task_id in enumerate(ids)}
    assert [places[i] for i in pool] == sorted(places[i] for i in pool)
    found = levels(pool)
    assert max(found.values()) == 250
    for level, share in enumerate(shares, 1):
        assert found[level] == pytest.approx(250 * share / max(shares), abs=0.51)


def test_a_level_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no tasks of level 7; its levels are 1, 2, 3, 4, 5, 6"):
        pool_of_levels("TraceMath-v0", ENV, (1, 0, 0, 0, 0, 0, 1))


@pytest.mark.parametrize("shares", [(-1.0, 2.0), (0.0, 0.0), (float("nan"),), (float("inf"),)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="train_levels must be shares"):
        TrainConfig(train_levels=shares)
