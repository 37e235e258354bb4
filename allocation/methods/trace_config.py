"""Settings of the methods that are made of TRACE's two stages.

Invariant: the defaults of `TraceConfig` are the paper's wherever the paper says anything; those of `TracePlusConfig` are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from allocation.contrast import BELIEFS, ROOT_VALUES
from allocation.methods.charges import ChargeConfig
from allocation.prefixes import PREFIX_MODES
from allocation.roots import CHOICES
from allocation.settings import check_flags, check_numbers, check_whole

SOLVERS = ("greedy", "exact")


@dataclass(frozen=True)
class TraceConfig(ChargeConfig):
    """Settings of `TraceAllocator`; docs/algorithm.md says what each formula is. Those of costs and weights are inherited.

    Attributes:
        pool_factor: Candidate prompts for each prompt that fits into the root budget at `m_min` rollouts.
        m_min: Fewest rollouts of a prompt that gets any.
        m_max: Most root rollouts of one prompt.
        explore: Share of the root budget that is spread over random candidates.
        root_value: Value function of the root stage: a name of `allocation.contrast.ROOT_VALUES`; the paper's is `plug_in`.
        root_choice: Which prompts are opened: `best` for those of the largest values, or `proportional` for prompts drawn with
            chances proportional to their values, so that none that can be learned from is left out for long.
        solver: `greedy`, or `exact` for the dynamic program; batches too large for it (`allocation.waves.EXACT_LIMIT`) are
            planned by `greedy` all the same, whose objective differs by less than a thousandth.
        root_waves: Waves in which the root budget is spent, beliefs being updated in between; the paper has 1. With more, a
            prompt may grow in view of its own outcomes (`Ledger.outcome_stops`).
        continuations: Continuations for each root rollout, N; the paper's is 2.
        prefix_mode: `flip` (paper), `exact`, `random`, `entropy` (no predictor needed, but entropies of the policy) or `none`.
        prefix_belief: `plug_in` (paper) or `posterior`.
        prefix_waves: Waves in which a prompt's continuations are spent; the paper has 1.
        cap_per_rollout: Most continuations from the prefixes of one root rollout; `None` for no limit.
        tree_outcomes: Let the predictor know, at a prefix, how the tree's other root rollouts ended. Not for `exact`, which
            must not look at outcomes.
        gate: Share of failed rollouts that must hold a mid-value prefix for continuations to be drawn at all; `None` for
            always. See `allocation.methods.gate.Gate`.
        band: No continuations for prompts whose predicted value lies outside these bounds; `None` for all.
        kappa: Weight of the predictor in the Beta beliefs, in pseudo-rollouts; `None` fits it to calibration. The default
            leaves a prompt's earlier outcomes without weight: the paper allocates by the prediction alone.
        decay: Factor on a prompt's counts at each policy update.

    Raises:
        ValueError: A name is unknown or a number out of range, or two settings exclude each other.
    """

    pool_factor: float = 4.0
    m_min: int = 4
    m_max: int = 16
    explore: float = 0.1
    root_value: str = "plug_in"
    root_choice: str = "best"
    solver: str = "greedy"
    root_waves: int = 1
    continuations: float = 2.0
    prefix_mode: str = "flip"
    prefix_belief: str = "plug_in"
    prefix_waves: int = 1
    cap_per_rollout: int | None = None
    tree_outcomes: bool = False
    gate: float | None = None
    band: tuple[float, float] | None = None
    kappa: float | None = 1e6
    decay: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("root_value", sorted(ROOT_VALUES)),
            ("root_choice", CHOICES),
            ("solver", SOLVERS),
            ("prefix_mode", PREFIX_MODES),
            ("prefix_belief", BELIEFS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for check, names in (
            (check_whole, ("m_min", "m_max", "root_waves", "prefix_waves", "cap_per_rollout")),
            (check_numbers, ("pool_factor", "explore", "continuations", "gate", "kappa", "decay")),
            (check_flags, ("tree_outcomes",)),
        ):
            for name in names:
                if getattr(self, name) is not None or name not in ("cap_per_rollout", "gate", "kappa"):
                    check(**{name: getattr(self, name)})
        if not 2 <= self.m_min <= self.m_max:
            raise ValueError(f"need 2 <= m_min <= m_max, got m_min={self.m_min}, m_max={self.m_max}")
        for name in ("root_waves", "prefix_waves"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("explore", "gate"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.band is not None and not isinstance(self.band, tuple | list):
            raise ValueError(f"band must be None or two probabilities in ascending order, got {self.band!r}")
        for bound in self.band or ():
            check_numbers(band=bound)
        if self.band is not None and not (len(self.band) == 2 and 0 <= self.band[0] < self.band[1] <= 1):
            raise ValueError(f"band must be two probabilities in ascending order, got {self.band}")
        if not 0 < self.pool_factor < float("inf"):
            raise ValueError(f"pool_factor must be positive, got {self.pool_factor}")
        if not 0 <= self.continuations < float("inf"):
            raise ValueError(f"continuations must not be negative or infinite, got {self.continuations}")
        if self.cap_per_rollout is not None and self.cap_per_rollout < 0:
            raise ValueError(f"cap_per_rollout must be None or not negative, got {self.cap_per_rollout}")
        if self.kappa is not None and not 0 < self.kappa < float("inf"):
            raise ValueError(f"kappa must be None or positive, got {self.kappa}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}")
        if self.reweight == "ips" and self.explore == 0:
            raise ValueError(
                "reweight='ips' needs explore > 0: without exploration prompts off the margin have no chance to be chosen; "
                "set explore, or reweight='clipped'"
            )
        if self.reweight != "none" and (self.root_waves > 1 or self.solver == "exact"):
            raise ValueError(
                "reweight needs root_waves=1 and solver='greedy': the chances of being chosen are of one plan"
            )
        if self.solver == "exact" and self.token_budget is not None:
            raise ValueError("solver='exact' counts rollouts: leave token_budget at None, or use solver='greedy'")
        if self.tree_outcomes and self.prefix_mode == "exact":
            raise ValueError("tree_outcomes would let prefix_mode='exact' look at outcomes: use prefix_mode='flip'")


@dataclass(frozen=True)
class TracePlusConfig(TraceConfig):
    """Settings of `TracePlusAllocator`: those of `TraceConfig` with other defaults; docs/methods.md says why each."""

    root_value: str = "vip"
    root_choice: str = "proportional"
    cost_aware: bool = True
    cost_aware_roots: bool = False
    continuations: float = 0.5
    prefix_mode: str = "exact"
    prefix_belief: str = "posterior"
    cap_per_rollout: int | None = 4
    kappa: float | None = None
