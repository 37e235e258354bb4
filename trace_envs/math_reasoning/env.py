"""`TraceMath-v0`: solve a problem with a calculator and a Python interpreter, one call or the answer per turn.

Invariant: what the Python tool holds is the cells that were run on the way to a state; no process belongs to a state, so
branches never share one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import numpy as np

from trace_envs.arguments import integer
from trace_envs.env import ToolEnv
from trace_envs.math_reasoning.answers import can_read_latex, equivalent, makes_target
from trace_envs.math_reasoning.calculator import FUNCTIONS, CalculatorError, evaluate, show_number
from trace_envs.math_reasoning.problems import GeneratedProblems, generated_problems
from trace_envs.math_reasoning.readers import READERS, FileProblems, load_problems
from trace_envs.math_reasoning.records import Cells, MathTask, Step
from trace_envs.sandbox import Limits, shared
from trace_envs.state import Act, EpisodeState, FinalAnswer, Outcome, Task, ToolCall

DATASETS = ("synthetic", *READERS)
DEFAULT_LIMITS = Limits(cpu_seconds=2.0, wall_seconds=5.0, memory_mib=256, output_chars=2000)


def _tool(name: str, description: str, argument: str, what: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string", "description": what}},
                "required": [argument],
                "additionalProperties": False,
            },
        },
    }


TOOLS: dict[str, dict[str, Any]] = {
    "calculator": _tool(
        "calculator",
        "Returns the exact value of an expression.",
        "expression",
        f"Numbers, + - * / // % **, parentheses and {', '.join(FUNCTIONS)}.",
    ),
    "python": _tool(
        "python",
        "Runs Python and returns what it prints, and the value of a last expression. Names stay from cell to cell.",
        "code",
        "The code of one cell.",
    ),
}
_ARGUMENTS = {"calculator": "expression", "python": "code"}


class MathEnv(ToolEnv):
    """Mathematical problems with the tools `calculator` (exact arithmetic) and `python` (a sandboxed interpreter).

    The interpreter's names are those that the episode's earlier cells made: each call runs them again in a fresh process and
    then the new one, so a snapshot holds the cells and branches share nothing. What a cell does must depend on nothing but
    what went before; the module `random` begins with the same seed each time. A cell that exceeds its limits is undone.

    Args:
        dataset: `synthetic` (generated), `gsm8k`, `deepscaler` or `math` (MATH-style files).
        split: `train`, `validation` or `test`, or a split of the data set.
        category: Of the synthetic problems: `word`, `countdown`, `modular`, `linear` or `all`.
        levels: Levels of the problems, such as `(1, 2)`; `None` for all. See `trace_envs.math_reasoning.problems.generate`.
        data_path: File with the problems of a real data set; `None` loads it with `datasets.load_dataset`.
        dataset_seed: Seed of the synthetic problems.
        tool_names: Tools that the agent has, of `calculator` and `python`.
        python_limits: What one cell may use, some or all of `trace_envs.sandbox.Limits`, such as `{"wall_seconds": 1.0}`.
        python_modules: Installed modules that cells may import besides the standard library, such as `("sympy",)`.
        **kwargs: Arguments of `ToolEnv` (`action_format`, `max_turns`, `system_prompt`, `render_mode`, ...).

    Raises:
        ValueError: An argument has an unknown value; the message lists the known ones.
        ImportError: The data set's answers are LaTeX, and `math-verify` is not installed.
    """

    def __init__(
        self,
        *,
        dataset: str = "synthetic",
        split: str = "train",
        category: str | None = None,
        levels: Sequence[int] | None = None,
        data_path: str | None = None,
        dataset_seed: int = 0,
        tool_names: Sequence[str] = tuple(TOOLS),
        python_limits: Mapping[str, Any] | None = None,
        python_modules: Sequence[str] = (),
        **kwargs: Any,
    ):
        for name, value in (("tool_names", tool_names), ("python_modules", python_modules), ("levels", levels)):
            if isinstance(value, str) or (value is not None and not isinstance(value, Sequence)):
                raise TypeError(f"{name} must be a list, got {value!r:.60} ({type(value).__name__})")
        unknown = [name for name in tool_names if name not in TOOLS]
        if unknown:
            raise ValueError(f"unknown tool {unknown[0]!r}; known: {', '.join(TOOLS)}")
        if data_path is not None and not isinstance(data_path, str | os.PathLike):
            raise TypeError(f"data_path must be a path or None, got {data_path!r:.60} ({type(data_path).__name__})")
        self.tool_names = tuple(name for name in TOOLS if name in tool_names)
        self.limits = _limits(python_limits)
        self.python_modules = tuple(python_modules)
        chosen = None if levels is None else tuple(integer("levels", level, 0) for level in levels)
        self.problems = _problems(
            dataset,
            split,
            category,
            chosen,
            None if data_path is None else str(data_path),
            integer("dataset_seed", dataset_seed, 0),
        )
        super().__init__(**kwargs)

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Returns the schemas of the tools that the agent has."""
        return [TOOLS[name] for name in self.tool_names]

    def settings(self) -> dict[str, Any]:
        """Adds the problems, known by their content, and what the tools may do."""
        return super().settings() | {
            "dataset": self.problems.name,
            "dataset_digest": self.problems.digest,
            "tools": list(self.tool_names),
            "python_limits": self.limits.plain(),
            "python_modules": list(self.python_modules),
        }

    def task_ids(self) -> Sequence[str]:
        """Returns the ids of the problems in the data set's order."""
        return self.problems.task_ids()

    def pick_task(self, rng: np.random.Generator, task_id: str | None) -> Task:
        """Returns the problem of that id, or a random one."""
        if task_id is None:
            ids = self.problems.task_ids()
            task_id = ids[int(rng.integers(len(ids)))]
        return self.problems.task(task_id)

    def initial_state(self, task: Task, key: int) -> EpisodeState:
        """See base class."""
        return EpisodeState(task=task, key=key, world=Cells())

    def call_tool(self, state: EpisodeState, call: ToolCall) -> tuple[EpisodeState, str, bool]:
        """Calculates, or runs a cell after those that the state holds."""
        text = call.arguments[_ARGUMENTS[call.name]]
        if call.name == "calculator":
            try:
                return state, show_number(evaluate(text)), False
            except CalculatorError as error:
                return state, f"Error: {error}.", True
        ran = state.world.ran
        result = shared(self.limits, self.python_modules).run(text, ran)
        if result.ended:
            shown = result.output.rstrip("\n") or "(no output)"
            return state.with_world(Cells((*ran, text))), shown, not result.ok
        return state, f"{result.output} Nothing of this cell is kept.", True

    def judge(self, state: EpisodeState, answer: str | None) -> Outcome:
        """Compares an answer with the right one; running out of turns scores zero."""
        task = _task(state)
        if answer is None:
            correct = False
        elif task.target is not None:
            correct = makes_target(answer, task.numbers, task.target)
        else:
            correct = equivalent(answer, task.answer)
        return Outcome(correct, float(correct), MappingProxyType({"correct": float(correct)}))

    def level_of(self, task: Task) -> int:
        """See base class."""
        assert isinstance(task, MathTask)
        return task.level

    def oracle(self, state: EpisodeState, rng: np.random.Generator, noise: float = 0.0) -> tuple[str, Act]:
        """Follows the known steps, as far as the agent's tools allow, then answers; a mistake is an unfinished call."""
        task = _task(state)
        turns = list(state.turns())
        done = [turn.action for turn in turns if isinstance(turn.action, ToolCall) and not turn.error]
        for step in task.steps:
            if step.tool not in self.tool_names:
                continue
            call = ToolCall(step.tool, {_ARGUMENTS[step.tool]: step.text})
            if call in done:
                done.remove(call)
                continue
            if len(turns) + 2 >= self.max_turns:
                break
            if noise and rng.random() < noise and not (turns and turns[-1].error):
                return step.thought, _unfinished(step, rng)
            return step.thought, call
        return "", FinalAnswer(task.answer)


def _unfinished(step: Step, rng: np.random.Generator) -> ToolCall:
    """Returns a call that breaks off after an operator or an opening bracket."""
    ends = [i + 1 for i, character in enumerate(step.text) if character in "+-*/(%"]
    end = ends[int(rng.integers(len(ends)))] if ends else 1
    return ToolCall(step.tool, {_ARGUMENTS[step.tool]: step.text[:end].strip() if ends else "("})


def _limits(given: Mapping[str, Any] | None) -> Limits:
    known = [f.name for f in fields(Limits)]
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"python_limits must be a dictionary, got {given!r:.60} ({type(given).__name__})")
    for name in given or {}:
        if name not in known:
            raise ValueError(f"unknown limit {name!r} in python_limits; known: {', '.join(known)}")
    return Limits(**{**DEFAULT_LIMITS.plain(), **dict(given or {})})


def _problems(
    dataset: str,
    split: str,
    category: str | None,
    levels: tuple[int, ...] | None,
    data_path: str | None,
    dataset_seed: int,
) -> GeneratedProblems | FileProblems:
    if dataset == "synthetic":
        if data_path is not None:
            raise ValueError(f"the synthetic problems are generated; they take no data_path (got {data_path!r})")
        return generated_problems(category, levels, split, dataset_seed)
    if dataset not in READERS:
        raise ValueError(f"unknown dataset {dataset!r}; known: {', '.join(DATASETS)}")
    if category not in (None, "all"):
        raise ValueError(f"{dataset} is not divided into categories (got {category!r}); leave category out")
    if dataset != "gsm8k" and not can_read_latex():
        raise ImportError(f'answers of {dataset} are LaTeX, which needs math-verify: pip install "trace-envs[math]"')
    return load_problems(dataset, data_path=data_path, split=split, levels=levels)


def _task(state: EpisodeState) -> MathTask:
    assert isinstance(state.task, MathTask)
    return state.task
