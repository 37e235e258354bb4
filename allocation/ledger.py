"""What a batch cost, counted the same way for every method.

Invariant: counters only grow; comparing two methods means comparing two ledgers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields


@dataclass
class Ledger:
    """Counters of one batch or one run (docs/algorithm.md, section 6).

    Attributes:
        root_rollouts: Rollouts from prompts to terminals.
        continuations: Rollouts from inner prefixes to terminals.
        leftover_roots: Those of `root_rollouts` that were planned as continuations and found no prefix.
        unspent: Rollouts of the budget that no anchor could take.
        generated_tokens: Tokens sampled.
        prefilled_tokens: Context tokens computed.
        cached_tokens: Context tokens whose keys and values were reused instead.
        model_calls: Batched calls of the policy.
        environment_turns: Steps of environments.
        tool_calls: Well-formed tool calls among them.
        restores: Snapshots restored.
        replayed_turns: Environment turns repeated only to restore a state.
        seconds: Wall-clock by phase, in seconds; never part of a comparison between runs.
    """

    root_rollouts: int = 0
    continuations: int = 0
    leftover_roots: int = 0
    unspent: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    model_calls: int = 0
    environment_turns: int = 0
    tool_calls: int = 0
    restores: int = 0
    replayed_turns: int = 0
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

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
