"""Sequential allocation: what further rollouts of a prompt are worth once some of a batch's outcomes are known.

Invariant: over all waves together a prompt gets 0 or between m_min and m_max rollouts, and a wave spends its budget exactly or
as much of it as the bounds allow.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from allocation.contrast import (
    BetaBinomial,
    FloatArray,
    Knapsack,
    PlugIn,
    Posterior,
    RootValue,
    Uniform,
    check_beliefs,
    check_cost,
    power_moments,
)
from allocation.roots import IntArray, check_table

EXACT_LIMIT = 2_000_000
"""Steps of a dynamic program (prompts times budget times group sizes) up to which it is run: some hundredths of a second."""

_CORE = 32
"""Prompts solved exactly around the margin where the whole is too large."""

_EVEN = 1e-9
"""Worth, relative to the largest value, of dealing out evenly what is worth nothing or the same everywhere."""


def further_contrast(
    alpha: npt.ArrayLike,
    beta: npt.ArrayLike,
    successes: npt.ArrayLike,
    failures: npt.ArrayLike,
    k_max: int,
    *,
    step: float = 1.0,
) -> FloatArray:
    """Gain in the probability that a group is mixed from k more rollouts, given the group's outcomes so far.

    A group that is mixed stays mixed: the gain is 0. One that has only succeeded becomes mixed unless all k succeed too: the
    gain is 1 - E[p^k], and its mirror for one that has only failed. Source: docs/algorithm.md section 1, sequentially.

    Args:
        alpha: float[n], first Beta parameter of each prompt's success probability, the group's own outcomes included, > 0.
        beta: float[n], second one, > 0.
        successes: float[n], successes of the group so far.
        failures: float[n], failures of the group so far; at least one of either in every group.
        k_max: Largest number of further rollouts, >= 0.
        step: 1 for the posterior form, 0 for the plug-in form at the mean; see :mod:`allocation.contrast`.

    Returns:
        float[n, k_max + 1]; column 0 is zero, increments never rise along a row.

    Raises:
        ValueError: A group has no outcomes, or counts or parameters are malformed.
    """
    a, b = check_beliefs(alpha, beta)
    s, f = np.asarray(successes, dtype=np.float64), np.asarray(failures, dtype=np.float64)
    if s.shape != a.shape or f.shape != a.shape or not ((s >= 0) & (f >= 0) & (s + f > 0)).all():
        raise ValueError("every group needs outcomes: successes and failures must be >= 0, and not both 0")
    same, other = np.where(f == 0, a, b), np.where(f == 0, b, a)
    # Summed from the increments E[q^k (1 - q)], for the reason given in mixed_probability.
    j = step * np.arange(k_max)
    increments = power_moments(same, other, k_max, step=step)[:, :k_max] * other[:, None]
    increments /= (a + b)[:, None] + j
    increments[(s > 0) & (f > 0)] = 0.0
    gain = np.zeros((a.size, k_max + 1))
    np.cumsum(increments, axis=1, out=gain[:, 1:])
    return gain


def further_value(
    value: RootValue,
    alpha: npt.ArrayLike,
    beta: npt.ArrayLike,
    successes: npt.ArrayLike,
    failures: npt.ArrayLike,
    m_max: int,
) -> FloatArray:
    """Worth of k more rollouts under any value function, given the outcomes so far.

    Values that count mixed groups have :func:`further_contrast`, each under its own law of the outcomes: `plug_in` at the
    updated mean, `posterior` at the updated Beta belief, `beta_binomial` in the urn that rho describes, `uniform` at one half;
    `knapsack` times what it weighs them with. The others do not ask whether a group is mixed, and their worth is
    f(m + k) - f(m) at the updated belief.

    Args:
        value: The value function.
        alpha: float[n], Beta parameters before the batch, > 0.
        beta: float[n], > 0.
        successes: float[n], successes of the batch so far.
        failures: float[n], failures; 1 to m_max outcomes in every group.
        m_max: Largest group.

    Returns:
        float[n, m_max + 1]; column 0 is zero. Beyond m_max - m a row goes on as it ends.
    """
    a, b = check_beliefs(alpha, beta)
    s, f = np.asarray(successes, dtype=np.float64), np.asarray(failures, dtype=np.float64)
    match value:
        case PlugIn():
            return further_contrast(a + s, b + f, s, f, m_max, step=0.0)
        case Posterior():
            return further_contrast(a + s, b + f, s, f, m_max)
        case BetaBinomial(rho=rho):
            step = rho / (1.0 - rho)
            return further_contrast(a / (a + b) + step * s, b / (a + b) + step * f, s, f, m_max, step=step)
        case Uniform():
            return further_contrast(np.ones_like(a), np.ones_like(b), s, f, m_max, step=0.0)
        case Knapsack():
            v = (a + s) / (a + b + s + f)
            return further_contrast(a + s, b + f, s, f, m_max, step=0.0) * (v * (1.0 - v) ** 2)[:, None]
    table = value.table(a + s, b + f, m_max)
    m = (s + f).astype(np.int64)[:, None]
    reached = np.minimum(m + np.arange(m_max + 1), m_max)
    return np.take_along_axis(table, reached, axis=1) - np.take_along_axis(table, m, axis=1)


def allocate_more(
    table: npt.ArrayLike,
    counts: npt.ArrayLike,
    budget: int,
    *,
    m_min: int,
    m_max: int,
    rng: np.random.Generator,
    cost: npt.ArrayLike | None = None,
    tokens: float | None = None,
    exact_limit: int = EXACT_LIMIT,
) -> IntArray:
    """Spend a further wave of root rollouts.

    Maximises sum_i table[i, k_i] subject to sum_i k_i = budget, where a prompt that has rollouts may get from 0 to
    m_max - counts_i more, and one that has none 0 or from m_min to m_max. Exact up to `exact_limit`; beyond it by price, as the
    first wave, with an exact core. Under a budget of tokens by price alone, which may lose a bundle.

    Args:
        table: float[n, >= m_max + 1], value of k more rollouts in column k.
        counts: int[n], rollouts so far.
        budget: Rollouts to spend.
        m_min: Smallest group.
        m_max: Largest group, over all waves.
        rng: Breaks ties.
        cost: float[n] > 0, expected tokens of a rollout; gains are divided by it. None: all cost the same.
        tokens: Most expected tokens to spend; needs `cost`. None: no limit.
        exact_limit: Largest table of the dynamic program.

    Returns:
        int[n], summing to `budget` or, where the bounds do not allow that, to as much below it as they do (as prices reach,
        under a budget of tokens).

    Raises:
        ValueError: A table or a cost is malformed, or tokens are limited without costs.
    """
    values = check_table(table, m_max)
    have = np.asarray(counts, dtype=np.int64)
    if have.shape != values.shape[:1] or (have < 0).any():
        raise ValueError(f"counts must hold the rollouts so far of each of {len(values)} prompts, got {counts!r}")
    if tokens is not None and cost is None:
        raise ValueError("a budget of tokens needs `cost`, the expected tokens of one rollout of each prompt")
    c = np.ones(len(have)) if cost is None else check_cost(cost, len(have))
    values = values / c[:, None]
    k = np.arange(m_max + 1)
    values = values + _EVEN * float(np.abs(values).max(initial=np.finfo(np.float64).tiny)) * k / (k + 1)

    budget = min(budget, int(np.maximum(m_max - have, 0).sum()))
    order = rng.permutation(len(have))  # what follows prefers earlier rows
    values, have, c = values[order], have[order], c[order]
    if tokens is not None:
        found, _ = _greedy(values, have, budget, m_min, m_max, c, tokens)
    elif len(have) * (budget + 1) * (m_max + 1) <= exact_limit:
        found = _exact(values, have, budget, m_min, m_max)
    else:
        found, price = _greedy(values, have, budget, m_min, m_max, c, np.inf)
        found = _solve_core(values, have, found, price, budget, m_min, m_max)
    more = np.zeros(len(have), dtype=np.int64)
    more[order] = found
    return more


def _exact(values: FloatArray, have: IntArray, budget: int, m_min: int, m_max: int) -> IntArray:
    """Best numbers of further rollouts, by a dynamic program; among ties the rows that come first are given more."""
    best = np.full(budget + 1, -np.inf)
    best[0] = 0.0
    choice = np.zeros((len(have), budget + 1), dtype=np.int64)
    for i, count in enumerate(have.tolist()):
        options = np.arange(max(m_max - count, 0) + 1) if count else np.concatenate([[0], np.arange(m_min, m_max + 1)])
        options = options[options <= budget]
        total = np.full((len(options), budget + 1), -np.inf)
        for row, k in enumerate(options.tolist()):
            total[row, k:] = best[: budget + 1 - k] + values[i, k]
        picked = total.argmax(axis=0)
        best = total[picked, np.arange(budget + 1)]
        choice[i] = options[picked]
    left = int(np.flatnonzero(np.isfinite(best)).max())  # the budget, unless the bounds forbid it
    more = np.zeros(len(have), dtype=np.int64)
    for i in range(len(have) - 1, -1, -1):
        more[i] = choice[i, left]
        left -= int(more[i])
    return more


def _greedy(
    values: FloatArray, have: IntArray, budget: int, m_min: int, m_max: int, cost: FloatArray, tokens: float
) -> tuple[IntArray, FloatArray]:
    """Bundles and units in order of price; also each prompt's last price, or its first if nothing was bought."""
    more = np.zeros(len(have), dtype=np.int64)
    price = np.where(have > 0, values[:, 1], values[:, m_min] / m_min)
    heap = [(-p, i) for i, p in enumerate(price.tolist()) if have[i] < m_max]
    heapq.heapify(heap)
    slack = 1e-9 * tokens if np.isfinite(tokens) else 0.0
    while heap and budget:
        offered, i = heapq.heappop(heap)
        size = 1 if have[i] or more[i] else m_min
        if size > budget or size * cost[i] > tokens + slack:
            continue
        more[i] += size
        budget, tokens, price[i] = budget - size, tokens - size * cost[i], -offered
        k = int(more[i])
        if have[i] + k < m_max:
            heapq.heappush(heap, (-float(values[i, k + 1] - values[i, k]), i))
    return more, price


def _solve_core(
    values: FloatArray, have: IntArray, more: IntArray, price: FloatArray, budget: int, m_min: int, m_max: int
) -> IntArray:
    """Re-solve the prompts nearest the margin exactly, all others held, with what the prices left over."""
    inside, outside = np.flatnonzero(more > 0), np.flatnonzero((more == 0) & (have < m_max))
    inside, outside = (
        inside[np.argsort(price[inside], kind="stable")],
        outside[np.argsort(-price[outside], kind="stable")],
    )
    held = max(_CORE // 2, _CORE - outside.size)
    core = np.concatenate([inside[:held], outside[: _CORE - min(held, inside.size)]])
    rest = budget - int(more.sum()) + int(more[core].sum())
    result = more.copy()
    result[core] = _exact(values[core], have[core], rest, m_min, m_max)
    return result
