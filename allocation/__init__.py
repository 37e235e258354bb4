"""Where a sampling budget goes: trees of rollouts, allocators, and the wrapper that collects them."""

from allocation.allocators import ALLOCATORS, TraceAllocator, TraceConfig, UniformAllocator, make_allocator
from allocation.collection import Context
from allocation.ledger import Ledger
from allocation.predictor import HiddenStatePredictor, MeanPredictor, Predictor
from allocation.runner import AsyncRunner, RolloutError
from allocation.tree import Forest, Node, Root, Sample, Tree
from allocation.verify import ForestVerificationError
from allocation.wrapper import TreeAllocationWrapper

__all__ = [
    "ALLOCATORS",
    "AsyncRunner",
    "Context",
    "Forest",
    "ForestVerificationError",
    "HiddenStatePredictor",
    "Ledger",
    "MeanPredictor",
    "Node",
    "Predictor",
    "RolloutError",
    "Root",
    "Sample",
    "TraceAllocator",
    "TraceConfig",
    "Tree",
    "TreeAllocationWrapper",
    "UniformAllocator",
    "make_allocator",
]
