"""Evaluation: one rollout for each question, scored as the environment scores it.

Invariant: every question is asked once, in the order given, through the same wrapper that training uses.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np

from agents.policies.base import Policy, collect
from allocation import AsyncRunner, Forest, Root, TreeAllocationWrapper, UniformAllocator
from allocation.asking import AsyncPolicy

CHUNK = 512
"""Questions of one forest."""


def make_env(env_id: str, env_kwargs: dict[str, Any]) -> gym.Env:
    """Returns a bare environment (no passive checker: it checks every step of every slot).

    Raises:
        ValueError: The id is not registered, or the environment does not take one of the arguments.
    """
    try:
        return gym.make(env_id, disable_env_checker=True, **env_kwargs)
    except gym.error.UnregisteredEnv as error:
        known = ", ".join(sorted(i for i in gym.registry if i.startswith("Trace")))
        raise ValueError(
            f"--env-id: there is no environment {env_id!r}; known: {known}; one of another package is given as module:id"
        ) from error
    except gym.error.Error as error:
        raise ValueError(f"--env-id: environment {env_id!r} cannot be made: {error}") from error
    except TypeError as error:
        refused = re.search(r"(?:unexpected keyword|takes no) argument ('\w+'(?:, '\w+')*)", str(error))
        if refused is None:
            raise
        raise ValueError(f"environment {env_id!r} does not take argument {refused[1]}") from error


def make_vector(env_id: str, num_envs: int, env_kwargs: dict[str, Any]) -> gym.vector.SyncVectorEnv:
    """Returns a synchronous vector of `make_env`s."""
    return gym.vector.SyncVectorEnv([lambda: make_env(env_id, env_kwargs)] * num_envs)


def evaluate(
    policy: Policy | AsyncPolicy,
    env_id: str,
    env_kwargs: dict[str, Any],
    task_ids: Sequence[str],
    *,
    num_envs: int = 64,
    seed: int = 0,
    done: Callable[[Forest], None] | None = None,
) -> dict[str, Any]:
    """Runs a policy once on each task.

    Args:
        policy: The policy; an asynchronous one is driven by `AsyncRunner`, each episode at its own pace.
        env_id: Registered id of the environment.
        env_kwargs: Its arguments.
        task_ids: Tasks to run.
        num_envs: Slots that run side by side.
        seed: Seeds the environments.
        done: Called with each part of the episodes as it is finished.

    Returns:
        A record with `eval/accuracy` (the mean over levels, such as numbers of hops, where tasks have them, so that every level
        counts the same), `eval/accuracy_all` (the mean over tasks), `eval/turns`, `eval/tool_errors`, `eval/truncated`, every
        score of the outcome (`eval/em`, `eval/f1`, `eval/supporting_recall`, ...), and by level `eval/accuracy_by_level/<l>`
        and `eval/questions_by_level/<l>`.
    """
    if not task_ids:
        raise ValueError("no task to evaluate on")
    leaves: list[tuple[int, Any]] = []
    for forest in _forests(policy, env_id, env_kwargs, task_ids, min(num_envs, len(task_ids)), seed):
        leaves += _leaves(forest)
        if done is not None:
            done(forest)
    return summary(leaves)


def _forests(
    policy: Any, env_id: str, env_kwargs: dict[str, Any], task_ids: Sequence[str], num_envs: int, seed: int
) -> Iterator[Forest]:
    """Yields the episodes, part by part."""
    asynchronous = inspect.iscoroutinefunction(policy.act)
    # Between two parts slots run empty, which costs time where each has its own pace, but what is done is safe.
    size = min(CHUNK, 8 * num_envs) if asynchronous else CHUNK
    with closing(make_vector(env_id, num_envs, env_kwargs)) as envs:
        for start in range(0, len(task_ids), size):
            roots = [Root(seed + start + i, {"task_id": t}) for i, t in enumerate(task_ids[start : start + size])]
            one_each = UniformAllocator(1)
            if asynchronous:
                runner = AsyncRunner(envs, allocator=one_each, budget=len(roots))
                yield runner.run_sync(policy, seed=seed, roots=roots)
            else:
                # Scripted policies look at snapshots; of these environments they cost next to nothing.
                wrapper = TreeAllocationWrapper(envs, allocator=one_each, budget=len(roots), keep_snapshots=True)
                yield collect(wrapper, policy, seed=seed, roots=roots)


def _leaves(forest: Forest) -> list[tuple[int, Any]]:
    return [(int(tree.info.get("level", 0)), leaf) for tree in forest for leaf in tree.leaves()]


def summary(leaves: Sequence[tuple[int, Any]]) -> dict[str, Any]:
    """Returns the record of `evaluate` for (level, terminal node) pairs."""
    correct = np.array([bool(leaf.is_correct) for _, leaf in leaves], dtype=float)
    levels = np.array([level for level, _ in leaves])
    record: dict[str, Any] = {
        "eval/accuracy_all": float(correct.mean()),
        "eval/questions": len(leaves),
        "eval/turns": float(np.mean([leaf.depth for _, leaf in leaves])),
        "eval/tool_errors": float(np.mean([leaf.tool_errors for _, leaf in leaves])),
        "eval/truncated": float(np.mean([leaf.truncated for _, leaf in leaves])),
    }
    for name in sorted({name for _, leaf in leaves for name in leaf.components or ()}):
        record[f"eval/{name}"] = float(np.mean([(leaf.components or {}).get(name, 0.0) for _, leaf in leaves]))
    by_level = {int(level): float(correct[levels == level].mean()) for level in np.unique(levels)}
    record["eval/accuracy"] = float(np.mean(list(by_level.values())))
    for level, accuracy in by_level.items():
        record[f"eval/accuracy_by_level/{level}"] = accuracy
        record[f"eval/questions_by_level/{level}"] = int((levels == level).sum())
    return record
