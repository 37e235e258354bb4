"""Moments kept as a second environment, for environments that can copy themselves.

Invariant: the kept environment is never stepped and never given away; what is restored is always a copy of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import gymnasium as gym

from trace_envs.snapshots import codec
from trace_envs.snapshots.adapters import generators
from trace_envs.snapshots.adapters.copying import is_rendering
from trace_envs.snapshots.adapters.standins import belongs
from trace_envs.snapshots.plain import EncodedObject
from trace_envs.snapshots.record import SnapshotUnsupportedError

TIME_LIMIT = 10.0
"""Seconds that an environment may take to copy itself."""

_ADVICE = "give the class snapshot()/restore(snapshot, *, seed=None), or wrap the environment in trace_envs.Replayable"


@dataclass(frozen=True, slots=True)
class Twin:
    """A kept copy.

    Attributes:
        env: The copy.
        generators: States of the original's generators, which the copy may share with it.
    """

    env: gym.Env
    generators: dict[str, generators.GeneratorState] = field(hash=False)


codec.register(Twin, "adapters.Twin")


def keep(env: gym.Env, copier: Callable[[Any], Any], name: str) -> Twin:
    """Returns a copy to be kept.

    Args:
        env: The environment.
        copier: Returns a copy of it.
        name: What the copier is called in errors.

    Raises:
        SnapshotUnsupportedError: The copier raised, did not return in time, or returned no copy.
    """
    return Twin(_copy(env, copier, name), generators.freeze_attributes(env, origins=False))


def adopt(env: gym.Env, twin: Any, copier: Callable[[Any], Any], name: str, seed: int | None) -> None:
    """Gives an environment the attributes of a copy of a kept one; see `keep`.

    Raises:
        SnapshotUnsupportedError: See `keep`; or the copy refers to itself from inside, and would be used instead.
        ValueError: What was kept is of another class.
    """
    if isinstance(twin, Twin) and isinstance(twin.env, EncodedObject):
        twin = codec.revive(twin, lambda made: belongs(made, env))
    if not isinstance(twin, Twin) or type(twin.env) is not type(env):
        raise ValueError(f"the snapshot does not hold a {type(env).__name__} but {_what(twin)}")
    fresh = _copy(twin.env, copier, name)
    attributes = dict(vars(fresh))
    vars(fresh).clear()
    for key, value in attributes.items():
        if value is fresh:
            attributes[key] = env
        elif isinstance(value, MethodType) and value.__self__ is fresh:
            attributes[key] = MethodType(value.__func__, env)
    del value
    if sys.getrefcount(fresh) > 2:
        raise SnapshotUnsupportedError(
            f"a copy of {type(env).__name__} refers to itself from inside its attributes, so it cannot take the place of "
            f"the original; {_ADVICE}"
        )
    own = vars(env)
    kept = {key: value for key, value in own.items() if key == "spec" or is_rendering(value)}
    own.clear()
    own.update(attributes | kept)
    generators.thaw_attributes(env, twin.generators, foreign=twin.env)
    if seed is not None:
        generators.reseed(env, seed)


def _what(twin: Any) -> str:
    return f"a {type(twin.env).__name__}" if isinstance(twin, Twin) else f"a {type(twin).__name__}"


def _copy(env: gym.Env, copier: Callable[[Any], Any], name: str) -> gym.Env:
    made: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            made.append(copier(env))
        except BaseException as error:
            failed.append(error)

    # A thread that hangs cannot be ended; as a daemon it does not keep the process alive.
    thread = threading.Thread(target=work, name=f"{name} of {type(env).__name__}", daemon=True)
    thread.start()
    thread.join(TIME_LIMIT)
    what = f"{name} of {type(env).__name__}"
    if failed:
        error = failed[0]
        raise SnapshotUnsupportedError(f"{what} raised {type(error).__name__}: {error}; {_ADVICE}") from error
    if not made:
        raise SnapshotUnsupportedError(f"{what} did not return within {TIME_LIMIT:g} seconds; {_ADVICE}")
    if made[0] is env:
        raise SnapshotUnsupportedError(f"{what} returned the environment itself and not a copy; {_ADVICE}")
    if type(made[0]) is not type(env):
        raise SnapshotUnsupportedError(f"{what} returned a {type(made[0]).__name__}; {_ADVICE}")
    return made.pop()
