"""Snapshots of environments: values that can be kept, compared, sent to another process, and restored any number of times."""

from trace_envs.snapshots.adapters import adapter_for, declare_static
from trace_envs.snapshots.check import check_snapshot
from trace_envs.snapshots.record import (
    SCHEMA_VERSION,
    EnvSnapshot,
    ReplayDivergenceError,
    Snapshotable,
    SnapshotFormatError,
    SnapshotUnsupportedError,
)
from trace_envs.snapshots.replay import Replayable
from trace_envs.snapshots.stack import fork, reseed, restore, snapshot
from trace_envs.snapshots.tracked import SnapshotWrapper

__all__ = [
    "SCHEMA_VERSION",
    "EnvSnapshot",
    "ReplayDivergenceError",
    "Replayable",
    "SnapshotFormatError",
    "SnapshotUnsupportedError",
    "SnapshotWrapper",
    "Snapshotable",
    "adapter_for",
    "check_snapshot",
    "declare_static",
    "fork",
    "reseed",
    "restore",
    "snapshot",
]
