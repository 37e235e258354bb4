"""The one core that says what a free slot does next; every driver uses it.

Invariant: each job handed out is finished exactly once, and a prompt's prefix stage is planned at the moment when the last
of its root rollouts is finished: local to the prompt, without a barrier between prompts.

What a prompt cannot spend on prefixes (it has none, or caps bind) it spends on further root rollouts, up to the allocator's
bound for a prompt, so that methods are compared at equal cost; the rest stays unspent. The ledger counts both.

Order: continuations before root rollouts, so that trees are completed early and their states can be dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocation.allocators import Allocator
from allocation.tree import Forest, Node, Origin, Tree


@dataclass(frozen=True, slots=True)
class Job:
    """One rollout: from `node` of `tree` to a terminal."""

    tree: Tree
    node: Node
    origin: Origin
    rollout: int


class Scheduler:
    """Turns an allocation into jobs.

    Args:
        allocator: Decides how the budget of continuations of a prompt is spent over its prefixes.
        forest: Holds the trees, one for each prompt that was given root rollouts.
        root_counts: Root rollouts for each tree of the forest, at least one each.
        continuations: Continuations to spend on all trees together.
        rng: Generator for the fractional part of continuation budgets; seeds those that break ties among prefixes.
    """

    def __init__(
        self,
        allocator: Allocator,
        forest: Forest,
        root_counts: Sequence[int],
        continuations: int,
        rng: np.random.Generator,
    ):
        if len(root_counts) != len(forest.trees):
            raise ValueError(f"{len(forest.trees)} trees but {len(root_counts)} root counts")
        self._allocator = allocator
        self._roots: deque[Job] = deque()
        self._continuations: deque[Job] = deque()
        self._pending = 0
        # Root rollouts of each tree, and rollouts of any origin, that are queued or running.
        self._open_roots = {tree.index: int(m) for tree, m in zip(forest.trees, root_counts, strict=True)}
        self._open = dict(self._open_roots)
        self._ledger = forest.ledger
        self._prefix_budgets = [int(k) for k in allocator.prefix_budgets(np.asarray(root_counts), continuations, rng)]
        # A generator for each tree: what is planned must not depend on which prompt is finished first.
        self._entropy = int(rng.integers(2**63 - 1))
        for tree, count in zip(forest.trees, root_counts, strict=True):
            for _ in range(int(count)):
                self._roots.append(self._job(tree, tree.root, "root"))

    @staticmethod
    def _job(tree: Tree, node: Node, origin: Origin) -> Job:
        job = Job(tree, node, origin, tree.num_rollouts)
        tree.num_rollouts += 1
        return job

    def will_branch(self, tree: Tree) -> bool:
        """Returns whether the anchors of a tree are still to be chosen, from the nodes that it has by then."""
        return bool(self._prefix_budgets[tree.index])

    def next(self) -> Job | None:
        """Returns the next job, or `None` if there is none now (more may come when running jobs finish)."""
        queue = self._continuations or self._roots
        if not queue:
            return None
        self._pending += 1
        return queue.popleft()

    def finished(self, job: Job) -> None:
        """Reports that a job's rollout has reached a terminal."""
        tree = job.tree
        self._pending -= 1
        self._open[tree.index] -= 1
        if job.origin == "root":
            self._open_roots[tree.index] -= 1
            if not self._open_roots[tree.index]:
                self._plan_prefixes(tree)
        tree.finished = not self._open[tree.index]

    def _plan_prefixes(self, tree: Tree) -> None:
        budget = self._prefix_budgets[tree.index]
        if not budget:
            return
        self._prefix_budgets[tree.index] = 0
        self._open[tree.index] += budget
        rng = np.random.default_rng([self._entropy, tree.index])
        for node_id, count in self._allocator.allocate_prefixes(tree, budget, rng):
            budget -= count
            self._continuations.extend(self._job(tree, tree.nodes[node_id], "continuation") for _ in range(count))
        most = self._allocator.max_rollouts(tree)
        leftover = budget if most is None else min(budget, max(most - len(tree.leaves("root")), 0))
        self._open_roots[tree.index] = leftover
        self._roots.extend(self._job(tree, tree.root, "root") for _ in range(leftover))
        self._ledger.leftover_roots += leftover
        self._ledger.unspent += budget - leftover
        self._open[tree.index] -= budget - leftover

    @property
    def done(self) -> bool:
        """Whether all work is finished."""
        return not (self._pending or self._roots or self._continuations)
