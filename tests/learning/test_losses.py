"""Terms of the loss, against their definitions and against sums over a whole vocabulary."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.losses import Clip, entropy_loss, importance_weights, kl_loss, policy_loss
from agents.schedules import lr_factor

RATIOS = st.floats(0.05, 8.0)
PARTS = st.floats(0.0, 3.0)


def one(x):
    return torch.tensor([x], dtype=torch.float64)


def loss_of(ratio, up, down, clip):
    """Loss, gradient by the log-probability, and whether something was cut, for one token."""
    new = one(math.log(ratio)).requires_grad_()
    loss, cut = policy_loss(new, one(0.0), one(up), one(down), one(1.0), clip)
    loss.backward()
    return loss.item(), new.grad.item(), bool(cut)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, 0.0), (1.5, -2.0, 3.0), (0.5, -2.0, 0.0), (0.5, 2.0, -1.0), (1.25, 1.0, -1.25)],
)
def test_the_clip_cuts_where_the_ratio_has_gone_far_enough(ratio, advantage, gradient):
    _, got, cut = loss_of(ratio, max(advantage, 0), min(advantage, 0), Clip(0.2, 0.28))
    assert got == pytest.approx(gradient) and cut == (gradient == 0.0)


@settings(max_examples=200, deadline=None)
@given(RATIOS, st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.sampled_from([0.0, 1.5, 3.0]))
def test_two_scalars_say_what_rollouts_with_advantages_of_their_own_say(ratio, advantages, dual):
    """The paper's term for every rollout that shares the token, each replica on its own."""
    new = one(math.log(ratio)).requires_grad_()
    rho = new.exp()
    expected = one(0.0)
    for advantage in advantages:
        term = torch.minimum(rho * advantage, rho.clamp(0.8, 1.28) * advantage)
        if dual and advantage < 0:
            term = torch.maximum(term, one(dual * advantage))
        expected = expected - term
    expected.sum().backward()
    up, down = sum(max(a, 0.0) for a in advantages), sum(min(a, 0.0) for a in advantages)
    loss, gradient, _ = loss_of(ratio, up, down, Clip(0.2, 0.28, dual))
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    edges = [math.log(b) for b in (0.8, 1.28, dual) if b]
    if min(abs(math.log(ratio) - e) for e in edges) > 1e-9:
        assert gradient == pytest.approx(new.grad.item(), abs=1e-9)


@pytest.mark.parametrize(("ratio", "gradient"), [(1.5, 1.5), (3.5, 0.0), (0.5, 0.0)])
def test_the_dual_clip_bounds_what_a_failure_weighs(ratio, gradient):
    _, got, cut = loss_of(ratio, 0.0, -1.0, Clip(0.2, 0.28, 3.0))
    assert got == pytest.approx(gradient) and cut == (gradient == 0.0)
    assert loss_of(3.5, 1.0, 0.0, Clip(0.2, 10.0, 3.0))[1] == pytest.approx(-3.5), "successes know no dual clip"


@settings(max_examples=60, deadline=None)
@given(RATIOS, PARTS, PARTS)
def test_bounds_of_one_and_more_are_none(ratio, up, down):
    loss, gradient, cut = loss_of(ratio, up, -down, Clip(1.0, math.inf))
    assert loss == pytest.approx(-ratio * (up - down)) == gradient and not cut


def test_a_ratio_without_bound_that_is_cut_or_counts_nothing_is_no_infinity():
    new = torch.tensor([200.0, 200.0, -200.0], requires_grad=True)
    up, down = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, -1.0])
    loss, _ = policy_loss(new, torch.zeros(3), up, down, torch.ones(3), Clip())
    loss.backward()
    assert torch.isfinite(loss) and new.grad.tolist() == [0.0, 0.0, 0.0]
    loss, _ = policy_loss(new[:1], torch.zeros(1), torch.zeros(1), torch.tensor([-1.0]), torch.ones(1), Clip())
    assert loss == math.inf, "what really is infinite must not pass for a number"


# Expectations over a vocabulary.


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(2)]


def gradient_of(logits, objective):
    logits = logits.clone().requires_grad_()
    objective(torch.log_softmax(logits, -1)).backward()
    return logits.grad


def divergence(p, q):
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expected_gradients_of_the_divergences(logits, estimator):
    now, ref = logits[0], torch.log_softmax(logits[1], -1)

    def expected_loss(p):
        # Every token with its chance of being drawn, which is not differentiated.
        return kl_loss(p, ref, p.detach().exp(), estimator)[0]

    def toward(p):
        return divergence(p, ref) if estimator == "k1" else divergence(ref, p)

    exact = gradient_of(now, toward)
    assert exact.norm() > 0.1
    assert torch.allclose(gradient_of(now, expected_loss), exact, atol=1e-12)
    p = torch.log_softmax(now, -1)
    _, estimates = kl_loss(p, ref, torch.ones(12), estimator)
    assert (p.exp() * estimates).sum().item() == pytest.approx(divergence(p, ref).item())
    assert not estimates.requires_grad and (estimator == "k1" or (estimates >= 0).all())


def test_differentiating_k1_where_tokens_came_teaches_nothing(logits):
    now, ref = logits[0], torch.log_softmax(logits[1], -1)
    plain = gradient_of(now, lambda p: (p.detach().exp() * (p - ref)).sum())
    assert torch.allclose(plain, torch.zeros(12, dtype=torch.float64), atol=1e-12)


def test_no_divergence_from_itself(logits):
    p = torch.log_softmax(logits[0], -1).requires_grad_()
    for estimator in ("k1", "k3"):
        loss, estimates = kl_loss(p, p.detach(), torch.ones(12), estimator)
        assert loss.item() == pytest.approx(0.0) and estimates.abs().max() == 0.0
        assert torch.autograd.grad(loss, p)[0].abs().max() == 0.0
    with pytest.raises(ValueError, match="unknown kl_estimator 'k2'; known: k1, k3"):
        kl_loss(p, p, torch.ones(12), "k2")


def test_the_entropy_bonus_is_what_is_taken_from_the_loss():
    entropy = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = entropy_loss(entropy, torch.tensor([0.25, 0.5]))
    loss.backward()
    assert loss.item() == -1.75 and entropy.grad.tolist() == [-0.25, -0.5]


def test_importance_weights_are_cut_and_accounted_for():
    learner = torch.tensor([0.5, 2.0, 0.25, 8.0]).log().requires_grad_()
    weights, figures = importance_weights(learner, torch.zeros(4), 3.0)
    assert weights.tolist() == pytest.approx([0.5, 2.0, 0.25, 3.0]) and not weights.requires_grad
    assert figures["importance/ess"] == pytest.approx(5.75**2 / (4 * (0.25 + 4 + 0.0625 + 9)))
    assert figures["importance/kl"] == pytest.approx(-math.log(0.5 * 2 * 0.25 * 8) / 4)
    assert figures["drift/max_abs"] == pytest.approx(math.log(8))
    assert figures["drift/mean_abs"] == pytest.approx(math.log(2 * 2 * 4 * 8) / 4)
    assert figures["drift/probability"] == pytest.approx((0.5 + 1 + 0.75 + 7) / 4)
    assert figures["importance/clipped"] == 0.25
    same, figures = importance_weights(learner, learner.detach(), 2.0)
    assert same.tolist() == [1.0] * 4
    assert figures.pop("importance/ess") == 1.0 and set(figures.values()) == {0.0}


def test_importance_weights_mend_an_expectation(logits):
    """Drawn from one distribution and weighted, the expectation is the other's, if the cap does not bind."""
    learner, sampler = (torch.log_softmax(x, -1) for x in logits)
    f = torch.arange(12, dtype=torch.float64)
    weights, _ = importance_weights(learner, sampler, math.inf)
    assert (sampler.exp() * weights * f).sum().item() == pytest.approx((learner.exp() * f).sum().item())


# Step sizes.


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(1, 50), st.integers(0, 60))
def test_step_sizes_rise_then_never_rise_again(schedule, updates, warmup):
    factors = [lr_factor(schedule, done, updates, warmup) for done in range(updates + 1)]
    assert all(0 <= f <= 1 for f in factors)
    after = factors[max(warmup - 1, 0) :]
    assert after == sorted(after, reverse=True)
    assert all(f > 0 for f in factors[:-1]), "an update that learns nothing"
    if schedule == "constant":
        assert all(f == min(1.0, (i + 1) / max(warmup, 1)) for i, f in enumerate(factors))
    else:
        assert factors[-1] == 0.0


def test_step_sizes_by_hand():
    assert [lr_factor("linear", d, 4, 0) for d in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [lr_factor("cosine", d, 2, 0) for d in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert [lr_factor("constant", d, 9, 4) for d in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    with pytest.raises(ValueError, match="unknown lr_schedule 'step'"):
        lr_factor("step", 0, 1, 0)
