"""DAPO, Reinforce-Ada, PCL, MoPPS and VIP one by one, each against its rule done slowly."""

import itertools

import numpy as np
from coins import Coins, make, outcomes, play, prompts, sampled
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.advantages import estimate
from agents.aggregation import AGGREGATIONS, edge_coefficients
from allocation import Forest, make_allocator
from allocation.arena.worlds import replay
from allocation.forest_table import ForestTable
from allocation.methods.adaptive import ReinforceAdaAllocator
from allocation.methods.curriculum import MoPPSAllocator, least_variance
from allocation.roots import allocate_roots_exact

seeds = st.integers(0, 2**32 - 1)
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=30)

# DAPO.


@settings(max_examples=60, deadline=None)
@given(probabilities, st.integers(1, 9), st.floats(0.01, 1), st.integers(1, 150), seeds)
def test_dapo_refills_until_the_target_is_reached(heads, group_size, share, budget, seed):
    forest = play("dapo", heads, budget, seed, group_size=group_size, target_share=share)
    groups = min(len(heads), max(1, budget // group_size))
    mixed = [len(set(outcomes(t))) == 2 for t in forest]
    target = int(np.ceil(share * groups - 1e-9))
    # Never beyond the target, and short of it only when everything is spent.
    assert sum(mixed) <= target and (sum(mixed) == target or not forest.ledger.unspent)
    assert np.ptp([len(t.leaves()) for t in forest]) <= 1
    assert (len(forest) == groups) == (not forest.ledger.unspent)
    # Each wave draws what is lacking, so the waves can be read off the order of the trees.
    waves, at = 0, 0
    while at < len(forest):
        lacking = target - sum(mixed[:at])
        assert lacking > 0
        at, waves = min(at + lacking, groups), waves + 1
    assert at == len(forest) and waves == forest.ledger.root_waves
    assert [t.loss_weight for t in forest] == [float(m) for m in mixed]
    assert forest.ledger.filtered_prompts == len(forest) - sum(mixed)


def test_dapo_samples_like_grpo_and_averages_over_the_mixed_groups_alone():
    heads = np.repeat([0.0, 0.5, 1.0], 20)
    dapo = play("dapo", heads, 80)
    grpo = replay(Coins(heads), make_allocator("grpo"), 80, np.random.default_rng(0))
    assert {len(t.leaves()) for t in dapo} == {len(t.leaves()) for t in grpo} == {8} and len(dapo) == len(grpo) == 10
    kept = Forest([t for t in dapo if t.loss_weight])
    assert 0 < len(kept) < 10
    everything, some = ForestTable.of(dapo), ForestTable.of(kept)
    for aggregation in AGGREGATIONS:
        of_all = edge_coefficients(everything, estimate(everything, "grpo"), aggregation)
        of_kept = iter(some.per_tree(edge_coefficients(some, estimate(some, "grpo"), aggregation)))
        for tree, coefficients in zip(dapo, everything.per_tree(of_all), strict=True):
            expected = next(of_kept) if tree.loss_weight else np.zeros(len(coefficients))
            assert np.allclose(coefficients, expected)


# Reinforce-Ada.


def rounds_by_hand(heads, budget, variant, enough, per_round, max_rounds):
    """How many rollouts each of a fixed set of prompts gets, outcome by outcome; `heads` says the outcomes beforehand."""
    given_to = [0] * len(heads)
    active = list(range(len(heads)))
    while active and budget >= per_round * len(active):
        for i in active:
            given_to[i] += per_round
            budget -= per_round
        stay = []
        for i in active:
            shown = heads[i][: given_to[i]]
            good, bad = sum(shown), len(shown) - sum(shown)
            full = good >= enough and (variant == "positive" or bad >= enough)
            if not full and given_to[i] < per_round * max_rounds:
                stay.append(i)
        active = stay
    return given_to, budget, active


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from(["balanced", "positive"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.data(),
)
def test_prompts_stay_until_they_have_shown_enough(n, variant, enough, per_round, max_rounds, data):
    fates = [data.draw(st.lists(st.booleans(), min_size=16, max_size=16)) for _ in range(n)]
    budget = data.draw(st.integers(n * per_round, 100))
    left = min(budget, n * per_round * max_rounds)
    # A group size with which all prompts are opened at the start; then there is nobody to start again with.
    allocator = ReinforceAdaAllocator(left // n, variant, enough, per_round, max_rounds)
    assert allocator.root_capacity(n, budget) == left
    trees, wave = prompts(n), 0
    expected, rest, active = rounds_by_hand(fates, left, variant, enough, per_round, max_rounds)
    rng = np.random.default_rng(0)
    while left:
        counts = allocator.allocate_roots(trees, left, rng, wave)
        last = left < per_round * sum(allocator._active(t) for t in trees)
        if not counts.sum() or last:
            assert last == bool(active) and sum(counts) == (left if last else 0)
            assert not last or all(i in active for i in np.flatnonzero(counts))
            break
        for i, (tree, count) in enumerate(zip(trees, counts.tolist(), strict=True)):
            sampled(tree, fates[i][tree.num_rollouts : tree.num_rollouts + count])
        left -= int(counts.sum())
        wave += 1
    assert left == rest and [t.num_rollouts for t in trees] == expected


def test_hard_prompts_get_more_than_easy_ones_and_new_ones_come_in():
    forest = play("reinforce_ada", [*[0.5] * 160, *[0.0] * 40], 400, variant="positive", enough=1)
    first = [(int(t.key) < 160, len(t.leaves())) for t in forest.trees[:50]]
    # 6 % of the coins show no head in four throws.
    assert {n for coin, n in first if not coin} == {16} and np.mean([n == 4 for coin, n in first if coin]) > 0.8
    assert forest.ledger.root_waves > 4 and len(forest) > 50 and not forest.ledger.unspent


def test_who_has_the_last_rollouts_of_a_round_is_drawn():
    allocator = ReinforceAdaAllocator(4, per_round=2)
    found = set()
    for seed in range(60):
        trees = [sampled(tree, [0, 0]) for tree in prompts(5)]
        counts = allocator.allocate_roots(trees, 3, np.random.default_rng(seed), 1)
        assert sorted(counts) == [0, 0, 0, 1, 2]
        found.add(int(counts.argmax()))
    assert found == set(range(5))


# PCL and MoPPS.


@settings(max_examples=100, deadline=None)
@given(probabilities, st.integers(1, 9), st.integers(1, 150), seeds)
def test_pcl_takes_the_nearest_to_one_half(values, group_size, budget, seed):
    allocator = make("pcl", values, group_size=group_size)
    counts = allocator.allocate_roots(prompts(len(values)), budget, np.random.default_rng(seed))
    k = min(len(values), max(1, budget // group_size))
    distance = np.abs(np.array(values) - 0.5)
    assert (counts > 0).sum() == k and counts.sum() == budget and np.ptp(counts[counts > 0]) <= 1
    assert distance[counts > 0].max() <= distance[counts == 0].min(initial=1) + 1e-11


def test_pcl_does_not_tell_a_prompt_at_03_from_one_at_07():
    assert abs(0.3 - 0.5) != abs(0.7 - 0.5), "as computed"
    first = [
        make("pcl", [0.3, 0.7], group_size=4).allocate_roots(prompts(2), 4, np.random.default_rng(s)) for s in range(99)
    ]
    assert 25 < sum(int(c[0] > 0) for c in first) < 75


def test_pools_are_some_times_as_large_as_what_is_chosen():
    for name in ("pcl", "mopps"):
        assert make(name).pool_size(128) == 64 and make(name, pool_factor=1.0).pool_size(128) == 16
        assert make(name).pool_size(3) == 4
    assert make("vip").pool_size(128) == make("dapo").pool_size(128) == 16
    assert make("reinforce_ada").pool_size(128) == 32


def test_the_posteriors_of_mopps_by_hand():
    allocator = MoPPSAllocator(decay=0.25, prior=(2.0, 3.0))
    forest = Forest([sampled(prompts(2)[0], [1, 1, 0, 0, 0]), sampled(prompts(2)[1], [0, 0])])
    assert allocator.update(forest) == {"mopps/prompts": 2.0}
    assert allocator.posterior == {"0": (4.0, 6.0), "1": (2.0, 5.0)}
    allocator.update(Forest([sampled(prompts(1)[0], [1])]))
    assert allocator.posterior == {"0": (0.25 * 4 + 0.75 * 2 + 1, 0.25 * 6 + 0.75 * 3), "1": (2.0, 5.0)}
    # Two trees of one prompt are one batch of outcomes: it decays once.
    allocator.update(Forest([sampled(prompts(1)[0], [1]), sampled(prompts(1)[0], [0])]))
    assert allocator.posterior["0"] == (0.25 * 3.5 + 1.5 + 1, 0.25 * 3.75 + 2.25 + 1)


def test_thompson_sampling_finds_the_middle_and_keeps_looking_elsewhere():
    heads = np.concatenate([np.full(20, 0.5), np.zeros(20), np.ones(20)])
    allocator, share = MoPPSAllocator(decay=1.0), []
    for seed in range(60):
        forest = replay(Coins(heads), allocator, 80, np.random.default_rng(seed))
        share.append(np.mean([int(t.key) < 20 for t in forest]))
        allocator.update(forest)
    # A third by chance at first; of 40 candidates 13 are coins in the end, and 10 are chosen.
    assert np.mean(share[:3]) < 0.6 and np.mean(share[-20:]) > 0.85
    assert len(allocator.posterior) == 60


def test_the_chance_of_being_chosen_is_that_of_the_nearest_draw():
    allocator = MoPPSAllocator(group_size=4, target=0.3)
    allocator.posterior = {"0": (2.0, 5.0), "1": (4.0, 1.0)}
    mine = np.mean([allocator.allocate_roots(prompts(2), 4, np.random.default_rng(s))[0] > 0 for s in range(2000)])
    rng = np.random.default_rng(1)
    obvious = np.mean(np.abs(rng.beta(2, 5, 10**5) - 0.3) < np.abs(rng.beta(4, 1, 10**5) - 0.3))
    assert abs(mine - obvious) < 0.04  # five standard deviations of 0.008


# VIP.


def variance(values, counts):
    v = np.clip(values, 1e-3, 1 - 1e-3)
    return float(np.sum(v * (1 - v) / (np.asarray(counts) - 1)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(2, 4), st.integers(0, 5), st.data())
def test_vip_is_exact_against_all_divisions(values, lower, room, data):
    n, upper = len(values), lower + room
    budget = data.draw(st.integers(n * lower, n * upper))
    counts = least_variance(np.array(values), budget, lower, upper, np.random.default_rng(0))
    assert counts.sum() == budget and counts.min() >= lower and counts.max() <= upper
    feasible = (m for m in itertools.product(range(lower, upper + 1), repeat=n) if sum(m) == budget)
    best = min(variance(values, m) for m in feasible)
    assert variance(values, counts) <= best * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 0.99), min_size=5, max_size=20), st.integers(0, 200), seeds)
def test_vip_is_exact_against_the_dynamic_program(values, extra, seed):
    v = np.array(values)
    budget = min(4 * len(v) + extra, 16 * len(v))
    counts = least_variance(v, budget, 4, 16, np.random.default_rng(seed))
    table = -(v * (1 - v))[:, None] / np.maximum(np.arange(17) - 1.0, 0.5)
    program = allocate_roots_exact(table, budget, m_min=4, m_max=16, opened=np.ones(len(v), dtype=bool))
    assert counts.sum() == budget and np.isclose(variance(v, counts), variance(v, program), rtol=1e-9)


def test_vip_samples_every_prompt_of_its_batch_and_the_uncertain_ones_most():
    forest = play("vip", [0.5, 0.01, 0.99, 0.5, 0.2, 0.8], 48)
    counts = {t.key: len(t.leaves()) for t in forest}
    assert len(forest) == 6 and counts["1"] == counts["2"] == 4
    assert counts["0"] > counts["4"] > 4 and abs(counts["0"] - counts["3"]) <= 1 and abs(counts["4"] - counts["5"]) <= 1


def test_who_of_equals_gets_one_more_is_drawn():
    counts = [least_variance(np.full(5, 0.3), 11, 2, 4, np.random.default_rng(seed)) for seed in range(60)]
    assert all(sorted(c) == [2, 2, 2, 2, 3] for c in counts) and {int(c.argmax()) for c in counts} == set(range(5))
