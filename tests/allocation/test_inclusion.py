import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.contrast import ROOT_VALUES
from allocation.inclusion import inclusion_probabilities, inclusion_weights, weight_report
from allocation.roots import plan_roots

V = np.array([0.5, 0.5, 0.4, 0.02, 0.02, 0.9])
TABLE = ROOT_VALUES["plug_in"].table(V, 1 - V, 4)
BOUNDS = {"m_min": 2, "m_max": 4}


def enumerate_plans(budget, explore, last_sampled=None):
    """Every draw of `plan_roots`, with its probability; returns the exact inclusion probabilities and the plans."""
    n = len(TABLE)
    share = explore * budget / BOUNDS["m_min"]
    plans = []
    for up, chance in ((0.0, share - int(share)), (1.0, 1 - share + int(share))):
        bundles = min(int(share) + (up == 0.0), n, budget // BOUNDS["m_min"])
        sets = list(itertools.combinations(range(n), bundles))
        orders = list(itertools.permutations(range(n)))
        for explored, order in itertools.product(sets, orders):
            fixed = SimpleNamespace(
                random=lambda up=up: up,
                choice=lambda n, size, replace, explored=explored: np.array(explored, dtype=np.int64),
                permutation=lambda n, order=order: np.array(order),
            )
            plan = plan_roots(TABLE, budget, explore=explore, last_sampled=last_sampled, rng=fixed, **BOUNDS)
            plans.append((chance / len(sets) / len(orders), plan))
    return sum(p * (plan.counts > 0) for p, plan in plans), plans


@pytest.fixture(scope="module")
def exact():
    return enumerate_plans(7, 0.4)


def plan(rng):
    return plan_roots(TABLE, 7, explore=0.4, rng=rng, **BOUNDS)


def test_probabilities_are_those_of_all_draws(exact):
    probability, plans = exact
    assert sum(p for p, _ in plans) == pytest.approx(1.0)
    estimate = inclusion_probabilities(plan, 4000, np.random.default_rng(0))
    np.testing.assert_allclose(estimate, probability, atol=0.03)  # at most four standard errors
    assert estimate.sum() == pytest.approx(probability.sum(), abs=0.03)


def test_the_chance_to_be_explored_is_that_of_all_draws(exact):
    _, plans = exact
    explored = sum(p * q.explored for p, q in plans)
    np.testing.assert_allclose(explored, plans[0][1].explore_chance)


def test_prompts_drawn_in_proportion_have_the_probabilities_that_they_are_opened_with():
    def proportional(rng):
        return plan_roots(TABLE, 7, explore=0.4, choice="proportional", rng=rng, **BOUNDS)

    estimate = inclusion_probabilities(proportional, 2000, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    opened = np.mean([proportional(rng).counts > 0 for _ in range(2000)], axis=0)
    np.testing.assert_allclose(estimate, opened, atol=0.06)  # four standard errors of the difference
    assert 0.1 < estimate[3] < estimate[5] < estimate[2]  # p = 0.02, 0.9 and 0.4: off the margin, but not out of reach


def test_without_exploration_probabilities_are_one_zero_and_ties():
    table = ROOT_VALUES["plug_in"].table([0.5, 0.01, 0.3, 0.3], [0.5, 0.99, 0.7, 0.7], 2)

    def no_exploration(rng):
        return plan_roots(table, 4, m_min=2, m_max=2, explore=0.0, rng=rng)

    estimate = inclusion_probabilities(no_exploration, 1000, np.random.default_rng(0))
    assert estimate[0] == 1.0 and estimate[1] == 0.0
    assert estimate[2] == pytest.approx(0.5, abs=0.07) and estimate[3] == pytest.approx(0.5, abs=0.07)
    # The one that was sampled longer ago wins every tie.
    aged = inclusion_probabilities(
        lambda rng: plan_roots(table, 4, m_min=2, m_max=2, explore=0.0, last_sampled=[0, 0, 9, 3], rng=rng),
        10,
        np.random.default_rng(0),
    )
    np.testing.assert_array_equal(aged, [1, 0, 0, 1])


def test_the_weighted_mean_is_that_of_the_pool_over_all_draws(exact):
    probability, plans = exact
    losses = np.array([3.0, -1.0, 0.5, 7.0, 2.0, -4.0])
    mean, plain = 0.0, 0.0
    for p, one in plans:
        opened = one.counts > 0
        weights = inclusion_weights(probability, opened)
        mean += p * (weights * losses)[opened].mean()
        plain += p * losses[opened].mean()
    assert mean == pytest.approx(losses.mean())
    assert abs(plain - losses.mean()) > 0.1  # and without weights it is another mean


def test_the_weighted_mean_over_sampled_plans_and_estimated_probabilities():
    losses = np.array([3.0, -1.0, 0.5, 7.0, 2.0, -4.0])
    rng = np.random.default_rng(1)
    means = []
    for _ in range(400):
        opened = plan(rng).counts > 0
        weights = inclusion_weights(inclusion_probabilities(plan, 30, rng), opened)
        means.append((weights * losses)[opened].mean())
    assert np.mean(means) == pytest.approx(losses.mean(), abs=4 * np.std(means) / 20)


def test_the_number_of_rollouts_is_no_weight(exact):
    _, plans = exact
    grown = next(one for _, one in plans if len(set(one.counts[one.counts > 0])) > 1)
    opened = grown.counts > 0
    even = inclusion_weights(np.full(6, 0.5), opened)
    assert set(even[opened]) == {opened.sum() / 3} and not even[~opened].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(0.1, 10))
def test_clipped_weights_have_mean_one_and_keep_their_order(seed, n, clip):
    rng = np.random.default_rng(seed)
    probability = rng.uniform(0.01, 1, n)
    opened = rng.random(n) < 0.5
    weights = inclusion_weights(probability, opened, reweight="clipped", clip=clip)
    assert not weights[~opened].any()
    if opened.any():
        assert weights[opened].mean() == pytest.approx(1.0)
        order = np.argsort(probability[opened])
        assert (np.diff(weights[opened][order]) <= 1e-12).all()
        raw = inclusion_weights(probability, opened)[opened]
        ratio = weights[opened].max() / weights[opened].min()
        assert ratio == pytest.approx(min(raw.max(), clip) / min(raw.min(), clip))
    np.testing.assert_array_equal(inclusion_weights(probability, opened, reweight="none"), opened)


def test_the_report_is_kishs():
    assert weight_report(np.ones(7)) == {"reweight/max_weight": 1.0, "reweight/effective_prompts": pytest.approx(7.0)}
    assert weight_report(np.array([1.0, 0, 0, 3])) == {
        "reweight/max_weight": 3.0,
        "reweight/effective_prompts": pytest.approx(1.6),
    }
    assert weight_report(np.zeros(3)) == weight_report(np.zeros(0)) == {}


def test_what_cannot_be_weighted_says_what_to_change():
    with pytest.raises(ValueError, match="set explore above 0"):
        inclusion_weights(np.array([0.0, 1.0]), np.array([True, True]))
    with pytest.raises(ValueError, match="unknown reweight 'x'; known: none, clipped, ips"):
        inclusion_weights(np.ones(1), np.ones(1, dtype=bool), reweight="x")
    with pytest.raises(ValueError, match="clip must be positive"):
        inclusion_weights(np.ones(1), np.ones(1, dtype=bool), clip=0.0)
    with pytest.raises(ValueError, match="at least 1 draw"):
        inclusion_probabilities(plan, 0, np.random.default_rng(0))
