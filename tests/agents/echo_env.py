"""An environment for the tests in which any text is an action and chance decides: what a model of random weights can act in.

The observation's length depends on the action; an `e` at the start ends the episode; success is the parity of the letters.
"""

from dataclasses import dataclass, replace

import gymnasium as gym
import numpy as np
import torch

from agents.evaluate import make_vector
from agents.policies import TransformersPolicy, collect
from agents.tiny import build_model
from allocation import TraceAllocator, TraceConfig, TreeAllocationWrapper
from trace_envs.env import ToolEnv
from trace_envs.state import FormatError, History, Outcome, Task, Turn


@dataclass(frozen=True, slots=True)
class EchoTask(Task):
    hops: int = 1
    answers: tuple[str, ...] = ("even",)


class EchoEnv(ToolEnv):
    def __init__(self, split="train", **kwargs):
        super().__init__(**({"max_turns": 4, "system_prompt": ""} | kwargs))
        self.tasks = [EchoTask(f"{split}-{i}", "Say " + "a b c " * (i % 4), 1 + i % 2) for i in range(12)]

    def tool_schemas(self):
        return []

    def task_ids(self):
        return [t.task_id for t in self.tasks]

    def pick_task(self, rng, task_id):
        if task_id is None:
            return self.tasks[int(rng.integers(len(self.tasks)))]
        return next(t for t in self.tasks if t.task_id == task_id)

    def level_of(self, task):
        return task.hops

    def call_tool(self, state, call):
        raise AssertionError("there are no tools")

    def judge(self, state, answer):
        right = sum(map(ord, "".join(t.text for t in state.turns()))) % 2 == 0
        return Outcome(is_correct=right, reward=float(right), components={"em": float(right)})

    def advance(self, state, text):
        over = text.startswith("e")
        seen = "" if over else f"{len(text)} letters" + " and more" * (sum(map(ord, text)) % 4)
        turn = Turn(text, FormatError(""), seen)
        state = replace(state, turn=state.turn + 1, history=History(turn, state.history), terminated=over)
        state = replace(state, truncated=not over and state.turn >= self.max_turns)
        return replace(state, outcome=self.judge(state, None)) if state.done else state


def register():
    if "Echo-v0" not in gym.registry:
        gym.register(id="Echo-v0", entry_point="echo_env:EchoEnv")


class EvenPredictor:
    """Ready from the start; every prefix may go either way."""

    ready = True

    def predict(self, anchors):
        return np.full(len(anchors), 0.5)

    def update(self, anchors, values, weights):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def random_model(tokenizer, seed=0, **config):
    """A model whose next token depends on the context, and is the end token now and then."""
    model = build_model(len(tokenizer), width=32, layers=2, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 3
    for name, value in config.items():
        setattr(model.config, name, value)
    return model.eval()


def echo_wrapper(budget=24, num_envs=5, continuations=1.0, policy=None, **kwargs):
    return TreeAllocationWrapper(
        make_vector("Echo-v0", num_envs, kwargs),
        allocator=TraceAllocator(EvenPredictor(), TraceConfig(continuations=continuations, cap_per_rollout=None)),
        budget=budget,
        encode=None if policy is None else policy.encode,
        keep_snapshots=True,
    )


def echo_forest(model, tokenizer, seed=0, *, encode=False, policy=None, envs=None, **kwargs):
    settings = {k: kwargs.pop(k) for k in ("max_new_tokens", "temperature") if k in kwargs}
    policy = policy or TransformersPolicy(model, tokenizer, **({"max_new_tokens": 8, "seed": seed} | settings))
    envs = envs or echo_wrapper(policy=policy if encode else None, **kwargs)
    return collect(envs, policy, seed=seed)
