import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import trees

from agents.advantages import STD_FLOOR, CreditConfig, estimate, valued_prefixes
from allocation import Tree
from allocation.forest_table import ForestTable

FRACTION = st.sampled_from([0.0, 0.3, 0.95, 1.0])


@st.composite
def valued(draw):
    """A forest and a value for each node."""
    forest = draw(st.lists(trees(rewards=("binary", "graded", "dense")), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for leaf in (leaf for tree in forest for leaf in tree.leaves()):
        if rng.random() < 0.3:
            leaf.terminated, leaf.truncated = False, True
    return forest, rng.normal(size=sum(len(t.nodes) for t in forest))


def textbook(rewards, values, gamma, lam):
    """GAE of one episode, by the recursion that PPO's implementations have."""
    advantages, last, following = [], 0.0, 0.0
    for reward, value in zip(rewards[::-1], values[::-1], strict=True):
        last = reward + gamma * following - value + gamma * lam * last
        following = value
        advantages.append(last)
    return advantages[::-1]


def of_paths(tree, values, gamma, lam):
    """Textbook GAE on every root-to-leaf path, averaged by the leaves' shares; unfinished branches are not there."""
    ended = {n.id for leaf in tree.leaves() for n in tree.path(leaf)}
    total, mass = np.zeros(len(tree.nodes)), np.zeros(len(tree.nodes))
    for leaf in tree.leaves():
        path = tree.path(leaf)
        share = 1.0
        for node in path[:-1]:
            share /= sum(c in ended for c in node.children)
        found = textbook([n.reward for n in path[1:]], [values[n.id] for n in path[:-1]], gamma, lam)
        for node, advantage in zip(path[1:], found, strict=True):
            total[node.id] += share * advantage
            mass[node.id] += share
    return np.divide(total, mass, out=np.zeros_like(total), where=mass > 0)


@settings(max_examples=150, deadline=None)
@given(valued(), FRACTION, FRACTION)
def test_an_edge_has_the_mean_of_the_paths_through_it(forest, gamma, lam):
    planted, values = forest
    table = ForestTable.of(planted)
    credit = estimate(table, "gae", CreditConfig(gamma=gamma, gae_lambda=lam), values=values)
    expected = [of_paths(t, v, gamma, lam) for t, v in zip(planted, table.per_tree(values), strict=True)]
    assert credit.advantage == pytest.approx(np.concatenate(expected), abs=1e-9)
    assert credit.weight == pytest.approx(np.where(table.is_root, 0.0, table.weights))
    assert (credit.up * credit.down == 0).all()


@settings(max_examples=100, deadline=None)
@given(trees(waves=0, rewards=("dense",)), st.integers(0, 2**32 - 1), FRACTION, FRACTION)
def test_flat_groups_have_textbook_gae(tree, seed, gamma, lam):
    values = np.random.default_rng(seed).normal(size=len(tree.nodes))
    credit = estimate([tree], "gae", CreditConfig(gamma=gamma, gae_lambda=lam), values=values)
    for leaf in tree.leaves():
        path = tree.path(leaf)
        expected = textbook([n.reward for n in path[1:]], [values[n.id] for n in path[:-1]], gamma, lam)
        assert credit.advantage[[n.id for n in path[1:]]] == pytest.approx(expected, abs=1e-9)
        # The lambda-return of a prefix with one child; the root may have more.
        for node, advantage in list(zip(path[:-1], expected, strict=True))[1:]:
            assert credit.target[node.id] == pytest.approx(values[node.id] + advantage, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(valued())
def test_lambda_one_is_the_return_less_the_value(forest):
    planted, values = forest
    table = ForestTable.of(planted)
    credit = estimate(table, "gae", values=values)
    # What comes after a prefix: the tree's value without the rewards on the way there.
    to_go = table.values("reward") - table.returns
    edge = ~table.is_root & (table.leaves_below > 0)
    expected = (to_go + table.reward)[edge] - values[table.parent[edge]]
    assert credit.advantage[edge] == pytest.approx(expected, abs=1e-9)
    prefixes = valued_prefixes(table)
    assert credit.target[prefixes] == pytest.approx(to_go[prefixes], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(valued(), FRACTION)
def test_values_that_fit_the_tree_are_their_own_targets(forest, lam):
    table = ForestTable.of(forest[0])
    values = table.values("reward") - table.returns
    credit = estimate(table, "gae", CreditConfig(gae_lambda=lam), values=values)
    prefixes = valued_prefixes(table)
    assert credit.target[prefixes] == pytest.approx(values[prefixes], abs=1e-9)
    assert np.isnan(np.delete(credit.target, prefixes)).all()


def test_what_has_no_end_is_left_out():
    tree = Tree("q", 0, "prompt")
    first = tree.add(tree.root, 0, "root", reward=0.25)
    tree.add(first, 0, "root", reward=1.0, terminated=True)
    cut = tree.add(first, 1, "continuation", reward=9.0)
    tree.add(cut, 1, "continuation", reward=9.0)
    values = np.array([0.5, 0.4, np.nan, np.nan, np.nan])
    credit = estimate([tree], "gae", values=values)
    assert credit.advantage == pytest.approx([0, 1.25 - 0.5, 1 - 0.4, 0, 0])
    assert credit.target == pytest.approx([1.25, 1.0, np.nan, np.nan, np.nan], nan_ok=True)
    nothing = estimate([Tree("q", 0, "prompt")], "gae", values=np.full(1, np.nan))
    assert nothing.advantage == 0 and np.isnan(nothing.target)
    assert len(estimate([], "gae", values=np.zeros(0)).advantage) == 0


def test_a_truncated_episode_has_no_value_left():
    tree = Tree("q", 0, "prompt")
    tree.add(tree.root, 0, "root", reward=1.0, truncated=True)
    credit = estimate([tree], "gae", values=np.array([0.25, 7.0]))
    assert credit.advantage == pytest.approx([0, 0.75])


def test_rewards_on_the_way_count():
    tree = Tree("q", 0, "prompt")
    first = tree.add(tree.root, 0, "root", reward=2.0)
    tree.add(first, 0, "root", reward=4.0, terminated=True)
    values = np.array([1.0, 3.0, 0.0])
    one_turn = estimate([tree], "gae", CreditConfig(gamma=0.5, gae_lambda=0.0), values=values)
    assert one_turn.advantage == pytest.approx([0, 2 + 1.5 - 1, 4 - 3])
    half = estimate([tree], "gae", CreditConfig(gamma=0.5, gae_lambda=0.5), values=values)
    assert half.advantage == pytest.approx([0, 2.5 + 0.25 * 1, 1])
    assert half.target[:2] == pytest.approx([1 + 2.75, 3 + 1])


@settings(max_examples=100, deadline=None)
@given(valued(), st.sampled_from([0.0, 0.5]))
def test_advantage_std_is_over_the_batch_by_shares(forest, bound):
    planted, values = forest
    planted[0].loss_weight = 0.5
    table = ForestTable.of(planted)
    plain = estimate(table, "gae", CreditConfig(gae_lambda=0.9), values=values)
    credit = estimate(
        table, "gae", CreditConfig(gae_lambda=0.9, advantage_std=True, advantage_clip=bound), values=values
    )
    edge = ~table.is_root & (table.leaves_below > 0)
    weights = table.weights[edge] * np.array([t.loss_weight for t in planted])[table.tree[edge]]
    if not weights.sum():
        return  # Nothing that ended counts.
    a = plain.advantage[edge]
    mean = np.average(a, weights=weights)
    std = max(np.sqrt(np.average((a - mean) ** 2, weights=weights)), STD_FLOOR)
    expected = (a - mean) / std
    assert credit.advantage[edge] == pytest.approx(
        np.clip(expected, -bound, bound) if bound else expected, rel=1e-9, abs=1e-9
    )
    assert (credit.advantage[~edge] == 0).all()
    np.testing.assert_array_equal(credit.target, plain.target)


def test_equal_advantages_are_not_blown_up_and_an_empty_share_changes_nothing():
    tree = Tree("q", 0, "prompt")
    for number in range(3):
        tree.add(tree.root, number, "root", reward=1 + 1e-4 * number, terminated=True)
    values = np.zeros(4)
    spread = estimate([tree], "gae", CreditConfig(advantage_std=True), values=values).advantage
    assert spread == pytest.approx([0, -1e-4 / STD_FLOOR, 0, 1e-4 / STD_FLOOR], abs=1e-9)
    tree.loss_weight = 0.0
    unchanged = estimate([tree], "gae", CreditConfig(advantage_std=True), values=values).advantage
    assert unchanged == pytest.approx([0, 1, 1.0001, 1.0002])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "'gae' needs a critic's values"),
        (np.zeros(3), r"one a node, shape \(2,\), got \(3,\)"),
        (np.array([np.nan, 0.0]), "must be finite at all prefixes, got nan for node 0 of tree 'q'"),
    ],
)
def test_values_that_cannot_be_used(values, message):
    tree = Tree("q", 0, "prompt")
    tree.add(tree.root, 0, "root", terminated=True)
    with pytest.raises(ValueError, match=message):
        estimate([tree], "gae", values=values)


ACTIONS = 2
REWARD = {(): (0.5, -1.0), (0,): (1.0, 0.0), (1,): (2.0, -0.5)}
"""Of each action at each history of a two-turn task."""


def exact_action_values(policy):
    """Q of both turns by backward induction; `policy[history]` are probabilities."""
    q = {h: np.array(REWARD[h]) for h in ((0,), (1,))}
    q[()] = np.array(REWARD[()]) + [policy[(a,)] @ q[(a,)] for a in range(ACTIONS)]
    return q


POLICY = {(): np.array([0.3, 0.7]), (0,): np.array([0.6, 0.4]), (1,): np.array([0.1, 0.9])}


def expected_advantage(first, critic, lam):
    """Mean over all pairs of second actions that may follow `first`, of its advantage when its prefix is continued twice."""
    expected = 0.0
    for a in range(ACTIONS):
        for b in range(ACTIONS):
            tree = Tree("q", 0, "prompt")
            node = tree.add(tree.root, 0, "root", reward=REWARD[()][first])
            for number, action in enumerate((a, b)):
                tree.add(node, number, "root", reward=REWARD[(first,)][action], terminated=True)
            values = np.array([critic[()], critic[(first,)], 0.0, 0.0])
            credit = estimate([tree], "gae", CreditConfig(gae_lambda=lam), values=values)
            expected += POLICY[(first,)][a] * POLICY[(first,)][b] * credit.advantage[1]
    return expected


@pytest.mark.parametrize(("lam", "exact"), [(1.0, False), (0.0, True), (0.6, True)])
def test_it_is_unbiased_with_lambda_one_or_an_exact_critic(lam, exact):
    q = exact_action_values(POLICY)
    critic = {h: POLICY[h] @ q[h] for h in q} if exact else {(): 0.3, (0,): -0.8, (1,): 5.0}
    for first in range(ACTIONS):
        assert expected_advantage(first, critic, lam) == pytest.approx(q[()][first] - critic[()], abs=1e-12)


def test_with_a_smaller_lambda_an_inexact_critic_biases_it():
    q, critic = exact_action_values(POLICY), {(): 0.3, (0,): -0.8, (1,): 5.0}
    for first in range(ACTIONS):
        # One turn on, the critic's error stands for what was not looked at.
        error = critic[(first,)] - POLICY[(first,)] @ q[(first,)]
        bias = expected_advantage(first, critic, 0.6) - (q[()][first] - critic[()])
        assert bias == pytest.approx(0.4 * error) and abs(bias) > 0.1
