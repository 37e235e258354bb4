"""Trees of all shapes for the tests of tables, estimators and aggregations."""

import numpy as np
from hypothesis import strategies as st

from allocation import Sample, Tree

REWARDS = {
    "binary": lambda rng, last: float(last and rng.random() < 0.5),
    "graded": lambda rng, last: float(np.round(rng.random(), 2)) if last else 0.0,
    "dense": lambda rng, last: float(rng.normal()),
    "outliers": lambda rng, last: float(rng.normal() * (1e6 if rng.random() < 0.2 else 1)) if last else 0.0,
    "equal": lambda rng, last: 0.1 if last else 0.0,
}


def add_rollout(tree, node, number, origin, rng, reward, length, finished=True):
    """Adds a path of `length` edges below `node`, each with a sampled turn of 1 to 4 tokens; returns its last node."""
    for turn in range(length):
        ids = np.arange(int(rng.integers(1, 5)))
        sample = Sample("a", ids, -0.1 * ids.astype(np.float32), np.arange(2), version=number)
        last = turn == length - 1 and finished
        node = tree.add(
            node,
            number,
            origin,
            sample=sample,
            reward=reward(rng, last),
            terminated=last,
            is_correct=bool(rng.random() < 0.5) if last else None,
        )
    return node


@st.composite
def trees(draw, waves=3, planned=None, rewards=tuple(REWARDS), unfinished=True, min_roots=1):
    """A tree with chains, branches, branches of branches and more root rollouts, decided on in several phases.

    `planned` says whether its phases are those of a scheduler (both if it is `None`); otherwise they follow from the origins.
    Some rollouts have no terminal, unless `unfinished` is false.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    reward = REWARDS[draw(st.sampled_from(rewards))]
    planned = draw(st.booleans()) if planned is None else planned
    leave_open = draw(st.sampled_from([0.0, 0.3])) if unfinished else 0.0
    tree = Tree("q", 0, "prompt")

    def rollout(node, phase):
        number = tree.num_rollouts
        if planned:
            tree.plan(phase)
        else:
            tree.num_rollouts += 1
        length, finished = int(rng.integers(1, 5)), bool(rng.random() >= leave_open)
        add_rollout(tree, node, number, "continuation" if node.depth else "root", rng, reward, length, finished)

    for _ in range(draw(st.integers(min_roots, 5))):
        rollout(tree.root, 0)
    for phase in range(1, 1 + draw(st.integers(0, waves))):
        anchors = [n for n in tree.nodes if not n.terminal and (n.depth or planned)]
        chosen = [anchors[int(i)] for i in rng.integers(len(anchors), size=int(rng.integers(1, 4)))] if anchors else []
        for node in chosen:
            for _ in range(int(rng.integers(1, 4))):
                rollout(node, phase)
    tree.loss_weight = float(rng.choice([0.0, 0.5, 1.0], p=[0.1, 0.1, 0.8]))
    return tree


def forests(**kwargs):
    """Some trees, or none."""
    return st.lists(trees(**kwargs), max_size=3)
