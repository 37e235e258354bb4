import numpy as np
import pytest
from bit_env import BitEnv, DepthPredictor, bit_vector, run
from hypothesis import given, settings
from hypothesis import strategies as st

import allocation.collection
from allocation import Forest, TraceAllocator, TraceConfig, Tree, TreeAllocationWrapper, UniformAllocator
from allocation.methods.base import Allocator
from allocation.scheduler import Scheduler


class Recorder(Allocator):
    """Gives roots what it is told, plans one continuation at a time from the first inner node, and notes when it was asked."""

    name = "recorder"

    def __init__(self, counts, budgets):
        self.counts, self.budgets, self.asked = counts, budgets, []

    def allocate_roots(self, candidates, budget, rng, wave=0):
        return np.array(self.counts)

    def prefix_budgets(self, root_counts, total, rng):
        return np.array(self.budgets)

    def allocate_prefixes(self, tree, budget, rng, wave=0):
        self.asked.append(tree.index)
        return [(tree.root.children[0], budget)]


class NoPrefixes(Recorder):
    """Finds no prefix worth a continuation."""

    def __init__(self, counts, budgets, most):
        super().__init__(counts, budgets)
        self.most = most

    def allocate_prefixes(self, tree, budget, rng, wave=0):
        return []

    def max_rollouts(self, tree):
        return self.most


def begin(allocator, continuations, rng=None):
    """Opens a forest of the prompts that the allocator was made for."""
    forest = Forest()
    trees = [Tree(f"t{i}", -1, "prompt") for i in range(len(allocator.counts))]
    rng = rng or np.random.default_rng(0)
    return forest, Scheduler(allocator, forest, trees, sum(allocator.counts), continuations, rng)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=5),
    st.integers(1, 7),
    st.integers(0, 2**32 - 1),
)
def test_every_job_is_handed_out_once_and_prefixes_are_planned_when_the_last_root_rollout_ends(prompts, slots, seed):
    rng = np.random.default_rng(seed)
    counts, budgets = zip(*prompts, strict=True)
    allocator = Recorder(counts, budgets)
    forest, scheduler = begin(allocator, sum(budgets), rng)
    running, seen, open_roots = [], [], list(counts)
    while not scheduler.done:
        while len(running) < slots and (job := scheduler.next()) is not None:
            running.append(job)
            seen.append(job)
            if job.origin == "continuation":
                assert open_roots[job.tree.index] == 0 and job.node.depth == 1
            else:
                assert job.node is job.tree.root
        job = running.pop(int(rng.integers(len(running))))
        node = job.node
        if job.origin == "root":
            node = job.tree.add(node, job.rollout, "root")
            open_roots[job.tree.index] -= 1
        job.tree.add(node, job.rollout, job.origin, terminated=True, is_correct=True)
        before = list(allocator.asked)
        scheduler.finished(job)
        left = sum(other.tree is job.tree for other in running) or len(job.tree.leaves()) < job.tree.num_rollouts
        assert job.tree.finished == (not left)
        last = job.origin == "root" and open_roots[job.tree.index] == 0 and budgets[job.tree.index] > 0
        assert allocator.asked == before + ([job.tree.index] if last else [])
    assert not running and scheduler.next() is None
    for tree, m, k in zip(forest, counts, budgets, strict=True):
        mine = [job for job in seen if job.tree is tree]
        assert sorted(job.rollout for job in mine) == list(range(m + k)) and tree.num_rollouts == m + k
        assert sum(job.origin == "root" for job in mine) == m and tree.finished


def test_continuations_go_before_root_rollouts():
    _, scheduler = begin(Recorder([1, 3], [2, 0]), 2)
    job = scheduler.next()
    node = job.tree.add(job.node, job.rollout, "root")
    job.tree.add(node, job.rollout, "root", terminated=True)
    scheduler.finished(job)
    assert [scheduler.next().origin for _ in range(5)] == ["continuation", "continuation", "root", "root", "root"]


@pytest.mark.parametrize(("most", "leftover"), [(None, 5), (16, 5), (6, 3), (3, 0), (1, 0)])
def test_leftover_continuations_become_root_rollouts_up_to_the_bound(most, leftover):
    forest, scheduler = begin(NoPrefixes([3], [5], most), 5)
    jobs = 0
    while (job := scheduler.next()) is not None:
        assert job.origin == "root" and not forest.trees[0].finished
        job.tree.add(job.tree.root, job.rollout, "root", terminated=True)
        scheduler.finished(job)
        jobs += 1
    assert jobs == 3 + leftover and scheduler.done and forest.trees[0].finished
    assert (forest.ledger.leftover_roots, forest.ledger.unspent) == (leftover, 5 - leftover)


def test_trace_keeps_leftovers_within_m_max():
    # One turn an episode: there are no inner prefixes, so every continuation is left over.
    config = TraceConfig(m_max=5, continuations=1.0)
    vector = bit_vector(4, turns=1)
    ledger = run(TreeAllocationWrapper(vector, allocator=TraceAllocator(DepthPredictor(), config), budget=24)).ledger
    assert ledger.continuations == 0 and ledger.root_rollouts == 12 + ledger.leftover_roots
    assert ledger.root_rollouts + ledger.unspent == 24 and ledger.leftover_roots <= 3 and ledger.unspent >= 9


@pytest.mark.parametrize("counts", [[3], [2, -1], [2, 2]])
def test_an_allocator_that_gives_what_it_does_not_have_is_named(counts):
    trees = [Tree(f"t{i}", -1, "prompt") for i in range(2)]
    with pytest.raises(
        ValueError, match="allocator 'recorder' must give each of 2 candidates 0 or more of 3 root rollouts"
    ):
        Scheduler(Recorder(counts, []), Forest(), trees, 3, 0, np.random.default_rng(0))


def test_an_allocator_that_gives_nothing_is_named():
    trees = [Tree(f"t{i}", -1, "prompt") for i in range(2)]
    with pytest.raises(ValueError, match="gave no rollouts to any of 2 candidates"):
        Scheduler(Recorder([0, 0], []), Forest(), trees, 3, 0, np.random.default_rng(0))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(4, 40),
    st.sampled_from([1, 2, 5, 48]),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from(["flip", "exact", "random", "none"]),
    st.integers(0, 1000),
)
def test_the_budget_is_spent_exactly(budget, num_envs, continuations, mode, seed):
    config = TraceConfig(continuations=continuations, prefix_mode=mode, cap_per_rollout=None)
    allocator = TraceAllocator(DepthPredictor(), config)
    forest = run(TreeAllocationWrapper(bit_vector(num_envs), allocator=allocator, budget=budget), seed)
    ledger = forest.ledger
    assert ledger.root_rollouts + ledger.continuations == budget == forest.num_leaves
    assert ledger.root_rollouts == allocator.root_budget(budget)
    if mode == "none" or continuations == 0:
        assert ledger.continuations == 0
    for tree in forest:
        assert len(tree.leaves("root")) >= 4 and tree.finished
        ends = [n.rollout for n in tree.leaves()]
        assert sorted(ends) == list(range(tree.num_rollouts)) and len(ends) == len(set(ends))


@pytest.mark.parametrize("num_envs", [1, 3, 7, 64])
@pytest.mark.parametrize("budget", [1, 5, 16, 33])
def test_uniform_groups_spend_the_budget_too(num_envs, budget):
    forest = run(TreeAllocationWrapper(bit_vector(num_envs), allocator=UniformAllocator(4), budget=budget))
    assert forest.num_leaves == budget == forest.ledger.root_rollouts
    sizes = [len(t.leaves()) for t in forest]
    assert len(sizes) == max(1, budget // 4) and max(sizes) - min(sizes) <= 1


def test_the_wrapper_plans_a_prompts_prefixes_after_all_its_root_rollouts(monkeypatch):
    asked, planned = [], []

    class Spy(TraceAllocator):
        def prefix_budgets(self, root_counts, total, rng):
            planned.extend(root_counts)
            return super().prefix_budgets(root_counts, total, rng)

        def allocate_prefixes(self, tree, budget, rng, wave=0):
            assert len(tree.leaves("root")) == planned[tree.index] and not tree.leaves("continuation")
            asked.append((tree.index, sum(len(t.leaves("root")) < planned[t.index] for t in envs.forest)))
            return super().allocate_prefixes(tree, budget, rng, wave)

    finished = []
    monkeypatch.setattr(
        allocation.collection.Scheduler,
        "finished",
        lambda self, job, real=Scheduler.finished: (finished.append(job), real(self, job))[1],
    )
    allocator = Spy(DepthPredictor(), TraceConfig(continuations=1, cap_per_rollout=None))
    envs = TreeAllocationWrapper(bit_vector(3), allocator=allocator, budget=32)
    run(envs, seed=1)
    assert sorted(i for i, _ in asked) == list(range(len(envs.forest)))
    assert any(others > 0 for _, others in asked), "a barrier: every prompt waited for all others"
    assert len(finished) == 32 and len({(j.tree.index, j.rollout) for j in finished}) == 32


def test_root_and_continuations_share_an_environment_of_one():
    envs = TreeAllocationWrapper(BitEnv(), allocator=TraceAllocator(DepthPredictor()), budget=12)
    assert envs.num_envs == 1 and run(envs).num_leaves == 12
