import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation import Forest, HiddenStatePredictor, Sample, TraceAllocator, TraceConfig, Tree
from allocation.arena.worlds import replay
from allocation.contrast import ROOT_VALUES
from allocation.costs import LARGEST_STATE, MEAN_DECAY, CostModel, tokens_of
from allocation.prefixes import allocate_prefixes

TURNS = 4


class LengthWorld:
    """Prompts that differ in how long their actions are; hidden states tell, if there are any."""

    def __init__(self, prompts=400, dim=0, noise=0.0):
        self.prompts, self.dim, self.noise = prompts, dim, noise

    def draw(self, rng, count):
        return rng.permutation(self.prompts)[:count]

    def length(self, prompt):
        return 4 + 8 * (prompt % 5)

    def features(self, tree):
        return np.eye(self.dim, dtype=np.float32)[int(tree.key) % 5 % self.dim] if self.dim else None

    def open(self, prompt):
        tree = Tree(str(prompt), -1, "prompt", {"max_turns": TURNS})
        tree.root.features = self.features(tree)
        return tree

    def roll(self, job, rng):
        tree, node = job.tree, job.node
        while not node.terminal:
            tokens = max(1, round(self.length(int(tree.key)) * float(np.exp(self.noise * rng.standard_normal()))))
            sample = Sample("a", np.zeros(tokens, np.int64), np.zeros(tokens, np.float32), np.zeros(1, np.int64))
            over = node.depth + 1 == TURNS or (node.depth and rng.random() < 0.2)
            node = tree.add(node, job.rollout, job.origin, "a", "o", sample, terminated=bool(over))
            node.features = self.features(tree)
        node.is_correct = bool(rng.random() < 0.5)
        node.reward = float(node.is_correct)

    def value(self, tree, node):
        return 0.5


def allocator(**settings):
    return TraceAllocator(HiddenStatePredictor(0), TraceConfig(**{"continuations": 0.5, "m_max": 8} | settings))


def forests(world, batches, budget=96, seed=0):
    rng, method = np.random.default_rng(seed), allocator()
    return [replay(world, method, budget, rng) for _ in range(batches)]


def inner(tree):
    return [n for n in tree.nodes if n.depth and not n.terminal]


def test_before_the_first_batch_all_cost_the_same():
    tree = LengthWorld().open(3)
    model = CostModel()
    assert not model.ready and model.predict([tree, tree], [tree.root, tree.root]).tolist() == [1.0, 1.0]
    assert model.predict([], []).shape == (0,)
    assert model.update(Forest()) == {} and not model.ready


def test_deeper_prefixes_cost_less():
    model = CostModel()
    for forest in forests(LengthWorld(noise=0.3), 3):
        report = model.update(forest)
    tree = max(forest, key=lambda t: max(n.depth for n in t.nodes))
    chain = [tree.root] + [next(n for n in inner(tree) if n.depth == d) for d in range(1, TURNS)]
    costs = model.predict([tree] * TURNS, chain)
    assert (np.diff(costs) < 0).all()
    assert report["cost/prefix_tokens"] < report["cost/root_tokens"]
    assert report["cost/bias"] == pytest.approx(1.0, abs=0.25)


def test_a_mean_by_depth_is_the_decayed_mean_by_hand():
    def chain(lengths, key):
        tree = Tree(key, 0, "prompt", {"max_turns": len(lengths)})
        node = tree.root
        for i, n in enumerate(lengths):
            sample = Sample("a", np.zeros(n, np.int64), np.zeros(n, np.float32), np.zeros(0, np.int64))
            node = tree.add(node, 0, "root", sample=sample, terminated=i == len(lengths) - 1)
        return tree

    model = CostModel()
    model.update(Forest([chain([10, 20], "a")]))
    model.update(Forest([chain([30, 40], "b")]))
    root = (MEAN_DECAY * 30 + 70) / (MEAN_DECAY + 1)
    assert model._means(np.array([0]))[0] == pytest.approx(root)
    # The second mean is held towards the first by two rollouts; depths never seen cost what the deepest does.
    deeper = (MEAN_DECAY * 20 + 40 + 2 * root) / (MEAN_DECAY + 1 + 2)
    np.testing.assert_allclose(model._means(np.array([1, 2, 9])), deeper)


def test_a_branched_node_is_the_mean_of_its_children_and_turns_count_without_tokens():
    tree = Tree("q", 0, "prompt", {"max_turns": 3})
    first = tree.add(tree.root, 0, "root")
    tree.add(first, 0, "root", terminated=True)
    long = tree.add(first, 1, "continuation")
    tree.add(long, 1, "continuation", terminated=True)
    assert tokens_of(first) == 1
    report = CostModel().update(Forest([tree]))
    assert report == {"cost/root_tokens": 2.5, "cost/prefix_tokens": pytest.approx((2 * 1.5 + 1.0) / 3)}


def test_hidden_states_tell_lengths_apart_and_help():
    world = LengthWorld(dim=6, noise=0.2)
    model = CostModel()
    for forest in forests(world, 8):
        report = model.update(forest)
    assert report["cost/skill_of_roots"] > 0.5 and report["cost/skill_of_prefixes"] > 0.3
    short, long = world.open(0), world.open(4)
    costs = model.predict([short, long], [short.root, long.root])
    assert costs[1] > 2 * costs[0]


def test_prompts_that_come_again_are_remembered():
    world = LengthWorld(prompts=24, noise=0.2)
    model = CostModel()
    for forest in forests(world, 12):
        report = model.update(forest)
    assert report["cost/skill_of_roots"] > 0.3
    short, long = world.open(0), world.open(4)
    costs = model.predict([short, long], [short.root, long.root])
    assert costs[1] > 1.5 * costs[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 3, LARGEST_STATE + 5]), st.floats(-300, 300))
def test_costs_are_finite_and_at_least_one_whatever_comes(seed, dim, scale):
    rng = np.random.default_rng(seed)
    model = CostModel()
    forest = forests(LengthWorld(dim=dim, noise=1.0), 1, budget=24, seed=seed)[0]
    model.update(forest)
    tree = LengthWorld(dim=dim).open(int(rng.integers(9)))
    tree.root.tool_errors = int(rng.integers(0, 100))
    if dim:
        tree.root.features = (scale * rng.standard_normal(dim)).astype(np.float32)
    cost = model.predict([tree], [tree.root])
    assert np.isfinite(cost).all() and (cost >= 1).all()
    if dim:
        tree.root.features[0] = np.nan
        assert np.isfinite(model.predict([tree], [tree.root])).all()


def test_what_comes_after_a_prefix_does_not_change_its_cost():
    model = CostModel()
    for forest in forests(LengthWorld(dim=4), 2):
        model.update(forest)
    tree = next(t for t in forest if inner(t))
    node = inner(tree)[0]
    before = model.predict([tree], [node])
    for leaf in tree.leaves():
        leaf.is_correct = not leaf.is_correct
    tree.add(node, 99, "continuation", terminated=True)
    np.testing.assert_array_equal(model.predict([tree], [node]), before)


def test_a_restored_model_goes_on_the_same():
    batches = forests(LengthWorld(prompts=30, dim=5, noise=0.3), 4)
    model, other = CostModel(), CostModel()
    for forest in batches[:2]:
        model.update(forest)
    other.load_state_dict(model.state_dict())
    plain = model.state_dict()
    json.dumps({k: v for k, v in plain.items() if not isinstance(v, np.ndarray)})
    for forest in batches[2:]:
        assert model.update(forest) == other.update(forest)
    trees = [t for f in batches for t in f]
    nodes = [t.root for t in trees]
    np.testing.assert_array_equal(model.predict(trees, nodes), other.predict(trees, nodes))
    with pytest.raises(ValueError, match="hidden states of length 5, got"):
        other.predict([LengthWorld(dim=3).open(1)], [LengthWorld(dim=3).open(1).root])


# Prefixes under a budget of tokens.


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["flip", "exact", "random"]), st.integers(1, 12))
def test_continuations_spend_their_tokens_and_prompts_do_not_share_them(seed, mode, n):
    rng = np.random.default_rng(seed)
    alpha, beta = rng.uniform(0.1, 5, (2, n))
    outcome, cost = rng.integers(0, 2, n).astype(float), rng.uniform(1, 9, n)
    prompt, tokens, budget = rng.integers(0, 2, n), rng.uniform(0, 60, 2), rng.integers(0, 30, 2)
    kwargs = {"mode": mode, "cost": cost, "rng": rng}
    counts = allocate_prefixes(alpha, beta, outcome, np.arange(n), budget, tokens=tokens, prompt=prompt, **kwargs)
    for i in range(2):
        at = prompt == i
        spent, rolled = cost[at] @ counts[at], counts[at].sum()
        assert spent <= tokens[i] * (1 + 1e-9) and rolled <= budget[i]
        if at.any() and rolled < budget[i]:
            assert tokens[i] - spent < cost[at].min() * (1 + 1e-6)
        if mode != "random":
            alone = allocate_prefixes(
                alpha[at], beta[at], outcome[at], np.arange(at.sum()), int(budget[i]), tokens=float(tokens[i]),
                **kwargs | {"cost": cost[at]},
            )  # fmt: skip
            np.testing.assert_array_equal(alone, counts[at])


def test_tokens_that_do_not_bind_change_nothing_and_need_costs():
    rng = np.random.default_rng(0)
    alpha, beta = rng.uniform(0.1, 5, (2, 9))
    arguments = (alpha, beta, np.ones(9), np.arange(9), 7)
    cost = rng.uniform(1, 9, 9)
    free = allocate_prefixes(*arguments, cost=cost, rng=np.random.default_rng(1))
    rich = allocate_prefixes(*arguments, cost=cost, tokens=1e6, rng=np.random.default_rng(1))
    np.testing.assert_array_equal(free, rich)
    with pytest.raises(ValueError, match="a budget of tokens needs `cost`"):
        allocate_prefixes(*arguments, tokens=5.0, rng=rng)
    with pytest.raises(ValueError, match="tokens must be 1 finite numbers"):
        allocate_prefixes(*arguments, tokens=-1.0, cost=cost, rng=rng)


# What `trace` makes of it.


def test_a_budget_of_tokens_is_spent_to_within_one_rollout():
    world, method = LengthWorld(noise=0.0), allocator(token_budget=4000.0, prefix_mode="none")
    rng = np.random.default_rng(0)
    forest = replay(world, method, 400, rng)
    assert forest.ledger.root_rollouts == 400  # nothing is known of costs yet
    method.update(forest)
    for _ in range(3):
        trees = [world.open(int(p)) for p in world.draw(rng, 100)]
        counts = method.allocate_roots(trees, 400, rng)
        cost = method.charges.costs.predict(trees, [t.root for t in trees])
        assert 4000 - cost.max() < cost @ counts <= 4000 * (1 + 1e-9)
        assert method.allocate_roots(trees, 400 - counts.sum(), rng, 1).tolist() == [0] * 100
        method.update(replay(world, method, 400, rng))


def test_waves_share_a_budget_of_tokens():
    world, rng = LengthWorld(), np.random.default_rng(0)
    charges = allocator(token_budget=4000.0, prefix_mode="none").charges
    charges.costs.update(forests(world, 1)[0])
    trees = [world.open(i) for i in range(100)]
    cost = charges.costs.predict(trees, [t.root for t in trees])
    table = ROOT_VALUES["uniform"].table(np.ones(100), np.ones(100), 8)
    bounds = {"m_min": 4, "m_max": 8, "explore": 0.1, "last_sampled": np.zeros(100), "rng": rng}
    waves = [
        float(cost @ charges.spend_roots(trees, table, 300, first=left == 3, share=1 / left, **bounds))
        for left in (3, 2, 1)
    ]
    assert sum(waves) <= 4000 * (1 + 1e-9) and sum(waves) > 4000 - cost.max()
    assert max(waves) - min(waves) < 2 * cost.max()
    # Nothing is left for a fourth, and that is no reason to warn.
    assert not charges.spend_roots(trees, table, 300, first=False, **bounds).any()


def test_roots_and_continuations_share_a_budget_of_tokens():
    world, method = LengthWorld(dim=6), allocator(token_budget=4000.0, prefix_mode="exact", cap_per_rollout=None)
    rng = np.random.default_rng(0)
    generated = []
    for _ in range(12):
        forest = replay(world, method, 400, rng)
        report = method.update(forest)
        generated.append(forest.ledger.generated_tokens)
        rollouts = forest.ledger.root_rollouts + forest.ledger.continuations
        assert rollouts + forest.ledger.unspent == 400
    assert forest.ledger.continuations > 0 and forest.ledger.root_waves == 1
    assert np.mean(generated[4:]) == pytest.approx(4000, rel=0.1)
    assert report["cost/error"] < 0.6


def test_a_budget_below_one_group_is_raised_to_one_and_logged(caplog):
    world, method = LengthWorld(), allocator(token_budget=5.0, prefix_mode="none")
    rng = np.random.default_rng(0)
    method.update(replay(world, method, 40, rng))
    forest = replay(world, method, 40, rng)
    assert forest.ledger.root_rollouts == 4 and forest.ledger.unspent == 36
    assert "raise token_budget or lower m_min" in caplog.text


def test_cost_aware_roots_go_to_the_shorter_of_equal_prompts():
    world = LengthWorld(dim=6, prompts=2000)
    shares = {}
    for aware, roots in ((False, True), (True, True), (True, False)):
        config = {"cost_aware": aware, "cost_aware_roots": roots, "root_value": "uniform", "explore": 0.0}
        method, rng = allocator(**config), np.random.default_rng(0)
        for _ in range(6):
            forest = replay(world, method, 96, rng)
            method.update(forest)
        shares[aware, roots] = np.mean([world.length(int(t.key)) for t in forest])
        first = next(iter(forest))
        assert (method.charges.prefix_costs(first, [first.root]) is not None) == aware
    assert shares[True, True] < 0.7 * shares[False, True]
    assert shares[True, False] == pytest.approx(shares[False, True], rel=0.1)


def test_the_costs_are_checkpointed_with_the_method():
    world, rng = LengthWorld(dim=3), np.random.default_rng(0)
    one, two = allocator(token_budget=900.0), allocator(token_budget=900.0)
    one.update(replay(world, one, 96, rng))
    two.load_state_dict(one.state_dict())
    forests = [replay(world, m, 96, np.random.default_rng(5)) for m in (one, two)]
    assert forests[0].ledger.counts() == forests[1].ledger.counts()
    assert [t.key for t in forests[0]] == [t.key for t in forests[1]]


# Loss weights.


def test_loss_weights_are_off_by_default_and_inverse_to_the_chance_under_ips():
    world = LengthWorld()
    plain = replay(world, allocator(), 96, np.random.default_rng(0))
    assert {t.loss_weight for t in plain} == {1.0}
    method = allocator(reweight="ips", explore=0.2)
    forest = replay(world, method, 96, np.random.default_rng(0))
    # Nothing is known and all prompts are new: each is chosen with the same chance, so all weights are near one.
    weights = np.array([t.loss_weight for t in forest])
    assert weights.mean() == pytest.approx(1.0, abs=0.25) and (weights > 0).all()
    report = method.update(forest)
    assert report["reweight/max_weight"] == weights.max()
    assert 0.5 * len(forest) < report["reweight/effective_prompts"] <= len(forest)


def test_clipped_weights_have_mean_one_and_work_without_exploration():
    method = allocator(reweight="clipped", explore=0.0, reweight_clip=2.0)
    for seed in range(3):
        forest = replay(LengthWorld(prompts=40), method, 96, np.random.default_rng(seed))
        weights = np.array([t.loss_weight for t in forest])
        assert weights.mean() == pytest.approx(1.0) and (weights > 0).all()
        method.update(forest)


def test_precision_weights_are_inverse_to_expected_tokens_and_have_mean_one():
    world, rng = LengthWorld(dim=3), np.random.default_rng(0)
    method = allocator(weighting="precision")
    first = replay(world, method, 96, rng)
    assert {t.loss_weight for t in first} == {1.0}, "nothing is known of costs yet"
    method.update(first)
    forest = replay(world, method, 96, rng)
    weights = np.array([t.loss_weight for t in forest])
    expected = 1 / method.charges.costs.predict(list(forest), [t.root for t in forest])
    np.testing.assert_allclose(weights, expected / expected.mean())
    assert np.ptp(weights) > 0.1


def test_reweighting_leaves_the_allocation_alone():
    trees = [LengthWorld().open(i) for i in range(40)]
    plain, weighted = (
        allocator(reweight=name).allocate_roots(trees, 64, np.random.default_rng(3)) for name in ("none", "ips")
    )
    np.testing.assert_array_equal(plain, weighted)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"reweight": "ips", "explore": 0.0}, "needs explore > 0"),
        ({"reweight": "maybe"}, "unknown reweight 'maybe'; known: none, clipped, ips"),
        ({"reweight_clip": 0.0}, "reweight_clip must be positive"),
        ({"inclusion_draws": 0}, "inclusion_draws must be at least 1"),
        ({"token_budget": 0.0}, "token_budget must be None or a positive"),
        ({"token_budget": float("inf")}, "token_budget must be None or a positive"),
    ],
)
def test_settings_out_of_range_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        TraceConfig(**setting)
