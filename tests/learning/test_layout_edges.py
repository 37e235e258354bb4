"""What tokens, layouts and packed attention must not pass over in silence.

Turns without tokens, tokens without log-probs, paths without a start, soft caps.
"""

import logging

import numpy as np
import pytest
from small_models import SHAPE, build
from token_trees import path_ids
from transformers import Gemma2Config, Gemma2ForCausalLM

from agents import tree_attention
from agents.flat import flat_layout
from agents.packing import packed_layout
from agents.tokens import EdgeTokens
from allocation import Sample, Tree
from allocation.forest_table import ForestTable

LAYOUTS = {"flat": flat_layout, "packed": packed_layout}
NO_VALUES = np.zeros(0, dtype=np.int64)


def extend(tree, node, number, action, context, *, terminated=False):
    """Adds a turn of given ids."""
    ids = np.array(action, dtype=np.int64)
    sample = Sample("", ids, np.zeros(len(ids), dtype=np.float32), NO_VALUES)
    node = tree.add(node, number, "root", sample=sample, terminated=terminated)
    node.context_ids = np.array(context, dtype=np.int64)
    return node


def mute():
    """A tree whose second rollout says nothing, is shown nothing, and then goes on."""
    tree = Tree("mute", 0, "")
    tree.root.context_ids = np.array([1, 2, 3])
    extend(tree, tree.root, tree.plan(0), [4, 5], [], terminated=True)
    number = tree.plan(0)
    silent = extend(tree, tree.root, number, [], [])
    extend(tree, silent, number, [6, 7], [], terminated=True)
    return tree, silent


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("limit", [1, 100])
def test_what_follows_a_turn_without_tokens_is_read_from_its_path(layout, limit):
    """In depth-first order another rollout stands before it; the last token of its own path stands further up."""
    tree, silent = mute()
    table = ForestTable.of([tree])
    tokens = EdgeTokens.of(table, np.flatnonzero(~table.is_root))
    scored, valued = {}, {}

    def seen(micro, row, at):
        ends = micro.ends if micro.ends is None else micro.ends[row]
        return [micro.ids[row, j] for j in range(at + 1) if ends is None or at < ends[j]]

    for micro in layout(tokens, np.array([silent.id]), limit).micro_batches:
        for row, before, token in zip(micro.row, micro.before, micro.token, strict=True):
            scored[int(tokens.ids[token])] = seen(micro, row, before)
        for row, at, node in zip(micro.value_row, micro.value_at, micro.value_node, strict=True):
            valued[int(node)] = seen(micro, row, at)
    assert scored == {4: [1, 2, 3], 5: [1, 2, 3, 4], 6: [1, 2, 3], 7: [1, 2, 3, 6]}
    assert valued == {silent.id: path_ids(tree, silent)} == {silent.id: [1, 2, 3]}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_path_that_begins_with_a_sampled_token_is_refused(layout):
    """An index of -1 would have read the row's last token."""
    tree = Tree("bare", 0, "")
    extend(tree, tree.root, tree.plan(0), [4, 5], [], terminated=True)
    table = ForestTable.of([tree])
    with pytest.raises(ValueError, match=r"nothing stands before it.*context_ids"):
        layout(EdgeTokens.of(table, np.array([1])), NO_VALUES, 100)
    with pytest.raises(ValueError, match=r"nothing stands before it.*context_ids"):
        layout(EdgeTokens.of(table, NO_VALUES), np.array([0]), 100)


def test_tokens_without_a_log_prob_each_are_refused():
    """Two edges of which one has a log-prob too many and one too few would be read one place off."""
    tree = Tree("askew", 0, "")
    tree.root.context_ids = np.array([1, 2, 3])
    for more in (1, -1):
        leaf = extend(tree, tree.root, tree.plan(0), [4, 5], [], terminated=True)
        leaf.sample.logprobs = np.zeros(2 + more, dtype=np.float32)
    with pytest.raises(ValueError, match=r"node 1 of tree 'askew' has 2 action_ids and 3 logprobs"):
        EdgeTokens.of(ForestTable.of([tree]), np.array([1, 2]))


def test_a_soft_cap_is_found_though_small_scores_do_not_show_it(caplog, monkeypatch):
    """The probe's hidden states alone would let it pass: a cap of 50 bends scores that are small by next to nothing."""
    monkeypatch.setattr(tree_attention, "_warned", set())
    shape = {**SHAPE, "initializer_range": 0.02, "num_hidden_layers": 1}
    config = Gemma2Config(**shape, head_dim=16, layer_types=["full_attention"], attn_logit_softcapping=50.0)
    config._attn_implementation = "eager"
    model = build(config, Gemma2ForCausalLM)
    with caplog.at_level(logging.WARNING, "agents.tree_attention"):
        assert not tree_attention.supported(model)
    assert "softcap=50.0" in caplog.messages[-1] and "Gemma2ForCausalLM" in caplog.messages[-1]
    monkeypatch.setattr(tree_attention, "_NOT_SOFTMAX", ())
    assert tree_attention.supported(model), "the probe shows it, so the check is not needed"
