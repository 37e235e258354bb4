"""TreePO, Tree-GRPO and ARPO: where the rollouts of a prompt part company."""

from collections import Counter

import numpy as np
import pytest
from bit_env import DepthPredictor, bit_vector
from hooked_env import (
    Batched,
    HookedEnv,
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

from allocation import AsyncRunner, Sample, TraceAllocator, TraceConfig, Tree, make_allocator
from allocation.entropies import entropy_rises
from allocation.methods.branching import ARPOAllocator, TreeGRPOAllocator, TreePOAllocator, inner_prefixes
from allocation.scheduler import Scheduler
from allocation.tree import Forest
from trace_envs.slots import ProcessSlots

NAMES = ("treepo", "tree_grpo", "arpo")
every_method = pytest.mark.parametrize("name", NAMES)


def sample(entropy, tokens=3):
    ids = np.arange(tokens)
    return Sample("", ids, -0.1 * ids.astype(np.float32), np.arange(2), entropy=entropy)


def grow(tree, rng, node, rollout, origin, most_turns, draw):
    """Adds one rollout of a random length, to a terminal."""
    last = node.depth + int(rng.integers(1, most_turns - node.depth + 1))
    while node.depth < last:
        node = tree.add(node, rollout, origin, sample=draw(rng), terminated=node.depth + 1 == last)
    node.is_correct = bool(rng.random() < 0.5)


def anything(rng):
    return sample([None, np.nan, 0.5, float(rng.random()), float(rng.random())][rng.integers(5)])


def finite(rng):
    return sample(float(rng.random()))


def finished(rng, roots, most_turns=4, draw=finite):
    tree = Tree("q", 0, "prompt")
    for number in range(roots):
        grow(tree, rng, tree.root, number, "root", most_turns, draw)
    return tree


def spend(allocator, tree, budget, rng, most_turns=4, draw=finite):
    """Spends continuations wave by wave; yields what each wave was given and chose."""
    left, rollout, wave = budget, len(tree.leaves()), 0
    while left:
        before = list(tree.nodes)
        chosen = allocator.allocate_prefixes(tree, left, rng, wave)
        yield before, chosen
        if not chosen:
            return
        for i, count in chosen:
            for _ in range(count):
                grow(tree, rng, tree.nodes[i], rollout, "continuation", most_turns, draw)
                rollout += 1
        left -= sum(count for _, count in chosen)
        wave += 1


@every_method
@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 20),
    st.sampled_from([finite, anything]),
    st.integers(0, 2**32 - 1),
)
def test_anchors_are_inner_prefixes_and_the_budget_is_kept(name, roots, most_turns, budget, draw, seed):
    rng = np.random.default_rng(seed)
    tree = finished(rng, roots, most_turns, draw)
    known = any(n.sample.entropy is not None for n in tree.nodes[1:])
    if name == "arpo" and not known and inner_prefixes(tree) and budget:
        with pytest.raises(ValueError, match="has an entropy"):
            list(spend(make_allocator(name), tree, budget, rng, most_turns, draw))
        return
    had_prefixes = bool(inner_prefixes(tree))
    spent = 0
    for before, chosen in spend(make_allocator(name), tree, budget, rng, most_turns, draw):
        assert len({i for i, _ in chosen}) == len(chosen)
        for i, count in chosen:
            assert count > 0 and before[i].depth > 0 and not before[i].terminal
        spent += sum(count for _, count in chosen)
        assert spent <= budget
    assert spent == 0 or had_prefixes
    if name != "arpo":  # its threshold may leave something
        assert spent == (budget if had_prefixes else 0)


@every_method
@pytest.mark.parametrize("turns", [1, 3])
def test_budgets_of_nothing_and_one(name, turns):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tree = finished(rng, 2, turns)
        allocator = make_allocator(name)
        assert allocator.allocate_prefixes(tree, 0, rng) == []
        chosen = allocator.allocate_prefixes(tree, 1, rng)
        assert [k for _, k in chosen] in ([], [1]) and (not chosen or turns > 1)


@every_method
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_prompts_are_sampled_evenly(name, group, budget, seed):
    allocator = make_allocator(name, group_size=group)
    n, roots = allocator.pool_size(budget), allocator.root_budget(budget)
    counts = allocator.allocate_roots([Tree(str(i), -1, "") for i in range(n)], roots, np.random.default_rng(seed))
    assert n == max(1, budget // group) and counts.sum() == roots <= budget
    assert counts.min() >= 1 and np.ptp(counts) <= 1
    if budget % group == 0:
        assert abs(roots - allocator.root_share * budget) <= 0.5 or roots == n


def test_groups_are_divided_as_published():
    assert [make_allocator(n, group_size=8).root_budget(64) for n in NAMES] == [16, 16, 32]
    assert TreeGRPOAllocator(10, nodes=2, rounds=2).root_budget(100) == 20
    assert TreePOAllocator(16, width=4).root_budget(160) == 40 and TreePOAllocator(2, width=4).root_budget(8) == 8
    assert ARPOAllocator(16).root_budget(16) == 8


# TreePO.


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_treepo_branches_every_active_path_depth_by_depth(roots, width, budget, seed):
    rng = np.random.default_rng(seed)
    tree = finished(rng, roots, 5)
    left = budget
    for wave, (before, chosen) in enumerate(spend(TreePOAllocator(16, width), tree, budget, rng, 5)):
        active = [n.id for n in before if n.depth == wave + 1 and not n.terminal]
        got = dict(chosen)
        if active:
            counts = [got.get(i, 0) for i in active]
            assert sum(counts) == sum(got.values()) == min(left, len(active) * (width - 1))
            assert max(counts) - min(counts) <= 1
        elif chosen:
            assert sum(got.values()) == left  # the fallback has the last word
        left -= sum(got.values())
    assert left == 0 or not inner_prefixes(tree)


def test_treepo_doubles():
    rng = np.random.default_rng(0)

    def long_chain(tree, node, rollout, origin):
        while not node.terminal:
            node = tree.add(node, rollout, origin, terminated=node.depth == 4)

    tree = Tree("q", 0, "")
    for number in range(2):
        long_chain(tree, tree.root, number, "root")
    allocator, left, rollout = TreePOAllocator(32), 30, 2
    for wave in range(5):
        chosen = allocator.allocate_prefixes(tree, left, rng, wave)
        left -= sum(k for _, k in chosen)
        for i, k in chosen:
            for _ in range(k):
                long_chain(tree, tree.nodes[i], rollout, "continuation")
                rollout += 1
        if not left:
            break
    assert left == 0 and Counter(n.depth for n in tree.nodes) == {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32}


def test_treepo_cuts_finished_paths_anywhere_when_nothing_is_active():
    allocator, cuts = TreePOAllocator(8), Counter()
    tree = Tree("q", 0, "")
    node = tree.root
    for depth in range(3):
        node = tree.add(node, 0, "root", terminated=depth == 2)
    tree.add(tree.root, 1, "root", terminated=True)  # has nothing to cut
    for seed in range(400):
        (chosen,) = [allocator.allocate_prefixes(tree, 1, np.random.default_rng(seed), wave=7)]
        assert [k for _, k in chosen] == [1]
        cuts[tree.nodes[chosen[0][0]].depth] += 1
    assert set(cuts) == {1, 2} and min(cuts.values()) > 150
    assert sum(k for _, k in allocator.allocate_prefixes(tree, 9, np.random.default_rng(0), wave=7)) == 9


# Tree-GRPO.


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_tree_grpo_spends_equal_rounds_on_equal_trunks(roots, rounds, budget, seed):
    rng = np.random.default_rng(seed)
    tree = finished(rng, roots, 4)
    spent, sizes = 0, []
    for before, chosen in spend(TreeGRPOAllocator(8, rounds=rounds), tree, budget, rng):

        def trunk(node, nodes=before):
            while node.depth > 1:
                node = nodes[node.parent]
            return node.rollout

        able = {trunk(n) for n in before if n.depth and not n.terminal}
        got = Counter({t: 0 for t in able})
        for i, k in chosen:
            got[trunk(before[i])] += k
        assert set(got) == able and (not able or max(got.values()) - min(got.values()) <= 1)
        sizes.append(sum(got.values()))
        spent += sizes[-1]
    if inner_prefixes(tree):
        assert spent == budget and len(sizes) == min(rounds, budget) and max(sizes) - min(sizes) <= 1


def test_tree_grpo_draws_nodes_of_earlier_expansions_and_all_alike():
    tree = Tree("q", 0, "")
    node = tree.root
    for depth in range(4):
        node = tree.add(node, 0, "root", terminated=depth == 3)
    branch = tree.add(tree.nodes[1], 1, "continuation")
    tree.add(branch, 1, "continuation", terminated=True)
    draws = Counter()
    for seed in range(1000):
        for i, k in TreeGRPOAllocator(8).allocate_prefixes(tree, 2, np.random.default_rng(seed), 1):
            draws[i] += k
    inner = {n.id for n in inner_prefixes(tree)}
    assert branch.id in inner and len(inner) == 4 and set(draws) == inner
    total = sum(draws.values())
    assert all(abs(k - total / 4) < 5 * (total * 3 / 16) ** 0.5 for k in draws.values())


# ARPO.


def rise_the_slow_way(tree, node):
    after = [tree.nodes[c] for c in node.children if tree.nodes[c].rollout == node.rollout]
    values = [n.sample.entropy for n in (after[0], tree.path(node)[1])] if after else [None]
    return np.nan if None in values else values[0] - values[1]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(1, 3),
    st.floats(0.2, 0.8),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_arpo_branches_where_entropy_rose_most(roots, budget, branches, tau, gaps, seed):
    rng = np.random.default_rng(seed)
    draw = anything if gaps else finite
    tree = finished(rng, roots, 5, draw)
    if all(n.sample.entropy is None for n in tree.nodes[1:]):
        return
    left = budget
    allocator = ARPOAllocator(8, tau=tau, branches=branches)
    for before, chosen in spend(allocator, tree, budget, rng, 5, draw):
        free = [n for n in before if n.depth and not n.terminal]
        chosen_now = dict(chosen)
        once = []
        for n in free:
            kids = [c for c in n.children if c < len(before)]
            chance = 0.5 + 0.2 * rise_the_slow_way(tree, n)
            if len(kids) == 1 and chance > tau:
                once.append((chance, n.id))
        once.sort(reverse=True)
        assert sum(chosen_now.values()) == min(left, branches * len(once))
        served = [chance for chance, i in once if i in chosen_now]
        assert len(served) == len(chosen_now) == -(-min(left, branches * len(once)) // branches)
        assert served == [chance for chance, _ in once][: len(served)]
        assert sorted(chosen_now.values(), reverse=True)[:-1] == [branches] * max(len(served) - 1, 0)
        left -= sum(chosen_now.values())


def test_entropy_rises_are_against_the_start_of_the_path():
    tree = Tree("q", 0, "")
    first = tree.add(tree.root, 0, "root", sample=sample(1.0))
    second = tree.add(first, 0, "root", sample=sample(1.5))
    tree.add(second, 0, "root", sample=sample(0.25), terminated=True)
    branch = tree.add(first, 1, "continuation", sample=sample(9.0))
    tree.add(branch, 1, "continuation", sample=sample(3.0), terminated=True)
    lost = tree.add(tree.root, 2, "root", sample=sample(None))
    tree.add(lost, 2, "root", sample=sample(3.0), terminated=True)
    rises = entropy_rises(tree, [first, second, branch, lost])
    np.testing.assert_array_equal(rises, [0.5, -0.75, 2.0, np.nan])
    assert entropy_rises(tree, []).shape == (0,)


def test_equal_rises_are_not_settled_by_the_index():
    tree = Tree("q", 0, "")
    for number in range(3):
        node = tree.add(tree.root, number, "root", sample=sample(0.5))
        tree.add(node, number, "root", sample=sample(1.0), terminated=True)
    who = Counter(ARPOAllocator().allocate_prefixes(tree, 1, np.random.default_rng(s))[0][0] for s in range(300))
    assert len(who) == 3 and min(who.values()) > 60


@pytest.mark.parametrize("draw", [lambda rng: sample(None), lambda rng: None])
def test_missing_entropies_are_an_error_that_says_what_to_do(draw):
    tree = finished(np.random.default_rng(1), 3, 4, draw)
    entropy_mode = TraceAllocator(DepthPredictor(), TraceConfig(prefix_mode="entropy"))
    for allocator in (ARPOAllocator(), entropy_mode):
        assert allocator.uses_entropy
        with pytest.raises(ValueError, match=r"TransformersPolicy\(\.\.\., entropy=True\)"):
            allocator.allocate_prefixes(tree, 2, np.random.default_rng(0))
    assert not make_allocator("treepo").uses_entropy and not TraceAllocator(DepthPredictor()).uses_entropy


def test_turns_without_tokens_have_no_entropy_and_are_no_error():
    tree = finished(np.random.default_rng(1), 3, 4, lambda rng: sample(None, tokens=0))
    assert inner_prefixes(tree) and ARPOAllocator().allocate_prefixes(tree, 2, np.random.default_rng(0)) == []


def test_trace_branches_by_entropy():
    class Never(DepthPredictor):
        ready = False

    rng = np.random.default_rng(3)
    tree = finished(rng, 4, 5)
    allocator = TraceAllocator(Never(), TraceConfig(prefix_mode="entropy", cap_per_rollout=None))
    chosen = allocator.allocate_prefixes(tree, 2, rng)
    rises = {n.id: rise_the_slow_way(tree, n) for n in inner_prefixes(tree)}
    assert len(rises) > 3 and {i for i, _ in chosen} == set(sorted(rises, key=rises.get)[-2:])
    everything = allocator.allocate_prefixes(tree, len(rises) + 1, rng)
    assert sorted(k for _, k in everything) == [1] * (len(rises) - 1) + [2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreePOAllocator(0), "group_size must be at least 1, got 0"),
        (lambda: TreePOAllocator(8, width=1), "width must be at least 2"),
        (lambda: TreeGRPOAllocator(8, rounds=0), "rounds=0"),
        (lambda: TreeGRPOAllocator(8, nodes=0), "nodes=0"),
        (lambda: ARPOAllocator(8, root_share=0.0), r"root_share must lie in \(0, 1\], got 0.0"),
        (lambda: ARPOAllocator(8, beta=0.0), "beta must be positive"),
        (lambda: ARPOAllocator(8, branches=0), "branches must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Through the drivers.


def uncertain(context):
    """A guess that says how uncertain it was: a function of the path, as the action is."""
    rng = path_generator(context)
    ids = np.arange(2)
    return Sample(
        guess(context), ids, np.zeros(2, np.float32), np.arange(1 + context.node.depth), entropy=float(rng.random())
    )


def long_games(hook=nothing, num_envs=3):
    return vector(hook, num_envs, turns=7, noise=0.2)


def in_waves(name):
    """A method that spends its continuations in several waves: with half of the rollouts at the roots ARPO needs one."""
    return ARPOAllocator(8, root_share=0.125) if name == "arpo" else make_allocator(name)


@every_method
@pytest.mark.parametrize("policy", [Batched, Single])
def test_the_forest_does_not_depend_on_delays(name, policy):
    reference = lock_step(long_games(nothing), uncertain, 3, allocator=in_waves(name), budget=40)
    assert reference.ledger.continuations > 8 and reference.ledger.prefix_waves > 1
    runner = AsyncRunner(long_games(random_delays, 6), allocator=in_waves(name), budget=40)
    assert_same(runner.run_sync(policy(uncertain, random_delays), seed=3), reference)


@every_method
@pytest.mark.parametrize("budget", [1, 2, 7, 40])
@pytest.mark.parametrize("turns", [1, 2, 7])
def test_forests_of_any_depth_keep_their_accounts(name, budget, turns):
    forest = lock_step(bit_vector(3, turns=turns), uncertain, 1, allocator=name, budget=budget)
    ledger = forest.ledger
    assert ledger.root_rollouts + ledger.continuations == budget == forest.num_leaves and ledger.unspent == 0
    assert ledger.outcome_stops == 0 and (turns > 1 or ledger.continuations == 0)
    assert all(tree.finished for tree in forest)


def chained(forest):
    """The continuations that start from a continuation."""
    return sum(
        n.origin == "continuation" and p.origin == "continuation" and n.rollout != p.rollout
        for t in forest
        for n in t.nodes[1:]
        for p in [t.nodes[n.parent]]
    )


@every_method
@pytest.mark.parametrize("processes", [False, True])
def test_continuations_of_continuations_are_what_was_recorded(name, processes):
    envs = ProcessSlots([lambda: HookedEnv(turns=7, noise=0.2)] * 2) if processes else long_games(num_envs=2)
    try:
        forest = lock_step(envs, uncertain, 5, allocator=in_waves(name), budget=48)
        assert chained(forest) > 3 and forest.ledger.prefix_waves > 1
        report = forest.verify()
        assert report.trees == len(forest) == 6 and report.paths == report.verdicts == 48
        assert all(n.snapshot is None and n.info is None for t in forest for n in t.nodes)
    finally:
        envs.close()


@every_method
def test_processes_give_the_same_forest(name):
    slots = ProcessSlots([lambda: HookedEnv(turns=7, noise=0.2)] * 3)
    try:
        assert_same(
            lock_step(slots, uncertain, 2, allocator=in_waves(name), budget=32),
            lock_step(long_games(num_envs=3), uncertain, 2, allocator=in_waves(name), budget=32),
        )
    finally:
        slots.close()


@every_method
def test_snapshots_are_kept_as_long_as_a_wave_may_follow(name, monkeypatch):
    kept = Counter()

    def watch(self, job, real=Scheduler.finished):
        more = self.will_branch(job.tree)
        inner = [n for n in job.tree.nodes if n.rollout == job.rollout and not n.terminal]
        assert all((n.snapshot is not None) == more for n in inner)
        kept[job.origin, more] += 1
        return real(self, job)

    monkeypatch.setattr("allocation.collection.Scheduler.finished", watch)
    forest = lock_step(long_games(), uncertain, 4, allocator=in_waves(name), budget=48)
    assert kept["root", True] and kept["continuation", True] and kept["continuation", False]
    assert isinstance(forest, Forest) and all(n.snapshot is None for t in forest for n in t.nodes)
