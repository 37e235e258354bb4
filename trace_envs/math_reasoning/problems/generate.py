"""Makes a problem of a given kind and level.

Invariant: a problem is a function of the seed, the split, the kind, the level and its number; no problem of one split occurs in
another, in whatever words. The way that comes with it solves it.

    level   word        countdown   modular                  linear
    1       1 step      2 numbers   one operation            x + a = b, a x = b
    2       2 steps     3           two operations           a x + b = c
    3       3 steps     3, larger   a power                  a x + b = c x + d
    4       4 steps     4           a x = b (mod m)          a (x + b) = c (x + d)
    5       5 steps     5           two congruences          as 3, with a fraction for an answer
    6       6 steps     6           counting of solutions    two unknowns
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from trace_envs.math_reasoning.problems.countdown import countdown_problem
from trace_envs.math_reasoning.problems.equations import linear_problem, modular_problem
from trace_envs.math_reasoning.problems.problem import Draw, Problem
from trace_envs.math_reasoning.problems.words import word_problem
from trace_envs.math_reasoning.records import MathTask
from trace_envs.multihop_qa.synthetic.names import split_words

VERSION = 1
"""Of the generators: another one makes other problems of the same names."""

CATEGORIES: Mapping[str, Callable[[Draw, int], Problem]] = {
    "word": word_problem,
    "countdown": countdown_problem,
    "modular": modular_problem,
    "linear": linear_problem,
}
SPLITS = ("train", "validation", "test")
LEVELS = (1, 2, 3, 4, 5, 6)
TASKS = {"train": 250, "validation": 25, "test": 25}
"""Problems of each kind and level."""
_SHARES = ("validation", "test", "train", "train", "train")


def make_problem(seed: int, split: str, category: str, level: int, number: int) -> MathTask:
    """Returns a problem."""
    rng = np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(category.encode()), level, number])
    while True:
        problem = CATEGORIES[category](Draw(rng, split_words(split)), level)
        # Each problem belongs to one split by what is in it, so the same numbers never come in two.
        if _SHARES[zlib.crc32(problem.essence.encode()) % len(_SHARES)] == split:
            return MathTask(
                f"{category}-{level}-{number}",
                problem.prompt,
                category,
                level,
                problem.answer,
                problem.steps,
                problem.numbers,
                problem.target,
            )


class GeneratedProblems:
    """Problems made as they are asked for.

    Args:
        categories: Kinds of problems.
        levels: Levels.
        split: `train`, `validation` or `test`.
        seed: Seed of the problems.

    Attributes:
        name: `synthetic`.
        digest: What tells these problems from others.
    """

    name = "synthetic"

    def __init__(self, categories: Sequence[str], levels: Sequence[int], split: str, seed: int):
        self._split, self._seed = split, seed
        self._ids = [f"{c}-{level}-{i}" for i in range(TASKS[split]) for level in levels for c in categories]
        self._known = frozenset(self._ids)
        self.digest = f"v{VERSION}/{split}/{seed}/{'+'.join(categories)}/{''.join(map(str, levels))}"
        self._make = lru_cache(maxsize=20_000)(self._problem)

    def task_ids(self) -> Sequence[str]:
        """Returns the ids in a fixed order."""
        return self._ids

    def task(self, task_id: str) -> MathTask:
        """Returns a problem.

        Raises:
            ValueError: There is none of that id.
        """
        if task_id not in self._known:
            raise ValueError(
                f"unknown task_id {task_id!r}; the {self._split} split has {self._ids[0]} to {self._ids[-1]}, see task_ids()"
            )
        return self._make(task_id)

    def _problem(self, task_id: str) -> MathTask:
        category, level, number = task_id.split("-")
        return make_problem(self._seed, self._split, category, int(level), int(number))


@lru_cache(maxsize=32)
def generated_problems(
    category: str | None, levels: tuple[int, ...] | None, split: str, seed: int
) -> GeneratedProblems:
    """Returns the problems for these arguments, one object for all environments.

    Raises:
        ValueError: The kind, a level or the split is unknown.
    """
    if category not in (None, "all", *CATEGORIES):
        raise ValueError(
            f"unknown category {category!r} of the synthetic problems; known: {', '.join(CATEGORIES)}, all"
        )
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the synthetic problems; known: {', '.join(SPLITS)}")
    for level in levels or ():
        if level not in LEVELS:
            raise ValueError(f"unknown level {level!r} of the synthetic problems; known: 1 to {LEVELS[-1]}")
    categories = tuple(CATEGORIES) if category in (None, "all") else (str(category),)
    return GeneratedProblems(categories, tuple(sorted(set(levels))) if levels else LEVELS, split, seed)
