"""Snapshots of environments: values that can be kept, compared, sent to another process, and restored any number of times."""

from trace_envs.snapshots.adapters import adapter_for
from trace_envs.snapshots.record import (
    SCHEMA_VERSION,
    EnvSnapshot,
    ReplayDivergenceError,
    Snapshotable,
    SnapshotUnsupportedError,
)
from trace_envs.snapshots.stack import fork, reseed, restore, snapshot

__all__ = [
    "SCHEMA_VERSION",
    "EnvSnapshot",
    "ReplayDivergenceError",
    "SnapshotUnsupportedError",
    "Snapshotable",
    "adapter_for",
    "fork",
    "reseed",
    "restore",
    "snapshot",
]
