"""What the generators draw with and what they make.

Invariant: whatever is random comes from the generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from trace_envs.math_reasoning.records import Step

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem without its name; attributes as for `MathTask`.

    Attributes:
        essence: What makes it this problem, whatever the names in it.
    """

    prompt: str
    answer: str
    steps: tuple[Step, ...]
    essence: str
    numbers: tuple[int, ...] = ()
    target: int | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Draws numbers, choices and names.

    Attributes:
        rng: The source.
        words: Names to draw from.
        used: Names drawn already; none comes twice.
    """

    rng: np.random.Generator
    words: Sequence[str]
    used: set[str] = field(default_factory=set)

    def number(self, low: int, high: int) -> int:
        """Returns a whole number from `low` to `high`, the latter included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, choices: Sequence[T]) -> T:
        """Returns one of the choices."""
        return choices[int(self.rng.integers(len(choices)))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Returns the items in random order."""
        return [items[int(i)] for i in self.rng.permutation(len(items))]

    def name(self) -> str:
        """Returns a new name."""
        while (word := self.words[int(self.rng.integers(len(self.words)))]) in self.used:
            pass
        self.used.add(word)
        return word


def calculate(expression: str, thought: str = "") -> Step:
    """Returns a call of the calculator."""
    return Step(thought, "calculator", expression)
