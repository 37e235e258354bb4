"""Records of rollouts as conversations, one JSON object a line.

Invariant: a line is a whole conversation, so a file that was cut short has lost its last line and nothing else.

Two styles. As text, each line has `messages` (as the environment tells them, the assistant's as they were written), `tools`
and `metadata`. For fine-tuning, each line follows OpenAI's `FineTuneChatRequestInput`: turns that call a tool have
`tool_calls`, results the id of their call, the last message is the assistant's, and `weight` says which of its messages to
train on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from allocation.export.rows import RolloutRecord, records_of, shared_turns
from allocation.tree import Forest
from trace_envs.actions import get_format
from trace_envs.jsonl import drop_torn_line, read_jsonl
from trace_envs.messages import native_messages

MAX_CALLS = 64
"""Calls of one turn that are told apart."""


def write_chat(rollouts: Forest | Sequence[RolloutRecord], path: str | os.PathLike[str]) -> None:
    """Writes a line for each rollout: its conversation as text.

    Args:
        rollouts: A forest or its records; policies without token ids will do.
        path: The file; one that is there is replaced.
    """
    _write(path, map(chat_line, records_of(rollouts)))


def append_chat(rollouts: Forest | Sequence[RolloutRecord], path: str | os.PathLike[str]) -> None:
    """Does what `write_chat` does at the end of a file; a last line that was cut short is removed first, with a warning."""
    drop_torn_line(Path(path))
    _write(path, map(chat_line, records_of(rollouts)), mode="a")


def write_fine_tuning(
    rollouts: Forest | Sequence[RolloutRecord],
    path: str | os.PathLike[str],
    *,
    action_format: str = "hermes",
    once: bool = False,
) -> int:
    """Writes what OpenAI's fine-tuning takes: a line for each rollout in which there was an action.

    Args:
        rollouts: A forest or records, usually of rollouts that succeeded.
        path: The file; one that is there is replaced.
        action_format: The environment's: how actions are read. What is neither call nor answer in it stays text.
        once: Give weight 0 to turns that an earlier one of these rollouts shares, so that every turn is trained once.

    Returns:
        The number of lines.

    Raises:
        ValueError: The action format is unknown, or a message has no text.
    """
    records = [record for record in records_of(rollouts) if record.num_actions]
    first = shared_turns(records) if once else [0] * len(records)
    lines = [fine_tuning_line(r, turn, action_format=action_format) for r, turn in zip(records, first, strict=True)]
    _write(path, iter(lines))
    return len(lines)


def read_chat(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of either style; a last line that was cut short is dropped with a warning.

    Raises:
        DamagedLogError: Another line is no JSON object; the message names it.
    """
    return read_jsonl(path)


def chat_line(record: RolloutRecord) -> dict[str, Any]:
    """Returns a record as `write_chat` writes it."""
    metadata = {
        "task_id": record.task_id,
        "tree": record.tree,
        "rollout": record.rollout,
        "origin": record.origin,
        "turns": len(record.rewards),
        "reward": _finite(record.total_reward),
        "is_correct": record.is_correct,
        "terminated": record.terminated,
        "truncated": record.truncated,
        "components": {name: _finite(x) for name, x in record.components.items()},
    }
    tools = {"tools": list(record.tools)} if record.tools else {}
    return {"messages": [dict(m) for m in record.messages], **tools, "metadata": metadata}


def fine_tuning_line(record: RolloutRecord, first_turn: int = 0, *, action_format: str = "hermes") -> dict[str, Any]:
    """Returns a record as `write_fine_tuning` writes it.

    Args:
        record: The rollout.
        first_turn: Turns before this one have weight 0.
        action_format: The environment's.

    Raises:
        ValueError: The action format is unknown, a message has no text, or there was no action.
    """
    for message in record.messages:
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"a message of rollout {record.rollout} of tree {record.task_id!r} has no text as its content "
                f"({message!r:.60}); export such conversations by write_chat"
            )
    if not record.num_actions:
        raise ValueError(
            f"rollout {record.rollout} of tree {record.task_id!r} has no action to learn from; leave it out"
        )
    # A turn with more calls than the environment took has the refusal as its result.
    messages = native_messages(record.messages, record.tools, get_format(action_format), max_calls=MAX_CALLS)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    # Those before the first action are examples in the prompt.
    for turn, i in enumerate(said, start=record.num_actions - len(said)):
        messages[i]["weight"] = int(turn >= first_turn)
    parallel = any(len(message.get("tool_calls", ())) > 1 for message in messages)
    tools = {"tools": list(record.tools), "parallel_tool_calls": parallel} if record.tools else {}
    return {"messages": messages[: said[-1] + 1], **tools}


def _write(path: str | os.PathLike[str], lines: Iterator[dict[str, Any]], mode: str = "w") -> None:
    with open(path, mode, encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
