"""TRACE: prompts first, then prefixes, by the predicted chance of contrast (arXiv 2606.11119).

Invariant: both stages spend their budgets by the value functions of `allocation.contrast` alone; what is random is the
exploration share and ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from allocation.beliefs import fit_rho
from allocation.contrast import FloatArray, RootValue, root_value
from allocation.entropies import entropy_rises
from allocation.methods.charges import Charges
from allocation.methods.gate import Gate
from allocation.methods.predicted import PredictedAllocator
from allocation.methods.trace_config import TraceConfig, TracePlusConfig
from allocation.predictor import Predictor
from allocation.prefixes import allocate_prefixes
from allocation.roots import IntArray, allocate_roots_exact, draw_prompts, explored_prompts, largest_budget
from allocation.tree import Forest, Node, Tree
from allocation.waves import EXACT_LIMIT, further_value

PRIOR_RHO = 0.1
"""Correlation of two outcomes of one prompt before any was seen."""

_NEVER = 1e-9
"""Beta parameter of an outcome that is not to be reckoned with."""


class TraceAllocator(PredictedAllocator):
    """`trace` (TRACE: Tree Rollout Allocation for Contrastive Exploration, arXiv 2606.11119).

    Root stage: over a pool of prompts, rollouts go where the predicted chance is greatest that a prompt's rollouts are mixed.
    Prefix stage: prompt by prompt, continuations go to the prefixes of these rollouts that are most likely to flip an
    outcome. One predictor serves both and is trained on bottom-up tree values.

    Differences: prompts are opened with whole bundles, since f is not concave; a tenth of the root budget explores; before the
    predictor is ready allocation is uniform; continuations without a prefix become root rollouts of the same prompt.

    Args:
        predictor: Estimates success at roots and prefixes.
        config: See `TraceConfig`.

    Raises:
        ValueError: The config is something else.
    """

    name = "trace"

    def __init__(self, predictor: Predictor, config: TraceConfig | None = None):
        if config is not None and not isinstance(config, TraceConfig):
            raise ValueError(f"config must be a TraceConfig(...), got {config!r}")
        self.config = config = config or TraceConfig()
        self.uses_entropy = config.prefix_mode == "entropy"
        self.stops_on_outcomes = config.root_waves > 1
        super().__init__(predictor, kappa=config.kappa, decay=config.decay, tree_outcomes=config.tree_outcomes)
        self.gate = None if config.gate is None else Gate(config.gate)
        self.charges = Charges(config, self._continuations_per_root)
        self.rho = PRIOR_RHO

    # Sizes.

    def check(self, budget: int) -> None:
        """Refuses a budget that is smaller than one group, too."""
        super().check(budget)
        if budget < self.config.m_min:
            raise ValueError(
                f"budget {budget} is smaller than one group of m_min={self.config.m_min}: raise the budget or lower m_min"
            )

    def pool_size(self, budget: int) -> int:
        """`pool_factor` times the number of prompts that the root budget can open."""
        return max(1, round(self.config.pool_factor * self.root_budget(budget) / self.config.m_min))

    def root_capacity(self, candidates: int, budget: int) -> int:
        """What groups of `m_min` to `m_max` rollouts can add up to."""
        return largest_budget(candidates, budget, self.config.m_min, self.config.m_max)

    def root_budget(self, budget: int) -> int:
        """Share 1 / (1 + N) of the budget, N continuations going with each root rollout; all of it while the gate is closed."""
        return min(budget, max(self.config.m_min, round(budget / (1 + self._continuations_per_root))))

    @property
    def _continuations_per_root(self) -> float:
        """N in the next batch: none where there is no prefix stage, or while the gate is closed."""
        closed = self.config.prefix_mode == "none" or (self.gate is not None and not self.gate.open)
        return 0.0 if closed else self.config.continuations

    def max_rollouts(self, tree: Tree) -> int | None:
        """The bound `m_max` of the root stage."""
        return self.charges.max_rollouts(tree, self.config.m_max)

    # The root stage.

    def allocate_roots(
        self, candidates: Sequence[Tree], budget: int, rng: np.random.Generator, wave: int = 0
    ) -> IntArray:
        """Root stage; every candidate is worth the same until the predictor is ready.

        Raises:
            ValueError: The budget is smaller than one group, or larger than `m_max` rollouts for every candidate.
        """
        config, n = self.config, len(candidates)
        if wave >= config.root_waves:
            return np.zeros(n, dtype=np.int64)  # a budget of tokens left rollouts over
        if not wave:
            self.charges.continuations = self._continuations_per_root  # what roots do not get, nobody would spend
        beliefs = self.root_beliefs(candidates)
        value = self._root_value(trusted=beliefs is not None)
        alpha, beta = beliefs or (np.ones(n), np.ones(n))
        # No prompt can have more than all of the budget, so a table need not say what more would be worth.
        m_max = max(config.m_min, min(config.m_max, sum(len(t.root.children) for t in candidates) + budget))
        table = value.table(alpha, beta, m_max)
        now = self._wave_budget(budget, wave, n)
        explore = min(1.0, config.explore * budget / now)  # its share of the whole, in the first wave
        choice = "best" if beliefs is None else config.root_choice  # without beliefs all are worth the same
        if wave:
            seen = np.array([tree.outcome_counts("root") for tree in candidates])
            opened = np.asarray(seen.any(axis=1))
            if choice == "proportional":
                table = draw_prompts(table, opened, int(opened.sum()) + now // config.m_min, config.m_min, rng)
            table[opened] = further_value(value, alpha[opened], beta[opened], seen[opened, 0], seen[opened, 1], m_max)
            return self.charges.spend_more(
                candidates, table, seen.sum(axis=1), now, m_min=config.m_min, m_max=m_max, rng=rng,
                share=1 / (config.root_waves - wave),
            )  # fmt: skip
        if config.solver == "exact" and n * now * (m_max - config.m_min + 2) <= EXACT_LIMIT:
            return self._exact_roots(candidates, table, now, explore, choice, rng)
        return self.charges.spend_roots(
            candidates, table, now, m_min=config.m_min, m_max=m_max, explore=explore, choice=choice,
            last_sampled=self.beliefs.last_sampled([t.key for t in candidates]), rng=rng, share=1 / config.root_waves,
        )  # fmt: skip

    def _root_value(self, trusted: bool) -> RootValue:
        name = self.config.root_value if trusted else "uniform"
        return root_value(name, rho=self.rho) if name == "beta_binomial" else root_value(name)

    def _wave_budget(self, budget: int, wave: int, candidates: int) -> int:
        """Returns an even share of what is left, but at least one group, and never a rest too small for one."""
        config, waves = self.config, self.config.root_waves - wave
        if waves == 1:
            return budget
        now = max(config.m_min, round(budget / waves))
        now = budget if budget - now < config.m_min else now
        return now if wave else largest_budget(candidates, now, config.m_min, config.m_max)

    def _exact_roots(
        self,
        candidates: Sequence[Tree],
        table: FloatArray,
        budget: int,
        explore: float,
        choice: str,
        rng: np.random.Generator,
    ) -> IntArray:
        config, cost = self.config, self.charges.root_costs(candidates)
        table = table if cost is None else table / cost[:, None]
        explored, _ = explored_prompts(len(table), budget, config.m_min, explore, rng)
        if choice == "proportional":
            table = draw_prompts(table, explored, budget // config.m_min, config.m_min, rng)
        order = rng.permutation(len(table))  # the program gives ties to earlier rows
        counts = np.zeros(len(table), dtype=np.int64)
        counts[order] = allocate_roots_exact(
            table[order], budget, m_min=config.m_min, m_max=table.shape[1] - 1, opened=explored[order]
        )
        return counts

    # The prefix stage.

    def allocate_prefixes(
        self, tree: Tree, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """Prefix stage of one prompt."""
        config = self.config
        inner = [
            n
            for n in tree.nodes
            if n.depth > 0 and not n.terminal and n.origin == "root" and n.children and not tree.full(n)
        ]
        if config.prefix_mode == "none" or wave >= config.prefix_waves or not inner or not self._in_band(tree):
            return []
        inner.sort(key=lambda n: (n.rollout, n.depth))  # ties must not depend on which rollout came first to its turn
        found = self.predict_with_kappa([tree] * len(inner), inner)
        outcome = {n.rollout: float(bool(n.is_correct)) for n in tree.leaves("root")}
        results = np.array([outcome[n.rollout] for n in inner])
        mean, kappa = (np.full(len(inner), 0.5), np.ones(len(inner))) if found is None else found
        mean = np.clip(mean, 1e-3, 1 - 1e-3)
        # The rollout that passed through a prefix is itself one observation of its value. Only `flip`, which looks at that
        # outcome anyway, may count it: the other modes would no longer be exogenous. Continuations of earlier waves are
        # observations too, but then a wave that looks at them is not exogenous in any mode.
        flips = config.prefix_mode == "flip"
        own = float(flips and config.prefix_belief == "posterior")
        below = _continuations_below(tree, inner)
        alpha = kappa * mean + own * results + below[:, 0]
        beta = kappa * (1 - mean) + own * (1 - results) + below[:, 1]
        if flips:
            # Where a continuation has ended otherwise already there is nothing left to flip: as if r were certain.
            flipped = np.where(results > 0, below[:, 1], below[:, 0]) > 0
            alpha = np.where(flipped, np.maximum(results, _NEVER), alpha)
            beta = np.where(flipped, np.maximum(1 - results, _NEVER), beta)
        cost = self.charges.prefix_costs(tree, inner)
        counts = allocate_prefixes(
            alpha,
            beta,
            results,
            np.array([n.rollout for n in inner]),
            -(-budget // (config.prefix_waves - wave)),
            mode="random" if found is None and not self.uses_entropy else config.prefix_mode,
            belief=config.prefix_belief,
            cap_per_rollout=config.cap_per_rollout,
            spent=[sum(tree.nodes[c].origin == "continuation" for c in n.children) for n in inner],
            cost=cost,
            tokens=self.charges.tokens_left(tree),
            score=entropy_rises(tree, inner) if self.uses_entropy else None,
            rng=rng,
        )
        if cost is not None:
            self.charges.spend(tree, float(cost @ counts))
        return [(n.id, int(k)) for n, k in zip(inner, counts, strict=True) if k]

    def _in_band(self, tree: Tree) -> bool:
        band, value = self.config.band, tree.root.predicted
        return band is None or value is None or not self._trusted() or band[0] <= value <= band[1]

    def _trusted(self) -> bool:
        """Returns whether the predictor says that it is ready; one that cannot even say so is not."""
        try:
            return bool(self.predictor.ready)
        except Exception:  # which `predict` has logged
            return False

    # Learning.

    def loss_weights(self, trees: Sequence[Tree]) -> np.ndarray:
        """What `reweight` makes of the chances that the prompts were chosen with."""
        return self.charges.loss_weights(trees)

    def update(self, forest: Forest) -> dict[str, float]:
        """Also learns what rollouts cost, how alike a prompt's outcomes are, and whether continuations pay."""
        before = self.update_stages(forest)
        return before | super().update(forest)

    def update_stages(self, forest: Forest) -> dict[str, float]:
        """Learns all but the predictor and the beliefs, from the predictions that the batch was allocated by."""
        trusted = self._trusted()
        report = {} if self.gate is None else self.gate.update(forest, trusted=trusted)
        rows = [(t.root.predicted, *t.outcome_counts("root")) for t in forest if t.root.predicted is not None]
        rho = fit_rho(*np.array(rows, dtype=np.float64).T) if rows and trusted else None
        if rho is not None:
            self.rho = 0.8 * self.rho + 0.2 * rho
        return report | {"predictor/rho": self.rho} | self.charges.update(forest)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the predictor, the beliefs, the costs and the gate have learned."""
        gate = {} if self.gate is None else {"gate": self.gate.state_dict()}
        return super().state_dict() | self.charges.state_dict() | {"rho": self.rho} | gate

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self.charges.load_state_dict(state)
        self.rho = float(state["rho"])
        if self.gate is not None:
            self.gate.load_state_dict(state["gate"])


class TracePlusAllocator(TraceAllocator):
    """`trace_plus` (this project): TRACE's two stages, tuned for gradient signal per token, not for mixed groups.

    The same code as `trace` with other settings (`TracePlusConfig`): prompts drawn in proportion to the fall of the gradient's
    variance (`vip`) under beliefs that count earlier outcomes; a continuation for every other root rollout, from the
    prefixes of the most open value per expected token, whatever the rollout's own outcome.

    Source: docs/algorithm.md section 7; docs/methods.md says what each setting is worth in the arena.

    Args:
        predictor: As of `trace`.
        config: A `TracePlusConfig`.

    Raises:
        ValueError: The config is a plain `TraceConfig`, whose defaults are the paper's.
    """

    name = "trace_plus"

    def __init__(self, predictor: Predictor, config: TraceConfig | None = None):
        if config is not None and not isinstance(config, TracePlusConfig):
            raise ValueError(
                f"trace_plus has settings of its own: pass config=TracePlusConfig(...), got {type(config).__name__}"
            )
        super().__init__(predictor, config or TracePlusConfig())


def _continuations_below(tree: Tree, nodes: Sequence[Node]) -> FloatArray:
    """Returns successes and failures of the continuations that pass through prefixes of root rollouts, float64 [n, 2]."""
    seen = np.zeros((len(tree.nodes), 2))
    for leaf in tree.leaves("continuation"):
        for node in tree.path(leaf):
            seen[node.id, 0 if leaf.is_correct else 1] += 1
    # Those that began further up do not pass through these prefixes, so every one counted began at the prefix or below.
    return seen[[n.id for n in nodes]]
