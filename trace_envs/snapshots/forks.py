"""Independent environments at the same moment.

Invariant: a fork and its original share nothing that either of them can change; corpora, tables and functions are shared.

The bare environment is forked by its own `fork()`, or made again from its `spec`, or its attributes are copied; the wrappers
are made again around it, from the arguments that they recorded, or else copied attribute by attribute. Then the moment is
restored. Records of what has happened (episode statistics, frames) begin anew where the wrapper was made again.
"""

from __future__ import annotations

import copy
import inspect
from types import CellType, FunctionType
from typing import Any

import gymnasium as gym

from trace_envs.snapshots.adapters import adapter_for, env_id
from trace_envs.snapshots.adapters.copying import is_rendering
from trace_envs.snapshots.adapters.generators import set_space_states, space_states
from trace_envs.snapshots.adapters.statics import statics_of
from trace_envs.snapshots.plain import attributes_of, set_attributes
from trace_envs.snapshots.record import SnapshotUnsupportedError
from trace_envs.snapshots.wrapper_copies import keep, use
from trace_envs.snapshots.wrappers import ALIKE

# Adapters whose snapshots hold all of an environment, so that an empty instance of its class will do to restore them into.
_WHOLE = ("deepcopy", "copy()", "__deepcopy__")


def forks_itself(env: gym.Env) -> bool:
    """Says whether an environment has a `fork()` of its own."""
    return callable(getattr(type(env), "fork", None))


def twin_of(env: gym.Env) -> gym.Env:
    """Returns another environment like one without `fork()`, at any moment; wrappers that it has are made again too.

    Raises:
        SnapshotUnsupportedError: It can neither be made again nor copied.
    """
    if forks_itself(env):
        return env.fork()  # type: ignore[attr-defined, no-any-return]
    if isinstance(env, gym.Wrapper):
        return rewrapped([env], env.env, twin_of(env.env), env)
    return _made(env) or _blank(env)


def _made(bare: gym.Env) -> gym.Env | None:
    """Returns a bare environment made again from its spec; `None` if it has none."""
    if bare.spec is None:
        return None
    made = gym.make(bare.spec).unwrapped
    if type(made) is not type(bare):
        raise SnapshotUnsupportedError(
            f"gym.make of the spec of {bare.spec.id} makes a {type(made).__name__}, and not a {type(bare).__name__}, so it "
            f"cannot be forked; give {type(bare).__name__} fork()"
        )
    return made


def _blank(bare: gym.Env) -> gym.Env:
    """Returns an instance that a snapshot with all attributes can be restored into."""
    adapter = adapter_for(bare).name
    if adapter not in _WHOLE:
        raise SnapshotUnsupportedError(
            f"{env_id(bare)} cannot be forked: its snapshots ({adapter}) do not hold what another instance is made of. "
            f"Register it with gymnasium.register and make it by gym.make, so that its spec says how, or give it fork()"
        )
    cls = type(bare)
    twin = object.__new__(cls)
    attributes: dict[str, Any] = {}
    static = statics_of(cls)
    for name, value in attributes_of(bare).items():
        if name in static or name in ("spec", "metadata"):
            attributes[name] = value
        elif isinstance(value, gym.Space):
            attributes[name] = copy.deepcopy(value)
        elif is_rendering(value):
            attributes[name] = None
        elif type(value) is FunctionType:
            attributes[name] = _rebound(value, {id(bare): twin})
    set_attributes(twin, attributes)
    return twin


def rewrapped(wrappers: list[gym.Wrapper], inner: gym.Env, twin: gym.Env, top: gym.Env) -> gym.Env:
    """Returns `twin` with wrappers around it like those around `inner`.

    Args:
        wrappers: The wrappers around `inner`, outermost first.
        inner: What they stand around.
        twin: Another environment like `inner`.
        top: The outermost environment of the stack.
    """
    twins: dict[int, gym.Env] = {id(inner.unwrapped): twin.unwrapped, id(inner): twin}
    for wrapper in reversed(wrappers):
        made = _made_again(wrapper, twin)
        twin = _copied(wrapper, twin, twins, top) if made is None else made
        for name in ("_action_space", "_observation_space"):
            theirs, own = getattr(wrapper, name), getattr(twin, name)
            if theirs is not None and own is not None:
                set_space_states(own, space_states(theirs), None, 0)
        twins[id(wrapper)] = twin
    return twin


def _made_again(wrapper: gym.Wrapper, env: gym.Env) -> gym.Wrapper | None:
    """Returns a wrapper made from the arguments that another recorded; `None` if these are not all that it takes."""
    if not isinstance(wrapper, gym.utils.RecordConstructorArgs):
        return None
    cls, recorded = type(wrapper), wrapper._saved_kwargs
    takes = inspect.signature(cls).parameters.values()
    names = [parameter.name for parameter in list(takes)[1:]]
    simple = all(parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in takes)
    if not simple or set(names) != recorded.keys() - {"env"}:
        return None
    return cls(env, **copy.deepcopy({name: recorded[name] for name in names}))


def _copied(wrapper: gym.Wrapper, env: gym.Env, twins: dict[int, gym.Env], top: gym.Env) -> gym.Wrapper:
    """Returns a wrapper with copies of another's attributes."""
    twin = object.__new__(type(wrapper))
    twins = {**twins, id(wrapper): twin}
    attributes: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in attributes_of(wrapper).items():
        if name in ALIKE:
            attributes[name] = copy.deepcopy(value) if isinstance(value, gym.Space) else value
        elif isinstance(value, gym.Space):
            attributes[name] = copy.deepcopy(value)
        elif isinstance(value, gym.Env) and id(value) in twins:
            attributes[name] = twins[id(value)]
        elif type(value) is FunctionType:
            attributes[name] = _rebound(value, twins)
        elif is_rendering(value):
            attributes[name] = None
        else:
            rest[name] = value
    attributes |= {"env": env, "_cached_spec": None}
    set_attributes(twin, attributes)
    values, _ = use(twin, keep(wrapper, rest, top), twin)
    set_attributes(twin, values)
    return twin


def _rebound(function: FunctionType, twins: dict[int, gym.Env]) -> FunctionType:
    """Returns a function whose closure refers to twins instead of the environments that it was made around."""
    cells = function.__closure__
    if not cells:
        return function
    contents = []
    for cell in cells:
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            contents.append(cell)
            continue
        if isinstance(value, FunctionType):
            value = _rebound(value, twins)
        elif isinstance(value, gym.Env):
            value = twins.get(id(value), value)
        contents.append(cell if value is cell.cell_contents else CellType(value))
    if all(a is b for a, b in zip(contents, cells, strict=True)):
        return function
    bound = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(contents)
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound
