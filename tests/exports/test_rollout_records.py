"""Records of rollouts against what lies on the trees, token by token."""

import numpy as np
import pytest
from echo_env import echo_forest
from export_forests import NO_IDS, NO_LOGPROBS, advantages_of, search_forest, token_forests
from hypothesis import given, settings
from hypothesis import strategies as st
from token_trees import numbered

from agents.advantages import CreditConfig, estimate
from agents.policies import TransformersPolicy
from allocation import Forest, Sample, Tree
from allocation.export import rollout_records, shared_turns, to_skyrl, to_trl, to_verl
from allocation.export.rows import masks_of
from allocation.forest_table import ForestTable
from allocation.sample import TIMED_OUT
from trace_envs.multihop_qa import MultiHopQAEnv


def leaves(forest):
    return [(tree, leaf) for tree in forest for leaf in tree.leaves()]


def tokens_of(tree, leaf):
    """(id, sampled, log-prob, turn) of each token after the prompt, up to the last that was sampled."""
    found, end = [], 0
    for turn, node in enumerate(tree.path(leaf)[1:]):
        for token, logprob in zip(node.sample.action_ids, node.sample.logprobs, strict=True):
            found.append((int(token), 1, float(logprob), turn))
            end = len(found)
        found += [(int(token), 0, 0.0, turn) for token in (() if node.context_ids is None else node.context_ids)]
    return found[:end]


@settings(max_examples=60, deadline=None)
@given(token_forests())
def test_tokens_are_those_of_the_path(forest):
    records = forest.rollouts()
    assert len(records) == forest.num_leaves
    for record, (tree, leaf) in zip(records, leaves(forest), strict=True):
        assert record.prompt_ids.tolist() == tree.root.context_ids.tolist() and record.has_ids
        fields = (record.completion_ids, record.loss_mask, record.logprobs, record.turn_ids)
        assert list(zip(*(field.tolist() for field in fields), strict=True)) == tokens_of(tree, leaf)
        path = tree.path(leaf)
        assert record.nodes.tolist() == [n.id for n in path] and len(record.rewards) == leaf.depth
        assert record.rewards.tolist() == [n.reward for n in path[1:]]
        assert record.finish_reasons == tuple(n.sample.finish_reason for n in path[1:])
        assert record.versions.tolist() == [n.sample.version for n in path[1:]]
        assert record.total_reward == tree.returns()[leaf.id]
        assert (record.task_id, record.tree, record.rollout) == (tree.key, tree.index, leaf.rollout)
        assert (record.origin, record.is_correct) == (leaf.origin, bool(leaf.is_correct))
        assert (record.terminated, record.truncated) == (leaf.terminated, leaf.truncated)
        assert record.num_actions == sum(n.sample.acted for n in path[1:])


@settings(max_examples=60, deadline=None)
@given(token_forests(), st.data())
def test_once_trains_every_sampled_token_of_a_rollout_exactly_once(forest, data):
    records = forest.rollouts()
    kept = data.draw(st.lists(st.sampled_from(records), unique_by=id)) if records else []
    for some in (records, kept):
        masks = zip(some, masks_of(some, once=True), strict=True)
        trained = [int(i) for record, mask in masks for i in record.completion_ids[mask == 1]]
        reached = {(record.tree, int(n)) for record in some for n in record.nodes[1:]}
        expected = [int(i) for t, node in reached for i in forest.trees[t].nodes[node].sample.action_ids]
        assert sorted(trained) == sorted(expected), "every token has an id of its own here"
    assert all((mask == record.loss_mask).all() for record, mask in zip(kept, masks_of(kept, False), strict=True))


@settings(max_examples=60, deadline=None)
@given(token_forests())
def test_what_is_shared_is_the_beginning_of_an_earlier_record(forest):
    records = forest.rollouts()
    shared = shared_turns(records)
    for i, record in enumerate(records):
        earlier = [r for r in records[:i] if r.tree == record.tree]
        common = [
            sum(np.cumprod(np.equal(r.nodes[: len(record.nodes)], record.nodes[: len(r.nodes)]))) - 1 for r in earlier
        ]
        assert shared[i] == max(common, default=0)


@settings(max_examples=60, deadline=None)
@given(token_forests(rewards=("dense", "outliers")))
def test_each_turns_reward_stands_at_its_last_sampled_token(forest):
    for record, (tree, leaf) in zip(forest.rollouts(), leaves(forest), strict=True):
        placed, last, waiting = np.zeros(len(record.completion_ids)), None, 0.0
        tokens = tokens_of(tree, leaf)
        for turn, node in enumerate(tree.path(leaf)[1:]):
            mine = [i for i, (_, sampled, _, t) in enumerate(tokens) if sampled and t == turn]
            last = mine[-1] if mine else last
            if last is None:
                waiting += node.reward
            else:
                placed[last] += node.reward + waiting
                waiting = 0.0
        np.testing.assert_allclose(record.token_rewards(), placed, rtol=1e-12, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(token_forests())
def test_advantages_follow_the_edges(forest):
    given_ = advantages_of(forest)
    table = ForestTable.of(forest)
    for record in forest.rollouts(given_):
        start = table.start[record.tree]
        assert record.advantages.tolist() == [given_[start + n] for n in record.nodes[1:]]
        expected = [
            record.advantages[t] if sampled else 0.0
            for t, sampled in zip(record.turn_ids, record.loss_mask, strict=True)
        ]
        assert record.token_advantages().tolist() == expected


def test_an_estimators_credit_fits(sampled):
    credit = estimate(ForestTable.of(sampled), "tree", CreditConfig())
    records = sampled.rollouts(credit.advantage)
    assert any(record.token_advantages().any() for record in records)
    with pytest.raises(
        ValueError, match=r"one entry for each of the forest's \d+ nodes, roots included, got shape \(3,\)"
    ):
        sampled.rollouts(np.zeros(3))
    with pytest.raises(ValueError, match=r"make them by forest\.rollouts"):
        sampled.rollouts()[0].token_advantages()


def test_text_is_what_the_ids_decode_to(sampled, tokenizer):
    for record in sampled.rollouts():
        said = [m["content"] for m in record.messages if m["role"] == "assistant"]
        for turn, text in enumerate(said):
            ids = record.completion_ids[(record.turn_ids == turn) & (record.loss_mask == 1)].tolist()
            ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("action_format", ["hermes", "tags", "react"])
def test_messages_are_the_environments(action_format):
    """Episodes played again, with the conversation that the environment itself tells."""
    forest = search_forest(action_format)
    env = MultiHopQAEnv(action_format=action_format, max_turns=4)
    roles, silent = set(), 0
    for record, (tree, leaf) in zip(forest.rollouts(), leaves(forest), strict=True):
        _, info = env.reset(seed=tree.start.seed, options=tree.start.options)
        for node in tree.path(leaf)[1:]:
            if node.sample.acted:
                *_, info = env.step(node.action)
            else:
                silent += 1
        assert list(record.messages) == info["messages"] and list(record.tools) == info["tools"]
        assert record.task_id == info["task_id"]
        roles |= {m["role"] for m in record.messages}
    assert silent and roles == {"system", "user", "assistant"} | ({"tool"} if action_format == "hermes" else set())


def test_environments_without_a_conversation_are_told_as_text():
    tree = Tree("q", 0, np.arange(2))
    one = tree.add(tree.root, 0, "root", action=np.int64(1), observation=np.arange(2), reward=1.0)
    tree.add(one, 0, "root", action=0, observation="", reward=2.0, terminated=True, is_correct=True)
    tree.add(one, 1, "continuation", action=2, observation=np.arange(2), truncated=True, components=dict(TIMED_OUT))
    first, second = rollout_records([tree])
    seen = {"role": "user", "content": "array([0, 1])"}
    assert first.messages == (seen, {"role": "assistant", "content": "1"}, seen, {"role": "assistant", "content": "0"})
    assert second.messages[:3] == first.messages[:3] and second.messages[3:] == ({"role": "assistant", "content": "2"},)
    assert not first.has_ids and first.total_reward == 3.0 and shared_turns([first, second]) == [0, 1]


def test_texts_that_cannot_be_encoded_are_mended():
    tree = Tree("\ud800", 0, "\ud83d\ude00")
    tree.add(tree.root, 0, "root", action="a\udfff", observation="b\ud800", terminated=True, is_correct=True)
    (record,) = rollout_records([tree])
    assert [m["content"] for m in record.messages] == ["\U0001f600", "a\ufffd", "b\ufffd"]
    assert record.task_id == "\ufffd"


def test_records_compare_by_value(sampled):
    one, other = sampled.rollouts(), sampled.rollouts()
    assert one == other and one[0] != one[1] and one[0] != "a record"
    other[0].logprobs[0] -= 1
    assert one[0] != other[0]


def test_rollouts_that_the_model_had_no_room_for(model, tokenizer):
    forest = echo_forest(
        model, tokenizer, policy=TransformersPolicy(model, tokenizer, max_new_tokens=8, max_context=24)
    )
    cut = [record for record in forest.rollouts() if record.finish_reasons[-1] == "context"]
    assert len(cut) == forest.ledger.unacted > 2 and any(record.num_actions for record in cut)
    for record in cut:
        assert record.num_actions == len(record.rewards) - 1 and record.truncated and not record.is_correct
        assert len(record.prompt_ids) + len(record.completion_ids) <= 24 and record.loss_mask[-1] == 1
        assert record.messages[-1]["role"] == "user"


EXPORTS = {
    "trl": to_trl,
    "skyrl": to_skyrl,
    "verl": lambda records: to_verl(records, pad_token_id=0),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_policies_without_ids_are_refused_in_one_sentence(export):
    forest = search_forest()
    with pytest.raises(ValueError, match=r"has no token ids, because its policy gives only text; sample with"):
        export(forest)
    with pytest.raises(ValueError, match="no rollout to export"):
        export(Forest())


def test_counts_without_ids_are_no_ids(sampled):
    """An engine that only counts tokens, behind a prompt that someone else has encoded."""
    tree = Tree("q", 0, "prompt")
    tree.root.context_ids = np.arange(3)
    sample = Sample("a", NO_IDS, NO_LOGPROBS, NO_IDS, generated=4)
    tree.add(tree.root, 0, "root", "a", sample=sample, terminated=True, is_correct=True)
    assert not rollout_records([tree])[0].has_ids
    assert all(record.has_ids for record in sampled.rollouts())


@settings(max_examples=10, deadline=None)
@given(numbered(max_trees=1))
def test_a_sample_needs_a_logprob_for_each_token(trees):
    sample = Sample("a", np.arange(3), np.zeros(2, dtype=np.float32), NO_IDS)
    trees[0].add(trees[0].root, 99, "root", "a", sample=sample, terminated=True)
    with pytest.raises(ValueError, match="3 action_ids and 2 logprobs: a policy must give one log-prob"):
        rollout_records(trees)
