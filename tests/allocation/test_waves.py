"""Sequential allocation: what further rollouts are worth, and how they are spent, against enumeration and exact programs."""

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
from bit_env import DepthPredictor
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import batches, drive, shape, small_world

from allocation import TraceAllocator, TraceConfig, Tree
from allocation.arena.worlds import replay
from allocation.contrast import ROOT_VALUES, power_moments, root_value
from allocation.methods.oracle import OracleAllocator, TrueValues
from allocation.waves import allocate_more, further_contrast, further_value

M_MIN, M_MAX = 2, 8


# What further rollouts are worth.


@given(a=st.integers(1, 9), b=st.integers(1, 9), s=st.integers(0, 4), f=st.integers(0, 4), k=st.integers(0, 8))
def test_the_gain_in_contrast_is_what_counting_all_outcomes_gives(a, b, s, f, k):
    if s + f == 0:
        s = 1
    stays = Fraction(0)
    for outcomes in product((0, 1), repeat=k):
        chance, x, y = Fraction(1), a, b
        for r in outcomes:
            chance *= Fraction(x if r else y, x + y)
            x, y = x + r, y + 1 - r
        mixed = s + sum(outcomes) > 0 and f + k - sum(outcomes) > 0
        stays += 0 if mixed else chance
    gain = float(0 if s and f else 1 - stays)
    assert further_contrast([a], [b], [s], [f], k)[0, k] == pytest.approx(gain, abs=1e-12)


def test_the_gain_in_contrast_is_what_sampling_gives():
    rng = np.random.default_rng(0)
    p = rng.beta(0.7, 3.1, size=400_000)
    drawn = rng.binomial(3, p)
    assert further_contrast([0.7], [3.1], [0], [2], 3)[0, 3] == pytest.approx((drawn > 0).mean(), abs=3e-3)
    assert further_contrast([0.7], [3.1], [2], [0], 3)[0, 3] == pytest.approx((drawn < 3).mean(), abs=3e-3)
    plug_in = further_contrast([0.7], [3.1], [2], [0], 3, step=0.0)[0]
    np.testing.assert_allclose(plug_in, 1 - (0.7 / 3.8) ** np.arange(4), atol=1e-12)


def before(name, rho):
    """A value function and a belief that its own law of outcomes agrees with."""
    value = root_value(name, rho=rho) if name == "beta_binomial" else root_value(name)
    sharp = 1e9 if name in ("plug_in", "knapsack") else 1.0
    return value, sharp


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["plug_in", "posterior", "beta_binomial", "knapsack", "uniform"]),
    a=st.floats(0.1, 5),
    b=st.floats(0.1, 5),
    rho=st.floats(0, 0.9),
    m=st.integers(2, 6),
)
def test_two_waves_are_worth_on_average_what_one_is(name, a, b, rho, m):
    """The law of total expectation: f(m + k) = f(m) + E[gain of k more | outcomes of the first m]."""
    value, sharp = before(name, rho)
    alpha, beta, step = a * sharp, b * sharp, {"posterior": 1.0, "beta_binomial": rho / (1 - rho)}.get(name, 0.0)
    law = (0.5, 0.5) if name == "uniform" else (alpha, beta)
    if name == "beta_binomial":
        law = (a / (a + b), b / (a + b))
    f = value.table([alpha], [beta], 12)[0]
    expected = np.zeros(13)
    for s in range(m + 1):
        ups = power_moments([law[0]], [law[1]], s, step=step)[0, s]
        total = np.prod([(law[1] + j * step) / (sum(law) + (s + j) * step) for j in range(m - s)])
        expected += comb(m, s) * ups * total * further_value(value, [alpha], [beta], [s], [m - s], 12)[0]
    np.testing.assert_allclose(f[m:], f[m] + expected[: 13 - m], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(ROOT_VALUES)), st.floats(0.1, 50), st.floats(0.1, 50), st.integers(0, 4), st.integers(0, 4)
)
def test_further_worth_starts_at_zero_and_its_increments_fall(name, a, b, s, f):
    f = max(f, 2 - s)
    table = further_value(ROOT_VALUES[name], [a], [b], [s], [f], M_MAX)[0]
    increments = np.diff(table)
    assert table.shape == (M_MAX + 1,) and table[0] == 0
    assert (increments >= -1e-15).all() and (np.diff(increments) <= 1e-12).all()
    if name in ("pcl", "signal", "vip"):
        later, m = ROOT_VALUES[name].table([a + s], [b + f], M_MAX)[0], s + f
        np.testing.assert_allclose(table[: M_MAX - m + 1], later[m:] - later[m], atol=1e-15)


@pytest.mark.parametrize(
    ("s", "f", "message"),
    [([0], [0], "every group needs outcomes"), ([-1], [2], "every group needs outcomes"), ([1, 1], [1], "outcomes")],
)
def test_groups_without_outcomes_are_refused(s, f, message):
    with pytest.raises(ValueError, match=message):
        further_contrast([1.0], [1.0], s, f, 3)


# How a wave is spent.


@st.composite
def waves(draw, prompts=6, largest=10):
    """Tables, counts and a budget as a second wave meets them: some prompts are opened, some are not."""
    n, seed = draw(st.integers(1, prompts)), draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    value = ROOT_VALUES[draw(st.sampled_from(["plug_in", "posterior", "signal", "vip", "uniform", "knapsack"]))]
    v, kappa = rng.beta(0.6, 0.6, n) * 0.998 + 1e-3, 10 ** rng.uniform(-0.5, 2, n)
    alpha, beta = kappa * v, kappa * (1 - v)
    counts = np.where(rng.random(n) < 0.6, rng.integers(M_MIN, M_MAX + 1, n), 0)
    s = rng.binomial(counts, v)
    table, opened = value.table(alpha, beta, M_MAX), counts > 0
    table[opened] = further_value(value, alpha[opened], beta[opened], s[opened], (counts - s)[opened], M_MAX)
    return table, counts, draw(st.integers(1, largest)), rng


def worth(table, more):
    return float(table[np.arange(len(more)), more].sum())


def options(count):
    return range(M_MAX - count + 1) if count else [0, *range(M_MIN, M_MAX + 1)]


def best(table, counts, budget):
    """What can be spent of a budget, and its greatest worth: states are tried one by one, prompt by prompt."""
    states = {0: 0.0}
    for row, count in zip(table, counts, strict=True):
        following: dict[int, float] = {}
        for spent, value in states.items():
            for k in options(count):
                if spent + k <= budget:
                    following[spent + k] = max(following.get(spent + k, -1.0), value + row[k])
        states = following
    most = max(states)
    return most, states[most]


@settings(max_examples=150, deadline=None)
@given(waves())
def test_a_wave_is_spent_as_well_as_can_be(wave):
    table, counts, budget, rng = wave
    more = allocate_more(table, counts, budget, m_min=M_MIN, m_max=M_MAX, rng=rng)
    most, value = best(table, counts, budget)
    assert more.sum() == most and all(k in options(c) for k, c in zip(more, counts, strict=True))
    assert worth(table, more) >= value * (1 - 1e-6) - 1e-12


@settings(max_examples=60, deadline=None)
@given(waves(prompts=120, largest=200))
def test_beyond_the_reach_of_the_program_hardly_anything_is_lost(wave):
    table, counts, budget, rng = wave
    more = allocate_more(table, counts, budget, m_min=M_MIN, m_max=M_MAX, rng=rng, exact_limit=0)
    most, value = best(table, counts, budget)
    assert more.sum() == most and all(k in options(c) for k, c in zip(more, counts, strict=True))
    assert worth(table, more) >= 0.999 * value - 1e-12


@settings(max_examples=60, deadline=None)
@given(waves(prompts=30, largest=60), st.integers(0, 2**32), st.sampled_from([0, 10**7]))
def test_the_order_of_the_prompts_does_not_matter(wave, seed, limit):
    table, counts, budget, _ = wave
    order = np.random.default_rng(seed).permutation(len(counts))
    found = [
        worth(t, allocate_more(t, c, budget, m_min=M_MIN, m_max=M_MAX, rng=np.random.default_rng(1), exact_limit=limit))
        for t, c in ((table, counts), (table[order], counts[order]))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3 if limit == 0 else 1e-6, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(waves(prompts=30, largest=60), st.floats(0, 400))
def test_tokens_are_never_overspent_and_nothing_that_fits_is_left(wave, tokens):
    table, counts, budget, rng = wave
    cost = rng.uniform(1, 10, len(counts))
    more = allocate_more(table, counts, budget, m_min=M_MIN, m_max=M_MAX, rng=rng, cost=cost, tokens=tokens)
    assert cost @ more <= tokens * (1 + 1e-6) and more.sum() <= budget
    assert all(k in options(c) for k, c in zip(more, counts, strict=True))
    left, total = tokens - cost @ more, counts + more
    size = np.where(total == 0, M_MIN, 1)
    fits = (total + size <= M_MAX) & (size * cost < left) & (size <= budget - more.sum())
    assert not fits.any()


def test_costs_divide_the_gain():
    table = np.tile(further_contrast([1.0], [3.0], [0], [2], M_MAX), (2, 1))
    more = allocate_more(table, [2, 2], 6, m_min=2, m_max=8, rng=np.random.default_rng(0), cost=[1.0, 50.0])
    assert more.tolist() == [6, 0]


def test_what_is_worth_nothing_is_dealt_out_evenly_and_ties_by_the_generator():
    args = {"m_min": 2, "m_max": 8}
    more = allocate_more(np.zeros((4, 9)), [2, 2, 2, 2], 8, rng=np.random.default_rng(0), **args)
    assert more.tolist() == [2, 2, 2, 2]
    who = {
        int(allocate_more(np.zeros((4, 9)), [2] * 4, 1, rng=np.random.default_rng(s), **args).argmax())
        for s in range(60)
    }
    assert who == {0, 1, 2, 3}


def test_malformed_waves_are_named():
    args = {"m_min": 2, "m_max": 8, "rng": np.random.default_rng(0)}
    with pytest.raises(ValueError, match="counts must hold the rollouts so far of each of 2 prompts"):
        allocate_more(np.zeros((2, 9)), [2], 1, **args)
    with pytest.raises(ValueError, match="needs `cost`"):
        allocate_more(np.zeros((2, 9)), [2, 2], 1, tokens=5.0, **args)
    with pytest.raises(ValueError, match=r"table\[1\] holds a value that is not finite"):
        allocate_more(np.full((2, 9), [[0.0], [np.nan]]), [2, 2], 1, **args)


# In a method.


def oracle(world, **config):
    return OracleAllocator(TrueValues(world.value), TraceConfig(**({"explore": 0.0, "prefix_mode": "none"} | config)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(sorted(ROOT_VALUES)),
    st.sampled_from(["greedy", "exact"]),
    st.integers(8, 90),
    st.integers(0, 2**32),
)
def test_root_waves_keep_bounds_and_budget_whatever_is_finished_first(waves, prefix_waves, value, solver, budget, seed):
    world = small_world("balanced")
    forests = []
    for slots in (1, 7):
        method = oracle(
            world,
            root_waves=waves,
            prefix_waves=prefix_waves,
            root_value=value,
            solver=solver,
            prefix_mode="flip",
            continuations=1.0,
        )
        forest, _ = drive(world, method, budget, np.random.default_rng(seed), slots, np.random.default_rng(0))
        assert sum(tree.num_rollouts for tree in forest) + forest.ledger.unspent == budget
        assert all(4 <= len(tree.root.children) <= 16 for tree in forest)
        assert 1 <= forest.ledger.root_waves <= waves
        forests.append(shape(forest))
    assert forests[0] == forests[1]


@pytest.mark.parametrize("waves", [1, 3])
def test_who_stops_on_outcomes_says_so(waves):
    world = small_world("balanced")
    method = oracle(world, root_waves=waves)
    assert method.stops_on_outcomes == (waves > 1)
    forest = replay(world, method, 96, np.random.default_rng(0))
    assert forest.ledger.root_waves == waves and (forest.ledger.outcome_stops > 0) == (waves > 1)


def test_a_mixed_group_does_not_grow_while_another_is_not_mixed():
    trees = [Tree(f"t{i}", i, "prompt") for i in range(2)]
    for tree, outcomes in zip(trees, ([1, 0, 1, 0], [0, 0, 0, 0]), strict=True):
        for number, correct in enumerate(outcomes):
            tree.add(tree.root, number, "root", terminated=True).is_correct = bool(correct)
    method = TraceAllocator(DepthPredictor(), TraceConfig(root_waves=2, explore=0.0))
    assert method.allocate_roots(trees, 6, np.random.default_rng(0), wave=1).tolist() == [0, 6]
    assert method.allocate_roots(trees, 6, np.random.default_rng(0), wave=2).tolist() == [0, 0]


def test_waves_find_more_contrast_than_one_plan():
    world = small_world("balanced", prompts=60)
    ratio = {}
    for waves in (1, 4):
        method = oracle(world, root_waves=waves, pool_factor=1.0)
        forests = [replay(world, method, 64, np.random.default_rng(seed)) for seed in range(40)]
        ratio[waves] = np.mean([sum(min(t.outcome_counts("root")) > 0 for t in f) for f in forests])
    assert ratio[4] > ratio[1] + 1.0


def tree_of_chains(outcomes, depth=3):
    tree = Tree("q", 0, "prompt", {"max_turns": depth})
    for number, correct in enumerate(outcomes):
        node = tree.root
        for turn in range(depth):
            node = tree.add(node, number, "root", terminated=turn == depth - 1)
        node.is_correct = bool(correct)
    return tree


def continue_from(tree, node, rollout, correct):
    node = tree.nodes[node]
    while not node.terminal:
        node = tree.add(node, rollout, "continuation", terminated=node.depth == 2)
    node.is_correct = bool(correct)


@pytest.mark.parametrize("belief", ["plug_in", "posterior"])
def test_a_prefix_that_has_flipped_gets_no_more_while_others_have_not(belief):
    config = TraceConfig(prefix_waves=3, prefix_belief=belief, kappa=4.0)
    method = TraceAllocator(DepthPredictor(), config)
    tree = tree_of_chains([True, True])
    first = method.allocate_prefixes(tree, 6, np.random.default_rng(0), 0)
    assert sum(k for _, k in first) == 2
    flipped = tree.nodes[1]  # of the first rollout, at depth 1
    continue_from(tree, flipped.id, 2, correct=False)
    assert {i for i, _ in method.allocate_prefixes(tree, 4, np.random.default_rng(0), 1)}.isdisjoint({flipped.id})


def test_prefixes_learn_from_the_continuations_below_them():
    method = TraceAllocator(DepthPredictor(), TraceConfig(prefix_waves=2, prefix_belief="posterior", kappa=2.0))
    tree = tree_of_chains([True, True])
    for number in range(2, 8):
        continue_from(tree, 1, number, correct=True)  # always as before: it will hardly flip now
    fresh = dict(method.allocate_prefixes(tree_of_chains([True, True]), 4, np.random.default_rng(0), 1))
    assert fresh[1] > 0 and 1 not in dict(method.allocate_prefixes(tree, 4, np.random.default_rng(0), 1))


def test_caps_hold_over_the_waves_together():
    world = small_world("balanced", turns=(3, 5))
    for waves in (1, 3):
        method = oracle(
            world, prefix_mode="flip", continuations=2.0, cap_per_rollout=2, prefix_waves=waves, explore=0.1
        )
        for forest in batches(world, method, 60, 4):
            assert forest.ledger.prefix_waves <= waves
            for tree in forest:
                spent = {}
                for node in tree.nodes[1:]:
                    parent = tree.nodes[node.parent]
                    if node.origin == "continuation" and parent.rollout != node.rollout:
                        spent[parent.rollout] = spent.get(parent.rollout, 0) + 1
                assert max(spent.values(), default=0) <= 2
