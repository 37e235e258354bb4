"""Records of rollouts as a SkyRL `GeneratorOutput`.

Invariant: `response_ids`, `loss_masks`, `rewards` and `rollout_logprobs` of a rollout have one entry for each of its tokens.

Checked against SkyRL 0.3.0: `skyrl/train/generators/base.py` (`GeneratorOutput`), `skyrl/train/utils/trainer_utils.py`
(`validate_generator_output`), `skyrl/train/dataset/preprocess.py` (`convert_prompts_responses_to_batch_tensors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from allocation.export.rows import RolloutRecord, masks_of, records_of
from allocation.export.tokens import check_ids, without_empty
from allocation.tree import Forest

_STOP_REASONS = {"context": "length", "error": "abort"}


def to_skyrl(
    rollouts: Forest | Sequence[RolloutRecord], *, pad_token_id: int | None = None, once: bool = False
) -> dict[str, Any]:
    """Returns records as what a SkyRL generator returns; it groups them by `[record.group for record in records]`, its `uids`.

    Args:
        rollouts: A forest or its records, of one batch.
        pad_token_id: Stands, masked, for a response in which nothing was sampled: a reward needs a token.
        once: Mask the turns that an earlier one of these rollouts shares, so that every edge is trained once.

    Returns:
        The fields of a `GeneratorOutput`. `rewards` are per token: that of each turn stands at its last sampled token.
        `stop_reasons` has `length` and `abort` where the policy had no room for an action, or none to give.

    Raises:
        ValueError: A record has no token ids, or nothing was sampled in it and there is no `pad_token_id`.
    """
    records = records_of(rollouts)
    check_ids(records)
    rows = [
        without_empty(record, mask, pad_token_id) for record, mask in zip(records, masks_of(records, once), strict=True)
    ]
    last = [record.finish_reasons[-1] for record in records]
    return {
        "prompt_token_ids": [row.prompt_ids for row in rows],
        "response_ids": [row.completion_ids for row in rows],
        "rewards": [row.rewards for row in rows],
        "loss_masks": [row.mask for row in rows],
        "stop_reasons": [_STOP_REASONS.get(reason, reason) for reason in last],
        "rollout_metrics": None,
        "rollout_logprobs": [row.logprobs for row in rows],
        "trajectory_ids": None,
        "trajectory_generation_times": None,
        "rollout_expert_indices": None,
        "is_last_step": None,
        "env_metrics": [{"is_correct": float(record.is_correct), **record.components} for record in records],
        "pixel_values": None,
        "image_grid_thw": None,
    }
