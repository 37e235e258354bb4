"""The state of Gymnasium wrappers: what of a wrapper belongs to the moment.

Invariant: a wrapper whose state is not known is refused by name; nothing is ever restored by halves.
"""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym

from trace_envs.snapshots.record import SnapshotUnsupportedError

# Mutable attributes of Gymnasium's own wrappers that belong to an episode. A wrapper class that is not listed may hold no
# mutable state of its own beyond what every wrapper has.
_WRAPPER_STATE: dict[str, tuple[str, ...]] = {
    "TimeLimit": ("_elapsed_steps",),
    "OrderEnforcing": ("_has_reset",),
    "PassiveEnvChecker": (),
    "RecordEpisodeStatistics": (
        "episode_count",
        "episode_start_time",
        "episode_returns",
        "episode_lengths",
        "time_queue",
        "return_queue",
        "length_queue",
    ),
    "TransformObservation": (),
    "TransformReward": (),
    "TransformAction": (),
    "FilterObservation": (),
    "FlattenObservation": (),
}

# The checker looks at the first calls after it was made, and keeps what they returned in order to compare it with the
# next. A restored environment has had its first calls.
_CHECKED = {"checked_reset": True, "checked_step": True, "checked_data_reuse": True, "_previous_data": None}


def wrapper_state(wrapper: gym.Wrapper) -> tuple[str, dict[str, Any]]:
    """Returns the class name of a wrapper and what of it belongs to the moment.

    Raises:
        SnapshotUnsupportedError: The wrapper's state cannot be carried.
    """
    name = type(wrapper).__name__
    if name not in _WRAPPER_STATE or not type(wrapper).__module__.startswith("gymnasium."):
        raise SnapshotUnsupportedError(
            f"the wrapper {type(wrapper).__module__}.{name} may hold state that a snapshot would lose; remove it from the "
            f"stack, or snapshot the environment inside it (env.unwrapped)"
        )
    if name == "PassiveEnvChecker":
        return name, _CHECKED
    return name, {attribute: copy.copy(getattr(wrapper, attribute)) for attribute in _WRAPPER_STATE[name]}


def restore_wrapper(wrapper: gym.Wrapper, state: dict[str, Any]) -> None:
    """Puts a wrapper back to what `wrapper_state` returned."""
    for name, value in state.items():
        setattr(wrapper, name, copy.copy(value))


def turns_and_return(wrappers: list[gym.Wrapper]) -> tuple[int | None, float | None]:
    """Returns what the wrappers of a stack know of the episode: turns taken and return so far, `None` where none does."""
    turn = total = None
    for wrapper in wrappers:
        if isinstance(wrapper, gym.wrappers.TimeLimit):
            turn = wrapper._elapsed_steps
        elif isinstance(wrapper, gym.wrappers.RecordEpisodeStatistics):
            turn, total = wrapper.episode_lengths, float(wrapper.episode_returns)
    return turn, total
