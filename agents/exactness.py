"""Is what a learner scores, id for id, what was sampled? Asked of every batch, in every layout.

Invariant: for each scored token the model is shown the ids of its path and nothing else, in their order and at their positions,
and is asked for the id that was sampled there; each token once. (The policy asks the same of its engine.)

Comparing every path with what stands before each token would take the square of its length. Instead each id is multiplied by a
fixed random 64-bit number of its position, and what is compared are the sums, modulo 2**64, over the paths in the tree and over
what each place of the layout can see. Different sequences have the same sum with a chance of about 2**-63.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.layout import NOTHING, Layout, MicroBatch, num_sampled, segment
from agents.tokens import EdgeTokens


def assert_exact(layout: Layout, tokens: EdgeTokens, prefixes: np.ndarray, ids: np.ndarray) -> None:
    """Checks a layout against the trees.

    Args:
        layout: What goes through the model.
        tokens: The tokens that it scores.
        prefixes: Rows of the prefixes whose values it reads, int64 [v].
        ids: The ids that the model is asked for, in the order of `tokens`, int64 [t].

    Raises:
        RuntimeError: Something differs; the message names the tree, the node, the position and both ids.
    """
    expected = _Expected.of(tokens)
    wrong = np.flatnonzero(ids != expected.ids)
    if len(wrong):
        j = int(wrong[0])
        _fail(
            tokens,
            int(tokens.node[j]),
            f"token {_offset(tokens, j)} is scored as id {ids[j]}, {expected.ids[j]} was sampled",
        )
    for micro in layout.micro_batches:
        seen = _visible_sums(micro, expected.factors)
        _compare(micro, tokens, seen[micro.row, micro.before] != expected.before[micro.token], micro.token)
        ends = seen[micro.value_row, micro.value_at] != expected.end[micro.value_node]
        if ends.any():
            k = int(np.flatnonzero(ends)[0])
            node = int(micro.value_node[k])
            _differ(micro, tokens, node, int(micro.value_row[k]), int(micro.value_at[k]), _path(tokens, node))
    _once("token", np.concatenate([NOTHING, *(m.token for m in layout.micro_batches)]), np.arange(len(tokens)))
    _once("prefix", np.concatenate([NOTHING, *(m.value_node for m in layout.micro_batches)]), np.sort(prefixes))


@dataclass(frozen=True, slots=True)
class _Expected:
    """What the trees say.

    Attributes:
        factors: Random number of each position, uint64 [longest path].
        ids: As sampled, in the order of the tokens, int64 [t].
        before: Sum over the path up to each token, itself not included, uint64 [t].
        end: Sum over the path up to the end of each prefix, uint64 [n].
    """

    factors: np.ndarray
    ids: np.ndarray
    before: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, tokens: EdgeTokens) -> _Expected:
        table = tokens.table
        segments = [segment(n) for t in table.trees for n in t.nodes]
        sizes = np.array([len(s) for s in segments], dtype=np.int64)
        stop = np.cumsum(sizes)
        length = table.along(sizes.astype(np.float64)).astype(np.int64)
        flat = np.concatenate(segments) if segments else np.zeros(0, dtype=np.int64)
        position = np.arange(len(flat)) + np.repeat(length - stop, sizes)
        factors = _factors(int(length.max(initial=0)))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_words(flat, factors[position]), dtype=np.uint64)])
        end = sums[stop] - sums[stop - sizes]
        for rows in table.levels[1:]:
            end[rows] += end[table.parent[rows]]
        # Where the tokens stand in `flat`: each edge's action begins its node's segment.
        counts = np.diff(tokens.start)
        offset = np.arange(len(tokens)) - np.repeat(tokens.start[:-1], counts)
        begin = np.repeat((stop - sizes)[tokens.rows], counts)
        before = end[table.parent[tokens.node]] + sums[begin + offset] - sums[begin]
        return cls(factors, flat[begin + offset], before, end)


def _factors(count: int) -> np.ndarray:
    """Returns a fixed random number for each position, uint64 [count]; odd, so that no id is lost."""
    return np.random.default_rng(0x7E57).integers(2**64, size=count, dtype=np.uint64) | np.uint64(1)


def _words(ids: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return (ids.astype(np.uint64) + np.uint64(1)) * factors


def _visible_sums(micro: MicroBatch, factors: np.ndarray) -> np.ndarray:
    """Returns the sum over what each place sees, itself included, uint64 [rows, length]."""
    known = (micro.positions >= 0) & (micro.positions < len(factors))
    # A position that no path has must not pass for one that some path has.
    words = np.where(
        known, _words(micro.ids, factors[np.where(known, micro.positions, 0)]), np.uint64(0x9E3779B97F4A7C15)
    )
    if micro.ends is None:
        return np.cumsum(words, axis=1, dtype=np.uint64)
    rows, length = words.shape
    change = np.concatenate([words, np.zeros((rows, 1), np.uint64)], axis=1)
    np.subtract.at(change, (np.arange(rows)[:, None], np.minimum(micro.ends, length)), words)
    return np.cumsum(change, axis=1, dtype=np.uint64)[:, :-1]


def _compare(micro: MicroBatch, tokens: EdgeTokens, wrong: np.ndarray, token: np.ndarray) -> None:
    if not wrong.any():
        return
    k = int(np.flatnonzero(wrong)[0])
    j = int(token[k])
    node = int(tokens.node[j])
    action = tokens.table.node(node).sample
    assert action is not None
    path = _path(tokens, int(tokens.table.parent[node])) + action.action_ids[: _offset(tokens, j)].tolist()
    _differ(micro, tokens, node, int(micro.row[k]), int(micro.before[k]), path)


def _differ(micro: MicroBatch, tokens: EdgeTokens, node: int, row: int, at: int, path: list[int]) -> None:
    """Raises, naming the first place where what is seen differs from the path."""
    shown = [j for j in range(at + 1) if micro.ends is None or at < micro.ends[row, j]]
    ids, positions = micro.ids[row, shown].tolist(), micro.positions[row, shown].tolist()
    for place, (got, want) in enumerate(zip(ids, path, strict=False)):
        if got != want or positions[place] != place:
            where = "" if positions[place] == place else f" at position {positions[place]}"
            _fail(
                tokens, node, f"at position {place} of its path the model is shown id {got}{where}, the tree has {want}"
            )
    _fail(tokens, node, f"the model is shown {len(ids)} ids of its path, the tree has {len(path)}")


def _path(tokens: EdgeTokens, row: int) -> list[int]:
    """Returns the ids up to the end of a prefix, the slow way."""
    table = tokens.table
    tree = table.trees[int(table.tree[row])]
    return [int(i) for node in tree.path(table.node(row)) for i in segment(node)]


def _offset(tokens: EdgeTokens, j: int) -> int:
    """Returns the number of a token within its edge."""
    edge = int(np.searchsorted(tokens.start, j, side="right")) - 1
    return j - int(tokens.start[edge])


def _fail(tokens: EdgeTokens, row: int, what: str) -> None:
    node, tree = tokens.table.node(row), tokens.table.trees[int(tokens.table.tree[row])]
    raise RuntimeError(
        f"the learner would not score what was sampled: tree {tree.key!r}, node {node.id} (turn {node.depth}, "
        f"{num_sampled(node)} sampled tokens): {what}. Nothing may change a sample after it was recorded; if nothing did, this "
        "is a fault of the layout: try layout='flat' and report it"
    )


def _once(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(np.sort(found), expected):
        raise RuntimeError(
            f"the learner would read {len(found)} {what}s where the batch has {len(expected)}, or one of them twice: a fault "
            "of the layout; try layout='flat' and report it"
        )
