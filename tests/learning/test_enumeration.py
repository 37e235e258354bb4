"""The expected update of the learner is the exact gradient, over all forests that there are.

Nothing is derived again here: the trees come from `TreeAllocationWrapper` with real allocators, and the gradient is what
`Learner.update` hands to its optimiser, in float64. What is biased is recorded in test_enumeration_bias.py.
"""

import itertools

import numpy as np
import pytest
import torch
from enumeration import Exact, Forests, tiny_model
from enumeration_rules import PAIR, SLIPS, STOPS, THREE, TWO, exact, forests
from enumeration_world import Odometer

from agents.advantages import ESTIMATORS
from allocation.methods.uniform import UniformAllocator

TOLERANCE = 1e-10

layouts = pytest.mark.parametrize("layout", ["flat", "packed"])

EXOGENOUS = [
    (TWO, "grpo"),
    (TWO, "random"),
    (TWO, "by the past"),
    (SLIPS, "treepo"),
    (THREE, "random"),
    (THREE, "tree_grpo"),
    (PAIR, "grpo, groups of two"),
]
ANY = [
    (TWO, "flip"),
    (TWO, "flip, capped"),
    (TWO, "flip after two root waves"),
    (TWO, "reinforce_ada"),
    (THREE, "flip"),
    (THREE, "flip in two waves"),
    (THREE, "exact, other predictions"),
    (THREE, "arpo"),
    (SLIPS, "flip, posterior"),
    (PAIR, "flip at pairs"),
]
VARYING = [(STOPS, "by the past"), (STOPS, "random"), (STOPS, "flip"), (STOPS, "flip in two waves")]
"""Paths are not equally long there, so the length of the step is random and only what it multiplies can be exact."""


def check(found, expected):
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def test_the_odometer_meets_every_sequence_once():
    odometer = Odometer()

    def procedure():
        first = odometer.pick([0.25, 0.75])
        return (first, odometer.pick([0.2, 0.3, 0.5])) if first else (first,)

    met = list(odometer.runs(procedure))
    assert met == [(0.25, (0,)), (0.75 * 0.2, (1, 0)), (0.75 * 0.3, (1, 1)), (0.75 * 0.5, (1, 2))]


def test_every_forest_is_met_once_with_its_probability():
    found = forests(TWO, "grpo")
    assert found.probability.sum() == pytest.approx(1, abs=1e-12)
    seen = {
        tuple(n.action for n in sorted(f.trees[0].nodes[1:], key=lambda n: (n.rollout, n.depth))) for f in found.forests
    }
    assert seen == set(itertools.product("01", repeat=6))
    for forest, probability in zip(found.forests, found.probability, strict=True):
        logprobs = [n.sample.logprobs[0] for n in forest.trees[0].nodes[1:]]
        assert probability == pytest.approx(np.exp(sum(logprobs)), rel=1e-12)


def test_the_gradients_of_values_by_finite_differences():
    """A check of the truth itself."""
    truth = exact(SLIPS)
    direction = np.random.default_rng(0).normal(size=truth.value_gradient.shape[1])
    model, step = tiny_model(), 1e-6
    at = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    ends = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(at + sign * step * torch.from_numpy(direction), model.parameters())
        ends.append(Exact(SLIPS, model).value)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(truth.value_gradient @ direction, rel=1e-6)


@layouts
@pytest.mark.parametrize(("world", "rule"), EXOGENOUS)
def test_tree_is_unbiased_under_exogenous_allocation(world, rule, layout):
    found = forests(world, rule)
    check(world.turns * found.expected_update("tree", layout=layout), found.gradient)


@layouts
@pytest.mark.parametrize(("world", "rule"), EXOGENOUS + ANY)
def test_two_phase_has_its_stated_expectation_under_any_allocation(world, rule, layout):
    found = forests(world, rule)
    update = world.turns * found.expected_update("two_phase", layout=layout, two_phase_beta=0.5)
    check(update, found.gradient + found.restarts(0.5))


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("world", "rule"), EXOGENOUS + ANY + VARYING)
def test_two_phase_at_any_beta(world, rule, beta):
    found = forests(world, rule)
    check(found.expected_scores("two_phase", two_phase_beta=beta), found.gradient + found.restarts(beta))


def test_tree_where_paths_are_not_equally_long():
    found = forests(STOPS, "by the past")
    check(found.expected_scores("tree"), found.gradient)


@layouts
def test_gae_is_unbiased_with_lambda_1_whatever_the_critic(layout):
    found = forests(THREE, "random")
    check(3 * found.expected_update("gae", layout=layout), found.gradient)
    for seed in range(3):
        values = np.random.default_rng(seed).normal(size=len(found.exact.value))
        check(found.expected_scores("gae", values), found.gradient)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_gae_is_unbiased_with_any_lambda_if_the_critic_is_exact(gae_lambda):
    found = forests(THREE, "random")
    check(found.expected_scores("gae", found.exact.value, gae_lambda=gae_lambda), found.gradient)


@layouts
@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"gae"}))
def test_the_learner_steps_along_what_the_estimators_say(estimator, layout):
    """So the biases of the estimators, which are computed from their credit, are those of the learner."""
    found = forests(THREE, "exact")
    check(3 * found.expected_update(estimator, layout=layout), found.expected_scores(estimator))


@layouts
def test_all_forests_as_one_weighed_batch_are_the_forests_one_by_one(layout):
    found = forests(TWO, "flip")
    together = found.expected_update("tree", layout=layout)
    check(found.expected_update("tree", layout=layout, together=False), together)


@pytest.mark.parametrize("aggregation", ["prompt", "trajectory", "edge", "token"])
def test_aggregations_agree_where_prompts_paths_and_turns_are_alike(aggregation):
    """Without branches, with as many rollouts of each prompt and as many tokens of each turn."""
    found = forests(TWO, "grpo")
    update = found.expected_update("tree", aggregation=aggregation, layout="flat", together=False)
    check(2 * update, found.gradient)


def test_prompts_count_as_their_loss_weights_say():
    found = forests(PAIR, "weighed")
    each = [found.exact.value_gradient[found.exact.index[prompt, ()]] for prompt in (0, 1)]
    # The allocator weighs the trees of a forest in their order.
    first = {f.trees[0].root.observation[0] for f in found.forests}
    assert len(first) == 1
    weights = (2.0, 0.5) if first == {0} else (0.5, 2.0)
    expected = (weights[0] * each[0] + weights[1] * each[1]) / 2
    check(2 * found.expected_update("tree", layout="flat", together=False), expected)


def test_prompts_with_more_rollouts_count_no_more():
    """Five rollouts of two prompts."""
    found = Forests(exact(PAIR), lambda: UniformAllocator(2), 5, range(2))
    assert {tuple(sorted(len(t.root.children) for t in f)) for f in found.forests} == {(2, 3)}
    check(2 * found.expected_update("tree", layout="flat"), found.gradient)
