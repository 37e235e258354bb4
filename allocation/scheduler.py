"""The one core that says what a free slot does next; every driver uses it.

Invariant: each job handed out is finished exactly once, and what is planned depends on outcomes alone, never on the order in
which rollouts happen to finish.

The root stage is spent in waves, each planned when the one before is finished; most methods have one. With the last wave the
prompts part company: a prompt's prefix stage is planned at the moment when the last of its root rollouts is finished, without
a barrier between prompts, and again after each of its own waves of continuations.

What a prompt cannot spend on prefixes (it has none, or caps bind) it spends on further root rollouts, up to the allocator's
bound for a prompt, so that methods are compared at equal cost; the rest stays unspent. The ledger counts both.

Order: continuations before root rollouts, so that trees are completed early and their states can be dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocation.methods.base import Allocator
from allocation.tree import Forest, Node, Origin, Tree

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One rollout: from `node` of `tree` to a terminal."""

    tree: Tree
    node: Node
    origin: Origin
    rollout: int


@dataclass(slots=True)
class _Account:
    """What is still to come for one tree of the forest.

    Attributes:
        roots: Root rollouts that it was given.
        open: Its rollouts that are queued or running.
        continuations: Continuations that it may still spend.
        waves: Waves of continuations that were planned.
        phase: Plannings that gave it rollouts so far; see `Tree.phases`.
    """

    roots: int = 0
    open: int = 0
    continuations: int = 0
    waves: int = 0
    phase: int = 0


class Scheduler:
    """Turns the allocation of a batch into jobs.

    Args:
        allocator: Decides.
        forest: Gets a tree as soon as it is given rollouts.
        candidates: The pool of prompts.
        root_budget: Root rollouts to spend.
        continuations: Continuations to spend on all trees together.
        rng: Generator of the first wave of the root stage; seeds those of everything else.
    """

    def __init__(
        self,
        allocator: Allocator,
        forest: Forest,
        candidates: Sequence[Tree],
        root_budget: int,
        continuations: int,
        rng: np.random.Generator,
    ):
        if not candidates:
            raise ValueError("no candidate prompt to allocate to: the source of prompts gave none")
        self._allocator = allocator
        self._forest = forest
        self._ledger = forest.ledger
        self._candidates = list(candidates)
        self._root_budget = capacity = allocator.root_capacity(len(candidates), root_budget)
        if capacity < root_budget:
            self._ledger.unspent += root_budget - capacity
            logger.warning(
                "%s: %d candidates cannot take %d root rollouts, %d stay unspent; supply more prompts, lower the budget or "
                "let a prompt have more rollouts",
                allocator.name,
                len(candidates),
                root_budget,
                root_budget - capacity,
            )
        self._total_continuations = continuations
        self._fallbacks = allocator.fallbacks
        self._roots: deque[Job] = deque()
        self._continuations: deque[Job] = deque()
        self._accounts: list[_Account] = []
        self._pending = 0
        self._watched = 0  # trees counted in `outcome_stops`
        self._parted = False  # whether the last wave of the root stage is planned
        self._plan_roots(rng)
        # What is planned later must not depend on which rollout is finished first, so it has generators of its own.
        self._entropy = int(rng.integers(2**63 - 1))
        if self._parted:
            self._part(rng)
        if not self._accounts:
            raise ValueError(
                f"allocator {allocator.name!r} gave no rollouts to any of {len(candidates)} candidates "
                f"with a root budget of {root_budget}"
            )

    def will_branch(self, tree: Tree) -> bool:
        """Returns whether anchors of a tree are still to be chosen, from the nodes that it has by then."""
        return bool(self._accounts[tree.index].continuations if self._parted else self._total_continuations)

    def next(self) -> Job | None:
        """Returns the next job, or `None` if there is none now (more may come when running jobs finish)."""
        queue = self._continuations or self._roots
        if not queue:
            return None
        self._pending += 1
        return queue.popleft()

    def finished(self, job: Job) -> list[Tree]:
        """Reports that a job's rollout has reached a terminal; returns the trees that nothing will be added to any more."""
        self._pending -= 1
        self._accounts[job.tree.index].open -= 1
        if self._parted:
            over = self._advance([job.tree])
        elif self._pending or self._roots:
            over = []
        else:
            rng = np.random.default_rng([self._entropy, 1, self._ledger.root_waves])
            sampled = len(self._accounts)
            self._plan_roots(rng)
            if self._allocator.stops_on_outcomes:
                # Their numbers of rollouts were settled, one way or the other, with their outcomes in view.
                self._ledger.outcome_stops += sampled - self._watched
                self._watched = sampled
            over = []
            if self._parted:
                self._part(rng)
                over = self._advance(self._forest.trees)
        if self.done:
            self._close()
        return over

    @property
    def done(self) -> bool:
        """Whether all work is finished."""
        return self._parted and not (self._pending or self._roots or self._continuations)

    # The root stage.

    def _plan_roots(self, rng: np.random.Generator) -> None:
        ledger, left = self._ledger, self._root_budget
        counts = np.asarray(self._allocator.allocate_roots(self._candidates, left, rng, ledger.root_waves))
        whole = np.issubdtype(counts.dtype, np.integer)
        spent = int(counts.sum()) if whole else 0
        if not whole or counts.shape != (len(self._candidates),) or (counts < 0).any() or spent > left:
            raise ValueError(
                f"allocator {self._allocator.name!r} must give each of {len(self._candidates)} candidates 0 or more of "
                f"{left} root rollouts, got {counts.tolist()}"
            )
        for tree, count in zip(self._candidates, counts.tolist(), strict=True):
            if not count:
                continue
            if tree.index < 0:
                tree.index = len(self._forest.trees)
                self._forest.trees.append(tree)
                self._accounts.append(_Account())
            self._accounts[tree.index].roots += count
            self._add_roots(tree, count)
        self._root_budget -= spent
        if spent:
            ledger.root_waves += 1
        if not spent or not self._root_budget:
            self._parted = True
            ledger.unspent += self._root_budget

    def _part(self, rng: np.random.Generator) -> None:
        """Settles what each prompt may spend on continuations."""
        if not self._accounts:
            return
        roots = np.array([account.roots for account in self._accounts])
        budgets = np.asarray(self._allocator.prefix_budgets(roots, self._total_continuations, rng))
        whole = np.issubdtype(budgets.dtype, np.integer)
        if (
            not whole
            or budgets.shape != roots.shape
            or (budgets < 0).any()
            or budgets.sum() > self._total_continuations
        ):
            raise ValueError(
                f"allocator {self._allocator.name!r} must give each of {len(roots)} trees 0 or more of "
                f"{self._total_continuations} continuations, got {budgets.tolist()}"
            )
        self._ledger.unspent += self._total_continuations - int(budgets.sum())
        for account, budget in zip(self._accounts, budgets, strict=True):
            account.continuations = int(budget)

    # Prompt by prompt.

    def _advance(self, trees: Sequence[Tree]) -> list[Tree]:
        """Plans what comes next for trees none of whose rollouts is under way; returns those for which nothing does."""
        over = []
        for tree in trees:
            account = self._accounts[tree.index]
            if not account.open and account.continuations:
                self._plan_prefixes(tree, account)
            if not account.open:
                tree.finished = True
                over.append(tree)
        return over

    def _plan_prefixes(self, tree: Tree, account: _Account) -> None:
        budget = account.continuations
        rng = np.random.default_rng([self._entropy, 0, tree.index, account.waves])
        planned = self._allocator.allocate_prefixes(tree, budget, rng, account.waves)
        spent = sum(count for _, count in planned)
        nodes = tree.nodes
        bad = [i for i, count in planned if count < 0 or not 0 < i < len(nodes) or nodes[i].terminal]
        if bad or spent > budget:
            raise ValueError(
                f"allocator {self._allocator.name!r} must spend at most {budget} continuations of tree {tree.key!r} on inner "
                f"prefixes, got (node, continuations) {planned}"
            )
        account.continuations -= spent
        account.waves += 1
        for i, count in planned:
            self._continuations.extend(
                self._job(tree, tree.nodes[i], "continuation", account.phase) for _ in range(count)
            )
        account.open += spent
        if spent:
            account.phase += 1
            self._ledger.prefix_waves = max(self._ledger.prefix_waves, account.waves)
            return
        most = self._allocator.max_rollouts(tree)
        leftover = budget if most is None else min(budget, max(most - account.roots, 0))
        account.continuations = 0
        self._add_roots(tree, leftover)
        self._ledger.leftover_roots += leftover
        self._ledger.unspent += budget - leftover

    def _add_roots(self, tree: Tree, count: int) -> None:
        account = self._accounts[tree.index]
        self._roots.extend(self._job(tree, tree.root, "root", account.phase) for _ in range(count))
        account.open += count
        account.phase += count > 0

    @staticmethod
    def _job(tree: Tree, node: Node, origin: Origin, phase: int) -> Job:
        return Job(tree, node, origin, tree.plan(phase))

    def _close(self) -> None:
        """Settles what enters the loss."""
        trees = self._forest.trees
        weights = np.asarray(self._allocator.loss_weights(trees), dtype=np.float64)
        if weights.shape != (len(trees),) or not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(
                f"allocator {self._allocator.name!r} must give each of {len(trees)} trees a finite loss weight of 0 or more, "
                f"got {weights.tolist()}"
            )
        for tree, weight in zip(trees, weights.tolist(), strict=True):
            tree.loss_weight = weight
        self._ledger.filtered_prompts += int((weights == 0).sum())
        self._ledger.fallbacks += self._allocator.fallbacks - self._fallbacks
