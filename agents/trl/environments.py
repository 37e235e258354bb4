"""Environments as TRL's `GRPOTrainer(environment_factory=...)` takes them: an object whose methods are the tools.

Invariant: whatever a trainer does to such an object is a turn of a Gymnasium environment, in its own action format; rewards and
verdicts are the environment's. An object has no public method besides `reset` and the tools.

TRL samples, finds the tool calls in what was sampled, calls the methods, and goes on until a message holds no call. That
message is the answer, which it hands to nobody but reward functions: `episode_reward` gives it to the environment.

Checked against TRL 1.16, `trl/trainer/grpo_trainer.py`, class `GRPOTrainer`: `__init__` lists the methods,
`_generate_and_score_completions` calls `reset` with the columns of the row, `_tool_call_loop` calls the tools.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from agents.evaluate import make_env
from agents.trl.tools import tool_methods
from trace_envs.env import ToolEnv
from trace_envs.messages import encodable
from trace_envs.schemas import Function
from trace_envs.state import FinalAnswer, ToolCall

if TYPE_CHECKING:
    import datasets

_ANYTHING = ["string", "number", "boolean", "array", "object", "null"]


class Episode:
    """An environment and the episode under way in it; `environment_factory` makes the classes with the tools.

    Args:
        env: The environment.
        rng: Seeds its episodes.
    """

    def __init__(self, env: gym.Env, rng: np.random.Generator):
        self._env = env
        self._rng = rng
        self._info: Mapping[str, Any] = {}
        self._reward = 0.0
        self._over = True

    def reset(self, *, task_id: str | None = None, prompt: Sequence[Any] | None = None, **row: Any) -> str | None:
        """Starts the episode of a row of the data set.

        Args:
            task_id: The task.
            prompt: The row's messages; `None` where the data set has task ids only.
            **row: Other columns, which mean nothing here.

        Returns:
            What the prompt lacks: nothing, or the task in words if the row has no prompt.

        Raises:
            ValueError: The row has no `task_id`, or there is no such task.
        """
        if task_id is None:
            raise ValueError(
                "the training data has no column task_id, so the rollouts of a group would be of different tasks: make it with "
                "trl_dataset"
            )
        seed = int(self._rng.integers(2**31))
        observation, self._info = self._env.reset(seed=seed, options={"task_id": task_id})
        self._reward, self._over = 0.0, False
        return encodable(observation) if prompt is None else None

    @property
    def total_reward(self) -> float:
        """The sum of the episode's rewards so far."""
        return self._reward

    @property
    def is_correct(self) -> bool:
        """The environment's verdict; false as long as there is none."""
        return bool(self._info.get("is_correct", False))

    @property
    def info(self) -> Mapping[str, Any]:
        """The environment's last info."""
        return self._info

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        """Calls a tool; what goes wrong is told to the model."""
        if self._over:
            return "Error: the episode is over; no tool can be called any more."
        call = ToolCall(name, arguments)
        try:
            text = self._tool_env.action_format.render("", call, [_lenient(call)])
        except ValueError as error:
            return f"Error: {error}"
        return encodable(self._step(text))

    def _answer(self, text: str) -> None:
        """Gives a last message to the environment if it is an answer."""
        env = self._tool_env
        if not self._over and isinstance(env.action_format.parse(text, env.tools), FinalAnswer):
            self._step(text)

    def _step(self, text: str) -> str:
        observation, reward, terminated, truncated, self._info = self._env.step(text)
        self._reward += float(reward)
        self._over = terminated or truncated
        return observation

    @property
    def _tool_env(self) -> ToolEnv:
        return _tool_env(self._env)


def environment_factory(env_id: str, *, seed: int = 0, **env_kwargs: Any) -> Callable[[], Episode]:
    """Returns what `GRPOTrainer(environment_factory=...)` takes: it makes an environment for each rollout of a batch.

    The methods of such an object are the environment's tools, `reset`, and nothing else, so those are what a model is offered.

    Args:
        env_id: Registered id of an environment with tools.
        seed: Seeds the environments, each with a stream of its own.
        **env_kwargs: The environment's arguments.

    Raises:
        ValueError: The id is unknown, the environment has no tools or not such as Python can call, it is a conversation, or an
            argument is unknown.
    """
    with closing(make_env(env_id, env_kwargs)) as env:
        base = _tool_env(env)
        if not base.tools:
            raise ValueError(f"environment {env_id!r} has no tools, and TRL offers nothing else: use rollout_func")
        if base.plain_answer:
            raise ValueError(
                f"environment {env_id!r} is a conversation whose user goes on after an answer, where TRL's loop ends: use "
                "rollout_func"
            )
        # TRL lists the functions of the class, so each set of tools is a class of its own.
        kind = type(f"{type(base).__name__}Episode", (Episode,), tool_methods(base.tools, Episode._call))
    numbers = itertools.count()
    return lambda: kind(make_env(env_id, env_kwargs), np.random.default_rng([seed, next(numbers)]))


def episode_reward(
    completions: Sequence[Any],
    environments: Sequence[Any] = (),
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float]:
    """A reward function for `GRPOTrainer(reward_funcs=...)` with `environment_factory`: what the environment gave.

    A last message without a tool call is the answer, if the environment's action format reads it as one; a rollout that ended
    without an answer (the token or tool limit was reached, or the message is no answer) keeps what it had.

    Args:
        completions: The messages of each rollout.
        environments: The object that each of them used.
        log_metric: Logs the share of successes, as `is_correct`.
        **_: What else a trainer hands to reward functions.

    Returns:
        The sum of the rewards of each episode.

    Raises:
        ValueError: The trainer has no environments.
    """
    if len(environments) != len(completions):
        raise ValueError(
            f"{len(completions)} completions came with {len(environments)} environments: episode_reward goes with "
            "GRPOTrainer(environment_factory=...); with rollout_func use environment_reward"
        )
    for messages, environment in zip(completions, environments, strict=True):
        last = messages[-1]
        if last["role"] == "assistant" and not last.get("tool_calls"):
            environment._answer(last["content"])
    if log_metric is not None:
        log_metric("is_correct", float(np.mean([environment.is_correct for environment in environments])))
    return [environment.total_reward for environment in environments]


def trl_dataset(env_id: str, *, task_ids: Sequence[str] | None = None, **env_kwargs: Any) -> datasets.Dataset:
    """Returns an environment's tasks as training data: `prompt` (chat messages) and `task_id`.

    Args:
        env_id: Registered id of an environment with tasks.
        task_ids: Which of them, in this order; `None` for all.
        **env_kwargs: The environment's arguments.

    Raises:
        ImportError: The package `datasets` is not installed.
        ValueError: The id, a task or an argument is unknown.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("training data for TRL need a package: pip install 'trace-envs[trl]'") from error
    prompts = task_prompts(env_id, task_ids, env_kwargs)
    return datasets.Dataset.from_dict({"prompt": list(prompts.values()), "task_id": list(prompts)})


def task_prompts(
    env_id: str, task_ids: Sequence[str] | None, env_kwargs: dict[str, Any]
) -> dict[str, list[dict[str, str]]]:
    """Returns the messages before the first action, by task; every text can be encoded."""
    with closing(make_env(env_id, env_kwargs)) as env:
        prompts = {}
        for task_id in _tool_env(env).task_ids() if task_ids is None else task_ids:
            _, info = env.reset(seed=0, options={"task_id": task_id})
            prompts[task_id] = [{"role": m["role"], "content": encodable(m["content"])} for m in info["messages"]]
        return prompts


def _tool_env(env: gym.Env) -> ToolEnv:
    base = env.unwrapped
    if not isinstance(base, ToolEnv):
        raise ValueError(
            f"TRL can be given environments whose turns are text (trace_envs.env.ToolEnv), not {type(base).__name__}"
        )
    return base


def _lenient(call: ToolCall) -> dict[str, Any]:
    """Returns a tool that takes a call whatever the values are, by name only: the environment itself says what is wrong."""
    parameters = {
        "properties": {name: {"type": _ANYTHING} for name in call.arguments},
        "required": list(call.arguments),
    }
    function: Function = {"name": call.name, "parameters": parameters}
    return {"type": "function", "function": function}
