"""What one update trains: the tokens of a forest's edges and what each counts, and the prefixes that a critic learns from.

Invariant: everything per token stands in the order of `EdgeTokens` and everything per prefix in that of the table's rows, so
none of it depends on how a model is shown the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from agents.advantages import Credit
from agents.critic import explained_variance, value_coefficients
from agents.learner_config import LearnerConfig
from agents.tokens import EdgeTokens
from allocation.forest_table import ForestTable


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens and prefixes to train, and what each counts.

    Tensors are on the model's device and of the sampled log-probs' precision (float32).

    Attributes:
        tokens: The tokens.
        ids: Their ids, int64 [t].
        up, down: Positive and negative part of their edges' advantages, [t].
        coefficients: Share of each token in the loss of the whole batch, [t].
        sampled: Log-probs as sampled, [t].
        old: Log-probs under the learner's weights before the update: those as sampled unless `importance` asks for a pass, [t].
        importance: Weights of the tokens in the expectation over what was sampled, [t].
        reference: Log-probs under the frozen reference, [t]; empty without one.
        prefixes: Rows of the prefixes whose values are trained, int64 [v]; empty without a critic.
        values, targets, value_coefficients: Of all rows of the table, [n]; empty without a critic.
        scale: What the loss is multiplied by: the number of minibatches of a pass.
    """

    tokens: EdgeTokens
    ids: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    coefficients: torch.Tensor
    sampled: torch.Tensor
    old: torch.Tensor
    importance: torch.Tensor
    reference: torch.Tensor
    prefixes: np.ndarray
    values: torch.Tensor
    targets: torch.Tensor
    value_coefficients: torch.Tensor
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        table: ForestTable,
        credit: Credit,
        coefficients: np.ndarray,
        config: LearnerConfig,
        readable: np.ndarray,
        values: np.ndarray | None,
        *,
        device: torch.device,
    ) -> Batch:
        """Chooses what is trained.

        Args:
            table: The forest.
            credit: Of its edges.
            coefficients: What a token of each edge counts, float64 [n]; edges of 0 are left out.
            config: Edges without an advantage are trained only if it asks for a divergence or entropy.
            readable: Rows of the prefixes that a value can be read from, int64.
            values: The critic's values, float64 [n]; `None` without one.
            device: Where the tensors go.
        """
        trained = coefficients != 0
        if not (config.kl_coef or config.entropy_coef):
            trained &= (credit.up != 0) | (credit.down != 0)
        tokens = EdgeTokens.of(table, np.flatnonzero(trained))

        def tensor(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.asarray(x, dtype=tokens.old_logprobs.dtype)).to(device)

        nothing = np.zeros(0)
        prefixes, targets, shares = np.zeros(0, dtype=np.int64), nothing, nothing
        if values is not None and credit.target is not None:
            known = np.zeros(len(table), dtype=bool)
            known[readable] = True
            targets = np.where(known, credit.target, np.nan)
            shares = value_coefficients(table, targets)
            prefixes = np.flatnonzero(shares > 0)
        sampled = tensor(tokens.old_logprobs)
        return cls(
            tokens=tokens,
            ids=torch.from_numpy(tokens.ids).to(device),
            up=tensor(credit.up[tokens.node]),
            down=tensor(credit.down[tokens.node]),
            coefficients=tensor(coefficients[tokens.node]),
            sampled=sampled,
            old=sampled,
            importance=torch.ones_like(sampled),
            reference=tensor(nothing),
            prefixes=prefixes,
            values=tensor(nothing if values is None else values),
            targets=tensor(targets),
            value_coefficients=tensor(shares),
        )

    def __len__(self) -> int:
        return len(self.tokens) + len(self.prefixes)

    def explained_variance(self) -> float:
        """Returns how much of the targets the critic knew before the update (`agents.critic.explained_variance`)."""
        values, targets, shares = (
            x.double().cpu().numpy() for x in (self.values, self.targets, self.value_coefficients)
        )
        return explained_variance(values, targets, shares)

    def minibatches(self, count: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Deals trees at random into parts of as many trees each.

        Denominators stay those of the whole batch and the losses are multiplied by the number of parts, so that the mean of
        the parts' gradients is the whole batch's.

        Args:
            count: Number of parts, fewer if there are fewer trees with something to train.
            rng: Deals; not used for one part.
        """
        table = self.tokens.table
        trees = np.unique(np.concatenate([table.tree[self.tokens.rows], table.tree[self.prefixes]]))
        count = min(count, len(trees))
        if count <= 1:
            yield self
            return
        for part in np.array_split(rng.permutation(trees), count):
            mine = np.isin(table.tree, part)
            index = torch.from_numpy(np.flatnonzero(mine[self.tokens.node])).to(self.ids.device)
            per_token = ("ids", "up", "down", "coefficients", "sampled", "old", "importance", "reference")
            yield replace(
                self,
                tokens=EdgeTokens.of(table, self.tokens.rows[mine[self.tokens.rows]]),
                prefixes=self.prefixes[mine[self.prefixes]],
                scale=float(count),
                **{n: x[index] if len(x := getattr(self, n)) else x for n in per_token},
            )


def path_tokens(table: ForestTable) -> np.ndarray:
    """Returns the number of tokens from the start of the prompt to the end of each prefix, int64 [n]."""
    shown = [n.context_ids for t in table.trees for n in t.nodes]
    return table.along(table.tokens + np.array([0 if c is None else len(c) for c in shown])).astype(np.int64)
