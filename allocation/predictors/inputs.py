"""What the predictors on hidden states read of an anchor, as one row of numbers.

Invariant: a row has the same columns whatever is missing; zeros stand for what nobody computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocation.predictor import NUM_COUNTS, Anchor, counts_matrix
from allocation.predictors.hashing import word_ids


def input_width(feature_dim: int, words: int) -> int:
    """Returns the number of columns of `input_matrix`."""
    return feature_dim + words + NUM_COUNTS


def input_matrix(anchors: Sequence[Anchor], feature_dim: int, words: int) -> np.ndarray:
    """Returns the mean hidden state along the path, the hashed words of the prompt and `counts_matrix`.

    Args:
        anchors: n anchors.
        feature_dim: Size of a hidden state; 0 for none.
        words: Buckets that the words of the prompt are hashed into; 0 leaves them out.

    Returns:
        Float32 [n, input_width]. Zeros stand for hidden states that nobody computed, such as that of a prompt too long for
        the model.

    Raises:
        ValueError: A hidden state has another size.
    """
    d = feature_dim
    x = np.zeros((len(anchors), input_width(d, words)), np.float32)
    x[:, d + words :] = counts_matrix(anchors)
    if d:
        states = [a.features if a.path_features is None else a.path_features for a in anchors]
        there = {i: state for i, state in enumerate(states) if state is not None}
        for state in there.values():
            if len(state) != d:
                raise ValueError(f"the predictor was made for hidden states of size {d}, got {len(state)}")
        if there:
            x[list(there), :d] = np.stack(list(there.values()))
    if words:
        number: dict[str, int] = {}
        of = [number.setdefault(a.prompt, len(number)) for a in anchors]
        bags = [np.bincount(word_ids(prompt, words), minlength=words) for prompt in number]
        x[:, d : d + words] = np.array(bags, np.float32).reshape(-1, words)[of]
    return x
