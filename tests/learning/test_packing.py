"""Layouts against a slow walk along the paths: what is read where, what it sees, and how many tokens that takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_trees import asked, number_tokens, path_ids

from agents.flat import flat_layout
from agents.packing import packed_layout
from agents.tokens import EdgeTokens
from allocation import Sample, Tree
from allocation.forest_table import ForestTable

LAYOUTS = {"flat": flat_layout, "packed": packed_layout}
WHOLE = 10**6
NO_VALUES = np.zeros(0, dtype=np.int64)
limits = st.sampled_from([1, 7, 20, 60, WHOLE])


def visible(micro, row, at):
    """Ids and positions of the tokens that the token at a place sees, itself included, one by one."""
    ends = None if micro.ends is None else micro.ends[row]
    seen = [j for j in range(at + 1) if ends is None or at < ends[j]]
    return micro.ids[row, seen].tolist(), micro.positions[row, seen].tolist()


def computed(tokens, values):
    """By path to anything that is read, as numbers of nodes: the ids that have to be computed for it."""
    table, found = tokens.table, {}
    for row in [*tokens.rows, *values]:
        tree, node = table.trees[table.tree[row]], table.node(row)
        path = (table.tree[row], *(n.id for n in tree.path(node)))
        found[path] = path_ids(tree, node, action_only=row not in values)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(what=asked(), limit=limits)
def test_every_token_is_predicted_once_and_from_its_path(layout, what, limit):
    tokens, values = what
    table, once = tokens.table, np.zeros(len(tokens), dtype=int)
    for micro in LAYOUTS[layout](tokens, values, limit).micro_batches:
        for row, before, token in zip(micro.row, micro.before, micro.token, strict=True):
            once[token] += 1
            node, tree = table.node(tokens.node[token]), table.trees[table.tree[tokens.node[token]]]
            offset = token - np.flatnonzero(tokens.node == tokens.node[token])[0]
            expected = path_ids(tree, tree.nodes[node.parent]) + node.sample.action_ids[:offset].tolist()
            ids, positions = visible(micro, row, before)
            assert ids == expected and positions == list(range(len(expected)))
            assert node.sample.action_ids[offset] == tokens.ids[token]
    assert (once == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(what=asked(), limit=limits)
def test_every_value_is_read_once_and_at_the_end_of_its_prefix(layout, what, limit):
    tokens, values = what
    table, found = tokens.table, []
    for micro in LAYOUTS[layout](tokens, values, limit).micro_batches:
        for row, at, value in zip(micro.value_row, micro.value_at, micro.value_node, strict=True):
            found.append(value)
            expected = path_ids(table.trees[table.tree[value]], table.node(value))
            assert visible(micro, row, at) == (expected, list(range(len(expected))))
    assert sorted(found) == sorted(values)


@settings(max_examples=60, deadline=None)
@given(what=asked(), limit=limits)
def test_tokens_are_counted_and_none_is_laid_out_that_nothing_needs(what, limit):
    tokens, values = what
    paths = computed(tokens, values)
    longest = [ids for p, ids in paths.items() if not any(q[: len(p)] == p and q != p for q in paths)]
    unique = sorted({i for ids in paths.values() for i in ids})
    flat, packed = flat_layout(tokens, values, limit), packed_layout(tokens, values, limit)
    for layout in (flat, packed):
        assert layout.unique_tokens == len(unique) and layout.flat_tokens == sum(map(len, longest))
        assert layout.computed_tokens == sum(m.ids.shape[0] * m.ids.shape[1] for m in layout.micro_batches)
    # Padding has id 0, which no token of these trees has.
    held = [i for m in flat.micro_batches for i in m.ids.ravel().tolist() if i]
    assert sorted(held) == sorted(i for p in longest for i in p)
    held = [i for m in packed.micro_batches for i in m.ids.ravel().tolist()]
    assert set(held) == set(unique) and len(held) <= flat.flat_tokens
    whole = packed_layout(tokens, values, WHOLE)
    assert sorted(i for m in whole.micro_batches for i in m.ids.ravel().tolist()) == unique
    assert len(whole.micro_batches) == bool(unique)


@settings(max_examples=60, deadline=None)
@given(what=asked(), limit=limits)
def test_only_one_path_may_exceed_the_limit(what, limit):
    for micro in packed_layout(*what, limit).micro_batches:
        rows, length = micro.ids.shape
        assert rows == 1 and (length <= limit or (micro.ends == length).all())
    for micro in flat_layout(*what, limit).micro_batches:
        assert micro.ids.size <= limit or len(micro.ids) == 1


@settings(max_examples=60, deadline=None)
@given(what=asked(), limit=limits)
def test_ends_are_those_of_nested_stretches(what, limit):
    """What attention takes for granted: who sees a token is an interval, and intervals lie within each other or apart."""
    for micro in packed_layout(*what, limit).micro_batches:
        for ends in micro.ends:
            assert (ends > np.arange(len(ends))).all() and ends.max() == len(ends)
            for i, end in enumerate(ends):
                assert (ends[i:end] <= end).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(what=asked())
def test_nothing_read_is_nothing_laid_out(layout, what):
    nothing = EdgeTokens.of(what[0].table, NO_VALUES)
    found = LAYOUTS[layout](nothing, NO_VALUES, 8)
    assert (found.micro_batches, found.computed_tokens, found.flat_tokens, found.unique_tokens) == ((), 0, 0, 0)


def star(prompt, actions, seed=0):
    """A tree with one root rollout of one edge for each length given."""
    tree = Tree("star", 0, "")
    for n in actions:
        sample = Sample("", np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.float32), np.zeros(0))
        tree.add(tree.root, tree.plan(0), "root", sample=sample, terminated=True)
    number_tokens([tree], np.random.default_rng(seed))
    tree.root.context_ids = np.arange(1000, 1000 + prompt)
    return tree


def all_edges(*trees):
    table = ForestTable.of(trees)
    return EdgeTokens.of(table, np.flatnonzero(~table.is_root))


def test_a_tree_above_the_limit_is_split_into_parts_that_repeat_its_prompt():
    """A prompt of 10 and edges of 4, 4, 4 and 4 in 18 tokens: two parts of two edges each."""
    found = packed_layout(all_edges(star(10, [4] * 4)), NO_VALUES, 18)
    assert [m.ids.shape for m in found.micro_batches] == [(1, 18), (1, 18)]
    assert (found.unique_tokens, found.flat_tokens, found.computed_tokens) == (26, 56, 36)
    for micro in found.micro_batches:
        assert micro.ids[0, :10].tolist() == list(range(1000, 1010)) and len(micro.token) == 8
        assert micro.ends[0].tolist() == [18] * 10 + [14] * 4 + [18] * 4
        assert micro.positions[0].tolist() == [*range(14), *range(10, 14)]


def test_several_trees_share_a_row_and_none_is_padded():
    found = packed_layout(all_edges(*(star(3, [2, 2]) for _ in range(5))), NO_VALUES, 15)
    assert [m.ids.shape for m in found.micro_batches] == [(1, 14), (1, 14), (1, 7)]
    assert found.computed_tokens == found.unique_tokens == 35 and found.flat_tokens == 50
    assert found.micro_batches[0].ends[0].tolist() == [7, 7, 7, 5, 5, 7, 7, 14, 14, 14, 12, 12, 14, 14]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_not_read_is_left_out(layout):
    """Of a chain of three edges with observations only the first is scored: no token after its action is needed."""
    tree = Tree("chain", 0, "")
    node = tree.root
    number = tree.plan(0)
    for turn in range(3):
        sample = Sample("", np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.float32), np.zeros(0))
        node = tree.add(node, number, "root", sample=sample, terminated=turn == 2)
        node.context_ids = np.zeros(5, dtype=np.int64)
    tree.root.context_ids = np.zeros(4, dtype=np.int64)
    table = ForestTable.of([tree])
    first, none = EdgeTokens.of(table, np.array([1])), EdgeTokens.of(table, NO_VALUES)
    assert layout(first, NO_VALUES, 99).computed_tokens == 4 + 2
    assert layout(first, np.array([1]), 99).computed_tokens == 4 + 2 + 5
    assert layout(none, np.array([0]), 99).computed_tokens == 4
    # What the environment answered at the end is never shown to a model.
    assert layout(all_edges(tree), NO_VALUES, 99).computed_tokens == 4 + 7 + 7 + 2
