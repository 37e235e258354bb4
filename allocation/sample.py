"""One action as a policy sampled it, or why there is none.

Invariant: ids and log-probs are the truth; whatever else is known of an action is derived from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TIMED_OUT = {"timed_out": 1.0}
"""Components of the outcome of a rollout that was ended because its environment did not answer in time."""
UNACTED: Mapping[str, Mapping[str, float]] = {
    "context": {"out_of_context": 1.0},
    "error": {"policy_error": 1.0},
}
"""Components of the outcome of a rollout that was ended because its policy had no action, by finish reason."""


@dataclass(slots=True)
class Sample:
    """One action as a policy sampled it; ids and log-probs are the truth, the text is derived.

    Attributes:
        text: What the environment is given.
        action_ids: Sampled token ids, int64 [n], the end-of-turn token included if it was sampled.
        logprobs: Log-probabilities under the sampling distribution, float32 [n], in nats.
        context_ids: Token ids that the policy was shown since the parent's action (the whole prompt at a root), int64 [c].
        features: Last hidden state at the end of the prefix, float32 [d], or `None` from an engine that gives none.
        finish_reason: `stop`; `length` when a token limit cut the action; or why there is no action at all: `context` (the
            prefix leaves no room for one) or `error` (the policy gave none). Without an action the environment is not
            stepped: the rollout ends there, truncated, as a failure.
        prefilled: Context tokens that were really computed for this call (the rest came from a cache).
        entropy: Mean entropy of the sampled positions, in nats; `None` where the engine gives none.
        version: Updates that the weights had seen which sampled this.
        generated: Tokens sampled, for engines that count them but give no ids; `None` to count `action_ids`.
        note: Why there is no action, in one sentence; the last observation of a rollout that ends so.
    """

    text: str
    action_ids: np.ndarray
    logprobs: np.ndarray
    context_ids: np.ndarray
    features: np.ndarray | None = None
    finish_reason: str = "stop"
    prefilled: int = 0
    entropy: float | None = None
    version: int = 0
    generated: int | None = None
    note: str = ""

    @property
    def acted(self) -> bool:
        """Whether there is an action to give to the environment."""
        return self.finish_reason not in UNACTED
