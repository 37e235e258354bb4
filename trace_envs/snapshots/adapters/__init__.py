"""Ways to carry the state of an environment, in the order in which they are tried.

Invariant: the first adapter that can carry an environment is the one that does, always the same for one environment; which
one it is can be asked (`adapter_for(env).name`) and stands in every snapshot.
"""

from __future__ import annotations

import gymnasium as gym

from trace_envs.snapshots.adapters.base import Adapter, Native, env_id
from trace_envs.snapshots.record import SnapshotUnsupportedError

__all__ = ["ADAPTERS", "Adapter", "Native", "adapter_for", "env_id"]

ADAPTERS: tuple[Adapter, ...] = (Native(),)

ADVICE = (
    "Give it snapshot() and restore(snapshot, *, seed=None) (trace_envs.snapshots.Snapshotable), or a pair "
    "get_state()/set_state(state), or wrap it in trace_envs.Replayable(env), which restores by repeating its actions."
)


def adapter_for(env: gym.Env) -> Adapter:
    """Returns the adapter of a bare environment.

    Raises:
        SnapshotUnsupportedError: There is none; the message gives each one's reason and says what to add.
    """
    reasons = []
    for adapter in ADAPTERS:
        reason = adapter.why_not(env)
        if reason is None:
            return adapter
        reasons.append(f"{adapter.name}: {reason}")
    raise SnapshotUnsupportedError(f"{env_id(env)} cannot be branched ({'; '.join(reasons)}). {ADVICE}")
