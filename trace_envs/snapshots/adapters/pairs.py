"""Adapters for environments that can already say what their state is: known pairs of methods, found by their signature.

Invariant: what is kept is a value of its own: neither what the environment handed out nor what it is handed back is kept.

The pairs are `clone_state(include_rng=...)`/`restore_state(state)`, `get_state()`/`set_state(state)`, and `copy()`. Each is
trusted to carry the environment's own state; its `np_random` is carried besides.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import gymnasium as gym

from trace_envs.snapshots import codec
from trace_envs.snapshots.adapters import generators, twins
from trace_envs.snapshots.adapters.base import Foreign
from trace_envs.snapshots.adapters.standins import belongs, holds_records
from trace_envs.snapshots.record import SnapshotUnsupportedError


def _accepts(env: gym.Env, method: str, *arguments: object, **named: object) -> bool:
    """Says whether an environment has a method that can be called with these arguments, and not without the positional ones."""
    found = getattr(env, method, None)
    if not callable(found):
        return False
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return False
    required = [
        p
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return len(required) == len(arguments)


class _Pair(Foreign):
    """A pair of methods, and the state of the environment's `np_random`."""

    def why_not(self, env: gym.Env) -> str | None:
        """Looks for the two methods."""
        return None if self.has(env) else f"it has no {self.name}"

    def has(self, env: gym.Env) -> bool:
        """Says whether an environment has the pair."""
        raise NotImplementedError

    def get(self, env: gym.Env) -> Any:
        """Calls the first of the two."""
        raise NotImplementedError

    def set(self, env: gym.Env, state: Any) -> None:
        """Calls the second of the two."""
        raise NotImplementedError

    def state(self, env: gym.Env) -> dict[str, Any]:
        """Copies what the first method returns, which may be what the environment goes on working with.

        Raises:
            SnapshotUnsupportedError: It cannot be copied.
        """
        frozen = generators.freeze_attributes(env, origins=False)
        return {"state": self._copied(env, self.get(env)), "generators": frozen}

    def adopt(self, env: gym.Env, payload: Any, seed: int | None) -> None:
        """Hands a copy of the state to the second method."""
        state = payload["state"]
        if holds_records(state):
            state = codec.revive(state, lambda made: belongs(made, env))
        self.set(env, self._copied(env, state))
        generators.thaw_attributes(env, payload["generators"])
        if seed is not None:
            generators.reseed(env, seed)

    def _copied(self, env: gym.Env, state: Any) -> Any:
        try:
            return copy.deepcopy(state)
        except Exception as error:
            raise SnapshotUnsupportedError(
                f"what {type(env).__name__} returns through {self.name} is a {type(state).__name__} that cannot be copied "
                f"({type(error).__name__}: {error}); let it return plain data, such as bytes or arrays"
            ) from error


class CloneState(_Pair):
    """`clone_state(include_rng=True)` and `restore_state(state)`."""

    name = "clone_state(include_rng)/restore_state(state)"

    def has(self, env: gym.Env) -> bool:
        """Looks for the two methods. What a subclass of ale-py's environment adds, its inherited pair would lose."""
        inherits = any(base.__module__ == "ale_py.env" for base in type(env).__mro__[1:])
        return not inherits and _accepts(env, "clone_state", include_rng=True) and _accepts(env, "restore_state", None)

    def get(self, env: gym.Env) -> Any:
        """Calls `clone_state`."""
        return env.clone_state(include_rng=True)  # type: ignore[attr-defined]

    def set(self, env: gym.Env, state: Any) -> None:
        """Calls `restore_state`."""
        env.restore_state(state)  # type: ignore[attr-defined]


class GetSetState(_Pair):
    """`get_state()` and `set_state(state)`."""

    name = "get_state()/set_state(state)"

    def has(self, env: gym.Env) -> bool:
        """Looks for the two methods; MuJoCo's `set_state(qpos, qvel)` is another thing."""
        return _accepts(env, "get_state") and _accepts(env, "set_state", None)

    def get(self, env: gym.Env) -> Any:
        """Calls `get_state`."""
        return env.get_state()  # type: ignore[attr-defined]

    def set(self, env: gym.Env, state: Any) -> None:
        """Calls `set_state`."""
        env.set_state(state)  # type: ignore[attr-defined]


def _tried(adapter: Foreign, env: gym.Env) -> str | None:
    """Returns why an environment's own way to copy itself does not work; `None` if it does."""
    try:
        adapter.state(env)
    except SnapshotUnsupportedError as error:
        return str(error)
    return None


class CopyMethod(Foreign):
    """`copy()`: returns another environment at the same moment."""

    name = "copy()"

    def why_not(self, env: gym.Env) -> str | None:
        """Looks for the method, then tries it."""
        if not _accepts(env, "copy"):
            return f"it has no {self.name}"
        return _tried(self, env)

    def state(self, env: gym.Env) -> Any:
        """Keeps a copy.

        Raises:
            SnapshotUnsupportedError: What `copy()` returned is no copy.
        """
        return twins.keep(env, lambda own: own.copy(), "copy()")

    def adopt(self, env: gym.Env, payload: Any, seed: int | None) -> None:
        """Takes over the attributes of a copy of the kept copy, so that who refers to the environment still does."""
        twins.adopt(env, payload, lambda own: own.copy(), "copy()", seed)


class DeepCopyMethod(Foreign):
    """`__deepcopy__(memo)` of the environment's own class: `copy.deepcopy(env)`."""

    name = "__deepcopy__"

    def why_not(self, env: gym.Env) -> str | None:
        """Looks for the method, then tries it."""
        return _tried(self, env) if hasattr(type(env), "__deepcopy__") else f"it has no {self.name}"

    def state(self, env: gym.Env) -> Any:
        """Keeps a deep copy.

        Raises:
            SnapshotUnsupportedError: What `copy.deepcopy` returned is no copy, or it failed, or did not return in time.
        """
        return twins.keep(env, copy.deepcopy, "copy.deepcopy")

    def adopt(self, env: gym.Env, payload: Any, seed: int | None) -> None:
        """Takes over the attributes of a deep copy of the kept one."""
        twins.adopt(env, payload, copy.deepcopy, "copy.deepcopy", seed)
