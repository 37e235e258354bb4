import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from echo_env import echo_forest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GraniteConfig, GraniteForCausalLM

from agents.advantages import ESTIMATORS, STD_FLOOR, EdgeCredit, get_estimator, grpo_credit, tree_credit
from agents.learner import LogProbs, micro_batches, policy_step, rows_of
from agents.losses import AGGREGATIONS, Clip, clipped_policy_loss, edge_coefficients
from allocation import Forest, Sample, Tree


@st.composite
def trees(draw, branches=4):
    """A finished tree: rollouts of different lengths, and branches from its inner nodes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tree = Tree("q", 0, "prompt")

    def rollout(node, number, origin):
        for turn in range(length := int(rng.integers(1, 4))):
            n = int(rng.integers(1, 5))
            sample = Sample("a", np.arange(n), np.zeros(n, np.float32), np.arange(2))
            node = tree.add(
                node, number, origin, sample=sample, reward=float(rng.normal() if turn == length - 1 else 0)
            )
        node.terminated, node.is_correct = True, node.reward > 0

    roots = draw(st.integers(1, 4))
    for number in range(roots):
        rollout(tree.root, number, "root")
    for number in range(draw(st.integers(0, branches))):
        inner = [n for n in tree.nodes if n.depth and not n.terminal]
        if inner:
            rollout(inner[rng.integers(len(inner))], roots + number, "continuation")
    return tree


def value(tree, node):
    if node.terminal:
        return node.reward
    return np.mean([value(tree, tree.nodes[c]) for c in node.children])


def tree_advantage(tree, child):
    """V^(c) - B, B the mean over every child, of any ancestor, that stands off the path."""
    path = tree.path(child)
    off = [
        value(tree, tree.nodes[i]) for ancestor, on in itertools.pairwise(path) for i in ancestor.children if i != on.id
    ]
    return value(tree, child) - np.mean(off) if off else 0.0


def share(tree, node):
    return math.prod(1 / len(n.children) for n in tree.path(node)[:-1])


@settings(max_examples=150, deadline=None)
@given(trees(), st.booleans())
def test_tree_credit_by_its_definition(tree, std):
    credit = tree_credit(tree, std=std)
    scale = 1.0
    if std:
        scale = max(np.std([value(tree, tree.nodes[c]) for c in tree.root.children]), STD_FLOOR)
    assert credit.advantage[0] == credit.weight[0] == 0.0
    for node in tree.nodes[1:]:
        assert credit.advantage[node.id] == pytest.approx(tree_advantage(tree, node) / scale, abs=1e-9)
        assert credit.weight[node.id] == pytest.approx(share(tree, node), abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(trees(), st.booleans())
def test_grpo_credit_is_that_of_replicated_rollouts(tree, std):
    credit = grpo_credit(tree, std=std)
    leaves = tree.leaves()
    group = np.array([leaf.reward for leaf in leaves])
    score = (group - group.mean()) / (max(group.std(), STD_FLOOR) if std else 1.0)
    for node in tree.nodes[1:]:
        below = [s for s, leaf in zip(score, leaves, strict=True) if node in tree.path(leaf)]
        # What the gradient sees is weight times advantage: the sum over the copies of the edge.
        assert credit.weight[node.id] == pytest.approx(len(below) / len(leaves))
        assert credit.weight[node.id] * credit.advantage[node.id] == pytest.approx(sum(below) / len(leaves), abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(trees(branches=0))
def test_without_branches_every_turn_has_the_leave_one_out_advantage_of_its_rollout(tree):
    credit = tree_credit(tree)
    leaves = tree.leaves()
    for leaf in leaves:
        others = [other.reward for other in leaves if other is not leaf]
        expected = leaf.reward - np.mean(others) if others else 0.0
        for node in tree.path(leaf)[1:]:
            assert credit.advantage[node.id] == pytest.approx(expected, abs=1e-12)
            assert credit.weight[node.id] == pytest.approx(1 / len(leaves))


def flat(rewards, depth=2):
    tree = Tree("q", 0, "prompt")
    for number, reward in enumerate(rewards):
        node = tree.root
        for turn in range(depth):
            sample = Sample("a", np.arange(2), np.zeros(2, np.float32), np.arange(1))
            last = turn == depth - 1
            node = tree.add(node, number, "root", sample=sample, terminated=last, reward=reward if last else 0.0)
    return tree


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("rewards", [[1.0], [0.0], [1.0, 1.0, 1.0], [0.0, 0.0], [0.3] * 5])
def test_singletons_and_equal_groups_teach_nothing(name, std, rewards):
    assert get_estimator(name)(flat(rewards), std=std).advantage == pytest.approx(0.0, abs=1e-12)


def test_a_chain_below_a_branch_keeps_the_baseline_of_the_root():
    tree = flat([1.0, 0.0])
    first = tree.nodes[1]
    tree.add(first, 2, "continuation", terminated=True, reward=0.0)
    credit = tree_credit(tree)
    # First turn: 1/2 against the other rollout of 0. Second: 1 against that 0 and the 0 of its sibling, and 0 against 0 and 1.
    assert credit.advantage[1:].tolist() == [0.5, 1.0, -0.5, -0.5, -0.5]
    assert credit.weight[1:].tolist() == [0.5, 0.25, 0.5, 0.5, 0.25]


def test_a_nearly_equal_group_is_not_blown_up():
    spread = tree_credit(flat([0.5, 0.5001]), std=True).advantage
    assert np.abs(spread).max() == pytest.approx(0.0001 / STD_FLOOR)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="unknown estimator 'vapo'; known: tree, grpo"):
        get_estimator("vapo")


# The expectation over every outcome, with its probability.

THETA = np.array([0.4, -0.7, 1.1])  # logits of action 1: at the start, after 0, after 1
REWARD = np.array([[0.9, 0.1], [0.3, 1.0]])


def chance(state, action):
    p = 1 / (1 + math.exp(-THETA[state]))
    return p if action else 1 - p


def score(state, action):
    """Gradient of the log-probability."""
    g = np.zeros(3)
    g[state] = action - chance(state, 1)
    return g


def exact_gradient():
    g = np.zeros(3)
    for a, b in itertools.product((0, 1), repeat=2):
        g += chance(0, a) * chance(1 + a, b) * REWARD[a, b] * (score(0, a) + score(1 + a, b))
    return g


def expected_estimate(estimator, roots, extra, branch=lambda rollouts: 0):
    """Sums probability x estimate over all outcomes of `roots` rollouts and `extra` continuations of rollout `branch`."""
    total, mass = np.zeros(3), 0.0
    for rollouts in itertools.product(itertools.product((0, 1), repeat=2), repeat=roots):
        for more in itertools.product((0, 1), repeat=extra):
            tree, p, states = Tree("q", 0, ""), 1.0, [None]
            for number, (a, b) in enumerate(rollouts):
                node = tree.add(tree.root, number, "root")
                tree.add(node, number, "root", terminated=True, reward=REWARD[a, b])
                states += [(0, a), (1 + a, b)]
                p *= chance(0, a) * chance(1 + a, b)
            if extra:
                at = branch(rollouts)
                a = rollouts[at][0]
                for number, b in enumerate(more):
                    anchor = tree.nodes[1 + 2 * at]
                    tree.add(anchor, roots + number, "continuation", terminated=True, reward=REWARD[a, b])
                    states.append((1 + a, b))
                    p *= chance(1 + a, b)
            credit = estimator(tree, std=False)
            mass += p
            for i in range(1, len(tree.nodes)):
                total += p * credit.weight[i] * credit.advantage[i] * score(*states[i])
    assert mass == pytest.approx(1.0)
    return total


@pytest.mark.parametrize(("roots", "extra"), [(2, 0), (3, 0), (2, 1), (2, 3), (3, 2)])
def test_tree_credit_is_unbiased_when_branching_is_exogenous(roots, extra):
    assert expected_estimate(tree_credit, roots, extra) == pytest.approx(exact_gradient(), abs=1e-12)


def test_tree_credit_may_choose_the_branch_by_what_came_before_it():
    def after_one(rollouts):
        return next((i for i, (a, _) in enumerate(rollouts) if a == 1), 0)

    assert expected_estimate(tree_credit, 3, 2, after_one) == pytest.approx(exact_gradient(), abs=1e-12)


def test_looking_at_outcomes_biases_tree_credit():
    def a_failure(rollouts):
        return int(np.argmin([REWARD[a, b] for a, b in rollouts]))

    bias = np.abs(expected_estimate(tree_credit, 3, 2, a_failure) - exact_gradient()).max()
    assert 0.01 < bias < 0.1


def test_flat_groups_shrink_the_gradient_by_the_share_of_a_rollout_in_its_own_baseline():
    assert expected_estimate(grpo_credit, 3, 0) == pytest.approx(exact_gradient() * 2 / 3, abs=1e-12)


# Coefficients and the loss.


@settings(max_examples=60, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=4), st.sampled_from(AGGREGATIONS))
def test_coefficients_share_out_one_batch(some, aggregation):
    forest = Forest(some)
    credits = [tree_credit(t) for t in some]
    coefficients = edge_coefficients(forest, credits, aggregation)
    lengths = [np.array([0 if n.sample is None else len(n.sample.action_ids) for n in t.nodes]) for t in some]
    masses = np.array([(c * n).sum() for c, n in zip(coefficients, lengths, strict=True)])
    assert masses.sum() == pytest.approx(1.0)
    each = np.concatenate([c[1:] for c in coefficients])
    tokens = np.concatenate([n[1:] for n in lengths])
    first = [[c[i] for i in t.root.children] for c, t in zip(coefficients, some, strict=True)]
    if aggregation == "token":
        assert each == pytest.approx(1 / tokens.sum())
    elif aggregation == "edge":
        assert each * tokens == pytest.approx(1 / len(tokens))
    elif aggregation == "trajectory":
        assert np.ptp(np.concatenate(first)) == pytest.approx(0.0, abs=1e-12), "a root rollout counts more than another"
    else:
        assert np.ptp([sum(f) for f in first]) == pytest.approx(0.0, abs=1e-12), "a prompt counts more than another"


def test_unknown_aggregation():
    with pytest.raises(ValueError, match="unknown aggregation 'sum'; known: prompt, trajectory, edge, token"):
        edge_coefficients(Forest(), [], "sum")


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, 0.0), (1.5, -2.0, 3.0), (0.5, -2.0, 0.0), (0.5, 2.0, -1.0), (1.25, 1.0, -1.25)],
)
def test_the_clip_cuts_where_the_ratio_has_gone_far_enough(ratio, advantage, gradient):
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, figures = clipped_policy_loss(new, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), Clip(0.2, 0.28))
    loss.backward()
    assert new.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert figures["clipped"] == (gradient == 0.0) and figures["kl"] == pytest.approx(-math.log(ratio), abs=1e-6)


# The step, against a slow one.


@pytest.fixture
def batch(model, tokenizer):
    """A forest whose stored log-probs are somewhat off, so that ratios differ and some are clipped."""
    forest = echo_forest(model, tokenizer, seed=2, budget=20)
    rng = np.random.default_rng(0)
    for tree in forest:
        for node in tree.nodes[1:]:
            noise = rng.normal(scale=0.3, size=len(node.sample.logprobs))
            node.sample.logprobs = (node.sample.logprobs + noise).astype(np.float32)
    return forest, [tree_credit(t) for t in forest]


def path_ids(tree, node):
    ids = []
    for n in tree.path(node):
        ids += [n.sample.action_ids] if n.sample is not None else []
        ids += [n.context_ids] if n.context_ids is not None else []
    return np.concatenate(ids)


def slow_gradient(model, forest, credits, aggregation):
    model.zero_grad()
    total = 0.0
    for tree, credit, coefficient in zip(forest, credits, edge_coefficients(forest, credits, aggregation), strict=True):
        for node in tree.nodes[1:]:
            before = torch.from_numpy(path_ids(tree, tree.nodes[node.parent]))
            action = torch.from_numpy(node.sample.action_ids)
            logits = model(torch.cat([before, action])[None]).logits[0, len(before) - 1 : -1]
            new = torch.log_softmax(logits, -1)[torch.arange(len(action)), action]
            ratio = (new - torch.from_numpy(node.sample.logprobs)).exp()
            advantage = float(credit.advantage[node.id])
            best = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            loss = -(float(coefficient[node.id]) * best).sum()
            loss.backward()
            total += loss.item()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), total


def step_gradient(model, forest, credits, aggregation, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    figures = policy_step(model, optimizer, forest, credits, aggregation=aggregation, max_grad_norm=1e9, **kwargs)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), figures


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_step_has_the_gradient_of_the_definition(model, batch, aggregation):
    forest, credits = batch
    expected, loss = slow_gradient(model, forest, credits, aggregation)
    got, figures = step_gradient(model, forest, credits, aggregation)
    assert expected.norm() > 1e-3 and relative(got, expected) < 1e-5
    assert figures["loss/policy"] == pytest.approx(loss, abs=1e-5) and figures["loss/clip_share"] > 0
    assert figures["loss/grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


def test_micro_batches_change_nothing(model, batch):
    whole, a = step_gradient(model, *batch, "prompt", micro_tokens=10**6)
    for size in (1, 200):
        parts, b = step_gradient(model, *batch, "prompt", micro_tokens=size)
        assert relative(parts, whole) < 1e-5
        assert {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in a.items()} == b


def test_each_edge_is_trained_once_and_dead_ones_never(batch):
    forest, credits = batch
    seen = 0
    for tree, credit in zip(forest, credits, strict=True):
        rows = list(rows_of(tree, credit, credit.weight))
        live = [n for n in tree.nodes[1:] if credit.advantage[n.id] != 0]
        assert sum(len(r.positions) for r in rows) == sum(len(n.sample.action_ids) for n in live)
        seen += len(live)
        for row in rows:
            assert row.positions.min() > 0 and len(set(row.positions)) == len(row.positions)
            assert (row.advantages != 0).all() and (row.coefficients > 0).all()
    assert seen > 10


def test_rows_end_with_their_last_trained_token(model, batch):
    forest, credits = batch
    for tree, credit in zip(forest, credits, strict=True):
        for leaf in tree.leaves():
            credit.advantage[leaf.id] = 0.0
    rows = [r for t, c in zip(forest, credits, strict=True) for r in rows_of(t, c, c.weight)]
    assert rows and all(r.positions[-1] == len(r.ids) - 1 for r in rows)
    expected, _ = slow_gradient(model, forest, credits, "prompt")
    assert relative(step_gradient(model, forest, credits, "prompt")[0], expected) < 1e-5


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_micro_batches_keep_every_row_within_the_limit(lengths, limit):
    rows = [SimpleNamespace(ids=np.zeros(n)) for n in lengths]
    groups = list(micro_batches(rows, limit))
    assert sorted(id(r) for g in groups for r in g) == sorted(map(id, rows))
    assert all(len(g) == 1 or len(g) * max(len(r.ids) for r in g) <= limit for g in groups)


@torch.no_grad()
def test_both_ways_to_log_probs_agree(model):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (3, 12), generator=rng)
    rows, positions = torch.tensor([0, 0, 2, 1]), torch.tensor([1, 11, 5, 3])
    direct, fallback = LogProbs(model), LogProbs(model)
    assert direct._direct
    fallback._direct = False
    a, b = (f(ids, rows, positions, 0.7) for f in (direct, fallback))
    assert torch.allclose(a, b, atol=1e-5)
    whole = torch.log_softmax(model(ids).logits / 0.7, -1)
    assert torch.allclose(a, whole[rows, positions - 1].gather(-1, ids[rows, positions][:, None])[:, 0], atol=1e-5)


@torch.no_grad()
def test_a_model_that_scales_its_logits_takes_the_long_way(tokenizer):
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        logits_scaling=4.0,
        initializer_range=0.3,
    )
    granite = GraniteForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    got = LogProbs(granite)(ids, torch.tensor([0]), torch.tensor([9]), 1.0)
    assert got.item() == pytest.approx(torch.log_softmax(granite(ids).logits[0, 8], -1)[9].item(), abs=1e-5)


def test_a_step_raises_the_chance_of_what_did_better(make_model, tokenizer):
    model = make_model()
    forest = echo_forest(model, tokenizer, seed=2, budget=20)
    credits = [tree_credit(t) for t in forest]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = [policy_step(model, optimizer, forest, credits, max_grad_norm=1e9)["loss/policy"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-4


def test_several_epochs_are_several_steps(make_model, tokenizer):
    model, other = make_model(), make_model()
    forest = echo_forest(model, tokenizer, seed=2, budget=20)
    credits = [tree_credit(t) for t in forest]
    twice = policy_step(model, torch.optim.SGD(model.parameters(), lr=0.05), forest, credits, epochs=2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    policy_step(other, optimizer, forest, credits)
    assert twice == policy_step(other, optimizer, forest, credits)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_gradients_are_scaled_down(make_model, batch):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    figures = policy_step(model, optimizer, *batch, max_grad_norm=1e-3)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert figures["loss/grad_norm"] > 1e-3 and (after - before).norm().item() == pytest.approx(1e-3, rel=0.02)


def test_dropout_is_off_in_the_step_as_it_was_in_sampling(make_model, batch):
    model = make_model()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    before = torch.get_rng_state()
    _, figures = step_gradient(model, *batch, "prompt")
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert figures == step_gradient(make_model(), *batch, "prompt")[1]


def test_nothing_to_learn_changes_nothing(make_model, tokenizer):
    model = make_model()
    forest = echo_forest(model, tokenizer, budget=8)
    nothing = [EdgeCredit(np.zeros(len(t.nodes)), t.weights()) for t in forest]
    before = [p.detach().clone() for p in model.parameters()]
    figures = policy_step(model, torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5), forest, nothing)
    assert figures["loss/tokens"] == 0 and figures["loss/grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(make_model, tokenizer):
    model = make_model()
    forest = echo_forest(model, tokenizer, seed=2, budget=20)
    credits = [tree_credit(t) for t in forest]
    credits[0].advantage[np.flatnonzero(credits[0].advantage)[0]] = np.inf
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"gradient is not finite.*lower the learning rate"):
        policy_step(model, torch.optim.SGD(model.parameters(), lr=0.1), forest, credits)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
