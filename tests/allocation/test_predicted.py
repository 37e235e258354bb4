import logging
import re

import numpy as np
import pytest
from bit_env import DepthPredictor, bit_vector, run

from allocation import TraceAllocator, TraceConfig, Tree, TreeAllocationWrapper, UniformAllocator, make_predictor
from allocation.beliefs import KAPPA_BOUNDS, fit_kappa
from allocation.methods.predicted import START_KAPPA, PredictedAllocator
from allocation.predictors import CountsPredictor, EnsemblePredictor


class Broken(DepthPredictor):
    """Fails in one way."""

    def __init__(self, how):
        self.how = how

    @property
    def ready(self):
        if self.how == "ready":
            raise RuntimeError("no idea")
        return True

    def predict(self, anchors):
        good = super().predict(anchors) if len(anchors) else np.zeros(0)
        if self.how == "predict":
            raise ZeroDivisionError("oops")
        if self.how == "nan":
            good[-1] = np.nan
        if self.how == "above":
            good[0] = 1.5
        if self.how == "shape":
            return good[:, None]
        if self.how == "words":
            return ["likely"] * len(anchors)
        return good

    def update(self, anchors, values, weights):
        if self.how == "update":
            raise ValueError("cannot")
        return {}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("ready", "RuntimeError: no idea"),
        ("predict", "ZeroDivisionError: oops"),
        ("nan", "gave nan for node"),
        ("above", "gave 1.5 for node"),
        ("shape", r"shape \(\d+, 1\)"),
        ("words", "ValueError"),
        ("update", "could not learn .ValueError: cannot"),
    ],
)
def test_a_predictor_that_fails_never_stops_a_batch(how, said, caplog):
    allocator = TraceAllocator(Broken(how), TraceConfig(continuations=1.0))
    with caplog.at_level(logging.WARNING):
        forest = run(TreeAllocationWrapper(bit_vector(4), allocator=allocator, budget=24))
        report = allocator.update(forest)
    ledger = forest.ledger
    assert ledger.root_rollouts + ledger.continuations + ledger.unspent == 24 and "predictor/kappa" in report
    assert allocator.fallbacks > 0 and (ledger.fallbacks > 0 or how == "update")
    assert any(re.search(said, r.message) for r in caplog.records)
    assert all("allocating uniformly instead" in r.message for r in caplog.records)


def flat_tree(index, ends, continued=()):
    """Root rollouts of two turns with the given ends; from the first one's prefix continuations with others."""
    tree = Tree(f"q{index}", index, "prompt")
    for rollout, good in enumerate(ends):
        first = tree.add(tree.root, rollout, "root")
        tree.add(first, rollout, "root", terminated=True, is_correct=good)
    for extra, good in enumerate(continued):
        tree.add(tree.nodes[1], len(ends) + extra, "continuation", terminated=True, is_correct=good)
    return tree


class Told(DepthPredictor):
    """Says what it was told about roots and prefixes."""

    def __init__(self, root, prefix):
        self.values = (root, prefix)

    def predict(self, anchors):
        return np.array([self.values[a.depth > 0] for a in anchors])


def test_each_weight_is_fitted_on_outcomes_that_no_choice_depended_on():
    trees = [flat_tree(i, [True, True, True, False], [True, True, i > 0]) for i in range(3)]
    allocator = PredictedAllocator(Told(0.75, 0.9))
    allocator.update(trees)
    at_root, at_prefix = (
        fit_kappa([0.75] * 3, [3] * 3, [1] * 3),
        fit_kappa([0.9] * 3, [2, 3, 3], [1, 0, 0]),
    )
    assert allocator.kappa == pytest.approx(START_KAPPA**0.8 * at_root**0.2)
    assert allocator.prefix_kappa == pytest.approx(START_KAPPA**0.8 * at_prefix**0.2)


def test_each_weight_shrinks_where_its_own_predictions_are_no_better_than_the_mean():
    trees = [flat_tree(i, [True, True, True, False]) for i in range(3)]
    allocator = PredictedAllocator(Told(0.1, 0.7))
    allocator.update(trees)
    assert allocator.kappa == START_KAPPA / 2 and allocator.prefix_kappa == START_KAPPA, (
        "no continuations to learn from"
    )
    fixed = PredictedAllocator(Told(0.1, 0.7), kappa=7.0)
    fixed.update(trees)
    assert fixed.kappa == fixed.prefix_kappa == 7.0
    again = PredictedAllocator(Told(0.1, 0.7))
    again.load_state_dict(allocator.state_dict())
    assert (again.kappa, again.prefix_kappa) == (allocator.kappa, allocator.prefix_kappa)


def test_an_ensemble_weighs_each_prediction_by_agreement():
    ensemble = EnsemblePredictor([Told(0.5, 0.3), Told(0.5, 0.6)])
    trees = [flat_tree(0, [True])]
    nodes = [trees[0].root, trees[0].nodes[1]]
    predicted, kappa = PredictedAllocator(ensemble).predict_with_kappa(trees * 2, nodes)
    assert predicted.tolist() == pytest.approx([0.5, 0.45])
    assert kappa.tolist() == pytest.approx([KAPPA_BOUNDS[1], 0.45 * 0.55 / 0.15**2 - 1])
    assert PredictedAllocator(ensemble, kappa=9.0).predict_with_kappa(trees * 2, nodes)[1].tolist() == [9.0, 9.0]
    single = PredictedAllocator(Told(0.5, 0.3))
    single.kappa, single.prefix_kappa = 2.0, 3.0
    assert single.predict_with_kappa(trees * 2, nodes)[1].tolist() == [2.0, 3.0]


def test_outcomes_of_the_same_tree_are_shown_on_request_only():
    tree = flat_tree(0, [True, False, False])
    nodes = [tree.root, tree.nodes[1]]
    blind, seeing = (PredictedAllocator(CountsPredictor(), tree_outcomes=on) for on in (False, True))
    for allocator in (blind, seeing):
        allocator.predictor.update([None], np.ones(1), np.ones(1))
    assert blind.predict([tree] * 2, nodes).tolist() == [0.5, 0.5]
    assert seeing.predict([tree] * 2, nodes).tolist() == [0.5, 1 / 4]


def test_the_report_has_figures_by_depth():
    forest = run(TreeAllocationWrapper(bit_vector(4), allocator=UniformAllocator(8), budget=96), seed=0)
    allocator = TraceAllocator(make_predictor("hidden_state"), TraceConfig())
    for _ in range(4):
        report = allocator.update(forest)
    names = {"predictor/skill", "predictor/auc", "predictor/ece", "predictor/skill/depth_0", "predictor/skill/depth_1"}
    assert names <= set(report) and report["predictor/age_of_roots"] == pytest.approx(1.5, abs=0.1)
    assert all(np.isfinite(v) for v in report.values())


def test_a_deep_tree_is_no_deep_recursion():
    tree = Tree("deep", 0, "prompt")
    node = tree.root
    for _ in range(3000):
        node = tree.add(node, 0, "root")
    allocator = PredictedAllocator(make_predictor("text"))
    allocator.predict([tree], [node])
    assert node.predicted is not None
