"""Random trees whose every token has an id of its own, so that a misplaced one cannot go unseen."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from random_trees import trees

from agents.tokens import EdgeTokens
from allocation.forest_table import ForestTable


def number_tokens(forest, rng, *, vocabulary=None, longest=5, empty=0.0):
    """Gives all nodes contexts of random lengths, and all tokens ids: 1, 2, ... in random order, or any of a vocabulary.

    Prompts are not empty, observations may be, and so is a share of the actions; terminals may have an observation, which no
    model is shown.
    """
    for tree in forest:
        for node in tree.nodes[1:]:
            if rng.random() < empty:
                node.sample = replace(
                    node.sample, action_ids=np.zeros(0, dtype=np.int64), logprobs=np.zeros(0, np.float32)
                )
    sizes = [
        (node, len(node.sample.action_ids) if node.sample else 0, int(rng.integers(node.parent is None, longest)))
        for tree in forest
        for node in tree.nodes
    ]
    total = sum(action + context for _, action, context in sizes)
    ids = 1 + rng.permutation(total) if vocabulary is None else rng.integers(vocabulary, size=total)
    for node, action, context in sizes:
        mine, ids = ids[: action + context], ids[action + context :]
        if node.sample is not None:
            node.sample.action_ids = mine[:action]
        node.context_ids = mine[action:] if context or node.parent is None or rng.random() < 0.5 else None
    return forest


@st.composite
def numbered(draw, max_trees=3, **kwargs):
    """Some trees."""
    forest = draw(st.lists(trees(**kwargs), min_size=1, max_size=max_trees))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return number_tokens(forest, rng, empty=draw(st.sampled_from([0.0, 0.2])))


@st.composite
def asked(draw, **kwargs):
    """What a layout is asked for: the tokens of some edges, and some prefixes' values."""
    table = ForestTable.of(draw(numbered(**kwargs)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scored, valued = draw(st.sampled_from([(1.0, 0.0), (0.5, 0.3), (0.1, 0.1), (0.0, 0.2), (1.0, 1.0)]))
    rows = np.flatnonzero(~table.is_root & (rng.random(len(table)) < scored))
    prefixes = np.flatnonzero(~table.terminal & (rng.random(len(table)) < valued))
    return EdgeTokens.of(table, rows), prefixes


def shown(node, action_only=False):
    """The tokens that a node adds to its path, one by one."""
    found = [] if node.sample is None else node.sample.action_ids.tolist()
    return found if action_only or node.context_ids is None else found + node.context_ids.tolist()


def path_ids(tree, node, action_only=False):
    """Ids from the start of the prompt to the end of a prefix, or of the action that leads to it."""
    found = []
    for above in tree.path(node):
        found += shown(above, action_only and above is node)
    return found
