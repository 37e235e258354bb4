"""The root stage under a budget of tokens: rollouts cost what they are expected to generate.

Invariant: the expected tokens of an allocation never exceed the budget, nor its rollouts theirs; every prompt gets 0 or between
m_min and m_max rollouts; and no prompt is left that could take more of what remains.

As in `allocation.roots` a prompt is opened with a bundle of m_min and grows by single rollouts, all sold in order of price;
here a price is gain per token. What does not fit is passed over. The prompts near the margin (the core) are then solved
again by a dynamic program over a grid of tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from allocation.contrast import FloatArray, check_cost
from allocation.roots import (
    BoolArray,
    IntArray,
    RootPlan,
    check_choice,
    check_table,
    draw_prompts,
    root_objective,
    spend_rollouts,
)

_CORE = 48
"""Prompts solved again around the margin."""

_GRID = 8192
"""Steps into which the tokens of the core are divided; each prompt of the core can waste one."""

_HALVINGS = 8
"""Steps of the search for the price of a rollout in the core."""

_MIXES = tuple(float(t) for t in np.linspace(1.0, 0.0, 9))
"""Shares of the price that are charged for tokens, the rest for rollouts, tried where both budgets bind."""

_SLACK = 1e-9


def plan_token_roots(
    table: npt.ArrayLike,
    tokens: float,
    budget: int,
    *,
    cost: npt.ArrayLike,
    m_min: int = 4,
    m_max: int = 16,
    explore: float = 0.1,
    choice: str = "best",
    last_sampled: npt.ArrayLike | None = None,
    core: bool = True,
    rng: np.random.Generator,
) -> RootPlan:
    """Maximise sum_i f_i(m_i) subject to sum_i cost_i m_i <= tokens, sum_i m_i <= budget, m_i in {0} U [m_min, m_max].

    O(n log n). Where tokens alone bind and values are concave from m_min on, at most the value of one bundle is lost against
    the optimum: the greedy solution is that of the linear relaxation but for its last item. The core closes most of that, and
    what remains is how well whole rollouts pack: with 10 to 30 opened prompts 0.999 of the optimum was reached on average
    and 0.996 at worst, with 400 always 0.999. Where both budgets bind, prices charge for both, in the best of nine mixes.
    Ties and exploration are as in :func:`allocation.roots.plan_roots`.

    Source: this project, docs/algorithm.md section 1; the relaxation is Dantzig's (1957).

    Args:
        table: float[n, >= m_max + 1], f_i(m) in column m.
        tokens: Expected tokens to spend, at least m_min rollouts of the cheapest prompt.
        budget: Most rollouts.
        cost: float[n] > 0, expected tokens of one rollout.
        m_min: Smallest group that is worth opening.
        m_max: Largest group.
        explore: Share of the tokens (at the pool's mean cost) or of the rollouts, whichever are scarcer, in [0, 1], spent on
            bundles at prompts drawn uniformly. Held to as many bundles as fit whichever are drawn, so that all prompts are
            explored equally often.
        choice: As in :func:`allocation.roots.plan_roots`; the prompts drawn are as many as both budgets could open.
        last_sampled: number[n], when each prompt was last sampled; of equal prices the least recent goes first.
        core: Whether to solve the core again. Without, a plan takes a tenth of the time and may lose a bundle.
        rng: Draws the explored prompts and breaks the remaining ties.

    Returns:
        The plan. What it leaves of the tokens buys no rollout of an opened prompt below m_max, and no bundle, unless the budget
        of rollouts is spent.

    Raises:
        ValueError: An argument is malformed, or no bundle fits.
    """
    values, c = _check(table, tokens, budget, cost, m_min, m_max)
    n = c.size
    if not 0.0 <= explore <= 1.0:
        raise ValueError(f"explore must lie in [0, 1], got {explore}")
    age = np.zeros(n) if last_sampled is None else np.asarray(last_sampled, dtype=np.float64)
    if age.shape != (n,) or np.isnan(age).any():
        raise ValueError(f"last_sampled must hold one number for each of {n} prompts, got shape {age.shape}")

    dearest = np.cumsum(np.sort(c)[::-1]) * m_min
    fit = min(int(np.searchsorted(dearest, tokens * (1 + _SLACK), side="right")), budget // m_min)
    share = explore * min(tokens / float(c.mean()), budget) / m_min
    fraction = share - int(share)
    bundles = min(int(share) + int(rng.random() < fraction), fit)
    explored = np.zeros(n, dtype=bool)
    explored[rng.choice(n, size=bundles, replace=False)] = True
    chance = ((1 - fraction) * min(int(share), fit) + fraction * min(int(share) + 1, fit)) / n
    if check_choice(choice) == "proportional":
        cheapest = np.cumsum(np.sort(c)) * m_min
        could = min(int(np.searchsorted(cheapest, tokens * (1 + _SLACK), side="right")), budget // m_min)
        values = draw_prompts(values / c[:, None], explored, could, m_min, rng) * c[:, None]

    order = np.lexsort((rng.permutation(n), age))
    best, best_value = np.zeros(n, dtype=np.int64), -1.0
    most = min(n, budget // m_min)
    if budget <= most * m_max:
        # The optimum for the rollouts alone, if its tokens happen to be there.
        counts = spend_rollouts(values, explored, order, budget, most, m_min, m_max)
        if float(c @ counts) <= tokens * (1 + _SLACK):
            return RootPlan(counts, explored, chance)
    for mix in _MIXES:
        # One price per token, in units of the mean cost, and one per rollout.
        counts = _greedy(values, c, mix * c / c.mean() + (1 - mix), explored, order, tokens, budget, m_min, m_max)
        value = root_objective(values, counts)
        if value > best_value * (1 + 1e-12):
            best, best_value = counts, value
        if mix == 1.0 and counts.sum() < budget:
            break  # rollouts are not scarce, and need no price
    if core:
        best = _solve_core(values, c, best, explored, order, tokens, budget, m_min, m_max)
    return RootPlan(_top_up(values, c, best, order, tokens, budget, m_min, m_max), explored, chance)


def allocate_token_roots_exact(
    table: npt.ArrayLike, tokens: int, budget: int, *, cost: npt.ArrayLike, m_min: int = 4, m_max: int = 16
) -> IntArray:
    """Solve the same problem exactly for whole costs, in O(n * tokens * budget * (m_max - m_min)); for the tests.

    Args:
        table: float[n, >= m_max + 1], any values.
        tokens: Tokens to spend.
        budget: Most rollouts.
        cost: int[n] > 0.
        m_min: Smallest group.
        m_max: Largest group.

    Returns:
        int[n], an optimal allocation.

    Raises:
        ValueError: As :func:`plan_token_roots`; also if a cost is no whole number.
    """
    values, c = _check(table, tokens, budget, cost, m_min, m_max)
    whole = np.round(c).astype(np.int64)
    if (whole != c).any():
        raise ValueError(f"the exact solution needs costs in whole tokens, got {c[whole != c][0]}")
    options = [0, *range(m_min, min(m_max, budget) + 1)]
    scarce = budget * int(whole.min()) < tokens  # else the tokens run out first, and rollouts need not be counted
    best = np.zeros((tokens + 1, budget + 1 if scarce else 1))
    choices = []
    for row, each in zip(values, whole.tolist(), strict=True):
        total = np.full((len(options), *best.shape), -np.inf)
        for j, m in enumerate(options):
            if m * each <= tokens:
                used = m if scarce else 0
                total[j, m * each :, used:] = best[: tokens + 1 - m * each, : best.shape[1] - used] + row[m]
        choices.append(np.argmax(total, axis=0))
        best = total.max(axis=0)
    counts = np.zeros(c.size, dtype=np.int64)
    for i in range(c.size - 1, -1, -1):
        counts[i] = options[choices[i][tokens, budget if scarce else 0]]
        tokens, budget = tokens - int(counts[i] * whole[i]), budget - int(counts[i])
    return counts


def take_fitting(who: IntArray, size: IntArray, tokens_of: FloatArray, tokens: float, budget: int) -> BoolArray:
    """Goes through a list of items and takes each that still fits; bool[items].

    Of what does not fit nothing further of the same owner is taken. Earlier items of an owner come before those that need them.

    Args:
        who: int[items], owner of each item.
        size: int[items], rollouts of each item.
        tokens_of: float[items], tokens of each item; of one owner those of items of equal size are equal.
        tokens: Tokens to spend.
        budget: Rollouts to spend.
    """
    taken = np.zeros(who.size, dtype=bool)
    blocked = np.zeros(int(who.max(initial=-1)) + 1, dtype=bool)
    slack = _SLACK * tokens
    left = np.arange(who.size)
    while left.size:
        spent, rolled = np.cumsum(tokens_of[left]), np.cumsum(size[left])
        fit = min(
            int(np.searchsorted(spent, tokens + slack, side="right")),
            int(np.searchsorted(rolled, budget, side="right")),
        )
        taken[left[:fit]] = True
        if fit:
            tokens, budget = tokens - float(spent[fit - 1]), budget - int(rolled[fit - 1])
        left = left[fit:]
        blocked[who[left[(tokens_of[left] > tokens + slack) | (size[left] > budget)]]] = True
        left = left[~blocked[who[left]]]
    return taken


def _greedy(
    values: FloatArray,
    cost: FloatArray,
    charge: FloatArray,
    explored: BoolArray,
    order: IntArray,
    tokens: float,
    budget: int,
    m_min: int,
    m_max: int,
) -> IntArray:
    """Bundles and units in order of gain per charge, as far as they fit."""
    scale = max(float(np.abs(values).max(initial=0.0)), np.finfo(np.float64).tiny)
    price = values[:, m_min] / (m_min * scale * charge)
    price[explored] = np.inf
    # Prices that were computed in two ways differ in the last bits: they are ties all the same.
    order = order[np.argsort(-np.round(price[order], 12), kind="stable")]
    # Prompts far beyond the tokens are not offered; what little is left may find one of them later (_top_up).
    reach = int(np.searchsorted(np.cumsum(cost[order]) * m_min, tokens, side="right"))
    top = order[: reach + _CORE]
    gain = np.empty((top.size, m_max - m_min + 1))
    gain[:, 0] = price[top]
    gain[:, 1:] = np.diff(values[top, m_min : m_max + 1], axis=1) / (scale * charge[top, None])
    falling = np.round(np.minimum.accumulate(gain, axis=1), 12)
    # Step-major and stable: among equal prices bundles come before units and units are dealt out in rounds.
    step, who = np.divmod(np.argsort(-falling.T.ravel(), kind="stable"), top.size)
    size = np.where(step == 0, m_min, 1)
    taken = take_fitting(who, size, size * cost[top][who], tokens, budget)
    counts = np.zeros(cost.size, dtype=np.int64)
    counts[top] = np.bincount(who[taken], weights=size[taken], minlength=top.size)
    return counts


def _solve_core(
    values: FloatArray,
    cost: FloatArray,
    counts: IntArray,
    explored: BoolArray,
    order: IntArray,
    tokens: float,
    budget: int,
    m_min: int,
    m_max: int,
) -> IntArray:
    """Re-solve the prompts nearest the margin on a grid of tokens, all others held; keep the result only if it is better."""
    price = values[:, m_min] / cost
    order = order[np.argsort(-price[order], kind="stable")]
    opened = counts[order] > 0
    inside, outside = order[opened], order[~opened]
    held = max(_CORE // 2, _CORE - outside.size)
    core = np.concatenate([inside[-held:], outside[: _CORE - min(held, inside.size)]])
    rest = tokens - float(cost @ counts) + float(cost[core] @ counts[core])
    options = np.concatenate([[0], np.arange(m_min, m_max + 1)])
    steps = np.ceil(np.outer(cost[core], options) * (_GRID / rest) * (1 - _SLACK)).astype(np.int64)
    worth = values[np.ix_(core, options)]
    worth[explored[core], 0] = -np.inf  # an explored prompt keeps its bundle
    most = budget - int(counts.sum()) + int(counts[core].sum())
    result, result_value = counts, root_objective(values[core], counts[core]) * (1 + 1e-12)
    each, low, high = 0.0, 0.0, float(worth.max()) / m_min  # the price of a rollout
    for _ in range(_HALVINGS):
        chosen = _knapsack(worth - each * options, steps)
        if chosen is None:
            break
        found = options[chosen]
        if fits := int(found.sum()) <= most:
            value = root_objective(values[core], found)
            if value > result_value:
                result, result_value = counts.copy(), value
                result[core] = found
            if each == 0.0:
                break  # rollouts are not scarce
        low, high = (low, each) if fits else (each, high)
        each = (low + high) / 2
    return result


def _knapsack(worth: FloatArray, steps: IntArray) -> IntArray | None:
    """Chooses one option of each row so that the worth is largest and the steps are at most the grid; int[n].

    `None` if no choice of finite worth fits, which rounding up to whole steps can bring about.
    """
    best = np.zeros(_GRID + 1)  # best[s] is the largest worth of at most s steps so far
    choices = np.zeros((steps.shape[0], _GRID + 1), dtype=np.int32)
    for i, (row, shifts) in enumerate(zip(worth, steps.tolist(), strict=True)):
        new = np.full(_GRID + 1, -np.inf)
        for j, shift in enumerate(shifts):
            if shift > _GRID:
                break
            total = best[: _GRID + 1 - shift] + row[j]
            better = total > new[shift:]
            np.copyto(new[shift:], total, where=better)
            np.copyto(choices[i, shift:], j, where=better)
        best = new
    if not np.isfinite(best[_GRID]):
        return None
    result, left = np.zeros(steps.shape[0], dtype=np.int64), _GRID
    for i in range(steps.shape[0] - 1, -1, -1):
        result[i] = choices[i, left]
        left -= int(steps[i, result[i]])
    return result


def _top_up(
    values: FloatArray,
    cost: FloatArray,
    counts: IntArray,
    order: IntArray,
    tokens: float,
    budget: int,
    m_min: int,
    m_max: int,
) -> IntArray:
    """Spends what is left, one bundle or rollout at a time, where gain per token is largest among what fits."""
    counts = counts.copy()
    rows = np.arange(cost.size)
    slack = _SLACK * tokens
    tokens, budget = tokens - float(cost @ counts), budget - int(counts.sum())
    while True:
        size = np.where(counts == 0, m_min, 1)
        fits = (counts + size <= m_max) & (size * cost <= tokens + slack) & (size <= budget)
        if not fits.any():
            return counts
        gain = (values[rows, np.minimum(counts + size, m_max)] - values[rows, counts]) / (size * cost)
        i = int(order[np.argmax(np.where(fits, gain, -np.inf)[order])])
        counts[i] += size[i]
        tokens, budget = tokens - float(size[i] * cost[i]), budget - int(size[i])


def _check(
    table: npt.ArrayLike, tokens: float, budget: int, cost: npt.ArrayLike, m_min: int, m_max: int
) -> tuple[FloatArray, FloatArray]:
    values = check_table(table, m_max)
    c = check_cost(cost, values.shape[0])
    if not 1 <= m_min <= m_max:
        raise ValueError(f"need 1 <= m_min <= m_max, got m_min={m_min}, m_max={m_max}")
    if not c.size:
        raise ValueError(f"the pool is empty, but {tokens} tokens are to be spent: supply prompts")
    if budget < m_min:
        raise ValueError(f"budget {budget} is smaller than one group of m_min={m_min}: raise the budget or lower m_min")
    if not np.isfinite(tokens) or tokens * (1 + _SLACK) < m_min * float(c.min()):
        raise ValueError(
            f"{tokens} tokens are fewer than one group of m_min={m_min} rollouts takes ({m_min * float(c.min()):.0f} at the "
            "cheapest prompt): raise the token budget or lower m_min"
        )
    return values, c
