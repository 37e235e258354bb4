"""Rules of allocation for the enumeration: real methods at sizes whose forests can be listed.

Invariant: a rule is a function of a forest so far; all that is random in it has the same seed in every run.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from enumeration import Exact, Forests, tiny_model
from enumeration_world import World

from allocation import TraceAllocator, TraceConfig
from allocation.methods.adaptive import DAPOAllocator, ReinforceAdaAllocator
from allocation.methods.base import Allocator
from allocation.methods.branching import ARPOAllocator, TreeGRPOAllocator, TreePOAllocator, inner_prefixes
from allocation.methods.uniform import UniformAllocator

TWO, THREE = World(2), World(3)
SLIPS = World(2, slip=0.3)
STOPS = World(3, stops=True)
"""Some episodes end after their first turn."""
PAIR = World(2, prompts=2)


@dataclass(frozen=True)
class PathPredictor:
    """Different at every prefix, and ready from the start.

    Attributes:
        pitch, shift: Say how the prediction follows from the log-probs along the path.
    """

    pitch: float = 7.0
    shift: float = 1.0
    ready: bool = field(default=True, init=False)

    def predict(self, anchors):
        return np.array([0.5 + 0.45 * np.sin(self.pitch * a.total_logprob + self.shift) for a in anchors])


class PastAllocator(Allocator):
    """Two root rollouts of a prompt, and one continuation from each of their first prefixes that action 0 led to."""

    name = "past"

    def root_budget(self, budget):
        return budget // 2

    def max_rollouts(self, tree):
        return 2  # so that nothing that is left over becomes a root rollout

    def allocate_prefixes(self, tree, budget, rng, wave=0):
        first = [n for n in inner_prefixes(tree) if n.depth == 1 and n.action == "0"]
        return [(n.id, 1) for n in first] if not wave else []


class EachPrefixAllocator(Allocator):
    """The given number of root rollouts, and one continuation from each of their first prefixes."""

    name = "each"

    def root_budget(self, budget):
        return budget // 2

    def allocate_prefixes(self, tree, budget, rng, wave=0):
        return [(n.id, 1) for n in inner_prefixes(tree)]


class WeighedAllocator(UniformAllocator):
    """Groups of two at prompts that count differently in the loss."""

    def loss_weights(self, trees):
        return np.array([2.0, 0.5])


def trace(predictor=None, **config):
    """Returns a maker of a small TRACE."""
    base = {"m_min": 2, "m_max": 8, "continuations": 1.0, "kappa": 2.0, "explore": 0.0}
    return lambda: TraceAllocator(predictor or PathPredictor(), TraceConfig(**base | config))


RULES = {
    # Exogenous: whether and how often a prefix is branched depends on nothing that happened after it.
    "grpo": (lambda: UniformAllocator(3), 3),
    "grpo, groups of two": (lambda: UniformAllocator(2), 4),
    "random": (trace(prefix_mode="random"), 4),
    "treepo": (lambda: TreePOAllocator(4), 4),
    "tree_grpo": (lambda: TreeGRPOAllocator(4, rounds=1), 4),
    "by the past": (PastAllocator, 4),
    "each first prefix": (EachPrefixAllocator, 4),
    "each of three first prefixes": (EachPrefixAllocator, 6),
    "weighed": (lambda: WeighedAllocator(2), 4),
    # By outcomes, or with a budget that prefixes share by what is predicted of them.
    "flip": (trace(prefix_mode="flip"), 4),
    "flip, posterior": (trace(prefix_mode="flip", prefix_belief="posterior"), 4),
    "flip in two waves": (trace(prefix_mode="flip", prefix_waves=2), 4),
    "flip, capped": (trace(prefix_mode="flip", cap_per_rollout=1, continuations=1.5), 5),
    "flip at pairs": (trace(prefix_mode="flip", continuations=0.5), 6),
    "flip after two root waves": (trace(prefix_mode="flip", root_waves=2), 6),
    "exact": (trace(PathPredictor(11.0, 0.0), prefix_mode="exact", continuations=0.5), 3),
    "exact, other predictions": (trace(PathPredictor(23.0, 0.0), prefix_mode="exact", continuations=0.5), 3),
    "arpo": (lambda: ARPOAllocator(3), 3),
    "reinforce_ada": (lambda: ReinforceAdaAllocator(4, enough=1, per_round=2, max_rounds=3), 6),
    "dapo": (lambda: DAPOAllocator(2), 4),
    "one root rollout": (lambda: TreeGRPOAllocator(3, rounds=1), 2),
}
"""A maker of an allocator, and its budget, by what it does."""


@cache
def exact(world):
    """Returns the exact quantities of a world under the policy of these tests."""
    return Exact(world, tiny_model())


@cache
def forests(world, rule):
    """Returns all forests of a rule in a world."""
    allocator, budget = RULES[rule]
    return Forests(exact(world), allocator, budget, range(world.prompts))
