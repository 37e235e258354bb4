"""The arena's means, intervals and budgets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_record import TinyPolicy, record

from benchmarks.arena_check import bars
from benchmarks.arena_runs import PAIR_DEPTHS
from benchmarks.arena_show import Result
from benchmarks.arena_stats import METRICS, Interval, Sample, equal_token_budget, gate_interval

NAMES = (
    *(
        "rollouts",
        "tokens",
        "ratio_roots",
        "ratio_tree",
        "expected_ratio",
        "pairs",
        "root_regret",
        "prefix_regret",
        "along",
    ),
    *(
        "along2",
        "norm2",
        "cosine",
        "auc_roots",
        "auc_prefixes",
        "repeats",
        "unspent",
        "stopped",
        "filtered",
        "fallbacks",
    ),
    *(f"pairs_{d}" for d in range(PAIR_DEPTHS)),
)


def figures(rng, seeds=12, forests=4, **given):
    found = {name: rng.random((seeds, forests)) for name in NAMES} | {"tokens": np.full((seeds, forests), 500.0)}
    found |= {name: value + 0.01 * rng.normal(size=(seeds, forests)) for name, value in given.items()}
    return found | {"along2": found["along"] ** 2}


def test_every_metric_of_equal_figures_has_an_interval_of_no_width():
    constant = {name: np.full((3, 2), 2.0) for name in NAMES} | {"along2": np.full((3, 2), 4.0)}
    constant["norm2"] = np.full((3, 2), 8.0)
    sample = Sample(constant)
    for name in METRICS:
        interval = sample.interval(name)
        assert interval.low == interval.mean == interval.high, name
    assert sample.interval("pairs_per_1k").mean == 1000.0
    assert sample.interval("snr").mean == 1.0
    assert sample.interval("snr_per_1k").mean == 500.0


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        offset = rng.normal(size=(16, 1))  # forests of a seed have something in common
        x = figures(rng, 16, 3) | {"cosine": offset + 0.1 * rng.normal(size=(16, 3))}
        interval = Sample(x).interval("cosine")
        hits += interval.low <= 0 <= interval.high
    assert 170 <= hits <= 199


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(1)
    noisy = 10 * rng.normal(size=(8, 1)) + np.zeros((8, 4))
    one = Sample(figures(rng, 8) | {"cosine": noisy + 0.5})
    two = Sample(figures(rng, 8) | {"cosine": noisy})
    difference = one.minus(two, "cosine")
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert one.interval("cosine").high - one.interval("cosine").low > 5
    double = Sample(figures(rng, 8) | {"cosine": 2 * (noisy + 0.5)})
    assert double.over(one, "cosine").low == pytest.approx(2) == double.over(one, "cosine").high
    with pytest.raises(ValueError, match="same seeds"):
        one.minus(Sample(figures(rng, 9)), "cosine")


def test_what_cannot_be_measured_is_left_out():
    x = figures(np.random.default_rng(2), 3, 2)
    x["auc_roots"] = np.array([[0.6, np.nan], [np.nan, np.nan], [0.8, 0.8]])
    assert Sample(x).interval("auc_roots").mean == pytest.approx(0.7)
    x["auc_roots"] = np.full((3, 2), np.nan)
    assert np.isnan(Sample(x).interval("auc_roots").mean)


@given(st.floats(1, 50), st.floats(-200, 400), st.integers(8, 200), st.floats(1000, 20_000))
def test_equal_token_budget_is_found_where_tokens_grow_nearly_in_proportion(slope, offset, start, target):
    tokens = lambda budget: max(slope * budget + offset, 1.0)  # noqa: E731
    budget = equal_token_budget(tokens, start, target, steps=30)
    # No budget of whole rollouts may be nearer than half of a rollout.
    assert abs(tokens(budget) - target) <= max(0.02 * target, slope) + 1e-6


def test_equal_token_budget_asks_no_budget_twice_and_keeps_one_that_is_near_enough():
    asked = []

    def tokens(budget):
        asked.append(budget)
        return 10.0 * budget

    assert equal_token_budget(tokens, 64, 643.0) == 64 and asked == [64]
    assert equal_token_budget(tokens, 64, 320.0) == 32 and asked == [64, 64, 32]


def result(method, world="w", comparison="tokens", **given):
    rng = np.random.default_rng(sum(method.encode()))
    return Result(world, comparison, method, "grpo", 8, figures(rng, **given), 1)


def test_bars_hold_only_with_the_ratio_and_without_overlap():
    signal = {"cosine": 0.3, "along": 1.0, "norm2": 9.0}
    strong = {"cosine": 0.5, "along": 1.0, "norm2": 3.0}
    good = [
        result("grpo", ratio_tree=0.3, **signal),
        result("trace", ratio_tree=0.6, **signal),
        result("trace_plus", ratio_tree=0.6, **strong),
        result("oracle", ratio_tree=0.6, **{**strong, "cosine": 0.9}),
    ]
    assert all(bar.holds for bar in bars(good))
    assert not bars([result("grpo", ratio_tree=0.4, **signal), *good[1:]])[0].holds
    rival = [*good, result("pcl", ratio_tree=0.5, cosine=0.52, along=1.1, norm2=3.0)]
    assert sum(not bar.holds for bar in bars(rival)) == 2
    easy = [result("grpo", ratio_tree=0.7, **signal), *good[1:]]
    assert "not judged" in next(bar for bar in bars(easy) if not bar.holds).text
    assert not all(bar.holds for bar in bars(good[:2]))


def test_the_gate_is_that_of_the_record_with_an_interval_over_prompts():
    dense = record(TinyPolicy(2, prompts=24), spines=12, continuations=6)
    gate, interval = dense.gate(), gate_interval(dense)
    assert interval.mean == pytest.approx(gate.while_root_is_not_mid)
    assert interval.low < interval.mean < interval.high
    # Spines of a prompt are alike: the interval is wider than one that takes them for independent.
    assert interval.high - interval.low > gate.interval[1] - gate.interval[0]


def test_above_means_without_overlap():
    assert Interval(2, 1.5, 2.5).above(Interval(1, 0.5, 1.4))
    assert not Interval(2, 1.5, 2.5).above(Interval(1, 0.5, 1.5))
