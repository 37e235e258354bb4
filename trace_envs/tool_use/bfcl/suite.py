"""`bfcl-v4`: the multi-turn tasks of the Berkeley Function Calling Leaderboard.

Invariant: what an agent's calls do and how it is judged is what the official harness does with the same calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from trace_envs.snapshots.codec import register
from trace_envs.state import Act, FinalAnswer, Outcome, ToolCall, ToolCalls
from trace_envs.tool_use.bfcl.checker import responses_match, state_matches
from trace_envs.tool_use.bfcl.data import CATEGORIES, SPLITS, BFCLTask, Program, function_schemas, load_category
from trace_envs.tool_use.bfcl.graph import Graph
from trace_envs.tool_use.bfcl.simulators import first_graph, named, owners, run
from trace_envs.tool_use.suite import Suite, ToolUseTask, outcome_of_turns

MAX_STEPS = 20
"""Agent turns with calls in one user turn; one more ends the episode in failure, as in the official harness."""


@dataclass(frozen=True, slots=True)
class BFCLWorld:
    """A moment of a conversation.

    Attributes:
        user_turn: Number of the user's messages that have been dealt with.
        simulators: The simulators by class, as graphs.
        results: What all calls have returned, the newest last.
        begun: Number of results before the present user turn.
        steps: Agent turns with calls in the present user turn.
        passed: For each user turn that is over: whether state and responses matched.
    """

    user_turn: int = 0
    simulators: dict[str, Graph] = field(default_factory=dict, hash=False)
    results: tuple[str, ...] = ()
    begun: int = 0
    steps: int = 0
    passed: tuple[tuple[bool, bool], ...] = ()


register(BFCLWorld, "bfcl.World")


@lru_cache(maxsize=16)
def bfcl_suite(*, category: str | None, split: str, dataset_seed: int) -> Suite:
    """Returns the suite for these arguments, one for all environments.

    Raises:
        ValueError: The category or the split is unknown, or a seed is given.
        ImportError: bfcl-eval is not installed.
    """
    category = category or CATEGORIES[0]
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r} of bfcl-v4; known: {', '.join(CATEGORIES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of bfcl-v4; known: {', '.join(SPLITS)}")
    if dataset_seed:
        raise ValueError(f"the tasks of bfcl-v4 are what they are; dataset_seed must be 0, got {dataset_seed}")
    return BFCLSuite(category, split)


class BFCLSuite(Suite):
    """The tasks of a category and split.

    Args:
        category: One of `CATEGORIES`.
        split: One of `SPLITS`.
    """

    name = "bfcl-v4"

    def __init__(self, category: str, split: str):
        tasks, self.digest = load_category(category)
        self._tasks = {task.task_id: task for i, task in enumerate(tasks) if i in SPLITS[split]}
        self._all = {task.task_id: task for task in tasks}
        self._split = split
        self._started = lru_cache(maxsize=512)(self._start)
        self._truths = lru_cache(maxsize=512)(self._truth)
        self._offered = lru_cache(maxsize=2048)(self._offer)
        self._lax = lru_cache(maxsize=256)(_unchecked)

    def task_ids(self) -> Sequence[str]:
        """See base class."""
        return list(self._tasks)

    def task(self, task_id: str) -> ToolUseTask:
        """See base class."""
        if task_id not in self._tasks:
            other = " (it is of another split)" if task_id in self._all else ""
            first, last = next(iter(self._tasks)), next(reversed(self._tasks))
            raise ValueError(f"unknown task_id {task_id!r}{other}; the split {self._split!r} has {first} to {last}")
        return self._tasks[task_id]

    def _start(self, task_id: str) -> BFCLWorld:
        task = self._all[task_id]
        config = json.loads(task.initial)
        long_context = "long_context" in task.category
        return BFCLWorld(
            simulators={name: first_graph(name, config.get(name, {}), long_context) for name in task.classes}
        )

    def start(self, task: ToolUseTask) -> BFCLWorld:
        """See base class."""
        return self._started(task.task_id)

    def tools(self, task: ToolUseTask, world: Any) -> list[dict[str, Any]]:
        """See base class."""
        bfcl = _bfcl(task)
        held_back = {name for turn, names in bfcl.missed if turn > world.user_turn for name in names}
        return self._offered(bfcl.classes, frozenset(held_back))

    @staticmethod
    def _offer(classes: tuple[str, ...], held_back: frozenset[str]) -> list[dict[str, Any]]:
        schemas = [schema for name in classes for schema in function_schemas()[name]]
        return [schema for schema in schemas if schema["function"]["name"] not in held_back]

    def callable_tools(self, task: ToolUseTask, world: Any) -> list[dict[str, Any]]:
        """Returns all functions of the simulators, with any arguments: the official harness leaves them to judge what comes.

        So functions that are held back can be called by whoever knows of them; some ground truths do.
        """
        return self._lax(_bfcl(task).classes)

    def call(self, task: ToolUseTask, world: Any, call: ToolCall) -> tuple[BFCLWorld, str, bool]:
        """See base class."""
        name = owners(_bfcl(task).classes)[call.name]
        before = world.simulators[name]
        graph, result, failed = run(name, before, Program(call.name, (), call.arguments))
        simulators = world.simulators if graph is before else {**world.simulators, name: graph}
        return replace(world, simulators=simulators, results=(*world.results, result)), result, failed

    def turn_over(self, task: ToolUseTask, world: Any) -> tuple[BFCLWorld, bool]:
        """Counts the agent's turns; too many of them in one user turn end the episode."""
        return replace(world, steps=world.steps + 1), world.steps + 1 > MAX_STEPS

    def reply(self, task: ToolUseTask, world: Any, answer: str) -> tuple[BFCLWorld, str] | None:
        """See base class; the finished user turn is checked here."""
        messages, done = _bfcl(task).messages, world.user_turn
        if done + 1 >= len(messages):
            return None
        passed = (*world.passed, self._check(task, world))
        world = BFCLWorld(done + 1, world.simulators, world.results, len(world.results), 0, passed)
        return world, messages[done + 1]

    def outcome(self, task: ToolUseTask, world: Any, answer: str | None) -> Outcome:
        """Returns the verdict: every user turn has to pass; `answer` does not matter, but there must be one."""
        passed = world.passed if answer is None else (*world.passed, self._check(task, world))
        return outcome_of_turns(passed, len(_bfcl(task).messages))

    def _check(self, task: ToolUseTask, world: BFCLWorld) -> tuple[bool, bool]:
        if not _bfcl(task).truth[world.user_turn]:
            return True, True
        if len(world.results) == world.begun:
            return False, False
        simulators, results = self._truths(task.task_id)[world.user_turn]
        return state_matches(world.simulators, simulators), responses_match(world.results, results)

    def _truth(self, task_id: str) -> list[tuple[dict[str, Graph], tuple[str, ...]]]:
        """Returns the simulators after each user turn of the ground truth, and what its calls return."""
        task, world = self._all[task_id], self._started(task_id)
        simulators, after = world.simulators, []
        for calls in task.truth:
            results = []
            for call in calls:
                name = owners(task.classes)[call.name]
                graph, result, _ = run(name, simulators[name], call)
                simulators = {**simulators, name: graph}
                results.append(result)
            after.append((simulators, tuple(results)))
        return after

    def oracle(self, task: ToolUseTask, world: Any, rng: np.random.Generator, noise: float) -> tuple[str, Act]:
        """Makes the calls of the ground truth, in order and together, that have not returned what they should yet.

        A mistake is a look at the working folder, where there is one.
        """
        bfcl = _bfcl(task)
        if noise and "pwd" in owners(bfcl.classes) and rng.random() < noise:
            return "Where am I?", ToolCall("pwd", {})
        seen = list(world.results[world.begun :])
        left: list[Program] = []
        for call, result in zip(
            bfcl.truth[world.user_turn], self._truths(task.task_id)[world.user_turn][1], strict=True
        ):
            if result in seen and not left:
                seen.remove(result)
            else:
                left.append(named(bfcl.classes, call))
        if not left:
            return "", FinalAnswer("Done." if bfcl.truth[world.user_turn] else "Something that I need is missing.")
        calls = tuple(ToolCall(call.name, dict(call.named)) for call in left)
        return "", calls[0] if len(calls) == 1 else ToolCalls(calls)


def _unchecked(classes: tuple[str, ...]) -> list[dict[str, Any]]:
    tools = []
    for schema in (schema for name in classes for schema in function_schemas()[name]):
        function = schema["function"]
        properties: dict[str, Any] = {name: {} for name in function["parameters"].get("properties", {})}
        parameters = {"type": "object", "properties": properties, "additionalProperties": True}
        tools.append({"type": "function", "function": {**function, "parameters": parameters}})
    return tools


def _bfcl(task: ToolUseTask) -> BFCLTask:
    assert isinstance(task, BFCLTask)
    return task
