"""`FunctionEnv`: a family of one's own from typed functions, tasks and a verdict.

Invariant: as everywhere, a world is a value: functions return a new one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from trace_envs.env import ToolEnv
from trace_envs.functions import FunctionTools
from trace_envs.state import EpisodeState, Task, ToolCall


class FunctionEnv(ToolEnv):
    """Base for environments whose tools are typed Python functions.

    A subclass gives `functions`, and writes `tasks`, `first_world` and `judge`; see `trace_envs.functions` for what a tool
    function looks like, and `ToolEnv` for the arguments.

    Attributes:
        functions: The tools.
    """

    functions: ClassVar[Sequence[Callable[..., Any]]] = ()

    @abstractmethod
    def tasks(self) -> Sequence[Task]:
        """Returns all tasks, in a fixed order; called once."""

    @abstractmethod
    def first_world(self, task: Task) -> Any:
        """Returns what the tools of a task act on at first: plain data or frozen dataclasses."""

    @cached_property
    def _tasks(self) -> dict[str, Task]:
        return {task.task_id: task for task in self.tasks()}

    @cached_property
    def _tools(self) -> FunctionTools:
        return FunctionTools(self.functions)

    def tool_schemas(self) -> list[dict[str, Any]]:
        """See base class."""
        return self._tools.schemas

    def task_ids(self) -> Sequence[str]:
        """See base class."""
        return list(self._tasks)

    def pick_task(self, rng: np.random.Generator, task_id: str | None) -> Task:
        """See base class."""
        if task_id is None:
            task_id = list(self._tasks)[int(rng.integers(len(self._tasks)))]
        if task_id not in self._tasks:
            raise ValueError(f"unknown task_id {task_id!r}; see task_ids() for the {len(self._tasks)} there are")
        return self._tasks[task_id]

    def initial_state(self, task: Task, key: int) -> EpisodeState:
        """See base class."""
        return EpisodeState(task=task, key=key, world=self.first_world(task))

    def call_tool(self, state: EpisodeState, call: ToolCall) -> tuple[EpisodeState, str, bool]:
        """See base class."""
        world, result, refused = self._tools.call(state.world, call)
        return state.with_world(world), result, refused
