"""Checks of arguments that users give.

Invariant: each check returns the value or raises one sentence that names the argument, what was expected and what came.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def integer(name: str, value: Any, least: int | None = None) -> int:
    """Returns an integer (Python's or NumPy's) that is at least `least`.

    Raises:
        TypeError: It is no integer.
        ValueError: It is too small.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r:.60} ({type(value).__name__})")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def number(name: str, value: Any) -> float:
    """Returns a number as a float.

    Raises:
        TypeError: It is no number.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {value!r:.60} ({type(value).__name__})")
    return float(value)


def random_seed(value: Any) -> int | None:
    """Returns a seed: a non-negative integer, or `None`.

    Raises:
        TypeError: It is neither.
        ValueError: It is negative.
    """
    if value is None:
        return None
    seed = integer("seed", value)
    if seed < 0:
        raise ValueError(f"seed must be a non-negative integer or None, got {seed}")
    return seed
