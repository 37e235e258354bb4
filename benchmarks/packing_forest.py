"""Forests of random tokens in the shapes that training has, and the models that learn from them.

Invariant: a shape and a seed give the same forest and the same weights in every process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agents.tiny import build_model
from allocation import Forest, Node, Sample, Tree

VOCABULARY = 1024


@dataclass(frozen=True)
class Shape:
    """Shape of a forest; tokens of a turn are drawn between half and one and a half times what is given.

    Attributes:
        trees: Prompts.
        roots: Root rollouts of a prompt.
        continuations: Continuations of a prompt, each from an inner prefix drawn at random.
        prompt: Tokens of a prompt.
        turns: Turns of a rollout.
        action: Mean tokens of an action.
        observation: Mean tokens of an observation.
    """

    trees: int
    roots: int
    continuations: int
    prompt: int
    turns: int
    action: int
    observation: int


SHAPES = {
    "1": Shape(4, 2, 0, 120, 8, 30, 60),
    "1.5": Shape(3, 4, 2, 200, 8, 25, 55),
    "2.5": Shape(2, 6, 8, 300, 6, 25, 45),
    "4": Shape(2, 7, 9, 600, 5, 25, 45),
}
"""By about how many times the flat layout holds what the packed one does."""

HEADS = {384: 6}
"""Attention heads, by width; 4 for others."""


def shape_of(name: str, trees: int = 0) -> Shape:
    """Returns a shape by name, with another number of trees if one is given."""
    shape = SHAPES[name]
    return replace(shape, trees=trees) if trees else shape


def model_of(width: int, layers: int, seed: int) -> Any:
    """Returns a model of Qwen3's shape with random weights."""
    return build_model(VOCABULARY, width=width, layers=layers, heads=HEADS.get(width, 4), seed=seed)


def forest_of(shape: Shape, seed: int) -> Forest:
    """Returns a forest of random tokens; log-probs are about those of a model with random weights."""
    rng = np.random.default_rng(seed)

    def tokens(mean: int) -> np.ndarray:
        return rng.integers(VOCABULARY, size=int(rng.integers(mean // 2, mean * 3 // 2 + 1)))

    def rollout(tree: Tree, node: Node) -> None:
        origin, phase = ("continuation", 1) if node.depth else ("root", 0)
        number = tree.plan(phase)
        for turn in range(node.depth, shape.turns):
            ids, last = tokens(shape.action), turn == shape.turns - 1
            logprobs = rng.normal(-np.log(VOCABULARY), 0.3, len(ids)).astype(np.float32)
            sample = Sample("", ids, logprobs, np.zeros(0, dtype=np.int64))
            reward = float(rng.random()) if last else 0.0  # no two are equal: every edge is trained
            node = tree.add(node, number, origin, sample=sample, reward=reward, terminated=last)
            if last:
                node.is_correct = reward > 0.5
            else:
                node.context_ids = tokens(shape.observation)

    trees = []
    for index in range(shape.trees):
        tree = Tree(str(index), index, "")
        tree.root.context_ids = rng.integers(VOCABULARY, size=shape.prompt)
        for _ in range(shape.roots):
            rollout(tree, tree.root)
        for _ in range(shape.continuations):
            inner = [n for n in tree.nodes if n.depth and not n.terminal]
            rollout(tree, inner[int(rng.integers(len(inner)))])
        trees.append(tree)
    return Forest(trees)
