"""Settings of the wrong type, refused in one sentence where they are given.

Invariant: what passes is of the type that the arithmetic after it needs; nothing is converted, and ranges are left to others.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def check_whole(**settings: Any) -> None:
    """Refuses settings that are not whole numbers; 8.0 and `True` are none.

    Args:
        **settings: Values by name.

    Raises:
        ValueError: One is not; it is named.
    """
    for name, value in settings.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_numbers(**settings: Any) -> None:
    """Refuses settings that are not real numbers; `True` and "8" are none. NaN and infinities pass: they are out of range.

    Args:
        **settings: Values by name.

    Raises:
        ValueError: One is not; it is named.
    """
    for name, value in settings.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r}")


def check_flags(**settings: Any) -> None:
    """Refuses settings that are neither `True` nor `False`: "no" would count as true.

    Args:
        **settings: Values by name.

    Raises:
        ValueError: One is not; it is named.
    """
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
