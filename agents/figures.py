"""What the log says of a batch of rollouts.

Invariant: figures are functions of the forest and of the number of updates alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from allocation import Forest


def batch_figures(forest: Forest, updates: int) -> dict[str, Any]:
    """Returns what the log says of a batch: success, effective ratios, age of the weights, the ledger, where the budget went.

    Args:
        forest: The batch.
        updates: Updates that were done when it was collected. `policy/version_lag` is how many of them the weights that
            sampled had not seen, mean over the edges with tokens; a batch without tokens has none.
    """
    leaves = [leaf for tree in forest for leaf in tree.leaves("root")]
    rewards = [tree.returns()[[leaf.id for leaf in tree.leaves("root")]] for tree in forest]
    figures: dict[str, Any] = {
        "train/success": float(np.mean([bool(leaf.is_correct) for leaf in leaves])),
        "train/reward": float(np.concatenate(rewards).mean()),
        "train/turns": float(np.mean([leaf.depth for leaf in leaves])),
        "train/prompts": len(forest),
        "effective_ratio/roots": forest.effective_ratio("root"),
        "effective_ratio/tree": forest.effective_ratio(),
    }
    sampled = (n.sample for tree in forest for n in tree.nodes if n.sample is not None)
    versions = [sample.version for sample in sampled if len(sample.action_ids)]
    if versions:
        figures["policy/version_lag"] = updates - float(np.mean(versions))
    figures |= {f"ledger/{name}": count for name, count in forest.ledger.counts().items()}
    for tree in forest:
        name = f"budget/by_level/{tree.info.get('level', 0)}"
        figures[name] = figures.get(name, 0) + len(tree.leaves())
        for leaf in tree.leaves():
            name = f"budget/by_depth/{_branch_depth(tree, leaf)}"
            figures[name] = figures.get(name, 0) + 1
    return figures


def learner_line(records: Iterable[Mapping[str, Any]]) -> str:
    """Returns in words what the learner computed in a run, and what sharing the tokens of prefixes saved.

    Args:
        records: The run's metrics.
    """
    rows = list(records)
    flat, unique = (sum(r.get(f"learner/{name}") or 0 for r in rows) for name in ("flat_tokens", "unique_tokens"))
    if not unique:
        return "the learner computed nothing"
    return (
        f"the learner's batches hold {unique:,.0f} different tokens; one row for every rollout would hold {flat:,.0f}, "
        f"{flat / unique:.2f} times as many"
    )


def engine_line(records: Iterable[Mapping[str, Any]]) -> str | None:
    """Returns in words what became of the weights that an engine was given; `None` for a run without one.

    Args:
        records: The run's metrics.
    """
    rows = [r for r in records if r.get("engine/moved") is not None]
    if not rows:
        return None
    moved = [r["engine/moved"] for r in rows]
    drift = [r["drift/mean_abs"] for r in rows if r.get("drift/mean_abs") is not None]
    line = (
        f"the engine took over the weights of {len(rows)} updates; each moved its log-probs of tokens that it had just "
        f"sampled, by {np.mean(moved):.2g} nats a token ({min(moved):.2g} to {max(moved):.2g})"
    )
    return line + (f"; before the updates they were {np.mean(drift):.2g} nats from the learner's" if drift else "")


def _branch_depth(tree: Any, leaf: Any) -> int:
    """Returns the depth of the anchor that a rollout started from."""
    if leaf.origin == "root":
        return 0
    return min(n.depth for n in tree.path(leaf) if n.rollout == leaf.rollout) - 1
