"""What every allocator is: a few decisions, each with a default, so that a method states only what it does differently.

Invariant: an allocator never samples and never looks at text; it sees trees, their outcomes and a predictor. All that it
remembers from batch to batch is in `state_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from allocation.roots import IntArray
from allocation.settings import check_whole
from allocation.tree import Forest, Tree

LARGEST_POOL = 1_000_000
"""Candidates that a batch may ask for: each is opened in an environment, so many more is a mistake in a setting."""


class Allocator:
    """Decides where the sampling budget of a batch goes. Without further ado: evenly over the pool, nothing from prefixes.

    A batch goes like this. `pool_size` candidates are opened. `allocate_roots` spends the root budget, in one wave or in
    several: it is asked again when all rollouts of a wave are finished, with what is left, until nothing is left or it asks
    for nothing. From then on each prompt is on its own: as soon as its root rollouts are finished, `allocate_prefixes` spends
    its continuations, again in one wave or in several. `loss_weights` has the last word on what enters the loss. After the
    policy has learned, `update` is called.

    Attributes:
        name: By which it is known.
        stops_on_outcomes: Whether the number of rollouts of a prompt depends on outcomes of that same prompt in the same
            batch. The ledger then counts those prompts (`outcome_stops`), since averages over such a sample are biased.
        uses_entropy: Whether it goes by `Sample.entropy`; whoever makes the policy then asks the engine for it.
        fallbacks: How often it could not do as it should (a predictor failed) and allocated uniformly instead.
    """

    name = ""
    stops_on_outcomes = False
    uses_entropy = False
    fallbacks = 0

    def check(self, budget: int) -> None:
        """Refuses a budget that no batch could be planned with; called once, before anything is sampled.

        Args:
            budget: Rollouts of a batch, of either kind.

        Raises:
            ValueError: It is no whole number, too small, or asks for a pool that nobody can open; the message says what to
                change.
        """
        check_whole(budget=budget)
        if budget < 1:
            raise ValueError(f"budget must be at least 1 rollout, got {budget}")
        try:
            pool = self.pool_size(budget)
        except NotImplementedError:
            return  # it never opens candidates of its own: whoever runs it gives the prompts
        except OverflowError:
            pool = LARGEST_POOL + 1
        if pool > LARGEST_POOL:
            raise ValueError(
                f"a budget of {budget} rollouts makes {self.name or type(self).__name__!r} ask for more than {LARGEST_POOL} "
                "candidate prompts: lower pool_factor, where the method has one, or the budget"
            )

    def pool_size(self, budget: int) -> int:
        """Returns the number of candidate prompts that `allocate_roots` wants to choose from.

        Args:
            budget: Rollouts of the batch, of either kind.
        """
        raise NotImplementedError

    def root_budget(self, budget: int) -> int:
        """Returns how many of a batch's rollouts start at prompts; the rest are continuations."""
        return budget

    def root_capacity(self, candidates: int, budget: int) -> int:
        """Returns how much of a root budget a pool can take, at most `budget`.

        How many prompts there are is known batch by batch only, so what they cannot take is no error: it stays unspent, and the
        scheduler says so in the log.

        Args:
            candidates: Prompts in the pool, at least 1.
            budget: Root rollouts of the batch.
        """
        return budget

    def allocate_roots(
        self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator, wave: int = 0
    ) -> IntArray:
        """Returns further root rollouts for each candidate, int64 [n].

        They sum to `budget`, or to less where another wave is to follow; zeros end the root stage, and what is left of the
        budget stays unspent.

        Args:
            candidates: The pool; from the second wave on the candidates hold the rollouts of earlier waves.
            budget: Root rollouts that are left; in the first wave at most `root_capacity`.
            rng: Breaks ties.
            wave: Number of earlier waves of this batch.
        """
        return dealt(len(candidates), budget, rng)

    def prefix_budgets(self, root_counts: IntArray, total: int, rng: np.random.Generator) -> IntArray:
        """Returns the continuations that each prompt may spend, int64 [n], `total` together.

        In proportion to the prompt's root rollouts; fractions go to prompts at random.
        """
        order = rng.permutation(len(root_counts))
        ends = np.floor(np.cumsum(root_counts[order]) * (total / root_counts.sum()) + 1e-9).astype(np.int64)
        budgets = np.zeros(len(root_counts), dtype=np.int64)
        budgets[order] = np.diff(ends, prepend=0)
        return budgets

    def allocate_prefixes(
        self, tree: Tree, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """Returns (node id, continuations) for prefixes of a tree none of whose rollouts is under way.

        They sum to `budget`, or to less: then it is asked again when these are finished, with what is left. Nothing ends the
        stage, and what is left goes to further root rollouts, within `max_rollouts`.

        Args:
            tree: The prompt's tree. An anchor is a node of it at depth 1 or more that is no terminal.
            budget: Continuations that are left.
            rng: Breaks ties.
            wave: Number of earlier waves of continuations of this tree.
        """
        return []

    def max_rollouts(self, tree: Tree) -> int | None:
        """Returns the most root rollouts that a prompt may get, `None` for no limit."""
        return None

    def loss_weights(self, trees: Sequence[Tree]) -> np.ndarray:
        """Returns what each tree of a finished forest counts in the loss, float64 [n]; 1 is its even share, 0 leaves it out."""
        return np.ones(len(trees))

    def update(self, forest: Forest) -> dict[str, float]:
        """Learns from a finished batch; returns figures for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns arrays and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""


def dealt(count: int, budget: int, rng: np.random.Generator) -> IntArray:
    """Returns an even division of a budget, what does not go up evenly being dealt at random.

    Args:
        count: Among how many, at least 1.
        budget: What is divided.
        rng: Says who gets one more.

    Returns:
        int64 [count].
    """
    counts = np.full(count, budget // count, dtype=np.int64)
    counts[rng.permutation(count)[: budget % count]] += 1
    return counts


def grouped(candidates: int, size: int, budget: int, order: IntArray) -> IntArray:
    """Returns whole groups for the first prompts of an order, and a smaller last group for the rest of the budget.

    Args:
        candidates: Number of prompts.
        size: Rollouts of a group.
        budget: Rollouts to spend, at most `candidates * size`.
        order: Prompts in order of preference.

    Returns:
        int64 [candidates].
    """
    counts = np.zeros(candidates, dtype=np.int64)
    full, rest = divmod(budget, size)
    counts[order[:full]] = size
    if rest:
        counts[order[full]] = rest
    return counts
