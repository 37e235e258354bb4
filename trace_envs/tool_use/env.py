"""`TraceToolUse-v0`: do what a user asks, message by message, with tools that act on a world.

Invariant: the suite is shared by every environment with the same arguments and never enters a state; a state's world is a
value that the suite never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trace_envs.arguments import integer
from trace_envs.env import ToolEnv
from trace_envs.state import Act, EpisodeState, Outcome, Task, ToolCall, ToolCalls
from trace_envs.tool_use.suite import Suite, ToolUseTask

DEFAULT_TURNS = 40


def _embedded(**arguments: Any) -> Suite:
    from trace_envs.tool_use.embedded.suite import embedded_suite

    return embedded_suite(**arguments)


def _bfcl(**arguments: Any) -> Suite:
    from trace_envs.tool_use.bfcl.suite import bfcl_suite

    return bfcl_suite(**arguments)


SUITES: dict[str, Callable[..., Suite]] = {"embedded": _embedded, "bfcl-v4": _bfcl}


class ToolUseEnv(ToolEnv):
    """Stateful function calling in conversations of one or several user turns.

    A turn makes up to `calls_per_turn` calls, or says something to the user without a call. The first message without a call
    ends the agent's part; the user then goes on, or the episode ends and is judged by the state of the world and by what the
    calls have returned.

    Args:
        suite: `embedded` (generated tasks in small worlds) or `bfcl-v4` (Berkeley Function Calling Leaderboard, multi-turn;
            needs `bfcl-eval`).
        category: Kind of tasks; `None` for the suite's default. Embedded: `files`, `messages`, `calendar`, `shop` or `all`.
            BFCL: `multi_turn_base`, `multi_turn_miss_func`, `multi_turn_miss_param` or `multi_turn_long_context`.
        split: Split of the suite: `train`, `dev` or `test`; for `bfcl-v4` also `all`.
        dataset_seed: Seed of the embedded tasks; `bfcl-v4` is what it is and takes only 0.
        calls_per_turn: Calls that one turn may make.
        **kwargs: Arguments of `ToolEnv` (`action_format`, `max_turns`, `system_prompt`, `render_mode`, ...).

    Raises:
        ValueError: An argument has an unknown value; the message lists the known ones.
        ImportError: The suite's package is not installed.
    """

    plain_answer = True

    def __init__(
        self,
        *,
        suite: str = "embedded",
        category: str | None = None,
        split: str = "train",
        dataset_seed: int = 0,
        calls_per_turn: int = 8,
        max_turns: int = DEFAULT_TURNS,
        **kwargs: Any,
    ):
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
        self.max_calls = integer("calls_per_turn", calls_per_turn, 1)
        self.suite = SUITES[suite](
            category=category, split=split, dataset_seed=integer("dataset_seed", dataset_seed, 0)
        )
        super().__init__(max_turns=max_turns, **kwargs)

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Returns the tools of the suite's first task; `first_tools` and `tools_at` know those of others."""
        task = self.suite.task(self.suite.task_ids()[0])
        return self.suite.tools(task, self.suite.start(task))

    def first_tools(self, task: Task) -> list[dict[str, Any]]:
        """See base class."""
        assert isinstance(task, ToolUseTask)
        return self.suite.tools(task, self.suite.start(task))

    def tools_at(self, state: EpisodeState) -> list[dict[str, Any]]:
        """See base class."""
        return self.suite.tools(_task(state), state.world)

    def callable_tools(self, state: EpisodeState) -> list[dict[str, Any]]:
        """See base class."""
        return self.suite.callable_tools(_task(state), state.world)

    def settings(self) -> dict[str, Any]:
        """Adds the tasks, known by their content, and how many calls a turn may make."""
        return super().settings() | {
            "suite": self.suite.name,
            "suite_digest": self.suite.digest,
            "calls_per_turn": self.max_calls,
        }

    def task_ids(self) -> Sequence[str]:
        """Returns the ids of the tasks in the suite's order."""
        return self.suite.task_ids()

    def pick_task(self, rng: np.random.Generator, task_id: str | None) -> Task:
        """Returns the task of that id, or a random one."""
        if task_id is None:
            ids = self.suite.task_ids()
            task_id = ids[int(rng.integers(len(ids)))]
        return self.suite.task(task_id)

    def initial_state(self, task: Task, key: int) -> EpisodeState:
        """See base class."""
        assert isinstance(task, ToolUseTask)
        return EpisodeState(task=task, key=key, world=self.suite.start(task))

    def call_tool(self, state: EpisodeState, call: ToolCall) -> tuple[EpisodeState, str, bool]:
        """See base class."""
        state, (result,), refused = self.call_tools(state, (call,))
        return state, result, refused

    def call_tools(self, state: EpisodeState, calls: Sequence[ToolCall]) -> tuple[EpisodeState, list[str], bool]:
        """See base class."""
        task, world = _task(state), state.world
        results, refused = [], False
        for call in calls:
            world, result, error = self.suite.call(task, world, call)
            results.append(result)
            refused = refused or error
        world, over = self.suite.turn_over(task, world)
        state = state.with_world(world)
        return replace(state, truncated=True) if over else state, results, refused

    def reply(self, state: EpisodeState, answer: str) -> tuple[EpisodeState, str] | None:
        """Returns what the user says next; `None` after the last user turn."""
        replied = self.suite.reply(_task(state), state.world, answer)
        return None if replied is None else (state.with_world(replied[0]), replied[1])

    def judge(self, state: EpisodeState, answer: str | None) -> Outcome:
        """Compares the world and the results with what the task wants; running out of turns is a failure."""
        return self.suite.outcome(_task(state), state.world, answer)

    def level_of(self, task: Task) -> int:
        """See base class."""
        assert isinstance(task, ToolUseTask)
        return task.level

    def oracle(self, state: EpisodeState, rng: np.random.Generator, noise: float = 0.0) -> tuple[str, Act]:
        """See base class."""
        thought, act = self.suite.oracle(_task(state), state.world, rng, noise)
        if isinstance(act, ToolCalls):
            act = act.calls[0] if self.max_calls == 1 else ToolCalls(act.calls[: self.max_calls])
        return thought, act


def _task(state: EpisodeState) -> ToolUseTask:
    assert isinstance(state.task, ToolUseTask)
    return state.task
