"""The prefix stage: how many continuations each inner prefix gets.

Invariant: prompts do not share budgets, so the answer for a prompt never depends on which other prompts are in the
call; within a prompt the budget is spent exactly unless there are no prefixes, the caps forbid it or the mode is
`none`.

Increments fall along every prefix, so taking the largest ones is the exact maximum of the sum, also under the caps
(budgets and caps per rollout and per prefix are nested, a laminar matroid). That is a sort, done for all prompts of a
call at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from allocation.contrast import FloatArray, check_beliefs, check_cost, exact_contrast, flip_success
from allocation.roots import IntArray
from allocation.token_budget import take_fitting

PREFIX_MODES = ("flip", "exact", "random", "entropy", "none")

_FIRST_DEPTH = 4
"""Increments tabulated at first; prompts in which a prefix takes all of them are tabulated again, twice as deep."""


def allocate_prefixes(
    alpha: npt.ArrayLike,
    beta: npt.ArrayLike,
    outcome: npt.ArrayLike,
    rollout: npt.ArrayLike,
    budget: int | npt.ArrayLike,
    *,
    mode: str = "flip",
    belief: str = "plug_in",
    cap_per_rollout: int | None = None,
    cap_per_prefix: int | None = None,
    spent: npt.ArrayLike | None = None,
    cost: npt.ArrayLike | None = None,
    tokens: float | npt.ArrayLike | None = None,
    score: npt.ArrayLike | None = None,
    prompt: npt.ArrayLike | None = None,
    rng: np.random.Generator,
) -> IntArray:
    """Spend continuations on the inner prefixes of finished rollouts, for one prompt or many.

    Modes:
        flip: maximise sum_H g_H(k_H), the expected number of prefixes with a continuation unlike their rollout (the
            paper's).
        exact: the same with :func:`allocation.contrast.exact_contrast`, which does not look at outcomes.
        random: prefixes uniformly without replacement, starting over when each has one more (TreePO, Tree-GRPO style).
        entropy: prefixes by falling score, starting over when each has one more (ARPO style, without its threshold).
        none: nothing.

    Source: TRACE (arXiv 2606.11119), prefix stage; docs/algorithm.md section 2. Caps, cost and belief are this
    project's.

    Args:
        alpha: float[n], Beta parameters of the success probability from each prefix, > 0.
        beta: float[n], > 0.
        outcome: float[n], outcome in [0, 1] of the rollout that the prefix belongs to. Not used by `exact`,
            `random` and `entropy`.
        rollout: int[n], which rollout each prefix belongs to; numbers need to be distinct only within a prompt.
        budget: Continuations to spend; with `prompt`, int[n_prompts], one for each. The paper spends m_i * N.
        mode: One of :data:`PREFIX_MODES`.
        belief: `plug_in` (the paper's) or `posterior`, see :func:`allocation.contrast.flip_success`.
        cap_per_rollout: Most continuations from the prefixes of one rollout. None: no cap.
        cap_per_prefix: Most continuations from one prefix. None: no cap.
        spent: int[n], continuations that each prefix had in earlier waves; `cap_per_rollout` counts them. None: none.
        cost: float[n] > 0, expected tokens of one continuation. Gains are divided by it (not in
            `random` and `entropy`); the budget still counts continuations.
        tokens: Expected tokens to spend, by `cost`; with `prompt`, float[n_prompts], one for each. Increments are then taken in
            order of gain per token as long as they fit, within the budget of continuations; less than one increment is lost
            against the optimum, and what is left buys no further continuation. None: no limit.
        score: float[n], by what `entropy` prefers prefixes, see :func:`allocation.entropies.entropy_rises`; where it is
            not finite the prefix comes after all others. Only for that mode.
        prompt: int[n] in [0, n_prompts), which prompt each prefix belongs to. None: all to one.
        rng: Breaks ties, never the index.

    Returns:
        int[n], continuations for each prefix. Sums to each prompt's budget, or to what its caps allow; 0 where there is
        no prefix.

    Raises:
        ValueError: If an argument is malformed or out of range, or a name unknown; the message lists what is known.
    """
    a, b = check_beliefs(alpha, beta)
    n = a.size
    if mode not in PREFIX_MODES:
        raise ValueError(f"unknown prefix mode {mode!r}; known: {', '.join(PREFIX_MODES)}")
    r = _vector("outcome", outcome, n).astype(np.float64)
    flip_success(a, b, r, 0, belief=belief)  # a malformed outcome or an unknown belief is an error in every mode
    weight = np.ones(n) if cost is None else 1.0 / check_cost(cost, n)
    budgets, owner = _check_budgets(budget, prompt, n)
    purse = None if tokens is None else _check_tokens(tokens, cost, budgets.size)
    branch = _label(owner, _vector("rollout", rollout, n))
    rank = _standing(score, n) if mode == "entropy" else np.zeros(n)
    limit = int(budgets.max(initial=0))
    for name, cap in (("cap_per_rollout", cap_per_rollout), ("cap_per_prefix", cap_per_prefix)):
        if cap is not None:
            if cap < 0:
                raise ValueError(f"{name} must not be negative, got {cap}")
            limit = min(limit, cap)
    counts = np.zeros(n, dtype=np.int64)
    if mode == "none" or limit == 0 or n == 0:
        return counts

    # From here on rows are in random order and the sorts are stable: that is what breaks ties.
    pending = rng.permutation(n)
    depth = min(_FIRST_DEPTH, limit)
    caps = None if cap_per_rollout is None else _caps_left(branch, cap_per_rollout, spent, n)
    while pending.size:
        gains = _increments(a[pending], b[pending], r[pending], weight[pending], rank[pending], depth, mode, belief)
        got = _take_largest(gains, owner[pending], branch[pending], budgets, caps, 1.0 / weight[pending], purse)
        counts[pending] = got
        if depth == limit:
            break
        # A prefix that took every tabulated increment might want more: only its prompt has to be looked at again.
        again = np.zeros(budgets.size, dtype=bool)
        again[owner[pending[got == depth]]] = True
        pending = pending[again[owner[pending]]]
        depth = min(2 * depth, limit)
    return counts


def _increments(
    a: FloatArray,
    b: FloatArray,
    r: FloatArray,
    weight: FloatArray,
    rank: FloatArray,
    depth: int,
    mode: str,
    belief: str,
) -> FloatArray:
    if mode in ("random", "entropy"):
        # Any falling increments shared by all prefixes deal units out in rounds, in the random order of the rows. A rank less
        # than 1 settles who comes first in each round.
        return rank[:, None] - np.arange(depth, dtype=np.float64)
    is_flip = mode == "flip"
    table = flip_success(a, b, r, depth, belief=belief) if is_flip else exact_contrast(a, b, depth, belief=belief)
    return np.diff(table, axis=1) * weight[:, None]


def _take_largest(
    gains: FloatArray,
    owner: IntArray,
    branch: IntArray,
    budgets: IntArray,
    caps: IntArray | None,
    cost: FloatArray,
    purse: FloatArray | None,
) -> IntArray:
    """Largest increments of each prompt within its budget, its tokens and the caps of its rollouts; int[n]."""
    n, depth = gains.shape
    scale = max(float(np.abs(gains).max(initial=0.0)), np.finfo(np.float64).tiny)
    # Step-major: among equal gains the prefix with fewer units so far goes first. Rounded as in the root stage.
    loss = -np.round(gains.T.ravel() / scale, 12)
    row = np.tile(np.arange(n), depth)
    if caps is not None:
        order = np.lexsort((loss, branch[row]))
        kept = np.sort(order[_rank(branch[row[order]]) < caps[branch[row[order]]]])
        loss, row = loss[kept], row[kept]
    order = np.lexsort((loss, owner[row])) if budgets.size > 1 else np.argsort(loss, kind="stable")
    group = owner[row[order]]
    if purse is not None:
        row, taken = row[order], np.zeros(order.size, dtype=bool)
        for i in np.unique(group).tolist():
            at = np.flatnonzero(group == i)
            taken[at] = take_fitting(
                row[at], np.ones(at.size, dtype=np.int64), cost[row[at]], float(purse[i]), int(budgets[i])
            )
        return np.bincount(row[taken], minlength=n).astype(np.int64)
    return np.bincount(row[order[_rank(group) < budgets[group]]], minlength=n).astype(np.int64)


def _standing(score: npt.ArrayLike | None, n: int) -> FloatArray:
    """Returns ranks in [0, 1), higher for higher scores and equal for equal ones; 0 where there is no score."""
    if score is None:
        raise ValueError("mode 'entropy' needs a score for each prefix: pass score=entropy_rises(tree, prefixes)")
    scores = _vector("score", score, n).astype(np.float64)
    known = np.isfinite(scores)
    rank = np.zeros(n)
    _, order = np.unique(scores[known], return_inverse=True)
    rank[known] = (order + 1) / (n + 1)
    return rank


def _caps_left(branch: IntArray, cap: int, spent: npt.ArrayLike | None, n: int) -> IntArray:
    """What each rollout, by its number in `branch`, may still have; int."""
    before = np.zeros(n) if spent is None else _vector("spent", spent, n).astype(np.float64)
    return np.maximum(cap - np.bincount(branch, weights=before), 0).astype(np.int64)


def _rank(groups: IntArray) -> IntArray:
    """Position within each run of equal entries."""
    position = np.arange(groups.size)
    first = np.ones(groups.size, dtype=bool)
    first[1:] = groups[1:] != groups[:-1]
    return position - np.maximum.accumulate(np.where(first, position, 0))


def _vector(name: str, x: npt.ArrayLike, n: int) -> npt.NDArray[np.generic]:
    array = np.asarray(x)
    if array.shape != (n,):
        raise ValueError(f"{name} must have one entry for each of {n} prefixes, got shape {array.shape}")
    return array


def _label(owner: IntArray, rollout: npt.NDArray[np.generic]) -> IntArray:
    """One number for each (prompt, rollout) pair."""
    _, number = np.unique(rollout, return_inverse=True)
    return owner * (int(number.max(initial=0)) + 1) + number


def _check_tokens(tokens: float | npt.ArrayLike, cost: npt.ArrayLike | None, prompts: int) -> FloatArray:
    purse = np.atleast_1d(np.asarray(tokens, dtype=np.float64))
    if cost is None:
        raise ValueError("a budget of tokens needs `cost`, the expected tokens of one continuation from each prefix")
    if purse.shape != (prompts,) or not (np.isfinite(purse) & (purse >= 0)).all():
        raise ValueError(f"tokens must be {prompts} finite numbers >= 0, one for each budget, got {tokens!r}")
    return purse


def _check_budgets(budget: int | npt.ArrayLike, prompt: npt.ArrayLike | None, n: int) -> tuple[IntArray, IntArray]:
    budgets = np.atleast_1d(np.asarray(budget))
    if budgets.ndim != 1 or not np.issubdtype(budgets.dtype, np.integer) or (budgets < 0).any():
        raise ValueError(f"budget must be a non-negative integer, or a vector of them with `prompt`, got {budget!r}")
    budgets = budgets.astype(np.int64)
    if prompt is None:
        if budgets.size != 1:
            raise ValueError(f"{budgets.size} budgets but no `prompt` to say which prefix belongs to which")
        return budgets, np.zeros(n, dtype=np.int64)
    owner = _vector("prompt", prompt, n).astype(np.int64)
    if n and not (owner.min() >= 0 and owner.max() < budgets.size):
        raise ValueError(
            f"prompt must lie in [0, {budgets.size}) as there are {budgets.size} budgets, got {owner.max()}"
        )
    return budgets, owner
