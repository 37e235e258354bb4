"""What is not exact, and by how much: biases that are known, recorded, and shown in docs/learning.md.

A bias is what the expected estimate lacks to the gradient of J, over all forests that there are. Recorded are its norm against
that of the gradient, and the cosine of the expected estimate with the gradient; the first also counts a mere change of length.
"""

from pathlib import Path

import numpy as np
import pytest
from enumeration_rules import PAIR, STOPS, THREE, TWO, exact, forests

DOCS = Path(__file__).parents[2] / "docs" / "learning.md"
TOLERANCE = 6e-4  # of figures with three decimals

COLUMNS = {
    "no branches": (THREE, "grpo"),
    "`random`": (THREE, "random"),
    "`flip`": (THREE, "flip"),
    "`exact`": (THREE, "exact, other predictions"),
}
ESTIMATES = {
    "`tree`": ("tree", {}),
    "`two_phase`, `two_phase_beta` 0": ("two_phase", {"two_phase_beta": 0.0}),
    "`grpo`": ("grpo", {}),
    "`tree_grpo`": ("tree_grpo", {}),
    "`treepo`": ("treepo", {}),
    "`treerl`": ("treerl", {}),
    "`spo`": ("spo", {}),
    "`gae`, `gae_lambda` 1, a critic of 0": ("gae", {"gae_lambda": 1.0}),
    "`gae`, `gae_lambda` 0.95, a critic of 0": ("gae", {"gae_lambda": 0.95}),
    "`gae`, `gae_lambda` 0.5, a critic of 0": ("gae", {"gae_lambda": 0.5}),
    "`tree`, `advantage_std`": ("tree", {"advantage_std": True}),
    "`grpo`, `advantage_std`": ("grpo", {"advantage_std": True}),
}
RECORDED: dict[str, list[tuple[float, float]]] = {
    "`tree`": [(0.000, 1.000), (0.000, 1.000), (0.294, 0.976), (0.136, 0.991)],
    "`two_phase`, `two_phase_beta` 0": [(0.000, 1.000), (0.000, 1.000), (0.000, 1.000), (0.000, 1.000)],
    "`grpo`": [(0.333, 1.000), (0.367, 0.986), (0.394, 0.974), (0.436, 0.993)],
    "`tree_grpo`": [(0.333, 1.000), (0.329, 0.946), (0.286, 0.960), (0.283, 0.983)],
    "`treepo`": [(0.333, 1.000), (0.612, 0.917), (0.537, 0.940), (0.567, 0.960)],
    "`treerl`": [(0.292, 0.959), (0.334, 0.947), (0.224, 0.980), (0.355, 0.994)],
    "`spo`": [(0.853, 0.592), (0.596, 0.914), (0.712, 0.952), (0.862, 0.645)],
    "`gae`, `gae_lambda` 1, a critic of 0": [(0.000, 1.000), (0.000, 1.000), (0.157, 0.988), (0.130, 0.993)],
    "`gae`, `gae_lambda` 0.95, a critic of 0": [(0.023, 1.000), (0.023, 1.000), (0.157, 0.988), (0.126, 0.992)],
    "`gae`, `gae_lambda` 0.5, a critic of 0": [(0.152, 0.990), (0.152, 0.990), (0.177, 0.985), (0.134, 0.992)],
    "`tree`, `advantage_std`": [(0.235, 0.992), (2.770, 0.901), (2.243, 0.925), (0.554, 0.991)],
    "`grpo`, `advantage_std`": [(0.234, 0.992), (0.266, 0.986), (0.285, 0.980), (0.329, 0.997)],
}
"""Bias and cosine in the order of `COLUMNS`."""

OTHER = {
    "`random`, where some episodes end early": (STOPS, "random"),
    "`exact`, by other predictions": (THREE, "exact"),
    "`flip` in two waves": (THREE, "flip in two waves"),
    "`arpo`": (THREE, "arpo"),
    "`reinforce_ada`": (TWO, "reinforce_ada"),
    "a single root rollout and its continuation": (TWO, "one root rollout"),
}
RECORDED_OTHER: dict[str, tuple[float, float]] = {
    "`random`, where some episodes end early": (0.043, 1.000),
    "`exact`, by other predictions": (0.001, 1.000),
    "`flip` in two waves": (0.356, 0.957),
    "`arpo`": (0.149, 0.991),
    "`reinforce_ada`": (0.758, 0.994),
    "a single root rollout and its continuation": (0.094, 0.996),
}
"""Bias and cosine of `tree`."""


def measured(found, estimate):
    gradient = found.gradient
    bias = np.linalg.norm(estimate - gradient) / np.linalg.norm(gradient)
    return float(bias), float(estimate @ gradient / (np.linalg.norm(estimate) * np.linalg.norm(gradient)))


def expected(name, column):
    found = forests(*COLUMNS[column])
    estimator, config = ESTIMATES[name]
    values = np.zeros(len(found.exact.value)) if estimator == "gae" else None
    return measured(found, found.expected_scores(estimator, values, **config))


def rows():
    """The tables of the documentation."""
    for name, cells in RECORDED.items():
        yield f"| {name} | " + " | ".join(f"{bias:.3f} ({cosine:.3f})" for bias, cosine in cells) + " |"
    for name, (bias, cosine) in RECORDED_OTHER.items():
        yield f"| {name} | {bias:.3f} ({cosine:.3f}) |"


@pytest.mark.parametrize("name", ESTIMATES)
def test_recorded_biases(name):
    got = [expected(name, column) for column in COLUMNS]
    assert got == [pytest.approx(cell, abs=TOLERANCE) for cell in RECORDED[name]]


@pytest.mark.parametrize("name", OTHER)
def test_recorded_biases_of_tree_elsewhere(name):
    found = forests(*OTHER[name])
    assert measured(found, found.expected_scores("tree")) == pytest.approx(RECORDED_OTHER[name], abs=TOLERANCE)


def test_the_documentation_shows_these_figures():
    text = DOCS.read_text()
    assert [row for row in rows() if row not in text] == []


def test_filtering_by_outcomes_biases_any_estimator():
    """DAPO's filter leaves out groups whose verdicts are alike, whatever contrast is in their returns."""
    found = forests(PAIR, "dapo")
    estimate = 2 * found.expected_update("tree", layout="flat", together=False)
    assert measured(found, estimate) == pytest.approx((1.076, 0.194), abs=TOLERANCE)


def test_dividing_by_the_batchs_own_mean_length_biases_where_lengths_differ():
    """Recorded for batches of a single prompt with two to four rollouts, where it is at its largest."""
    found = forests(STOPS, "by the past")
    table = found.table
    length = found.probability @ np.bincount(table.tree, weights=table.weights * table.tokens)
    estimate = length * found.expected_update("tree", layout="flat", together=False)
    assert measured(found, estimate) == pytest.approx((0.231, 0.989), abs=TOLERANCE)


@pytest.mark.parametrize(("rule", "roots"), [("each first prefix", 2), ("each of three first prefixes", 3)])
def test_replicated_edges_shrink_by_their_leaves(rule, roots):
    """An edge that L of N rollouts share counts (N - L)/(N - 1) of one that is its rollout's alone."""
    found, leaves = forests(TWO, rule), 2 * roots
    estimate = found.expected_scores("grpo", by_prefix=True)
    truth = found.expected_scores("tree", by_prefix=True)
    assert np.allclose(truth.sum(0), found.gradient, rtol=0, atol=1e-12)
    for i, (_, history) in enumerate(exact(TWO).world.prefixes):
        shared = 2 if not history else 1
        assert estimate[i] == pytest.approx((leaves - shared) / leaves * truth[i], abs=1e-12)
    first = np.linalg.norm(estimate[0]) / np.linalg.norm(truth[0])
    second = np.linalg.norm(estimate[1]) / np.linalg.norm(truth[1])
    assert first / second == pytest.approx((leaves - 2) / (leaves - 1))


def test_grpo_without_branches_is_the_gradient_but_for_its_length():
    found = forests(THREE, "grpo")
    assert found.expected_scores("grpo") == pytest.approx(2 / 3 * found.gradient, abs=1e-12)


def test_two_phase_with_a_single_root_rollout_has_only_its_restarts():
    """Nothing is left to compare the root rollout with."""
    found = forests(TWO, "one root rollout")
    assert found.expected_scores("two_phase") == pytest.approx(found.restarts(), abs=1e-12)
    assert np.abs(found.expected_scores("two_phase", two_phase_beta=0.0)).max() == 0
