"""A tree as plain data, for `trees.jsonl` and the report.

Invariant: a record holds texts and figures only, no token ids and no states, and every number in it is finite or null.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from allocation.tree import Tree

FORMAT_VERSION = 1


def as_text(value: Any) -> str:
    """Returns a text as it is and anything else as its `repr`; a number of NumPy's looks like any other."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str) else repr(value)


def tree_record(tree: Tree, advantages: np.ndarray | None = None) -> dict[str, Any]:
    """Returns a tree as plain data for `trees.jsonl` (texts and figures; no token ids, no states).

    Args:
        tree: The tree.
        advantages: Advantage of the edge into each node, float [nodes].
    """
    values, weights = tree.values(), tree.weights()

    def number(x: float | None) -> float | None:
        return None if x is None or not np.isfinite(x) else round(float(x), 4)

    nodes = [
        {
            "id": n.id,
            "parent": n.parent,
            "depth": n.depth,
            "origin": n.origin,
            "rollout": n.rollout,
            "action": as_text(n.action),
            "observation": as_text(n.observation),
            "predicted": number(n.predicted),
            "value": number(values[n.id]),
            "weight": number(weights[n.id]),
            "advantage": None if advantages is None or n.parent is None else number(advantages[n.id]),
            "reward": number(n.reward),
            "is_correct": n.is_correct,
            "terminated": n.terminated,
            "truncated": n.truncated,
            "tool_error": n.tool_error,
            "tokens": 0 if n.sample is None else len(n.sample.action_ids),
            "finish_reason": None if n.sample is None else n.sample.finish_reason,
            "policy_version": None if n.sample is None else n.sample.version,
        }
        for n in tree.nodes
    ]
    return {
        "version": FORMAT_VERSION,
        "tree": tree.index,
        "task_id": tree.key,
        **tree.info,
        "predicted": number(tree.root.predicted),
        "nodes": nodes,
    }
