"""What an environment told the agent, as chat messages on the nodes of a tree.

Invariant: the messages of a path's nodes, with its actions in between, are the conversation as the environment reports it;
where that cannot be told apart turn by turn, a node has none.

Infos are gone when a tree is finished, and with them the roles of what was observed (`tool`, `user`), the system prompt and the
tools. They are kept here for `allocation.export`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allocation.tree import Node, Tree

Message = Mapping[str, Any]


def keep_opening(tree: Tree, info: Mapping[str, Any]) -> None:
    """Keeps what the first info of an episode says: the messages before the first action, and the tools."""
    messages, tools = _conversation(info), info.get("tools")
    if messages is not None:
        tree.root.messages = tuple(messages)
        tree.tools = tuple(tools) if isinstance(tools, Sequence) else ()


def keep_messages(tree: Tree, leaf: Node, info: Mapping[str, Any], *, answered: bool) -> None:
    """Keeps what was observed on the way to a leaf.

    Args:
        tree: The tree.
        leaf: Where a rollout has ended.
        info: The last info of the rollout, which holds the whole conversation.
        answered: Whether the environment answered the last action; if not, the info is that of the turn before.
    """
    opening = tree.root.messages
    messages = None if opening is None else _conversation(info)
    if opening is None or messages is None:
        return
    turns: list[list[Message]] = []
    for message in messages[len(opening) :]:
        if message["role"] == "assistant":
            turns.append([])
        elif turns:
            turns[-1].append(message)
    path = tree.path(leaf)[1:]
    if not answered:
        turns.append([])
    if len(turns) != len(path):
        return  # an environment that forgets or merges turns
    for node, seen in zip(path, turns, strict=True):
        if node.messages is None:
            node.messages = tuple(seen)


def _conversation(info: Mapping[str, Any]) -> Sequence[Message] | None:
    """Returns an info's messages if they are a list of such as chat templates take; another package may mean something else."""
    messages = info.get("messages")
    known = isinstance(messages, list | tuple) and all(isinstance(m, Mapping) and "role" in m for m in messages)
    return messages if known else None
