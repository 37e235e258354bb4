"""Rollouts that end although their environment gave no answer: it took too long, or the policy had no action for it.

Invariant: such an end is truncated, worth nothing, and nobody is asked for a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from allocation.sample import UNACTED, Sample
from trace_envs.slots import Result

if TYPE_CHECKING:
    from allocation.collection import Rollout


class Ended(dict[str, Any]):
    """The info of a step that was not taken, or given up: what was known before, and the end."""


def end_without_answer(rollout: Rollout, components: Mapping[str, float], note: str) -> Result:
    """Returns what stands for a step's result.

    Args:
        rollout: Where it has got to.
        components: Of the outcome; they say why it ended.
        note: The last observation, where observations are text; otherwise the last one stays.
    """
    observation = note if isinstance(rollout.observation, str) else rollout.observation
    info = Ended(rollout.info, is_correct=False, tool_error=False, reward_components=dict(components))
    return Result(observation, 0.0, False, True, info, None)


def end_without_action(rollout: Rollout, sample: Sample) -> Result:
    """Returns what stands for a step's result where the policy has no action (`Sample.acted` is false)."""
    return end_without_answer(rollout, UNACTED[sample.finish_reason], sample.note)
