"""How the state of a wrapper is taken and put back: one class for each way.

Invariant: `ready` makes every check and every copy; what it returns only assigns. So a stack is restored whole or not at all.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
from gymnasium.wrappers.utils import RunningMeanStd

from trace_envs.snapshots.adapters import generators
from trace_envs.snapshots.adapters.copying import ATOMS, is_rendering
from trace_envs.snapshots.plain import attributes_of, set_attributes
from trace_envs.snapshots.record import ELAPSED, SnapshotUnsupportedError
from trace_envs.snapshots.wrapper_copies import keep, seed_of, use

Apply = Callable[[], None]

# What every wrapper has, and what Gymnasium works out again when it is asked for.
ALIKE = frozenset({"env", "_action_space", "_observation_space", "_metadata", "_cached_spec", "_saved_kwargs"})


class Kind:
    """How the state of one class of wrappers is taken and put back.

    Attributes:
        hides: Which of "observation" and "reward" may be another outside of the wrapper than inside.
        brings: Whether part of the state may outlive a reset.
        draws: Whether the wrapper may have random generators of its own.
        counts: Whether the wrapper counts turns or rewards.
    """

    hides: frozenset[str] = frozenset({"observation", "reward"})
    brings = True
    draws = False
    counts = False

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Returns the state.

        Raises:
            SnapshotUnsupportedError: Part of it cannot be carried.
        """
        raise NotImplementedError

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Checks a state and makes all copies; what it returns puts the state back, and cannot fail."""
        raise NotImplementedError

    def carried(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Returns the part of the state that a reset leaves as it is."""
        return self.take(wrapper, top)

    def ready_carried(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env) -> Apply:
        """As `ready`, for what `carried` returned."""
        return self.ready(wrapper, state, top, None)

    def counted(self, wrapper: gym.Wrapper) -> tuple[int | None, float | None]:
        """Returns turns and return of the episode so far, as far as the wrapper counts them."""
        return None, None


class Known(Kind):
    """A wrapper of Gymnasium's.

    Args:
        state: Attributes that belong to the moment.
        stays: Attributes that do not: arguments, and records of what has happened.
        carries: Which of the state outlive a reset.
        hides: See `Kind`.
    """

    def __init__(self, state: str = "", stays: str = "", carries: str = "", hides: str = ""):
        self.state, self.stays = tuple(state.split()), frozenset(stays.split())
        self.carries, self.hides = tuple(carries.split()), frozenset(hides.split())
        self.brings = bool(self.carries)
        self.known = self.stays | {*self.state}

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Copies the attributes; running means become their three numbers."""
        return self._taken(wrapper, self.state)

    def _taken(self, wrapper: gym.Wrapper, names: tuple[str, ...]) -> dict[str, Any]:
        own = wrapper.__dict__
        values = {}
        try:
            for name in names:
                values[name] = own[name]
        except KeyError as error:
            raise _other_release(wrapper, f"has no attribute {error}") from None
        for value in values.values():
            if type(value) not in ATOMS:
                plain = {n: dict(vars(v)) if isinstance(v, RunningMeanStd) else v for n, v in values.items()}
                try:  # observations and numbers, with nothing else inside
                    return copy.deepcopy(plain)
                except Exception as error:
                    raise SnapshotUnsupportedError(
                        f"the wrapper {type(wrapper).__name__} holds what cannot be copied ({type(error).__name__}: {error}); "
                        f"let the environment's observations and actions be arrays and plain data"
                    ) from error
        return values

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Checks that the names are those of this release."""
        return self._ready(wrapper, state, self.state, top)

    def _ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], names: tuple[str, ...], top: gym.Env) -> Apply:
        own = wrapper.__dict__
        if state.keys() != set(names):
            raise ValueError(
                f"the snapshot's state of the wrapper {type(wrapper).__name__} holds {sorted(state)}, this release of "
                f"Gymnasium ({gym.__version__}) keeps {sorted(names)}; restore it with the release that it was taken with"
            )
        values, _ = use(wrapper, state, top)
        for name in names:
            if name not in own:
                raise _other_release(wrapper, f"has no attribute {name!r}")
            if isinstance(own[name], RunningMeanStd):
                mean = object.__new__(type(own[name]))
                vars(mean).update(values[name])
                values[name] = mean
        return lambda: own.update(values)

    def carried(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Copies the attributes that outlive a reset."""
        return self._taken(wrapper, self.carries) if self.carries else {}

    def ready_carried(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env) -> Apply:
        """As `ready`."""
        return self._ready(wrapper, state, self.carries, top)


class Limit(Known):
    """`TimeLimit`, which counts turns."""

    counts = True

    def counted(self, wrapper: gym.Wrapper) -> tuple[int | None, float | None]:
        """Returns its count."""
        return wrapper._elapsed_steps, None  # type: ignore[attr-defined]


class Statistics(Known):
    """`RecordEpisodeStatistics`: the episode's return, length and time so far; when it began is worked out again."""

    counts = True

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Adds the time that the episode has taken, `None` before the first one."""
        state = super().take(wrapper, top)
        try:
            start: float = wrapper.episode_start_time  # type: ignore[attr-defined]
        except AttributeError as error:
            raise _other_release(wrapper, f"({error})") from None
        state[ELAPSED] = time.perf_counter() - start if start != -1 else None
        return state

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Puts the beginning of the episode so far back from now."""
        state = dict(state)
        elapsed = state.pop(ELAPSED, None)
        if not isinstance(elapsed, float | None):
            raise ValueError(
                f"{ELAPSED} in the snapshot's state of RecordEpisodeStatistics is no number: {elapsed!r:.40}"
            )
        put = super().ready(wrapper, state, top, seed)

        def apply() -> None:
            put()
            wrapper.episode_start_time = -1 if elapsed is None else time.perf_counter() - elapsed  # type: ignore[attr-defined]

        return apply

    def counted(self, wrapper: gym.Wrapper) -> tuple[int | None, float | None]:
        """Returns its counts."""
        return wrapper.episode_lengths, float(wrapper.episode_returns)  # type: ignore[attr-defined]


class Checker(Known):
    """`PassiveEnvChecker` looks at the first calls and compares what they return; a restored environment has had them."""

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Ends the comparison under way."""
        super().ready(wrapper, state, top, seed)
        done = {"checked_reset": True, "checked_step": True, "checked_data_reuse": True, "_previous_data": None}
        own = wrapper.__dict__
        return lambda: own.update({name: value for name, value in done.items() if name in own})


class Protocol(Kind):
    """A wrapper with `get_wrapper_state()` and `set_wrapper_state(state)`."""

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Copies what the wrapper says."""
        return keep(wrapper, {"state": wrapper.get_wrapper_state()}, top)  # type: ignore[attr-defined]

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Copies it again for the wrapper."""
        if set(state) != {"state"}:
            raise _not_of(wrapper, state)
        values, _ = use(wrapper, state, top)
        return lambda: wrapper.set_wrapper_state(values["state"])  # type: ignore[attr-defined]


class Unknown(Kind):
    """Any other wrapper: all of its attributes but spaces (of these, their generators) and windows.

    Args:
        base: What is known of the class of Gymnasium's that it is derived from.
    """

    draws = True

    def __init__(self, base: Known | None):
        self.base = base if base is not None else Known()
        self.left_out = ALIKE | self.base.known

    def _own(self, wrapper: gym.Wrapper) -> tuple[dict[str, Any], dict[str, gym.Space]]:
        """Returns attributes and spaces."""
        found = attributes_of(wrapper)
        spaces = {n: v for n, v in found.items() if isinstance(v, gym.Space)}
        rest = {n: v for n, v in found.items() if n not in self.left_out and n not in spaces and not is_rendering(v)}
        return rest, spaces

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Copies the attributes."""
        rest, spaces = self._own(wrapper)
        states = {name: generators.space_states(space) for name, space in spaces.items()}
        used = {name: state for name, state in states.items() if any(part is not None for part in state)}
        return self.base.take(wrapper, top) | keep(wrapper, rest, top) | used

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Copies them again; attributes that the wrapper did not have then are removed."""
        own, own_spaces = self._own(wrapper)
        of_base = {name: value for name, value in state.items() if name in self.base.state or name == ELAPSED}
        spaces = {name: value for name, value in state.items() if name in own_spaces}
        rest = {name: value for name, value in state.items() if name not in of_base and name not in spaces}
        if rest.keys() & self.left_out:
            raise _not_of(wrapper, state)
        put = self.base.ready(wrapper, of_base, top, seed)
        index = _index(wrapper, top)
        own_seed = None if seed is None else seed_of(seed, index)
        values, used = use(wrapper, rest, top, own_seed)

        def apply() -> None:
            put()
            for name in own.keys() - values.keys():
                object.__delattr__(wrapper, name)
            set_attributes(wrapper, values)
            met = used
            for name in sorted(spaces):
                met = generators.set_space_states(own_spaces[name], spaces[name], own_seed, met)

        return apply


def _other_release(wrapper: gym.Wrapper, what: str) -> SnapshotUnsupportedError:
    return SnapshotUnsupportedError(
        f"the wrapper {type(wrapper).__name__} of Gymnasium {gym.__version__} {what}, so its state cannot be carried; use a "
        f"release from 1.1 on that trace_envs is tested with, or remove the wrapper from the stack"
    )


def _not_of(wrapper: gym.Wrapper, state: Mapping[str, Any]) -> ValueError:
    cls = type(wrapper)
    return ValueError(
        f"the snapshot's state of the wrapper {cls.__name__} holds {sorted(state)}, which is not what "
        f"{cls.__module__}.{cls.__qualname__} keeps; restore it into the wrapper that it was taken from"
    )


def _index(wrapper: gym.Wrapper, top: gym.Env) -> int:
    """Returns a wrapper's place in its stack, from inside: the same whatever is around it."""
    index = 0
    env: gym.Env = wrapper
    while isinstance(env, gym.Wrapper):
        env, index = env.env, index + 1
    return index
