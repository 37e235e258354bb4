"""What is refused at the start, and what a batch survives: predictors that fail, pools and budgets that do not fit."""

import asyncio
import logging

import numpy as np
import pytest
from bit_env import BitEnv, DepthPredictor, bit_vector, run, trace
from synthetic_runs import HiddenView, make, small_world

from allocation import (
    ALLOCATORS,
    AsyncRunner,
    Forest,
    HiddenStatePredictor,
    Root,
    TraceAllocator,
    TraceConfig,
    Tree,
    TreeAllocationWrapper,
    make_allocator,
)
from allocation.arena.synthetic import SyntheticWorld
from allocation.arena.worlds import replay
from allocation.methods.base import Allocator
from allocation.methods.oracle import TrueValues
from allocation.methods.predicted import PredictedAllocator
from allocation.scheduler import Scheduler

BUDGET = 48


class Broken(HiddenView):
    """A predictor that does one thing wrong from the start, or only at inner prefixes."""

    def __init__(self, world, fault, at_prefixes=False):
        super().__init__(world)
        self.fault, self.at_prefixes = fault, at_prefixes

    def predict(self, anchors):
        found = super().predict(anchors)
        if self.at_prefixes and anchors[0].depth == 0:
            return found
        match self.fault:
            case "raises":
                raise RuntimeError("no memory left")
            case "nan":
                found[-1] = np.nan
            case "above":
                found[0] = 1.01
            case "below":
                found[0] = -1e-9
            case "infinite":
                found[0] = np.inf
            case "short":
                return found[:-1]
            case "column":
                return found[:, None]
            case "nothing":
                return None
            case "words":
                return ["likely"] * len(anchors)
        return found

    @property
    def ready(self):
        if self.fault == "ready raises":
            raise AttributeError("no such thing")
        return True

    @ready.setter
    def ready(self, value):
        pass

    def update(self, anchors, values, weights):
        if self.fault == "update raises":
            raise FloatingPointError("overflow")
        return {}


PREDICTS = ("raises", "nan", "above", "below", "infinite", "short", "column", "nothing", "words", "ready raises")


def spent(forest):
    return forest.ledger.root_rollouts + forest.ledger.continuations + forest.ledger.unspent


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if name != "oracle"])  # which takes no other predictor
@pytest.mark.parametrize("fault", [*PREDICTS, "update raises"])
def test_a_predictor_that_fails_stops_no_method_and_is_logged_and_counted(name, fault, caplog):
    world = small_world("skewed")
    allocator = make_allocator(name, predictor=Broken(world, fault))
    asks = isinstance(allocator, PredictedAllocator) and allocator.predictor.__class__ is Broken
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            forest = replay(world, allocator, BUDGET, np.random.default_rng(number))
            before = allocator.fallbacks
            allocator.update(forest)
            assert spent(forest) == BUDGET and all(tree.finished for tree in forest)
            if fault == "update raises":
                assert not forest.ledger.fallbacks
            else:
                assert forest.ledger.fallbacks <= before
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == allocator.fallbacks
    if asks:
        assert said and all(m.startswith(f"{name}: the predictor ") and "allocating uniformly" in m for m in said)
    else:
        assert not said


@pytest.mark.parametrize("fault", PREDICTS)
def test_trace_allocates_as_before_its_predictor_is_ready(fault):
    """The fallback is the cold start, to the last rollout."""
    world = small_world("skewed")
    config = TraceConfig(continuations=1.0)
    forests = []
    for predictor in (Broken(world, fault), HiddenView(world, ready=False)):
        forest = replay(world, TraceAllocator(predictor, config), BUDGET, np.random.default_rng(3))
        forests.append([(t.key, [(n.parent, n.rollout, n.action) for n in t.nodes]) for t in forest])
    assert forests[0] == forests[1]


def test_a_predictor_may_fail_at_prefixes_alone():
    world = small_world("balanced", turns=(3, 5))
    allocator = TraceAllocator(Broken(world, "nan", at_prefixes=True), TraceConfig(continuations=1.0, explore=0.0))
    forest = replay(world, allocator, BUDGET, np.random.default_rng(0))
    # Prompts were chosen by the predictor, prefixes at random: one failure for each tree that was to branch.
    assert forest.ledger.fallbacks == len(forest) and forest.ledger.continuations and spent(forest) == BUDGET
    assert all(tree.root.predicted is not None for tree in forest)
    assert all(n.predicted is None for tree in forest for n in tree.nodes[1:])


def test_a_predictor_that_recovers_is_trusted_again():
    world = small_world("skewed")
    predictor = Broken(world, "raises")
    allocator = TraceAllocator(predictor)
    first = replay(world, allocator, BUDGET, np.random.default_rng(0))
    allocator.update(first)
    predictor.fault = None
    second = replay(world, allocator, BUDGET, np.random.default_rng(1))
    assert first.ledger.fallbacks > 0 == second.ledger.fallbacks
    assert all(tree.root.predicted is not None for tree in second)


def test_an_interrupt_in_a_predictor_is_no_failure_of_it():
    class Interrupted(DepthPredictor):
        def predict(self, anchors):
            raise KeyboardInterrupt

    allocator = TraceAllocator(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        replay(small_world(), allocator, BUDGET, np.random.default_rng(0))
    assert not allocator.fallbacks


def test_hidden_states_that_are_no_numbers_end_in_the_fallback(caplog):
    class Blank(SyntheticWorld):
        def open(self, prompt):
            tree = super().open(prompt)
            tree.root.features = np.full(4, np.nan, dtype=np.float32)
            return tree

    world = Blank(prompts=200, feature_dim=4)
    allocator = TraceAllocator(HiddenStatePredictor(4, steps=1))
    for number in range(3):
        forest = replay(world, allocator, BUDGET, np.random.default_rng(number))
        assert spent(forest) == BUDGET
        allocator.update(forest)
    assert allocator.fallbacks and "the predictor gave nan" in caplog.text


def test_a_failing_predictor_in_the_wrapper(caplog):
    class Failing(DepthPredictor):
        def predict(self, anchors):
            raise OSError("the model's file is gone")

    allocator = TraceAllocator(Failing(), TraceConfig(continuations=1.0))
    forest = run(TreeAllocationWrapper(bit_vector(3), allocator=allocator, budget=24))
    assert spent(forest) == 24 and forest.ledger.fallbacks > 0
    assert (
        "trace: the predictor failed (OSError: the model's file is gone); allocating uniformly instead" in caplog.text
    )


# Budgets.


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_budget_smaller_than_one_group_is_refused_before_anything_is_sampled(budget):
    message = f"budget {budget} is smaller than one group of m_min=4: raise the budget or lower m_min"
    with pytest.raises(ValueError, match=message):
        TreeAllocationWrapper(bit_vector(2), allocator=trace(), budget=budget)
    with pytest.raises(ValueError, match=message):
        AsyncRunner(BitEnv(), allocator=trace(), budget=budget)
    with pytest.raises(ValueError, match=message):
        replay(small_world(), trace(), budget, np.random.default_rng(0))


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_a_budget_larger_than_the_pool_can_take_stays_unspent_in_part_and_says_so(name, prompts, caplog):
    world = small_world(prompts=prompts)
    allocator = make(name, world, ready=True)
    forest = replay(world, allocator, 500, np.random.default_rng(0))
    assert spent(forest) == 500 and len(forest) <= prompts
    assert not forest.ledger.unspent or allocator.stops_on_outcomes or "stay unspent" in caplog.text


def test_what_a_small_pool_can_take_is_spent(caplog):
    world = small_world(prompts=3)
    allocator = TraceAllocator(HiddenView(world, ready=True), TraceConfig(prefix_mode="none", m_max=6))
    forest = replay(world, allocator, 40, np.random.default_rng(0))
    assert (forest.ledger.root_rollouts, forest.ledger.unspent, forest.ledger.root_waves) == (18, 22, 1)
    expected = (
        "trace: 3 candidates cannot take 40 root rollouts, 22 stay unspent; supply more prompts, lower the budget"
    )
    assert expected in caplog.text
    # 7 is no sum of groups of 4 to 6: one rollout stays.
    assert replay(world, allocator, 7, np.random.default_rng(0)).ledger.unspent == 1


def test_a_source_that_runs_low_in_the_middle_of_a_run_stops_nothing(caplog):
    pools = iter([20, 1, 20])

    def source(rng, count):
        return [Root(int(rng.integers(1000))) for _ in range(next(pools))]

    envs = TreeAllocationWrapper(bit_vector(3), allocator=trace(m_max=8), budget=32, roots=source)
    ledgers = [run(envs, seed).ledger for seed in range(3)]
    assert [ledger.root_rollouts + ledger.continuations + ledger.unspent for ledger in ledgers] == [32] * 3
    assert [ledger.unspent > 0 for ledger in ledgers] == [False, True, False]
    assert caplog.text.count("1 candidates cannot take 16 root rollouts, 8 stay unspent") == 1


def test_more_anchors_than_budget():
    world = small_world("recoverable", turns=(8, 12))
    allocator = TraceAllocator(HiddenView(world, ready=True), TraceConfig(continuations=0.05))
    forest = replay(world, allocator, 42, np.random.default_rng(0))
    anchors = sum(n.depth > 0 and not n.terminal for t in forest for n in t.nodes if n.origin == "root")
    assert anchors > 200 and forest.ledger.continuations == 2 and spent(forest) == 42


@pytest.mark.parametrize("name", ALLOCATORS)
def test_trees_without_a_prefix_spend_on_roots_what_they_may(name):
    world = small_world(turns=(1, 1))
    allocator = make(name, world, ready=True)
    forest = replay(world, allocator, BUDGET, np.random.default_rng(0))
    assert spent(forest) == BUDGET and not forest.ledger.continuations
    assert all(n.terminal for tree in forest for n in tree.nodes[1:])
    allocator.update(forest)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_trees_that_end_at_once_in_the_wrapper(name):
    predictor = TrueValues(lambda tree, node: 0.5) if name == "oracle" else DepthPredictor()
    allocator = make_allocator(name, predictor=predictor)
    envs = TreeAllocationWrapper(bit_vector(3, turns=1), allocator=allocator, budget=24)
    assert spent(run(envs)) == 24


# Pools.


def test_an_empty_pool_is_named():
    async def idle(context):
        return 0

    with pytest.raises(ValueError, match="no candidate prompt: the source of roots returned an empty list"):
        TreeAllocationWrapper(bit_vector(2), allocator=trace(), budget=8, roots=lambda rng, count: []).reset(seed=0)
    with pytest.raises(ValueError, match="no candidate prompt"):
        asyncio.run(AsyncRunner(BitEnv(), allocator=trace(), budget=8).run(idle, roots=[]))
    with pytest.raises(ValueError, match="no candidate prompt"):
        Scheduler(trace(), Forest(), [], 8, 0, np.random.default_rng(0))


# Allocators of users.


class Given(Allocator):
    """Answers what it is told."""

    name = "given"

    def __init__(self, roots=(2, 2), budgets=(2, 2), prefixes=((1, 2),)):
        self.answers = roots, budgets, prefixes

    def allocate_roots(self, candidates, budget, rng, wave=0):
        return np.array(self.answers[0])

    def prefix_budgets(self, root_counts, total, rng):
        return np.array(self.answers[1])

    def allocate_prefixes(self, tree, budget, rng, wave=0):
        return list(self.answers[2])


def play(allocator):
    forest = Forest()
    scheduler = Scheduler(allocator, forest, [Tree("a", -1, ""), Tree("b", -1, "")], 4, 4, np.random.default_rng(0))
    while (job := scheduler.next()) is not None:
        node = job.tree.add(job.node, job.rollout, job.origin)
        job.tree.add(node, job.rollout, job.origin, terminated=True, is_correct=True)
        scheduler.finished(job)
    return forest


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"roots": (2,)}, r"must give each of 2 candidates 0 or more of 4 root rollouts, got \[2\]"),
        ({"roots": (5, -1)}, r"got \[5, -1\]"),
        ({"roots": (3, 2)}, r"got \[3, 2\]"),
        ({"roots": (2.0, 2.0)}, r"got \[2.0, 2.0\]"),
        ({"roots": (np.nan, 2.0)}, r"got \[nan, 2.0\]"),
        ({"roots": (0, 0)}, "gave no rollouts to any of 2 candidates with a root budget of 4"),
        ({"budgets": (4,)}, r"must give each of 2 trees 0 or more of 4 continuations, got \[4\]"),
        ({"budgets": (5, -1)}, r"got \[5, -1\]"),
        ({"budgets": (3, 2)}, r"got \[3, 2\]"),
        ({"budgets": (1.5, 2.5)}, r"got \[1.5, 2.5\]"),
        ({"prefixes": ((1, 3),)}, "must spend at most 2 continuations of tree"),
        ({"prefixes": ((0, 1),)}, "on inner prefixes"),
        ({"prefixes": ((2, 1),)}, "on inner prefixes"),
        ({"prefixes": ((99, 1),)}, "on inner prefixes"),
        ({"prefixes": ((-1, 1),)}, "on inner prefixes"),
        ({"prefixes": ((1, 2), (1, -1))}, "on inner prefixes"),
    ],
)
def test_an_allocator_that_breaks_its_contract_is_named(answers, message):
    with pytest.raises(ValueError, match=message) as caught:
        play(Given(**answers))
    assert str(caught.value).startswith("allocator 'given' ")


def test_continuations_that_an_allocator_gives_nobody_stay_unspent():
    assert play(Given()).ledger.unspent == 0
    assert play(Given(budgets=(2, 0))).ledger.unspent == 2
