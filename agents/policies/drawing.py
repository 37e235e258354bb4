"""Drawing tokens from logits, and telling when a string ends an action.

Invariant: the log-prob of a drawn token is that of the distribution that it was drawn from, in float32 whatever the logits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agents.policies.sampling import Sampling


def draw(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, *, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, list[float] | None]:
    """Draws one token a row.

    Args:
        logits: Float [rows, vocabulary].
        sampling: Temperature and truncation.
        generator: One uniform number is drawn from it for each row.
        entropy: Whether entropies are asked for.

    Returns:
        Ids int64 [rows], log-probs float32 [rows], and the rows' entropies in nats if they are asked for. At temperature 0 the
        likeliest token, with log-probs and entropy of the model's own distribution.
    """
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(logits.float(), -1)
        ids = logprobs.argmax(-1)
    else:
        logprobs = torch.log_softmax(truncated(logits.float() / sampling.temperature, sampling), -1)
        # Inverse transform: one uniform number a row, where torch.multinomial draws one for each entry of the vocabulary.
        cumulative = logprobs.exp().cumsum(-1)
        drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device) * cumulative[:, -1:]
        ids = (cumulative <= drawn).sum(-1).clamp(max=logits.shape[-1] - 1)
    spread = torch.special.entr(logprobs.exp()).sum(-1).tolist() if entropy else None
    return ids, logprobs.gather(-1, ids[:, None])[:, 0], spread


def truncated(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Returns logits in which what `top_k` and then `top_p` cut off is minus infinity, float [rows, vocabulary]."""
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(stable=True, dim=-1, descending=True)
        chances = ordered.softmax(-1)
        # A token is kept while those before it do not yet make up the share; so the first always is.
        before = chances.cumsum(-1) - chances
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits


class StopStrings:
    """Tells whether the tokens of an action have come to hold a stop string, asked after each token.

    Args:
        tokenizer: Decodes.
        strings: Stop strings; there may be none.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]):
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        # A token is at least one byte of text: where the last one completes a string, the string began within so many. One
        # more, because some tokenizers drop a space at the beginning of what they decode.
        self._tail = 1 + max((len(s.encode()) for s in strings), default=0)

    def hit(self, tokens: Sequence[int]) -> bool:
        """Returns whether the text that the last tokens make holds a stop string."""
        if not self._strings:
            return False
        text = self._tokenizer.decode(
            list(tokens[-self._tail :]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return any(s in text for s in self._strings)
