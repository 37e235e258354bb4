"""Estimators against their definitions done slowly (`slow_estimators`), and what holds for all of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import REWARDS, add_rollout, forests, trees
from slow_estimators import SLOW, ends, ends_below

from agents.advantages import ESTIMATORS, STD_FLOOR, CreditConfig, estimate
from allocation import Sample, Tree
from allocation.forest_table import ForestTable

NAMES = tuple(name for name in ESTIMATORS if name != "gae")  # which needs a critic's values: test_ppo.py
configs = st.builds(
    CreditConfig,
    advantage_std=st.booleans(),
    advantage_clip=st.sampled_from([0.0, 0.3]),
    two_phase_beta=st.sampled_from([0.0, 0.5, 1.0]),
)


def test_every_estimator_has_a_slow_definition():
    assert set(SLOW) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(forests(), configs)
def test_estimators_by_their_definitions(name, some, config):
    table = ForestTable.of(some)
    credit = estimate(table, name, config)
    assert all(x.shape == (len(table),) and np.isfinite(x).all() for x in (credit.up, credit.down, credit.weight))
    assert not any(x[table.is_root].any() for x in (credit.up, credit.down, credit.weight))
    assert (credit.up >= 0).all() and (credit.down <= 0).all() and (credit.weight >= 0).all() and credit.target is None
    for t, (tree, (advantages, weights)) in enumerate(zip(some, SLOW[name](some, config), strict=True)):
        returns = np.array([r for _, r in ends(tree)] or [0.0])
        slack = 1e-9 * max(1.0, float(np.abs(returns).max())) / (STD_FLOOR if config.advantage_std else 1.0)
        for node in tree.nodes[1:]:
            row = table.start[t] + node.id
            mine = advantages[node.id]
            assert credit.up[row] == pytest.approx(np.mean([max(a, 0.0) for a in mine]), abs=slack)
            assert credit.down[row] == pytest.approx(np.mean([min(a, 0.0) for a in mine]), abs=slack)
            assert credit.weight[row] == pytest.approx(weights[node.id], abs=1e-12)


# What holds for all of them.


def with_outcomes(shape, rewards):
    """A tree of `chains`, or one with a `branch` of its first rollout, another below that, and one at its root."""
    tree, rng = Tree("q", 0, "prompt"), np.random.default_rng(0)
    anchors = [tree.root] * len(rewards)
    for number, reward in enumerate(rewards):
        if shape == "branches" and number:
            first, latest = tree.nodes[1], next(n for n in tree.nodes if n.rollout == number - 1)
            anchors[number] = [first, latest if not latest.terminal else first, tree.root][number % 3]
        node = anchors[number]
        tree.plan(number if shape == "branches" else 0)
        add_rollout(tree, node, number, "continuation" if node.depth else "root", rng, lambda r, last: 0.0, 3)
        tree.nodes[-1].reward = reward
    return tree


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["chains", "branches"])
@pytest.mark.parametrize("config", [CreditConfig(), CreditConfig(advantage_std=True)], ids=["plain", "std"])
@pytest.mark.parametrize("rewards", [[1.0], [0.1], [0.0, 0.0], [0.1] * 3, [0.3] * 7, [1e9 + 0.1] * 6])
def test_singletons_and_equal_groups_are_exactly_nothing(name, shape, config, rewards):
    # Beside a prompt that has something to teach, which must not change that.
    table = ForestTable.of([with_outcomes(shape, rewards), with_outcomes(shape, [0.0, 1.0, 0.5])])
    credit = estimate(table, name, config)
    mine = table.tree == 0
    assert (credit.up[mine] == 0.0).all() and (credit.down[mine] == 0.0).all()
    assert credit.advantage[~mine].any() and credit.weight[mine].any()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(trees(rewards=("equal",)), configs)
def test_equal_outcomes_teach_nothing_in_trees_of_any_shape(name, tree, config):
    credit = estimate([tree], name, config)
    assert not credit.up.any() and not credit.down.any()


@pytest.mark.parametrize("name", ["two_phase", "tree_grpo", "treepo", "spo"])
def test_equal_outcomes_within_a_group_are_exactly_nothing_too(name):
    # Below the first edge all outcomes are 0.1, whose mean is not 0.1 as computed; the other rollout of the prompt has 1.
    assert sum([0.1] * 7) / 7 != 0.1 != sum([0.1] * 8) / 8
    tree = Tree("q", 0, "prompt")
    a = tree.add(tree.root, 0, "root")
    tree.add(a, 0, "root", terminated=True, reward=0.1)
    tree.add(tree.root, 1, "root", terminated=True, reward=1.0)
    for number in range(2, 9):
        tree.add(a, number, "continuation", terminated=True, reward=0.1)
    credit, below = estimate([tree], name), slice(4, None)
    if name in ("two_phase", "spo"):
        assert not credit.advantage[below].any()
    else:  # What is left is the comparison with the whole prompt.
        whole = estimate([tree], "grpo").advantage[below]
        assert credit.advantage[below] == pytest.approx(whole / (2 if name == "treepo" else 1), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(trees(rewards=("binary", "graded", "dense")), configs, st.sampled_from([-3.0, 0.5, 100.0]))
def test_a_constant_added_to_every_outcome_changes_nothing(name, tree, config, shift):
    before = estimate([tree], name, config).advantage
    for leaf in tree.leaves():
        leaf.reward += shift
    assert estimate([tree], name, config).advantage == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(forests(), configs)
def test_a_prompt_is_credited_as_if_it_were_alone(name, some, config):
    if name == "treepo":  # which divides by the standard deviation of the batch
        config = CreditConfig(advantage_clip=config.advantage_clip)
    table = ForestTable.of(some)
    credit = estimate(table, name, config)
    for t, tree in enumerate(some):
        alone = estimate([tree], name, config)
        for part in ("up", "down", "weight"):
            # The order in which a group is added up may differ.
            mine = table.per_tree(getattr(credit, part))[t]
            assert mine == pytest.approx(getattr(alone, part), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_an_outlier_moves_only_its_own_prompt_and_the_clip_bounds_it(name):
    quiet, loud = with_outcomes("chains", [0.0, 1.0, 0.0]), with_outcomes("chains", [0.0, 1e6, 0.0])
    table = ForestTable.of([quiet, loud])
    free, bound = (estimate(table, name, CreditConfig(advantage_clip=c)) for c in (0.0, 2.0))
    mine = table.tree == 0
    assert np.array_equal(free.advantage[mine], estimate([quiet], name).advantage)
    assert np.abs(free.advantage[~mine]).max() > 1e5
    assert np.abs(bound.advantage).max() == 2.0 and np.array_equal(bound.advantage[mine], free.advantage[mine])
    scaled = estimate(table, name, CreditConfig(advantage_std=True))
    assert 0 < np.abs(scaled.advantage).max() < 10


@pytest.mark.parametrize("name", NAMES)
def test_the_clip_bounds_rollouts_before_they_are_folded(name):
    tree = Tree("q", 0, "prompt")
    shared = tree.add(tree.root, 0, "root")
    for number, reward in enumerate([100.0, 0.0, 0.0, 0.0]):
        tree.add(shared, number, "continuation" if number else "root", terminated=True, reward=reward)
    tree.add(tree.root, 4, "root", terminated=True, reward=0.0)
    credit = estimate([tree], name, CreditConfig(advantage_clip=1.0))
    assert credit.up.max() <= 1.0 and credit.down.min() >= -1.0
    if name in ("grpo", "tree_grpo", "treepo"):
        assert (credit.up[1], credit.down[1]) == (0.25, -0.75), "one rollout at 1 and three at -1"


@pytest.mark.parametrize("name", NAMES)
def test_a_branch_without_a_terminal_gets_nothing(name):
    tree = with_outcomes("chains", [0.0, 1.0, 1.0])
    open_end = tree.add(tree.nodes[1], tree.plan(1), "continuation")
    open_root = tree.add(tree.root, tree.plan(1), "root")
    credit = estimate([tree], name)
    assert not credit.advantage[[open_end.id, open_root.id]].any() and credit.advantage.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("some", [[], [Tree("q", 0, "prompt")]])
def test_nothing_to_credit(name, some):
    credit = estimate(some, name, CreditConfig(advantage_std=True, advantage_clip=1.0))
    assert len(credit.up) == len(some) and not credit.advantage.any() and not credit.weight.any()


def test_unknown_estimator():
    with pytest.raises(ValueError, match=r"unknown estimator 'vapo'; known: .*two_phase"):
        estimate([], "vapo")


# Folding.


@settings(max_examples=60, deadline=None)
@given(trees(), st.floats(0.2, 3.0), st.sampled_from(["grpo", "tree_grpo", "treepo"]))
def test_the_clipped_loss_of_an_edge_is_that_of_its_copies(tree, ratio, name):
    low, high = 1 - 0.2, 1 + 0.28
    credit = estimate([tree], name)
    count = max(len(tree.leaves()), 1)
    ((advantages, _),) = SLOW[name]([tree], CreditConfig())
    for node in tree.nodes[1:]:
        copies = advantages[node.id] if ends_below(tree, node) else []
        loss = sum(min(ratio * a, min(max(ratio, low), high) * a) for a in copies) / count
        folded = credit.up[node.id] * min(ratio, high) + credit.down[node.id] * max(ratio, low)
        slack = 1e-9 * (1 + sum(map(abs, copies)))
        assert credit.weight[node.id] * folded == pytest.approx(loss, abs=slack)


# By hand, and against each other.


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(trees(waves=0, min_roots=2, unfinished=False, rewards=("binary", "graded", "dense")))
def test_without_branches_all_are_group_relative(name, tree):
    credit = estimate([tree], name)
    leaves = ends(tree)
    m = len(leaves)
    for leaf, r in leaves:
        others = [x for other, x in leaves if other is not leaf]
        alone = r - np.mean(others)  # leave-one-out
        for node in tree.path(leaf)[1:]:
            match name:
                case "tree" | "two_phase":
                    expected = alone
                case "treerl":
                    expected = alone * (m - 1) / m * (2 if node.depth == 1 else 1)
                case "spo":
                    expected = alone * (m - 1) / m if node.depth == 1 else 0.0
                case _:
                    expected = alone * (m - 1) / m
            assert credit.advantage[node.id] == pytest.approx(expected, abs=1e-9)
            assert credit.weight[node.id] == pytest.approx(1 / m)


def flat(rewards):
    tree = Tree("q", 0, "prompt")
    for number, reward in enumerate(rewards):
        node = tree.add(tree.root, number, "root", sample=Sample("a", np.arange(2), np.zeros(2), np.arange(1)))
        tree.add(node, number, "root", terminated=True, reward=reward)
    return tree


def test_a_chain_below_a_branch_keeps_the_baseline_of_the_root():
    tree = flat([1.0, 0.0])
    tree.add(tree.nodes[1], 2, "continuation", terminated=True, reward=0.0)
    credit = estimate([tree], "tree")
    # First turn: 1/2 against the other rollout of 0. Second: 1 against that 0 and the 0 of its sibling, and 0 against 0 and 1.
    assert credit.advantage[1:].tolist() == [0.5, 1.0, -0.5, -0.5, -0.5]
    assert credit.weight[1:].tolist() == [0.5, 0.25, 0.5, 0.5, 0.25]


def test_two_phases_by_hand():
    tree = Tree("q", 0, "prompt")
    for phase in (0, 0, 1, 1, 2, 2, 2):
        tree.plan(phase)
    a = tree.add(tree.root, 0, "root")
    tree.add(a, 0, "root", terminated=True, reward=1.0)
    tree.add(tree.root, 1, "root", terminated=True, reward=0.0)
    b = tree.add(a, 2, "continuation")
    tree.add(b, 2, "continuation", terminated=True, reward=0.0)
    tree.add(a, 3, "continuation", terminated=True, reward=1.0)
    tree.add(b, 4, "continuation", terminated=True, reward=1.0)
    tree.add(b, 5, "continuation", terminated=True, reward=1.0)
    tree.add(tree.root, 6, "root", terminated=True, reward=0.0)
    credit = estimate([tree], "two_phase", CreditConfig(two_phase_beta=0.5))
    # Rollouts 0 and 1 against each other; 2 and 3 against each other and the 1 of rollout 0; 4 and 5 against each other and
    # the 0 of rollout 2; 6 against the outcomes 1, 0, 0, 1 of the phases before it.
    expected = {0: 1.0, 1: -1.0, 2: 0.0 - 1.0, 3: 1.0 - 0.5, 4: 1.0 - 0.5, 5: 1.0 - 0.5, 6: 0.0 - 0.5}
    for node in tree.nodes[1:]:
        assert credit.advantage[node.id] == pytest.approx(expected[node.rollout])
        assert credit.weight[node.id] == (0.5 if node.rollout < 2 else 0.25)
    without = estimate([tree], "two_phase", CreditConfig(two_phase_beta=0.0))
    later = np.array([n.rollout >= 2 for n in tree.nodes])
    assert not without.advantage[later].any() and not without.weight[later].any()
    assert np.array_equal(without.advantage[~later], credit.advantage[~later])


def test_a_nearly_equal_group_is_not_blown_up():
    config = CreditConfig(advantage_std=True)
    assert np.abs(estimate([flat([0.5, 0.5001])], "tree", config).advantage).max() == pytest.approx(1e-4 / STD_FLOOR)


def test_the_rewards_of_the_strategy_are_what_their_names_say():
    rng = np.random.default_rng(0)
    seen = {name: [abs(reward(rng, True)) for _ in range(100)] for name, reward in REWARDS.items()}
    assert set(seen["binary"]) == {0.0, 1.0} and set(seen["equal"]) == {0.1} and max(seen["outliers"]) > 1e5
