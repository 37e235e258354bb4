"""Which attributes of an environment are tables that no step changes, and so are shared and not copied.

Invariant: two environments whose declared attributes differ never exchange snapshots.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

# By "module:class", so that no environment is imported before it is used.
_STATIC: dict[str, frozenset[str]] = {
    "gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv": frozenset({"P", "desc", "initial_state_distrib"}),
    "gymnasium.envs.toy_text.taxi:TaxiEnv": frozenset({"P", "desc", "locs", "locs_colors", "initial_state_distrib"}),
    "gymnasium.envs.toy_text.cliffwalking:CliffWalkingEnv": frozenset({"P", "_cliff", "initial_state_distrib"}),
    "gymnasium.envs.classic_control.continuous_mountain_car:Continuous_MountainCarEnv": frozenset(
        {"low_state", "high_state"}
    ),
    "gymnasium.envs.classic_control.mountain_car:MountainCarEnv": frozenset({"low", "high"}),
}
_OF_CLASS: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_PRINTS: dict[int, tuple[weakref.ref[gym.Env], tuple[int, ...], str]] = {}


def declare_static(cls: type[gym.Env], *names: str) -> None:
    """Declares attributes of an environment that every instance makes in its constructor and nothing changes afterwards.

    Snapshots then leave them out: they are shared between all moments of an environment, not copied at each. In return
    the declaration promises that neither `reset` nor `step` ever assigns one of these attributes or changes what is in
    it. Subclasses inherit it. Before a snapshot goes into another instance, the contents of both are compared.

    Args:
        cls: The class of the environment.
        names: Names of its attributes.

    Raises:
        TypeError: `cls` is no class of environments.
    """
    if not (isinstance(cls, type) and issubclass(cls, gym.Env)):
        raise TypeError(f"declare_static expects a class of environments and names of attributes, got {cls!r}")
    key = f"{cls.__module__}:{cls.__qualname__}"
    _STATIC[key] = _STATIC.get(key, frozenset()) | frozenset(names)
    _OF_CLASS.clear()
    _PRINTS.clear()


def statics_of(cls: type) -> frozenset[str]:
    """Returns the names that were declared for a class and its bases."""
    found = _OF_CLASS.get(cls)
    if found is None:
        declared = (_STATIC.get(f"{base.__module__}:{base.__qualname__}", frozenset()) for base in cls.__mro__)
        _OF_CLASS[cls] = found = frozenset().union(*declared)
    return found


def fingerprint(env: gym.Env, names: frozenset[str]) -> str | None:
    """Returns a digest of the contents of static attributes, worked out once for each environment; `None` of none."""
    if not names:
        return None
    own = vars(env)
    ids = tuple([id(own.get(name)) for name in names])
    known = _PRINTS.get(id(env))
    if known is not None and known[0]() is env and known[1] == ids:
        return known[2]
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(names):
        _feed(digest, name)
        _feed(digest, own.get(name))
    key = id(env)
    _PRINTS[key] = (weakref.ref(env, lambda _: _PRINTS.pop(key, None)), ids, digest.hexdigest())
    return _PRINTS[key][2]


def _feed(digest: Any, value: Any) -> None:
    digest.update(type(value).__qualname__.encode())
    if isinstance(value, Mapping):
        for key, part in value.items():
            _feed(digest, key)
            _feed(digest, part)
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for part in value:
            _feed(digest, part)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
    else:
        digest.update(repr(value).encode())
    digest.update(b"\0")
