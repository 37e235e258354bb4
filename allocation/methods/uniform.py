"""GRPO's sampling: the same group of rollouts for every prompt.

Invariant: nothing is learned and nothing is looked at; every candidate is sampled.
"""

from __future__ import annotations

from allocation.methods.base import Allocator
from allocation.settings import check_whole


class UniformAllocator(Allocator):
    """`grpo` (DeepSeekMath, arXiv 2402.03300): a fixed group of rollouts for every prompt, none from prefixes.

    Args:
        group_size: Rollouts for each prompt.

    Raises:
        ValueError: It is no whole number, or less than 1.
    """

    name = "grpo"

    def __init__(self, group_size: int = 8):
        check_whole(group_size=group_size)
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.group_size = group_size

    def pool_size(self, budget: int) -> int:
        """As many prompts as groups fit into the budget."""
        return max(1, budget // self.group_size)
