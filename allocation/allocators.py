"""Allocators by name.

Invariant: a method is known under one name, that of its class; adding one is a class and an entry of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable

from allocation.methods.base import Allocator
from allocation.methods.trace import TraceAllocator, TraceConfig
from allocation.methods.uniform import UniformAllocator
from allocation.predictor import HiddenStatePredictor, Predictor

__all__ = ["ALLOCATORS", "METHODS", "Allocator", "TraceAllocator", "TraceConfig", "UniformAllocator", "make_allocator"]

Factory = Callable[[Predictor, int, TraceConfig | None], Allocator]

METHODS: dict[str, Factory] = {
    "grpo": lambda predictor, group_size, config: UniformAllocator(group_size),
    "trace": lambda predictor, group_size, config: TraceAllocator(predictor, config),
}
"""Makes a method from a predictor, the size of a group and the settings of `trace`; each takes what it needs."""

ALLOCATORS: tuple[str, ...] = tuple(METHODS)
"""Names of all methods."""


def make_allocator(
    name: str, *, predictor: Predictor | None = None, group_size: int = 8, config: TraceConfig | None = None
) -> Allocator:
    """Returns an allocator by name.

    Args:
        name: One of `ALLOCATORS`.
        predictor: For methods that need one; the default knows counts alone, no hidden states.
        group_size: Rollouts of a prompt, for methods with groups of a fixed size.
        config: Of the methods that are compositions of TRACE's parts.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in METHODS:
        raise ValueError(f"unknown allocator {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name](predictor or HiddenStatePredictor(0), group_size, config)
