import numpy as np
import pytest
from bit_env import DepthPredictor, bit_vector, run
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation import (
    ALLOCATORS,
    HiddenStatePredictor,
    TraceAllocator,
    TraceConfig,
    Tree,
    TreeAllocationWrapper,
    UniformAllocator,
    make_allocator,
)
from allocation.predictor import training_set


def prompts(n):
    return [Tree(f"t{i}", i, "prompt", {"max_turns": 4}) for i in range(n)]


class Values(DepthPredictor):
    """Predicts a given value at each prompt, in order, and another at every prefix."""

    def __init__(self, roots, prefix=0.5):
        self.roots, self.prefix = np.asarray(roots, dtype=float), prefix

    def predict(self, anchors):
        if anchors and anchors[0].depth == 0:
            return self.roots[: len(anchors)]
        return np.full(len(anchors), self.prefix)


def finished_tree(outcomes, depth=3):
    """Root rollouts of equal length with the given outcomes."""
    tree = Tree("q", 0, "prompt", {"max_turns": depth})
    for number, correct in enumerate(outcomes):
        node = tree.root
        for turn in range(depth):
            node = tree.add(node, number, "root", terminated=turn == depth - 1)
        node.is_correct, node.reward = bool(correct), float(correct)
    return tree


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_uniform_divides_evenly(budget, group, seed):
    allocator = UniformAllocator(group)
    n = allocator.pool_size(budget)
    counts = allocator.allocate_roots(prompts(n), budget, np.random.default_rng(seed))
    assert counts.sum() == budget == allocator.root_budget(budget) and np.ptp(counts) <= 1
    assert counts.min() >= min(group, budget)
    assert allocator.prefix_budgets(counts, 0, np.random.default_rng(0)).tolist() == [0] * n
    assert allocator.allocate_prefixes(prompts(1)[0], 3, np.random.default_rng(0)) == []


def test_the_remainder_does_not_favour_the_first_prompt():
    who = {int(UniformAllocator().allocate_roots(prompts(5), 6, np.random.default_rng(s)).argmax()) for s in range(60)}
    assert who == set(range(5))


def test_names():
    assert {make_allocator(name).name for name in ALLOCATORS} == set(ALLOCATORS)
    assert make_allocator("grpo", group_size=3).group_size == 3
    with pytest.raises(ValueError, match=r"unknown allocator 'tracy'; known: grpo, .*trace"):
        make_allocator("tracy")
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        UniformAllocator(0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"root_value": "best"}, r"unknown root_value 'best'; known: .*posterior"),
        ({"prefix_mode": "flop"}, "unknown prefix_mode 'flop'; known: flip, exact, random, entropy, none"),
        ({"prefix_belief": "hope"}, "unknown prefix_belief 'hope'; known: plug_in, posterior"),
        ({"m_min": 1}, "need 2 <= m_min <= m_max, got m_min=1, m_max=16"),
        ({"m_min": 8, "m_max": 4}, "need 2 <= m_min <= m_max, got m_min=8, m_max=4"),
        ({"pool_factor": 0.0}, "pool_factor must be positive, got 0.0"),
        ({"explore": 1.5}, r"explore must lie in \[0, 1\], got 1.5"),
        ({"continuations": -1}, "continuations must not be negative or infinite, got -1"),
        ({"cap_per_rollout": -1}, "cap_per_rollout must be None or not negative, got -1"),
        ({"kappa": 0.0}, "kappa must be None or positive, got 0.0"),
        ({"decay": 0.0}, r"decay must lie in \(0, 1\], got 0.0"),
        ({"decay": 1.1}, r"decay must lie in \(0, 1\], got 1.1"),
    ],
)
def test_settings_out_of_range_are_named_at_once(setting, message):
    with pytest.raises(ValueError, match=message):
        TraceConfig(**setting)


@pytest.mark.parametrize(
    ("budget", "n", "roots", "pool"), [(128, 0.5, 85, 85), (96, 2, 32, 32), (64, 0, 64, 64), (5, 2, 4, 4)]
)
def test_budget_and_pool_of_trace(budget, n, roots, pool):
    allocator = TraceAllocator(DepthPredictor(), TraceConfig(continuations=n))
    assert allocator.root_budget(budget) == roots and allocator.pool_size(budget) == pool
    assert TraceAllocator(DepthPredictor(), TraceConfig(prefix_mode="none")).root_budget(budget) == budget


def test_a_cold_start_ignores_the_predictions():
    predictor = HiddenStatePredictor(0)
    assert not predictor.ready
    allocator = TraceAllocator(predictor, TraceConfig())
    opened = np.zeros(40)
    for seed in range(80):
        trees = prompts(40)
        counts = allocator.allocate_roots(trees, 40, np.random.default_rng(seed))
        assert counts.sum() == 40 and set(counts[counts > 0]) <= set(range(4, 17))
        assert all(0 < t.root.predicted < 1 for t in trees)
        opened += counts > 0
    # Ten of forty at random, 80 times: 20 openings expected of each, with a standard deviation of 3.9.
    assert opened.min() > 4 and opened.max() < 40


def test_the_root_stage_prefers_prompts_near_one_half():
    allocator = TraceAllocator(Values([0.001, 0.5, 0.999, 0.45, 0.002, 0.998]), TraceConfig(explore=0.0, kappa=500.0))
    counts = allocator.allocate_roots(prompts(6), 16, np.random.default_rng(0))
    assert counts.sum() == 16 and (counts[[1, 3]] > 0).all() and counts[[0, 2, 4, 5]].sum() == 0


def test_a_flip_is_sought_where_it_is_likely():
    # A success and a failure; both are believed to be nearly certain failures, so only the success is likely to flip.
    allocator = TraceAllocator(Values([], prefix=0.05), TraceConfig(kappa=50.0, cap_per_rollout=None))
    tree = finished_tree([True, False])
    chosen = allocator.allocate_prefixes(tree, 2, np.random.default_rng(0))
    assert sum(k for _, k in chosen) == 2 and {tree.nodes[i].rollout for i, _ in chosen} == {0}
    assert all(n.predicted == 0.05 for n in tree.nodes if n.depth and not n.terminal)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 20),
    st.sampled_from(["flip", "exact", "random", "none"]),
    st.sampled_from([None, 1, 4]),
)
def test_the_prefix_stage_stays_inside_and_within_its_caps(outcomes, depth, budget, mode, cap):
    allocator = TraceAllocator(DepthPredictor(), TraceConfig(prefix_mode=mode, cap_per_rollout=cap))
    tree = finished_tree(outcomes, depth)
    chosen = allocator.allocate_prefixes(tree, budget, np.random.default_rng(0))
    spent = np.zeros(len(outcomes))
    for i, k in chosen:
        node = tree.nodes[i]
        assert k > 0 and 0 < node.depth < depth and not node.terminal
        spent[node.rollout] += k
    possible = 0 if mode == "none" or depth == 1 else budget if cap is None else min(budget, cap * len(outcomes))
    assert spent.sum() == possible and (cap is None or spent.max(initial=0) <= cap)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.integers(2, 5),
    st.integers(1, 20),
    st.sampled_from(["exact", "random"]),
    st.sampled_from(["plug_in", "posterior"]),
    st.integers(0, 1000),
)
def test_only_flip_looks_at_outcomes(outcomes, depth, budget, mode, belief, seed):
    config = TraceConfig(prefix_mode=mode, prefix_belief=belief, cap_per_rollout=None)
    allocator = TraceAllocator(DepthPredictor(), config)
    seen, flipped = (
        allocator.allocate_prefixes(finished_tree(o, depth), budget, np.random.default_rng(seed))
        for o in (outcomes, [not x for x in outcomes])
    )
    assert seen == flipped


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=30), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_prefix_budgets_sum_and_follow_the_root_counts(counts, total, seed):
    counts = np.array(counts)
    budgets = TraceAllocator(DepthPredictor()).prefix_budgets(counts, total, np.random.default_rng(seed))
    assert budgets.sum() == total and (budgets >= 0).all()
    assert (np.abs(budgets - counts * total / counts.sum()) < 1 + 1e-6).all()


def test_outcomes_of_root_rollouts_become_beliefs():
    allocator = TraceAllocator(DepthPredictor(), TraceConfig(continuations=1.0, decay=0.5, cap_per_rollout=None))
    forest = run(TreeAllocationWrapper(bit_vector(4), allocator=allocator, budget=24), seed=5)
    assert allocator.beliefs.counts(forest.trees[0].key) == (0.0, 0.0)
    report = allocator.update(forest)
    assert {"predictor/brier", "predictor/skill", "predictor/kappa"} <= set(report)
    for tree in forest:
        s, f = tree.outcome_counts("root")
        assert allocator.beliefs.counts(tree.key) == (s / 2, f / 2)
    assert any(tree.outcome_counts() != tree.outcome_counts("root") for tree in forest)


def test_an_allocator_continues_from_its_state():
    def make():
        return TraceAllocator(HiddenStatePredictor(0, warmup_roots=1), TraceConfig(continuations=1.0))

    first, second = make(), make()
    envs = TreeAllocationWrapper(bit_vector(4), allocator=first, budget=24)
    first.update(run(envs, seed=0))
    second.load_state_dict(first.state_dict())
    forest = run(envs, seed=1)
    assert first.update(forest) == second.update(forest)
    trees = prompts(20)
    same = [a.allocate_roots(trees, 24, np.random.default_rng(3)).tolist() for a in (first, second)]
    assert same[0] == same[1] and first.kappa == second.kappa


def test_a_fixed_kappa_stays_and_a_free_one_moves():
    fixed, free = (TraceAllocator(HiddenStatePredictor(0, warmup_roots=1), TraceConfig(kappa=k)) for k in (7.0, None))
    for seed in range(3):
        forest = run(TreeAllocationWrapper(bit_vector(4), allocator=fixed, budget=24), seed=seed)
        fixed.update(forest)
        free.update(forest)
    assert fixed.kappa == 7.0 and free.kappa != 4.0 and 0.5 <= free.kappa <= 100


class Sure(DepthPredictor):
    """Nearly certain about every anchor of a forest, and right or wrong as asked."""

    def __init__(self, forest, right):
        self.predicted = [0.99 if (value > 0.5) == right else 0.01 for _, _, value, _ in training_set(forest)]

    def predict(self, anchors):
        return np.array(self.predicted)


def test_kappa_shrinks_while_predictions_do_not_beat_the_running_mean():
    forest = run(TreeAllocationWrapper(bit_vector(4), allocator=UniformAllocator(8), budget=48), seed=0)
    wrong, fixed = (TraceAllocator(Sure(forest, False), TraceConfig(kappa=k)) for k in (None, 4.0))
    kappas = []
    for _ in range(5):
        assert wrong.update(forest)["predictor/skill"] < 0
        fixed.update(forest)
        kappas.append(wrong.kappa)
    assert kappas == [2.0, 1.0, 0.5, 0.5, 0.5] and fixed.kappa == 4.0
    assert wrong.prefix_kappa == 0.5
    # Certain of roots whose rate is near one half it is worse than the mean, not so at prefixes.
    right = TraceAllocator(Sure(forest, True), TraceConfig(kappa=None))
    assert right.update(forest)["predictor/skill"] > 0 and right.prefix_kappa == 4.0
