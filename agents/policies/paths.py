"""The token ids of a path: what a policy was shown and what it sampled, one after the other.

Invariant: the ids of a prefix are the concatenation of what lies on its nodes; nothing is tokenised that was tokenised before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from agents.policies.chat import ChatCodec, new_messages
from allocation import Context

NO_IDS = np.zeros(0, dtype=np.int64)


def context_ids(codec: ChatCodec, context: Context) -> np.ndarray:
    """Returns the ids shown at a node since the action that led to it, int64 [c].

    Raises:
        ValueError: They have to be made from chat messages, and the environment gives none.
    """
    node = context.node
    if node.context_ids is not None:
        return node.context_ids
    messages = context.info.get("messages")
    if messages is None:
        raise ValueError("this policy needs environments that give info['messages'] (OpenAI-style chat messages)")
    if node.parent is None:
        return codec.prompt_ids(messages, context.info.get("tools"))
    assert node.sample is not None
    action = node.sample.action_ids
    ended = len(action) > 0 and int(action[-1]) == codec.end_id
    return codec.delta_ids(new_messages(messages), ended=ended)


def segment_ids(node: Any, shown: np.ndarray | None) -> np.ndarray:
    """Returns the ids of a node's segment: its action, then what the environment answered (`shown`, if it is given)."""
    action = node.sample.action_ids if node.sample is not None else NO_IDS
    return np.concatenate([action, node.context_ids if shown is None else shown])


def path_length(context: Context) -> int:
    """Returns the tokens on the path up to the node's action; its own context ids come on top."""
    path = context.tree.path(context.node)
    return sum(len(n.sample.action_ids) for n in path if n.sample is not None) + sum(
        len(n.context_ids) for n in path[:-1] if n.context_ids is not None
    )


def path_ids(context: Context, shown: np.ndarray) -> np.ndarray:
    """Returns all ids from the start of the prompt to where the next action begins, int64 [n].

    Args:
        context: The prefix.
        shown: Its own `context_ids`.
    """
    path = context.tree.path(context.node)
    return np.concatenate([segment_ids(n, shown if n is context.node else None) for n in path])
