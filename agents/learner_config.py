"""Settings of the learner, documented where they are defined.

Invariant: every setting that changes an update is here or in the allocator's settings; they are saved with the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agents.advantages import ESTIMATORS, CreditConfig
from agents.aggregation import AGGREGATIONS

LR_SCHEDULES = ("linear", "cosine", "constant")
KL_ESTIMATORS = ("k1", "k3")
PRECISIONS = ("float32", "bfloat16")
IMPORTANCE = ("auto", "none", "truncated")
LAYOUTS = ("packed", "flat")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (needs the extra `lora`).

    Attributes:
        rank: Of the adapters; 0 trains all weights.
        alpha: The adapters' output is scaled by `alpha / rank`.
        targets: Names of the layers that get adapters; empty for all linear layers but the output layer.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class LearnerConfig(CreditConfig):
    """How a policy learns from a forest; the estimators' settings are `agents.advantages.CreditConfig`'s.

    Attributes:
        estimator: Advantages, by name (docs/learning.md): `tree` (default), `two_phase`, `grpo`, `tree_grpo`, `treepo`,
            `treerl`, `spo`, or `gae` (PPO with a critic).
        aggregation: How the loss averages: `prompt`, `trajectory`, `edge` or `token`.
        epochs: Passes over each batch of rollouts.
        minibatches: Optimiser steps in one pass, each on as many trees.
        lr: Step size of AdamW for matrices.
        gain_lr: Step size for vectors (the gains of the norms). Their gradients are far less noisy than those of matrices, and
            they set how sharp the policy is; see docs/training.md.
        value_lr: Step size of the critic's head. A step moves a value by about this times the sum of the hidden state's sizes.
        lr_warmup: Updates over which the step sizes rise from zero.
        lr_schedule: What follows: `linear` or `cosine` falls to zero behind the last update, `constant` stays.
        weight_decay: Of AdamW, for matrices.
        clip_low: Lower bound of the probability ratio is 1 - this.
        clip_high: Upper bound of the probability ratio is 1 + this.
        dual_clip: Where an advantage is negative, the ratio counts up to this at most (Ye et al., 2020; above 1); 0 for no
            bound.
        kl_coef: Weight of the divergence from the frozen reference (the model that the run started from); 0 needs no reference.
        kl_estimator: `k1` or `k3`, see `agents.losses`.
        entropy_coef: Weight of the entropy bonus.
        importance: `truncated` weighs each token by the learner's old probability over the sampler's, cut at `importance_cap`,
            which costs one more pass over the batch; `none` takes the sampler's for the old ones. `auto` is settled by
            `agents.config.resolve`: `truncated` in a run whose policy is another engine than the learner's own model, else
            `none`, which is also what a `Learner` takes it for.
        importance_cap: Greatest importance weight.
        value_coef: Weight of the critic's loss.
        value_clip: Bound on the move of a value in one update; 0 for none.
        max_grad_norm: Gradients are scaled down to this norm.
        layout: `packed` computes the tokens that rollouts share once, `flat` once for every rollout.
        check_layout: Compare the packed loss and gradient of the first batch with the flat ones, and stop if they differ.
        micro_tokens: Padded tokens of a micro-batch.
        precision: Of the learner's matrix products: `float32` or `bfloat16` (weights and optimiser stay float32).
        max_skipped: Stop after so many updates in a row whose loss or gradient was not finite; each is skipped and saved.
        lora: Low-rank adapters.
    """

    estimator: str = "tree"
    aggregation: str = "prompt"
    epochs: int = 1
    minibatches: int = 1
    lr: float = 1.5e-4
    gain_lr: float = 2e-2
    value_lr: float = 1e-3
    lr_warmup: int = 5
    lr_schedule: str = "linear"
    weight_decay: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    importance: str = "auto"
    importance_cap: float = 2.0
    value_coef: float = 0.5
    value_clip: float = 0.2
    max_grad_norm: float = 1.0
    layout: str = "packed"
    check_layout: bool = False
    micro_tokens: int = 8192
    precision: str = "float32"
    max_skipped: int = 3
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        known = {
            "estimator": ESTIMATORS,
            "aggregation": AGGREGATIONS,
            "lr_schedule": LR_SCHEDULES,
            "kl_estimator": KL_ESTIMATORS,
            "importance": IMPORTANCE,
            "layout": LAYOUTS,
            "precision": PRECISIONS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(values)}")
        for name in ("epochs", "minibatches", "micro_tokens", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "gain_lr", "value_lr", "max_grad_norm", "importance_cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "lr_warmup",
            "weight_decay",
            "clip_low",
            "clip_high",
            "advantage_clip",
            "two_phase_beta",
            "kl_coef",
            "entropy_coef",
            "value_coef",
            "value_clip",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.dual_clip and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, or 0 for none, got {self.dual_clip}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.lora.rank < 0:
            raise ValueError(f"lora.rank must not be negative, got {self.lora.rank}")
        if not self.lora.alpha > 0:
            raise ValueError(f"lora.alpha must be positive, got {self.lora.alpha}: at 0 adapters change nothing")
