import copy
import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation import Forest, Sample, Tree
from allocation.tree_record import tree_record


@st.composite
def trees(draw, unfinished=True):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tree = Tree(draw(st.text(max_size=4)), 0, "prompt", {"hops": 2})

    def rollout(node, number, origin, ends):
        for _ in range(int(rng.integers(1, 5))):
            tokens = np.arange(rng.integers(0, 4))
            sample = (
                Sample("act", tokens, tokens.astype(np.float32), np.arange(2), version=7)
                if rng.random() < 0.8
                else None
            )
            node = tree.add(node, number, origin, reward=float(rng.normal()), action="act", sample=sample)
        if ends:
            node.terminated = bool(rng.integers(2))
            node.truncated = not node.terminated
            node.is_correct = bool(rng.integers(2))

    number = 0
    for _ in range(draw(st.integers(0, 5))):
        rollout(tree.root, number, "root", not unfinished or rng.random() < 0.9)
        number += 1
    for _ in range(draw(st.integers(0, 5))):
        inner = [n for n in tree.nodes if n.depth and not n.terminal]
        if inner:
            rollout(inner[rng.integers(len(inner))], number, "continuation", True)
            number += 1
    return tree


@settings(max_examples=100, deadline=None)
@given(trees(), st.integers(0, 2**32 - 1))
def test_sorting_gives_one_order_whichever_rollout_stepped_first(tree, seed):
    rng = np.random.default_rng(seed)
    # The same tree, its nodes added in another order that keeps parents first.
    other, twin, waiting = Tree("q", 0, "prompt"), {0: 0}, [tree.nodes[c] for c in tree.root.children]
    while waiting:
        node = waiting.pop(int(rng.integers(len(waiting))))
        made = other.add(other.nodes[twin[node.parent]], node.rollout, node.origin, reward=node.reward)
        twin[node.id] = made.id
        waiting += [tree.nodes[c] for c in node.children]
    total = dict(zip(twin.values(), tree.returns()[list(twin)], strict=True))
    before = [total[n.id] for n in other.nodes]
    nodes = list(other.nodes)
    other.sort()
    tree.sort()
    assert [n.id for n in other.nodes] == list(range(len(other.nodes))) and other.root.parent is None
    assert [(n.rollout, n.depth) for n in other.nodes] == sorted((n.rollout, n.depth) for n in other.nodes)
    for one, node in zip(tree.nodes, other.nodes, strict=True):
        assert (one.id, one.parent, one.depth, one.rollout, one.origin, one.reward, one.children) == (
            (node.id, node.parent, node.depth, node.rollout, node.origin, node.reward, node.children)
        )
        assert node.parent is None or (node.parent < node.id and node.id in other.nodes[node.parent].children)
    assert sorted(map(id, nodes)) == sorted(map(id, other.nodes)), "a node was replaced"
    assert np.allclose([other.returns()[n.id] for n in nodes], before)


def test_a_forest_leaves_its_environments_behind_when_it_is_copied_or_pickled():
    forest = Forest([Tree("q", 0, "prompt")], slots=object())
    for twin in (copy.copy(forest), copy.deepcopy(forest), pickle.loads(pickle.dumps(forest))):
        assert twin.slots is None and twin.trees[0].key == "q"
    assert forest.slots is not None and Forest().slots is None


def slow_return(tree, node):
    return 0.0 if node.parent is None else slow_return(tree, tree.nodes[node.parent]) + node.reward


def slow_value(tree, node, kind):
    if node.terminal:
        return slow_return(tree, node) if kind == "reward" else float(node.is_correct)
    below = [slow_value(tree, tree.nodes[c], kind) for c in node.children]
    below = [v for v in below if v is not None]
    return sum(below) / len(below) if below else None


def slow_weight(tree, node):
    if node.parent is None:
        return 1.0
    parent = tree.nodes[node.parent]
    return slow_weight(tree, parent) / len(parent.children)


@settings(max_examples=150, deadline=None)
@given(trees(), st.sampled_from(["reward", "success"]))
def test_values_weights_and_returns_equal_their_definitions(tree, kind):
    values, weights, returns = tree.values(kind), tree.weights(), tree.returns()
    for node in tree.nodes:
        expected = slow_value(tree, node, kind)
        assert np.isnan(values[node.id]) if expected is None else values[node.id] == pytest.approx(expected, abs=1e-12)
        assert weights[node.id] == pytest.approx(slow_weight(tree, node), abs=1e-12)
        assert returns[node.id] == pytest.approx(slow_return(tree, node), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(trees(unfinished=False))
def test_in_a_finished_tree_the_leaves_share_the_weight_and_give_the_root_its_value(tree):
    leaves = tree.leaves()
    if leaves:
        weights = tree.weights()
        assert sum(weights[n.id] for n in leaves) == pytest.approx(1.0)
        assert sum(weights[n.id] * n.is_correct for n in leaves) == pytest.approx(tree.values("success")[0])


@settings(max_examples=100, deadline=None)
@given(trees())
def test_paths_parents_and_depths_agree(tree):
    for node in tree.nodes:
        path = tree.path(node)
        assert path[0] is tree.root and path[-1] is node and len(path) == node.depth + 1
        assert all(b.parent == a.id and a.id < b.id and b.id in a.children for a, b in itertools.pairwise(path))
    both = tree.leaves("root") + tree.leaves("continuation")
    assert sorted(n.id for n in both) == [n.id for n in tree.leaves()] == [n.id for n in tree.nodes if n.terminal]
    assert all(n.origin == "root" for n in tree.leaves("root"))


@settings(max_examples=100, deadline=None)
@given(st.lists(trees(), max_size=4), st.sampled_from(["root", None]))
def test_effective_ratio_counts_prompts_with_both_outcomes(some, origin):
    outcomes = [{n.is_correct for n in t.nodes if n.terminal and (origin is None or n.origin == origin)} for t in some]
    outcomes = [o for o in outcomes if o]
    expected = sum(o == {True, False} for o in outcomes) / len(outcomes) if outcomes else 0.0
    assert Forest(some).effective_ratio(origin) == pytest.approx(expected)


def test_continuations_raise_the_ratio_of_trees_but_not_that_of_root_rollouts():
    tree = Tree("q", 0, "prompt")
    first = tree.add(tree.root, 0, "root")
    tree.add(first, 0, "root", terminated=True, is_correct=True)
    tree.add(first, 1, "continuation", terminated=True, is_correct=False)
    forest = Forest([tree])
    assert forest.effective_ratio("root") == 0.0 and forest.effective_ratio() == 1.0
    assert tree.outcome_counts("root") == (1, 0) and tree.outcome_counts() == (1, 1)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_nothing_follows_a_terminal(end):
    tree = Tree("who", 0, "prompt")
    leaf = tree.add(tree.root, 0, "root", **{end: True})
    with pytest.raises(ValueError, match="node 1 of tree 'who' is terminal"):
        tree.add(leaf, 1, "continuation")
    assert len(tree.nodes) == 2 and not leaf.children


@settings(max_examples=100, deadline=None)
@given(trees())
def test_a_record_is_plain_data_that_gives_the_tree_back(tree):
    advantages = np.linspace(-1, 1, len(tree.nodes))
    record = json.loads(json.dumps(tree_record(tree, advantages), allow_nan=False))
    assert record["task_id"] == tree.key and record["hops"] == 2
    values = tree.values()
    for node, plain in zip(tree.nodes, record["nodes"], strict=True):
        assert (plain["id"], plain["parent"], plain["depth"]) == (node.id, node.parent, node.depth)
        assert (plain["origin"], plain["rollout"]) == (node.origin, node.rollout)
        assert (plain["is_correct"], plain["terminated"], plain["truncated"]) == (
            node.is_correct,
            node.terminated,
            node.truncated,
        )
        assert plain["tokens"] == (0 if node.sample is None else len(node.sample.action_ids))
        sampled = (None, None) if node.sample is None else (node.sample.finish_reason, node.sample.version)
        assert (plain["finish_reason"], plain["policy_version"]) == sampled
        if np.isnan(values[node.id]):
            assert plain["value"] is None
        else:
            assert plain["value"] == pytest.approx(values[node.id], abs=1e-4)
        if node.parent is None:
            assert plain["advantage"] is None
        else:
            assert plain["advantage"] == pytest.approx(advantages[node.id], abs=1e-4)
    assert all(n["advantage"] is None for n in tree_record(tree)["nodes"])


def test_dropping_snapshots_keeps_the_rest():
    tree = Tree("q", 0, "prompt")
    node = tree.add(tree.root, 0, "root", snapshot=object(), info={"x": 1}, observation="seen")
    tree.root.snapshot = object()
    tree.drop_snapshots()
    assert all(n.snapshot is None and n.info is None for n in tree.nodes)
    assert node.observation == "seen" and tree.root.observation == "prompt"
