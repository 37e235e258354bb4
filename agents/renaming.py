"""Renaming: the same trajectory about entities with other names.

Invariant: a word is always replaced by a word of the same split and kind, everywhere in the trajectory alike; so what was true
stays true, the search results stay those of the query, and no name of an evaluation split ever appears.

Without it a small model learns the facts of its one training world by heart instead of learning to read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trace_envs.multihop_qa.synthetic.names import CLOSERS, COUNTRY_CLOSERS, OPENERS, split_countries, split_words


class Renamer:
    """Replaces the name words in token ids by a random permutation of the split's words.

    Args:
        tokenizer: Must encode each opener (with and without a space before it) and each closer as one token.
        split: Split whose words are permuted.

    Raises:
        ValueError: A chunk is not one token.
    """

    def __init__(self, tokenizer: Any, split: str = "train"):
        closers = (*CLOSERS, *COUNTRY_CLOSERS)
        size = len(tokenizer)
        self._opener = np.full(size, -1)
        self._closer = np.full(size, -1)
        # Ids of each opener: without a space before it, and with one.
        self._opener_ids = np.array([[self._id(tokenizer, space + o, o) for space in ("", " ")] for o in OPENERS])
        self._closer_ids = np.array([self._id(tokenizer, OPENERS[0] + c, c) for c in closers])
        self._opener[self._opener_ids] = np.arange(len(OPENERS))[:, None]
        self._closer[self._closer_ids] = np.arange(len(closers))
        self._kinds: list[np.ndarray] = []
        self._word = np.full((len(OPENERS), len(closers)), -1)
        start = 0
        for words in (split_words(split), split_countries(split)):
            pairs = np.array([(OPENERS.index(w[:3]), closers.index(w[3:])) for w in words])
            self._word[pairs[:, 0], pairs[:, 1]] = np.arange(start, start + len(pairs))
            self._kinds.append(pairs)
            start += len(pairs)
        self._pairs = np.concatenate(self._kinds)

    @staticmethod
    def _id(tokenizer: Any, text: str, chunk: str) -> int:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1 + (text.strip() != chunk):
            raise ValueError(f"the tokenizer spells the name chunk {chunk!r} with more than one token")
        return int(ids[-1])

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the ids with all name words replaced, int64 [n]."""
        permuted, start = [], 0
        for pairs in self._kinds:
            permuted.append(start + rng.permutation(len(pairs)))
            start += len(pairs)
        new_pairs = self._pairs[np.concatenate(permuted)]
        opener, closer = self._opener[ids[:-1]], self._closer[ids[1:]]
        at = np.flatnonzero((opener >= 0) & (closer >= 0))
        word = self._word[opener[at], closer[at]]
        at, word = at[word >= 0], word[word >= 0]
        out = ids.copy()
        spaced = (ids[at] == self._opener_ids[opener[at], 1]).astype(int)
        out[at] = self._opener_ids[new_pairs[word, 0], spaced]
        out[at + 1] = self._closer_ids[new_pairs[word, 1]]
        return out
