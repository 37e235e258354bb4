"""Estimators by their definitions, tree by tree and rollout by rollout.

Each takes the trees of a batch and settings, and gives for every tree the advantages of each edge, one for each time that its
source would train on it, and the weight of each edge; by the id of the node that the edge leads to.
"""

import itertools

import numpy as np

from agents.advantages import STD_FLOOR


def ends(tree):
    returns = tree.returns()
    return [(leaf, float(returns[leaf.id])) for leaf in tree.leaves()]


def ends_below(tree, node):
    return [r for leaf, r in ends(tree) if node in tree.path(leaf)]


def std(x):
    return max(float(np.std(x)), STD_FLOOR) if len(x) else STD_FLOOR


def value(tree, node):
    """The mean over children; `None` without a terminal below."""
    if node.terminal:
        return float(tree.returns()[node.id])
    below = [v for v in (value(tree, tree.nodes[i]) for i in node.children) if v is not None]
    return float(np.mean(below)) if below else None


def share(tree, node):
    return float(np.prod([1 / len(n.children) for n in tree.path(node)[:-1]]))


def clipped(a, config):
    return float(np.clip(a, -config.advantage_clip, config.advantage_clip)) if config.advantage_clip else a


def slow_tree(trees, config):
    for tree in trees:
        first = [v for v in (value(tree, tree.nodes[i]) for i in tree.root.children) if v is not None]
        scale = std(first) if config.advantage_std else 1.0
        advantages, weights = {}, {}
        for node in tree.nodes[1:]:
            off = [
                value(tree, tree.nodes[i])
                for ancestor, on in itertools.pairwise(tree.path(node))
                for i in ancestor.children
                if i != on.id
            ]
            off = [v for v in off if v is not None]
            mine = value(tree, node)
            a = 0.0 if mine is None or not off else mine - np.mean(off)
            advantages[node.id], weights[node.id] = [clipped(a / scale, config)], share(tree, node)
        yield advantages, weights


def slow_two_phase(trees, config):
    for tree in trees:
        rollouts = {}
        for node in tree.nodes[1:]:
            rollouts.setdefault(node.rollout, []).append(node)
        anchor = {k: tree.nodes[edges[0].parent] for k, edges in rollouts.items()}
        leaf = {k: edges[-1] for k, edges in rollouts.items()}
        outcome = {k: float(tree.returns()[leaf[k].id]) if leaf[k].terminal else None for k in rollouts}
        m = sum(tree.phases[k] == 0 for k in rollouts)
        scale = std([outcome[k] for k in rollouts if tree.phases[k] == 0 and outcome[k] is not None])
        advantages, weights = {}, {}
        for k, edges in rollouts.items():
            against = []
            for other in rollouts:
                if other == k or outcome[other] is None:
                    continue
                same = anchor[other] is anchor[k] and tree.phases[other] == tree.phases[k]
                passed = tree.phases[other] < tree.phases[k] and anchor[k] in tree.path(leaf[other])
                against += [outcome[other]] if same or passed else []
            a = outcome[k] - np.mean(against) if against and outcome[k] is not None else 0.0
            weight = (1.0 if tree.phases[k] == 0 else config.two_phase_beta) / m
            for edge in edges:
                a = a if weight else 0.0
                advantages[edge.id] = [clipped(a / (scale if config.advantage_std else 1.0), config)]
                weights[edge.id] = weight
        yield advantages, weights


def replicate(trees, scores, config):
    """Every edge once for every rollout that passes through it."""
    for tree, of_leaf in zip(trees, scores, strict=True):
        advantages = {
            node.id: [clipped(a, config) for leaf, a in of_leaf.items() if node in tree.path(tree.nodes[leaf])] or [0.0]
            for node in tree.nodes[1:]
        }
        count = max(len(tree.leaves()), 1)
        yield advantages, {n.id: len(ends_below(tree, n)) / count for n in tree.nodes[1:]}


def group_relative(r, group, config):
    return (r - np.mean(group)) / (std(group) if config.advantage_std else 1.0)


def slow_grpo(trees, config):
    scores = []
    for tree in trees:
        group = [r for _, r in ends(tree)]
        scores.append({leaf.id: group_relative(r, group, config) for leaf, r in ends(tree)})
    return replicate(trees, scores, config)


def slow_tree_grpo(trees, config):
    scores = []
    for tree in trees:
        group = [r for _, r in ends(tree)]
        scores.append({})
        for leaf, r in ends(tree):
            part = ends_below(tree, tree.path(leaf)[1])
            scores[-1][leaf.id] = group_relative(r, part, config) + group_relative(r, group, config)
    return replicate(trees, scores, config)


def slow_treepo(trees, config):
    scores = []
    for tree in trees:
        scores.append({})
        for leaf, r in ends(tree):
            groups = [ends_below(tree, ancestor) for ancestor in tree.path(leaf)[:-1]]
            terms = [r - np.mean(group) for group in groups if len(group) > 1]
            scores[-1][leaf.id] = float(np.mean(terms)) if terms else 0.0
    if config.advantage_std:
        scale = std([a for tree, s in zip(trees, scores, strict=True) if tree.loss_weight for a in s.values()])
        scores = [{leaf: a / scale for leaf, a in s.items()} for s in scores]
    return replicate(trees, scores, config)


def slow_treerl(trees, config):
    for tree in trees:
        group = [r for _, r in ends(tree)]
        scale = std(group) if config.advantage_std else 1.0
        advantages, weights = {}, {}
        for node in tree.nodes[1:]:
            below = ends_below(tree, node)
            a = 0.0
            if below:
                above = ends_below(tree, tree.nodes[node.parent])
                both = np.mean(below) - np.mean(group) + np.mean(below) - np.mean(above)
                a = both / np.sqrt(len(below)) / scale
            advantages[node.id] = [clipped(a, config)]
            weights[node.id] = len(below) / max(len(group), 1)
        yield advantages, weights


def slow_spo(trees, config):
    for tree in trees:
        advantages, weights = {}, {}
        for node in tree.nodes[1:]:
            siblings = [value(tree, tree.nodes[i]) for i in tree.nodes[node.parent].children]
            siblings = [v for v in siblings if v is not None]
            mine = value(tree, node)
            a = 0.0 if mine is None else group_relative(mine, siblings, config)
            advantages[node.id], weights[node.id] = [clipped(a, config)], share(tree, node)
        yield advantages, weights


SLOW = {
    "tree": slow_tree,
    "two_phase": slow_two_phase,
    "grpo": slow_grpo,
    "tree_grpo": slow_tree_grpo,
    "treepo": slow_treepo,
    "treerl": slow_treerl,
    "spo": slow_spo,
}
