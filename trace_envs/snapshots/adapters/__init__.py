"""Ways to carry the state of an environment, in the order in which they are tried.

Invariant: the first adapter that can carry an environment is the one that does, always the same for one environment; which
one it is can be asked (`adapter_for(env).name`) and stands in every snapshot.
"""

from __future__ import annotations

import contextlib
import weakref

import gymnasium as gym

from trace_envs.snapshots.adapters.atari import Atari
from trace_envs.snapshots.adapters.attributes import AttributeCopy
from trace_envs.snapshots.adapters.base import Adapter, Foreign, Native, check_config, config_of, env_id
from trace_envs.snapshots.adapters.mujoco import Mujoco
from trace_envs.snapshots.adapters.pairs import CloneState, CopyMethod, DeepCopyMethod, GetSetState
from trace_envs.snapshots.adapters.statics import declare_static
from trace_envs.snapshots.record import SnapshotUnsupportedError

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Foreign",
    "Native",
    "adapter_for",
    "check_config",
    "config_of",
    "declare_static",
    "env_id",
]

ADAPTERS: tuple[Adapter, ...] = (
    Native(),
    Atari(),
    CloneState(),
    GetSetState(),
    CopyMethod(),
    Mujoco(),
    DeepCopyMethod(),
    AttributeCopy(),
)

ADVICE = (
    "Give it snapshot() and restore(snapshot, *, seed=None) (trace_envs.snapshots.Snapshotable), or a pair "
    "get_state()/set_state(state), or wrap it in trace_envs.Replayable(env), which restores by repeating its actions."
)

# What was decided for each environment that lives: an adapter, or why there is none. By id, because an environment may
# define equality.
_DECIDED: dict[int, tuple[weakref.ref[gym.Env], Adapter | str]] = {}


def adapter_for(env: gym.Env) -> Adapter:
    """Returns the adapter of a bare environment.

    Raises:
        SnapshotUnsupportedError: There is none; the message gives each one's reason and says what to add.
    """
    known = _DECIDED.get(id(env))
    found = known[1] if known is not None and known[0]() is env else _decide(env)
    if isinstance(found, str):
        raise SnapshotUnsupportedError(found)
    return found


def _decide(env: gym.Env) -> Adapter | str:
    found: Adapter | str
    reasons = []
    for adapter in ADAPTERS:
        reason = adapter.why_not(env)
        if reason is None:
            found = adapter
            break
        reasons.append(f"{adapter.name}: {reason}")
    else:
        name, cls = env_id(env), type(env).__name__
        shown = name if name == cls else f"{name} ({cls})"
        found = f"{shown} cannot be branched ({'; '.join(reasons)}). {ADVICE}"
    key = id(env)
    with contextlib.suppress(TypeError):  # an environment that cannot be referred to weakly is looked at each time
        _DECIDED[key] = weakref.ref(env, lambda _: _DECIDED.pop(key, None)), found
    return found
