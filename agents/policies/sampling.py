"""How actions are sampled, the same for every engine.

Invariant: log-probs in a `Sample` are those of the distribution that these settings describe.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of a policy.

    Attributes:
        max_new_tokens: Token limit of one action.
        temperature: 0 is greedy.
        top_p: Share of the probability that is kept, the likeliest tokens first; 1 keeps all.
        top_k: Number of tokens that are kept, the likeliest first; 0 keeps all.
        stop: Strings that end an action as soon as its text holds one of them, such as `</tool_call>`; the tokens that complete
            it belong to the action.
        max_context: Most tokens of an episode, prompt, actions and observations together; `None` for what the model can take.
            An episode that has no room left for an action ends as truncated.
        seed: Seeds the sampling.

    Raises:
        ValueError: A setting is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    max_context: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if self.max_context is not None and self.max_context < 1:
            raise ValueError(f"max_context must be at least 1, got {self.max_context}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be a sequence of strings that are not empty, got {self.stop!r}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens that the model could say are never sampled, so that a learner scores another distribution."""
        return self.top_p < 1 or self.top_k > 0
