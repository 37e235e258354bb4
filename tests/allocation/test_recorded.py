"""Replays of a recorded dense forest."""

from collections import Counter
from dataclasses import replace as replaced
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_record import TinyPolicy, record

from allocation import HiddenStatePredictor, Tree
from allocation.allocators import METHODS, make_allocator
from allocation.arena import measures
from allocation.arena.recorded import RecordedWorld
from allocation.arena.worlds import replay
from allocation.contrast import mixed_probability
from allocation.methods.base import Allocator
from allocation.methods.oracle import TrueValues
from allocation.prefixes import allocate_prefixes
from allocation.roots import allocate_roots_exact
from allocation.scheduler import Job


@cache
def world(seed=0, prompts=6, spines=5, continuations=3):
    return RecordedWorld(record(TinyPolicy(seed, prompts), spines, continuations, seed))


class Scatter(Allocator):
    """Root rollouts for all, then continuations at random inner prefixes, those of continuations too, in three waves."""

    name = "scatter"

    def __init__(self, roots, deep):
        self.roots, self.deep = roots, deep

    def pool_size(self, budget):
        return 3

    def root_budget(self, budget):
        return min(self.roots, budget)

    def allocate_prefixes(self, tree, budget, rng, wave=0):
        inner = [n for n in tree.nodes if n.depth and not n.terminal and (self.deep or n.origin == "root")]
        if not inner or wave > 2:
            return []
        counts = Counter(inner[i].id for i in rng.integers(len(inner), size=max(1, budget // 2)))
        return [(i, min(k, budget)) for i, k in counts.items()] if sum(counts.values()) <= budget else []


def terminals(tree):
    return [n.action for n in tree.leaves()]


@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_replayed_forest_is_part_of_the_record(seed, budget, deep):
    dense = world().dense
    forest = replay(world(), Scatter(budget // 2 + 1, deep), budget, np.random.default_rng(seed))
    rollouts = 0
    for tree in forest:
        rollouts += len(tree.leaves())
        for node in tree.nodes[1:]:
            i, parent = node.action, tree.nodes[node.parent]
            assert dense.prompt[i] == tree.prompt and dense.depth[i] == node.depth
            assert (dense.terminated[i], dense.truncated[i]) == (node.terminated, node.truncated)
            assert node.reward == dense.reward[i] and node.tool_errors == dense.tool_errors[i]
            assert len(node.sample.action_ids) == dense.action_tokens[i]
            assert node.sample.entropy == pytest.approx(float(dense.entropy[dense.edge_row[i]]))
            assert node.is_correct == (bool(dense.is_correct[i]) if node.terminal else None)
            # It follows what it followed in the record, or an equal prefix.
            before = dense.parent[i]
            if before < 0:
                assert parent.depth == 0
            else:
                assert dense.edge_row[before] == dense.edge_row[parent.action]
            assert len(parent.context_ids) == (
                dense.prompt_tokens[tree.prompt] if before < 0 else dense.context_tokens[before]
            )
            wanted = dense.root_features[tree.prompt] if before < 0 else dense.features[before]
            assert (parent.features == wanted).all() and (node.sample.features == wanted).all()
    assert rollouts == forest.ledger.root_rollouts + forest.ledger.continuations
    sampled = [n for t in forest for n in t.nodes[1:]]
    assert forest.ledger.generated_tokens == sum(int(dense.action_tokens[n.action]) for n in sampled)


class Checked:
    """A world that checks each choice against the whole record."""

    def __init__(self, inner):
        self.inner = inner
        self.draw, self.open, self.value = inner.draw, inner.open, inner.value

    def roll(self, job, rng):
        dense, tree = self.inner.dense, job.tree
        before, size = Counter(terminals(tree)), len(tree.nodes)
        self.inner.roll(job, rng)
        end = tree.nodes[-1].action
        ends = set()
        for i in range(len(dense.parent)):
            parent = dense.parent[i]
            row = -1 if parent < 0 else dense.edge_row[parent]
            here = -1 if job.node.depth == 0 else dense.edge_row[job.node.action]
            if dense.prompt[i] == tree.prompt and row == here:
                ends |= {
                    j
                    for j in np.flatnonzero(dense.terminal & (dense.prompt == tree.prompt))
                    if dense.rollout[j] == dense.rollout[i]
                }
        assert before[end] == min(before[e] for e in ends)
        if job.origin == "root":
            assert not dense.continuation[tree.nodes[size].action]


@given(st.integers(0, 2**32 - 1), st.integers(3, 60), st.booleans())
@settings(max_examples=20, deadline=None)
def test_rollouts_come_without_replacement_while_they_last_and_repeats_are_counted(seed, budget, deep):
    forest = replay(Checked(world()), Scatter(budget // 2 + 1, deep), budget, np.random.default_rng(seed))
    for tree in forest:
        ends = terminals(tree)
        assert tree.repeats == len(ends) - len(set(ends)) == world().repeats(tree)


def test_a_continuation_is_never_the_rollout_that_it_leaves_while_there_is_another():
    for seed in range(20):
        tree = world().open(0)
        rng = np.random.default_rng(seed)
        world().roll(Job(tree, tree.root, "root", 0), rng)
        anchor = tree.nodes[1]
        for number in range(1, 4):  # as many as were recorded there
            world().roll(Job(tree, anchor, "continuation", number), rng)
        assert tree.repeats == 0 and len(set(terminals(tree))) == 4


def test_a_prefix_of_a_continuation_without_other_rollouts_replays_its_own_rest_and_counts_it():
    policy = TinyPolicy(0, 1)
    lone = RecordedWorld(record(policy, spines=1, continuations=1))
    tree = lone.open(0)
    rng = np.random.default_rng(0)
    lone.roll(Job(tree, tree.root, "root", 0), rng)
    lone.roll(Job(tree, tree.root, "root", 1), rng)
    assert tree.repeats == 1 and terminals(tree)[0] == terminals(tree)[1]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_a_replay_is_a_function_of_its_seed(seed):
    one, two = (replay(world(), Scatter(12, True), 24, np.random.default_rng(seed)) for _ in range(2))
    assert [[n.action for n in t.nodes] for t in one] == [[n.action for n in t.nodes] for t in two]


def test_a_smaller_pool_is_the_head_of_a_larger_one():
    few, many = (world().draw(np.random.default_rng(7), count) for count in (2, 5))
    assert few.tolist() == many[:2].tolist() and len(set(many.tolist())) == 5
    assert sorted(world().draw(np.random.default_rng(7), 100).tolist()) == list(range(6))


def test_some_of_the_prompts_alone():
    half = world().only(np.array([4, 1]))
    assert {int(p) for s in range(9) for p in half.draw(np.random.default_rng(s), 9)} == {1, 4}
    assert len(world().prompts) == 6 and half.scores is world().scores


def test_first_rollouts_come_as_often_as_they_were_recorded():
    w = world()
    spines = [i for i in range(len(w.dense.parent)) if w.dense.parent[i] < 0 and w.dense.prompt[i] == 2]
    found = Counter()
    for seed in range(2000):
        tree = w.open(2)
        w.roll(Job(tree, tree.root, "root", 0), np.random.default_rng(seed))
        found[tree.nodes[1].action] += 1
    assert set(found) == set(spines)
    expected = 2000 / len(spines)
    assert sum((found[s] - expected) ** 2 / expected for s in spines) < 20  # chi-square, 4 degrees: p < 0.001


def test_continuations_succeed_as_often_as_the_value_of_the_prefix_says():
    policy = TinyPolicy(3, 1)
    w = RecordedWorld(record(policy, spines=40, continuations=6, seed=1))
    rng, hits, values = np.random.default_rng(0), [], []
    for _ in range(400):
        tree = w.open(0)
        w.roll(Job(tree, tree.root, "root", 0), rng)
        node = tree.nodes[1]
        if node.terminal:
            continue
        w.roll(Job(tree, node, "continuation", 1), rng)
        hits.append(tree.leaves("continuation")[0].is_correct)
        values.append(w.value(tree, node))
    assert np.mean(hits) == pytest.approx(np.mean(values), abs=4 * 0.5 / np.sqrt(len(hits)))


def test_values_are_those_of_the_record():
    w, tree = world(), world().open(3)
    w.roll(Job(tree, tree.root, "root", 0), np.random.default_rng(0))
    assert w.value(tree, tree.root) == w.dense.root_values().value[3]
    assert w.value(tree, tree.leaves()[0]) == float(tree.leaves()[0].is_correct)
    for node in tree.nodes[1:-1]:
        assert w.value(tree, node) == w.dense.prefix_values().value[node.action]
    assert w.edge_rows(tree).tolist() == [-1, *(w.dense.edge_row[n.action] for n in tree.nodes[1:])]


class KnowsAll(Allocator):
    """Both stages at their optimum for the true values."""

    name = "knows_all"

    def pool_size(self, budget):
        return 5

    def root_budget(self, budget):
        return budget // 2

    def allocate_roots(self, candidates, budget, rng, wave=0):
        v = np.array([world().value(t, t.root) for t in candidates]).clip(1e-9, 1 - 1e-9)
        return allocate_roots_exact(mixed_probability(v, 1 - v, 16, step=0.0), budget, m_min=4, m_max=16)

    def allocate_prefixes(self, tree, budget, rng, wave=0):
        inner = [n for n in tree.nodes if n.depth and not n.terminal and n.origin == "root"]
        if wave or not inner:
            return []
        v = np.array([world().value(tree, n) for n in inner]).clip(1e-9, 1 - 1e-9)
        ends = {n.rollout: float(n.is_correct) for n in tree.leaves()}
        rollouts = [n.rollout for n in inner]
        counts = allocate_prefixes(v, 1 - v, [ends[r] for r in rollouts], rollouts, budget, rng=rng)
        return [(n.id, int(k)) for n, k in zip(inner, counts, strict=True) if k]

    def max_rollouts(self, tree):
        return 0  # nothing that the two stages have not planned


def test_the_oracle_has_no_regret_and_chance_has_some():
    found = {}
    for allocator in (KnowsAll(), Scatter(20, False)):
        regrets = []
        for seed in range(8):
            watched = Watched(world())
            forest = replay(watched, allocator, 40, np.random.default_rng(seed))
            v = [world().value(t, t.root) for t in watched.candidates]
            counts = measures.root_counts(watched.candidates)
            regrets.append((measures.root_regret(v, counts), measures.prefix_regret(forest, world().value)))
        found[allocator.name] = np.nanmean(regrets, axis=0)
    assert found["knows_all"] == pytest.approx([0, 0], abs=1e-9)
    assert (found["scatter"] > 0.02).all()


class Watched:
    """A world that keeps its candidates."""

    def __init__(self, inner):
        self.inner, self.candidates = inner, []
        self.draw, self.roll, self.value = inner.draw, inner.roll, inner.value

    def open(self, prompt):
        self.candidates.append(self.inner.open(prompt))
        return self.candidates[-1]


def test_a_record_whose_gradient_is_noise_is_refused():
    dense = world().dense
    with pytest.raises(ValueError, match="more reference rollouts"):
        RecordedWorld(replaced(dense, meta={**dense.meta, "gradient_norm2_unbiased": -1.0}))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_unchanged(name):
    played = world(prompts=12)
    predictor = HiddenStatePredictor(played.feature_dim, warmup_roots=4)
    allocator = make_allocator(
        name, predictor=TrueValues(played.value) if name == "oracle" else predictor, group_size=4
    )
    for number in range(3):
        forest = replay(played, allocator, 24, np.random.default_rng(number))
        assert forest.ledger.root_rollouts + forest.ledger.continuations + forest.ledger.unspent == 24
        assert all(isinstance(tree, Tree) and tree.leaves() for tree in forest)
        allocator.update(forest)
