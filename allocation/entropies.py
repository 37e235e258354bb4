"""How uncertain the policy was at the turns of a tree, as the engine that sampled them says.

Invariant: a figure here is the engine's own (`Sample.entropy`) or a difference of two; where one is missing the answer is NaN,
never a guess, and a tree in which all are missing is an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocation.contrast import FloatArray
from allocation.tree import Node, Tree


def entropy_rises(tree: Tree, nodes: Sequence[Node]) -> FloatArray:
    """Returns how much the entropy of the policy rose at prefixes against the start of their rollouts.

    For a prefix H it is the mean entropy of the tokens of the turn that its rollout took at H, so after the answer of the tool
    that H ends with, less that of the first turn on the path to H. Source: ARPO (arXiv 2507.19849), entropy-based adaptive
    rollout, which calls it Delta H before normalisation.

    Args:
        tree: A tree none of whose rollouts is under way.
        nodes: Inner prefixes of it.

    Returns:
        float64 [n], in nats; NaN where the engine gave no entropy, or no turn followed.

    Raises:
        ValueError: The engine gave no entropy in the whole tree, although it sampled tokens.
    """
    entropy = np.array([_entropy(node) for node in tree.nodes])
    turns = tree.nodes[1:]
    given = any(node.sample is not None and node.sample.entropy is not None for node in turns)
    if nodes and not given and any(node.sample is None or len(node.sample.action_ids) for node in turns):
        raise ValueError(
            f"no sample of tree {tree.key!r} has an entropy, which this allocation goes by: let the policy give it "
            "(TransformersPolicy(..., entropy=True), or Sample(entropy=...) of a policy of your own) or choose another method"
        )
    following = np.full(len(tree.nodes), np.nan)
    first = np.full(len(tree.nodes), np.nan)
    for node in turns:  # parents come first
        parent = tree.nodes[node.parent]  # type: ignore[index]
        first[node.id] = entropy[node.id] if parent.parent is None else first[parent.id]
        if parent.rollout == node.rollout:
            following[parent.id] = entropy[node.id]
    ids = [node.id for node in nodes]
    return following[ids] - first[ids]


def _entropy(node: Node) -> float:
    found = None if node.sample is None else node.sample.entropy
    return float("nan") if found is None or not np.isfinite(found) else float(found)
