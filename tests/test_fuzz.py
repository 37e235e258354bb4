"""A hundred thousand actions of every kind on every environment: no exception, no memory that grows without end.

The actions are made by a seeded generator, not drawn by hypothesis: it is their number that counts here, and the seed that an
error message names repeats them.
"""

from __future__ import annotations

import gc
import importlib.util
import json
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest

from trace_envs.env import ToolEnv

ACTIONS = 100_000
MIB = 2**20
WORDS = [
    "",
    "a",
    "Monday",
    "docs",
    "o1",
    "../..",
    "/",
    "None",
    "0",
    "-1",
    "1e9",
    "x" * 300,
    "ünï©ødé",
    "\ud800",
    "\x00",
]
WORDS += ["日本", "<think>"]
PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    *'{}"[]:,\n\\',
    "NaN",
    "1e400",
    "null",
]
PIECES += ["Action:", "Action Input:", "Final Answer:", "Thought:", '{"name": ', '"arguments": ', "\u2028"]

ENVIRONMENTS: list[tuple[str, dict[str, Any], int]] = [
    ("TraceMultiHopQA-v0", {"split": "validation"}, ACTIONS),
    ("TraceMultiHopQA-v0", {"split": "validation", "action_format": "react", "search_dropout": 0.3}, ACTIONS // 5),
    *(("TraceToolUse-v0", {"category": name}, ACTIONS // 4) for name in ("files", "messages", "calendar", "shop")),
    ("TraceToolUse-v0", {"action_format": "tags"}, ACTIONS // 5),
    ("TraceToolUse-v0", {"action_format": "react"}, ACTIONS // 5),
    ("TraceToolUse-v0", {"suite": "bfcl-v4"}, ACTIONS),
    ("TraceMath-v0", {"tool_names": ["calculator"]}, ACTIONS),
    ("TraceMath-v0", {"action_format": "tags", "tool_names": ["calculator"]}, ACTIONS // 5),
]


class Fuzzer:
    """Makes actions: calls with arguments of any kind, oracle's turns that were tampered with, and noise."""

    def __init__(self, env: ToolEnv, seed: int):
        self.env, self.rng = env, np.random.default_rng(seed)

    def pick(self, choices: list[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def value(self, kind: Any = None, depth: int = 0) -> Any:
        if kind is None or self.rng.random() < 0.1:
            kind = self.pick(["string", "integer", "number", "boolean", "null", "array", "object"])
        kind = self.pick(kind) if isinstance(kind, list) else kind
        if kind == "string":
            return self.pick([*WORDS, *self.env.state.task.prompt.replace(".", "").split()])
        if kind == "integer":
            return self.pick([0, 1, -1, 2, 7, 10, 10**6, 10**30, -(2**63)])
        if kind == "number":
            return self.pick([0.5, -1.5, 1e300, 0.1, 3])
        if kind == "boolean":
            return bool(self.rng.integers(2))
        if kind == "null" or depth > 3:
            return None
        if kind == "array":
            return [self.value(depth=depth + 1) for _ in range(int(self.rng.integers(3)))]
        return {self.pick(WORDS): self.value(depth=depth + 1) for _ in range(int(self.rng.integers(3)))}

    def call(self) -> str:
        tool = self.pick(self.env.tools_at(self.env.state))["function"]
        rules = tool["parameters"].get("properties", {})
        arguments = {name: self.value(rule.get("type")) for name, rule in rules.items() if self.rng.random() < 0.95}
        if self.rng.random() < 0.03:
            arguments[self.pick(WORDS)] = self.value()
        name = tool["name"] if self.rng.random() < 0.97 else self.pick(WORDS)
        body = json.dumps(arguments)
        return {
            "hermes": f'<tool_call>{{"name": {json.dumps(name)}, "arguments": {body}}}</tool_call>',
            "tags": f"<{name}>{body}</{name}>",
            "react": f"Action: {name}\nAction Input: {body}",
        }[self.env.action_format.name]

    def tampered(self) -> str:
        text = self.env.write(*self.env.oracle(self.env.state, self.rng))
        for _ in range(int(self.rng.integers(4))):
            a, b = sorted(int(i) for i in self.rng.integers(0, len(text) + 1, 2))
            text = self.pick(
                [text[:a] + text[b:], text[:a] + self.pick(PIECES) + text[a:], text[:b] + text[a:b] + text[b:]]
            )
        return text

    def noise(self) -> str:
        if self.rng.random() < 0.01:
            return self.pick(PIECES) * int(self.rng.integers(1, 4000))
        return "".join(self.pick(PIECES + WORDS) for _ in range(int(self.rng.integers(12))))

    def __call__(self) -> str:
        kind = self.rng.random()
        if kind < 0.6:
            return "\n".join(
                self.call() for _ in range(1 if self.rng.random() < 0.9 else int(self.rng.integers(1, 12)))
            )
        return self.tampered() if kind < 0.85 else self.noise()


def play(env: ToolEnv, actions: int, seed: int = 0) -> int:
    """Takes so many actions; returns the bytes that the process has grown by in the latter half."""
    fuzzer, half = Fuzzer(env, seed), 0
    env.reset(seed=seed)
    for i in range(actions):
        if i == actions // 2:
            gc.collect()
            half = psutil.Process().memory_info().rss
        action = fuzzer()
        try:
            observation, reward, terminated, truncated, info = env.step(action)
        except Exception as error:
            raise AssertionError(f"seed {seed}, action {i}: {action!r}") from error
        assert isinstance(observation, str) and 0.0 <= reward <= 1.0
        assert not (terminated and truncated)
        assert len(observation) <= 2 * env.max_observation_chars
        assert info["turn"] <= env.max_turns
        if terminated or truncated:
            env.reset()
    gc.collect()
    return psutil.Process().memory_info().rss - half


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "arguments", "actions"), ENVIRONMENTS, ids=lambda value: str(value))
def test_any_action_is_answered(env_id: str, arguments: dict[str, Any], actions: int) -> None:
    if arguments.get("suite") == "bfcl-v4" and importlib.util.find_spec("bfcl_eval") is None:
        pytest.skip("bfcl-eval is not installed")
    env = gym.make(env_id, disable_env_checker=True, **arguments).unwrapped
    assert isinstance(env, ToolEnv)
    # Caches of tasks that were not met before fill up; nothing else may.
    assert play(env, actions) < 48 * MIB


@pytest.mark.slow
def test_any_cell_is_answered() -> None:
    """Fewer, for each is a process; `tests/sandbox` has what is meant to harm."""
    env = gym.make(
        "TraceMath-v0", disable_env_checker=True, python_limits={"cpu_seconds": 1, "wall_seconds": 1}
    ).unwrapped
    assert isinstance(env, ToolEnv)
    assert play(env, 4_000) < 48 * MIB
