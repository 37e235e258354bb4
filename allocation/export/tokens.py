"""What the exports of tokens have in common.

Invariant: a rollout without token ids is refused, never exported as one without tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from allocation.export.rows import RolloutRecord


class Row(NamedTuple):
    """A rollout as lists; all but the prompt have one entry for each token of the completion."""

    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]
    logprobs: list[float]
    rewards: list[float]


def check_ids(records: Sequence[RolloutRecord]) -> None:
    """Raises a `ValueError` if a record has no token ids, or if there is none."""
    if not records:
        raise ValueError("there is no rollout to export: the forest has no finished one")
    for record in records:
        if not record.has_ids:
            raise ValueError(
                f"rollout {record.rollout} of tree {record.task_id!r} has no token ids, because its policy gives only text; "
                "sample with TransformersPolicy or VLLMPolicy, or export the conversation by write_chat"
            )


def without_empty(record: RolloutRecord, mask: np.ndarray, pad_token_id: int | None) -> Row:
    """Returns a record as lists, with one masked token wherever there would be none.

    Args:
        record: The rollout.
        mask: Which of its tokens to train on, [c].
        pad_token_id: That token.

    Raises:
        ValueError: It is needed and not given.
    """
    prompt, completion = record.prompt_ids.tolist(), record.completion_ids.tolist()
    if (not prompt or not completion) and pad_token_id is None:
        raise ValueError(
            f"nothing was sampled in rollout {record.rollout} of tree {record.task_id!r} ({record.finish_reasons[-1]}): "
            "pass pad_token_id=tokenizer.pad_token_id to put one masked token there, or leave the rollout out"
        )
    pad = [] if pad_token_id is None else [pad_token_id]
    if not completion:
        return Row(prompt or pad, pad, [0], [0.0], [record.total_reward])
    return Row(prompt or pad, completion, mask.tolist(), record.logprobs.tolist(), record.token_rewards().tolist())
