"""Values of every kind that a snapshot may hold, for the tests of comparison, codec and digest."""

import math
import random
from collections import deque
from types import MappingProxyType

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trace_envs.state import EpisodeState, FinalAnswer, FormatError, History, Outcome, Task, ToolCall, Turn

BIT_GENERATORS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]


class Cell:
    """A plain object with cycles in it, as custom environments have them."""

    def __init__(self, value=None, other=None):
        self.value, self.other = value, other


class Slotted(Cell):
    __slots__ = ("__private", "extra")

    def __init__(self, value, extra=None):
        super().__init__(value)
        if extra is not None:
            self.extra = extra
        self.__private = [value]


def moved(generator, draws):
    generator.random(draws)
    return generator


def python_random(seed):
    generator = random.Random(seed)
    generator.gauss(0, 1)
    return generator


generators = st.one_of(
    st.builds(
        lambda bits, seed, draws: moved(np.random.Generator(bits(seed)), draws),
        st.sampled_from(BIT_GENERATORS),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    st.builds(lambda bits, seed: bits(seed), st.sampled_from(BIT_GENERATORS), st.integers(0, 2**70)),
    st.builds(lambda seed, draws: moved(np.random.RandomState(seed), draws), st.integers(0, 3), st.integers(0, 2)),
    st.builds(python_random, st.integers(0, 3)),
)
floats = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -0.0, math.nan])
texts = st.text(st.characters(codec=None, categories=None), max_size=4) | st.sampled_from(
    ["\ud83d\ude00", "😀", "\ud800"]
)
hashable = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.integers(),
    st.sampled_from([2**63, -(2**63), 2**63 - 1, -(1 << 5000)]),
    floats,
    st.complex_numbers(),
    texts,
    st.binary(max_size=4),
    st.builds(range, st.integers(0, 3), st.integers(0, 3)),
    st.builds(np.float64, floats),
    st.builds(np.int8, st.integers(-3, 3)),
    st.sampled_from([np.str_("a\0"), np.bytes_(b"a\0"), np.datetime64("NaT", "s"), np.bool_(True), np.float32("nan")]),
)
dtypes = st.one_of(
    hnp.scalar_dtypes(),
    hnp.array_dtypes(hnp.integer_dtypes() | hnp.floating_dtypes(endianness="?"), max_size=3),
    st.sampled_from([np.dtype({"names": ["a", "b"], "formats": ["u1", "<f4"], "offsets": [4, 8], "itemsize": 16})]),
)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
turns = st.builds(
    Turn,
    texts,
    st.one_of(
        st.builds(ToolCall, texts, st.dictionaries(texts, hashable, max_size=2)),
        st.builds(FinalAnswer, texts),
        st.builds(FormatError, texts),
    ),
    texts,
    st.booleans(),
)


def history(some):
    made = None
    for turn in some:
        made = History(turn, made)
    return made


histories = st.lists(turns, max_size=4).map(history)
outcomes = st.builds(
    lambda correct, reward, scores: Outcome(correct, reward, MappingProxyType(scores)),
    st.booleans(),
    floats,
    st.dictionaries(texts, floats, max_size=2),
)
states = st.builds(
    EpisodeState,
    task=st.builds(Task, texts, texts),
    key=st.integers(0, 2**63),
    turn=st.integers(0, 5),
    history=histories,
    world=st.none() | st.tuples(st.integers(0, 3)) | st.dictionaries(texts, hashable, max_size=2),
    outcome=st.none() | outcomes,
)
objects = st.lists(hashable, max_size=3).map(lambda some: np.array([*some, None], object)[:-1])


def containers(values):
    return st.one_of(
        st.lists(values, max_size=3),
        st.lists(values, max_size=3).map(tuple),
        st.dictionaries(hashable, values, max_size=3),
        st.dictionaries(texts, values, max_size=2).map(MappingProxyType),
        st.builds(deque, st.lists(values, max_size=3), st.sampled_from([None, 3, 7])),
        st.sets(hashable, max_size=3),
        st.frozensets(st.tuples(hashable, hashable), max_size=2),
    )


values = st.recursive(
    st.one_of(
        hashable, arrays, objects, generators, histories, states, st.just(np.dtype("<f4")), st.binary().map(bytearray)
    ),
    containers,
    max_leaves=6,
)
