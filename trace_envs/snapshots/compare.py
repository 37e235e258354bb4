"""`difference(a, b)`: where two values of any kind differ.

Invariant: `difference(a, b)` is `None` exactly when nothing that can be observed of one tells it from the other: types,
numbers to the last bit (so `-0.0` is not `0.0`; NaN equals NaN), arrays by dtype and shape, generators by their state,
objects by their attributes. Depth is limited by memory, not by the recursion limit, and cycles end.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np

from trace_envs.snapshots.plain import EncodedName, EncodedObject, attributes_of, class_name, generator_state, is_plain
from trace_envs.state import History

_SHOWN, _LONGEST = 60, 500  # characters of a value and of a path in a message
_BARE = frozenset(
    (str, bytes, int, list, tuple, dict, set, frozenset, deque, np.ndarray)
)  # without attributes of their own
_BY_IDENTITY = (type, FunctionType, BuiltinFunctionType, ModuleType, Enum)


def difference(a: Any, b: Any, *, strict: bool = True) -> str | None:
    """Returns `None` if two values are equal, else where and how they differ first, such as `['image'][3, 4]: 2 != 5`.

    Args:
        a: Any value.
        b: Any value.
        strict: Tell a NumPy scalar from the Python number of the same value.
    """
    pending: list[tuple[str, Iterator[Pair]]] = [("", iter([("", a, b)]))]
    # Pairs under comparison or compared, kept alive so that no other object gets their place in memory.
    met: dict[tuple[int, int], tuple[Any, Any]] = {}
    while pending:
        part = next(pending[-1][1], None)
        if part is None:
            pending.pop()
            continue
        step, a, b = part
        if a is b or (id(a), id(b)) in met:
            continue
        if not strict:
            a, b = (x.item() if isinstance(x, np.generic) else x for x in (a, b))
        found = _look(a, b, partial(difference, strict=strict))
        if isinstance(found, str):
            path = "".join([before for before, _ in pending]) + step
            path = path if len(path) <= _LONGEST else f"{path[: _LONGEST // 2]}...{path[-_LONGEST // 2 :]}"
            return f"{path}{'' if not path or found.startswith('[') else ': '}{found}"
        if found is not None:
            met[id(a), id(b)] = a, b
            pending.append((step, iter(found)))
    return None


Pair = tuple[str, Any, Any]
Found = str | Iterable[Pair] | None  # what differs, or the parts that remain to be compared, or nothing


def _look(a: Any, b: Any, same: Callable[[Any, Any], str | None]) -> Found:
    """Compares two values as far as they are not made of parts."""
    if isinstance(a, EncodedObject) or isinstance(b, EncodedObject):
        return _encoded(a, b)
    if isinstance(a, EncodedName) or isinstance(b, EncodedName):
        a, b = _named(a), _named(b)
    if type(a) is not type(b):
        return f"{show(a)} != {show(b)} ({_type(a)}, {_type(b)})"
    if isinstance(a, float):
        return None if _same_float(a, b) else f"{a!r} != {b!r}"
    if isinstance(a, complex):
        return None if _same_float(a.real, b.real) and _same_float(a.imag, b.imag) else f"{a!r} != {b!r}"
    if isinstance(a, np.generic) and not isinstance(a, np.void | np.character):
        same_unit = a.dtype == b.dtype
        return None if same_unit and _equal_array(np.asarray(a), np.asarray(b)).all() else f"{a!r} != {b!r}"
    if isinstance(a, np.void):
        return _arrays(np.asarray(a), np.asarray(b))
    if isinstance(a, str | bytes | int | bytearray | array):
        return (None if type(a) in _BARE else _own_attributes(a, b)) if a == b else f"{show(a)} != {show(b)}"
    if a is None or isinstance(a, _BY_IDENTITY):
        return None if a == b else f"{show(a)} != {show(b)}"
    if isinstance(a, History):
        return _histories(a, b)
    if isinstance(a, np.ndarray):
        return _joined(_arrays(a, b), a, b)
    if isinstance(a, list | tuple | deque):
        return _joined(_sequences(a, b), a, b)
    if isinstance(a, Mapping):
        return _joined(_mappings(a, b, same), a, b) if not isinstance(a, MappingProxyType) else _mappings(a, b, same)
    if isinstance(a, Set):
        return _joined(_sets(a, b, same), a, b)
    if (state := generator_state(a)) is not None:
        return [(".state", state, generator_state(b))]
    if isinstance(a, range):
        return [(f".{n}", getattr(a, n), getattr(b, n)) for n in ("start", "stop", "step")]
    if isinstance(a, MethodType):
        return [(".__func__", a.__func__, b.__func__), (".__self__", a.__self__, b.__self__)]
    if isinstance(a, partial):
        return [(f".{n}", getattr(a, n), getattr(b, n)) for n in ("func", "args", "keywords")]
    if is_plain(type(a)):
        return _own_attributes(a, b)
    return _ask(a, b)


def _ask(a: Any, b: Any) -> str | None:
    """Compares objects whose state nobody but their class can see."""
    try:
        equal = bool(a == b)
    except Exception as error:
        return f"{show(a)} cannot be compared with {show(b)} ({type(error).__name__}: {error})"
    return None if equal else f"{show(a)} != {show(b)}"


def _same_float(a: float, b: float) -> bool:
    return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)


def _own_attributes(a: Any, b: Any) -> Found:
    mine, other = attributes_of(a), attributes_of(b)
    return _attributes(mine, other) if mine or other else None


def _attributes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Found:
    if a.keys() != b.keys():
        return f"attributes {_only(a, b)}"
    return ((f".{name}", value, b[name]) for name, value in a.items())


def _only(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> str:
    sides = [(side, [show(k) for k in x if k not in y]) for side, x, y in (("left", a, b), ("right", b, a))]
    return ", ".join(f"only on the {side}: {', '.join(names[:5])}" for side, names in sides if names)


def _encoded(a: Any, b: Any) -> Found:
    names = [x.class_name if isinstance(x, EncodedObject) else class_name(type(x)) for x in (a, b)]
    if names[0] != names[1]:
        return f"{names[0]} != {names[1]}"
    return _attributes(*(x.attributes if isinstance(x, EncodedObject) else attributes_of(x) for x in (a, b)))


def _named(value: Any) -> Any:
    """Returns what stands in bytes for a class or a member of an enumeration."""
    if isinstance(value, Enum):
        return EncodedName(class_name(type(value)), value.name)
    return EncodedName(class_name(value)) if isinstance(value, type) else value


def _joined(found: Found, a: Any, b: Any) -> Found:
    """Adds to what was found of a container's content the attributes that its subclass may have."""
    own = None if type(a) in _BARE else _own_attributes(a, b)
    if isinstance(found, str) or own is None:
        return found
    return own if isinstance(own, str) else [*(found or ()), *own]


def _histories(a: History, b: History) -> Found:
    """Compares turn by turn as far back as the two are not one and the same."""
    pairs: list[tuple[Any, Any]] = []
    left: History | None = a
    right: History | None = b
    while left is not right and left is not None and right is not None:
        pairs.append((left.turn, right.turn))
        left, right = left.before, right.before
    if (left is None) != (right is None):
        counts = [len(pairs) + sum(1 for _ in _walk(rest)) for rest in (left, right)]
        return f"{counts[0]} turns != {counts[1]} turns"
    shared = sum(1 for _ in _walk(left))
    return ((f"[{shared + i}]", x, y) for i, (x, y) in enumerate(reversed(pairs)))


def _walk(history: History | None) -> Iterator[History]:
    while history is not None:
        yield history
        history = history.before


def _sequences(a: Any, b: Any) -> Found:
    if len(a) != len(b):
        return f"length {len(a)} != {len(b)}"
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return f"maxlen {a.maxlen} != {b.maxlen}"
    names = getattr(type(a), "_fields", None)
    return ((f".{names[i]}" if names else f"[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)))


def _mappings(a: Mapping[Any, Any], b: Mapping[Any, Any], same: Callable[[Any, Any], str | None]) -> Found:
    if isinstance(a, defaultdict) and a.default_factory != b.default_factory:  # type: ignore[attr-defined]
        return "default_factory differs"
    keys = _matched(a, b, same)
    if isinstance(keys, str):
        return f"keys {keys}"
    return ((f"[{show(k)}]", a[k], b[other]) for k, other in keys)


def _sets(a: Any, b: Any, same: Callable[[Any, Any], str | None]) -> str | None:
    pairs = _matched(a, b, same)
    return pairs if isinstance(pairs, str) else None


def _matched(a: Any, b: Any, same: Callable[[Any, Any], str | None]) -> list[tuple[Any, Any]] | str:
    """Pairs the hashable members of two unordered collections; says which have no partner if any has none."""
    partners = {member: member for member in b}
    pairs, alone = [], []
    for member in a:
        # What is equal to Python need not be the same (1, True and 1.0), nor the same be equal (NaN).
        if member in partners and same(member, partners[member]) is None:
            pairs.append((member, partners.pop(member)))
        else:
            alone.append(member)
    for member in list(alone):
        partner = next((k for k in partners.values() if type(k) is type(member) and same(member, k) is None), alone)
        if partner is not alone:
            pairs.append((member, partner))
            del partners[partner]
            alone.remove(member)
    if not alone and not partners:
        return pairs
    sides = (("left", alone), ("right", list(partners.values())))
    return ", ".join(f"only on the {side}: {', '.join(map(show, some[:5]))}" for side, some in sides if some)


def _arrays(a: np.ndarray, b: np.ndarray) -> Found:
    if a.dtype != b.dtype:
        return f"dtype {a.dtype} != {b.dtype}"
    if a.shape != b.shape:
        return f"shape {a.shape} != {b.shape}"
    if a.dtype.names is not None:
        return [(f"[{name!r}]", np.asarray(a[name]), np.asarray(b[name])) for name in a.dtype.names]
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.hasobject or a.dtype.kind == "T":
        return ((_index(i), a[i], b[i]) for i in np.ndindex(a.shape))
    if a.tobytes() == b.tobytes():
        return None
    equal = _equal_array(a, b)
    if equal.all():
        return None
    first = np.unravel_index(int(np.argmin(equal)), a.shape) if a.shape else ()
    where, count = tuple(map(int, first)), int(equal.size - equal.sum())
    more = f" ({count} of {equal.size} elements differ)" if count > 1 else ""
    found = f"{show(a[where].item())} != {show(b[where].item())}{more}"
    return f"{_index(where)}: {found}" if where else found


def _equal_array(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compares elements of one dtype: numbers to the bit, any NaN with any other."""
    kind = a.dtype.kind
    if kind == "c":
        return _equal_array(a.real, b.real) & _equal_array(a.imag, b.imag)
    if kind == "f":
        return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))
    if kind in "mM":
        return np.asarray(a.view(np.int64) == b.view(np.int64))
    if kind == "V":
        same = [x.tobytes() == y.tobytes() for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)]
        return np.array(same, bool).reshape(a.shape)
    return np.asarray(a == b)


def _index(where: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, where))}]" if where else ""


def _type(value: Any) -> str:
    return type(value).__name__


def show(value: Any) -> str:
    """Returns a value in at most about sixty characters; of what has parts, the class alone."""
    if isinstance(value, str | bytes) and len(value) > _SHOWN:
        return f"{value[: _SHOWN // 2]!r}... ({len(value)} long)"
    if value is None or isinstance(value, str | bytes | int | float | complex | np.generic | Enum | np.dtype):
        shown = repr(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else f"{value:#x}"
        return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return f"<{_type(value)} of {len(value)}>" if isinstance(value, list | tuple | dict | set) else f"<{_type(value)}>"
