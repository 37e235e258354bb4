"""What a batch cost, counted the same way for every method.

Invariant: counters only grow; comparing two methods means comparing two ledgers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields


@dataclass
class Ledger:
    """Counters of one batch or one run (docs/algorithm.md, section 6).

    Attributes:
        root_rollouts: Rollouts from prompts to terminals.
        continuations: Rollouts from inner prefixes to terminals.
        leftover_roots: Those of `root_rollouts` that were planned as continuations and found no prefix.
        unspent: Rollouts of the budget that no anchor could take, or that the allocator left.
        root_waves: Waves in which the root stage was spent.
        prefix_waves: Most waves in which a prompt's continuations were spent.
        outcome_stops: Prompts whose number of rollouts was decided in view of their own outcomes (optional stopping).
        filtered_prompts: Prompts that were sampled and then left out of the loss.
        fallbacks: Times that the allocator fell back to a uniform allocation because a predictor failed.
        generated_tokens: Tokens sampled.
        prefilled_tokens: Context tokens computed.
        cached_tokens: Context tokens whose keys and values were reused instead.
        model_calls: Batched calls of the policy.
        environment_turns: Steps of environments.
        tool_calls: Well-formed tool calls among them.
        restores: Snapshots restored.
        replayed_turns: Environment turns repeated only to restore a state.
        timeouts: Environment turns that were given up because no answer came in time.
        unacted: Rollouts that ended because the policy had no action: no room in its context, or no answer of its engine.
        seconds: Wall-clock by phase, in seconds; never part of a comparison between runs.
    """

    root_rollouts: int = 0
    continuations: int = 0
    leftover_roots: int = 0
    unspent: int = 0
    root_waves: int = 0
    prefix_waves: int = 0
    outcome_stops: int = 0
    filtered_prompts: int = 0
    fallbacks: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    model_calls: int = 0
    environment_turns: int = 0
    tool_calls: int = 0
    restores: int = 0
    replayed_turns: int = 0
    timeouts: int = 0
    unacted: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Returns the counters without wall-clock."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seconds"}

    def add(self, other: Ledger) -> None:
        """Adds another ledger's counts and seconds to this one."""
        for name, value in other.counts().items():
            setattr(self, name, getattr(self, name) + value)
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def timed(self, phase: str) -> Timer:
        """Adds the time spent inside a `with` to a phase."""
        return Timer(self.seconds, phase)


class Timer:
    """A `with` that adds the time spent inside to `seconds[phase]`; a class, since a generator takes longer to enter."""

    __slots__ = ("_phase", "_seconds", "_start")

    def __init__(self, seconds: dict[str, float], phase: str):
        self._seconds, self._phase, self._start = seconds, phase, 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        spent = time.perf_counter() - self._start
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent
