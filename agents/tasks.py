"""Which tasks a run meets: in training from a shuffled deck, in evaluation the first of each level.

Invariant: what is dealt is a function of the generator and of what was dealt before; both are in a run's checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator

from agents.evaluate import make_env
from allocation import Root
from trace_envs.env import ToolEnv


class TaskDeck:
    """Deals tasks in random order, each once before any comes again, and never one twice in one call.

    Args:
        task_ids: The tasks.
    """

    def __init__(self, task_ids: Sequence[str]):
        self._task_ids = list(task_ids)
        self._order = np.zeros(0, dtype=np.int64)

    def __call__(self, rng: np.random.Generator, count: int) -> list[Root]:
        """Returns the next `count` tasks, or all of them if there are fewer."""
        count = min(count, len(self._task_ids))
        if len(self._order) < count:
            fresh = rng.permutation(len(self._task_ids))
            # What this call still has from the last round comes late in the next one.
            again = np.isin(fresh, self._order)
            self._order = np.concatenate([self._order, fresh[~again], fresh[again]])
        taken, self._order = self._order[:count], self._order[count:]
        return [Root(int(rng.integers(2**31)), {"task_id": self._task_ids[i]}) for i in taken]

    def state_dict(self) -> dict[str, Any]:
        """Returns what is left of the deck."""
        return {"order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._order = np.asarray(state["order"], dtype=np.int64)


def env_class(env_id: str) -> type | None:
    """Returns the class of an environment, without making one; `None` if the id is unknown or stands for a function."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry = gym.spec(name).entry_point
        made: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    except (gym.error.Error, ImportError, AttributeError, ValueError):
        return None
    return made if inspect.isclass(made) else None


def level_name(env_id: str) -> str:
    """Returns what the levels of an environment's tasks count, in one word."""
    found = env_class(env_id)
    return found.level_name if found is not None and issubclass(found, ToolEnv) else "level"


def with_split(env_id: str, env_kwargs: dict[str, Any], split: str) -> dict[str, Any]:
    """Returns an environment's arguments with the split among them, where it knows splits at all."""
    found = env_class(env_id)
    known = found is None or "split" in inspect.signature(found.__init__).parameters  # type: ignore[misc]
    return {**env_kwargs, "split": split} if known else dict(env_kwargs)


def task_ids(env_id: str, env: gym.Env) -> list[str]:
    """Returns the ids of an environment's tasks.

    Raises:
        ValueError: It has no list of tasks.
    """
    bare: Any = env.unwrapped
    if not hasattr(bare, "task_ids"):
        raise ValueError(
            f"environment {env_id!r} has no task_ids(), the list of its tasks, which training and evaluation need"
        )
    return list(bare.task_ids())


def ids_by_level(env: ToolEnv) -> dict[int, list[str]]:
    """Returns the ids of an environment's tasks by level, each level's in the data set's order."""
    found: dict[int, list[str]] = {}
    for task_id in env.task_ids():
        level = env.level_of(env.pick_task(np.random.default_rng(0), task_id))
        found.setdefault(level, []).append(task_id)
    return found


def pool_of_levels(env_id: str, env: gym.Env, shares: Sequence[float]) -> list[str]:
    """Returns the largest pool of an environment's tasks in which the levels have given shares, in the data set's order.

    Args:
        env_id: What an error calls the environment.
        env: The environment.
        shares: Of the levels, from level 1 on; they are normalised. Empty for all tasks.

    Raises:
        ValueError: A level that has a share has no tasks.
    """
    ids, bare = task_ids(env_id, env), env.unwrapped
    if not shares:
        return ids
    by_level = ids_by_level(bare) if isinstance(bare, ToolEnv) else {0: ids}
    wanted = {level: share for level, share in enumerate(shares, 1) if share > 0}
    missing = [level for level in wanted if level not in by_level]
    if missing:
        known = ", ".join(map(str, sorted(by_level)))
        raise ValueError(
            f"train_levels: environment {env_id!r} has no tasks of level {missing[0]}; its levels are {known}"
        )
    scale = min(len(by_level[level]) / share for level, share in wanted.items())
    kept = {task_id for level, share in wanted.items() for task_id in by_level[level][: round(scale * share)]}
    return [task_id for task_id in ids if task_id in kept]


def eval_task_ids(env_id: str, env_kwargs: dict[str, Any], per_level: int) -> list[str]:
    """Returns the first `per_level` tasks of each level (all tasks if it is 0), in the data set's order."""
    with contextlib.closing(make_env(env_id, env_kwargs)) as made:
        env: Any = made.unwrapped
        ids = task_ids(env_id, made)
        if not per_level or not isinstance(env, ToolEnv):
            return ids
        chosen = {task_id for level in ids_by_level(env).values() for task_id in level[:per_level]}
        return [task_id for task_id in ids if task_id in chosen]
