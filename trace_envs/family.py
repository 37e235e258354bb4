"""What a family of environments supplies: its tasks, its tools and its verdict.

Invariant: whatever maps a state to a state is pure. It changes neither the state that it is given nor the environment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from trace_envs.state import Act, EpisodeState, Outcome, Task, ToolCall


class Family(ABC):
    """The part of `ToolEnv` that differs from family to family.

    Some methods have to be written: `tool_schemas`, `pick_task` with `task_ids`, `call_tool` and `judge`. A family whose tools
    change during an episode says so in `tools_at`, one whose user goes on after an answer in `reply`, and one that knows the
    way in `oracle`.

    Attributes:
        max_calls: Calls that one turn may make.
        plain_answer: Whether words without a call are an answer, as in a conversation; otherwise they are malformed.
        level_name: What `level_of` counts, in one word.
        tools: What `tool_schemas` returned when the environment was made.
    """

    max_calls: int = 1
    plain_answer: bool = False
    level_name: str = "level"
    tools: list[dict[str, Any]]

    @abstractmethod
    def tool_schemas(self) -> list[dict[str, Any]]:
        """Returns the tools as OpenAI-style JSON schemas."""

    @abstractmethod
    def pick_task(self, rng: np.random.Generator, task_id: str | None) -> Task:
        """Returns the task of that id, or a random one drawn from `rng`, which is lent for this call only."""

    @abstractmethod
    def task_ids(self) -> Sequence[str]:
        """Returns the ids of every task, in a fixed order."""

    def initial_state(self, task: Task, key: int) -> EpisodeState:
        """Returns the state before the first turn."""
        return EpisodeState(task=task, key=key)

    @abstractmethod
    def call_tool(self, state: EpisodeState, call: ToolCall) -> tuple[EpisodeState, str, bool]:
        """Applies a well-formed call: the new state, what the agent sees, and whether the tool refused."""

    @abstractmethod
    def judge(self, state: EpisodeState, answer: str | None) -> Outcome:
        """Judges the final answer; `None` when the turns ran out without one."""

    def call_tools(self, state: EpisodeState, calls: Sequence[ToolCall]) -> tuple[EpisodeState, list[str], bool]:
        """Applies the calls of one turn in their order: the new state, what each returned, and whether any was refused."""
        results, refused = [], False
        for call in calls:
            state, result, error = self.call_tool(state, call)
            results.append(result)
            refused = refused or error
        return state, results, refused

    def first_tools(self, task: Task) -> list[dict[str, Any]]:
        """Returns the tools of a task's first turn, of which the system prompt tells; by default those of `tool_schemas`."""
        return self.tools

    def tools_at(self, state: EpisodeState) -> list[dict[str, Any]]:
        """Returns the tools that may be called now; by default those of `tool_schemas` at all times."""
        return self.tools

    def callable_tools(self, state: EpisodeState) -> list[dict[str, Any]]:
        """Returns the tools that calls are checked against, by default those of `tools_at`.

        A benchmark whose tools judge their arguments themselves, and whose harness lets them, has laxer ones here.
        """
        return self.tools_at(state)

    def reply(self, state: EpisodeState, answer: str) -> tuple[EpisodeState, str] | None:
        """Returns the state after an answer and what the user says to it; `None`, the default, ends the episode."""
        return None

    def level_of(self, task: Task) -> int:
        """Returns how hard a task is, 0 where nobody knows; evaluations are reported by it."""
        return 0

    def oracle(self, state: EpisodeState, rng: np.random.Generator, noise: float = 0.0) -> tuple[str, Act]:
        """Returns the thought and action of an agent that knows the way, from wherever the episode stands.

        Args:
            state: The moment.
            rng: Source of the mistakes.
            noise: Chance of a mistake at each step that leaves the task solvable.

        Raises:
            NotImplementedError: The family has no oracle.
        """
        raise NotImplementedError(f"{type(self).__name__} has no oracle")
