"""What a policy is: it is given prefixes and returns one action for each.

Invariant: a policy never changes a tree; what it computed travels in the `Sample` that it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from allocation import Context, Forest, Sample, TreeAllocationWrapper


class Policy(Protocol):
    """Acts on a batch of prefixes."""

    def act(self, contexts: Sequence[Context]) -> list[Sample]:
        """Returns one sampled action for each context, in order."""
        ...


def collect(
    envs: TreeAllocationWrapper, policy: Policy, *, seed: int | None = None, roots: Sequence | None = None
) -> Forest:
    """Runs a policy until the wrapper's budget is spent.

    Args:
        envs: The wrapped vector of environments.
        policy: Acts on every active slot at once.
        seed: Passed to `reset`.
        roots: Candidate prompts; `None` lets the wrapper draw them.

    Returns:
        The finished forest.
    """
    envs.reset(seed=seed, options=None if roots is None else {"roots": roots})
    ledger = envs.forest.ledger
    while envs.active.any():
        contexts = envs.contexts()
        with ledger.timed("generate"):
            sampled = policy.act(contexts)
        ledger.model_calls += 1
        actions: list[str] = [""] * envs.num_envs
        samples: list[Sample | None] = [None] * envs.num_envs
        for context, sample in zip(contexts, sampled, strict=True):
            actions[context.slot], samples[context.slot] = sample.text, sample
        with ledger.timed("step"):
            envs.advance(actions, samples)
    return envs.forest
