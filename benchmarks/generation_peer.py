"""`model.generate` once a turn: what one writes who has no tree.

Invariant: each call gets whole prefixes as a left-padded batch, as transformers' documentation has it, and keeps nothing for
the next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Generated:
    """What the calls gave.

    Attributes:
        seconds: Time spent in `generate`.
        tokens: Tokens sampled, each row up to its end token.
        computed: Positions that went through the model, padding included.
    """

    seconds: float
    tokens: int
    computed: int


def generate_calls(
    model: Any, calls: Sequence[Sequence[np.ndarray]], *, end_id: int, max_new_tokens: int, seed: int
) -> Generated:
    """Answers recorded calls with `model.generate`, sampling at temperature 1.

    Args:
        model: A transformers model.
        calls: By call, the ids of each prefix, int64 [n].
        end_id: Token that ends an action; also the padding.
        max_new_tokens: Token limit of an action.
        seed: Seeds torch's generator, which is all that `generate` knows; the caller's state is restored.
    """
    seconds, tokens, computed = 0.0, 0, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prefixes in calls:
            longest = max(map(len, prefixes))
            ids = torch.full((len(prefixes), longest), end_id)
            mask = torch.zeros_like(ids)
            for row, prefix in enumerate(prefixes):
                ids[row, longest - len(prefix) :] = torch.from_numpy(prefix)
                mask[row, longest - len(prefix) :] = 1
            start = time.perf_counter()
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=end_id,
                pad_token_id=end_id,
            )
            seconds += time.perf_counter() - start
            new = out[:, longest:]
            ended = new == end_id
            first = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
            tokens += int(first.sum())
            computed += ids.numel() + new.shape[0] * (new.shape[1] - 1)
    return Generated(seconds, tokens, computed)
