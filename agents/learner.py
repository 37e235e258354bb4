"""One update of a policy from a forest: PPO's and GRPO's, which differ in where the advantages come from.

Invariant: a step equals that of the whole batch however it is split into micro-batches and whichever layout computes it; a
step that is not finite changes nothing.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agents.advantages import Credit, estimate
from agents.advantages.actor_critic import valued_prefixes
from agents.aggregation import edge_coefficients
from agents.batch import Batch, path_tokens
from agents.critic import Critic, value_loss
from agents.exactness import assert_exact
from agents.flat import flat_layout
from agents.layout import Layout, MicroBatch
from agents.layout_check import check_layout
from agents.learner_config import LearnerConfig
from agents.losses import Clip, entropy_loss, importance_weights, kl_loss, policy_loss
from agents.packing import packed_layout
from agents.schedules import lr_factor
from agents.scoring import Scorer
from agents.skipped import save_skipped
from agents.steps import Step, figure_names, pass_figures
from agents.tokens import EdgeTokens
from allocation import Forest
from allocation.forest_table import ForestTable

if TYPE_CHECKING:
    from agents.reference import Reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Update:
    """What an update was.

    Attributes:
        figures: For the log (`agents.steps.FIGURES`); those of the loss are means over the last pass over the batch.
        credit: What the edges were given.
        table: The forest that they belong to.
    """

    figures: dict[str, float]
    credit: Credit
    table: ForestTable


class Learner:
    """Learns from forests.

    Args:
        model: A transformers causal language model; it is put into evaluation mode and stays there: the policy samples without
            dropout, so the gradient is that of the policy that sampled only without it. Parameters that require gradients
            are trained.
        config: Settings.
        updates: Updates of the whole run, for the schedule.
        temperature: Of the sampling.
        seed: Seeds what is random in it: the dealing of trees to minibatches, a critic's first weights.
        reference: Frozen model for the divergence; needed if `kl_coef` is not 0.
        directory: Where batches that were skipped are kept for inspection; `None` keeps none.

    Attributes:
        optimizer: AdamW over matrices, vectors and, with a critic, its head.
        critic: The critic of estimator `gae`; else `None`.
        scorer: What scores micro-batches.
        done: Updates done.

    Raises:
        ValueError: `kl_coef` is not 0 and there is no reference.
    """

    def __init__(
        self,
        model: Any,
        config: LearnerConfig,
        *,
        updates: int,
        temperature: float = 1.0,
        seed: int = 0,
        reference: Reference | None = None,
        directory: Path | None = None,
    ):
        if config.kl_coef and reference is None:
            raise ValueError(
                "kl_coef is not 0 but there is no reference to diverge from: pass reference=, or set kl_coef=0"
            )
        self.model, self.config, self.reference = model.eval(), config, reference
        self.updates, self.directory = updates, directory
        self.scorer = Scorer(model, temperature=temperature, precision=config.precision)
        self.critic: Critic | None = None
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1], "lr": config.lr},
            {"params": [p for p in trained if p.ndim <= 1], "lr": config.gain_lr, "weight_decay": 0.0},
        ]
        if config.estimator == "gae":
            self.critic = Critic(int(model.config.hidden_size), seed).to(model.device)
            groups.append({"params": list(self.critic.parameters()), "lr": config.value_lr, "weight_decay": 0.0})
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.done = 0
        self._clip = Clip(config.clip_low, config.clip_high, config.dual_clip)
        self._rng = np.random.default_rng([seed, 0x1EA2])
        self._skipped_in_a_row = 0
        self._packed = config.layout == "packed" and self.scorer.packs
        self._check = self._packed and config.check_layout

    def update(self, forest: Forest) -> Update:
        """Learns from a forest.

        Raises:
            ValueError: A path is longer than the model's positions.
            FloatingPointError: `max_skipped` updates in a row had a loss or gradient that was not finite.
            RuntimeError: What would be scored is not what was sampled (`agents.exactness`), or `check_layout` found the packed
                gradient to differ from the flat one.
        """
        config, table = self.config, ForestTable.of(forest)
        self._set_step_sizes()
        values = self._values(table)
        credit = self._credit(table, values)
        coefficients = edge_coefficients(table, credit, config.aggregation)
        batch = self._batch(table, credit, coefficients, values)
        figures = dict.fromkeys(figure_names(config), 0.0) | {"loss/tokens": float(len(batch.tokens))}
        finite = _all_finite(table.reward, credit.up, credit.down, credit.weight, values)
        passes: list[list[Step]] = []
        if finite and len(batch):
            batch, before = self._before(batch)
            for _ in range(config.epochs):
                passes.append([self._step(part) for part in batch.minibatches(config.minibatches, self._rng)])
            figures |= before | pass_figures(passes[-1])
        self.done += 1
        skipped = [s for steps in passes for s in steps if not s.finite]
        figures["learner/skipped"] = float(len(skipped) + (not finite))
        # A batch of which a step was skipped may have other figures that are not finite.
        logged = {name: x if math.isfinite(x := figures[name]) else 0.0 for name in figure_names(config)}
        update = Update(logged, credit, table)
        self._count(update, skipped)
        return update

    def _set_step_sizes(self) -> None:
        config = self.config
        factor = lr_factor(config.lr_schedule, self.done, self.updates, config.lr_warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    # Where the advantages come from.

    def _readable(self, table: ForestTable) -> np.ndarray:
        """Returns the rows of the prefixes that a critic is asked for: those with tokens that fit into the model, int64 [v]."""
        if self.critic is None:
            return np.zeros(0, dtype=np.int64)
        prefixes = valued_prefixes(table)
        length = path_tokens(table)[prefixes]
        # A prompt has no tokens where no policy ever gave an action for it.
        return prefixes[(length > 0) & (length <= self.scorer.max_length)]

    @torch.no_grad()
    def _values(self, table: ForestTable) -> np.ndarray | None:
        """Returns the critic's values of the prefixes, float64 [n]; `None` without a critic.

        A prefix without tokens, or longer than the model's positions, has the value of hidden states of zeros, as in the
        policy's features.
        """
        if self.critic is None:
            return None
        values = np.full(len(table), float(self.critic.bias), dtype=np.float64)
        prefixes = self._readable(table)
        nothing = EdgeTokens.of(table, np.zeros(0, dtype=np.int64))
        no_ids = torch.zeros(0, dtype=torch.int64)
        for micro in self._layout(nothing, prefixes, no_ids).micro_batches:
            scores = self.scorer(micro, no_ids)
            values[micro.value_node] = self.critic(scores.hidden).double().cpu().numpy()
        return values

    def _credit(self, table: ForestTable, values: np.ndarray | None) -> Credit:
        if _all_finite(table.reward, values):
            return estimate(table, self.config.estimator, self.config, values=values)
        nothing = np.zeros(len(table))
        return Credit(nothing, nothing, nothing)

    # What is trained.

    def _batch(self, table: ForestTable, credit: Credit, coefficients: np.ndarray, values: np.ndarray | None) -> Batch:
        prefixes = self._readable(table)
        return Batch.of(table, credit, coefficients, self.config, prefixes, values, device=self.model.device)

    def _layout(self, tokens: EdgeTokens, prefixes: np.ndarray, ids: torch.Tensor) -> Layout:
        """Returns what goes through the model, once it is certain that it is what was sampled."""
        layout = self._layout_of(tokens, prefixes)
        assert_exact(layout, tokens, prefixes, ids.cpu().numpy())
        return layout

    def _layout_of(self, tokens: EdgeTokens, prefixes: np.ndarray) -> Layout:
        return (packed_layout if self._packed else flat_layout)(tokens, prefixes, self.config.micro_tokens)

    @torch.no_grad()
    def _before(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """Adds what is known before the first step: log-probs of the learner and of the reference; returns figures too."""
        figures = {}
        if self.critic is not None:
            figures["critic/explained_variance"] = batch.explained_variance()
        old, reference = torch.empty_like(batch.sampled), torch.empty_like(batch.sampled)
        corrected, penalised = self.config.importance == "truncated", self.config.kl_coef > 0
        if corrected or penalised:
            for micro in self._layout(batch.tokens, np.zeros(0, dtype=np.int64), batch.ids).micro_batches:
                token = torch.from_numpy(micro.token).to(old.device)
                if corrected:
                    old[token] = self.scorer(micro, batch.ids[token]).logprobs
                if penalised:
                    assert self.reference is not None, "checked at the start"
                    reference[token] = self.reference(micro, batch.ids[token])
        if penalised:
            batch = replace(batch, reference=reference)
        if corrected and len(old):
            weights, measured = importance_weights(old, batch.sampled, self.config.importance_cap)
            batch = replace(batch, old=old, importance=weights)
            figures |= measured
        return batch, figures

    # One step.

    def _step(self, batch: Batch) -> Step:
        """Takes one optimiser step, unless loss or gradient is not finite."""
        layout = self._layout(batch.tokens, batch.prefixes, batch.ids)
        if self._check and len(batch.tokens):
            # Until a batch could be compared.
            self._check = not check_layout(
                lambda layout: self._backward(batch, layout)["loss"],
                self._parameters(),
                packed=layout,
                flat=flat_layout(batch.tokens, batch.prefixes, self.config.micro_tokens),
                terms=float((batch.scale * batch.coefficients * (batch.up - batch.down)).sum()),
                precision=self.config.precision,
            )
        sums = self._backward(batch, layout)
        policy, head = self._policy_parameters(), [] if self.critic is None else list(self.critic.parameters())
        # The head's gradient is the larger by far while its values are off: scaled down with it, the policy would stand still.
        norm, head_norm = (torch.nn.utils.clip_grad_norm_(p, self.config.max_grad_norm) for p in (policy, head))
        finite = bool(torch.isfinite(norm + head_norm + sums["loss"]))
        if finite:
            self.optimizer.step()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        return Step(layout, sums, norm, finite)

    def _backward(self, batch: Batch, layout: Layout) -> dict[str, torch.Tensor]:
        """Leaves the gradient of a batch in the parameters, one micro-batch after another; returns sums for the log."""
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, torch.Tensor] = {}
        for micro in layout.micro_batches:
            loss, sums = self._loss(batch, micro)
            loss.backward()
            for name, value in (sums | {"loss": loss.detach()}).items():
                total[name] = total[name] + value if name in total else value
        return total

    def _loss(self, batch: Batch, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns a micro-batch's part of the loss, and sums for the log."""
        config, device = self.config, batch.ids.device
        token, node = (torch.from_numpy(x).to(device) for x in (micro.token, micro.value_node))
        scores = self.scorer(micro, batch.ids[token], entropy=config.entropy_coef > 0)
        new, old = scores.logprobs, batch.old[token]
        share = batch.scale * batch.coefficients[token]
        weighted = share * batch.importance[token]
        loss, cut = policy_loss(new, old, batch.up[token], batch.down[token], weighted, self._clip)
        sums = {"policy": loss.detach(), "clipped": cut.sum(), "kl": (old - new.detach()).sum()}
        if config.kl_coef:
            penalty, divergence = kl_loss(new, batch.reference[token], weighted, config.kl_estimator)
            loss = loss + config.kl_coef * penalty
            sums["reference_kl"] = divergence.sum()
        # Without the bonus an estimate from the sampled tokens does.
        sums["entropy"] = -new.detach().sum() if scores.entropy is None else scores.entropy.detach().sum()
        if scores.entropy is not None:
            loss = loss + config.entropy_coef * entropy_loss(scores.entropy, share)
        if self.critic is not None:
            value = value_loss(
                self.critic(scores.hidden),
                batch.values[node],
                batch.targets[node],
                batch.scale * batch.value_coefficients[node],
                config.value_clip,
            )
            loss = loss + config.value_coef * value
            sums["value"] = value.detach()
        return loss, sums

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # Steps that were not made.

    def _count(self, update: Update, skipped: list[Step]) -> None:
        """Counts updates in a row that had to skip a step, and keeps their batches for inspection."""
        if not update.figures["learner/skipped"]:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        seen = {"loss": float(skipped[0].sums["loss"]), "grad_norm": float(skipped[0].norm)} if skipped else {}
        what = (
            "loss {loss:g}, norm of the gradient {grad_norm:g}".format(**seen) if seen else "a reward or an advantage"
        )
        where = "its batch was not kept, for want of a directory"
        if self.directory is not None:
            figures = update.figures | {f"skipped/{name}": x for name, x in seen.items()}
            where = f"its batch is in {save_skipped(self.directory, self.done, update.table, update.credit, figures)}"
        found = f"update {self.done} skipped a step that is not finite ({what}); {where}"
        if self._skipped_in_a_row >= self.config.max_skipped:
            raise FloatingPointError(
                f"{found}. That was {self._skipped_in_a_row} updates in a row (max_skipped): look at the rewards and "
                "log-probs of these batches, or lower the learning rate (--lr)"
            )
        logger.warning("%s", found)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Returns all that the next update depends on, the model's weights apart."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "done": self.done,
            "rng": self._rng.bit_generator.state,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def _policy_parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups[:2] for p in group["params"]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: It is of a learner with other groups of weights, or one has a critic and the other does not.
        """
        if (state["critic"] is None) != (self.critic is None):
            raise ValueError(
                "one of learner and state has a critic, the other does not; resume with the same estimator"
            )
        given = [(group.get("initial_lr", group["lr"]), group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        # Step sizes are settings, which may change on resuming; the state is moments and counts.
        for group, (lr, decay) in zip(self.optimizer.param_groups, given, strict=True):
            group["initial_lr"], group["weight_decay"] = lr, decay
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self.done = int(state["done"])
        self._rng.bit_generator.state = state["rng"]
        self._skipped_in_a_row = int(state["skipped_in_a_row"])


def _all_finite(*arrays: np.ndarray | None) -> bool:
    return all(a is None or bool(np.isfinite(a).all()) for a in arrays)
