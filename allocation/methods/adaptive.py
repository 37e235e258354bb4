"""Methods that decide in view of this batch's own outcomes: DAPO's dynamic sampling and Reinforce-Ada.

Invariant: prompts are drawn uniformly, without a predictor and without a memory of earlier batches; outcomes only say when to
stop, and what enters the loss. The budget is a hard cap: what is sampled and then left out has been paid for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocation.methods.base import Allocator, dealt, grouped
from allocation.roots import IntArray
from allocation.settings import check_numbers, check_whole
from allocation.tree import Tree

VARIANTS = ("balanced", "positive")


class DAPOAllocator(Allocator):
    """`dapo` (DAPO, arXiv 2503.14476, dynamic sampling): groups whose outcomes are all alike are filtered out and replaced.

    A wave samples whole groups at uniformly drawn new prompts, as many as mixed groups are still lacking, until the batch has
    as many mixed groups as it should or the budget is spent. Mixed means both successes and failures. Groups that are not
    mixed get no weight in the loss and do not count in its means (`Ledger.filtered_prompts`). Each prompt gets its group or
    nothing, so nobody's number of rollouts depends on its own outcomes.

    Differences: the published method samples until the batch is full, whatever that costs; here the budget is a cap and the
    size of the batch is what comes of it. With `target_share=1`, the default, every group that the budget can pay is asked
    for at once, so the whole budget is spent in one wave: at equal cost dynamic sampling is then GRPO's sampling with a
    loss that averages over the mixed groups alone, that is, a longer step where few groups are mixed. With a smaller target
    it may stop early, which `Ledger.unspent` shows. A wave draws what is lacking instead of a whole generation batch, so
    nothing is sampled beyond the target and then cut off. Filtering goes by the environment's verdict, not by shaped
    rewards. The other parts of DAPO (clip, token-level loss, overlong rewards) are settings of the learner.

    Args:
        group_size: Rollouts of a prompt; larger where there are too few prompts for the budget.
        target_share: Share of the budget's groups that must be mixed for sampling to stop, in (0, 1].

    Raises:
        ValueError: A number is out of range.
    """

    name = "dapo"

    def __init__(self, group_size: int = 8, target_share: float = 1.0):
        _check_group_size(group_size)
        check_numbers(target_share=target_share)
        if not 0 < target_share <= 1:
            raise ValueError(f"target_share must lie in (0, 1], got {target_share}")
        self.group_size = group_size
        self.target_share = target_share

    def pool_size(self, budget: int) -> int:
        """As many prompts as groups fit into the budget: enough for all refills."""
        return max(1, budget // self.group_size)

    def allocate_roots(
        self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator, wave: int = 0
    ) -> IntArray:
        """As many new groups as mixed ones are lacking."""
        counts = np.zeros(len(candidates), dtype=np.int64)
        spent = sum(tree.num_rollouts for tree in candidates)
        groups = min(len(candidates), self.pool_size(budget + spent))
        fresh = np.array([i for i, tree in enumerate(candidates) if not tree.num_rollouts], dtype=np.int64)
        opened = len(candidates) - len(fresh)
        lacking = int(np.ceil(self.target_share * groups - 1e-9)) - sum(_mixed(tree) for tree in candidates)
        now = min(lacking, groups - opened)
        if now > 0:
            # Groups are as even as the whole budget allows, in whatever waves it is spent.
            due = (budget + spent) * (opened + now) // groups - spent
            counts[rng.permutation(fresh)[:now]] = dealt(now, due, rng)
        return counts

    def loss_weights(self, trees: Sequence[Tree]) -> np.ndarray:
        """1 for mixed groups, 0 for all others."""
        return np.array([float(_mixed(tree)) for tree in trees])


class ReinforceAdaAllocator(Allocator):
    """`reinforce_ada` (Reinforce-Ada, arXiv 2510.04996): a prompt is sampled in rounds until it has shown enough.

    Each round samples a few rollouts at every active prompt. A prompt leaves when it has enough successes (`positive`) or
    enough of both outcomes (`balanced`, the paper's recommendation), or after `max_rounds`. Its number of rollouts therefore
    depends on its own outcomes, which biases averages over them; the ledger counts these prompts (`outcome_stops`).

    Differences: the published method takes a batch of prompts and pays whatever the rounds cost; here the budget is given. It
    starts with as many prompts as `grpo` would sample, and when all of them have left it starts again with new ones, so that
    the budget is spent; if it ends within a round, prompts drawn at random have it. What is left when the pool is used up,
    too, is `Ledger.unspent`. The published method then draws a group of fixed size from a prompt's samples, half successes
    and half failures where possible, and takes the mean over all samples as baseline; here all samples enter the loss, with
    the estimator's baseline over all of them.

    Args:
        group_size: Rollouts of a prompt on average, as far as the number of prompts at the start goes.
        variant: When a prompt has shown enough: `balanced` or `positive`.
        enough: Successes, and for `balanced` also failures, that are enough.
        per_round: Rollouts of a prompt in a round; if it is left out, half a group, so that four rounds, as in the released
            code, are two groups.
        max_rounds: Rounds after which a prompt leaves in any case.

    Raises:
        ValueError: A number is out of range or the variant is unknown.
    """

    name = "reinforce_ada"
    stops_on_outcomes = True

    def __init__(
        self,
        group_size: int = 8,
        variant: str = "balanced",
        enough: int = 2,
        per_round: int | None = None,
        max_rounds: int = 4,
    ):
        _check_group_size(group_size)
        per_round = max(1, group_size // 2) if per_round is None else per_round
        for name, number in (("enough", enough), ("per_round", per_round), ("max_rounds", max_rounds)):
            check_whole(**{name: number})
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
        self.group_size = group_size
        self.variant = variant
        self.enough = enough
        self.per_round = per_round
        self.max_rounds = max_rounds

    def pool_size(self, budget: int) -> int:
        """As many prompts as rounds fit into the budget: enough even if each leaves after its first."""
        return max(1, -(-budget // self.per_round))

    def root_capacity(self, candidates: int, budget: int) -> int:
        """What all rounds of all prompts add up to."""
        return min(budget, candidates * self.per_round * self.max_rounds)

    def allocate_roots(
        self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator, wave: int = 0
    ) -> IntArray:
        """One round: of the active prompts, or of new ones if none is active."""
        among = [i for i, tree in enumerate(candidates) if self._active(tree)]
        if not among:
            fresh = [i for i, tree in enumerate(candidates) if not tree.num_rollouts]
            among = rng.permutation(fresh)[: max(1, budget // self.group_size)].tolist()
        order = rng.permutation(np.array(among, dtype=np.int64))
        return grouped(len(candidates), self.per_round, min(budget, len(among) * self.per_round), order)

    def _active(self, tree: Tree) -> bool:
        successes, failures = tree.outcome_counts()
        shown = successes if self.variant == "positive" else min(successes, failures)
        return 0 < tree.num_rollouts < self.per_round * self.max_rounds and shown < self.enough


def _mixed(tree: Tree) -> bool:
    successes, failures = tree.outcome_counts()
    return successes > 0 and failures > 0


def _check_group_size(group_size: int) -> None:
    check_whole(group_size=group_size)
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
