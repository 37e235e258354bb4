"""The simulators of BFCL, run on values.

Invariant: a simulator lives for one call. It is made from a graph, called, and turned into a graph again; nothing is kept in
modules, and nothing that a model wrote is evaluated: functions are looked up by name among those that the schemas describe.

The simulators ask for the time in two places (when a file was written, and how old a traveller is); here it stands still.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from trace_envs.tool_use.bfcl.data import DOCUMENTS, INSTALL, Program, function_schemas
from trace_envs.tool_use.bfcl.graph import Graph, freeze, thaw

_SOURCE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
_STATELESS = frozenset({"MathAPI"})
_MOST_DIGITS = 4300  # what Python writes at most
_HELPERS = {"GorillaFileSystem": ("Directory", "File")}
NOW = datetime.datetime(2024, 9, 1, 10, 30)
"""The time at which it stands still: that of the simulated stock exchange."""


class _Frozen(datetime.datetime):
    """`datetime` at a standstill."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Frozen:
        return cls(NOW.year, NOW.month, NOW.day, NOW.hour, NOW.minute, tzinfo=tz)

    @classmethod
    def today(cls) -> _Frozen:
        return cls.now()


class _FrozenModule:
    """The module `datetime` at a standstill."""

    datetime = _Frozen


@cache
def simulator_class(name: str) -> type:
    """Returns the class of a simulator, for which time stands still.

    Raises:
        ImportError: The package, or one that it needs, is not installed.
    """
    module: Any
    try:
        module = importlib.import_module(f"{_SOURCE}.{DOCUMENTS[name]}")
    except ImportError as error:
        raise ImportError(f"the simulator {name} of bfcl-eval cannot be imported ({error}): {INSTALL}") from error
    if name == "GorillaFileSystem":
        module.datetime = _FrozenModule
    elif name == "TravelAPI":
        module.datetime = _Frozen
    return getattr(module, name)


@cache
def _helpers(name: str) -> Mapping[str, type]:
    module = inspect.getmodule(simulator_class(name))
    return {helper: getattr(module, helper) for helper in _HELPERS.get(name, ())}


@cache
def owners(classes: tuple[str, ...]) -> Mapping[str, str]:
    """Returns the simulator of each function; of two with the same one the later has it, as in the official harness."""
    described = {schema["function"]["name"] for name in classes for schema in function_schemas()[name]}
    return {
        method: name
        for name in classes
        for method, _ in inspect.getmembers(simulator_class(name), inspect.isfunction)
        if not method.startswith("_") and method in described
    }


def first_graph(name: str, config: Mapping[str, Any], long_context: bool) -> Graph:
    """Returns a simulator as its configuration makes it; the configuration becomes part of it."""
    simulator: Any = simulator_class(name)()
    if name not in _STATELESS:
        simulator._load_scenario(config, long_context=long_context)
    return freeze(vars(simulator), _helpers(name))


def live(name: str, graph: Graph) -> Any:
    """Returns a simulator made from its graph, of which it is independent."""
    simulator: Any = object.__new__(simulator_class(name))
    vars(simulator).update(thaw(graph, _helpers(name)))
    return simulator


def run(name: str, graph: Graph, call: Program) -> tuple[Graph, str, bool]:
    """Calls a function of a simulator.

    Returns:
        The graph after it, the result in the words of the official harness, and whether it is an error.
    """
    simulator = live(name, graph)
    try:
        if name in _STATELESS:
            _refuse_endless(named((name,), call))
        with _own_precision(name):
            result = getattr(simulator, call.name)(*call.positional, **call.named)
            text, failed = _text(result), isinstance(result, dict) and "error" in result
    except Exception as error:  # whatever a simulator makes of arguments that a model wrote
        text, failed = f"Error during execution: {error}", True
    return freeze(vars(simulator), _helpers(name), graph), text, failed


@contextlib.contextmanager
def _own_precision(name: str) -> Iterator[None]:
    """Keeps what a simulator does to the precision of whole modules to one call."""
    if name not in _STATELESS:
        yield
        return
    import mpmath

    with decimal.localcontext(), mpmath.workdps(mpmath.mp.dps):
        yield


def _refuse_endless(call: Program) -> None:
    """Raises `ValueError` for calculations that would keep the computer busy; the official harness would wait for them."""
    given = call.named
    for argument in ("precision", "decimal_places"):
        if isinstance(places := given.get(argument), int) and abs(places) > _MOST_DIGITS:
            raise ValueError(f"{argument} must be at most {_MOST_DIGITS}")
    base, exponent = given.get("base"), given.get("exponent")
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) * base.bit_length() > 4 * _MOST_DIGITS:
        raise ValueError("the result is too large")


def _text(result: Any) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError, RecursionError):
            return str(result)
    return str(result)


def named(classes: tuple[str, ...], call: Program) -> Program:
    """Returns a call with all its arguments named."""
    if not call.positional:
        return call
    function = getattr(simulator_class(owners(classes)[call.name]), call.name)
    names = list(inspect.signature(function).parameters)[1:]
    return Program(call.name, (), dict(zip(names, call.positional, strict=False)) | dict(call.named))
