"""Forests for other libraries: datasets, TRL, verl, SkyRL, conversations.

Invariant: every format is made from `RolloutRecord`s, so all of them tell the same of a forest.

    records = forest.rollouts()
    to_trl(records, pad_token_id=tokenizer.pad_token_id)
    write_chat(records, "conversations.jsonl")
"""

from allocation.export.chat import append_chat, chat_line, fine_tuning_line, read_chat, write_chat, write_fine_tuning
from allocation.export.datasets import read_parquet, records_from_dataset, to_dataset, write_parquet
from allocation.export.rows import RolloutRecord, rollout_records, shared_turns
from allocation.export.skyrl import to_skyrl
from allocation.export.trl import environment_reward, to_trl
from allocation.export.verl import VerlBatch, to_verl

__all__ = [
    "RolloutRecord",
    "VerlBatch",
    "append_chat",
    "chat_line",
    "environment_reward",
    "fine_tuning_line",
    "read_chat",
    "read_parquet",
    "records_from_dataset",
    "rollout_records",
    "shared_turns",
    "to_dataset",
    "to_skyrl",
    "to_trl",
    "to_verl",
    "write_chat",
    "write_fine_tuning",
    "write_parquet",
]
