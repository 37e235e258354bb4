from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from allocation.arena.dense import DenseForest
from allocation.arena.recorded import RecordedWorld
from benchmarks.record_lakes import ACTIONS, CELLS, Args, make_lakes, record, scores, softmax, solve, train

ARGS = Args(Path("lakes.npz"), maps=5, turns=7, spines=12, continuations=4, steps=30, seed=2)


@pytest.fixture(scope="module")
def world():
    """What is true, and a record."""
    lakes = make_lakes(ARGS)
    return solve(lakes, train(lakes, ARGS), ARGS.turns), record(ARGS)


def chance(lakes, lake, policy, turns, cell=0):
    """The obvious way: the sum over all that can happen."""
    if lakes.over[lake, cell] or turns == 0:
        return float(lakes.goal[lake, cell])
    total = 0.0
    for action in range(ACTIONS):
        for to in np.flatnonzero(lakes.transition[lake, cell, action]):
            p = policy[cell, action] * lakes.transition[lake, cell, action, to]
            total += p * chance(lakes, lake, policy, turns - 1, int(to))
    return total


def test_values_and_gradient_are_those_of_enumeration():
    args = replace(ARGS, maps=2, turns=9, frozen=0.9)
    lakes = make_lakes(args)
    logits = np.random.default_rng(0).normal(size=(CELLS, ACTIONS))
    exact = solve(lakes, softmax(logits), args.turns)
    for cell, left in [(0, 3), (9, 4), (10, 4), (13, 3), (14, 4), (15, 0)]:
        obvious = [chance(lakes, i, softmax(logits), left, cell) for i in range(2)]
        assert exact.value[:, args.turns - left, cell] == pytest.approx(obvious)
    assert exact.value[:, 0, 0].min() > 0
    # Central differences of the mean value, in every direction.
    differences, step = np.zeros((CELLS, ACTIONS)), 1e-5
    for cell in range(CELLS):
        for action in range(ACTIONS):
            ends = []
            for sign in (1, -1):
                moved = logits.copy()
                moved[cell, action] += sign * step
                ends.append(solve(lakes, softmax(moved), args.turns).value[:, 0, 0].mean())
            differences[cell, action] = (ends[0] - ends[1]) / (2 * step)
    assert np.abs(exact.gradient).max() > 1e-3
    assert np.allclose(exact.gradient, differences, atol=1e-8)


def test_tables_are_what_the_environment_does():
    args = replace(ARGS, maps=1)
    lakes = make_lakes(args)
    desc = np.where(lakes.goal[0], "G", np.where(lakes.over[0], "H", "F")).reshape(4, 4)
    desc[0, 0] = "S"
    env = gym.make("FrozenLake-v1", desc=["".join(row) for row in desc], success_rate=args.success_rate)
    rng, seen, total = np.random.default_rng(0), np.zeros((CELLS, ACTIONS, CELLS)), 4000
    state, _ = env.reset(seed=0)
    for _ in range(total):
        action = int(rng.integers(ACTIONS))
        before = state
        state, _, terminated, truncated, _ = env.step(action)
        seen[before, action, state] += 1
        assert terminated == lakes.over[0, state]
        if terminated or truncated:
            state, _ = env.reset()
    count = seen.sum(axis=-1, keepdims=True)
    expected = count * lakes.transition[0]
    assert not seen[lakes.transition[0] == 0].any()
    spread = np.sqrt(expected * (1 - lakes.transition[0])) + 1
    assert (np.abs(seen - expected) < 5 * spread).all() and count[0].min() > 100


def test_scores_are_gradients_of_the_log_probability():
    logits = np.random.default_rng(1).normal(size=(CELLS, ACTIONS))
    got = scores(softmax(logits), np.array([3, 7]), np.array([0, 2]))
    for row, (cell, action) in zip(got, [(3, 0), (7, 2)], strict=True):
        for i in range(CELLS * ACTIONS):
            moved = logits.copy().ravel()
            moved[i] += 1e-6
            change = np.log(softmax(moved.reshape(CELLS, ACTIONS))[cell, action] / softmax(logits)[cell, action])
            assert row[i] == pytest.approx(change / 1e-6, abs=1e-5)


def test_recorded_values_are_near_the_exact_ones(world):
    exact, dense = world[0], record(replace(ARGS, spines=150))
    at = np.argmax(dense.features[:, :CELLS], axis=1)
    inner = np.flatnonzero(~dense.terminal)
    # The few spines count beside the many reference rollouts that stand for the exact value.
    assert dense.root_values().value == pytest.approx(exact.value[:, 0, 0], abs=1e-4)
    values = dense.prefix_values()
    true = exact.value[dense.prompt[inner], dense.depth[inner], at[inner]]
    _, rows = np.unique(dense.edge_row[inner], return_index=True)
    # Bernstein's bound for each different prefix, at a chance of one in a million each.
    away = np.abs(values.value[inner] - true) * values.count[inner]
    variance, bound = values.count[inner] * true * (1 - true), np.log(2e6)
    assert len(rows) < 10_000
    assert (away <= bound / 3 + np.sqrt(bound**2 / 9 + 2 * variance * bound) + 1e-9)[rows].all()
    # Not merely wide: where it can tell, it is close.
    many = rows[values.count[inner][rows] >= 100]
    assert len(many) > 10 and np.abs(values.value[inner] - true)[many].mean() < 0.05
    # Some prefixes are known to have no chance, others to be worth going on from: not all are the same.
    assert true.min() < 0.01 and true.max() > 0.3


def test_rows_tell_what_the_true_gradient_is(world):
    exact, dense = world
    sketch = dense.sketch * dense.sketch_scale[:, None]
    assert dense.dot == pytest.approx(sketch @ exact.gradient.ravel(), abs=1e-2 * np.abs(exact.gradient).sum())
    assert dense.norm2 == pytest.approx((sketch**2).sum(axis=1), abs=0.02)
    assert dense.meta["gradient_norm2"] == pytest.approx((exact.gradient**2).sum())
    # What rollouts estimate is that gradient: the outcome times the sum of the scores on the path, over spines and maps.
    other = record(replace(ARGS, spines=200, continuations=0))
    path = other.prompt * 200 + other.rollout
    along = np.bincount(path, other.dot[other.edge_row])
    each = np.bincount(path, other.is_correct) * along
    assert len(each) == ARGS.maps * 200 and each.std() > 0
    assert abs(each.mean() - (exact.gradient**2).sum()) < 4 * each.std() / np.sqrt(len(each))


def test_a_record_is_a_world_and_made_the_same_again(tmp_path):
    args = replace(ARGS, output=tmp_path / "lakes.npz", quick=True)
    dense = record(args)
    dense.save(args.output)
    loaded = DenseForest.load(args.output)
    assert loaded.num_prompts == 6 and np.array_equal(loaded.edge_row, record(args).edge_row)
    assert RecordedWorld(loaded).feature_dim == 2 * CELLS
    assert (loaded.depth[loaded.truncated] == args.turns).all() and loaded.depth.max() <= args.turns
    spines = loaded.terminal & ~loaded.continuation
    inner = ~loaded.terminal & ~loaded.continuation
    assert spines.sum() == 6 * 4 and (loaded.terminal & loaded.continuation).sum() == 2 * inner.sum()
