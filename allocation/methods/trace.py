"""TRACE: prompts first, then prefixes, by the predicted chance of contrast (arXiv 2606.11119).

Invariant: both stages spend their budgets by the value functions of `allocation.contrast` alone; what is random is the
exploration share and ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocation.contrast import BELIEFS, ROOT_VALUES
from allocation.methods.predicted import PredictedAllocator
from allocation.predictor import Predictor
from allocation.prefixes import PREFIX_MODES, allocate_prefixes
from allocation.roots import IntArray, allocate_roots
from allocation.tree import Tree


@dataclass(frozen=True)
class TraceConfig:
    """Settings of `TraceAllocator`; docs/algorithm.md says what each formula is.

    Attributes:
        pool_factor: Candidate prompts for each prompt that fits into the root budget at `m_min` rollouts.
        m_min: Fewest rollouts of a prompt that gets any.
        m_max: Most root rollouts of one prompt.
        explore: Share of the root budget that is spread over random candidates.
        root_value: Value function of the root stage: a name of `allocation.contrast.ROOT_VALUES`; the paper's is `plug_in`.
        continuations: Continuations for each root rollout, N; the paper's is 2.
        prefix_mode: `flip` (paper), `exact`, `random` or `none`.
        prefix_belief: `plug_in` (paper) or `posterior`.
        cap_per_rollout: Most continuations from the prefixes of one root rollout; `None` for no limit.
        kappa: Weight of the predictor in the Beta beliefs, in pseudo-rollouts; `None` fits it to calibration.
        decay: Factor on a prompt's counts at each policy update.

    Raises:
        ValueError: A name is unknown or a number out of range.
    """

    pool_factor: float = 4.0
    m_min: int = 4
    m_max: int = 16
    explore: float = 0.1
    root_value: str = "posterior"
    continuations: float = 0.5
    prefix_mode: str = "flip"
    prefix_belief: str = "posterior"
    cap_per_rollout: int | None = 4
    kappa: float | None = None
    decay: float = 0.7

    def __post_init__(self) -> None:
        for name, known in (
            ("root_value", sorted(ROOT_VALUES)),
            ("prefix_mode", PREFIX_MODES),
            ("prefix_belief", BELIEFS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if not 2 <= self.m_min <= self.m_max:
            raise ValueError(f"need 2 <= m_min <= m_max, got m_min={self.m_min}, m_max={self.m_max}")
        if self.pool_factor <= 0:
            raise ValueError(f"pool_factor must be positive, got {self.pool_factor}")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore must lie in [0, 1], got {self.explore}")
        if self.continuations < 0:
            raise ValueError(f"continuations must not be negative, got {self.continuations}")
        if self.cap_per_rollout is not None and self.cap_per_rollout < 0:
            raise ValueError(f"cap_per_rollout must be None or not negative, got {self.cap_per_rollout}")
        if self.kappa is not None and self.kappa <= 0:
            raise ValueError(f"kappa must be None or positive, got {self.kappa}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}")


class TraceAllocator(PredictedAllocator):
    """The two stages of TRACE.

    Args:
        predictor: Estimates success at roots and prefixes.
        config: See `TraceConfig`.
    """

    name = "trace"

    def __init__(self, predictor: Predictor, config: TraceConfig | None = None):
        self.config = config = config or TraceConfig()
        super().__init__(predictor, kappa=config.kappa, decay=config.decay)

    def pool_size(self, budget: int) -> int:
        """`pool_factor` times the number of prompts that the root budget can open."""
        return max(1, round(self.config.pool_factor * self.root_budget(budget) / self.config.m_min))

    def root_budget(self, budget: int) -> int:
        """Share 1 / (1 + N) of the budget, N continuations going with each root rollout."""
        if self.config.prefix_mode == "none":
            return budget
        return min(budget, max(self.config.m_min, round(budget / (1 + self.config.continuations))))

    def allocate_roots(
        self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator, wave: int = 0
    ) -> IntArray:
        """Root stage; every candidate is worth the same until the predictor is ready.

        Raises:
            ValueError: The budget is smaller than one group, or larger than `m_max` rollouts for every candidate.
        """
        config = self.config
        beliefs = self.root_beliefs(candidates)
        alpha, beta = (np.ones(len(candidates)), np.ones(len(candidates))) if beliefs is None else beliefs
        table = ROOT_VALUES["uniform" if beliefs is None else config.root_value].table(alpha, beta, config.m_max)
        return allocate_roots(
            table,
            budget,
            m_min=config.m_min,
            m_max=config.m_max,
            explore=config.explore,
            last_sampled=self.beliefs.last_sampled([t.key for t in candidates]),
            rng=rng,
        )

    def allocate_prefixes(
        self, tree: Tree, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """Prefix stage of one prompt."""
        config = self.config
        inner = [n for n in tree.nodes if n.depth > 0 and not n.terminal and n.origin == "root" and n.children]
        if wave or not inner:
            return []
        inner.sort(key=lambda n: (n.rollout, n.depth))  # ties must not depend on which rollout came first to its turn
        predicted = self.predict([tree] * len(inner), inner)
        outcome = {n.rollout: float(bool(n.is_correct)) for n in tree.leaves("root")}
        results = np.array([outcome[n.rollout] for n in inner])
        mean = np.full(len(inner), 0.5) if predicted is None else np.clip(predicted, 1e-3, 1 - 1e-3)
        # The rollout that passed through a prefix is itself one observation of its value. Only `flip`, which looks at that
        # outcome anyway, may count it: the other modes would no longer be exogenous.
        seen = float(config.prefix_mode == "flip" and config.prefix_belief == "posterior")
        counts = allocate_prefixes(
            self.kappa * mean + seen * results,
            self.kappa * (1 - mean) + seen * (1 - results),
            results,
            np.array([n.rollout for n in inner]),
            budget,
            mode="random" if predicted is None else config.prefix_mode,
            belief=config.prefix_belief,
            cap_per_rollout=config.cap_per_rollout,
            rng=rng,
        )
        return [(n.id, int(k)) for n, k in zip(inner, counts, strict=True) if k]

    def max_rollouts(self, tree: Tree) -> int | None:
        """The bound `m_max` of the root stage."""
        return self.config.m_max
