"""Records of rollouts as what the `rollout_func` of TRL's `GRPOTrainer` returns.

Invariant: `completion_ids`, `logprobs` and `env_mask` of a rollout have one entry for each token after its prompt, and
`env_mask` is 1 where the policy sampled it.

Checked against TRL 1.16, `trl/trainer/grpo_trainer.py`: `GRPOTrainer._generate` takes `prompt_ids`, `completion_ids` and
`logprobs`, and `env_mask` as the mask of the loss; `_generate_and_score_completions` hands every other list to the reward
functions, entry i with the i-th prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from allocation.export.rows import RolloutRecord, masks_of, records_of
from allocation.export.tokens import check_ids, without_empty
from allocation.tree import Forest


def to_trl(
    rollouts: Forest | Sequence[RolloutRecord], *, pad_token_id: int | None = None, once: bool = False
) -> dict[str, Any]:
    """Returns records as the dictionary that a `rollout_func` returns.

    A trainer groups `num_generations` rollouts in a row as those of one prompt, so every tree has to have that many ends, and
    the trees have to come in the order of the prompts that the function was given.

    Args:
        rollouts: A forest or its records, of one batch, in the order in which they are to be trained.
        pad_token_id: Stands, masked, for a completion in which nothing was sampled: the trainer reads the last token of each.
        once: Mask the turns that an earlier one of these rollouts shares, so that every edge is trained once.

    Returns:
        `prompt_ids`, `completion_ids`, `env_mask` (lists of lists of int) and `logprobs` (of float), and for the reward
        functions `total_reward` (see `environment_reward`), `is_correct`, `truncated`, `task_id`, `tree` and `rollout`.

    Raises:
        ValueError: A record has no token ids, or nothing was sampled in it and there is no `pad_token_id`.
    """
    records = records_of(rollouts)
    check_ids(records)
    rows = [
        without_empty(record, mask, pad_token_id) for record, mask in zip(records, masks_of(records, once), strict=True)
    ]
    return {
        "prompt_ids": [row.prompt_ids for row in rows],
        "completion_ids": [row.completion_ids for row in rows],
        "logprobs": [row.logprobs for row in rows],
        "env_mask": [row.mask for row in rows],
        "total_reward": [record.total_reward for record in records],
        "is_correct": [record.is_correct for record in records],
        "truncated": [record.truncated for record in records],
        "task_id": [record.task_id for record in records],
        "tree": [record.tree for record in records],
        "rollout": [record.rollout for record in records],
    }


def environment_reward(total_reward: Sequence[float], **_: Any) -> list[float]:
    """A reward function for `GRPOTrainer(reward_funcs=...)`: what the environment gave."""
    return list(total_reward)
