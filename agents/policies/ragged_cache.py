"""A key-value cache for rows of different lengths, for any transformers model that takes a 4-D attention mask.

Invariant: row r holds valid keys at positions [0, lengths[r]) and nothing else is ever attended to; there is no padding
between a row's tokens, so a row can be cut out, stored, and laid into another batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

# Places that may be left empty where rows of different lengths are computed together: a number, and a share of the tokens.
EMPTY_PLACES, EMPTY_SHARE = 32, 0.05


class _RaggedLayer(CacheLayerMixin):
    """Writes each row's new keys behind its old ones."""

    def __init__(self, owner: RaggedCache, index: int):
        super().__init__()
        self._owner = owner
        self._index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The owner allocates."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scatters [rows, heads, new, dim] behind each row's length; returns everything up to the longest row."""
        owner = self._owner
        data = owner.reserve(key_states)
        keys, values = data[2 * self._index], data[2 * self._index + 1]
        # Under autocast a model that normalises keys gives them in more bits than values.
        value_states = value_states.to(values.dtype)
        if key_states.shape[2] == 1:
            keys[owner.rows, :, owner.lengths] = key_states[:, :, 0]
            values[owner.rows, :, owner.lengths] = value_states[:, :, 0]
        else:
            position = owner.lengths[:, None] + torch.arange(key_states.shape[2], device=key_states.device)
            keys[owner.rows[:, None], :, position] = key_states.transpose(1, 2)
            values[owner.rows[:, None], :, position] = value_states.transpose(1, 2)
        return keys[:, :, : owner.width], values[:, :, : owner.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: masks are given in four dimensions."""
        return self._owner.width, 0

    def get_seq_length(self) -> int:
        """Unused: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


class RaggedCache(Cache):
    """Keys and values of a batch of rows.

    Args:
        num_layers: Layers of the model.
        lengths: Tokens held by each row, int64 [rows].
        capacity: Positions to reserve for each row.
        max_length: Positions that the model knows.

    Attributes:
        data: Float [2 * layers, rows, heads, capacity, dim]: keys of layer l at 2l, values at 2l + 1. `None` before the first
            forward pass if nothing was laid in.
        width: Keys that the next forward pass may attend to; set by `prepare`.
    """

    def __init__(self, num_layers: int, lengths: torch.Tensor, capacity: int, max_length: int):
        super().__init__(layers=[_RaggedLayer(self, index) for index in range(num_layers)])
        self.lengths = lengths
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.capacity = capacity
        self.max_length = max_length
        self.width = 0
        self.data: torch.Tensor | None = None

    def reserve(self, like: torch.Tensor) -> torch.Tensor:
        """Returns the buffer, allocating it in the shape of [rows, heads, _, dim] if there is none yet."""
        if self.data is None:
            rows, heads, _, dim = like.shape
            shape = (2 * len(self.layers), rows, heads, self.capacity, dim)
            # Zeros, not uninitialised memory: a masked position is multiplied by a probability of 0, and 0 * NaN is NaN.
            self.data = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.data

    def part(self, start: int, stop: int) -> RaggedCache:
        """Returns the rows [start, stop) as a cache of their own, on the same memory; lengths are not written back."""
        return _Part(self, start, stop)

    def lay(self, row: int, start: int, segment: torch.Tensor) -> None:
        """Copies a stored segment, float [2 * layers, heads, n, dim], into a row from position `start`."""
        if self.data is None:
            self.reserve(segment.new_empty(len(self.lengths), segment.shape[1], 1, segment.shape[3]))
        assert self.data is not None
        self.data[:, row, :, start : start + segment.shape[2]] = segment

    def cut(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Returns a copy of a row's positions [start, stop), float [2 * layers, heads, stop - start, dim]."""
        assert self.data is not None
        return self.data[:, row, :, start:stop].clone()

    def prepare(
        self, new: int, dtype: torch.dtype, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns masks and positions for `new` tokens a row, at most.

        Args:
            new: Tokens a row.
            dtype: Of the model.
            window: Keys that a layer with sliding attention sees, the token's own included; `None` for all.

        Returns:
            Masks [rows, 1, new, width] in full and within the window, and positions int64 [rows, new]. The masks are added to
            the scores (0: attend), which every attention function of transformers takes; a boolean one only SDPA does, and it
            makes this one of it again in every layer.
        """
        position = self.lengths[:, None] + torch.arange(new, device=self.lengths.device)
        self.width = int(self.lengths.max()) + new
        key = torch.arange(self.width, device=self.lengths.device)
        mask = key <= position[:, :, None]
        near = mask if window is None else mask & (key > position[:, :, None] - window)
        # Only padding comes to lie further back; where does not matter, but a learned embedding has
        # to have the position.
        full = _added(mask, dtype)
        return full, full if window is None else _added(near, dtype), position.clamp(max=self.max_length - 1)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps (or repeats) the given rows, in their order."""
        assert self.data is not None
        self.data = self.data.index_select(1, rows)
        self.lengths = self.lengths.index_select(0, rows)
        self.rows = torch.arange(len(rows), device=rows.device)

    def drop(self, ended: Sequence[int]) -> list[int]:
        """Drops rows; the last ones that stay move into their places, so that little is copied.

        Returns:
            Which row each one that is left was.
        """
        assert self.data is not None
        gone, left, longest = set(ended), len(self.lengths) - len(ended), int(self.lengths.max())
        was = list(range(left))
        movers = (row for row in range(left, len(self.lengths)) if row not in gone)
        for gap, row in zip((g for g in sorted(gone) if g < left), movers, strict=True):
            was[gap] = row
            self.data[:, gap, :, :longest] = self.data[:, row, :, :longest]
        self.data = self.data[:, :left]
        self.lengths = self.lengths[torch.tensor(was, dtype=torch.int64, device=self.lengths.device)]
        self.rows = self.rows[:left]
        return was


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns what is added to the scores so that a token attends where a mask, bool [rows, new, width], is true."""
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


class _Part(RaggedCache):
    """Some rows of another cache."""

    def __init__(self, whole: RaggedCache, start: int, stop: int):
        super().__init__(len(whole.layers), whole.lengths[start:stop], whole.capacity, whole.max_length)
        self._whole, self._start, self._stop = whole, start, stop

    def reserve(self, like: torch.Tensor) -> torch.Tensor:
        if self.data is None:
            rows = like.new_empty(len(self._whole.lengths), like.shape[1], 1, like.shape[3])
            self.data = self._whole.reserve(rows)[:, self._start : self._stop]
        return self.data


def similar(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows that are computed together.

    Args:
        counts: New tokens of each row, falling.
    """
    start, tokens = 0, 0
    for row, count in enumerate(counts):
        empty = counts[start] * (row + 1 - start) - tokens - count
        if empty > max(EMPTY_PLACES, EMPTY_SHARE * (tokens + count)):
            yield start, row
            start, tokens = row, 0
        tokens += count
    yield start, len(counts)
