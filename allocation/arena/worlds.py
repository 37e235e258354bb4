"""What an allocator can be tried out on without a model: prompts whose rollouts are looked up or drawn, not generated.

Invariant: to an allocator a replayed forest looks like a sampled one: the same trees, nodes, outcomes, features and counts,
collected through the same scheduler.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from allocation.allocators import Allocator
from allocation.collection import MAX_SEED, rollout_seed
from allocation.scheduler import Job, Scheduler
from allocation.tree import Forest, Node, Tree


class World(Protocol):
    """A population of prompts with a fixed policy."""

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns the numbers of `count` different prompts (all of them if there are fewer), int64 [count]."""
        ...

    def open(self, prompt: int) -> Tree:
        """Returns a fresh tree of a prompt that holds its root alone, with features if the world has any."""
        ...

    def roll(self, job: Job, rng: np.random.Generator) -> None:
        """Carries out one rollout: adds its nodes to `job.tree`, from `job.node` to a terminal.

        Each new node has a `sample` with as many action ids as tokens were generated, context ids, features and entropy where
        the world knows them; the terminal has its verdict.
        """
        ...

    def value(self, tree: Tree, node: Node) -> float:
        """Returns the true chance of success from a node, or the best estimate of it; NaN where nothing is known."""
        ...


def replay(world: World, allocator: Allocator, budget: int, rng: np.random.Generator) -> Forest:
    """Collects one forest from a world, as a driver does from environments.

    Args:
        world: Where rollouts come from.
        allocator: Where the budget goes.
        budget: Rollouts, root rollouts and continuations together.
        rng: Draws the candidates and seeds the rest.

    Returns:
        The finished forest. Its ledger counts rollouts, turns, and generated, computed and reused tokens.
    """
    allocator.check(budget)
    entropy = int(rng.integers(MAX_SEED))
    trees = [world.open(int(p)) for p in world.draw(rng, allocator.pool_size(budget))]
    if not trees:
        raise ValueError("the world has no prompts")
    forest = Forest()
    ledger = forest.ledger
    root_budget = allocator.root_budget(budget)
    with ledger.timed("allocate"):
        scheduler = Scheduler(allocator, forest, trees, root_budget, budget - root_budget, rng)
    while (job := scheduler.next()) is not None:
        before = len(job.tree.nodes)
        world.roll(job, np.random.default_rng(rollout_seed(entropy, job.tree.index, job.rollout)))
        added = job.tree.nodes[before:]
        ledger.environment_turns += len(added)
        ledger.generated_tokens += sum(len(n.sample.action_ids) for n in added if n.sample is not None)
        if job.origin == "root":
            ledger.root_rollouts += 1
        else:
            ledger.continuations += 1
        with ledger.timed("allocate"):
            scheduler.finished(job)
    return forest
