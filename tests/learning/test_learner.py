"""The update against a slow one: paths one by one, edges once for every rollout, whole batches, plain definitions."""

import copy

import numpy as np
import pytest
import torch
from echo_env import echo_forest
from slow_update import (
    PLAIN,
    edge_logits,
    edge_logprobs,
    edges,
    gradient,
    learner,
    noisy_forest,
    relative,
    replicas,
    slow_gradient,
    slow_losses,
    step_gradient,
)

from agents.advantages import estimate
from agents.aggregation import AGGREGATIONS, edge_coefficients
from agents.batch import Batch
from agents.learner import Learner
from agents.learner_config import LAYOUTS, LearnerConfig
from agents.scoring import Scorer
from allocation.forest_table import ForestTable


class Frozen:
    """A reference for the divergence."""

    def __init__(self, model):
        self._scorer = Scorer(model)

    @torch.no_grad()
    def __call__(self, micro, ids):
        return self._scorer(micro, ids).logprobs


@pytest.fixture(scope="module")
def batch(model, tokenizer):
    return noisy_forest(model, tokenizer)


# One step.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_step_has_the_gradient_of_the_definition(model, batch, aggregation, layout):
    config = LearnerConfig(aggregation=aggregation)
    expected, loss = slow_gradient(model, slow_losses(model, batch, config))
    got, figures = step_gradient(model, batch, aggregation=aggregation, layout=layout)
    assert expected.norm() > 1e-3 and relative(got, expected) < 1e-5
    assert figures["loss/policy"] == pytest.approx(loss, abs=1e-5) and figures["loss/clip_share"] > 0
    assert figures["loss/grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "config", [{"estimator": "two_phase"}, {"dual_clip": 1.5}, {"clip_low": 0.05, "clip_high": 0.5}]
)
def test_the_step_follows_its_settings(model, batch, config, layout):
    expected, loss = slow_gradient(model, slow_losses(model, batch, LearnerConfig(**config)))
    got, figures = step_gradient(model, batch, layout=layout, **config)
    plain, _ = step_gradient(model, batch, layout=layout)
    assert relative(got, expected) < 1e-5 and figures["loss/policy"] == pytest.approx(loss, abs=1e-5)
    assert relative(plain, expected) > 1e-2, "the setting says nothing here"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sampling_temperature_is_that_of_the_ratios(model, tokenizer, layout):
    forest = echo_forest(model, tokenizer, seed=2, budget=12, temperature=0.5)
    made = Learner(model, LearnerConfig(layout=layout, **PLAIN), updates=1, temperature=0.5)
    made.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    figures = made.update(forest).figures
    expected, _ = slow_gradient(model, slow_losses(model, forest, made.config, temperature=0.5))
    assert relative(gradient(model), expected) < 1e-5 and abs(figures["loss/kl"]) < 1e-5


def rollout_advantages(forest):
    """GRPO's, a list for each edge as if it were there once for every rollout through it."""
    table = ForestTable.of(forest)
    reward, tree = table.returns[table.leaves], table.tree[table.leaves]
    mean = {t: reward[tree == t].mean() for t in tree}
    score = {leaf: r - mean[t] for leaf, r, t in zip(table.leaves, reward, tree, strict=True)}
    return replicas(table, score)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_epochs_below_shared_edges_equal_rollouts_replicated(make_model, batch, layout):
    """The clip sees each rollout's own advantage; shared edges are there once for every rollout, in the slow update."""
    config = {"estimator": "grpo", "dual_clip": 1.6, "epochs": 3}
    advantages = rollout_advantages(batch)
    assert any(min(a) < 0 < max(a) for a in advantages if a), "no edge is shared by better and worse rollouts"
    fast, slow = make_model(), make_model()
    figures = learner(fast, lr=0.02, layout=layout, **config).update(batch).figures
    norms = []
    for _ in range(3):
        step, loss = slow_gradient(slow, slow_losses(slow, batch, LearnerConfig(**config), advantages=advantages))
        norms.append(step.norm().item())
        with torch.no_grad():
            for p in slow.parameters():
                p -= 0.02 * p.grad
    assert figures["loss/clip_share"] > 0.05 and figures["loss/grad_norm"] == pytest.approx(norms[-1], rel=1e-4)
    assert figures["loss/policy"] == pytest.approx(loss, abs=1e-5)
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    moved = [torch.cat([p.detach().flatten() for p in m.parameters()]) - start for m in (fast, slow)]
    assert moved[1].norm() > 1e-3 and relative(*moved) < 1e-4


def test_a_shared_edge_is_clipped_for_some_of_its_rollouts_only(model, batch):
    """The mean advantage of an edge would say something else, so two scalars are needed."""
    config = LearnerConfig(estimator="grpo")
    apart, _ = slow_gradient(model, slow_losses(model, batch, config, advantages=rollout_advantages(batch)))
    mean, _ = slow_gradient(model, slow_losses(model, batch, config))
    assert relative(mean, apart) > 1e-2


# Splitting a batch.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_change_nothing(model, batch, layout):
    config = {"layout": layout, "entropy_coef": 0.01, "kl_coef": 0.1, "importance": "truncated", "estimator": "gae"}
    reference = Frozen(random_model_like(model))
    whole, a = step_gradient(model, batch, micro_tokens=10**6, reference=reference, **config)
    for size in (1, 200):
        parts, b = step_gradient(model, batch, micro_tokens=size, reference=reference, **config)
        assert relative(parts, whole) < 1e-5
        assert {
            k: pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in a.items() if "computed" not in k
        }.items() <= b.items()


def random_model_like(model):
    """A model a little away from another."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return other


def kept_gradients(made):
    """The gradient of every optimiser step of a learner."""
    taken = []
    made.optimizer.register_step_pre_hook(lambda *_: taken.append(gradient(made.model)))
    return taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_minibatches_are_trees_dealt_anew_whose_mean_gradient_is_the_batchs(model, batch, layout):
    whole, a = step_gradient(model, batch, layout=layout)
    made = learner(model, minibatches=3, epochs=2, layout=layout)
    taken = kept_gradients(made)
    b = made.update(batch).figures
    assert len(taken) == 6
    for one_pass in (taken[:3], taken[3:]):
        assert relative(torch.stack(one_pass).mean(0), whole) < 1e-5
        assert min(relative(g, whole) for g in one_pass) > 0.1
    assert min(relative(g, taken[0]) for g in taken[3:]) > 0.1, "the second pass deals the same hands"
    for name in ("loss/policy", "loss/kl", "loss/clip_share", "loss/entropy", "loss/tokens"):
        assert b[name] == pytest.approx(a[name], abs=1e-5), name
    again = learner(model, minibatches=3, layout=layout)
    retaken = kept_gradients(again)
    again.update(batch)
    assert all(torch.equal(x, y) for x, y in zip(retaken, taken[:3], strict=True))


def test_minibatches_part_the_trees(model, batch):
    whole = Batch.of(*parts_of(batch), device=model.device)
    dealt = list(whole.minibatches(4, np.random.default_rng(0)))
    trees = [set(d.tokens.table.tree[d.tokens.rows]) for d in dealt]
    assert sum(len(t) for t in trees) == len(set().union(*trees)) and max(map(len, trees)) - min(map(len, trees)) <= 1
    for d in dealt:
        for i, (node, token) in enumerate(zip(d.tokens.node, d.tokens.ids, strict=True)):
            at = np.flatnonzero(whole.tokens.node == node)[i - np.searchsorted(d.tokens.node, node)]
            assert whole.ids[at] == d.ids[i] == token and whole.up[at] == d.up[i]
    alone = list(whole.minibatches(1000, np.random.default_rng(0)))
    assert len(alone) == sum(map(len, trees)), "no more parts than trees"


def parts_of(forest):
    """What `Batch.of` is given, by the estimator `tree`."""
    table = ForestTable.of(forest)
    credit = estimate(table, "tree")
    coefficients = edge_coefficients(table, credit, "prompt")
    return table, credit, coefficients, LearnerConfig(), np.zeros(0, dtype=np.int64), None


# Further terms.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_divergence_counts_every_token_with_the_aggregations_coefficients(make_model, batch, estimator, layout):
    model, other = make_model(), random_model_like(make_model())
    config = LearnerConfig(kl_coef=0.3, kl_estimator=estimator)

    def losses():
        yield from slow_losses(model, batch, config)
        table = ForestTable.of(batch)
        coefficients = edge_coefficients(table, estimate(table, "tree"), "prompt")
        for row, tree, node in edges(batch, table):
            new = edge_logprobs(model, tree, node)
            with torch.no_grad():
                ref = edge_logprobs(other, tree, node)
                estimates.append(new - ref if estimator == "k1" else (ref - new).exp() - 1 - (ref - new))
            if estimator == "k1":
                yield (0.3 * coefficients[row] * (new - ref).detach() * new).sum()
            else:
                yield (0.3 * coefficients[row] * ((ref - new).exp() - 1 - (ref - new))).sum()

    estimates = []
    expected, _ = slow_gradient(model, losses())
    got, figures = step_gradient(
        model, batch, kl_coef=0.3, kl_estimator=estimator, reference=Frozen(other), layout=layout
    )
    assert relative(got, expected) < 1e-5
    assert figures["loss/reference_kl"] == pytest.approx(torch.cat(estimates).mean().item(), abs=1e-5)
    without, _ = step_gradient(model, batch, layout=layout)
    assert relative(without, expected) > 1e-2


def test_a_divergence_needs_a_reference(model):
    with pytest.raises(ValueError, match=r"kl_coef is not 0 but there is no reference.*kl_coef=0"):
        Learner(model, LearnerConfig(kl_coef=0.1), updates=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_entropy_bonus_is_of_whole_distributions_on_all_edges(make_model, batch, layout):
    model = make_model()
    config = LearnerConfig(entropy_coef=0.2)
    entropies = []

    def losses():
        yield from slow_losses(model, batch, config)
        table = ForestTable.of(batch)
        coefficients = edge_coefficients(table, estimate(table, "tree"), "prompt")
        for row, tree, node in edges(batch, table):
            logprobs = edge_logits(model, tree, node)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            entropies.append(entropy.detach())
            yield -0.2 * (coefficients[row] * entropy).sum()

    expected, _ = slow_gradient(model, losses())
    got, figures = step_gradient(model, batch, entropy_coef=0.2, layout=layout)
    assert relative(got, expected) < 1e-5
    assert figures["loss/entropy"] == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-4)
    _, without = step_gradient(model, batch, layout=layout)
    assert without["loss/tokens"] < figures["loss/tokens"], "every edge has an advantage"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_that_another_engine_sampled_are_weighed_and_ratios_start_at_1(make_model, batch, layout):
    model = make_model()
    table = ForestTable.of(batch)
    with torch.no_grad():
        old = {row: edge_logprobs(model, tree, node) for row, tree, node in edges(batch, table)}
    sampled = {row: torch.from_numpy(node.sample.logprobs) for row, _, node in edges(batch, table)}
    weights = {row: (old[row] - sampled[row]).exp().clamp(max=1.2) for row in old}
    config = LearnerConfig(importance="truncated", importance_cap=1.2)
    expected, loss = slow_gradient(model, slow_losses(model, batch, config, old=old, weigh=weights))
    got, figures = step_gradient(model, batch, importance="truncated", importance_cap=1.2, layout=layout)
    assert relative(got, expected) < 1e-5 and figures["loss/policy"] == pytest.approx(loss, abs=1e-5)
    assert figures["loss/clip_share"] == 0.0 and abs(figures["loss/kl"]) < 1e-6
    trained = [row for row, a in enumerate(estimate(table, "tree").advantage) if a and row in old]
    w, gap = (torch.cat([x[row] for row in trained]) for x in (weights, {r: sampled[r] - old[r] for r in old}))
    assert figures["importance/ess"] == pytest.approx((w.sum() ** 2 / (len(w) * (w**2).sum())).item(), rel=1e-4)
    assert figures["importance/kl"] == pytest.approx(gap.mean().item(), abs=1e-5)
    assert 0.05 < figures["importance/clipped"] == pytest.approx((w == w.max()).float().mean().item(), abs=1e-6)


def test_old_log_probs_are_those_before_the_first_of_several_steps(make_model, batch):
    fast, slow = make_model(), make_model()
    table = ForestTable.of(batch)
    with torch.no_grad():
        old = {row: edge_logprobs(slow, tree, node) for row, tree, node in edges(batch, table)}
    weights = {
        r: (old[r] - torch.from_numpy(n.sample.logprobs)).exp().clamp(max=2.0) for r, _, n in edges(batch, table)
    }
    learner(fast, lr=0.02, epochs=2, importance="truncated").update(batch)
    for _ in range(2):
        slow_gradient(slow, slow_losses(slow, batch, LearnerConfig(), old=old, weigh=weights))
        with torch.no_grad():
            for p in slow.parameters():
                p -= 0.02 * p.grad
    for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_close_to_float32(model, batch, layout):
    exact, a = step_gradient(model, batch, layout=layout, importance="truncated")
    rough, b = step_gradient(model, batch, layout=layout, importance="truncated", precision="bfloat16")
    assert 1e-5 < relative(rough, exact) < 0.1
    assert b["loss/policy"] == pytest.approx(a["loss/policy"], abs=0.02)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
