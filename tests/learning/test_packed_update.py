"""Whole updates, packed against flat: loss, gradient and what several steps of PPO and GRPO make of the weights."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from adapted import log_probs
from slow_update import gradient, learner
from small_models import KINDS, branched, exact, make, relative

from agents.scoring import Scorer
from allocation import Forest
from allocation.forest_table import ForestTable

ESTIMATORS = ("grpo", "gae", "tree")


def small_model(name, dtype):
    model = make(name, initializer_range=0.15)
    return exact(model) if dtype == torch.float64 else model


def batch(model, dtype):
    """Branched trees with log-probs near the model's, so that some ratios are clipped and others are not."""
    forest = Forest(branched(seed=5, turns=4))
    scorer = Scorer(model)
    with torch.no_grad():
        sampled, _ = log_probs(lambda *given: scorer(*given).logprobs.float(), forest)
    values = sampled.numpy() + np.random.default_rng(0).normal(scale=0.3, size=len(sampled))
    for tree in forest:
        for node in tree.nodes[1:]:
            n = len(node.sample.action_ids)
            node.sample.logprobs, values = values[:n].astype(str(dtype).removeprefix("torch.")), values[n:]
    return forest


def settings(estimator):
    return {"estimator": estimator, "dual_clip": 2.0, "value_coef": 0.5}


def moved(model, start):
    return torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)]).detach()


def apart(found):
    """Greatest relative difference between the figures of two updates, those that count tokens left out."""
    flat, packed = (
        {k: v for k, v in figures.items() if not k.startswith("learner/") and k != "loss/tokens"} for figures in found
    )
    scale = 1e-2  # means over clipped terms of both signs
    return max(abs(packed[k] - flat[k]) / max(abs(flat[k]), scale) for k in flat)


def test_edges_are_shared_by_better_and_worse_rollouts():
    """Else the two scalars of an edge are never told apart."""
    table = ForestTable.of(branched(seed=5, turns=4))
    reward, tree = table.returns[table.leaves], table.tree[table.leaves]
    mean = {t: reward[tree == t].mean() for t in tree}
    signs = Counter()
    for leaf, r, t in zip(table.leaves, reward, tree, strict=True):
        row = table.parent[leaf]
        while table.parent[row] >= 0:
            signs[row, r > mean[t]] += 1
            row = table.parent[row]
    assert sum(signs[row, True] > 0 and signs[row, False] > 0 for row in {row for row, _ in signs}) >= 2


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("micro_tokens", [60, 10**6])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", KINDS)
def test_one_step_has_the_same_loss_and_gradient(name, estimator, micro_tokens, dtype, tolerance):
    model = small_model(name, dtype)
    forest = batch(model, dtype)
    found, gradients = [], []
    for layout in ("flat", "packed"):
        made = learner(model, layout=layout, micro_tokens=micro_tokens, **settings(estimator))
        assert made.scorer.packs
        found.append(made.update(forest).figures)
        heads = [] if made.critic is None else [p.grad.flatten() for p in made.critic.parameters()]
        gradients.append(torch.cat([gradient(model), *heads]))
    # A critic computes in float32, whatever the model does.
    tolerance = max(tolerance, 1e-5 if estimator == "gae" else 0.0)
    assert gradients[0].norm() > 1e-2 and relative(gradients[1], gradients[0]) < tolerance
    assert apart(found) < tolerance and found[0]["loss/clip_share"] > 0.02
    flat, packed = found
    assert flat["learner/unique_tokens"] == packed["learner/unique_tokens"] < flat["learner/flat_tokens"]
    assert packed["learner/computed_tokens"] < flat["learner/computed_tokens"]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", KINDS)
def test_several_epochs_of_minibatches_end_at_the_same_weights(name, estimator, dtype, tolerance):
    """From the second step on the clip says which tokens count, so a layout that misread one would drift away."""
    start = small_model(name, dtype)
    forest = batch(start, dtype)
    found, moves = [], []
    for layout in ("flat", "packed"):
        model = copy.deepcopy(start)
        made = learner(model, lr=0.02, layout=layout, epochs=3, minibatches=2, micro_tokens=80, **settings(estimator))
        found.append(made.update(forest).figures)
        heads = [] if made.critic is None else [p.detach().flatten() for p in made.critic.parameters()]
        moves.append(torch.cat([moved(model, start), *heads]))
    tolerance = max(tolerance, 1e-5 if estimator == "gae" else 0.0)
    assert moves[0].norm() > 1e-2 and relative(moves[1], moves[0]) < tolerance
    assert apart(found) < 10 * tolerance and found[0]["loss/clip_share"] > 0.02
