import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.contrast import ROOT_VALUES
from allocation.roots import plan_roots, root_objective
from allocation.token_budget import allocate_token_roots_exact, plan_token_roots, take_fitting

GRID = 8192


@st.composite
def instances(draw, n_max=40, whole=(20, 120)):
    """A table, costs in whole tokens, the bounds, and tokens for some bundles."""
    n = draw(st.integers(1, n_max))
    m_min = draw(st.integers(2, 4))
    m_max = draw(st.integers(m_min, m_min + 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    table = ROOT_VALUES[draw(st.sampled_from(sorted(ROOT_VALUES)))].table(*rng.uniform(0.05, 8, (2, n)), m_max)
    cost = rng.integers(*whole, n).astype(float) if draw(st.booleans()) else rng.choice([30.0, 60.0, 90.0], n)
    tokens = int(draw(st.integers(1, max(1, n // 2))) * m_min * cost.mean() + m_min * cost.min())
    return table, cost, tokens, m_min, m_max


def check(counts, cost, tokens, budget, m_min, m_max):
    """Within both budgets and the bounds, and nothing more would fit."""
    assert cost @ counts <= tokens * (1 + 1e-9)
    assert counts.sum() <= budget
    assert ((counts == 0) | ((counts >= m_min) & (counts <= m_max))).all()
    size = np.where(counts == 0, m_min, 1)
    more = (counts + size <= m_max) & (size <= budget - counts.sum())
    assert (size * cost > tokens - cost @ counts - 1e-6)[more].all()


@settings(max_examples=100, deadline=None)
@given(
    instances(),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.5, 0.9, 1.2, 100.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_both_budgets_and_the_bounds_are_kept_and_nothing_more_fits(instance, explore, share, core, seed):
    table, cost, tokens, m_min, m_max = instance
    budget = max(m_min, int(share * tokens / cost.mean()))
    rng = np.random.default_rng(seed)
    plan = plan_token_roots(
        table, tokens, budget, cost=cost, m_min=m_min, m_max=m_max, explore=explore, core=core, rng=rng
    )
    check(plan.counts, cost, tokens, budget, m_min, m_max)
    assert (plan.counts[plan.explored] >= m_min).all()


@settings(max_examples=60, deadline=None)
@given(instances())
def test_a_pool_that_fits_into_the_core_is_solved_to_the_grid(instance):
    # Each of n prompts wastes at most one step of the grid, so any allocation of that many tokens less is on the grid.
    table, cost, tokens, m_min, m_max = instance
    plan = plan_token_roots(
        table, tokens, 10**6, cost=cost, m_min=m_min, m_max=m_max, explore=0.0, rng=np.random.default_rng(0)
    )
    less = int(tokens * (1 - len(cost) / GRID))
    if less < m_min * cost.min():
        return
    best = allocate_token_roots_exact(table, less, 10**6, cost=cost, m_min=m_min, m_max=m_max)
    assert root_objective(table, plan.counts) >= root_objective(table, best) * (1 - 1e-9)


def relaxation(table, cost, tokens, m_min, m_max):
    """Value of the linear relaxation, an upper bound: gains per token in falling order, the last one in part."""
    gain = np.concatenate([table[:, m_min : m_min + 1], np.diff(table[:, m_min : m_max + 1], axis=1)], axis=1)
    size = np.where(np.arange(gain.shape[1]) == 0, m_min, 1) * cost[:, None]
    order = np.argsort(-(gain / size).ravel())
    gain, size = gain.ravel()[order], size.ravel()[order]
    share = np.clip((tokens - np.cumsum(size) + size) / size, 0, 1)
    return float(gain @ share)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["plug_in", "posterior", "vip", "knapsack", "beta_binomial"]))
def test_large_pools_reach_0_999_of_the_relaxation(seed, value):
    rng = np.random.default_rng(seed)
    n, m_max = 1600, 16
    table, cost = ROOT_VALUES[value].table(*rng.uniform(0.1, 6, (2, n)), m_max), rng.lognormal(4.4, 0.3, n)
    tokens = 400 * 4 * float(cost.mean())
    plan = plan_token_roots(table, tokens, 10**6, cost=cost, explore=0.0, rng=rng)
    assert root_objective(table, plan.counts) >= 0.999 * relaxation(table, cost, tokens, 4, m_max)
    assert tokens - cost @ plan.counts < cost.max()


@settings(max_examples=40, deadline=None)
@given(instances())
def test_without_the_core_at_most_the_dearest_bundle_is_lost(instance):
    table, cost, tokens, m_min, m_max = instance
    plan = plan_token_roots(
        table, tokens, 10**6, cost=cost, m_min=m_min, m_max=m_max, explore=0.0, core=False, rng=np.random.default_rng(0)
    )
    bound = relaxation(table, cost, tokens, m_min, m_max)
    assert bound - table[:, m_min].max() - 1e-9 <= root_objective(table, plan.counts) <= bound + 1e-9


@settings(max_examples=40, deadline=None)
@given(instances(n_max=4, whole=(5, 20)), st.integers(2, 14))
def test_the_dynamic_program_equals_enumeration(instance, budget):
    table, cost, tokens, m_min, m_max = instance
    budget = max(budget, m_min)
    choices = [0, *range(m_min, min(m_max, budget) + 1)]
    feasible = [c for c in itertools.product(choices, repeat=len(table)) if cost @ c <= tokens and sum(c) <= budget]
    best = max(root_objective(table, c) for c in feasible)
    exact = allocate_token_roots_exact(table, tokens, budget, cost=cost, m_min=m_min, m_max=m_max)
    assert cost @ exact <= tokens and exact.sum() <= budget
    assert root_objective(table, exact) == pytest.approx(best, abs=1e-12)


def test_where_rollouts_are_scarce_the_answer_is_that_of_the_root_stage():
    rng = np.random.default_rng(0)
    table, cost = ROOT_VALUES["posterior"].table(*rng.uniform(0.1, 6, (2, 50)), 16), rng.uniform(50, 100, 50)
    tokened = plan_token_roots(table, 1e6, 97, cost=cost, rng=np.random.default_rng(1))
    plain = plan_roots(table, 97, rng=np.random.default_rng(1))
    assert root_objective(table, tokened.counts) >= 0.999 * root_objective(table, plain.counts)
    assert tokened.counts.sum() == 97


@settings(max_examples=60, deadline=None)
@given(instances(), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_prompts_drawn_in_proportion_stay_within_the_tokens(instance, explore, seed):
    table, cost, tokens, m_min, m_max = instance
    kwargs = {"cost": cost, "m_min": m_min, "m_max": m_max, "explore": explore, "choice": "proportional"}
    plan = plan_token_roots(table, tokens, 1000, rng=np.random.default_rng(seed), **kwargs)
    assert cost @ plan.counts <= tokens * (1 + 1e-9) and plan.counts.any()
    assert ((plan.counts == 0) | ((plan.counts >= m_min) & (plan.counts <= m_max))).all()
    assert (plan.counts[plan.explored] >= m_min).all()


def test_prompts_of_half_the_gain_per_token_are_drawn_half_as_often():
    table = np.outer(np.ones(900), [0.0, 0.0, 1.0])
    cost = np.repeat([10.0, 20.0, 1000.0], 300)
    rng, kwargs = (
        np.random.default_rng(0),
        {"cost": cost, "m_min": 2, "m_max": 2, "explore": 0.0, "choice": "proportional"},
    )
    plans = [plan_token_roots(table, 1000, 30, core=False, rng=rng, **kwargs) for _ in range(100)]
    cheap, double, dear = np.mean([p.counts.reshape(3, 300).sum(axis=1) for p in plans], axis=0) / 2
    assert cheap / double == pytest.approx(2.0, abs=0.5) and dear < 1


def test_cheap_prompts_win_among_equals():
    table = ROOT_VALUES["plug_in"].table(np.ones(6), np.ones(6), 4)
    cost = np.array([50.0, 10, 50, 10, 50, 10])
    plan = plan_token_roots(table, 120, 100, cost=cost, m_max=4, explore=0.0, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(plan.counts, [0, 4, 0, 4, 0, 4])


def test_every_prompt_is_explored_equally_often_whatever_it_costs():
    table = ROOT_VALUES["plug_in"].table(np.full(10, 0.01), np.ones(10), 8)
    cost = np.linspace(20, 200, 10)
    plans = [
        plan_token_roots(table, 1500, 99, cost=cost, m_max=8, explore=0.8, rng=np.random.default_rng(s))
        for s in range(1000)
    ]
    seen = np.sum([p.explored for p in plans], axis=0)
    chance = plans[0].explore_chance
    # The tokens would pay for two or three bundles on average, but for no second one beside the dearest.
    assert chance == pytest.approx(0.1)
    assert np.abs(seen - 100).max() < 45  # standard deviation 9.5


def test_ties_go_to_the_least_recently_sampled_and_never_to_the_index():
    table, cost = ROOT_VALUES["plug_in"].table(np.ones(8), np.ones(8), 4), np.full(8, 10.0)
    age = np.array([5, 1, 4, -1, 3, 2, 9, 8])
    kwargs = {"cost": cost, "m_max": 4, "explore": 0.0}
    plan = plan_token_roots(table, 120, 99, last_sampled=age, rng=np.random.default_rng(0), **kwargs)
    np.testing.assert_array_equal(np.flatnonzero(plan.counts), [1, 3, 5])
    opened = np.sum(
        [plan_token_roots(table, 120, 99, rng=np.random.default_rng(s), **kwargs).counts > 0 for s in range(400)],
        axis=0,
    )
    assert opened.min() > 100 and opened.max() < 200  # 150 expected, standard deviation 9.7


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_taking_what_fits_is_what_one_would_do_by_hand(seed, items):
    rng = np.random.default_rng(seed)
    who = rng.integers(0, 8, items)
    cost = rng.integers(1, 30, 8).astype(float)
    size = np.ones(items, dtype=np.int64)
    for i in range(8):  # each owner's first item is a bundle
        size[np.flatnonzero(who == i)[:1]] = 3
    tokens, budget = float(rng.integers(1, 300)), int(rng.integers(1, 30))
    left, rolls, blocked, expected = tokens, budget, set(), []
    for w, s in zip(who, size, strict=True):
        take = w not in blocked and s * cost[w] <= left and s <= rolls
        if take:
            left, rolls = left - s * cost[w], rolls - s
        else:
            blocked.add(w)
        expected.append(take)
    np.testing.assert_array_equal(take_fitting(who, size, size * cost[who], tokens, budget), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens": 39}, "39 tokens are fewer than one group"),
        ({"tokens": float("nan")}, "raise the token budget"),
        ({"budget": 3}, "smaller than one group"),
        ({"cost": [10.0, 0.0, 10.0]}, r"cost\[1\]"),
        ({"explore": -0.1}, "explore"),
        ({"last_sampled": [1.0]}, "last_sampled"),
        ({"m_max": 3}, "m_min <= m_max"),
    ],
)
def test_what_cannot_be_spent_says_what_to_change(kwargs, message):
    arguments = {"tokens": 100, "budget": 50, "cost": np.full(3, 10.0), "rng": np.random.default_rng(0)} | kwargs
    with pytest.raises(ValueError, match=message):
        plan_token_roots(np.zeros((3, 17)), arguments.pop("tokens"), arguments.pop("budget"), **arguments)
    with pytest.raises(ValueError, match="whole tokens"):
        allocate_token_roots_exact(np.zeros((3, 17)), 100, 50, cost=np.full(3, 10.5))
    with pytest.raises(ValueError, match="pool is empty"):
        plan_token_roots(np.zeros((0, 17)), 100, 50, cost=[], rng=np.random.default_rng(0))
