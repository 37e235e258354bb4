"""What a suite of tool-use tasks is: conversations with a user, in a world that tools act on.

Invariant: a world is a value. Nothing that a suite does changes one; what changes is a new world that shares the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from trace_envs.state import Act, Outcome, Task, ToolCall


@dataclass(frozen=True, slots=True)
class ToolUseTask(Task):
    """A conversation; suites subclass it.

    Attributes:
        category: Kind of the task, such as `shop` or `multi_turn_base`.
        level: How hard it is, from 1; 0 where nobody knows.
    """

    category: str = ""
    level: int = 0


class World(Protocol):
    """What tools act on, and how far the conversation has come."""

    @property
    def user_turn(self) -> int:
        """Number of the user's messages that have been dealt with."""


class Suite(ABC):
    """Tasks, the tools for them, and how their outcome is judged.

    Attributes:
        name: What `ToolUseEnv` knows it by.
        digest: Of everything that shapes an episode, for the settings of snapshots.
    """

    name: str
    digest: str

    @abstractmethod
    def task_ids(self) -> Sequence[str]:
        """Returns the ids of all tasks, in a fixed order."""

    @abstractmethod
    def task(self, task_id: str) -> ToolUseTask:
        """Returns a task.

        Raises:
            ValueError: There is none of that id.
        """

    @abstractmethod
    def start(self, task: ToolUseTask) -> World:
        """Returns the world before the first turn."""

    @abstractmethod
    def tools(self, task: ToolUseTask, world: World) -> list[dict[str, Any]]:
        """Returns the schemas of the tools that may be called now; shared, not made anew."""

    def callable_tools(self, task: ToolUseTask, world: World) -> list[dict[str, Any]]:
        """Returns the schemas that calls are checked against, by default those of `tools`; shared, not made anew."""
        return self.tools(task, world)

    @abstractmethod
    def call(self, task: ToolUseTask, world: World, call: ToolCall) -> tuple[World, str, bool]:
        """Returns the world after a well-formed call, what it returned, and whether the tool refused."""

    def turn_over(self, task: ToolUseTask, world: World) -> tuple[World, bool]:
        """Returns the world after all calls of a turn of the agent, and whether the episode ends here, in failure."""
        return world, False

    @abstractmethod
    def reply(self, task: ToolUseTask, world: World, answer: str) -> tuple[World, str] | None:
        """Returns the world after the agent's message to the user and the user's next message; `None` after the last one."""

    @abstractmethod
    def outcome(self, task: ToolUseTask, world: World, answer: str | None) -> Outcome:
        """Returns the verdict; `answer` is the agent's last message, `None` if the episode was cut short."""

    @abstractmethod
    def oracle(self, task: ToolUseTask, world: World, rng: np.random.Generator, noise: float) -> tuple[str, Act]:
        """Returns the next thought and action of an agent that knows the way; see `trace_envs.family.Family.oracle`."""


def outcome_of_turns(passed: Sequence[tuple[bool, bool]], count: int) -> Outcome:
    """Returns the verdict on a conversation: every user turn has to pass.

    Args:
        passed: For each user turn that is over: whether the world is right, and whether what was said or returned is.
        count: User turns of the task.
    """
    solved = len(passed) == count and all(state and response for state, response in passed)
    components = {
        "state_match": sum(state for state, _ in passed) / count,
        "response_match": sum(response for _, response in passed) / count,
        "turns_passed": sum(state and response for state, response in passed) / count,
    }
    return Outcome(solved, float(solved), MappingProxyType(components))
