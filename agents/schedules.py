"""Step sizes over a run.

Invariant: the factor on the step sizes is a function of the number of updates that are done and of settings, so that a run
that goes on from a checkpoint needs no schedule's state.
"""

from __future__ import annotations

import math


def lr_factor(schedule: str, done: int, updates: int, warmup: int) -> float:
    """Returns the factor on all step sizes of the next update, in [0, 1].

    It rises over the first `warmup` updates and falls over the whole run: one batch says little about the gradient, so the
    last updates must be small for the noise of the first to average out.

    Args:
        schedule: `linear` or `cosine` (both fall to zero behind the last update), or `constant`.
        done: Updates done.
        updates: Updates of the whole run.
        warmup: Updates over which step sizes rise; the first one has a share of 1 / warmup.

    Raises:
        ValueError: The schedule is unknown.
    """
    rise = min(1.0, (done + 1) / max(warmup, 1))
    left = 1 - min(done / max(updates, 1), 1.0)
    if schedule == "constant":
        return rise
    if schedule == "linear":
        return rise * left
    if schedule == "cosine":
        return rise * 0.5 * (1 - math.cos(math.pi * left))
    raise ValueError(f"unknown lr_schedule {schedule!r}; known: linear, cosine, constant")
