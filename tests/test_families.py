"""Forests over every family: branches in this process and in others, each path executed again."""

from __future__ import annotations

import importlib.util
from typing import Any

import gymnasium as gym
import pytest

from agents.policies.scripted import ScriptedPolicy, oracle_of
from allocation import TreeAllocationWrapper
from trace_envs.env import ToolEnv

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("TraceMultiHopQA-v0", {}),
    ("TraceToolUse-v0", {}),
    ("TraceToolUse-v0", {"suite": "bfcl-v4"}),
    ("TraceMath-v0", {"category": "modular"}),
]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("env_id", "arguments"), FAMILIES, ids=lambda value: str(value))
def test_a_forest_of_erring_oracles_is_what_its_paths_say(env_id: str, arguments: dict[str, Any], mode: str) -> None:
    if arguments.get("suite") == "bfcl-v4" and importlib.util.find_spec("bfcl_eval") is None:
        pytest.skip("bfcl-eval is not installed")
    twin = gym.make(env_id, **arguments).unwrapped
    assert isinstance(twin, ToolEnv)
    policy = ScriptedPolicy(oracle_of(twin, noise=0.3))
    vector = gym.make_vec(env_id, num_envs=3, vectorization_mode=mode, **arguments)
    envs = TreeAllocationWrapper(vector, budget=18, keep_snapshots=True)
    try:
        envs.reset(seed=0)
        while envs.active.any():
            texts = iter(sample.text for sample in policy.act(envs.contexts()))
            envs.step([next(texts) if active else "" for active in envs.active])
        forest = envs.forest
        assert forest.ledger.root_rollouts + forest.ledger.continuations == 18
        assert forest.ledger.continuations > 0
        report = forest.verify()
        assert report.paths == report.verdicts == 18
    finally:
        envs.close()
