"""Allocators by name.

Invariant: a method is known under one name, that of its class; adding one is a class and an entry of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable

from allocation.methods.adaptive import DAPOAllocator, ReinforceAdaAllocator
from allocation.methods.base import Allocator
from allocation.methods.branching import ARPOAllocator, TreeGRPOAllocator, TreePOAllocator
from allocation.methods.curriculum import MoPPSAllocator, PCLAllocator, VIPAllocator
from allocation.methods.oracle import OracleAllocator
from allocation.methods.trace import TraceAllocator, TracePlusAllocator
from allocation.methods.trace_config import TraceConfig, TracePlusConfig
from allocation.methods.uniform import UniformAllocator
from allocation.predictor import Predictor
from allocation.predictors import HiddenStatePredictor

__all__ = [
    "ALLOCATORS",
    "METHODS",
    "Allocator",
    "TraceAllocator",
    "TraceConfig",
    "TracePlusConfig",
    "UniformAllocator",
    "make_allocator",
]

Factory = Callable[[Predictor, int, TraceConfig | None], Allocator]

METHODS: dict[str, Factory] = {
    "grpo": lambda predictor, group_size, config: UniformAllocator(group_size),
    "dapo": lambda predictor, group_size, config: DAPOAllocator(group_size),
    "pcl": lambda predictor, group_size, config: PCLAllocator(predictor, group_size),
    "mopps": lambda predictor, group_size, config: MoPPSAllocator(group_size),
    "reinforce_ada": lambda predictor, group_size, config: ReinforceAdaAllocator(group_size),
    "vip": lambda predictor, group_size, config: VIPAllocator(predictor, group_size),
    "treepo": lambda predictor, group_size, config: TreePOAllocator(group_size),
    "tree_grpo": lambda predictor, group_size, config: TreeGRPOAllocator(group_size),
    "arpo": lambda predictor, group_size, config: ARPOAllocator(group_size),
    "trace": lambda predictor, group_size, config: TraceAllocator(predictor, config),
    "trace_plus": lambda predictor, group_size, config: TracePlusAllocator(predictor, config),
    "oracle": lambda predictor, group_size, config: OracleAllocator(predictor, config),
}
"""Makes a method from a predictor, the size of a group and the settings of `trace`; each takes what it needs."""

ALLOCATORS: tuple[str, ...] = tuple(name for name in METHODS if name != OracleAllocator.name)
"""Names of all methods that a run can have; `oracle` needs to be told true values."""


def make_allocator(
    name: str, *, predictor: Predictor | None = None, group_size: int = 8, config: TraceConfig | None = None
) -> Allocator:
    """Returns an allocator by name.

    Args:
        name: One of `METHODS`.
        predictor: For methods that need one; the default knows counts alone, no hidden states. `oracle` needs `TrueValues`.
        group_size: Rollouts of a prompt, for methods with groups of a fixed size.
        config: Of the methods that are compositions of TRACE's parts; `trace_plus` takes a `TracePlusConfig`.

    Raises:
        ValueError: The name is unknown, or the method cannot do with the predictor or the config.
    """
    if isinstance(predictor, str):
        raise ValueError(f"predictor must be an object, such as make_predictor({predictor!r}), got a name")
    if name not in METHODS:
        raise ValueError(f"unknown allocator {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name](predictor or HiddenStatePredictor(0), group_size, config)
