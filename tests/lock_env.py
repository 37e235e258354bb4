"""A small environment for the tests of what all families share: a dial that is turned, a lock that clicks by chance."""

from dataclasses import replace

import gymnasium as gym

from trace_envs.env import ToolEnv
from trace_envs.state import Outcome, Task


def _schema(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


class LockEnv(ToolEnv):
    """Turn the dial to the task's number and answer "open"."""

    def tool_schemas(self):
        return [
            _schema("dial", by={"type": "integer"}),
            _schema("listen"),
            _schema("recite", length={"type": "integer"}),
        ]

    def task_ids(self):
        return [str(n) for n in range(10)]

    def pick_task(self, rng, task_id):
        if task_id is not None and task_id not in self.task_ids():
            raise ValueError(f"no task {task_id!r}")
        return Task(task_id or str(rng.integers(10)), "Open the lock.")

    def call_tool(self, state, call):
        if call.name == "listen":
            return state, f"click {self.randomness(state).integers(1_000_000)}", False
        if call.name == "recite":
            return state, "x" * call.arguments["length"], False
        by = call.arguments["by"]
        if by < 0:
            return state, "Error: the dial only turns right.", True
        return replace(state, world=(state.world or 0) + by), f"turned by {by}", False

    def judge(self, state, answer):
        correct = answer == "open" and (state.world or 0) == int(state.task.task_id)
        return Outcome(correct, float(correct), {"em": float(correct)})


def register():
    if "Lock-v0" not in gym.registry:
        gym.register(id="Lock-v0", entry_point="lock_env:LockEnv", max_episode_steps=8)


def dial(by):
    return f'<tool_call>{{"name": "dial", "arguments": {{"by": {by}}}}}</tool_call>'


def recite(length):
    return f'<tool_call>{{"name": "recite", "arguments": {{"length": {length}}}}}</tool_call>'


LISTEN = '<tool_call>{"name": "listen"}</tool_call>'
OPEN = "<answer>open</answer>"
