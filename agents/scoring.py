"""What a model says of a micro-batch: log-probs and entropies of the scored tokens, hidden states at the ends of prefixes.

Invariant: logits are made only where a token is scored, a bounded number of them at a time; a packed micro-batch gives what its
flat rows would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from agents import tree_attention
from agents.layout import MicroBatch

MAX_LOGITS = 1 << 25
"""Logits that are held at a time, at most (128 MiB in float32): tokens times vocabulary."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says of a micro-batch.

    Attributes:
        logprobs: Of the scored tokens under the sampling temperature, float32 [t], in nats.
        entropy: Of the distributions that they are drawn from, float32 [t], in nats; `None` unless asked for.
        hidden: Last hidden states (the input of the output layer) at the ends of the prefixes asked for, float [v, d].
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    hidden: torch.Tensor


class Scorer:
    """Scores micro-batches under a causal language model of transformers.

    If the model's output layer alone turns last hidden states into its logits (no scaling, no soft cap), only the positions
    that are scored go through it; this is checked once, on a probe. Other models compute logits everywhere and are given flat
    micro-batches only (`packs`).

    Args:
        model: The model, in evaluation mode.
        temperature: The sampling temperature, so that behaviour and current log-probs are of the same distribution; 0 (greedy
            sampling) is scored at temperature 1.
        precision: `float32` or `bfloat16`, of the matrix products; the softmax is always in float32 (float64 for a model in
            float64).

    Attributes:
        max_length: Longest path that the model has positions for, in tokens.
        packs: Whether it can score packed micro-batches.
    """

    def __init__(self, model: Any, *, temperature: float = 1.0, precision: str = "float32"):
        self.model = model
        self.max_length = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        self._temperature = temperature or 1.0
        self._bfloat16 = precision == "bfloat16"
        self._direct = self._output_layer_makes_logits()
        self.packs = self._direct and tree_attention.supported(model)

    @torch.no_grad()
    def _output_layer_makes_logits(self) -> bool:
        probe = torch.arange(4, device=self.model.device)[None] % self.model.config.vocab_size
        hidden = self.model.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state
        logits = self.model(input_ids=probe, use_cache=False).logits
        return bool(torch.allclose(self.model.get_output_embeddings()(hidden), logits, rtol=1e-4, atol=1e-5))

    def __call__(self, micro: MicroBatch, ids: torch.Tensor, *, entropy: bool = False) -> Scores:
        """Scores a micro-batch.

        Args:
            micro: The rows.
            ids: The scored tokens, int64 [t], in the order of `micro.token`.
            entropy: Whether entropies are wanted.

        Raises:
            ValueError: A path is longer than the model's positions, or the rows are packed and the model cannot read such.
        """
        length = int(micro.positions.max()) + 1
        if length > self.max_length:
            raise ValueError(
                f"a path has {length} tokens and the model has positions for {self.max_length} (max_position_embeddings); "
                "sample shorter episodes (--max-new-tokens, the environment's max_turns) or take a model with a longer context"
            )
        device = self.model.device
        row, before, value_row, value_at = (
            torch.from_numpy(x).to(device) for x in (micro.row, micro.before, micro.value_row, micro.value_at)
        )
        ids = ids.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            hidden, logits = self._forward(micro)
            output = self.model.get_output_embeddings() if logits is None else torch.nn.Identity()
            source = (hidden if logits is None else logits)[row, before]
            logprobs, entropies = self._score(output, source, ids, entropy)
        return Scores(logprobs, entropies, hidden[value_row, value_at])

    def _forward(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the last hidden states, float [rows, length, d], and the logits where the output layer alone makes none."""
        device = self.model.device
        ids = torch.from_numpy(micro.ids).to(device)
        if micro.ends is not None:
            if not self.packs:
                raise ValueError(
                    f"{type(self.model).__name__} cannot score packed rows; lay them out flat (layout='flat')"
                )
            positions, ends = (torch.from_numpy(x).to(device) for x in (micro.positions, micro.ends))
            return tree_attention.forward(self.model.get_decoder(), ids, positions, ends), None
        if self._direct:
            return self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state, None
        seen: list[torch.Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        return seen[0], logits

    def _score(
        self, output: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor, ids: torch.Tensor, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns log-probs and entropies; of several chunks each makes its logits again in the backward pass."""

        def chunk(source: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            logits = output(source)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logprobs = F.log_softmax(logits / self._temperature, -1)
            entropies = -(logprobs.exp() * logprobs).sum(-1) if entropy else None
            return logprobs.gather(-1, ids[:, None])[:, 0], entropies

        size = max(MAX_LOGITS // int(self.model.config.vocab_size), 1)
        if len(ids) <= size:
            return chunk(source, ids)
        parts = []
        for part in zip(source.split(size), ids.split(size), strict=True):
            if torch.is_grad_enabled():
                parts.append(checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(chunk(*part))
        return torch.cat([p[0] for p in parts]), torch.cat(
            [p[1] for p in parts if p[1] is not None]
        ) if entropy else None
