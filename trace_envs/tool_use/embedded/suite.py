"""The embedded suite: generated tasks, checked by state and by what was said.

Invariant: what the tools do in the ground truth is what they do for the agent; there is one implementation of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from trace_envs.state import Act, FinalAnswer, Outcome, ToolCall
from trace_envs.tool_use.embedded.generate import (
    DOMAINS,
    LEVELS,
    SPLITS,
    TOOLS,
    VERSION,
    make_task,
    tools_without,
)
from trace_envs.tool_use.embedded.records import Data, EmbeddedTask, EmbeddedWorld, UserTurn
from trace_envs.tool_use.suite import Suite, ToolUseTask, outcome_of_turns

TASKS = {"train": 250, "validation": 25, "test": 25}
"""Tasks of each category and level."""
_TRIES = 0.5  # chance that an oracle that errs calls a tool that is not there


@lru_cache(maxsize=32)
def embedded_suite(*, category: str | None, split: str, dataset_seed: int) -> Suite:
    """Returns the suite for these arguments, one for all environments.

    Raises:
        ValueError: The category or the split is unknown.
    """
    if category not in (None, "all", *DOMAINS):
        raise ValueError(f"unknown category {category!r} of the embedded suite; known: {', '.join(DOMAINS)}, all")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the embedded suite; known: {', '.join(SPLITS)}")
    return EmbeddedSuite(tuple(DOMAINS) if category in (None, "all") else (str(category),), split, dataset_seed)


class EmbeddedSuite(Suite):
    """Tasks made as they are asked for.

    A user turn passes if the world's data is what the ground truth makes of it and, where something was asked, the agent's
    reply holds it and a call has returned it. The task is solved if every user turn passes.

    Args:
        categories: Names of domains.
        split: Split that the names are of.
        seed: Seed of the tasks.
    """

    name = "embedded"

    def __init__(self, categories: tuple[str, ...], split: str, seed: int):
        self._split, self._seed = split, seed
        self._ids = [f"{c}-{level}-{i}" for i in range(TASKS[split]) for level in LEVELS for c in categories]
        self._known = frozenset(self._ids)
        self.digest = f"v{VERSION}/{split}/{seed}/{'+'.join(categories)}"
        self._make = lru_cache(maxsize=20_000)(self._task)
        self._goal = lru_cache(maxsize=20_000)(self._goals)
        self._tools = lru_cache(maxsize=256)(tools_without)

    def task_ids(self) -> Sequence[str]:
        """See base class."""
        return self._ids

    def task(self, task_id: str) -> ToolUseTask:
        """See base class."""
        if task_id not in self._known:
            raise ValueError(
                f"unknown task_id {task_id!r}; the {self._split} split has {self._ids[0]} to {self._ids[-1]}, see task_ids()"
            )
        return self._make(task_id)

    def _task(self, task_id: str) -> EmbeddedTask:
        category, level, number = task_id.split("-")
        return make_task(self._seed, self._split, category, int(level), int(number))

    def start(self, task: ToolUseTask) -> EmbeddedWorld:
        """See base class."""
        return EmbeddedWorld(data=_embedded(task).data)

    def tools(self, task: ToolUseTask, world: Any) -> list[dict[str, Any]]:
        """See base class."""
        turns = _embedded(task).turns
        return self._tools(task.category, turns[min(world.user_turn, len(turns) - 1)].withheld)

    def call(self, task: ToolUseTask, world: Any, call: ToolCall) -> tuple[EmbeddedWorld, str, bool]:
        """See base class."""
        data, result, refused = TOOLS[task.category].call(world.data, call)
        results = (*world.results, result)
        return EmbeddedWorld(world.user_turn, data, results, world.begun, world.passed), result, refused

    def reply(self, task: ToolUseTask, world: Any, answer: str) -> tuple[EmbeddedWorld, str] | None:
        """See base class; the finished user turn is checked here."""
        turns, done = _embedded(task).turns, world.user_turn
        if done + 1 >= len(turns):
            return None
        passed = (*world.passed, self._check(task, world, answer))
        world = replace(world, user_turn=done + 1, begun=len(world.results), passed=passed)
        return world, turns[done + 1].message

    def outcome(self, task: ToolUseTask, world: Any, answer: str | None) -> Outcome:
        """Returns the verdict, with the shares of user turns that pass (`turns_passed`) by state and by response."""
        passed = world.passed if answer is None else (*world.passed, self._check(task, world, answer))
        return outcome_of_turns(passed, len(_embedded(task).turns))

    def _check(self, task: ToolUseTask, world: EmbeddedWorld, answer: str) -> tuple[bool, bool]:
        turn = _embedded(task).turns[world.user_turn]
        goal, results = self._goal(task.task_id)[world.user_turn]
        said = not turn.mention or (turn.mention in answer and results[-1] in world.results)
        return world.data == goal, said

    def _goals(self, task_id: str) -> list[tuple[Data, list[str]]]:
        """Returns the data after each user turn of the ground truth, and what its calls return."""
        task = self._make(task_id)
        data, goals = task.data, []
        for turn in task.turns:
            results = []
            for step in turn.steps:
                data, result, _ = TOOLS[task.category].call(data, step.call)
                results.append(result)
            goals.append((data, results))
        return goals

    def oracle(self, task: ToolUseTask, world: Any, rng: np.random.Generator, noise: float) -> tuple[str, Act]:
        """Follows the ground truth; a mistake is a look-up that fails, or a call of a tool that is withheld."""
        turns = _embedded(task).turns
        turn = turns[world.user_turn]
        _, wanted = self._goal(task.task_id)[world.user_turn]
        seen = list(world.results[world.begun :])
        if noise and turn.withheld and not turn.steps:
            # What an agent does that does not know its tools; the error says which there are.
            step = turns[world.user_turn + 1].steps[-1]
            if step.call.name in turn.withheld and rng.random() < _TRIES:
                return step.thought, step.call
        if noise and rng.random() < noise and (mistake := _mistake(turn, seen, rng)) is not None:
            return mistake
        for step, result in zip(turn.steps, wanted, strict=True):
            if result not in seen:
                return step.thought, step.call
            seen.remove(result)
        return "", FinalAnswer(turn.reply)


def _mistake(turn: UserTurn, seen: Sequence[str], rng: np.random.Generator) -> tuple[str, Act] | None:
    """Returns a first call whose text argument is another word of the message, so that it finds nothing."""
    if not turn.steps or seen:
        return None
    call = turn.steps[0].call
    texts = [name for name, value in call.arguments.items() if isinstance(value, str)]
    words = [word.strip(".?") for word in turn.message.split() if word.strip(".?") not in call.arguments.values()]
    if not texts or not words or not call.name.startswith(("find", "get", "list", "read", "check")):
        return None
    name = texts[int(rng.integers(len(texts)))]
    wrong = words[int(rng.integers(len(words)))]
    return turn.steps[0].thought, ToolCall(call.name, {**call.arguments, name: wrong})


def _embedded(task: ToolUseTask) -> EmbeddedTask:
    assert isinstance(task, EmbeddedTask)
    return task
