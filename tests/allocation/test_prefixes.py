import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.contrast import exact_contrast, flip_success
from allocation.prefixes import PREFIX_MODES, allocate_prefixes


def total(table, counts):
    return float(table[np.arange(len(counts)), list(counts)].sum())


@st.composite
def prompts(draw, n_max=5):
    n = draw(st.integers(1, n_max))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    alpha, beta = rng.uniform(0.05, 6, (2, n))
    outcome = rng.choice([0.0, 1.0, 0.4], n) if draw(st.booleans()) else rng.integers(0, 2, n).astype(float)
    return alpha, beta, outcome, rng.integers(0, 3, n), draw(st.integers(0, 7))


@settings(max_examples=100, deadline=None)
@given(
    prompts(),
    st.sampled_from(["flip", "exact"]),
    st.sampled_from(["plug_in", "posterior"]),
    st.sampled_from([None, 0, 1, 2, 4]),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
)
def test_unit_greedy_equals_enumeration(prompt, mode, belief, per_rollout, per_prefix, costly):
    alpha, beta, outcome, rollout, budget = prompt
    n = len(alpha)
    cost = np.linspace(1.0, 3.0, n) if costly else None
    counts = allocate_prefixes(
        alpha,
        beta,
        outcome,
        rollout,
        budget,
        mode=mode,
        belief=belief,
        cap_per_rollout=per_rollout,
        cap_per_prefix=per_prefix,
        cost=cost,
        rng=np.random.default_rng(0),
    )
    if mode == "flip":
        table = flip_success(alpha, beta, outcome, budget, belief=belief)
    else:
        table = exact_contrast(alpha, beta, budget, belief=belief)
    table = table / (np.ones(n) if cost is None else cost)[:, None]

    def allowed(c):
        c = np.array(c)
        in_rollout = np.bincount(rollout, weights=c)
        return (per_rollout is None or in_rollout.max() <= per_rollout) and (
            per_prefix is None or c.max() <= per_prefix
        )

    spendable = [c for c in itertools.product(range(budget + 1), repeat=n) if sum(c) <= budget and allowed(c)]
    most = max(sum(c) for c in spendable)
    assert allowed(counts) and counts.sum() == most
    best = max(total(table, c) for c in spendable if sum(c) == most)
    assert total(table, counts) == pytest.approx(best, abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(PREFIX_MODES), st.sampled_from([None, 2, 5]))
def test_prompts_together_equal_prompts_alone(seed, mode, cap):
    rng = np.random.default_rng(seed)
    n, n_prompts = 60, 7
    prompt = rng.integers(0, n_prompts, n)
    budgets = rng.integers(0, 40, n_prompts)
    # Rollout numbers repeat between prompts on purpose.
    alpha, beta, outcome, rollout = *rng.uniform(0.1, 6, (2, n)), rng.integers(0, 2, n), rng.integers(0, 4, n)
    score = rng.choice([0.1, 0.7, 0.3, np.nan], n) + 0.003 * np.arange(n)  # no ties but among those without one
    together = allocate_prefixes(
        alpha, beta, outcome, rollout, budgets, mode=mode, cap_per_rollout=cap, score=score, prompt=prompt, rng=rng
    )
    for p in range(n_prompts):
        own = prompt == p
        alone = allocate_prefixes(
            alpha[own],
            beta[own],
            outcome[own],
            rollout[own],
            int(budgets[p]),
            mode=mode,
            cap_per_rollout=cap,
            score=score[own],
            rng=rng,
        )
        assert together[own].sum() == alone.sum()
        if mode in ("flip", "exact"):
            np.testing.assert_array_equal(together[own], alone)
        if mode == "entropy" and cap is None:
            scored = own & np.isfinite(score)
            np.testing.assert_array_equal(together[scored], alone[np.isfinite(score[own])])


def test_a_long_budget_on_one_prefix_is_spent():
    counts = allocate_prefixes([0.2, 3.0], [3.0, 0.2], [0.0, 0.0], [0, 1], 1000, rng=np.random.default_rng(0))
    assert counts.sum() == 1000
    q = np.array([3.0, 0.2]) / 3.2
    gain_last, gain_next = (1 - q) * q ** (counts - 1.0), (1 - q) * q**counts
    # Exchange argument, up to the rounding that makes ties ties.
    assert gain_last.min() >= gain_next.max() - 1e-11


def test_exact_does_not_look_at_the_outcome():
    rng = np.random.default_rng(0)
    alpha, beta = rng.uniform(0.1, 6, (2, 20))
    a, b = (
        allocate_prefixes(alpha, beta, outcome, np.arange(20), 15, mode="exact", rng=np.random.default_rng(1))
        for outcome in (np.zeros(20), np.ones(20))
    )
    np.testing.assert_array_equal(a, b)


def test_flip_prefers_the_turn_where_a_failure_was_still_a_success():
    counts = allocate_prefixes([9.0, 1.0], [1.0, 9.0], [0.0, 0.0], [0, 0], 1, rng=np.random.default_rng(0))
    assert counts.tolist() == [1, 0]


@pytest.mark.parametrize("mode", ["flip", "exact", "random"])
@pytest.mark.parametrize("v", [0.5, 1e-300])
def test_equal_prefixes_share_fairly(mode, v):
    # v near 0 leaves increments of nothing: they are spent all the same, and not on one prefix.
    runs = [
        allocate_prefixes(
            np.full(10, v), np.full(10, 1.0), np.zeros(10), np.arange(10), 15, mode=mode, rng=np.random.default_rng(s)
        )
        for s in range(400)
    ]
    assert {int(c) for run in runs for c in run} == {1, 2}
    second = np.sum([run == 2 for run in runs], axis=0)
    assert second.min() > 200 - 45 and second.max() < 200 + 45  # standard deviation 10


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.3, -1.0, 2.0, np.nan, -np.inf]), min_size=1, max_size=7),
    st.integers(0, 30),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 1000),
)
def test_entropy_goes_round_by_round_from_the_highest_score(scores, budget, per_rollout, per_prefix, seed):
    n, rng = len(scores), np.random.default_rng(seed)
    rollout = rng.integers(0, 3, n)
    options = {"mode": "entropy", "score": scores, "cap_per_rollout": per_rollout, "cap_per_prefix": per_prefix}
    alpha, beta, cost = rng.uniform(0.1, 6, (3, n))
    counts = allocate_prefixes(alpha, beta, np.zeros(n), rollout, budget, cost=cost, **options, rng=rng)
    # The obvious way, which gives to equals in the order of the index: so compare what each score got, not who.
    order = sorted(range(n), key=lambda i: -(scores[i] if np.isfinite(scores[i]) else -np.inf))
    expected, left = np.zeros(n, dtype=int), budget
    for _ in range(budget if per_prefix is None else per_prefix):
        for i in order:
            if left and (per_rollout is None or expected[rollout == rollout[i]].sum() < per_rollout):
                expected[i] += 1
                left -= 1
    assert counts.sum() == expected.sum()
    of_score = [score if np.isfinite(score) else -np.inf for score in scores]
    if len(set(of_score)) == n:
        assert counts.tolist() == expected.tolist()
    elif per_rollout is None:
        for score in set(of_score):
            mine = np.array(of_score) == score
            assert sorted(counts[mine]) == sorted(expected[mine])


@pytest.mark.parametrize("score", [0.7, np.nan])
def test_equal_scores_are_not_settled_by_the_index(score):
    first = [
        allocate_prefixes(
            *np.ones((2, 4)),
            np.zeros(4),
            np.arange(4),
            1,
            mode="entropy",
            score=[score] * 4,
            rng=np.random.default_rng(s),
        )
        for s in range(400)
    ]
    assert np.sum(first, axis=0).min() > 60  # of 100 expected, with a standard deviation of 9


def test_random_ignores_values_and_costs():
    rng = np.random.default_rng(0)
    runs = [
        allocate_prefixes(
            [9.0, 1.0, 1.0], [1.0, 1.0, 9.0], [0, 1, 0], [0, 1, 2], 1, mode="random", cost=[1, 10, 100], rng=rng
        )
        for _ in range(900)
    ]
    assert np.sum(runs, axis=0).min() > 230


def test_nothing_to_branch_from_is_no_error():
    empty = np.zeros(0)
    assert allocate_prefixes(empty, empty, empty, empty, 8, rng=np.random.default_rng(0)).shape == (0,)
    counts = allocate_prefixes([1.0], [1.0], [1.0], [0], 8, mode="none", rng=np.random.default_rng(0))
    assert counts.tolist() == [0]
    counts = allocate_prefixes([1.0], [1.0], [1.0], [0], [8, 3], prompt=[1], rng=np.random.default_rng(0))
    assert counts.tolist() == [3]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "greedy"}, "known: flip, exact, random, entropy, none"),
        ({"belief": "greedy"}, "known: plug_in, posterior"),
        ({"outcome": [0.0, np.nan]}, r"outcome\[1\]"),
        ({"outcome": [0.0]}, "outcome"),
        ({"alpha": [1.0, np.inf]}, r"alpha\[1\]"),
        ({"budget": -1}, "budget"),
        ({"budget": [1, 2]}, "prompt"),
        ({"budget": 1.5}, "budget"),
        ({"prompt": [0, 3]}, "prompt"),
        ({"cost": [1.0, -1.0]}, r"cost\[1\]"),
        ({"cap_per_rollout": -1}, "cap_per_rollout"),
        ({"mode": "entropy"}, "mode 'entropy' needs a score"),
        ({"mode": "entropy", "score": [1.0]}, "score must have one entry for each of 2 prefixes"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    given_ = {"alpha": [1.0, 2.0], "beta": [1.0, 2.0], "outcome": [0.0, 1.0], "rollout": [0, 1], "budget": 4} | kwargs
    with pytest.raises(ValueError, match=message):
        allocate_prefixes(**given_, rng=np.random.default_rng(0))
