"""What an optimiser step was, and what the log says of the steps of a pass.

Invariant: figures are of steps that were made; one that was skipped is counted and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agents.layout import Layout
from agents.learner_config import LearnerConfig

FIGURES = (
    "loss/policy",
    "loss/grad_norm",
    "loss/clip_share",
    "loss/kl",
    "loss/tokens",
    "loss/entropy",
    "loss/reference_kl",
    "loss/value",
    "critic/explained_variance",
    "importance/ess",
    "importance/kl",
    "importance/clipped",
    "drift/mean_abs",
    "drift/max_abs",
    "drift/probability",
    "learner/computed_tokens",
    "learner/flat_tokens",
    "learner/unique_tokens",
    "learner/skipped",
)
"""What an update may log; what does not apply is left out (`figure_names`).

`loss/policy`, `loss/value` and `loss/grad_norm` (before it is scaled down) are means over the steps of the last pass over the
batch, `loss/clip_share`, `loss/kl` (old minus current log-prob), `loss/reference_kl` and `loss/entropy` means over its tokens,
in nats; entropy is exact if there is a bonus, else estimated from the sampled tokens. `importance/*`, `drift/*`
and `critic/explained_variance` are from before the first step. `learner/*_tokens` add up the steps of the last pass;
`learner/skipped` counts the steps of all passes that were not finite.
"""


def figure_names(config: LearnerConfig) -> tuple[str, ...]:
    """Returns those of `FIGURES` that a learner with these settings logs."""
    absent: list[str] = []
    if not config.kl_coef:
        absent.append("loss/reference_kl")
    if config.importance != "truncated":
        absent += ["importance/", "drift/"]
    if config.estimator != "gae":
        absent += ["loss/value", "critic/"]
    return tuple(name for name in FIGURES if not name.startswith(tuple(absent)))


@dataclass(frozen=True, slots=True)
class Step:
    """What an optimiser step was.

    Attributes:
        layout: What went through the model.
        sums: Terms of the loss and sums over tokens, by name, without gradient.
        norm: Of the gradient, before it was scaled down.
        finite: Whether it was made; one whose loss or gradient is not finite is skipped.
    """

    layout: Layout
    sums: dict[str, torch.Tensor]
    norm: torch.Tensor
    finite: bool


def pass_figures(steps: list[Step]) -> dict[str, float]:
    """Returns the figures of one pass over a batch, from the steps that were made."""
    layouts = [s.layout for s in steps]
    figures = {
        f"learner/{name}": float(sum(getattr(layout, name) for layout in layouts))
        for name in ("computed_tokens", "flat_tokens", "unique_tokens")
    }
    made = [s for s in steps if s.finite]
    if not made:
        return figures

    def total(name: str) -> float:
        return float(sum(s.sums.get(name, torch.zeros(())) for s in made))

    tokens = max(sum(len(m.token) for s in made for m in s.layout.micro_batches), 1)
    per_step = {
        "loss/policy": total("policy"),
        "loss/value": total("value"),
        "loss/grad_norm": sum(float(s.norm) for s in made),
    }
    per_token = {f"loss/{n}": total(n) for n in ("kl", "entropy", "reference_kl")} | {
        "loss/clip_share": total("clipped")
    }
    return figures | {n: x / len(made) for n, x in per_step.items()} | {n: x / tokens for n, x in per_token.items()}
