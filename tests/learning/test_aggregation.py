"""What a token of each edge counts in the loss of a batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import REWARDS, add_rollout, forests, trees

from agents.advantages import CreditConfig, estimate
from agents.aggregation import AGGREGATIONS, edge_coefficients
from allocation import Forest, Tree
from allocation.forest_table import ForestTable

every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def slow(some, name, aggregation):
    """By definition, node by node."""
    kept = [t for t in some if t.loss_weight > 0]
    tokens = {id(n): 0 if n.sample is None else len(n.sample.action_ids) for t in some for n in t.nodes}
    weight = {}
    for tree in some:
        credit = estimate([tree], name)
        weight |= {id(n): float(credit.weight[n.id]) for n in tree.nodes}
    if aggregation == "token":
        total = max(sum(tokens[id(n)] for t in kept for n in t.nodes), 1)
        return [[t.loss_weight / total for _ in t.nodes] for t in some]
    if aggregation == "edge":
        total = max(sum(tokens[id(n)] > 0 for t in kept for n in t.nodes), 1)
        return [[t.loss_weight / total / max(tokens[id(n)], 1) for n in t.nodes] for t in some]
    rollouts = {id(t): max(len(t.root.children), 1) if aggregation == "trajectory" else 1 for t in some}
    everyone = max(sum(rollouts[id(t)] for t in kept), 1.0)
    paths = sum(rollouts[id(t)] * float(t.weights() @ [tokens[id(n)] for n in t.nodes]) for t in kept)
    length = max(paths / everyone, 1.0)
    return [[t.loss_weight * rollouts[id(t)] / everyone * weight[id(n)] / length for n in t.nodes] for t in some]


@every_aggregation
@pytest.mark.parametrize("name", ["tree", "grpo", "two_phase"])
@settings(max_examples=50, deadline=None)
@given(some=forests())
def test_coefficients_by_their_definition(name, aggregation, some):
    table = ForestTable.of(Forest(some))
    got = edge_coefficients(table, estimate(table, name), aggregation)
    assert got.shape == (len(table),) and np.isfinite(got).all() and (got >= 0).all()
    for mine, expected in zip(table.per_tree(got), slow(some, name, aggregation), strict=True):
        assert mine == pytest.approx(np.array(expected), rel=1e-9)


@every_aggregation
@settings(max_examples=50, deadline=None)
@given(some=st.lists(trees(unfinished=False), min_size=1, max_size=4))
def test_coefficients_share_out_one_batch(aggregation, some):
    for tree in some:
        tree.loss_weight = 1.0
    table = ForestTable.of(some)
    coefficients = edge_coefficients(table, estimate(table, "tree"), aggregation)
    assert (coefficients * table.tokens).sum() == pytest.approx(1.0)
    edge = ~table.is_root
    first = [c[t.depth == 1] for c, t in zip(table.per_tree(coefficients), map(one, some), strict=True)]
    if aggregation == "token":
        assert coefficients[edge] == pytest.approx(1 / table.tokens.sum())
    elif aggregation == "edge":
        assert (coefficients * table.tokens)[edge] == pytest.approx(1 / edge.sum())
    elif aggregation == "trajectory":
        assert np.ptp(np.concatenate(first)) == pytest.approx(0.0, abs=1e-12), "a root rollout counts more than another"
    else:
        assert np.ptp([f.sum() for f in first]) == pytest.approx(0.0, abs=1e-12), "a prompt counts more than another"


@every_aggregation
@settings(max_examples=40, deadline=None)
@given(some=st.lists(trees(), min_size=1, max_size=4), weights=st.lists(st.sampled_from([0.25, 0.5, 2.0]), min_size=4))
def test_a_tree_counts_its_weight_times_its_even_share(aggregation, some, weights):
    for tree in some:
        tree.loss_weight = 1.0
    table = ForestTable.of(some)
    credit = estimate(table, "tree")
    even = edge_coefficients(table, credit, aggregation)
    for tree, weight in zip(some, weights, strict=False):
        tree.loss_weight = weight
    assert edge_coefficients(table, credit, aggregation) == pytest.approx(np.array(weights)[table.tree] * even)


def one(tree):
    return ForestTable.of([tree])


@every_aggregation
@settings(max_examples=40, deadline=None)
@given(some=st.lists(trees(), min_size=2, max_size=4), filtered=st.integers(0, 3))
def test_a_tree_of_weight_0_is_as_if_it_were_not_there(aggregation, some, filtered):
    for number, tree in enumerate(some):
        tree.loss_weight = float(number != filtered % len(some))
    kept = ForestTable.of([t for t in some if t.loss_weight])
    everything = ForestTable.of(some)
    whole = edge_coefficients(everything, estimate(everything, "tree"), aggregation)
    dead = everything.tree == filtered % len(some)
    assert not whole[dead].any()
    assert whole[~dead] == pytest.approx(edge_coefficients(kept, estimate(kept, "tree"), aggregation), rel=1e-12)


def chains(lengths):
    tree, rng = Tree("q", 0, "prompt"), np.random.default_rng(0)
    for length in lengths:
        add_rollout(tree, tree.root, tree.plan(0), "root", rng, REWARDS["binary"], length)
    return tree


def test_the_number_of_rollouts_of_a_prompt_is_a_weight_for_trajectory_alone():
    table = ForestTable.of([chains([2] * 2), chains([2] * 6)])
    credit = estimate(table, "tree")
    for aggregation, ratio in (("prompt", 1.0), ("trajectory", 3.0)):
        c = edge_coefficients(table, credit, aggregation)
        first = [part[t.depth == 1].sum() for part, t in zip(table.per_tree(c), map(one, table.trees), strict=True)]
        assert first[1] / first[0] == pytest.approx(ratio)


def test_beta_is_a_weight_for_prompt_and_trajectory_alone():
    tree = chains([2, 2])
    tree.add(tree.nodes[1], tree.plan(1), "continuation", sample=tree.nodes[2].sample, terminated=True)
    table = ForestTable.of([tree])
    half, full = (estimate(table, "two_phase", CreditConfig(two_phase_beta=beta)) for beta in (0.5, 1.0))
    for aggregation in AGGREGATIONS:
        ratio = []
        for credit in (half, full):
            c = edge_coefficients(table, credit, aggregation)
            ratio.append(c[5] / c[2])
        expected = [0.5, 1.0] if aggregation in ("prompt", "trajectory") else [1.0, 1.0]
        assert ratio == pytest.approx(expected)


@every_aggregation
@pytest.mark.parametrize("some", [[], [Tree("q", 0, "prompt")]])
def test_nothing_to_share_out(aggregation, some):
    table = ForestTable.of(some)
    got = edge_coefficients(table, estimate(table, "tree"), aggregation) * table.tokens
    assert len(got) == len(some) and not got.any()


def test_unknown_aggregation():
    table = ForestTable.of([])
    with pytest.raises(ValueError, match="unknown aggregation 'sum'; known: prompt, trajectory, edge, token"):
        edge_coefficients(table, estimate(table), "sum")
