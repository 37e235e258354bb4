"""DAPO, Reinforce-Ada, PCL, MoPPS and VIP: which prompts are sampled, how often, and what enters the loss."""

import itertools
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from bit_env import DepthPredictor, bit_vector, run, shape
from hooked_env import (
    Batched,
    Single,
    assert_same,
    guess,
    lock_step,
    nothing,
    path_generator,
    random_delays,
    vector,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.advantages import get_estimator
from agents.losses import edge_coefficients
from allocation import AsyncRunner, Forest, HiddenStatePredictor, Sample, Tree, TreeAllocationWrapper, make_allocator
from allocation.allocators import METHODS
from allocation.arena.worlds import replay
from allocation.methods.adaptive import DAPOAllocator, ReinforceAdaAllocator
from allocation.methods.curriculum import MoPPSAllocator, PCLAllocator, VIPAllocator, least_variance
from allocation.methods.oracle import TrueValues
from allocation.roots import allocate_roots_exact

NAMES = ("dapo", "reinforce_ada", "pcl", "mopps", "vip")
SPENDS = ("dapo", "pcl", "mopps")  # whatever the pool holds
every_method = pytest.mark.parametrize("name", NAMES)
seeds = st.integers(0, 2**32 - 1)
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def coin(number):
    """A tree whose root's hidden state says which prompt it is of."""
    tree = Tree(str(number), -1, "coin", {"max_turns": 1})
    tree.root.features = np.array([number], dtype=np.float32)
    return tree


class Coins:
    """A world of prompts that are coins: one turn, heads is a success."""

    def __init__(self, heads):
        self.heads = np.asarray(heads, dtype=float)

    def draw(self, rng, count):
        return rng.permutation(len(self.heads))[:count]

    def open(self, prompt):
        return coin(prompt)

    def roll(self, job, rng):
        correct = bool(rng.random() < self.heads[int(job.tree.key)])
        ids = np.arange(int(rng.integers(1, 9)))
        sample = Sample("", ids, -0.1 * ids.astype(np.float32), ids[:2])
        job.tree.add(
            job.node, job.rollout, job.origin, sample=sample, reward=float(correct), terminated=True, is_correct=correct
        )

    def value(self, tree, node):
        return float(node.is_correct) if node.terminal else float(self.heads[int(tree.key)])


class Known(DepthPredictor):
    """Knows the value of each prompt."""

    def __init__(self, values):
        self.values = values

    def predict(self, anchors):
        return np.array([self.values[int(a.features[0])] for a in anchors])


def prompts(n):
    return [coin(i) for i in range(n)]


def sampled(tree, outcomes):
    for correct in outcomes:
        tree.add(tree.root, tree.num_rollouts, "root", terminated=True, is_correct=bool(correct))
        tree.num_rollouts += 1
    return tree


def outcomes(tree):
    return [bool(n.is_correct) for n in sorted(tree.leaves(), key=lambda n: n.rollout)]


def make(name, values=(0.5,), **settings):
    """A method whose predictor, if it has one, knows the values."""
    match name:
        case "pcl":
            return PCLAllocator(Known(values), **settings)
        case "vip":
            return VIPAllocator(Known(values), **settings)
    return {"dapo": DAPOAllocator, "reinforce_ada": ReinforceAdaAllocator, "mopps": MoPPSAllocator}[name](**settings)


def play(name, heads, budget, seed=0, **settings):
    forest = replay(Coins(heads), make(name, heads, **settings), budget, np.random.default_rng(seed))
    assert forest.ledger.root_rollouts == sum(len(t.leaves()) for t in forest)
    assert forest.ledger.root_rollouts + forest.ledger.unspent == budget and not forest.ledger.continuations
    return forest


# What holds for all of them.


@every_method
@settings(max_examples=60, deadline=None)
@given(probabilities, st.integers(1, 9), st.integers(1, 150), seeds)
def test_the_budget_is_spent_unless_a_bound_or_the_method_says_otherwise(name, heads, group_size, budget, seed):
    forest = play(name, heads, budget, seed, group_size=group_size)
    counts = [len(t.leaves()) for t in forest]
    assert len(forest) <= len(heads) and min(counts) > 0
    if name in SPENDS:
        assert not forest.ledger.unspent and np.ptp(counts) <= 1
    elif name == "vip":
        assert forest.ledger.unspent == max(0, budget - len(heads) * 32) and max(counts) <= 32
    else:
        rounds = ReinforceAdaAllocator(group_size)
        assert max(counts) <= 4 * rounds.per_round
        if forest.ledger.unspent:
            # Only when there is nobody left: everybody was sampled, and has left.
            assert len(forest) == min(len(heads), rounds.pool_size(budget))
            assert not any(rounds._active(tree) for tree in forest)
    # All but those of the last wave, whose outcomes decided nothing any more.
    assert (forest.ledger.outcome_stops > 0) == (
        name == "reinforce_ada" and (forest.ledger.root_waves > 1 or forest.ledger.unspent > 0)
    )
    assert name == "reinforce_ada" or budget < group_size or min(counts) >= min(group_size, 4)


@every_method
def test_one_rollout_and_one_prompt(name):
    (tree,) = play(name, [0.5], 1)
    assert len(tree.leaves()) == 1
    for seed in range(20):
        counts = [len(tree.leaves()) for tree in play(name, [0.5] * 9, 5, seed)]  # less than a group
        assert counts == [5] or (name == "reinforce_ada" and counts == [4, 1])


@every_method
def test_outcomes_that_are_all_alike_stop_nothing(name):
    for heads in ([0.0] * 40, [1.0] * 40):
        forest = play(name, heads, 64)
        assert not forest.ledger.unspent
        credits = [get_estimator("grpo")(tree) for tree in forest]
        assert all(np.isfinite(c).all() for c in edge_coefficients(forest, credits, "prompt"))


@every_method
@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)), seeds)
def test_the_order_of_the_candidates_does_not_matter(name, order, seed):
    """For methods that go by what they know: the same prompts, in any order, whatever the generator says."""
    values = np.array([0.02, 0.97, 0.5, 0.45, 0.7, 0.25, 0.9, 0.08, 0.85, 0.15, 0.6, 0.01])
    found = []
    for arrangement, its_seed in ((range(12), 0), (order, seed)):
        allocator = make(name, values, group_size=4)
        trees = [prompts(12)[i] for i in arrangement]
        if name == "mopps":
            allocator.posterior = {str(i): (1e9 * v, 1e9 * (1 - v)) for i, v in enumerate(values)}
        if name == "reinforce_ada":
            trees = [sampled(t, [1] * 4 if values[int(t.key)] < 0.5 else [1, 1, 0, 0]) for t in trees]
        if name == "dapo":
            trees = [sampled(t, [1, 0, 0, 0]) if int(t.key) > 5 else t for t in trees]
        counts = allocator.allocate_roots(trees, 48 if name == "vip" else 12, np.random.default_rng(its_seed), 1)
        found.append({t.key: int(c) for t, c in zip(trees, counts, strict=True)})
        assert sum(found[-1].values()) <= 48
    if name in ("pcl", "mopps", "vip"):
        assert found[0] == found[1]
        nearest = {"2", "3", "10"}
        assert name == "vip" or {k for k, c in found[0].items() if c} == nearest
    elif name == "dapo":  # six groups lie open and mixed, so three more are bought, of the others
        assert all({int(k) for k, c in f.items() if c} < set(range(6)) and sum(f.values()) == 12 for f in found)
    else:  # 12 rollouts are six rounds of two, at prompts that have shown one outcome only
        assert all(values[int(k)] < 0.5 for f in found for k, c in f.items() if c) and sum(found[0].values()) == 12


@every_method
def test_ties_never_go_by_the_order_of_the_candidates(name):
    values = np.full(9, 0.3)
    totals = np.zeros(9)
    for seed in range(300):
        allocator = make(name, values, group_size=4)
        trees = prompts(9)
        totals += allocator.allocate_roots(trees, 13, np.random.default_rng(seed))
    # Three of nine at random, 300 times: 100 each, with a standard deviation of 8.2 groups of a little over 4.
    expected = totals.sum() / 9
    assert np.abs(totals - expected).max() < 5 * 8.2 * expected / 100


@every_method
def test_a_restored_method_goes_on_as_the_saved_one(name):
    world = Coins(np.linspace(0.05, 0.95, 60))
    saved, fresh = (make_allocator(name, predictor=HiddenStatePredictor(0, warmup_roots=8)) for _ in range(2))
    for seed in range(3):
        saved.update(replay(world, saved, 64, np.random.default_rng(seed)))
    fresh.load_state_dict(saved.state_dict())
    for seed in range(3, 6):
        one, other = (replay(world, a, 64, np.random.default_rng(seed)) for a in (saved, fresh))
        assert shape(one) == shape(other)
        assert saved.update(one) == fresh.update(other)


@pytest.mark.parametrize("name", ["pcl", "vip"])
def test_a_predictor_that_is_not_ready_or_fails_leaves_the_choice_to_chance(name, caplog):
    class Failing(DepthPredictor):
        def predict(self, anchors):
            raise ArithmeticError("no")

    kinds = {"not ready": HiddenStatePredictor(0), "failing": Failing(), "ready": Known(np.linspace(0, 1, 40))}
    opened = {kind: np.zeros(40) for kind in kinds}
    for kind, predictor in kinds.items():
        allocator = make_allocator(name, predictor=predictor, group_size=8)
        with caplog.at_level(logging.WARNING):
            for seed in range(40):
                counts = allocator.allocate_roots(prompts(40), 80, np.random.default_rng(seed))
                assert counts.sum() == 80
                assert kind == "ready" or sorted(counts[counts > 0]) == [8] * 10
                opened[kind] += counts
        assert allocator.fallbacks == (40 if kind == "failing" else 0)
    assert caplog.text.count("allocating uniformly instead") == 40
    assert (opened["not ready"] > 0).all() and (opened["failing"] > 0).all()
    middle = opened["ready"][15:25].sum() / opened["ready"].sum()
    assert middle == 1 if name == "pcl" else 0.25 < middle < 0.45


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DAPOAllocator(0), "group_size must be at least 1, got 0"),
        (lambda: DAPOAllocator(target_share=0), r"target_share must lie in \(0, 1\], got 0"),
        (lambda: ReinforceAdaAllocator(0), "group_size must be at least 1, got 0"),
        (lambda: ReinforceAdaAllocator(variant="negative"), "unknown variant 'negative'; known: balanced, positive"),
        (lambda: ReinforceAdaAllocator(enough=0), "enough must be at least 1, got 0"),
        (lambda: ReinforceAdaAllocator(per_round=0), "per_round must be at least 1, got 0"),
        (lambda: ReinforceAdaAllocator(max_rounds=0), "max_rounds must be at least 1, got 0"),
        (lambda: PCLAllocator(DepthPredictor(), 0), "group_size must be at least 1, got 0"),
        (lambda: PCLAllocator(DepthPredictor(), pool_factor=0.5), "pool_factor must be at least 1 and finite, got 0.5"),
        (lambda: MoPPSAllocator(target=1.5), r"target must lie in \[0, 1\], got 1.5"),
        (lambda: MoPPSAllocator(decay=-0.1), r"decay must lie in \[0, 1\], got -0.1"),
        (lambda: MoPPSAllocator(prior=(0.0, 1.0)), r"prior must be two finite numbers > 0, got \(0.0, 1.0\)"),
        (lambda: VIPAllocator(DepthPredictor(), lower=1), "need 2 <= lower <= upper, got lower=1, upper=32"),
        (lambda: VIPAllocator(DepthPredictor(), upper=6), "upper=6 leaves no room for an average of group_size=8"),
        (lambda: MoPPSAllocator().load_state_dict({"posterior": {"q": [1, -1]}}), "the posterior of 'q' must be two"),
        (lambda: least_variance(np.ones(2), 9, 1, 4, np.random.default_rng(0)), "2 prompts cannot take 9 rollouts"),
        (lambda: least_variance(np.ones(2), 1, 0, 4, np.random.default_rng(0)), "lower must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
        at, waves = min(at + target - sum(mixed[:at]), groups), waves + 1
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
    estimate = get_estimator("grpo")
    for aggregation in ("prompt", "trajectory", "edge", "token"):
        of_all = edge_coefficients(dapo, [estimate(t) for t in dapo], aggregation)
        of_kept = iter(edge_coefficients(kept, [estimate(t) for t in kept], aggregation))
        for tree, coefficients in zip(dapo, of_all, strict=True):
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


# Through the drivers.


@every_method
def test_through_the_wrapper_batch_after_batch(name):
    allocator = make_allocator(name, predictor=HiddenStatePredictor(0, warmup_roots=4), group_size=4)
    envs = TreeAllocationWrapper(bit_vector(5), allocator=allocator, budget=30)
    for seed in range(3):
        forest = run(envs, seed=seed)
        ledger = forest.ledger
        assert ledger.root_rollouts + ledger.unspent == 30 and not ledger.continuations
        assert not ledger.unspent and all(t.finished for t in forest)
        assert all(np.isfinite(x) for x in allocator.update(forest).values())
    assert forest.verify(bit_vector(2)).trees == len(forest)


WAVES = {
    "dapo": lambda: DAPOAllocator(4, target_share=0.5),
    "reinforce_ada": lambda: ReinforceAdaAllocator(6, enough=1, per_round=3),
    "pcl": lambda: PCLAllocator(DepthPredictor(), 4),
    "mopps": lambda: MoPPSAllocator(4),
    "vip": lambda: VIPAllocator(DepthPredictor(), 4),
}


def gamble(context):
    """Goes by the hint mostly; how far depends on the prompt, so that some prompts are mixed and others are not."""
    rng = path_generator(context)
    trust = 0.5 + 0.5 * (int(context.tree.key) % 5) / 4
    return int(context.observation[1]) if rng.random() < trust else int(rng.integers(2))


@every_method
@pytest.mark.parametrize("choose", [guess, gamble])
def test_the_asynchronous_runner_gives_the_forest_of_the_lock_step_wrapper(name, choose):
    common = {"budget": 48}
    reference = lock_step(vector(nothing, 5), choose, 3, allocator=WAVES[name](), **common)
    waves = reference.ledger.root_waves
    assert waves > 1 if name in ("dapo", "reinforce_ada") else waves == 1
    for policy in (Batched, Single):
        runner = AsyncRunner(vector(random_delays, 7), allocator=WAVES[name](), **common)
        assert_same(runner.run_sync(policy(choose, delays=random_delays), seed=3), reference)
        assert [t.loss_weight for t in runner.forest] == [t.loss_weight for t in reference]


# The documentation.


def test_the_table_of_methods_has_them_all_and_names_the_papers_that_their_classes_name():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page.split("## ")[0], re.MULTILINE))
    assert set(rows) == set(METHODS)
    for name in METHODS:
        predictor = TrueValues(lambda tree, node: 0.5) if name == "oracle" else None
        said = type(make_allocator(name, predictor=predictor)).__doc__
        assert said.startswith(f"`{name}`")
        papers = re.findall(r"\d{4}\.\d{5}", said)
        assert set(papers) <= set(re.findall(r"\d{4}\.\d{5}", rows[name])) and len(papers) <= 1
        assert papers or "this project" in rows[name]
