"""What a method of two stages is charged for its anchors, and what its trees count: costs, token budgets, reweighting.

Invariant: without `cost_aware`, `token_budget`, `reweight` and `weighting` every answer is that of
`allocation.roots.allocate_roots` alone; expected tokens are spent within the budget of tokens whenever it holds one group.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from allocation.contrast import FloatArray
from allocation.costs import CostModel
from allocation.inclusion import REWEIGHTS, inclusion_probabilities, inclusion_weights, weight_report
from allocation.roots import IntArray, RootPlan, plan_roots
from allocation.settings import check_flags, check_numbers, check_whole
from allocation.token_budget import plan_token_roots
from allocation.tree import Forest, Node, Tree
from allocation.waves import allocate_more

logger = logging.getLogger(__name__)

WEIGHTINGS = ("even", "precision")


@dataclass(frozen=True)
class ChargeConfig:
    """Which charges there are; the fields of `TraceConfig` of the same names.

    Attributes:
        cost_aware: Divide the gains of both stages by the expected tokens of a rollout. The budget still counts rollouts, so
            this is a heuristic; under a budget of tokens gain per token is the greedy rule, whatever this says.
        cost_aware_roots: Whether `cost_aware` holds at roots, too. Where long tasks are the hard ones, gain per token prefers
            easy prompts that hardly have any to prompts that are worth learning from; prefixes of one prompt have no such bias.
        token_budget: Expected generated tokens of a batch, roots and continuations together; `None` for no limit. The budget
            of rollouts holds as well, so set it above what the tokens buy. The first batch, before which no costs are known,
            is limited by rollouts alone.
        reweight: Correction of the loss for the choice of prompts: `none`, `clipped` or `ips`.
        reweight_clip: Largest weight of a tree under `clipped`, before the weights are divided by their mean.
        inclusion_draws: Plans drawn to estimate how likely each prompt was to be chosen.
        weighting: What a prompt counts in the loss beside that: `even`, or `precision` for the reciprocal of the expected
            tokens of a rollout. Scores of tokens add up, so the noise of a prompt's gradient grows with its tokens, and a mean
            of estimates is best with weights that fall with their noise. That shifts the objective towards short tasks.

    Raises:
        ValueError: A name is unknown or a number out of range.
    """

    cost_aware: bool = False
    cost_aware_roots: bool = True
    token_budget: float | None = None
    reweight: str = "none"
    reweight_clip: float = 5.0
    inclusion_draws: int = 64
    weighting: str = "even"

    def __post_init__(self) -> None:
        check_flags(cost_aware=self.cost_aware, cost_aware_roots=self.cost_aware_roots)
        check_numbers(reweight_clip=self.reweight_clip)
        check_whole(inclusion_draws=self.inclusion_draws)
        if self.token_budget is not None:
            check_numbers(token_budget=self.token_budget)
        if self.token_budget is not None and not 0 < self.token_budget < float("inf"):
            raise ValueError(f"token_budget must be None or a positive number of tokens, got {self.token_budget}")
        if self.reweight not in REWEIGHTS:
            raise ValueError(f"unknown reweight {self.reweight!r}; known: {', '.join(REWEIGHTS)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {self.weighting!r}; known: {', '.join(WEIGHTINGS)}")
        if not self.reweight_clip > 0:
            raise ValueError(f"reweight_clip must be positive, got {self.reweight_clip}")
        if self.inclusion_draws < 1:
            raise ValueError(f"inclusion_draws must be at least 1, got {self.inclusion_draws}")


@dataclass(slots=True)
class _Bill:
    """A tree's expected tokens of one root rollout, and those that its continuations may still spend."""

    cost: float
    roots: int = 0
    left: float = 0.0


class Charges:
    """Keeps the costs of a batch and the weights of its trees.

    Args:
        config: See `ChargeConfig`.
        continuations: Under a budget of tokens, tokens for continuations for each token for root rollouts: the method's N.

    Attributes:
        costs: What rollouts cost.
    """

    def __init__(self, config: ChargeConfig, continuations: float):
        self.config = config
        self.continuations = continuations
        self.costs = CostModel()
        self._weights: dict[Tree, float] = {}
        self._bills: dict[Tree, _Bill] = {}
        self._root_tokens: float | None = None

    @property
    def _charging(self) -> bool:
        return self.config.cost_aware or self.config.token_budget is not None

    @property
    def _learning(self) -> bool:
        return self._charging or self.config.weighting != "even"

    def spend_roots(
        self,
        candidates: Sequence[Tree],
        table: FloatArray,
        budget: int,
        *,
        m_min: int,
        m_max: int,
        explore: float,
        choice: str = "best",
        last_sampled: npt.ArrayLike,
        rng: np.random.Generator,
        first: bool = True,
        share: float = 1.0,
    ) -> IntArray:
        """Spends the root stage of a batch, or a wave of it: `allocation.roots.allocate_roots` and what the settings add.

        Args:
            candidates: The pool.
            table: Values f_i(m), float [n, m_max + 1].
            budget: Root rollouts; under a budget of tokens there may be fewer.
            m_min: Smallest group.
            m_max: Largest group.
            explore: Share spread at random.
            choice: A name of `allocation.roots.CHOICES`.
            last_sampled: When each candidate was last sampled, number [n].
            rng: Draws exploration and ties, and then the plans that inclusion probabilities are estimated from.
            first: Whether a batch begins; loss weights are those of its first wave, so methods with more may not reweight.
            share: Share of the tokens left that this wave may spend.

        Returns:
            int64 [n].
        """
        config = self.config
        cost = self.root_costs(candidates)
        if first:
            self._bills, self._weights = {}, {}
            self._root_tokens = None if config.token_budget is None else config.token_budget / (1 + self.continuations)
        tokens = None
        if cost is not None and self._root_tokens is not None:
            least, tokens = m_min * float(cost.min()), share * self._root_tokens
            if tokens < least and not first:
                return np.zeros(len(candidates), dtype=np.int64)
            if tokens < least:
                logger.warning(
                    "%g tokens for root rollouts are fewer than one group takes, %g: spending those; raise token_budget or "
                    "lower m_min",
                    tokens,
                    least,
                )
                tokens = least

        def plan(rng: np.random.Generator) -> RootPlan:
            # Many plans are drawn to reweight, and all must be made as the one that is carried out: so without the core.
            if cost is not None and tokens is not None:
                return plan_token_roots(
                    table, tokens, budget, cost=cost, m_min=m_min, m_max=m_max, explore=explore,
                    choice=choice, last_sampled=last_sampled, core=config.reweight == "none", rng=rng,
                )  # fmt: skip
            return plan_roots(
                table, budget, m_min=m_min, m_max=m_max, explore=explore, choice=choice, last_sampled=last_sampled,
                rng=rng, cost=cost,
            )  # fmt: skip

        counts = plan(rng).counts
        self._charge(candidates, counts, cost)
        if first and config.reweight != "none":
            chance = inclusion_probabilities(plan, config.inclusion_draws, np.random.default_rng(rng.integers(2**63)))
            # What was drawn once is not impossible: a prompt that no other plan opened is given half a plan.
            chance = np.maximum(chance, 0.5 / config.inclusion_draws)
            weights = inclusion_weights(chance, counts > 0, reweight=config.reweight, clip=config.reweight_clip)
            self._weights = dict(zip(candidates, weights.tolist(), strict=True))
        return counts

    def spend_more(
        self,
        candidates: Sequence[Tree],
        table: FloatArray,
        counts: IntArray,
        budget: int,
        *,
        m_min: int,
        m_max: int,
        rng: np.random.Generator,
        share: float = 1.0,
    ) -> IntArray:
        """Spends a later wave of a batch's root stage: `allocation.waves.allocate_more` and what the settings add.

        Args:
            candidates: The pool.
            table: Worth of k further rollouts, float [n, m_max + 1].
            counts: Root rollouts so far, int [n].
            budget: Root rollouts; under a budget of tokens there may be fewer.
            m_min: Smallest group.
            m_max: Largest group, over all waves.
            rng: Breaks ties.
            share: Share of the tokens left that this wave may spend.

        Returns:
            int64 [n].
        """
        cost = self.root_costs(candidates)
        limited = cost is not None and self._root_tokens is not None
        more = allocate_more(
            table, counts, budget, m_min=m_min, m_max=m_max, rng=rng, cost=cost,
            tokens=max(0.0, share * self._root_tokens) if limited else None,  # type: ignore[operator]
        )  # fmt: skip
        self._charge(candidates, more, cost)
        return more

    def root_costs(self, candidates: Sequence[Tree]) -> FloatArray | None:
        """Returns the expected tokens of a root rollout of each candidate, float64 [n]; `None` if costs play no part."""
        config = self.config
        asked = config.token_budget is not None or (config.cost_aware and config.cost_aware_roots)
        return self.costs.predict(candidates, [t.root for t in candidates]) if asked and self.costs.ready else None

    def _charge(self, candidates: Sequence[Tree], counts: IntArray, cost: FloatArray | None) -> None:
        """Notes what root rollouts are expected to cost, and what continuations may therefore."""
        if cost is None or self._root_tokens is None:
            return
        self._root_tokens -= float(cost @ counts)
        for tree, m, c in zip(candidates, counts.tolist(), cost.tolist(), strict=True):
            bill = self._bills.setdefault(tree, _Bill(c))
            bill.roots += m
            bill.left += self.continuations * m * c

    def prefix_costs(self, tree: Tree, nodes: Sequence[Node]) -> FloatArray | None:
        """Returns the expected tokens of a continuation from each prefix, float64 [n]; `None` if costs play no part."""
        return self.costs.predict([tree] * len(nodes), nodes) if self._charging and self.costs.ready else None

    def tokens_left(self, tree: Tree) -> float | None:
        """Returns the expected tokens that a tree may still spend on continuations; `None` for no limit."""
        bill = self._bills.get(tree)
        return None if bill is None else max(bill.left, 0.0)  # sums of the same costs differ in the last bits

    def spend(self, tree: Tree, tokens: float) -> None:
        """Notes expected tokens that were spent on continuations of a tree."""
        if tree in self._bills:
            self._bills[tree].left -= tokens

    def max_rollouts(self, tree: Tree, most: int) -> int:
        """Returns the most root rollouts of a tree, given that without a budget of tokens it is `most`."""
        bill = self._bills.get(tree)
        return most if bill is None else min(most, bill.roots + int(max(bill.left, 0.0) / bill.cost + 1e-9))

    def loss_weights(self, trees: Sequence[Tree]) -> FloatArray:
        """Returns what each tree counts in the loss, float64 [n]."""
        weights = np.array([self._weights.get(tree, 1.0) for tree in trees])
        if self.config.weighting == "precision" and self.costs.ready:
            # Nothing that this batch has brought is in the costs yet: they are those that it was planned by.
            weights = weights / self.costs.predict(trees, [t.root for t in trees])
            weights = weights / weights.mean()
        return weights

    def update(self, forest: Forest) -> dict[str, float]:
        """Learns the costs of a finished batch, where they matter; returns figures for the log."""
        report = self.costs.update(forest) if self._learning else {}
        if self.config.reweight != "none":
            report |= weight_report(np.array([tree.loss_weight for tree in forest]))
        self._bills, self._weights, self._root_tokens = {}, {}, None  # of this batch alone, so no part of the state
        return report

    def state_dict(self) -> dict[str, Any]:
        """Returns what was learned."""
        return {"costs": self.costs.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.costs.load_state_dict(state["costs"])
