"""Measures of replayed forests against slow, obvious versions."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.arena import measures
from allocation.arena.measures import EdgeScores, gradient_figures
from allocation.tree import Forest, Tree


def random_tree(rng, rollouts=6, turns=4, key="t"):
    """A tree of root rollouts and of continuations from any inner node."""
    tree = Tree(key, 0, None)
    for rollout in range(rollouts):
        inner = [n for n in tree.nodes if not n.terminal and n.children and n.depth < turns]
        node = inner[rng.integers(len(inner))] if inner and rng.random() < 0.6 else tree.root
        origin = "continuation" if node.depth else "root"
        while not node.terminal:
            end = node.depth + 1 == turns or rng.random() < 0.3
            node = tree.add(node, rollout, origin, terminated=end)
        node.is_correct = bool(rng.random() < 0.5)
    tree.num_rollouts = rollouts
    return tree


def pairs_by_enumeration(tree):
    pairs = np.zeros(max(n.depth for n in tree.nodes) + 1, dtype=int)
    for a, b in combinations(tree.leaves(), 2):
        if a.is_correct != b.is_correct:
            shared = {n.id for n in tree.path(a)} & {n.id for n in tree.path(b)}
            pairs[max(tree.nodes[i].depth for i in shared)] += 1
    return pairs


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_pairs_of_contrast_are_those_of_all_pairs_of_leaves(seed, rollouts):
    tree = random_tree(np.random.default_rng(seed), rollouts)
    assert measures.contrast_pairs(tree).tolist() == pairs_by_enumeration(tree).tolist()


@given(st.integers(0, 2**32 - 1))
def test_pairs_of_a_forest_add_up_by_depth(seed):
    rng = np.random.default_rng(seed)
    forest = Forest([random_tree(rng, 5, turns) for turns in (2, 5)])
    total = measures.forest_pairs(forest)
    for depth, count in enumerate(total):
        each = [pairs_by_enumeration(t) for t in forest]
        assert count == sum(p[depth] for p in each if depth < len(p))
    successes = [t.outcome_counts() for t in forest]
    assert total.sum() == sum(s * f for s, f in successes)


def test_the_chance_of_contrast_is_that_of_enumerated_outcomes():
    for v, m in product((0.0, 0.2, 0.5, 1.0), range(5)):
        mixed = 0.0
        for outcome in product((0, 1), repeat=m):
            if 0 < sum(outcome) < m:
                mixed += v ** sum(outcome) * (1 - v) ** (m - sum(outcome))
        assert measures.chance_of_contrast([v], [m])[0] == pytest.approx(mixed, abs=1e-12)


def test_the_expected_ratio_leaves_out_prompts_without_rollouts():
    assert measures.expected_effective_ratio([0.5, 0.5, 0.0], [2, 0, 4]) == pytest.approx(0.25)
    assert measures.expected_effective_ratio([0.5], [0]) == 0.0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=4), st.data())
@settings(max_examples=40)
def test_root_regret_is_the_distance_to_the_best_of_all_allocations(v, data):
    choices = [0, 2, 3, 4]
    counts = data.draw(st.lists(st.sampled_from(choices), min_size=len(v), max_size=len(v)))
    if not sum(counts):
        counts[0] = 2
    value = lambda c: measures.chance_of_contrast(v, c).sum()  # noqa: E731
    best = max(value(c) for c in product(choices, repeat=len(v)) if sum(c) == sum(counts))
    expected = 1 - value(counts) / best if best > 1e-3 else None
    regret = measures.root_regret(v, counts, m_min=2, m_max=4)
    assert 0 <= regret <= 1
    if expected is not None:
        assert regret == pytest.approx(expected, abs=1e-5)


def test_root_regret_never_blames_an_allocation_for_its_own_bounds():
    # Groups of 2 and 20 lie outside of 4 to 16: the best may use them too, and cannot be worse.
    assert measures.root_regret([0.5, 0.5, 0.5], [2, 20, 0]) > 0.1
    assert measures.root_regret([0.5, 0.0], [20, 2]) < 1e-5
    assert measures.root_regret([0.5, 0.2], [0, 0]) == 0.0


def _chain(tree, rollout, outcome, node=None, turns=3):
    origin = "root" if node is None else "continuation"
    node = node or tree.root
    while node.depth < turns:
        node = tree.add(node, rollout, origin, terminated=node.depth + 1 == turns)
    node.is_correct = outcome
    return tree.path(node)


def test_prefix_regret_by_hand():
    tree = Tree("t", 0, None)
    path = _chain(tree, 0, True)
    _chain(tree, 1, False, path[1])
    value = {path[1].id: 0.5, path[2].id: 0.1}
    # One continuation, placed at depth 1: g = 1 - .5; at depth 2 it would have been 1 - .1.
    regret = measures.prefix_regret(Forest([tree]), lambda t, n: value.get(n.id, float("nan")))
    assert regret == pytest.approx(1 - 0.5 / 0.9)
    value = {path[1].id: 0.1, path[2].id: 0.5}
    assert measures.prefix_regret(Forest([tree]), lambda t, n: value.get(n.id, float("nan"))) == pytest.approx(0)


def test_prefix_regret_without_continuations_is_not_a_number():
    tree = Tree("t", 0, None)
    _chain(tree, 0, True)
    assert np.isnan(measures.prefix_regret(Forest([tree]), lambda t, n: 0.5))


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.4, 0.4001, 0.9]), st.integers(0, 8).map(lambda i: i / 8)),
        min_size=1,
        max_size=6,
    )
)
def test_expected_auc_is_the_mean_over_all_pairs_of_a_success_and_a_failure(rows):
    p, v = (np.array(x) for x in zip(*rows, strict=True))
    total, won = v.sum() * (1 - v).sum(), 0.0
    for i, j in product(range(len(p)), repeat=2):
        won += v[i] * (1 - v[j]) * ((p[i] > p[j]) + 0.5 * (p[i] == p[j]))
    if total > 0:
        assert measures.expected_auc(p, v) == pytest.approx(won / total)
    else:
        assert np.isnan(measures.expected_auc(p, v))


def exact_scores(rng, rows=7, dim=5, true=None):
    """Scores that are known in full: their sketch is themselves."""
    full = rng.normal(size=(rows, dim))
    true = rng.normal(size=dim) if true is None else true
    return full, true, EdgeScores(full @ true, (full**2).sum(1), full, float(true @ true))


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_gradient_figures_are_those_of_the_full_gradient(seed, edges):
    rng = np.random.default_rng(seed)
    full, true, scores = exact_scores(rng)
    rows, weights = rng.integers(len(full), size=edges), rng.normal(size=edges)
    estimate = weights @ full[rows]
    figures = gradient_figures(scores, rows, weights)
    assert figures.along == pytest.approx(estimate @ true / np.linalg.norm(true))
    assert figures.norm2 == pytest.approx(estimate @ estimate)
    assert figures.cosine == pytest.approx(figures.along / np.linalg.norm(estimate), abs=1e-9)


def test_a_zero_estimate_has_cosine_zero():
    _, _, scores = exact_scores(np.random.default_rng(0))
    assert gradient_figures(scores, [0, 1], [0.0, 0.0]).cosine == 0.0
    assert gradient_figures(scores, [3, 3], [1.0, -1.0]).norm2 == 0.0


def test_norms_from_sketches_are_unbiased_and_a_single_edge_is_exact():
    rng = np.random.default_rng(1)
    full, _, exact = exact_scores(rng, rows=6, dim=200)
    weights = rng.normal(size=6)
    wanted = gradient_figures(exact, range(6), weights).norm2
    found = []
    for _ in range(400):
        bucket, sign = rng.integers(16, size=200), rng.choice([-1.0, 1.0], size=200)
        sketch = np.array([np.bincount(bucket, weights=sign * s, minlength=16) for s in full])
        scores = EdgeScores(exact.dot, exact.norm2, sketch, exact.true_norm2)
        found.append(gradient_figures(scores, range(6), weights).norm2)
        assert gradient_figures(scores, [2], [3.0]).norm2 == pytest.approx(9 * exact.norm2[2])
    assert abs(np.mean(found) - wanted) < 4 * np.std(found) / np.sqrt(len(found))


def test_cosine_is_freed_of_the_noise_of_the_true_gradient():
    rng = np.random.default_rng(2)
    full, true, exact = exact_scores(rng, rows=30, dim=40)
    weights = (full @ true) / 40 + 0.1 * rng.normal(size=30)
    wanted = gradient_figures(exact, range(30), weights).cosine
    corrected, raw = [], []
    for _ in range(400):
        noisy = true + rng.normal(size=40)
        scores = EdgeScores(full @ noisy, exact.norm2, full, float(true @ true))
        corrected.append(gradient_figures(scores, range(30), weights).cosine)
        raw.append(gradient_figures(EdgeScores(*_raw(scores, noisy)), range(30), weights).cosine)
    assert np.mean(corrected) == pytest.approx(wanted, abs=0.04)
    assert np.mean(raw) < wanted - 0.1


def _raw(scores, noisy):
    return scores.dot, scores.norm2, scores.sketch, float(noisy @ noisy)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(max_examples=25)
def test_signal_to_noise_is_that_of_its_definition(seed, forests):
    rng = np.random.default_rng(seed)
    true = rng.normal(size=3)
    estimates = true + rng.normal(size=(forests, 3))
    along = estimates @ true / np.linalg.norm(true)
    norm2 = (estimates**2).sum(1)
    found = measures.signal_to_noise(along.mean(), (along**2).mean(), norm2.mean(), forests)
    signal = along.mean() ** 2 - along.var(ddof=1) / forests
    assert found == pytest.approx(max(signal, 0) / (norm2.mean() - max(signal, 0)))


def test_signal_to_noise_is_unbiased_in_its_signal_and_has_its_limits():
    assert measures.signal_to_noise(2.0, 4.0, 4.0, 5) == np.inf
    assert measures.signal_to_noise(0.1, 4.0, 4.0, 5) == 0.0
    # Twice the independent rollouts, twice the figure.
    rng = np.random.default_rng(3)
    true = np.array([1.0, 0.0])
    single = true + rng.normal(size=(40_000, 2))

    def snr(x):
        along = x @ true
        return float(measures.signal_to_noise(along.mean(), (along**2).mean(), (x**2).sum(1).mean(), len(x)))

    assert snr(single) == pytest.approx(0.5, rel=0.05)
    assert snr((single[::2] + single[1::2]) / 2) == pytest.approx(1.0, rel=0.05)
