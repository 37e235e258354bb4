"""What a replayed forest was worth, measured with what its world knows and a training run does not.

Invariant: no measure reads a prediction to judge an allocation; values and gradients are the world's own, and where a measure
is a random estimate its docstring says of what, and that it is unbiased or why it is not.

Words: a *pair of contrast* is two terminals of one tree with different outcomes; it is counted at their lowest common ancestor,
the deepest prefix that both come from. A pair at depth d says which of two actions at turn d + 1 did better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from allocation.contrast import FloatArray, mixed_probability
from allocation.prefixes import allocate_prefixes
from allocation.roots import IntArray, allocate_roots_exact
from allocation.tree import Forest, Node, Tree

Value = Callable[[Tree, Node], float]
"""The chance of success from a node, as `World.value` gives it."""

_EPSILON = 1e-9


def contrast_pairs(tree: Tree) -> IntArray:
    """Counts the pairs of contrast of a tree by the depth of their lowest common ancestor.

    At a node with S successes and F failures below it, S F pairs are different, and those of them that part later lie within
    one child: S F - sum over children of S_c F_c part here. Linear in the nodes.

    Args:
        tree: A tree whose terminals have verdicts.

    Returns:
        int64 [depth of the deepest node + 1]; entry d counts the pairs that part at depth d.
    """
    nodes = tree.nodes
    successes, failures, within = [0] * len(nodes), [0] * len(nodes), [0] * len(nodes)
    pairs = np.zeros(max(n.depth for n in nodes) + 1, dtype=np.int64)
    for node in reversed(nodes):
        i = node.id
        if node.terminal:
            successes[i], failures[i] = (1, 0) if node.is_correct else (0, 1)
        elif successes[i] and failures[i]:
            pairs[node.depth] += successes[i] * failures[i] - within[i]
        if node.parent is not None:
            successes[node.parent] += successes[i]
            failures[node.parent] += failures[i]
            within[node.parent] += successes[i] * failures[i]
    return pairs


def forest_pairs(forest: Forest) -> IntArray:
    """Counts the pairs of contrast of all trees by depth; int64 [depth of the deepest node + 1]."""
    each = [contrast_pairs(tree) for tree in forest]
    total = np.zeros(max((len(p) for p in each), default=1), dtype=np.int64)
    for pairs in each:
        total[: len(pairs)] += pairs
    return total


def root_counts(trees: Iterable[Tree]) -> IntArray:
    """Returns how many root rollouts each tree has, int64 [n]."""
    return np.array([len(tree.root.children) for tree in trees], dtype=np.int64)


def chance_of_contrast(v: npt.ArrayLike, counts: npt.ArrayLike) -> FloatArray:
    """Returns 1 - v^m - (1 - v)^m, the chance that m root rollouts of a prompt are mixed, float64 [n]; 0 for m = 0 and 1.

    Source: TRACE (arXiv 2606.11119), root stage.

    Args:
        v: True chance of success of each prompt, float [n] in [0, 1].
        counts: Root rollouts of each prompt, int [n] >= 0.
    """
    p, m = np.asarray(v, dtype=np.float64), np.asarray(counts)
    return np.where(m > 0, 1.0 - p**m - (1.0 - p) ** m, 0.0)


def expected_effective_ratio(v: npt.ArrayLike, counts: npt.ArrayLike) -> float:
    """Returns the effective ratio over root rollouts that the allocation leads to on average, given the true values.

    It has less variance than the ratio that was seen, since outcomes are averaged out. It is that ratio's mean where the
    counts do not depend on the outcomes of the same batch; for a method that stops on outcomes
    (`Allocator.stops_on_outcomes`) it is not.

    Args:
        v: True chance of success of each prompt, float [n].
        counts: Its root rollouts, int [n]; prompts without any are not counted.
    """
    m = np.asarray(counts)
    return float(chance_of_contrast(v, m).sum() / max(int((m > 0).sum()), 1))


def root_regret(v: npt.ArrayLike, counts: npt.ArrayLike, *, m_min: int = 4, m_max: int = 16) -> float:
    """Returns the share of the best possible sum of f(m_i) that an allocation of root rollouts misses, in [0, 1].

    The best is the exact dynamic program on the true values, for the same candidates and the same number of rollouts. Its
    bounds are widened to the allocation's own smallest and largest group, so that the allocation itself is always among the
    choices.

    Args:
        v: True chance of success of every candidate, float [n].
        counts: Root rollouts of every candidate, those left out (0) included, int [n].
        m_min: Fewest rollouts of a prompt that gets any.
        m_max: Most rollouts of a prompt.

    Returns:
        1 - sum f(m_i) / best; 0 where even the best is 0.
    """
    m = np.asarray(counts, dtype=np.int64)
    used = m[m > 0]
    if not used.size:
        return 0.0
    p = np.clip(np.asarray(v, dtype=np.float64), _EPSILON, 1 - _EPSILON)
    low, high = min(m_min, int(used.min())), max(m_max, int(used.max()))
    table = mixed_probability(p, 1 - p, high, step=0.0)
    # A group of one shows nothing, so bounds from 2 on hold an optimum unless the allocation could not do better than ones.
    best = allocate_roots_exact(table, int(m.sum()), m_min=low, m_max=high)
    return _missed(table[np.arange(len(m)), m].sum(), table[np.arange(len(m)), best].sum())


def prefix_regret(forest: Forest, value: Value) -> float:
    """Returns the share of the best possible sum of g(k) that the continuations miss, in [0, 1]; NaN without continuations.

    g(k) = 1 - q^k is the chance that one of k continuations flips the outcome of the rollout that they branch off (TRACE,
    prefix stage). The best places, in every tree, the same number of continuations on the prefixes of the tree's root
    rollouts in full knowledge of the values. Continuations that branch off other continuations are left out on both sides.
    Values of prefixes rest on few recorded continuations; the best is chosen by these noisy values, so the regret is
    overstated, for all methods alike.

    Args:
        forest: A finished forest.
        value: The true chance of success.
    """
    got = best = 0.0
    rng = np.random.default_rng(0)  # ties are worth the same
    for tree in forest:
        nodes = tree.nodes
        inner = [n for n in nodes if n.depth and n.origin == "root" and not n.terminal]
        placed = np.array([sum(nodes[c].origin == "continuation" for c in n.children) for n in inner], dtype=np.int64)
        total = int(placed.sum())
        if not total:
            continue
        outcome = {n.rollout: float(bool(n.is_correct)) for n in tree.leaves("root")}
        r = np.array([outcome[n.rollout] for n in inner])
        v = np.clip([value(tree, n) for n in inner], _EPSILON, 1 - _EPSILON)
        q = r * v + (1 - r) * (1 - v)
        ideal = allocate_prefixes(v, 1 - v, r, np.array([n.rollout for n in inner]), total, rng=rng)
        got += float((1 - q**placed).sum())
        best += float((1 - q**ideal).sum())
    return _missed(got, best) if best else float("nan")


def _missed(got: float, best: float) -> float:
    return max(1.0 - float(got) / float(best), 0.0) if best > 0 else 0.0


def expected_auc(predicted: npt.ArrayLike, v: npt.ArrayLike) -> float:
    """Returns the chance that a rollout that succeeds comes from an anchor with a higher prediction than one that fails.

    The area under the ROC curve of one rollout from every anchor, averaged over outcomes; ties count one half. Even perfect
    predictions reach 1 only where every value is 0 or 1.

    Args:
        predicted: Predictions, float [n].
        v: True chance of success of the same anchors, float [n].

    Returns:
        NaN where all rollouts succeed or all fail.
    """
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(v, dtype=np.float64)
    total = float(y.sum() * (1 - y).sum())
    if total <= 0:
        return float("nan")
    order = np.argsort(p, kind="stable")
    p, win, lose = p[order], y[order], 1 - y[order]
    first, last = np.searchsorted(p, p, "left"), np.searchsorted(p, p, "right")
    below = np.concatenate([[0.0], np.cumsum(lose)])
    return float((win * (below[first] + below[last])).sum() / 2 / total)


@dataclass(frozen=True, slots=True)
class EdgeScores:
    """Scores of recorded edges: gradients of the log-probabilities of their actions, known by a few numbers each.

    Attributes:
        dot: Inner product of each score with the estimate of the true gradient, float [rows].
        norm2: Squared norm of each score, float [rows].
        sketch: Count sketch of each score, float [rows, buckets]: inner products of (sums of) sketches are unbiased estimates
            of those of the scores.
        true_norm2: Squared norm of the true gradient, without the noise of its estimate.
    """

    dot: FloatArray
    norm2: FloatArray
    sketch: FloatArray
    true_norm2: float


@dataclass(frozen=True, slots=True)
class GradientFigures:
    """What one forest's estimate of the policy gradient is worth.

    Attributes:
        along: Its component along the true gradient. Unbiased: the noise of the stored estimate of the true gradient comes from
            other rollouts and is divided out (`EdgeScores.true_norm2`, which is what correcting for attenuation amounts to).
        norm2: Its squared norm. Unbiased over the sketch's hashing: the squared norms of the scores enter exactly, and only the
            inner products of different scores come from sketches. A single one may be a little off, even negative.
        cosine: `along` over its norm, in [-1, 1]; 0 where the estimate is zero.
    """

    along: float
    norm2: float
    cosine: float


def gradient_figures(scores: EdgeScores, rows: npt.ArrayLike, weights: npt.ArrayLike) -> GradientFigures:
    """Measures the estimate sum over edges of weight times score against the true gradient.

    Args:
        scores: The record's.
        rows: Row of each edge of the forest in `scores`, int [edges]; edges that are the same share a row.
        weights: Coefficient times advantage of each edge, float [edges].
    """
    summed = np.bincount(np.asarray(rows, dtype=np.int64), weights=np.asarray(weights), minlength=len(scores.dot))
    row = np.flatnonzero(summed)
    if not row.size:
        return GradientFigures(0.0, 0.0, 0.0)
    w, sketch = summed[row], scores.sketch[row]
    total = w @ sketch
    own = w * w @ (scores.norm2[row] - np.einsum("ij,ij->i", sketch, sketch))
    norm2 = float(total @ total + own)
    along = float(w @ scores.dot[row]) / np.sqrt(scores.true_norm2)
    # No vector is shorter than its projection; a sketched norm may be.
    longest = np.sqrt(max(norm2, along * along))
    return GradientFigures(along, norm2, float(along / longest) if longest else 0.0)


def signal_to_noise(along: npt.ArrayLike, along2: npt.ArrayLike, norm2: npt.ArrayLike, forests: int) -> FloatArray:
    """Returns the squared mean of the component along the true gradient over the mean squared length of all else.

    Twice as many independent rollouts halve the noise and so double it: divided by tokens it compares batches of any size. The
    squared mean is freed of the variance of that mean, so that few forests do not flatter.

    Args:
        along: Mean of `GradientFigures.along` over forests, float [...].
        along2: Mean of its square, float [...].
        norm2: Mean of `GradientFigures.norm2`, float [...].
        forests: Number of forests behind the means.

    Returns:
        (mean along)^2 / (mean norm2 - (mean along)^2), float64 [...]; 0 where no signal is left, infinite without noise.
    """
    a, a2, squared = (np.asarray(x, dtype=np.float64) for x in (along, along2, norm2))
    variance = np.maximum(a2 - a * a, 0.0) / max(forests - 1, 1)
    signal = np.maximum(a * a - variance, 0.0)
    noise = squared - signal
    # Rounding must not make a noise of its own where there is none.
    free = noise <= 1e-12 * squared
    ratio = np.divide(signal, noise, out=np.full(signal.shape, np.inf), where=~free)
    return np.where(signal > 0, ratio, 0.0)
