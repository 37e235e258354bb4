"""How near the two stages come to the best allocation there is: against dynamic programs that try everything.

Invariant: the programs know nothing of prices, bundles or sorting; they are slow, and right for any table of values.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from allocation.arena.synthetic import SyntheticWorld
from allocation.contrast import ROOT_VALUES, FloatArray, exact_contrast, flip_success
from allocation.prefixes import allocate_prefixes
from allocation.roots import allocate_roots_exact, plan_roots, root_objective

M_MIN, M_MAX, POOL_FACTOR = 4, 16, 4
ROLLOUTS, DEPTHS, CONTINUATIONS = 4, 4, 8
"""Of each prompt in the prefix stage: root rollouts, inner prefixes of each, and continuations to spend."""


def beliefs(world: SyntheticWorld, n: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Returns Beta parameters of n prompts, float64 [n] each: a noisy prediction worth 4 outcomes, and up to 8 outcomes."""
    v = world.root_values(world.draw(rng, n))
    noisy = 1 / (1 + np.exp(-(np.log(v / (1 - v)) + rng.normal(size=n))))
    seen = rng.integers(9, size=n)
    successes = rng.binomial(seen, v)
    mean = np.clip(noisy, 1e-3, 1 - 1e-3)
    return 4 * mean + successes, 4 * (1 - mean) + seen - successes


def root_rows(prompts: int, seed: int, values: tuple[str, ...], shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """Compares the root stage with `allocation.roots.allocate_roots_exact`, the explored prompts given to both.

    Args:
        prompts: Size of the pool; the budget is that of the default pool factor.
        seed: Seeds beliefs and ties.
        values: Names of value functions.
        shares: Exploration shares.

    Returns:
        A row for each pair, `value` being the ratio of the objectives.
    """
    rng = np.random.default_rng([seed, 1])
    alpha, beta = beliefs(SyntheticWorld("skewed", seed, prompts=10**6), prompts, rng)
    budget = prompts * M_MIN // POOL_FACTOR
    rows = []
    for name in values:
        table = ROOT_VALUES[name].table(alpha, beta, M_MAX)
        for share in shares:
            start = time.perf_counter()
            plan = plan_roots(table, budget, m_min=M_MIN, m_max=M_MAX, explore=share, rng=rng)
            took = time.perf_counter() - start
            best = allocate_roots_exact(table, budget, m_min=M_MIN, m_max=M_MAX, opened=plan.explored)
            found, exact = root_objective(table, plan.counts), root_objective(table, best)
            rows.append(
                {
                    "figure": f"roots, {name}, explore {share:g}",
                    "prompts": prompts,
                    "budget": budget,
                    "objective": found,
                    "exact_objective": exact,
                    "value": found / exact,
                    "milliseconds": took * 1e3,
                    "exact_milliseconds": (time.perf_counter() - start - took) * 1e3,
                }
            )
    return rows


def prefix_rows(prompts: int, seed: int, caps: tuple[int | None, ...]) -> list[dict[str, Any]]:
    """Compares the prefix stage, all prompts in one call, with `best_prefix_objective`.

    Args:
        prompts: Prompts, each with 4 rollouts of 4 inner prefixes and 8 continuations to spend.
        seed: Seeds beliefs, outcomes and ties.
        caps: Caps on the continuations of one rollout.

    Returns:
        A row for each mode, belief and cap, `value` being the ratio of the objectives.
    """
    rng = np.random.default_rng([seed, 2])
    n = prompts * ROLLOUTS * DEPTHS
    alpha, beta = beliefs(SyntheticWorld("balanced", seed, prompts=10**6), n, rng)
    prompt = np.repeat(np.arange(prompts), ROLLOUTS * DEPTHS)
    rollout = np.tile(np.repeat(np.arange(ROLLOUTS), DEPTHS), prompts)
    outcome = np.repeat(rng.integers(2, size=prompts * ROLLOUTS), DEPTHS).astype(np.float64)
    rows = []
    for mode in ("flip", "exact"):
        for belief in ("plug_in", "posterior"):
            if mode == "flip":
                table = flip_success(alpha, beta, outcome, CONTINUATIONS, belief=belief)
            else:
                table = exact_contrast(alpha, beta, CONTINUATIONS, belief=belief)
            for cap in caps:
                start = time.perf_counter()
                counts = allocate_prefixes(
                    alpha,
                    beta,
                    outcome,
                    rollout,
                    np.full(prompts, CONTINUATIONS),
                    mode=mode,
                    belief=belief,
                    cap_per_rollout=cap,
                    prompt=prompt,
                    rng=rng,
                )
                took = time.perf_counter() - start
                found = float(table[np.arange(n), counts].sum())
                exact = best_prefix_objective(table, cap)
                rows.append(
                    {
                        "figure": f"prefixes, {mode}, {belief}, {'no cap' if cap is None else f'cap {cap}'}",
                        "prefixes": n,
                        "budget": int(counts.sum()),
                        "objective": found,
                        "exact_objective": exact,
                        "value": found / exact,
                        "milliseconds": took * 1e3,
                    }
                )
    return rows


def best_prefix_objective(table: FloatArray, cap: int | None) -> float:
    """Returns the greatest sum over all prompts, by dynamic programs over prefixes and then over rollouts.

    Args:
        table: Worth of k continuations of each prefix, float64 [prompts * rollouts * depths, continuations + 1].
        cap: Most continuations of one rollout.
    """
    worth = table.reshape(-1, ROLLOUTS, DEPTHS, table.shape[1])
    of_rollout = worth[:, :, 0]
    for depth in range(1, DEPTHS):
        of_rollout = _best_split(of_rollout, worth[:, :, depth])
    if cap is not None:
        of_rollout = np.where(np.arange(table.shape[1]) <= cap, of_rollout, -np.inf)
    of_prompt = of_rollout[:, 0]
    for rollout in range(1, ROLLOUTS):
        of_prompt = _best_split(of_prompt, of_rollout[:, rollout])
    return float(of_prompt.max(axis=-1).sum())


def _best_split(left: FloatArray, right: FloatArray) -> FloatArray:
    """Returns, for each k, the best of left[j] + right[k - j]; float64 [..., continuations + 1]."""
    best = np.full_like(left, -np.inf)
    for k in range(left.shape[-1]):
        best[..., k] = (left[..., : k + 1] + right[..., k::-1]).max(axis=-1)
    return best
