import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.contrast import ROOT_VALUES
from allocation.roots import allocate_roots, allocate_roots_exact, draw_prompts, plan_roots, root_objective


@st.composite
def instances(draw, n_max=60, budget_max=300):
    """A table, a feasible budget and its bounds."""
    n = draw(st.integers(1, n_max))
    m_min = draw(st.integers(2, 6))
    m_max = draw(st.integers(m_min, m_min + 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        alpha, beta = rng.uniform(0.05, 10, (2, n))
    else:  # a skewed pool with many ties, where most prompts are easy or hopeless
        v = rng.choice([0.01, 0.3, 0.5, 0.95], n)
        alpha, beta = 8 * v, 8 * (1 - v)
    table = ROOT_VALUES[draw(st.sampled_from(sorted(ROOT_VALUES)))].table(alpha, beta, m_max)
    opened = draw(st.integers(1, n))
    budget = draw(st.integers(opened * m_min, min(opened * m_max, max(budget_max, opened * m_min))))
    return table, budget, m_min, m_max


def check(counts, budget, m_min, m_max):
    assert counts.sum() == budget
    assert ((counts == 0) | ((counts >= m_min) & (counts <= m_max))).all()


@settings(max_examples=200, deadline=None)
@given(instances(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_objective_budget_and_bounds_against_the_dynamic_program(instance, explore, seed):
    table, budget, m_min, m_max = instance
    plan = plan_roots(table, budget, m_min=m_min, m_max=m_max, explore=explore, rng=np.random.default_rng(seed))
    check(plan.counts, budget, m_min, m_max)
    assert (plan.counts[plan.explored] >= m_min).all()
    best = allocate_roots_exact(table, budget, m_min=m_min, m_max=m_max, opened=plan.explored)
    check(best, budget, m_min, m_max)
    assert root_objective(table, plan.counts) >= 0.999 * root_objective(table, best)


@settings(max_examples=60, deadline=None)
@given(instances(n_max=4, budget_max=16))
def test_the_dynamic_program_equals_enumeration(instance):
    table, budget, m_min, m_max = instance
    choices = [0, *range(m_min, min(m_max, budget) + 1)]
    feasible = [c for c in itertools.product(choices, repeat=len(table)) if sum(c) == budget]
    best = max(root_objective(table, c) for c in feasible)
    exact = allocate_roots_exact(table, budget, m_min=m_min, m_max=m_max)
    assert root_objective(table, exact) == pytest.approx(best, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(0, 2**32))
def test_permuting_distinct_prompts_permutes_the_allocation(n, seed):
    rng = np.random.default_rng(seed)
    v = 0.5 * (np.arange(n) + rng.uniform(0.2, 0.8, n)) / n  # distinct, and on one side of one half
    table = ROOT_VALUES["plug_in"].table(v, 1 - v, 12)
    budget = int(rng.integers(2, 4 * n))
    order = rng.permutation(n)
    kwargs = {"m_min": 2, "m_max": 12, "explore": 0.0}
    plain = allocate_roots(table, budget, rng=np.random.default_rng(1), **kwargs)
    permuted = allocate_roots(table[order], budget, rng=np.random.default_rng(2), **kwargs)
    np.testing.assert_array_equal(plain[order], permuted)


@pytest.mark.parametrize("name", ["plug_in", "pcl", "uniform"])
def test_equal_prompts_are_opened_equally_often(name):
    table = ROOT_VALUES[name].table(np.full(40, 2.0), np.full(40, 2.0), 16)
    # 42 leaves a remainder, so that the exact core is involved as well.
    runs = [allocate_roots(table, 42, rng=np.random.default_rng(seed)) for seed in range(600)]
    opened = np.sum([run > 0 for run in runs], axis=0)
    # 10 of 40 a run: 150 expected, standard deviation 10.6.
    assert opened.min() > 150 - 45 and opened.max() < 150 + 45


def test_ties_go_to_the_least_recently_sampled():
    table = ROOT_VALUES["plug_in"].table(np.full(8, 1.0), np.full(8, 1.0), 16)
    age = np.array([5, 1, 4, -1, 3, 2, 9, 8])
    counts = allocate_roots(table, 16, explore=0.0, last_sampled=age, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(np.flatnonzero(counts), [1, 3, 4, 5])


def test_values_that_differ_in_the_last_bits_are_ties():
    v = np.array([0.3, 0.7, 0.1 + 0.2, 1 - 0.3])
    table = ROOT_VALUES["plug_in"].table(v, 1 - v, 16)
    counts = allocate_roots(table, 4, explore=0.0, last_sampled=[3, 2, 0, 1], rng=np.random.default_rng(0))
    np.testing.assert_array_equal(counts, [0, 0, 4, 0])


def test_the_exploration_share_holds_on_average_and_reaches_every_prompt():
    v = np.full(20, 0.001)
    v[:4] = 0.5
    table = ROOT_VALUES["plug_in"].table(v, 1 - v, 16)
    plans = [plan_roots(table, 24, explore=0.1, rng=np.random.default_rng(seed)) for seed in range(1500)]
    explored = np.array([plan.explored for plan in plans])
    assert 4 * explored.sum(axis=1).mean() == pytest.approx(2.4, abs=0.2)
    assert explored.sum(axis=0).min() > 0.5 * 1500 * 0.6 / 20
    assert not any(plan_roots(table, 24, explore=0.0, rng=np.random.default_rng(s)).explored.any() for s in range(9))


def test_the_same_seed_gives_the_same_allocation():
    table = ROOT_VALUES["posterior"].table(np.ones(30), np.ones(30), 16)
    one, two = (allocate_roots(table, 50, rng=np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_cost_is_the_same_as_a_scaled_table():
    rng = np.random.default_rng(3)
    table = ROOT_VALUES["plug_in"].table(*rng.uniform(0.1, 5, (2, 30)), 16)
    cost = rng.uniform(100, 1000, 30)
    paid = allocate_roots(table, 66, explore=0.0, cost=cost, rng=np.random.default_rng(0))
    best = allocate_roots_exact(table / cost[:, None], 66)
    assert root_objective(table / cost[:, None], paid) >= 0.999 * root_objective(table / cost[:, None], best)


def test_pcl_opens_the_prompts_nearest_one_half_with_one_bundle_each():
    v = np.linspace(0.05, 0.93, 23)
    table = ROOT_VALUES["pcl"].table(v, 1 - v, 16)
    counts = allocate_roots(table, 20, explore=0.0, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(np.flatnonzero(counts), np.sort(np.argsort(np.abs(v - 0.5))[:5]))
    assert set(counts) == {0, 4}


@pytest.mark.parametrize("table", [np.zeros((5, 17)), np.tile(np.arange(17.0) ** 2, (5, 1))])
def test_worthless_and_convex_tables_are_still_spent_exactly(table):
    for budget in range(4, 81):
        check(allocate_roots(table, budget, rng=np.random.default_rng(budget)), budget, 4, 16)


def test_groups_of_one_need_a_value_of_their_own():
    table = ROOT_VALUES["plug_in"].table([1.0, 1.0, 2.0], [1.0, 1.0, 1.0], 8)
    with pytest.raises(ValueError, match="use m_min=2, or m_min=m_max=1"):
        allocate_roots(table, 6, m_min=1, m_max=8, rng=np.random.default_rng(0))
    singles = allocate_roots(table, 2, m_min=1, m_max=1, rng=np.random.default_rng(0))
    check(singles, 2, 1, 1)
    concave = np.sqrt(np.arange(9.0)) * np.array([[1.0], [2.0], [3.0]])
    counts = allocate_roots(concave, 14, m_min=1, m_max=8, explore=0.0, rng=np.random.default_rng(0))
    best = allocate_roots_exact(concave, 14, m_min=1, m_max=8)
    assert root_objective(concave, counts) == pytest.approx(root_objective(concave, best))


def test_curves_that_cross_are_compared_at_the_size_that_is_bought():
    # Prompt 0 is worth more at the bundle's size, prompt 1 at the budget's: 30 others keep both out of reach of luck.
    table = np.zeros((32, 9))
    table[:, 4:] = 0.1
    table[0, 4:], table[1, 4:] = 0.60, np.array([0.59, 0.68, 0.75, 0.80, 0.84])
    counts = allocate_roots(table, 7, m_max=8, explore=0.0, rng=np.random.default_rng(0))
    assert counts[1] == 7


def test_an_empty_budget_is_no_error():
    assert allocate_roots(np.zeros((3, 17)), 0, rng=np.random.default_rng(0)).tolist() == [0, 0, 0]
    assert allocate_roots(np.zeros((0, 17)), 0, rng=np.random.default_rng(0)).size == 0


@pytest.mark.parametrize(
    ("n", "budget", "kwargs", "message"),
    [
        (3, 3, {}, "smaller than one group"),
        (3, 49, {}, "lower the budget, raise m_max or widen the pool"),
        (0, 8, {}, "pool is empty"),
        (9, 7, {"m_max": 6}, "change the budget or widen"),
        (3, -1, {}, "must not be negative"),
        (3, 8, {"m_min": 5, "m_max": 4}, "m_min <= m_max"),
        (3, 8, {"explore": 1.5}, "explore"),
        (3, 8, {"cost": [1.0, 0.0, 1.0]}, r"cost\[1\]"),
        (3, 8, {"last_sampled": [1.0]}, "last_sampled"),
    ],
)
def test_what_cannot_be_spent_says_what_to_change(n, budget, kwargs, message):
    with pytest.raises(ValueError, match=message):
        allocate_roots(np.zeros((n, 17)), budget, rng=np.random.default_rng(0), **kwargs)


def test_a_table_with_nan_names_its_row():
    table = np.zeros((3, 17))
    table[2, 5] = np.nan
    with pytest.raises(ValueError, match=r"table\[2\]"):
        allocate_roots(table, 8, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="one column for each m"):
        allocate_roots(np.zeros((3, 9)), 8, rng=np.random.default_rng(0))


def drawn_one_after_the_other(weight, most):
    """Exact chance of each prompt to be among the first `most` of draws without replacement, by enumeration."""
    chance = np.zeros(len(weight))
    for sequence in itertools.permutations(range(len(weight)), most):
        p, left = 1.0, sum(weight)
        for i in sequence:
            p *= weight[i] / left
            left -= weight[i]
        chance[list(sequence)] += p
    return chance


def test_prompts_are_drawn_in_proportion_to_their_values():
    values = np.outer([1.0, 2.0, 4.0, 0.5, 0.0], [0, 0, 1.0, 1.5])
    rng, draws, kept = np.random.default_rng(0), 6000, np.zeros(5, dtype=bool)
    found = np.mean([draw_prompts(values, kept, 2, 2, rng)[:, 2] > 0 for _ in range(draws)], axis=0)
    exact = drawn_one_after_the_other([1.0, 2.0, 4.0, 0.5], 2)
    # A share of 6000 draws has a standard error of at most 0.0065.
    np.testing.assert_allclose(found, [*exact, 0.0], atol=0.026)


def test_kept_prompts_are_never_drawn_out_and_others_keep_their_values():
    values = np.outer(np.arange(1.0, 9), [0, 1.0, 1.5])
    kept = np.array([True, True, True, False, False, False, False, False])
    for most, left in ((1, 3), (5, 5), (99, 8)):
        found = draw_prompts(values, kept, most, 1, np.random.default_rng(most))
        alive = found[:, 1] > 0
        assert alive.sum() == left and alive[kept].all()
        np.testing.assert_array_equal(found[alive], values[alive])


@settings(max_examples=100, deadline=None)
@given(instances(), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 99))
def test_proportional_plans_spend_the_budget_within_the_bounds(instance, explore, seed):
    table, budget, m_min, m_max = instance
    plan = plan_roots(
        table, budget, m_min=m_min, m_max=m_max, explore=explore, choice="proportional", rng=np.random.default_rng(seed)
    )
    check(plan.counts, budget, m_min, m_max)
    assert (plan.counts[plan.explored] >= m_min).all()


def test_proportional_plans_open_half_as_good_prompts_half_as_often_and_worthless_ones_never():
    v = np.repeat([0.5, 0.8536, 0.0], 400)  # p (1 - p) is 1/4, 1/8 and 0
    table = ROOT_VALUES["vip"].table(1e6 * v + 1e-9, 1e6 * (1 - v) + 1e-9, 8)
    rng = np.random.default_rng(3)
    plans = [plan_roots(table, 160, m_min=4, m_max=8, explore=0.0, choice="proportional", rng=rng) for _ in range(30)]
    good, half, none = np.mean([(p.counts > 0).reshape(3, 400).sum(axis=1) for p in plans], axis=0)
    # 40 of 800: the pool is hardly thinned by what was drawn before. Growing prompts leave a few closed.
    assert good / half == pytest.approx(2.0, abs=0.35)
    assert none == 0 and good + half > 30


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match="unknown root_choice 'top'; known: best, proportional"):
        plan_roots(np.ones((4, 17)), 8, choice="top", rng=np.random.default_rng(0))
