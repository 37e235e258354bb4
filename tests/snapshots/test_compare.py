import copy
import copyreg
import math
import random
from collections import defaultdict, deque, namedtuple
from enum import Enum
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_values import BIT_GENERATORS, Cell, Slotted, history, values

from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.plain import EncodedObject, class_name
from trace_envs.state import FinalAnswer, History, Turn

Pair = namedtuple("Pair", "first second")


class Colour(Enum):
    RED = 1
    BLUE = 2


class Named(dict):
    pass


def named(value, name):
    made = Named(value)
    made.name = name
    return made


def turn(text):
    return Turn(text, FinalAnswer(""), "")


copyreg.pickle(MappingProxyType, lambda proxy: (MappingProxyType, (dict(proxy),)))


@given(values)
@settings(max_examples=200, deadline=None)
def test_a_value_equals_its_copy(value):
    assert difference([value], [copy.deepcopy(value)]) is None


IMAGE = np.arange(20).reshape(4, 5)
DIFFERENT = [
    ({"image": IMAGE}, {"image": np.where(IMAGE == 19, 5, IMAGE)}, "['image'][3, 4]: 19 != 5"),
    ([1, [2, 3]], [1, [2, 4]], "[1][1]: 3 != 4"),
    (1, True, "1 != True (int, bool)"),
    (1, 1.0, "1 != 1.0 (int, float)"),
    (0.0, -0.0, "0.0 != -0.0"),
    (np.float64(1), 1.0, "np.float64(1.0) != 1.0 (float64, float)"),
    (np.int32(1), np.int64(1), "np.int32(1) != np.int64(1) (int32, int64)"),
    (np.str_("a\0"), np.str_("a"), None),
    (complex(0, -0.0), complex(0, 0.0), None),
    ("a", b"a", None),
    ("a" * 100, "a" * 99 + "b", None),
    (None, False, None),
    ((1,), [1], None),
    ([1], [1, 2], "length 1 != 2"),
    (Pair(1, [2]), Pair(1, [3]), ".second[0]: 2 != 3"),
    (Pair(1, 2), (1, 2), None),
    ({1: 0}, {True: 0}, "keys only on the left: 1, only on the right: True"),
    ({"a": 1, "b": 2}, {"a": 1}, "keys only on the left: 'b'"),
    ({"a": {1, 2}}, {"a": {1, 2.0}}, "['a']: only on the left: 2, only on the right: 2.0"),
    ({(1, 2)}, {(1, True)}, None),
    (MappingProxyType({"a": 1}), {"a": 1}, None),
    (MappingProxyType({"a": 1}), MappingProxyType({"a": 2}), "['a']: 1 != 2"),
    (defaultdict(int), defaultdict(list), "default_factory differs"),
    (named({1: 2}, "x"), named({1: 2}, "y"), ".name: 'x' != 'y'"),
    (deque([1], 2), deque([1], 3), "maxlen 2 != 3"),
    (np.zeros(2), np.zeros(2, "f4"), "dtype float64 != float32"),
    (np.zeros(2), np.zeros((2, 1)), "shape (2,) != (2, 1)"),
    (np.array([0.0]), np.array([-0.0]), "[0]: 0.0 != -0.0"),
    (np.array([1, 2, 3]), np.array([1, 0, 0]), "[1]: 2 != 0 (2 of 3 elements differ)"),
    (np.array(1), np.array(2), "1 != 2"),
    (np.zeros(1, "i4,f8"), np.ones(1, "i4,f8"), "['f0'][0]: 0 != 1"),
    (np.array([1, [2]], object), np.array([1, [3]], object), "[1][0]: 2 != 3"),
    (np.datetime64("NaT", "s"), np.datetime64("NaT", "ms"), None),
    (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[0, 0]), None),
    (random.Random(1), random.Random(2), None),
    (np.random.RandomState(1), np.random.RandomState(2), None),
    (history([turn("a"), turn("b")]), history([turn("a"), turn("c")]), "[1].text: 'b' != 'c'"),
    (history([turn("a")]), history([turn("a"), turn("c")]), "1 turns != 2 turns"),
    (Cell(1, Cell(2)), Cell(1, Cell(3)), ".other.value: 2 != 3"),
    (Slotted(1, 2), Slotted(1), "attributes only on the left: 'extra'"),
    (Slotted(1), Cell(1), None),
    (Colour.RED, Colour.BLUE, None),
    (Colour, Pair, None),
    (Cell(1).__init__, Cell(2).__init__, ".__self__.value: 1 != 2"),
    (len, max, None),
    (range(0, 0), range(1, 0), ".start: 0 != 1"),
    (EncodedObject(class_name(Cell), {"value": 1, "other": None}), Cell(2), ".value: 1 != 2"),
    (EncodedObject("a:b", {}), Cell(), f"a:b != {class_name(Cell)}"),
]


@pytest.mark.parametrize(("left", "right", "message"), DIFFERENT)
def test_differences_are_found_and_located(left, right, message):
    found = difference(left, right)
    assert found is not None and len(found) < 200
    assert message is None or found == message
    assert difference(right, left) is not None
    assert difference(left, copy.deepcopy(left)) is None


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (math.nan, -math.nan),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1, 2, math.nan}, {float("nan"), 2, 1}),
        ({(math.nan, 1): 2}, {(float("nan"), 1): 2}),
        (np.array([np.nan, 1]), np.array([-np.nan, 1])),
        (np.array([complex(np.nan, 1)]), np.array([complex(-np.nan, 1)])),
        (IMAGE, np.asfortranarray(IMAGE)),
        (IMAGE, np.repeat(IMAGE, 2, axis=1)[:, ::2]),
        (EncodedObject(class_name(Cell), {"other": None, "value": [1]}), Cell([1])),
    ],
)
def test_what_cannot_be_told_apart_is_equal(left, right):
    assert difference(left, right) is None and difference(right, left) is None


@pytest.mark.parametrize("bits", BIT_GENERATORS)
def test_generators_are_equal_while_they_would_draw_the_same(bits):
    left, right = np.random.Generator(bits(1)), np.random.Generator(bits(1))
    assert difference(left, right) is None
    left.random()
    assert difference(left, right).startswith(".state")
    right.random()
    assert difference(left, right) is None
    left.integers(2, dtype=np.int32)
    assert difference(left, right) is not None


def test_numbers_of_a_batch_are_those_of_python_if_asked_for():
    assert difference([np.float64(1), np.bool_(True)], [1.0, True], strict=False) is None
    assert difference({np.int64(1): np.int32(2)}, {1: 2}, strict=False) is None
    assert difference([np.float64(1)], [1], strict=False) == "[0]: 1.0 != 1 (float, int)"


def test_depth_and_cycles_end():
    def deep(end):
        for _ in range(20_000):
            end = {"x": [end]}
        return end

    assert difference(deep(1), deep(1)) is None
    found = difference(deep(1), deep(2))
    assert found.endswith(": 1 != 2") and len(found) < 1000
    ring, other, longer = Cell(), Cell(), Cell()
    ring.other, other.other = ring, other
    longer.other = Cell(None, longer)
    assert difference(ring, other) is None and difference(ring, longer) is None
    longer.other.value = 1
    assert difference(ring, longer) == ".other.value: None != 1 (NoneType, int)"


def test_long_histories_are_compared_only_where_they_part():
    shared = None
    for i in range(20_000):
        shared = History(turn(str(i)), shared)
    left, right = History(turn("l"), shared), History(turn("r"), shared)
    assert difference(left, right) == "[20000].text: 'l' != 'r'"
    again = history([turn(str(i)) for i in range(20_000)])
    assert difference(shared, again) is None


def test_an_object_that_cannot_be_compared_is_named():
    class Stubborn(np.ndarray):
        def __eq__(self, other):
            raise RuntimeError("no")

    class Refuses(Exception):
        def __eq__(self, other):
            raise RuntimeError("no")

    assert "cannot be compared" in difference([Refuses()], [Refuses()])
    assert difference(np.zeros(2).view(Stubborn), np.zeros(2).view(Stubborn)) is None


@given(st.lists(st.integers(0, 2), max_size=4), st.lists(st.integers(0, 2), max_size=4))
def test_plain_lists_agree_with_python(left, right):
    assert (difference(left, right) is None) == (left == right)
    assert (difference(set(left), set(right)) is None) == (set(left) == set(right))
    assert (difference(np.array(left), np.array(right)) is None) == (left == right)
