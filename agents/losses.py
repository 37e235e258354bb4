"""The policy's loss on stored tokens, term by term.

Invariant: every term is a sum over tokens with coefficients that carry the denominators of the whole batch
(`agents.aggregation`), so the sum over the parts of a batch is the batch's loss.

All terms are per token: that an earlier token changes which later ones are met is in the advantages alone, as is usual for
token-level penalties (Shao et al., 2024, equation 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds of the probability ratio.

    Attributes:
        low, high: The ratio counts within [1 - low, 1 + high] (DAPO's asymmetric clip, Yu et al., 2025, equation 10).
        dual: Where an advantage is negative the ratio counts up to this at most, above 1 (dual clip, Ye et al., 2020,
            equation 3); 0 for no bound.
    """

    low: float = 0.2
    high: float = 0.28
    dual: float = 0.0


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    coefficients: torch.Tensor,
    clip: Clip,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (Schulman et al., 2017, equation 7), from two scalars a token.

    The paper's term min(ratio A, clip(ratio) A) is A min(ratio, 1 + high) for a positive advantage and A max(ratio, 1 - low)
    for a negative one. A token that several rollouts share, each with an advantage of its own, therefore needs the sum of the
    positive advantages and that of the negative ones, and no more: up min(ratio, 1 + high) + down max(ratio, 1 - low). With a
    dual clip the second factor is min(max(ratio, 1 - low), dual).

    Args:
        logprobs: Under the current weights, float [t].
        old_logprobs: Under the weights that the batch is met with, float [t].
        up: Positive part of the advantages, float [t], >= 0.
        down: Negative part, float [t], <= 0.
        coefficients: Share of each token in the batch's loss, float [t].
        clip: Bounds of the ratio.

    Returns:
        The loss, and which tokens have a part whose gradient is cut off, bool [t].
    """
    change = logprobs - old_logprobs
    # Bounds on the logarithm: the exponential of a ratio that is cut anyway, or that counts nothing, cannot overflow.
    high, low = math.log1p(clip.high), math.log1p(-clip.low) if clip.low < 1 else -math.inf
    dual = math.log(clip.dual) if clip.dual else math.inf
    rising = change.clamp(max=high).exp()
    falling = torch.where(down == 0, 0.0, change).clamp(min=low).clamp(max=dual).exp()
    with torch.no_grad():
        cut = ((up != 0) & (change > high)) | ((down != 0) & ((change < low) | (change > dual)))
    return -(coefficients * (up * rising + down * falling)).sum(), cut


def kl_loss(
    logprobs: torch.Tensor, reference: torch.Tensor, coefficients: torch.Tensor, estimator: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence from a frozen reference, from sampled tokens.

    With d = log pi(a) - log ref(a) for a token a that was drawn from pi:

    * `k1` is d, an unbiased estimate of KL(pi || ref). Its derivative is grad log pi(a), whose expectation is zero: what
      changes KL is how often each token comes, which differentiating d at the tokens that came leaves out. So the loss has the
      score function's gradient instead, d grad log pi(a), whose expectation is grad KL(pi || ref).
    * `k3` is exp(-d) - 1 + d (Schulman, 2020, "Approximating KL divergence"), also unbiased for KL(pi || ref), never negative,
      and less noisy. It is differentiated, as in GRPO (Shao et al., 2024, equation 4); what that descends on average is
      KL(ref || pi), which has the same minimum.

    As in GRPO there is no correction for tokens that older weights drew: after the first of several steps on a batch both are
    approximate.

    Args:
        logprobs: Under the current weights, float [t].
        reference: Under the reference, float [t].
        coefficients: Share of each token, float [t].
        estimator: `k1` or `k3`.

    Returns:
        The loss (with `k1` only its gradient has a meaning), and the estimates, float [t], without gradient.

    Raises:
        ValueError: The estimator is unknown.
    """
    difference = logprobs - reference
    if estimator == "k1":
        estimate = difference.detach()
        return (coefficients * estimate * logprobs).sum(), estimate
    if estimator == "k3":
        term = torch.expm1(-difference) + difference
        return (coefficients * term).sum(), term.detach()
    raise ValueError(f"unknown kl_estimator {estimator!r}; known: k1, k3")


def entropy_loss(entropy: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Returns minus the entropy of the distributions that tokens are drawn from, a sum with coefficients; both float [t]."""
    return -(coefficients * entropy).sum()


def importance_weights(
    learner: torch.Tensor, sampler: torch.Tensor, cap: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Truncated importance weights between the learner and the engine that sampled.

    The two compute the same weights in different ways (kernels, precision), so the tokens come from a slightly different
    policy than the learner takes them from. Each token counts min(pi_learner / pi_sampler, cap): exact for a token's own
    distribution where the cap does not bind, with bounded variance (Ionides, 2008; per token as in Yao et al., 2025).

    Args:
        learner: Log-probs by the learner before the update, float [t].
        sampler: Log-probs as sampled, float [t].
        cap: Greatest weight.

    Returns:
        The weights, float [t], without gradient, and figures: `importance/ess`, effective sample size over sample size,
        (sum w)^2 / (n sum w^2); `importance/kl`, mean of sampler - learner, nats per token; `importance/clipped`, the share
        of weights that were cut; and how far the two are apart: `drift/mean_abs` and `drift/max_abs`, mean and greatest
        |learner - sampler| in nats, and `drift/probability`, the mean difference of the tokens' probabilities.
    """
    with torch.no_grad():
        ratio = (learner - sampler).exp()
        weights = ratio.clamp(max=cap)
        figures = {
            "importance/ess": float(weights.sum().square() / (len(weights) * weights.square().sum())),
            "importance/kl": float((sampler - learner).mean()),
            "importance/clipped": float((ratio > cap).float().mean()),
            "drift/mean_abs": float((learner - sampler).abs().mean()),
            "drift/max_abs": float((learner - sampler).abs().max()),
            "drift/probability": float((learner.exp() - sampler.exp()).abs().mean()),
        }
    return weights, figures
