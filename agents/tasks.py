"""Which tasks a run meets: in training from a shuffled deck, in evaluation the first of each number of hops.

Invariant: what is dealt is a function of the generator and of what was dealt before; both are in a run's checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.evaluate import make_env
from allocation import Root


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


def eval_task_ids(env_id: str, env_kwargs: dict[str, Any], per_hop: int) -> list[str]:
    """Returns the first `per_hop` tasks of each number of hops (all tasks if it is 0), in the data set's order."""
    with contextlib.closing(make_env(env_id, env_kwargs)) as made:
        env: Any = made.unwrapped
        ids = list(env.task_ids())
        if not per_hop:
            return ids
        taken: dict[int, int] = {}
        chosen = []
        for task_id in ids:
            hops = int(getattr(env.pick_task(np.random.default_rng(0), task_id), "hops", 0))
            if taken.get(hops, 0) < per_hop:
                taken[hops] = taken.get(hops, 0) + 1
                chosen.append(task_id)
        return chosen
