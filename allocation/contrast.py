"""What a number of rollouts is worth: f(m) at a root, g(k) at an inner prefix.

Invariant: every table is built from non-negative increments, so each row starts at 0, never falls and suffers no
cancellation; and every built-in value is concave from m = 1 on (k = 0 on for prefixes), which is what makes greedy
allocation right.

Beliefs are Beta(alpha, beta) pairs; a plug-in value uses their mean V = alpha / (alpha + beta) alone. Both are one
family, the Polya urn: `moment(m) = prod_{j<m} (alpha + j*step) / (alpha + beta + j*step)` is V^m at step 0 and E[p^m]
at step 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_STEP: dict[str, float] = {"plug_in": 0.0, "posterior": 1.0}
BELIEFS = tuple(_STEP)


@runtime_checkable
class RootValue(Protocol):
    """The worth of m rollouts of a prompt, for many prompts at once."""

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """Tabulate f.

        Args:
            alpha: float[n], first Beta parameter of each prompt's success probability, > 0.
            beta: float[n], second one, > 0.
            m_max: Largest number of rollouts, >= 1.

        Returns:
            float[n, m_max + 1]; column m is f(m), columns 0 and 1 are zero.
        """
        ...


def check_cost(cost: npt.ArrayLike, n: int) -> FloatArray:
    """Return the expected tokens of a rollout from each of n anchors as a float64 vector.

    Raises:
        ValueError: If the shape differs or an entry is not finite and positive (its index is named).
    """
    c = np.asarray(cost, dtype=np.float64)
    if c.shape != (n,):
        raise ValueError(f"cost must have one entry for each of {n} anchors, got shape {c.shape}")
    bad = ~(np.isfinite(c) & (c > 0.0))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"cost[{i}] is {c[i]}, expected a finite number > 0")
    return c


def check_beliefs(alpha: npt.ArrayLike, beta: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return both parameters as float64 vectors.

    Raises:
        ValueError: If the shapes differ, are not one-dimensional, or an entry is not finite and positive (its index is
            named).
    """
    a, b = np.asarray(alpha, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"alpha and beta must be vectors of one length, got shapes {a.shape} and {b.shape}")
    for name, x in (("alpha", a), ("beta", b)):
        bad = ~(np.isfinite(x) & (x > 0.0))
        if bad.any():
            i = int(np.argmax(bad))
            raise ValueError(
                f"{name}[{i}] is {x[i]}, expected a finite number > 0; clip predictions away from 0 and 1 first"
            )
    return a, b


def power_moments(alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int, *, step: float = 1.0) -> FloatArray:
    """Rising-factorial products prod_{j<m} (alpha + j*step) / (alpha + beta + j*step) for m = 0..m_max.

    Args:
        alpha: float[n], > 0.
        beta: float[n], > 0.
        m_max: Largest power, >= 0.
        step: 1 gives E[p^m] under Beta(alpha, beta), 0 gives V^m.

    Returns:
        float[n, m_max + 1], in [0, 1], falling along each row. Swap the arguments for E[(1-p)^m].
    """
    a, b = check_beliefs(alpha, beta)
    j = step * np.arange(m_max, dtype=np.float64)
    out = np.ones((a.size, m_max + 1))
    # Every factor is at most 1: the running product can only underflow to an honest zero.
    np.cumprod((a[:, None] + j) / ((a + b)[:, None] + j), axis=1, out=out[:, 1:])
    return out


def mixed_probability(alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int, *, step: float = 1.0) -> FloatArray:
    """Probability that m rollouts contain both outcomes: 1 - E[p^m] - E[(1-p)^m].

    Summed from its increments E[p^m (1-p)] + E[(1-p)^m p], which are all positive, so that f is accurate for V near 0
    or 1.

    Source: TRACE (arXiv 2606.11119), root stage; docs/algorithm.md section 1.

    Args:
        alpha: float[n], > 0.
        beta: float[n], > 0.
        m_max: Largest number of rollouts, >= 1.
        step: 0 for the plug-in form (the paper's), 1 for the posterior form.

    Returns:
        float[n, m_max + 1], with zeros in columns 0 and 1.
    """
    if m_max < 1:
        raise ValueError(f"m_max must be at least 1, got {m_max}")
    a, b = check_beliefs(alpha, beta)
    m = np.arange(1, m_max)
    total = (a + b)[:, None] + step * m
    ups, downs = power_moments(a, b, m_max - 1, step=step), power_moments(b, a, m_max - 1, step=step)
    out = np.zeros((a.size, m_max + 1))
    np.cumsum((ups[:, 1:] * b[:, None] + downs[:, 1:] * a[:, None]) / total, axis=1, out=out[:, 2:])
    return out


def _mean(alpha: npt.ArrayLike, beta: npt.ArrayLike) -> FloatArray:
    a, b = check_beliefs(alpha, beta)
    return a / (a + b)


def _rows(score: FloatArray, profile: FloatArray) -> FloatArray:
    """Outer product with f(0) = f(1) = 0 enforced; `profile` is float[m_max + 1]."""
    if profile.size < 2:
        raise ValueError("m_max must be at least 1, got 0")
    profile[:2] = 0.0
    return score[:, None] * profile


@dataclass(frozen=True, slots=True)
class PlugIn:
    """f(m) = 1 - V^m - (1-V)^m with V the belief's mean.

    Source: TRACE (arXiv 2606.11119), root stage; docs/algorithm.md section 1.
    """

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """See :meth:`RootValue.table`."""
        return mixed_probability(alpha, beta, m_max, step=0.0)


@dataclass(frozen=True, slots=True)
class Posterior:
    """f(m) = 1 - E[p^m] - E[(1-p)^m] under the Beta belief: unsure prompts are worth less than their mean suggests.

    Source: this project, docs/algorithm.md section 1.
    """

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """See :meth:`RootValue.table`."""
        return mixed_probability(alpha, beta, m_max, step=1.0)


@dataclass(frozen=True, slots=True)
class BetaBinomial:
    """Rollouts of one prompt are correlated: p ~ Beta with mean V and intra-class correlation rho.

    rho = 1 / (1 + concentration), so 0 is :class:`PlugIn`; `1 / (1 + fit_kappa(...))` estimates it from counts. Only
    the mean of the belief is used. Source: this project, docs/algorithm.md section 1.

    Attributes:
        rho: Correlation of two outcomes of one prompt, in [0, 1).
    """

    rho: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.rho < 1.0:
            raise ValueError(f"rho must lie in [0, 1), got {self.rho}")

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """See :meth:`RootValue.table`."""
        a, b = check_beliefs(alpha, beta)
        return mixed_probability(a / (a + b), b / (a + b), m_max, step=self.rho / (1.0 - self.rho))


@dataclass(frozen=True, slots=True)
class Pcl:
    """f(m) = 1 - |2V - 1| for every m >= 2: the prompts nearest one half win, with m_min rollouts each.

    Further rollouts of an opened prompt are worth nothing, so a budget of k * m_min opens the k nearest prompts.
    Source: Prompt Curriculum Learning (arXiv 2510.01135), which takes the k smallest |V - 1/2|; here the choice goes
    through the same allocator as every other value, so exploration and m_max apply (set explore=0, m_min=m_max for the
    published rule).
    """

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """See :meth:`RootValue.table`."""
        return _rows(1.0 - np.abs(2.0 * _mean(alpha, beta) - 1.0), np.ones(m_max + 1))


@dataclass(frozen=True, slots=True)
class Vip:
    """f(m) = V(1-V) * (2 - 1/(m-1)) for m >= 2: fall of the RLOO gradient variance V(1-V)/(m-1).

    Source: VIP (arXiv 2602.01601), which minimises sum_i V_i(1-V_i)/(m_i-1) over a given batch. To choose among a pool
    an unopened prompt needs a finite variance too: 2V(1-V), that of one rollout whose baseline is one older rollout.
    Increments from m = 2 on are exactly VIP's.
    """

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """See :meth:`RootValue.table`."""
        v = _mean(alpha, beta)
        m = np.arange(m_max + 1, dtype=np.float64)
        return _rows(v * (1.0 - v), 2.0 - 1.0 / np.maximum(m - 1.0, 0.5))


@dataclass(frozen=True, slots=True)
class Knapsack:
    """f(m) = (1 - V^m - (1-V)^m) * V(1-V)^2: chance of a non-zero gradient times the success it is expected to add.

    Source: Knapsack RL (arXiv 2509.25849), value = ProbNonZeroGradient * InfoGain with InfoGain(p) ~ p(1-p)^2. Its
    fall-back budgets for prompts measured at exactly 0 or 1 are not needed: a Beta belief never reaches either.
    """

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """See :meth:`RootValue.table`."""
        v = _mean(alpha, beta)
        return mixed_probability(alpha, beta, m_max, step=0.0) * (v * (1.0 - v) ** 2)[:, None]


@dataclass(frozen=True, slots=True)
class Signal:
    """f(m) = E[p(1-p)] * (1 - 1/m) under the Beta belief: expected variance of the outcomes within a group of m.

    For a group with share of successes h the mean squared advantage R - h is h(1-h), and E[h(1-h) | p] = p(1-p)(1 - 1/m):
    what a prompt brings into a loss in which prompts count alike, where :class:`Posterior` has only whether it brings
    anything. It is also the first-order rise of the prompt's log odds x: with p = sigmoid(x) the mean of the estimate with
    baseline h is (1 - 1/m) grad p = (1 - 1/m) p(1-p) grad x, so x rises by that times |grad x|^2. And p(1-p) is the squared
    signal-to-noise ratio of one rollout, grad p against the deviation of its outcome, of which the group's own mean as
    baseline costs 1/m. Under the belief E[p(1-p)] = ab / ((a+b)(a+b+1)).

    Source: this project, docs/algorithm.md section 7.
    """

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """See :meth:`RootValue.table`."""
        a, b = check_beliefs(alpha, beta)
        m = np.arange(m_max + 1, dtype=np.float64)
        return _rows(a * b / ((a + b) * (a + b + 1.0)), 1.0 - 1.0 / np.maximum(m, 1.0))


@dataclass(frozen=True, slots=True)
class Uniform:
    """f(m) = 1 - 2^(1-m) for every prompt, as if each succeeded half of the time: even shares, ties by the generator.

    With m_min = m_max = G this is GRPO's fixed group size over randomly drawn prompts.
    """

    def table(self, alpha: npt.ArrayLike, beta: npt.ArrayLike, m_max: int) -> FloatArray:
        """See :meth:`RootValue.table`."""
        a, _ = check_beliefs(alpha, beta)
        return _rows(np.ones(a.size), 1.0 - 2.0 ** (1.0 - np.arange(m_max + 1, dtype=np.float64)))


ROOT_VALUES: dict[str, RootValue] = {
    "plug_in": PlugIn(),
    "posterior": Posterior(),
    "beta_binomial": BetaBinomial(),
    "pcl": Pcl(),
    "vip": Vip(),
    "knapsack": Knapsack(),
    "signal": Signal(),
    "uniform": Uniform(),
}
"""Root value functions with their default parameters, by name."""


def root_value(name: str, **parameters: Any) -> RootValue:
    """Return a root value function by name, with some of its parameters changed.

    Args:
        name: A key of :data:`ROOT_VALUES`.
        **parameters: Fields of that class, such as `rho` of `beta_binomial`.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if name not in ROOT_VALUES:
        raise ValueError(f"unknown root value {name!r}; known: {', '.join(sorted(ROOT_VALUES))}")
    default: Any = ROOT_VALUES[name]
    return replace(default, **parameters)


def flip_success(
    alpha: npt.ArrayLike, beta: npt.ArrayLike, outcome: npt.ArrayLike, k_max: int, *, belief: str = "plug_in"
) -> FloatArray:
    """Probability g(k) that at least one of k continuations differs from the rollout's outcome r.

    plug-in (the paper's): g(k) = 1 - q^k, q = r V + (1-r)(1-V). posterior: g(k) = 1 - E[q^k] with p in place of V,
    which is 1 - prod_{j<k} (a+j)/(a+b+j) for r = 1 and its mirror for r = 0; a graded r in between takes E[q^k] itself,
    so that the posterior tends to the plug-in for every r as the belief sharpens.

    Source: TRACE (arXiv 2606.11119), prefix stage; docs/algorithm.md section 2.

    Args:
        alpha: float[n], Beta parameters of the success probability from each prefix, > 0; counts already seen below it
            included.
        beta: float[n], > 0.
        outcome: float[n], outcome r in [0, 1] of the rollout that the prefix belongs to.
        k_max: Largest number of continuations, >= 0.
        belief: `plug_in` or `posterior`.

    Returns:
        float[n, k_max + 1]; column 0 is zero, increments never rise along a row.

    Raises:
        ValueError: If an outcome lies outside [0, 1] or the belief's name is unknown.
    """
    a, b = check_beliefs(alpha, beta)
    r = np.asarray(outcome, dtype=np.float64)
    if r.shape != a.shape:
        raise ValueError(f"outcome must have one entry for each of {a.size} prefixes, got shape {r.shape}")
    bad = ~((r >= 0.0) & (r <= 1.0))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"outcome[{i}] is {r[i]}, expected a number in [0, 1]")
    same, other = r * a + (1.0 - r) * b, r * b + (1.0 - r) * a
    if _step(belief) == 0.0:
        # Summed from the increments (1-q) q^k, for the same reason as in mixed_probability.
        stay, flip = same / (a + b), other / (a + b)
        increments = flip[:, None] * stay[:, None] ** np.arange(k_max)
    else:
        increments = power_moments(same, other, k_max)[:, :k_max] * other[:, None]
        increments /= (a + b)[:, None] + np.arange(k_max)
        graded = np.flatnonzero((r > 0.0) & (r < 1.0))
        if graded.size:
            powers = _graded_moments(a[graded], b[graded], r[graded], k_max)
            increments[graded] = np.maximum(powers[:, :-1] - powers[:, 1:], 0.0)
    return _cumulate(increments)


def exact_contrast(alpha: npt.ArrayLike, beta: npt.ArrayLike, k_max: int, *, belief: str = "plug_in") -> FloatArray:
    """Contrast of k continuations judged from the prefix alone: 1 - V^(k+1) - (1-V)^(k+1).

    That is the chance that k continuations and one more rollout drawn from the same prefix are mixed, or
    :func:`flip_success` averaged over an outcome drawn from V instead of the one observed. Its first increment is
    2V(1-V), so prefixes are opened in order of V(1-V); it is concave, so unit greedy is exact; and it does not look at
    the outcome, so branching stays exogenous.

    Source: this project, docs/algorithm.md sections 2 and 4.

    Args:
        alpha: float[n], > 0.
        beta: float[n], > 0.
        k_max: Largest number of continuations, >= 0.
        belief: `plug_in` or `posterior`.

    Returns:
        float[n, k_max + 1]; column 0 is zero, increments never rise along a row.
    """
    return mixed_probability(alpha, beta, k_max + 1, step=_step(belief))[:, 1:]


def _step(belief: str) -> float:
    if belief not in _STEP:
        raise ValueError(f"unknown belief {belief!r}; known: {', '.join(sorted(_STEP))}")
    return _STEP[belief]


def _cumulate(increments: FloatArray) -> FloatArray:
    out = np.zeros((increments.shape[0], increments.shape[1] + 1))
    np.cumsum(increments, axis=1, out=out[:, 1:])
    return out


def _graded_moments(a: FloatArray, b: FloatArray, r: FloatArray, k_max: int) -> FloatArray:
    """E[(r p + (1-r)(1-p))^k] under Beta(a, b) for k = 0..k_max; float[n, k_max + 1].

    The sum over i of C(k, i) r^i (1-r)^(k-i) E[p^i (1-p)^(k-i)], built one draw at a time as in a Polya urn: all its
    terms are positive, so nothing cancels, unlike in the alternating expansion around p = 0.
    """
    n = a.size
    out = np.ones((n, k_max + 1))
    # weight[:, i] is the i-th term of that sum.
    weight = np.ones((n, 1))
    for k in range(k_max):
        i = np.arange(k + 1)
        total = (a + b)[:, None] + k
        up = weight * r[:, None] * (a[:, None] + i) / total
        down = weight * (1.0 - r)[:, None] * (b[:, None] + (k - i)) / total
        weight = np.zeros((n, k + 2))
        weight[:, 1:] += up
        weight[:, :-1] += down
        out[:, k + 1] = weight.sum(axis=1)
    return out
