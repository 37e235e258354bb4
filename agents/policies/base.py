"""What a policy is: it is given prefixes and returns one action for each.

Invariant: a policy never changes a tree; what it computed travels in the `Sample` that it returns. A prefix that it has no
action for gets a `Sample` that says why (`Sample.acted`), never an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from allocation import Context, Forest, Sample, TreeAllocationWrapper


class Policy(Protocol):
    """Acts on a batch of prefixes."""

    def act(self, contexts: Sequence[Context]) -> list[Sample]:
        """Returns one sampled action for each context, in order."""
        ...


class TrainablePolicy(Policy, Protocol):
    """What a trainer asks of a policy besides actions.

    Attributes:
        gives_features: Whether samples carry hidden states and `encode` works.
        version: Updates that the weights have seen which it samples with; every sample carries it.
    """

    gives_features: bool
    version: int

    def encode(self, contexts: Sequence[Context]) -> tuple[np.ndarray, int]:
        """Returns the hidden state at the end of each context, float32 [n, d], and the number of tokens computed.

        Raises:
            NotImplementedError: The engine gives no hidden states.
        """
        ...

    def sync(self, model: Any, version: int) -> dict[str, float]:
        """Takes over weights that have changed, and forgets every key and value that others gave.

        Args:
            model: The learner's model.
            version: Updates that it has seen.

        Returns:
            Figures for the log, such as `engine/moved`.
        """
        ...

    def sibling(self, *, seed: int, temperature: float | None = None) -> TrainablePolicy:
        """Returns a policy on the same weights with a random stream (and, if it is given, a temperature) of its own."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next sample depends on besides the weights and the seed."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; its siblings end with it."""
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
