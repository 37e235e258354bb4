"""The root stage: how many rollouts each prompt of a pool gets.

Invariant: an allocation spends its budget exactly and every prompt gets 0 or between m_min and m_max rollouts; where
that is impossible a ValueError says what to change, nothing is silently dropped.

f is not concave at 0 -> 1 -> 2 (one rollout shows no contrast), so a unit-by-unit greedy stalls. A prompt is therefore
opened with a bundle of m_min, priced at f(m_min) / m_min, and grows by single units at their marginal gain. All prices
are known beforehand and fall along a prompt, so the heap that would hand them out is one sort. The sort is optimal
unless the last bundle does not fit; then the prompts near the margin (the core) are solved again exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from allocation.contrast import FloatArray, check_cost

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

CHOICES = ("best", "proportional")
"""Which prompts of a pool are opened: those of the largest values, or prompts drawn in proportion to their values."""

_CORE = 24
"""Prompts solved exactly around the margin: about a millisecond, and beyond twenty the objective no longer moves."""


@dataclass(frozen=True, slots=True)
class RootPlan:
    """An allocation and how it came about.

    Attributes:
        counts: int[n], rollouts for each prompt.
        explored: bool[n], prompts opened at random by the exploration share, whatever their value.
        explore_chance: Probability that a prompt was explored, before it was drawn; the same for all.
    """

    counts: IntArray
    explored: BoolArray
    explore_chance: float


def allocate_roots(
    table: npt.ArrayLike,
    budget: int,
    *,
    m_min: int = 4,
    m_max: int = 16,
    explore: float = 0.1,
    last_sampled: npt.ArrayLike | None = None,
    rng: np.random.Generator,
    cost: npt.ArrayLike | None = None,
) -> IntArray:
    """Split a budget of rollouts over a pool of prompts; the counts of :func:`plan_roots`.

    Returns:
        int[n], summing to `budget`, each 0 or in [m_min, m_max].
    """
    plan = plan_roots(
        table, budget, m_min=m_min, m_max=m_max, explore=explore, last_sampled=last_sampled, rng=rng, cost=cost
    )
    return plan.counts


def plan_roots(
    table: npt.ArrayLike,
    budget: int,
    *,
    m_min: int = 4,
    m_max: int = 16,
    explore: float = 0.1,
    choice: str = "best",
    last_sampled: npt.ArrayLike | None = None,
    rng: np.random.Generator,
    cost: npt.ArrayLike | None = None,
) -> RootPlan:
    """Maximise sum_i f_i(m_i) subject to sum_i m_i = budget and m_i in {0} U [m_min, m_max].

    O(n log n + budget log budget). Reaches at least 0.999 of :func:`allocate_roots_exact` for values that are concave
    from m_min on (all of :data:`allocation.contrast.ROOT_VALUES`); other tables are allocated by their running-minimum
    gains, feasible but without that promise.

    Source: TRACE (arXiv 2606.11119), root stage; docs/algorithm.md section 1. The exploration share, the tie-breaks and
    the exact core are this project's.

    Args:
        table: float[n, >= m_max + 1], f_i(m) in column m, as made by a :class:`allocation.contrast.RootValue`.
        budget: Number of rollouts, 0 or at least m_min.
        m_min: Smallest group that is worth opening; at least 2 where f(1) = 0, unless m_max is 1 as well.
        m_max: Largest group.
        explore: Share of the budget, in [0, 1], spent on bundles of m_min at prompts drawn uniformly without
            replacement. A fraction of a bundle is rounded up or down at random, so that the share holds on average.
            These prompts may grow.
        choice: `best` for the maximum over all prompts, `proportional` for that over prompts drawn by :func:`draw_prompts`.
        last_sampled: number[n], when each prompt was last sampled (smaller is longer ago); among prompts of equal value
            the least recent goes first. None treats all alike.
        rng: Draws the explored prompts and breaks the remaining ties, never the index.
        cost: float[n] > 0, expected tokens of one rollout. Then sum_i f_i(m_i) / cost_i is maximised; the budget still
            counts rollouts. None: all cost the same.

    Returns:
        The counts and which prompts were explored.

    Raises:
        ValueError: If the budget cannot be spent within the bounds, or an argument is malformed.
    """
    values = check_table(table, m_max)
    n = values.shape[0]
    if cost is not None:
        values = values / check_cost(cost, n)[:, None]
    most = _check_budget(n, budget, m_min, m_max)
    if m_min == 1 < m_max and values.any() and not values[:, 1].any():
        raise ValueError(
            "m_min=1 opens groups that show no contrast (f(1) = 0): use m_min=2, or m_min=m_max=1 for singles"
        )
    if not 0.0 <= explore <= 1.0:
        raise ValueError(f"explore must lie in [0, 1], got {explore}")
    age = np.zeros(n) if last_sampled is None else np.asarray(last_sampled, dtype=np.float64)
    if age.shape != (n,) or np.isnan(age).any():
        raise ValueError(f"last_sampled must hold one number for each of {n} prompts, got shape {age.shape}")

    explored, chance = explored_prompts(n, budget, m_min, explore, rng)
    values = draw_prompts(values, explored, most, m_min, rng) if check_choice(choice) == "proportional" else values
    order = np.lexsort((rng.permutation(n), age))
    counts = spend_rollouts(values, explored, order, budget, most, m_min, m_max)
    return RootPlan(counts, explored, chance)


def allocate_roots_exact(
    table: npt.ArrayLike, budget: int, *, m_min: int = 4, m_max: int = 16, opened: npt.ArrayLike | None = None
) -> IntArray:
    """Solve the root stage exactly, by a dynamic program in O(n * budget * (m_max - m_min)); the oracle of the tests.

    Source: docs/algorithm.md section 1.

    Args:
        table: float[n, >= m_max + 1], any values, concave or not.
        budget: Number of rollouts.
        m_min: Smallest group.
        m_max: Largest group.
        opened: bool[n], prompts that must get at least m_min (such as the explored ones). None: none.

    Returns:
        int[n], an optimal allocation. Ties go to the lower index: use :func:`allocate_roots` where fairness matters.

    Raises:
        ValueError: As :func:`plan_roots`; also if the opened prompts alone exceed the budget.
    """
    values = check_table(table, m_max)
    n = values.shape[0]
    most = _check_budget(n, budget, m_min, m_max)
    forced = np.zeros(n, dtype=bool) if opened is None else np.asarray(opened, dtype=bool)
    if forced.shape != (n,) or int(forced.sum()) > most:
        raise ValueError(
            f"opened must be bool[{n}] with at most {most} prompts set, got {forced.shape}, {forced.sum()} set"
        )
    return _dynamic_program(values, budget, m_min, m_max, forced)


def root_objective(table: npt.ArrayLike, counts: npt.ArrayLike) -> float:
    """Value sum_i f_i(m_i) of an allocation; for `plug_in` and `posterior` the expected number of mixed prompts."""
    m = np.asarray(counts, dtype=np.int64)
    return float(np.asarray(table, dtype=np.float64)[np.arange(m.size), m].sum())


def explored_prompts(
    n: int, budget: int, m_min: int, explore: float, rng: np.random.Generator
) -> tuple[BoolArray, float]:
    """Draw the prompts that the exploration share opens, whatever their value.

    Args:
        n: Prompts in the pool.
        budget: Rollouts.
        m_min: Rollouts of a bundle.
        explore: Share of the budget. A fraction of a bundle is rounded up or down at random, so that it holds on average.
        rng: Draws.

    Returns:
        bool[n], and the probability of each prompt to be drawn.
    """
    most, share = min(n, budget // m_min), explore * budget / m_min
    fraction = share - int(share)
    bundles = min(int(share) + int(rng.random() < fraction), most)
    chance = ((1 - fraction) * min(int(share), most) + fraction * min(int(share) + 1, most)) / max(n, 1)
    explored = np.zeros(n, dtype=bool)
    explored[rng.choice(n, size=bundles, replace=False) if n else []] = True
    return explored, chance


def check_choice(choice: str) -> str:
    """Returns the name of a way to choose prompts.

    Raises:
        ValueError: It is unknown.
    """
    if choice not in CHOICES:
        raise ValueError(f"unknown root_choice {choice!r}; known: {', '.join(CHOICES)}")
    return choice


def draw_prompts(values: FloatArray, kept: BoolArray, most: int, m_min: int, rng: np.random.Generator) -> FloatArray:
    """Draws prompts with chances proportional to the value of their smallest group, and takes all value from the others.

    The best prompts of a pool are always of the same kind, those near one half now; what is learned from them alone disturbs
    what was known of the rest. Drawn in proportion, a prompt that is worth half as much comes half as often, and one that
    teaches nothing hardly ever. Drawing is without replacement: one after the other, each from what is left.

    Source: this project, docs/algorithm.md section 1; drawn by the largest log value plus Gumbel noise, which is the same as
    by the keys of Efraimidis and Spirakis (2006).

    Args:
        values: float[n, > m_min], f_i(m) with zeros in column 0.
        kept: bool[n], prompts that keep their value without being drawn, such as those explored.
        most: Prompts to be left with a value, the kept ones among them.
        m_min: Smallest group.
        rng: Draws.

    Returns:
        float of the shape of `values`.
    """
    weight = np.maximum(values[:, m_min], 0.0)
    with np.errstate(divide="ignore"):
        keys = np.log(weight) + rng.gumbel(size=weight.size)
    keys[kept] = np.inf
    drawn = np.zeros(weight.size, dtype=bool)
    drawn[np.argsort(-keys, kind="stable")[: max(most, int(kept.sum()))]] = True
    return np.where(drawn[:, None], values, 0.0)


def largest_budget(n: int, budget: int, m_min: int, m_max: int) -> int:
    """Largest budget, at most `budget`, that n prompts can take in groups of m_min to m_max; what :func:`plan_roots` accepts.

    Source: k groups add up to anything from k m_min to k m_max, and more groups to more.
    """
    return min(budget, min(n, budget // m_min) * m_max)


def spend_rollouts(
    values: FloatArray, explored: BoolArray, order: IntArray, budget: int, most: int, m_min: int, m_max: int
) -> IntArray:
    """The deterministic part of :func:`plan_roots`.

    Args:
        values: float[n, m_max + 1], f_i(m) with zeros in column 0.
        explored: bool[n], prompts that get a bundle whatever their value, at most `most`.
        order: int[n], which of several prompts of equal value goes first.
        budget: Rollouts to spend.
        most: Prompts that the budget can open.
        m_min: Smallest group.
        m_max: Largest group.

    Returns:
        int[n].
    """
    # Equal values that were computed in two ways differ in the last bits: they are ties all the same.
    scale = max(float(np.abs(values).max(initial=0.0)), np.finfo(np.float64).tiny)
    price = np.round(values[:, m_min] / (m_min * scale), 12)
    price[explored] = np.inf
    order = order[np.argsort(-price[order], kind="stable")]
    counts, solved = _greedy(values / scale, price, order, budget, most, m_min, m_max)
    return counts if solved else _solve_core(values, counts, order, explored, m_min, m_max)


def _greedy(
    values: FloatArray, price: FloatArray, order: IntArray, budget: int, most: int, m_min: int, m_max: int
) -> tuple[IntArray, bool]:
    """Bundles and units in order of price; the second result says whether the allocation is certainly optimal."""
    counts = np.zeros(values.shape[0], dtype=np.int64)
    # No allocation opens more than `most`; one further bundle is offered to show when the price asks for it in vain.
    top = order[: most + 1] if most else order[:0]
    if not top.size:
        return counts, True
    gain = np.empty((top.size, m_max - m_min + 1))
    gain[:, 0] = price[top]
    gain[:, 1:] = np.round(np.diff(values[top, m_min : m_max + 1], axis=1), 12)
    falling = np.minimum.accumulate(gain, axis=1)
    # Step-major and stable: among equal prices bundles come before units and units are dealt out in rounds.
    sequence = np.argsort(-falling.T.ravel(), kind="stable")
    step, who = np.divmod(sequence, top.size)
    spent = np.cumsum(np.where(step == 0, m_min, 1))
    fit = int(np.searchsorted(spent, budget, side="right"))
    taken = np.bincount(who[:fit], weights=np.where(step[:fit] == 0, m_min, 1), minlength=top.size).astype(np.int64)
    rest = budget - int(spent[fit - 1])
    if rest == 0:
        counts[top] = taken
        return counts, bool(np.array_equal(gain, falling))

    # The next item is a bundle that does not fit. Either the rest grows opened prompts ...
    choices = []
    later = np.flatnonzero((step[fit:] > 0) & (taken[who[fit:]] > 0))[:rest] + fit
    if later.size == rest:
        choices.append(taken + np.bincount(who[later], minlength=top.size))
    # ... or the bundle is completed with the cheapest units handed out so far.
    units = np.flatnonzero(step[:fit] > 0)
    missing = m_min - rest
    if units.size >= missing:
        grown = taken - np.bincount(who[units[units.size - missing :]], minlength=top.size)
        grown[who[fit]] += m_min
        choices.append(grown)
    # One of the two is possible whenever the budget is (see _check_budget): the first fails only if all opened are
    # full.
    counts[top] = max(choices, key=lambda c: root_objective(values[top], c))
    return counts, False


def _solve_core(
    values: FloatArray, counts: IntArray, order: IntArray, explored: BoolArray, m_min: int, m_max: int
) -> IntArray:
    """Re-solve the prompts nearest the margin exactly, all others held; keep the result only if it is better."""
    opened = counts[order] > 0
    inside, outside = order[opened], order[~opened]
    half = _CORE // 2
    low = max(half, _CORE - outside.size)
    core = np.concatenate([inside[-low:], outside[: _CORE - min(low, inside.size)]])
    core_budget = int(counts[core].sum())
    better = _dynamic_program(values[core], core_budget, m_min, m_max, explored[core])
    old, new = root_objective(values[core], counts[core]), root_objective(values[core], better)
    if new <= old + 1e-12 * abs(old):
        return counts
    result = counts.copy()
    result[core] = better
    return result


def _dynamic_program(values: FloatArray, budget: int, m_min: int, m_max: int, forced: BoolArray) -> IntArray:
    """Best counts for the rows of `values`; earlier rows win ties. The caller has checked that a solution exists."""
    n = values.shape[0]
    options = np.concatenate([[0], np.arange(m_min, m_max + 1)])
    choice = np.zeros((n, budget + 1), dtype=np.int16 if options.size < 32_000 else np.int32)
    padded = np.full(m_max + budget + 1, -np.inf)  # padded[m_max + s] is the best value of spending exactly s so far
    padded[m_max] = 0.0
    for i in range(n):
        shifted = np.lib.stride_tricks.sliding_window_view(padded, budget + 1)[m_max - options]
        total = shifted + values[i, options][:, None]
        if forced[i]:
            total[0] = -np.inf
        choice[i] = np.argmax(total, axis=0)
        padded[m_max:] = np.take_along_axis(total, choice[i][None].astype(np.int64), axis=0)[0]
    counts = np.zeros(n, dtype=np.int64)
    left = budget
    for i in range(n - 1, -1, -1):
        counts[i] = options[choice[i, left]]
        left -= int(counts[i])
    return counts


def check_table(table: npt.ArrayLike, m_max: int) -> FloatArray:
    """Return columns 0 to m_max of a table as float64, less column 0: only differences to an unopened prompt count.

    Raises:
        ValueError: If columns are missing or a value is not finite (its row is named).
    """
    values = np.asarray(table, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < m_max + 1:
        raise ValueError(
            f"table must be float[n, >= {m_max + 1}] (one column for each m up to m_max), got {values.shape}"
        )
    values = values[:, : m_max + 1]
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"table[{i}] holds a value that is not finite: {values[i].tolist()}")
    return values - values[:, :1] if np.any(values[:, 0]) else values


def _check_budget(n: int, budget: int, m_min: int, m_max: int) -> int:
    """Return the largest number of prompts that the budget can open; a budget fits iff that many can absorb it."""
    if not 1 <= m_min <= m_max:
        raise ValueError(f"need 1 <= m_min <= m_max, got m_min={m_min}, m_max={m_max}")
    if budget < 0:
        raise ValueError(f"budget must not be negative, got {budget}")
    if budget == 0:
        return 0
    if n == 0:
        raise ValueError(f"the pool is empty, but a budget of {budget} rollouts is to be spent: supply prompts")
    if budget < m_min:
        raise ValueError(f"budget {budget} is smaller than one group of m_min={m_min}: raise the budget or lower m_min")
    most = min(n, budget // m_min)
    if budget > n * m_max:
        raise ValueError(
            f"budget {budget} exceeds n * m_max = {n} * {m_max} = {n * m_max}: "
            "lower the budget, raise m_max or widen the pool"
        )
    if budget > most * m_max:
        raise ValueError(
            f"budget {budget} is no sum of groups of {m_min} to {m_max} rollouts ({most} groups hold at most "
            f"{most * m_max}, {most + 1} need at least {(most + 1) * m_min}): change the budget or widen m_min..m_max"
        )
    return most
