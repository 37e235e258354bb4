"""Methods that go by what is believed of prompts before they are sampled: PCL, MoPPS and VIP.

Invariant: the number of rollouts of a prompt depends on earlier batches alone, never on outcomes of its own batch; there is
one wave and no prefix stage, the budget is spent exactly wherever the bounds of a method allow, and ties are settled by the
seeded generator, never by the order of the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from allocation.contrast import ROOT_VALUES, FloatArray
from allocation.methods.base import Allocator, dealt
from allocation.methods.predicted import PredictedAllocator
from allocation.predictor import Predictor
from allocation.roots import IntArray
from allocation.settings import check_numbers, check_whole
from allocation.tree import Forest, Tree


class PCLAllocator(PredictedAllocator):
    """`pcl` (Prompt Curriculum Learning, arXiv 2510.01135): the prompts that a value model puts nearest one half.

    Of a random pool, the k prompts with the smallest |V - 1/2| get a group each; nothing explores. V is the prediction itself,
    without a prompt's earlier outcomes.

    Differences: the value model is this package's predictor, trained on the values of all prefixes, instead of a language model
    of its own. Until it is ready, or if it fails, k prompts are drawn at random. What does not go up evenly is dealt at
    random; where there are too few candidates, groups are larger.

    Args:
        predictor: Estimates success at prompts.
        group_size: Rollouts of a prompt.
        pool_factor: Candidates for each prompt that is chosen, at least 1.

    Raises:
        ValueError: A number is out of range.
    """

    name = "pcl"

    def __init__(self, predictor: Predictor, group_size: int = 8, pool_factor: float = 4.0):
        _check_sizes(group_size, pool_factor)
        super().__init__(predictor)
        self.group_size = group_size
        self.pool_factor = pool_factor

    def pool_size(self, budget: int) -> int:
        """`pool_factor` times the number of groups that fit into the budget."""
        return round(self.pool_factor * _groups(budget, self.group_size))

    def allocate_roots(
        self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator, wave: int = 0
    ) -> IntArray:
        """A group for each of the prompts nearest one half."""
        predicted = self.predict(candidates, [t.root for t in candidates])
        distance = np.zeros(len(candidates)) if predicted is None else np.abs(predicted - 0.5)
        return _nearest(distance, budget, self.group_size, rng)


class MoPPSAllocator(Allocator):
    """`mopps` (MoPPS, Model Predictive Prompt Selection, arXiv 2507.04632): Thompson sampling of each prompt's success rate.

    Each prompt has a Beta posterior of its success rate. A success rate is drawn from the posterior of each candidate, and
    the k prompts with draws nearest the target get a group each. Then a = decay a + (1 - decay) a_0 + successes at each of
    these prompts, and likewise b with failures: posteriors are drawn back to the prior a_0, b_0 as the policy moves. There
    is no predictor; a prompt that was never sampled is at the prior.

    Differences: what does not go up evenly is dealt at random; where there are too few candidates, groups are larger. Successes
    are the environment's verdicts. As in the released code a posterior decays when its prompt is sampled, not with each
    update, so one that was last sampled long ago is as sharp as it was then.

    Args:
        group_size: Rollouts of a prompt.
        pool_factor: Candidates for each prompt that is chosen, at least 1.
        target: Success rate that is sought, in [0, 1].
        decay: What is left of a posterior's distance to the prior at each update of it, in [0, 1].
        prior: a_0 and b_0.

    Attributes:
        posterior: By prompt, a and b; one entry for each prompt that was ever sampled.

    Raises:
        ValueError: A number is out of range.
    """

    name = "mopps"

    def __init__(
        self,
        group_size: int = 8,
        pool_factor: float = 4.0,
        target: float = 0.5,
        decay: float = 0.5,
        prior: tuple[float, float] = (1.0, 1.0),
    ):
        _check_sizes(group_size, pool_factor)
        for name, number in (("target", target), ("decay", decay)):
            check_numbers(**{name: number})
            if not 0 <= number <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {number}")
        if not isinstance(prior, tuple | list) or len(prior) != 2:
            raise ValueError(f"prior must be two finite numbers > 0, got {prior!r}")
        for x in prior:
            check_numbers(prior=x)
        if not all(math.isfinite(x) and x > 0 for x in prior):
            raise ValueError(f"prior must be two finite numbers > 0, got {prior}")
        self.group_size = group_size
        self.pool_factor = pool_factor
        self.target = target
        self.decay = decay
        self.prior = prior
        self.posterior: dict[str, tuple[float, float]] = {}

    def pool_size(self, budget: int) -> int:
        """`pool_factor` times the number of groups that fit into the budget."""
        return round(self.pool_factor * _groups(budget, self.group_size))

    def allocate_roots(
        self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator, wave: int = 0
    ) -> IntArray:
        """A group for each of the prompts whose draws are nearest the target."""
        a, b = np.array([self.posterior.get(t.key, self.prior) for t in candidates]).T
        return _nearest(np.abs(rng.beta(a, b) - self.target), budget, self.group_size, rng)

    def update(self, forest: Forest) -> dict[str, float]:
        """Folds the batch into the posteriors of its prompts."""
        outcomes: dict[str, tuple[int, int]] = {}
        for tree in forest:
            s, f = tree.outcome_counts("root")
            before = outcomes.get(tree.key, (0, 0))
            outcomes[tree.key] = before[0] + s, before[1] + f
        for key, counts in outcomes.items():
            held = self.posterior.get(key, self.prior)
            a, b = (
                self.decay * x + (1 - self.decay) * x0 + n for x, x0, n in zip(held, self.prior, counts, strict=True)
            )
            self.posterior[key] = a, b
        return {"mopps/prompts": float(len(self.posterior))}

    def state_dict(self) -> dict[str, Any]:
        """Returns the posteriors."""
        return {"posterior": {key: list(held) for key, held in self.posterior.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: A posterior is not two finite numbers > 0; nothing is changed then.
        """
        posterior: dict[str, tuple[float, float]] = {}
        for key, held in state["posterior"].items():
            a, b = (float(x) for x in held)
            if not (math.isfinite(a) and math.isfinite(b) and a > 0 and b > 0):
                raise ValueError(f"the posterior of {key!r} must be two finite numbers > 0, got {held}")
            posterior[str(key)] = a, b
        self.posterior = posterior


class VIPAllocator(PredictedAllocator):
    """`vip` (VIP, Variance-Informed Predictive allocation, arXiv 2602.01601): the least gradient variance over a random batch.

    Prompts are drawn at random, and all of them are sampled: the budget is divided so that the summed variance of the RLOO
    gradient, sum_i V_i (1 - V_i) / (m_i - 1), is least under lower <= m_i <= upper. The sum is convex in each m_i, so giving
    one rollout after the other to the prompt whose variance falls most is exact; the paper solves the continuous problem and
    rounds with the same greedy rule.

    Differences: V is this package's predictor instead of a Gaussian process over embeddings, so all methods with a predictor
    share one. A term of the released code that prefers easy prompts where V is nearly equal, and which the paper does not
    have, is left out. Until the predictor is ready, or if it fails, the budget is divided evenly.

    Args:
        predictor: Estimates success at prompts.
        group_size: Rollouts of a prompt on average; says how many prompts are drawn.
        lower: Fewest rollouts of a prompt, at least 2; the released code has 4. No more than `group_size` is asked for, and
            fewer where the budget is smaller.
        upper: Most rollouts of a prompt; the released code has 32.

    Raises:
        ValueError: A number is out of range.
    """

    name = "vip"

    def __init__(self, predictor: Predictor, group_size: int = 8, lower: int = 4, upper: int = 32):
        _check_sizes(group_size, 1.0)
        check_whole(lower=lower, upper=upper)
        if not 2 <= lower <= upper:
            raise ValueError(f"need 2 <= lower <= upper, got lower={lower}, upper={upper}")
        if group_size > upper:
            raise ValueError(f"upper={upper} leaves no room for an average of group_size={group_size}: raise upper")
        super().__init__(predictor)
        self.group_size = group_size
        self.lower = lower
        self.upper = upper

    def pool_size(self, budget: int) -> int:
        """As many prompts as groups fit into the budget."""
        return _groups(budget, self.group_size)

    def root_capacity(self, candidates: int, budget: int) -> int:
        """`upper` rollouts for each candidate."""
        return min(budget, candidates * self.upper)

    def allocate_roots(
        self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator, wave: int = 0
    ) -> IntArray:
        """The division of the budget with the least variance."""
        n = min(len(candidates), self.pool_size(budget))
        batch = rng.permutation(len(candidates))[:n]
        predicted = self.predict([candidates[i] for i in batch], [candidates[i].root for i in batch])
        counts = np.zeros(len(candidates), dtype=np.int64)
        counts[batch] = (
            dealt(n, budget, rng)
            if predicted is None
            else least_variance(predicted, budget, min(self.lower, budget // n), self.upper, rng)
        )
        return counts


def least_variance(values: FloatArray, budget: int, lower: int, upper: int, rng: np.random.Generator) -> IntArray:
    """Minimises sum_i V_i (1 - V_i) / (m_i - 1) subject to sum_i m_i = budget and lower <= m_i <= upper, exactly.

    Source: VIP (arXiv 2602.01601); the falls of the variance are the increments of `allocation.contrast.Vip`.

    Args:
        values: float[n], success probabilities, clipped to [1e-3, 1 - 1e-3].
        budget: Rollouts, from n * lower to n * upper.
        lower: Fewest rollouts of a prompt, at least 1. One alone counts twice as much variance as two do, as in `Vip`.
        upper: Most rollouts of a prompt.
        rng: Says which of several prompts of equal V gets one more.

    Returns:
        int[n].

    Raises:
        ValueError: The budget cannot be spent within the bounds.
    """
    n = len(values)
    if lower < 1:
        raise ValueError(f"lower must be at least 1, got {lower}")
    if not n * lower <= budget <= n * upper:
        raise ValueError(f"{n} prompts cannot take {budget} rollouts with {lower} to {upper} each: change the bounds")
    v = np.clip(np.asarray(values, dtype=np.float64), 1e-3, 1 - 1e-3)
    falls = np.diff(ROOT_VALUES["vip"].table(v, 1 - v, upper)[:, lower:], axis=1)
    order = rng.permutation(n)
    # Equal values computed in two ways differ in the last bits. Step by step, each in random order: ties are dealt in rounds.
    gain = np.round(falls[order].T.ravel() / max(falls.max(initial=0.0), 1e-300), 12)
    taken = np.argsort(-gain, kind="stable")[: budget - n * lower] % n
    counts = np.full(n, lower, dtype=np.int64)
    counts[order] += np.bincount(taken, minlength=n)
    return counts


def _nearest(distance: FloatArray, budget: int, group_size: int, rng: np.random.Generator) -> IntArray:
    """Returns a group for each of as many prompts as fit, those with the least distances; ties are drawn."""
    n = len(distance)
    k = min(n, _groups(budget, group_size))
    order = rng.permutation(n)
    # |V - 1/2| of V and 1 - V differ in the last bits, and are a tie all the same.
    chosen = order[np.argsort(np.round(distance[order], 12), kind="stable")[:k]]
    counts = np.zeros(n, dtype=np.int64)
    counts[chosen] = dealt(k, budget, rng)
    return counts


def _groups(budget: int, group_size: int) -> int:
    return max(1, budget // group_size)


def _check_sizes(group_size: int, pool_factor: float) -> None:
    check_whole(group_size=group_size)
    check_numbers(pool_factor=pool_factor)
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if not 1 <= pool_factor < math.inf:
        raise ValueError(f"pool_factor must be at least 1 and finite, got {pool_factor}")
