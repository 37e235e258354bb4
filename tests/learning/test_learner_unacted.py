"""Updates from trees in which some rollouts ended because their policy had no action."""

from dataclasses import replace

import numpy as np
import pytest
from echo_env import echo_forest

from agents.advantages import ESTIMATORS
from agents.figures import batch_figures
from agents.learner import Learner
from agents.learner_config import LAYOUTS, LearnerConfig
from agents.policies import TransformersPolicy
from allocation import Forest, Sample

NO_IDS = np.zeros(0, np.int64)


class Unreliable:
    """Another policy that now and then gives no answer; of the first prompt never."""

    def __init__(self, policy, rng):
        self.policy, self.rng = policy, rng

    def act(self, contexts):
        samples = self.policy.act(contexts)
        return [self.passed_on(c, s) for c, s in zip(contexts, samples, strict=True)]

    def passed_on(self, context, sample):
        if context.tree.index and self.rng.random() > 0.1:
            return sample
        return Sample("", NO_IDS, NO_IDS.astype(np.float32), NO_IDS, finish_reason="error", note="gone")


@pytest.fixture(scope="module")
def interrupted(model, tokenizer):
    """A forest in which every way to end occurs. Read only."""
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, max_context=40)
    forest = echo_forest(model, tokenizer, policy=Unreliable(policy, np.random.default_rng(0)), budget=48)
    reasons = [leaf.sample.finish_reason for tree in forest for leaf in tree.leaves()]
    assert reasons.count("context") > 3 and reasons.count("error") > 3
    assert forest.effective_ratio() > 0
    return forest


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_learns_from_what_went_before(make_model, interrupted, estimator, layout):
    model = make_model()
    config = LearnerConfig(estimator=estimator, layout=layout, importance="truncated", lr=1e-3, lr_warmup=0)
    before = [p.detach().clone() for p in model.parameters()]
    update = Learner(model, config, updates=2).update(interrupted)
    assert update.figures["loss/tokens"] > 0 and update.figures["learner/skipped"] == 0
    # The policy has the learner's own weights: what both say of a token differs by rounding alone.
    assert update.figures["drift/max_abs"] < 1e-4
    assert any(not bool((a == b).all()) for a, b in zip(before, model.parameters(), strict=True))


def test_where_no_policy_ever_answered_there_is_nothing_to_learn(make_model, interrupted):
    silent = Forest([interrupted.trees[0]])
    assert {n.sample.finish_reason for n in silent.trees[0].leaves()} == {"error"}
    for estimator in ESTIMATORS:
        model = make_model()
        before = [p.detach().clone() for p in model.parameters()]
        figures = Learner(model, LearnerConfig(estimator=estimator), updates=2).update(silent).figures
        assert figures["loss/tokens"] == figures["learner/skipped"] == 0
        assert all(bool((a == b).all()) for a, b in zip(before, model.parameters(), strict=True))
    assert "policy/version_lag" not in batch_figures(silent, 3)


def test_the_log_says_how_old_the_weights_were_that_sampled(model, tokenizer):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8)
    policy.sync(model, 5)
    forest = echo_forest(model, tokenizer, policy=policy)
    assert batch_figures(forest, 5)["policy/version_lag"] == 0.0
    nodes = [n for tree in forest for n in tree.nodes if n.parent is not None]
    for node in nodes[: len(nodes) // 2]:
        node.sample = replace(node.sample, version=1)
    lag = batch_figures(forest, 7)["policy/version_lag"]
    assert lag == pytest.approx(2 + 4 * (len(nodes) // 2) / len(nodes))
