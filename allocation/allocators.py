"""Allocators: how many rollouts each prompt and each prefix gets. Every method is a composition of the same parts.

Invariant: an allocator never samples and never looks at text; it sees trees, their outcomes and a predictor.

`grpo` samples a fixed group at every prompt. `trace` spends the budget in two stages (TRACE, arXiv 2606.11119;
docs/algorithm.md sections 1 and 2): over a pool of prompts by the chance that their root rollouts will be mixed, then,
prompt by prompt, over the prefixes of those rollouts by the chance that a continuation flips the outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from allocation.beliefs import KAPPA_BOUNDS, BetaBeliefs, fit_kappa
from allocation.contrast import BELIEFS, ROOT_VALUES
from allocation.predictor import HiddenStatePredictor, MeanPredictor, Predictor, anchor_of, fit_report, training_set
from allocation.prefixes import PREFIX_MODES, allocate_prefixes
from allocation.roots import allocate_roots
from allocation.tree import Forest, Tree

logger = logging.getLogger(__name__)


class Allocator(Protocol):
    """Decides where the sampling budget of a batch goes."""

    name: str

    def pool_size(self, budget: int) -> int:
        """Returns the number of candidate prompts that `allocate_roots` wants to choose from."""
        ...

    def root_budget(self, budget: int) -> int:
        """Returns how many of a batch's rollouts start at prompts."""
        ...

    def allocate_roots(self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the root rollouts of each candidate, int64 [n], with sum `budget`."""
        ...

    def prefix_budgets(self, root_counts: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the continuations that each prompt may spend, int64 [n], `total` together."""
        ...

    def allocate_prefixes(self, tree: Tree, budget: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Returns (node id, continuations) for the prefixes of a tree whose root rollouts are finished.

        It is asked once for each tree with a budget of continuations, before any of them begins. So an anchor is always a
        node of a root rollout; drivers rely on it, and take snapshots nowhere else (`Collection.wanted`).
        """
        ...

    def max_rollouts(self, tree: Tree) -> int | None:
        """Returns the most root rollouts that a prompt may get, `None` for no limit."""
        ...

    def update(self, forest: Forest) -> dict[str, float]:
        """Learns from a finished batch; returns figures for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns arrays and plain data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        ...


class UniformAllocator:
    """GRPO's sampling (Shao et al., 2024): the same group of rollouts for every prompt, none from prefixes.

    Args:
        group_size: Rollouts for each prompt.
    """

    name = "grpo"

    def __init__(self, group_size: int = 8):
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.group_size = group_size

    def pool_size(self, budget: int) -> int:
        """As many prompts as groups fit into the budget."""
        return max(1, budget // self.group_size)

    def root_budget(self, budget: int) -> int:
        """All of it."""
        return budget

    def allocate_roots(self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator) -> np.ndarray:
        """Divides the budget evenly; a remainder goes to random prompts."""
        counts = np.full(len(candidates), budget // len(candidates), dtype=np.int64)
        counts[rng.permutation(len(candidates))[: budget - counts.sum()]] += 1
        return counts

    def prefix_budgets(self, root_counts: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
        """No continuations."""
        return np.zeros(len(root_counts), dtype=np.int64)

    def allocate_prefixes(self, tree: Tree, budget: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """No continuations."""
        return []

    def max_rollouts(self, tree: Tree) -> int | None:
        """No limit."""
        return None

    def update(self, forest: Forest) -> dict[str, float]:
        """Learns nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


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


class TraceAllocator:
    """TRACE: prompts first, then prefixes, by the predicted chance of contrast.

    Args:
        predictor: Estimates success at roots and prefixes.
        config: See `TraceConfig`.
    """

    name = "trace"

    def __init__(self, predictor: Predictor, config: TraceConfig | None = None):
        self.config = config = config or TraceConfig()
        self.predictor = predictor
        self.beliefs = BetaBeliefs(decay=config.decay)
        self.base = MeanPredictor()
        self.kappa = 4.0 if config.kappa is None else config.kappa

    def pool_size(self, budget: int) -> int:
        """`pool_factor` times the number of prompts that the root budget can open."""
        return max(1, round(self.config.pool_factor * self.root_budget(budget) / self.config.m_min))

    def root_budget(self, budget: int) -> int:
        """Share 1 / (1 + N) of the budget, N continuations going with each root rollout."""
        if self.config.prefix_mode == "none":
            return budget
        return min(budget, max(self.config.m_min, round(budget / (1 + self.config.continuations))))

    def _predict(self, tree: Tree, nodes: Sequence[int]) -> np.ndarray:
        counts = self.beliefs.counts(tree.key)
        return self.predictor.predict([anchor_of(tree, tree.nodes[i], counts) for i in nodes])

    def allocate_roots(self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator) -> np.ndarray:
        """Root stage; every candidate is worth the same until the predictor is ready.

        Raises:
            ValueError: The budget is smaller than one group, or larger than `m_max` rollouts for every candidate.
        """
        config = self.config
        anchors = [anchor_of(t, t.root, self.beliefs.counts(t.key)) for t in candidates]
        predicted = self.predictor.predict(anchors)
        for tree, v in zip(candidates, predicted, strict=True):
            tree.root.predicted = float(v)
        keys = [t.key for t in candidates]
        alpha, beta = self.beliefs.belief(keys, predicted, self.kappa)
        value = config.root_value if self.predictor.ready else "uniform"
        table = ROOT_VALUES[value].table(alpha, beta, config.m_max)
        return allocate_roots(
            table,
            budget,
            m_min=config.m_min,
            m_max=config.m_max,
            explore=config.explore,
            last_sampled=self.beliefs.last_sampled(keys),
            rng=rng,
        )

    def prefix_budgets(self, root_counts: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
        """N continuations for each root rollout; fractions go to prompts at random, the sum is kept."""
        order = rng.permutation(len(root_counts))
        ends = np.floor(np.cumsum(root_counts[order]) * (total / root_counts.sum()) + 1e-9).astype(np.int64)
        budgets = np.zeros(len(root_counts), dtype=np.int64)
        budgets[order] = np.diff(ends, prepend=0)
        return budgets

    def allocate_prefixes(self, tree: Tree, budget: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Prefix stage of one prompt."""
        config = self.config
        inner = [n for n in tree.nodes if n.depth > 0 and not n.terminal and n.origin == "root" and n.children]
        if not inner:
            return []
        inner.sort(key=lambda n: (n.rollout, n.depth))  # ties must not depend on which rollout came first to its turn
        ids = [n.id for n in inner]
        predicted = self._predict(tree, ids)
        for node, value in zip(inner, predicted, strict=True):
            node.predicted = float(value)
        outcome = {n.rollout: float(bool(n.is_correct)) for n in tree.leaves("root")}
        results = np.array([outcome[n.rollout] for n in inner])
        mean = np.clip(predicted, 1e-3, 1 - 1e-3)
        # The rollout that passed through a prefix is itself one observation of its value. Only `flip`, which looks at that
        # outcome anyway, may count it: the other modes would no longer be exogenous.
        seen = float(config.prefix_mode == "flip" and config.prefix_belief == "posterior")
        counts = allocate_prefixes(
            self.kappa * mean + seen * results,
            self.kappa * (1 - mean) + seen * (1 - results),
            results,
            np.array([n.rollout for n in inner]),
            budget,
            mode=config.prefix_mode if self.predictor.ready else "random",
            belief=config.prefix_belief,
            cap_per_rollout=config.cap_per_rollout,
            rng=rng,
        )
        return [(i, int(k)) for i, k in zip(ids, counts, strict=True) if k]

    def max_rollouts(self, tree: Tree) -> int | None:
        """The bound `m_max` of the root stage."""
        return self.config.m_max

    def update(self, forest: Forest) -> dict[str, float]:
        """Scores the predictor on the batch, trains it, and folds the root outcomes into the beliefs."""
        rows = training_set(forest)
        if not rows:
            return {}
        anchors = [anchor_of(tree, node, self.beliefs.counts(tree.key)) for tree, node, _, _ in rows]
        values = np.array([row[2] for row in rows])
        weights = np.array([row[3] for row in rows])
        report: dict[str, float] = {}
        if self.predictor.ready:
            predicted = self.predictor.predict(anchors)
            report |= fit_report(predicted, values, weights, float(self.base.predict(anchors[:1])[0]))
            if self.config.kappa is None:
                self._fit_kappa(rows, predicted, report["predictor/skill"])
        self.base.update(anchors, values, weights)
        report |= self.predictor.update(anchors, values, weights)
        for tree in forest:
            self.beliefs.update(tree.key, *tree.outcome_counts("root"))
        self.beliefs.decay()
        return report | {"predictor/kappa": self.kappa}

    def _fit_kappa(self, rows: Sequence[tuple[Tree, Any, float, float]], predicted: np.ndarray, skill: float) -> None:
        """Moves kappa towards the value under which the prompts' root outcomes were most likely.

        Predictions that do not beat the running mean lose half of their weight instead (docs/algorithm.md section 3).
        """
        if skill <= 0:
            self.kappa = max(KAPPA_BOUNDS[0], self.kappa * 0.5)
            return
        roots = [
            (p, *tree.outcome_counts("root"))
            for p, (tree, node, _, _) in zip(predicted, rows, strict=True)
            if node.depth == 0
        ]
        if not roots:
            return
        v, s, f = (np.array(column, dtype=float) for column in zip(*roots, strict=True))
        # One batch says little about a concentration, so the estimate moves slowly, on a log scale.
        self.kappa = float(np.exp(0.8 * np.log(self.kappa) + 0.2 * np.log(fit_kappa(v, s, f))))

    def state_dict(self) -> dict[str, Any]:
        """Returns the predictor, the beliefs and kappa."""
        return {
            "predictor": self.predictor.state_dict(),
            "beliefs": self.beliefs.state_dict(),
            "base": self.base.state_dict(),
            "kappa": self.kappa,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.predictor.load_state_dict(state["predictor"])
        self.beliefs.load_state_dict(state["beliefs"])
        self.base.load_state_dict(state["base"])
        self.kappa = float(state["kappa"])


ALLOCATORS = ("grpo", "trace")


def make_allocator(
    name: str, *, predictor: Predictor | None = None, group_size: int = 8, config: TraceConfig | None = None
) -> Allocator:
    """Returns an allocator by name.

    Args:
        name: One of `ALLOCATORS`.
        predictor: For methods that need one; the default knows counts alone, no hidden states.
        group_size: Of `grpo`.
        config: Of `trace`.

    Raises:
        ValueError: The name is unknown.
    """
    if name == "grpo":
        return UniformAllocator(group_size)
    if name == "trace":
        return TraceAllocator(predictor or HiddenStatePredictor(0), config)
    raise ValueError(f"unknown allocator {name!r}; known: {', '.join(ALLOCATORS)}")
