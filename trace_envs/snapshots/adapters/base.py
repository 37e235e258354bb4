"""What an adapter is: a way to carry the state of one kind of environment.

Invariant: an adapter either carries a state exactly or says why it cannot; it never guesses.
"""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import gymnasium as gym

from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.record import EnvSnapshot


def env_id(env: gym.Env) -> str:
    """Returns the registered id of an environment, or the name of its class."""
    return env.spec.id if env.spec is not None else type(env).__name__


class Adapter(ABC):
    """Takes and puts back the state of bare environments. Adapters hold no state of their own."""

    name: ClassVar[str]

    @abstractmethod
    def why_not(self, env: gym.Env) -> str | None:
        """Returns `None` if this adapter can carry the environment, else the reason in a few words."""

    @abstractmethod
    def take(self, env: gym.Env) -> EnvSnapshot:
        """Returns the present moment.

        Raises:
            SnapshotUnsupportedError: Part of the state cannot be carried; the message names it.
        """

    @abstractmethod
    def put(self, env: gym.Env, taken: EnvSnapshot, seed: int | None) -> None:
        """Returns to a moment; with a seed, what is random from there on is new and a function of the seed."""

    def renew(self, env: gym.Env, seed: int) -> None:
        """Gives what is random from here on a new seed; equal to `put` at the present moment."""
        self.put(env, self.take(env), seed)


def config_of(env: gym.Env) -> dict[str, Any] | None:
    """Returns the arguments that a registered environment was made with, without `render_mode`; `None` if there are none.

    Worked out once for each `spec`, and copied, so that a snapshot keeps nothing that can change.
    """
    spec = env.spec
    if spec is None:
        return None
    known = _CONFIGS.get(id(spec))
    if known is None or known[0]() is not spec:
        kwargs = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
        key = id(spec)
        known = weakref.ref(spec, lambda _: _CONFIGS.pop(key, None)), copy.deepcopy(kwargs) or None
        _CONFIGS[key] = known
    return known[1]


_CONFIGS: dict[int, tuple[weakref.ref[Any], dict[str, Any] | None]] = {}


def check_config(env: gym.Env, taken: EnvSnapshot) -> None:
    """Checks that an environment was made with the same arguments as the one that a snapshot was taken from.

    Raises:
        ValueError: It was not; the message names the arguments.
    """
    own, other = config_of(env), taken.config
    if own is other:
        return
    mine, theirs = dict(own or {}), dict(other or {})
    differing = sorted(
        name
        for name in mine.keys() | theirs.keys()
        if name not in mine or name not in theirs or difference(mine[name], theirs[name], strict=False) is not None
    )
    if differing:
        shown = ", ".join(f"{name}={theirs.get(name, '(not given)')!r:.60}" for name in differing)
        own_shown = ", ".join(f"{name}={mine.get(name, '(not given)')!r:.60}" for name in differing)
        raise ValueError(f"the snapshot is of a {taken.env_id} made with {shown}; this one was made with {own_shown}")


class Foreign(Adapter):
    """An adapter of environments that know nothing of snapshots. Subclasses say what their state is, and put it back.

    Taken and put back besides: the arguments that the environment was made with, which have to be equal.
    """

    @abstractmethod
    def state(self, env: gym.Env) -> Any:
        """Returns the state as a value (`EnvSnapshot.payload`)."""

    @abstractmethod
    def adopt(self, env: gym.Env, payload: Any, seed: int | None) -> None:
        """Puts the state back; with a seed, what is random from there on is a function of it."""

    def take(self, env: gym.Env) -> EnvSnapshot:
        """Returns the present moment."""
        return EnvSnapshot(env_id(env), None, self.state(env), adapter=self.name, config=config_of(env))

    def put(self, env: gym.Env, taken: EnvSnapshot, seed: int | None) -> None:
        """Returns to a moment.

        Raises:
            ValueError: The snapshot was taken by another adapter, or from an environment made with other arguments.
        """
        if taken.adapter != self.name:
            raise ValueError(
                f"the snapshot of {taken.env_id} was taken through the adapter {taken.adapter!r}, this environment goes "
                f"through {self.name!r}; take and restore it with the same release and the same wrappers"
            )
        check_config(env, taken)
        self.adopt(env, taken.payload, seed)


class Native(Adapter):
    """The environment's own `snapshot()` and `restore(snapshot, *, seed=None)`."""

    name = "native"

    def why_not(self, env: gym.Env) -> str | None:
        """Looks for the two methods."""
        missing = [m for m in ("snapshot", "restore") if not callable(getattr(env, m, None))]
        return f"it has no {' and no '.join(f'{m}()' for m in missing)}" if missing else None

    def take(self, env: gym.Env) -> EnvSnapshot:
        """An environment's own kind of snapshot travels as it is."""
        taken: Any = env.snapshot()  # type: ignore[attr-defined]
        return taken if isinstance(taken, EnvSnapshot) else EnvSnapshot(env_id(env), None, taken, adapter="own kind")

    def put(self, env: gym.Env, taken: EnvSnapshot, seed: int | None) -> None:
        """Calls the environment's `restore`."""
        env.restore(taken.payload if taken.adapter == "own kind" else taken, seed=seed)  # type: ignore[attr-defined]
