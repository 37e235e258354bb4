"""Gymnasium environments for language-model agents whose state can be snapshotted, restored and branched at any turn."""

from __future__ import annotations

import gymnasium as gym

from trace_envs.snapshots import (
    EnvSnapshot,
    Replayable,
    ReplayDivergenceError,
    SnapshotUnsupportedError,
    SnapshotWrapper,
    check_snapshot,
    fork,
    reseed,
    restore,
    snapshot,
)

__all__ = [
    "EnvSnapshot",
    "ReplayDivergenceError",
    "Replayable",
    "SnapshotUnsupportedError",
    "SnapshotWrapper",
    "check_snapshot",
    "fork",
    "register_envs",
    "reseed",
    "restore",
    "snapshot",
]

_ENVIRONMENTS = {
    "TraceMultiHopQA-v0": "trace_envs.multihop_qa:MultiHopQAEnv",
    "TraceToolUse-v0": "trace_envs.tool_use:ToolUseEnv",
    "TraceMath-v0": "trace_envs.math_reasoning:MathEnv",
}


def register_envs() -> None:
    """Registers every environment of the package with Gymnasium; safe to call again."""
    for env_id, entry_point in _ENVIRONMENTS.items():
        if env_id not in gym.registry:
            gym.register(id=env_id, entry_point=entry_point)


register_envs()
