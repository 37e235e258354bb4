"""Words as numbers, without a vocabulary.

Invariant: the number of a word is a function of the word alone, in every process and on every machine.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache

import numpy as np

from allocation.roots import IntArray

_WORD = re.compile(r"\w+")


@lru_cache(maxsize=4096)
def word_ids(text: str, buckets: int) -> IntArray:
    """Returns the bucket of each word of a text, in order, lower-cased, int64 [words].

    The latest few thousand texts are remembered, since prefixes of one tree share theirs; do not write into the result.

    Args:
        text: Any text.
        buckets: Number of buckets.
    """
    return np.array([zlib.crc32(w.encode()) % buckets for w in _WORD.findall(text.lower())], dtype=np.int64)
