"""Where a sampling budget goes: trees of rollouts, allocators, and the wrapper that collects them."""

from allocation.allocators import ALLOCATORS, TraceAllocator, TraceConfig, UniformAllocator, make_allocator
from allocation.collection import Context
from allocation.ledger import Ledger
from allocation.predictor import Predictor
from allocation.predictors import PREDICTORS, HiddenStatePredictor, MeanPredictor, make_predictor
from allocation.runner import AsyncRunner, RolloutError
from allocation.tree import Forest, Node, Root, Sample, Tree
from allocation.verify import ForestVerificationError
from allocation.wrapper import TreeAllocationWrapper

__all__ = [
    "ALLOCATORS",
    "PREDICTORS",
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
    "make_predictor",
]
