"""What the tests of the asynchronous runner share: an environment with hooks, policies that are functions of the path, and a
lock-step driver to compare with."""

import asyncio
import threading
import zlib
from dataclasses import replace

import numpy as np
from bit_env import BitEnv, DepthPredictor
from gymnasium.vector import SyncVectorEnv

from allocation import Sample, TraceAllocator, TraceConfig, TreeAllocationWrapper, UniformAllocator

LONG = 20  # seconds: a wait that takes this long is a failure


class HookedEnv(BitEnv):
    """Calls a function with itself before each reset, restore and step."""

    def __init__(self, hook=lambda env, what: None, **kwargs):
        super().__init__(**kwargs)
        self.hook = hook

    def reset(self, **kwargs):
        self.hook(self, "reset")
        return super().reset(**kwargs)

    def snapshot(self):
        return replace(super().snapshot(), env_id="HookedEnv")

    def restore(self, snapshot, *, seed=None):
        self.hook(self, "restore")
        super().restore(snapshot, seed=seed)

    def step(self, action):
        self.hook(self, "step")
        return super().step(action)


class Hang:
    """A tool that hangs at one of the calls of a kind, until the test is over."""

    def __init__(self, at=0, what="step", then=lambda: None):
        self.left, self.what, self.then = at, what, then
        self.reached, self.release = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    def __call__(self, env, what):
        if what != self.what:
            return
        with self._lock:
            self.left -= 1
            mine = self.left == -1
        if mine:
            self.reached.set()
            self.then()
            self.release.wait()


def vector(hook, num_envs=4, **kwargs):
    return SyncVectorEnv([lambda: HookedEnv(hook, **kwargs)] * num_envs)


def nothing(env, what):
    pass


def trace(**config):
    return TraceAllocator(DepthPredictor(), TraceConfig(**({"continuations": 1.0, "cap_per_rollout": None} | config)))


ALLOCATORS = {"trace": trace, "grpo": lambda: UniformAllocator(4)}


def path_generator(context):
    """A generator that is a function of the prompt and the path."""
    path = [n.action for n in context.tree.path(context.node)[1:]]
    return np.random.default_rng([zlib.crc32(f"{context.tree.key} {path}".encode()), context.tree.index])


def guess(context):
    bits = context.observation["bits"] if isinstance(context.observation, dict) else context.observation
    rng = path_generator(context)
    return int(bits[1]) if rng.random() < 0.8 else int(rng.integers(2))


class Batched:
    def __init__(self, choose=guess, delays=None):
        self.choose, self.delays, self.sizes = choose, delays, []

    def act(self, contexts):
        self.sizes.append(len(contexts))
        if self.delays is not None:
            self.delays()
        return [self.choose(c) for c in contexts]


class Single:
    def __init__(self, choose=guess, delays=None):
        self.choose, self.delays = choose, delays

    async def act(self, context):
        if self.delays is not None:
            await asyncio.sleep(np.random.default_rng().random() * 0.003)
        return self.choose(context)


def lock_step(envs, choose, seed=0, **kwargs):
    """The slow obvious driver; returns the forest with its trees sorted."""
    wrapped = TreeAllocationWrapper(envs, **kwargs)
    wrapped.reset(seed=seed)
    while wrapped.active.any():
        actions, samples = [wrapped.single_action_space.sample()] * wrapped.num_envs, [None] * wrapped.num_envs
        for context in wrapped.contexts():
            answer = choose(context)
            if isinstance(answer, Sample):
                samples[context.slot], answer = answer, answer.text
            actions[context.slot] = answer
        wrapped.step(actions, samples)
    for tree in wrapped.forest:
        tree.sort()
    return wrapped.forest


def contents(forest):
    """Everything that is in a forest, as plain data."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return (value.dtype.str, value.tolist()) if isinstance(value, np.ndarray) else value

    nodes = ("id", "parent", "children", "depth", "origin", "rollout", "reward", "terminated", "truncated")
    more = ("is_correct", "tool_errors", "tool_error", "components", "predicted")
    return [
        (
            tree.key,
            tree.index,
            tree.info,
            tree.rollout_seeds,
            [
                ([getattr(n, name) for name in nodes + more], n.action, plain(n.observation), n.sample is None)
                for n in tree.nodes
            ],
        )
        for tree in forest
    ]


def counts(forest):
    return {k: v for k, v in forest.ledger.counts().items() if k != "model_calls"}


def assert_same(forest, reference):
    assert contents(forest) == contents(reference) and counts(forest) == counts(reference)


def random_delays(env=None, what=None):
    threading.Event().wait(np.random.default_rng().choice([0, 0, 0.001, 0.004]))


def only_timeout(forest):
    late = [(t, n) for t in forest for n in t.nodes if (n.components or {}).get("timed_out")]
    assert len(late) == 1 == forest.ledger.timeouts
    return late[0]


def assert_node(forest, error):
    """What an error names is in the forest, and was not yet finished."""
    tree = next(t for t in forest if t.key == error.tree)
    node = tree.nodes[error.node]
    assert node.depth + 1 == error.turn and not node.terminal and not tree.finished
    assert str(error).startswith(f"tree {tree.key!r}, node {node.id}, turn {error.turn}: ")
