"""Batches of tokens for TRL, verl and SkyRL against what the records say, row by row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from export_forests import advantages_of, token_forests
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from allocation.export import to_skyrl, to_trl, to_verl
from allocation.export.rows import masks_of

PAD = 10**6


def filled(record, mask):
    """Prompt, completion, mask, log-probs and rewards, with a masked token where there is none."""
    if len(record.completion_ids):
        fields = (record.completion_ids, mask, record.logprobs, record.token_rewards())
    else:
        fields = np.array([PAD]), np.array([0]), np.array([0.0]), np.array([record.total_reward])
    return [record.prompt_ids.tolist(), *(field.tolist() for field in fields)]


@settings(max_examples=50, deadline=None)
@given(token_forests(), st.booleans())
def test_lists_have_one_entry_for_each_token(forest, once):
    records = forest.rollouts()
    assume(records)
    masks = masks_of(records, once)
    expected = [filled(record, mask) for record, mask in zip(records, masks, strict=True)]
    trl = to_trl(forest, pad_token_id=PAD, once=once)
    assert [
        list(row)
        for row in zip(*(trl[k] for k in ("prompt_ids", "completion_ids", "env_mask", "logprobs")), strict=False)
    ] == [row[:4] for row in expected]
    assert trl["total_reward"] == [record.total_reward for record in records]
    assert trl["task_id"] == [record.task_id for record in records] and trl["tree"] == [r.tree for r in records]
    skyrl = to_skyrl(forest, pad_token_id=PAD, once=once)
    names = ("prompt_token_ids", "response_ids", "loss_masks", "rollout_logprobs", "rewards")
    assert [list(row) for row in zip(*(skyrl[k] for k in names), strict=False)] == expected
    for reason, record in zip(skyrl["stop_reasons"], records, strict=True):
        last = record.finish_reasons[-1]
        assert reason == {"context": "length", "error": "abort"}.get(last, last)


@settings(max_examples=50, deadline=None)
@given(token_forests(), st.booleans(), st.booleans(), st.sampled_from([None, 60]))
def test_verls_batch_is_padded_on_both_sides(forest, once, with_advantages, width):
    records = forest.rollouts(advantages_of(forest) if with_advantages else None)
    assume(records)
    batch = to_verl(records, pad_token_id=PAD, max_prompt_length=width, max_response_length=width, once=once)
    t, masks = batch.tensors, masks_of(records, once)
    p, r = t["prompts"].shape[1], t["responses"].shape[1]
    assert width in (None, p) and width in (None, r)
    if width is None:
        assert p == max(len(x.prompt_ids) for x in records) and r == max(1, *(len(x.completion_ids) for x in records))
    for i, record in enumerate(records):
        prompt, response = record.prompt_ids.tolist(), record.completion_ids.tolist()
        left, right = p - len(prompt), r - len(response)
        row = [PAD] * left + prompt + response + [PAD] * right
        assert t["prompts"][i].tolist() == row[:p] and t["responses"][i].tolist() == row[p:]
        assert t["input_ids"][i].tolist() == row
        assert t["attention_mask"][i].tolist() == [0] * left + [1] * (p - left + r - right) + [0] * right
        length = len(prompt) + len(response)
        assert t["position_ids"][i].tolist() == [0] * left + list(range(length)) + [length - 1] * right
        assert t["response_mask"][i].tolist() == masks[i].tolist() + [0] * right
        assert t["rollout_log_probs"][i].tolist() == record.logprobs.tolist() + [0.0] * right
        scores = record.token_rewards() if response else np.eye(1, r, r - 1)[0] * record.total_reward
        assert t["rm_scores"][i].tolist() == np.pad(scores, (0, r - len(scores))).astype(np.float32).tolist()
        if with_advantages:
            advantages = record.token_advantages().astype(np.float32).tolist()
            assert t["advantages"][i].tolist() == advantages + [0.0] * right
    assert ("advantages" in t) == with_advantages
    assert torch.equal(t["token_level_scores"], t["rm_scores"]) and torch.equal(
        t["token_level_rewards"], t["rm_scores"]
    )
    floats = {"rollout_log_probs", "rm_scores", "token_level_scores", "token_level_rewards", "advantages"}
    assert {k for k, x in t.items() if x.dtype == torch.float32} == floats & t.keys()
    assert all(x.dtype == torch.int64 for k, x in t.items() if k not in floats)
    groups = batch.non_tensors["uid"]
    for a, one in zip(groups, records, strict=True):
        assert [a == b for b in groups] == [one.tree == other.tree for other in records]
    assert batch.non_tensors["__num_turns__"].tolist() == [len(x.messages) for x in records]
    assert all(batch.non_tensors[name].shape == (len(records),) for name in batch.meta_info["reward_extra_keys"])


def test_what_does_not_fit_is_refused_in_one_sentence(sampled):
    records = sampled.rollouts()
    longest = max(len(record.completion_ids) for record in records)
    with pytest.raises(ValueError, match=f"a completion has {longest} tokens and max_response_length is 4: raise it"):
        to_verl(records, pad_token_id=0, max_response_length=4)
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens and max_prompt_length is 2"):
        to_verl(records, pad_token_id=0, max_prompt_length=2)


@pytest.mark.parametrize("export", [to_trl, to_skyrl])
def test_nothing_sampled_needs_a_token(sampled, export):
    record = sampled.rollouts()[0]
    nothing = {name: getattr(record, name)[:0] for name in ("completion_ids", "loss_mask", "logprobs", "turn_ids")}
    silent = replace(record, **nothing, finish_reasons=("error",), rewards=np.zeros(1))
    with pytest.raises(ValueError, match=r"nothing was sampled in rollout 0 .*\(error\): pass pad_token_id="):
        export([record, silent])
    assert export([record, silent], pad_token_id=PAD)
    assert export([record])
