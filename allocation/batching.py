"""Between a batch and its slots: actions taken apart, observations put together, values kept.

Invariant: what is kept or handed out shares no memory with what the caller or an environment may use again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from trace_envs.slots.environment import copied_observation
from trace_envs.snapshots.adapters.kinds import ATOMS

_ARRAY = {np.ndarray}


def value(thing: Any) -> Any:
    """Returns an action or observation as a value: arrays are copied, whatever is immutable is not."""
    return thing if type(thing) in ATOMS else copied_observation(thing)


def single_actions(actions: Any, batched: gym.Space, num_envs: int) -> list[Any]:
    """Takes a batch of actions apart.

    Args:
        actions: A list with one action for each slot, or a batch as `batched.sample()` gives it: rows of an array, a
            dictionary of arrays, a tuple of arrays (or of single actions, where those cannot be stacked: text).
        batched: The batched action space.
        num_envs: Number of slots.

    Raises:
        ValueError: It is neither, or not one action for each slot.
    """
    if isinstance(actions, list):
        items = actions
    elif isinstance(actions, tuple) and not isinstance(batched, gym.spaces.Tuple):
        items = list(actions)
    else:
        try:
            if isinstance(actions, str):
                raise TypeError("a text is one action")
            items = list(iterate(batched, actions))
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"the actions are no batch of {batched} ({type(error).__name__}: {error}); give what "
                f"envs.action_space.sample() gives, or a list with one action for each slot"
            ) from error
    if len(items) != num_envs:
        raise ValueError(f"expected {num_envs} actions, one for each slot, got {len(items)}")
    return items


def placeholder(space: gym.Space) -> Any:
    """Returns what an idle slot shows: zeros, or the empty text; of a space that Gymnasium cannot batch, any element."""
    if isinstance(space, gym.spaces.Dict):
        return {key: placeholder(part) for key, part in space.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(map(placeholder, space))
    blank: Any = create_empty_array(space, n=1)
    if blank is None:
        own = copy.deepcopy(space)  # whoever uses the space is not to find its generator moved
        own.seed(0)
        return own.sample()
    return next(iter(iterate(batch_space(space, 1), blank)))


def batch_observations(items: Sequence[Any], space: gym.Space) -> Any:
    """Puts the observations of all slots together, in memory of their own.

    Raises:
        ValueError: An observation does not fit the space; the message names the slot.
    """
    try:
        if isinstance(space, gym.spaces.Box) and space.shape:
            # What `concatenate` does, without its work for each item: this is in every step.
            if {*map(type, items)} != _ARRAY and not all(isinstance(item, np.ndarray) for item in items):
                items = [np.asarray(item, space.dtype) for item in items]
            # The other lengths `np.concatenate` compares itself.
            if {*map(len, items)} != {space.shape[0]}:
                raise ValueError("an observation has another shape than the space")
            batch = np.empty((len(items), *space.shape), space.dtype)
            np.concatenate(items, out=batch.reshape(-1, *space.shape[1:]))
            return batch
        empty: Any = create_empty_array(space, n=len(items))
        return concatenate(space, items, empty)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        for slot, item in enumerate(items):
            if item not in space:
                raise ValueError(
                    f"the observation of slot {slot} does not fit the environment's observation_space {space}: got "
                    f"{_describe(item)}; an environment must keep to the space that it declared"
                ) from error
        raise


def _describe(item: Any) -> str:
    if isinstance(item, np.ndarray):
        return f"an array of shape {item.shape} and dtype {item.dtype}"
    return f"{type(item).__name__} {item!r:.80}"
