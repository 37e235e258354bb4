"""The memory that a predictor learns from.

Invariant: it holds the latest `capacity` rows and no more; a row drawn is `decay` times as likely for each policy update
since it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from allocation.contrast import FloatArray
from allocation.roots import IntArray


class Replay:
    """Rows of inputs with targets, weights and ages.

    Args:
        capacity: Rows kept.
        decay: Factor in (0, 1] on a row's chance to be drawn, for each policy update since it was made.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, capacity: int, decay: float):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 row, got {capacity}")
        if not 0 < decay <= 1:
            raise ValueError(f"the decay of rows must lie in (0, 1], got {decay}")
        self.capacity, self.decay = capacity, decay
        self.columns: tuple[np.ndarray, ...] = ()
        self.target = np.zeros(0, np.float32)
        self.weight = np.zeros(0, np.float32)
        self.made = np.zeros(0, np.int64)
        self._chance: FloatArray = np.zeros(0)

    def __len__(self) -> int:
        return len(self.target)

    def add(self, columns: Sequence[np.ndarray], target: np.ndarray, weight: np.ndarray, clock: int) -> None:
        """Adds rows made now, and ages all others.

        Args:
            columns: Inputs, each an array with one entry a row.
            target: float32 [n].
            weight: float32 [n].
            clock: Policy updates so far; it must not fall.
        """

        def joined(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            return np.concatenate([old, new])[-self.capacity :]

        if len(target):
            self.columns = tuple(
                joined(old, new) for old, new in zip(self.columns or [c[:0] for c in columns], columns, strict=True)
            )
            self.target, self.weight = joined(self.target, target), joined(self.weight, weight)
            self.made = joined(self.made, np.full(len(target), clock, np.int64))
        self._age(clock)

    def _age(self, clock: int) -> None:
        self._chance = np.cumsum(self.decay ** (clock - self.made)) if len(self) else np.zeros(0)

    def draw(self, rng: np.random.Generator, count: int) -> IntArray:
        """Returns the positions of `count` rows, drawn with replacement by age, int64 [count]; none if it is empty."""
        if not len(self):
            return np.zeros(0, np.int64)
        where = np.searchsorted(self._chance, rng.random(count) * self._chance[-1], side="right")
        return np.minimum(where, len(self) - 1)

    def weights(self, clock: int) -> FloatArray:
        """Returns what each row counts at a time: its weight, times `decay` for each policy update since; float64 [n]."""
        return self.weight * self.decay ** (clock - self.made)

    def mean_age(self, clock: int) -> float:
        """Returns the mean age, in policy updates, of the rows that are drawn; 0 if it is empty."""
        if not len(self):
            return 0.0
        return float(np.average(clock - self.made, weights=self.decay ** (clock - self.made)))

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows. The arrays are never written into, so they are no copies."""
        return {
            "columns": {str(i): column for i, column in enumerate(self.columns)},
            "target": self.target,
            "weight": self.weight,
            "made": self.made,
        }

    def load_state_dict(self, state: dict[str, Any], clock: int) -> None:
        """Restores what `state_dict` gave, at that time."""
        columns = state["columns"]
        self.columns = tuple(np.asarray(columns[str(i)]) for i in range(len(columns)))
        self.target, self.weight, self.made = (np.asarray(state[k]) for k in ("target", "weight", "made"))
        self._age(clock)
