"""Where a sampling budget goes: trees of rollouts, allocators, and the wrapper that collects them."""

from allocation.allocators import ALLOCATORS, METHODS, make_allocator
from allocation.collection import Context
from allocation.ledger import Ledger
from allocation.methods.base import Allocator
from allocation.methods.trace import TraceAllocator, TracePlusAllocator
from allocation.methods.trace_config import TraceConfig, TracePlusConfig
from allocation.methods.uniform import UniformAllocator
from allocation.predictor import Predictor
from allocation.predictors import PREDICTORS, HiddenStatePredictor, MeanPredictor, make_predictor
from allocation.runner import AsyncRunner, RolloutError
from allocation.sample import Sample
from allocation.tree import Forest, Node, Root, Tree
from allocation.verify import ForestVerificationError
from allocation.wrapper import TreeAllocationWrapper

__all__ = [
    "ALLOCATORS",
    "METHODS",
    "PREDICTORS",
    "Allocator",
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
    "TracePlusAllocator",
    "TracePlusConfig",
    "Tree",
    "TreeAllocationWrapper",
    "UniformAllocator",
    "make_allocator",
    "make_predictor",
]
