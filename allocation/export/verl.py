"""Records of rollouts as the padded batch that verl's trainer works on.

Invariant: prompts end and responses begin at one column; what is padding has attention 0, and only sampled tokens have a
`response_mask` of 1.

Checked against verl 0.9.1: layout, masks and positions as `AgentLoopWorker._agent_loop_postprocess` and `_postprocess`
have them (`verl/experimental/agent_loop/agent_loop.py`) with `compute_position_id_with_mask` (`verl/utils/model.py`); scores
are read by `extract_reward` (`verl/trainer/ppo/reward.py`), and advantages computed from `token_level_rewards`, grouped by
`uid` (`verl/trainer/ppo/core_algos.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from allocation.export.rows import RolloutRecord, masks_of, records_of
from allocation.export.tokens import check_ids
from allocation.tree import Forest


@dataclass(frozen=True)
class VerlBatch:
    """The arguments of `DataProto.from_dict(tensors=..., non_tensors=..., meta_info=...)`.

    Attributes:
        tensors: [rollouts, ...] each; see `to_verl`.
        non_tensors: `uid` (the group of a rollout: its tree), `task_id`, `is_correct`, `__num_turns__` (messages), each an
            array with one entry for each rollout.
        meta_info: Names `is_correct` as what is logged besides the reward.
    """

    tensors: dict[str, torch.Tensor]
    non_tensors: dict[str, np.ndarray]
    meta_info: dict[str, Any]


def to_verl(
    rollouts: Forest | Sequence[RolloutRecord],
    *,
    pad_token_id: int,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    once: bool = False,
) -> VerlBatch:
    """Returns records as one batch: p columns of prompt, padded on the left, then r of response, padded on the right.

    Args:
        rollouts: A forest or its records, of one batch.
        pad_token_id: Fills what is no token.
        max_prompt_length: p; `None` for that of the longest prompt.
        max_response_length: r; `None` for that of the longest completion.
        once: Mask the turns that an earlier one of these rollouts shares, so that every edge is trained once.

    Returns:
        Tensors `prompts` int64 [b, p]; `responses` and `response_mask` int64 [b, r]; `input_ids`, `attention_mask` and
        `position_ids` int64 [b, p + r]; `rollout_log_probs` float32 [b, r]; `rm_scores` float32 [b, r], the reward of each turn
        at its last sampled token, and the same as `token_level_scores` and `token_level_rewards` (which the trainer makes of
        them where it subtracts no penalty); `advantages` float32 [b, r] if the records have them.

    Raises:
        ValueError: A record has no token ids, or does not fit.
    """
    records = records_of(rollouts)
    check_ids(records)
    p = _width("prompt", "max_prompt_length", max_prompt_length, [len(r.prompt_ids) for r in records])
    r = _width("completion", "max_response_length", max_response_length, [len(r.completion_ids) for r in records])
    shape = (len(records), r)
    prompts, responses = np.full((len(records), p), pad_token_id, dtype=np.int64), np.full(shape, pad_token_id)
    attention = np.zeros((len(records), p + r), dtype=np.int64)
    mask, logprobs, scores = np.zeros(shape, dtype=np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    advantages = np.zeros(shape, np.float32)
    given = all(record.advantages is not None for record in records)
    for i, (record, trained) in enumerate(zip(records, masks_of(records, once), strict=True)):
        begin, end = p - len(record.prompt_ids), len(record.completion_ids)
        prompts[i, begin:], responses[i, :end] = record.prompt_ids, record.completion_ids
        attention[i, begin : p + end] = 1
        mask[i, :end], logprobs[i, :end] = trained, record.logprobs
        scores[i, :end] = record.token_rewards()
        if not end:  # where verl puts the score of an empty response
            scores[i, -1] = record.total_reward
        if given:
            advantages[i, :end] = record.token_advantages()
    arrays = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": mask,
        "input_ids": np.concatenate([prompts, responses], axis=1),
        "attention_mask": attention,
        "position_ids": np.maximum(attention.cumsum(axis=1) - 1, 0),
        "rollout_log_probs": logprobs,
        "rm_scores": scores,
        "token_level_scores": scores.copy(),
        "token_level_rewards": scores.copy(),
    } | ({"advantages": advantages} if given else {})
    return VerlBatch(
        {name: torch.from_numpy(array) for name, array in arrays.items()},
        {
            "uid": np.array([record.group for record in records], dtype=object),
            "task_id": np.array([record.task_id for record in records], dtype=object),
            "is_correct": np.array([record.is_correct for record in records]),
            "__num_turns__": np.array([len(record.messages) for record in records], dtype=np.int32),
        },
        {"reward_extra_keys": ["is_correct"]},
    )


def _width(what: str, argument: str, limit: int | None, lengths: Sequence[int]) -> int:
    longest = max(lengths)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a {what} has {longest} tokens and {argument} is {limit}: raise it, or leave out the rollouts that are longer"
        )
    return max(longest, 1) if limit is None else limit
