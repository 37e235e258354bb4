"""A small world for the tests of methods that choose prompts: coins, whose chances a predictor may know."""

import numpy as np
from bit_env import DepthPredictor

from allocation import Sample, Tree
from allocation.arena.worlds import replay
from allocation.methods.adaptive import DAPOAllocator, ReinforceAdaAllocator
from allocation.methods.curriculum import MoPPSAllocator, PCLAllocator, VIPAllocator


def coin(number):
    """A tree whose root's hidden state says which prompt it is of."""
    tree = Tree(str(number), -1, "coin", {"max_turns": 1})
    tree.root.features = np.array([number], dtype=np.float32)
    return tree


class Coins:
    """A world of prompts that are coins: one turn, heads is a success."""

    def __init__(self, heads):
        self.heads = np.asarray(heads, dtype=float)

    def draw(self, rng, count):
        return rng.permutation(len(self.heads))[:count]

    def open(self, prompt):
        return coin(prompt)

    def roll(self, job, rng):
        correct = bool(rng.random() < self.heads[int(job.tree.key)])
        ids = np.arange(int(rng.integers(1, 9)))
        sample = Sample("", ids, -0.1 * ids.astype(np.float32), ids[:2])
        job.tree.add(
            job.node, job.rollout, job.origin, sample=sample, reward=float(correct), terminated=True, is_correct=correct
        )

    def value(self, tree, node):
        return float(node.is_correct) if node.terminal else float(self.heads[int(tree.key)])


class Known(DepthPredictor):
    """Knows the value of each prompt."""

    def __init__(self, values):
        self.values = values

    def predict(self, anchors):
        return np.array([self.values[int(a.features[0])] for a in anchors])


def prompts(n):
    return [coin(i) for i in range(n)]


def sampled(tree, outcomes):
    for correct in outcomes:
        tree.add(tree.root, tree.num_rollouts, "root", terminated=True, is_correct=bool(correct))
        tree.num_rollouts += 1
    return tree


def outcomes(tree):
    return [bool(n.is_correct) for n in sorted(tree.leaves(), key=lambda n: n.rollout)]


def make(name, values=(0.5,), **settings):
    """A method whose predictor, if it has one, knows the values."""
    match name:
        case "pcl":
            return PCLAllocator(Known(values), **settings)
        case "vip":
            return VIPAllocator(Known(values), **settings)
    return {"dapo": DAPOAllocator, "reinforce_ada": ReinforceAdaAllocator, "mopps": MoPPSAllocator}[name](**settings)


def play(name, heads, budget, seed=0, **settings):
    forest = replay(Coins(heads), make(name, heads, **settings), budget, np.random.default_rng(seed))
    assert forest.ledger.root_rollouts == sum(len(t.leaves()) for t in forest)
    assert forest.ledger.root_rollouts + forest.ledger.unspent == budget and not forest.ledger.continuations
    return forest
