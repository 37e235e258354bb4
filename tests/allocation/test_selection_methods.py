"""DAPO, Reinforce-Ada, PCL, MoPPS and VIP: what holds for all of them, by themselves and through the drivers."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from bit_env import DepthPredictor, bit_vector, run, shape
from coins import Coins, Known, make, play, prompts, sampled
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

from agents.advantages import estimate
from agents.aggregation import edge_coefficients
from allocation import AsyncRunner, HiddenStatePredictor, TreeAllocationWrapper, make_allocator
from allocation.allocators import METHODS
from allocation.arena.worlds import replay
from allocation.forest_table import ForestTable
from allocation.methods.adaptive import DAPOAllocator, ReinforceAdaAllocator
from allocation.methods.curriculum import MoPPSAllocator, PCLAllocator, VIPAllocator, least_variance
from allocation.methods.oracle import TrueValues

NAMES = ("dapo", "reinforce_ada", "pcl", "mopps", "vip")
SPENDS = ("dapo", "pcl", "mopps")  # whatever the pool holds
every_method = pytest.mark.parametrize("name", NAMES)
seeds = st.integers(0, 2**32 - 1)
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=30)


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
        table = ForestTable.of(forest)
        credit = estimate(table, "grpo")
        assert np.isfinite(edge_coefficients(table, credit, "prompt")).all() and not credit.advantage.any()


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
