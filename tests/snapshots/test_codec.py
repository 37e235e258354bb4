import json
import math
import random
import struct
import subprocess
import sys
import zlib
from collections import OrderedDict, deque
from enum import Enum
from hashlib import blake2b
from pathlib import Path

import gymnasium as gym
import lock_env
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lock_env import LISTEN, LockEnv, dial
from plain_values import BIT_GENERATORS, Cell, Slotted, generators, history, turns, values

import trace_envs
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.snapshots import codec, framing
from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.digest import digest
from trace_envs.snapshots.errors import SnapshotFormatError, SnapshotUnsupportedError
from trace_envs.snapshots.plain import EncodedName, EncodedObject, class_name
from trace_envs.snapshots.record import SCHEMA_VERSION, EnvSnapshot

SEARCH = '<tool_call>{"name": "search", "arguments": {"query": "capital mayor founder"}}</tool_call>'
lock_env.register()


def again(value):
    return codec.decode(codec.encode(value))


def anything(cls):
    return True


class Colour(Enum):
    RED = 1


class Loud(Cell):
    """Says when any code of it runs."""

    ran = []  # noqa: RUF012

    def __init__(self, value):
        super().__init__(value)
        self.ran.append("init")

    def __setattr__(self, name, value):
        self.ran.append(name)
        object.__setattr__(self, name, value)

    def __eq__(self, other):
        self.ran.append("eq")
        return NotImplemented

    def __hash__(self):
        self.ran.append("hash")
        return 0

    def __del__(self):
        self.ran.append("del")


# There and back ------------------------------------------------------------------------------------------------------


@given(values)
@settings(max_examples=400, deadline=None)
def test_plain_data_comes_back_as_it_was(value):
    back = again(value)
    assert difference(value, back) is None
    assert digest(value) == digest(back)


@given(values, values)
@settings(max_examples=200, deadline=None)
def test_digests_are_equal_exactly_when_there_is_no_difference(left, right):
    assert (digest(left) == digest(right)) == (difference(left, right) is None)


NEAR = [
    0,
    False,
    0.0,
    -0.0,
    1,
    True,
    1.0,
    math.nan,
    "1",
    b"1",
    None,
    (),
    [],
    np.float64(0),
    np.float64(-0.0),
    np.float32(0),
    {},
]
NEAR += [
    set(),
    frozenset(),
    np.array(0),
    np.array([0]),
    np.array([0.0]),
    np.array([-0.0]),
    np.array([np.nan]),
    {1: 2},
    {True: 2},
]
NEAR += [
    np.int64(0),
    np.bool_(False),
    np.array([0], object),
    np.zeros(1, "<f4"),
    np.zeros(1, ">f4"),
    np.array(["a"]),
    2**63,
    -(2**63),
]
NEAR += [
    deque(),
    deque(maxlen=1),
    "\ud83d\ude00",
    "😀",
    np.random.default_rng(0),
    np.random.default_rng(1),
    [[]],
    [()],
    0j,
]


def test_what_differs_little_has_another_digest():
    for i, left in enumerate(NEAR):
        for j, right in enumerate(NEAR):
            assert (difference([left], [right]) is None) == (digest([left]) == digest([right])) == (i == j), (
                left,
                right,
            )


def test_order_and_sharing_make_no_difference_to_a_digest():
    part, left, right = [1], {}, {}
    for n in range(50):
        left[n], right[49 - n] = n, 49 - n
    assert digest(left) == digest(right)
    assert digest({str(n) for n in range(50)}) == digest({str(n) for n in reversed(range(50))})
    assert digest([part, part]) == digest([[1], [1]])
    assert digest(np.array([np.nan])) == digest(np.array([-np.nan]))


def test_a_cycle_has_the_digest_of_what_cannot_be_told_from_it():
    ring, longer, other = Cell(1), Cell(1), Cell(1)
    ring.other = ring
    longer.other = Cell(1, longer)
    other.other = Cell(2, other)
    assert digest(ring) == digest(longer) != digest(other)
    assert difference(ring, longer) is None
    grid = [[Cell(0) for _ in range(12)] for _ in range(12)]
    for i in range(12):
        for j in range(12):
            grid[i][j].other = [grid[i - 1][j], grid[i][j - 1], grid[(i + 1) % 12][j]]
    before = digest(grid)
    grid[7][3].value = 1
    after = digest(grid)
    grid[7][3].value = 0
    assert after != before == digest(grid)


@given(generators, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_generators_go_on_as_they_would_have(generator, draws):
    back = again(generator)
    assert type(back) is type(generator)
    if isinstance(generator, np.random.BitGenerator):
        assert back.random_raw(draws).tolist() == generator.random_raw(draws).tolist()
    else:
        assert [back.random() for _ in range(draws)] == [generator.random() for _ in range(draws)]
    if isinstance(generator, np.random.Generator):
        generator.spawn(2)
        back = again(generator)
        assert back.spawn(1)[0].random() == generator.spawn(1)[0].random()


def test_shared_parts_stay_shared_and_cycles_closed():
    part = [1]
    ring = {"part": part, "again": (part, part)}
    ring["self"] = ([ring],)
    back = again(ring)
    assert back["part"] is back["again"][0] is back["again"][1]
    assert back["self"][0][0] is back
    inside = []
    tied = (inside,)
    inside.append(tied)
    back = again(tied)
    assert back[0][0] is back


def test_depth_exhausts_nothing():
    deep = None
    for _ in range(5_000):
        deep = [{"x": deep}, (deep,)] if deep is None else [{"x": deep}]
    assert difference(again(deep), deep) is None
    assert digest(again(deep)) == digest(deep)


@given(st.lists(turns, max_size=5))
def test_histories_come_back(some):
    assert difference(again(history(some)), history(some)) is None


def test_arrays_come_back_writable_and_on_their_own():
    value = np.arange(6).reshape(2, 3)
    back = again({"a": value, "b": value})
    assert back["a"] is back["b"]
    back["a"][0, 0] = 9
    assert value[0, 0] == 0
    assert again(np.zeros((3, 0, 2))).shape == (3, 0, 2)


# What is no plain data -----------------------------------------------------------------------------------------------


class Customised(Cell):
    def __reduce__(self):
        return Customised, ()


class Narrow:
    __slots__ = ("kept",)


class Singleton:
    def __new__(cls):
        return object.__new__(cls)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, lambda: 0]}, r"payload\['a'\]\[1\] is a builtins.function"),
        (Cell(Cell(open)), r"payload.value.value is a builtins.builtin_function"),
        (Customised(), r"payload is a \S*Customised, .*customises pickling \(__reduce__\)"),
        ([Singleton()], r"payload\[0\] is a \S*Singleton, .*__new__ of its own"),
        (OrderedDict(a=1), "payload is a collections.OrderedDict"),
        ({(1, len): 2}, r"payload key <tuple of 2>\[1\] is a builtins"),
        (np.array([len], object), r"payload.flat\[0\] is a"),
        (np.zeros(1, [("a", object)]), "payload is a numpy.ndarray, .*dtype"),
        (random.SystemRandom(), "payload is a random.SystemRandom"),
        (np.ma.array([1]), "payload is a numpy.ma.MaskedArray"),
        (gym.spaces.Discrete(2), "payload is a gymnasium.spaces.discrete.Discrete"),
    ],
)
def test_the_part_that_cannot_be_written_is_named(value, message):
    taken = EnvSnapshot("Some-v0", 0, value)
    for attempt in (taken.to_bytes, lambda: taken.digest):
        with pytest.raises(
            SnapshotUnsupportedError, match=rf"^snapshot\['payload'\]{message.removeprefix('payload')}"
        ) as found:
            attempt()
        assert "register a frozen dataclass" in str(found.value)


def test_a_local_class_is_refused():
    class Local:
        pass

    with pytest.raises(SnapshotUnsupportedError, match=r"Local, .*made inside a function"):
        codec.encode(Local())


def test_only_what_cannot_change_is_registered_and_no_tag_twice():
    with pytest.raises(TypeError, match=r"Cell is neither a frozen dataclass nor"):
        codec.register(Cell, "Cell")
    with pytest.raises(ValueError, match=r"the tag 'Turn' is that of trace_envs.state:Turn"):
        codec.register(Colour, "Turn")
    assert codec.register(Colour, "test colour") is Colour
    assert again([Colour.RED]) == [Colour.RED]


# Objects -------------------------------------------------------------------------------------------------------------


def test_objects_are_inert_until_they_are_revived():
    Loud.ran.clear()
    loud = Loud([1])
    loud.other = {"me": loud, "slot": Slotted(3, "extra")}
    ran = list(Loud.ran)
    data = codec.encode({"it": loud, "class": Cell})
    inert = codec.decode(data)
    assert isinstance(inert["it"], EncodedObject) and inert["it"].class_name == class_name(Loud)
    assert inert["it"].attributes["other"]["me"] is inert["it"]
    assert inert["class"] == EncodedName(class_name(Cell))
    assert difference(inert, {"it": loud, "class": Cell}) is None and digest(inert) == digest(
        {"it": loud, "class": Cell}
    )
    assert codec.encode(inert) == data
    alive = codec.revive(inert, anything)
    assert type(alive["it"]) is Loud and alive["it"].other["me"] is alive["it"] and alive["class"] is Cell
    assert difference(alive["it"], loud) is None and alive["it"].other["slot"].extra == "extra"
    assert Loud.ran == ran
    other = codec.revive(inert, anything)
    other["it"].value.append(2)
    assert alive["it"].value == [1] == inert["it"].attributes["value"]


def test_only_classes_that_are_allowed_and_imported_are_revived(tmp_path, monkeypatch):
    inert = again([Cell(Slotted(1))])
    with pytest.raises(SnapshotUnsupportedError, match=r"holds a plain_values.Slotted, which is none of the classes"):
        codec.revive(inert, lambda cls: cls is Cell)
    (tmp_path / "bomb.py").write_text("raise SystemExit('imported')\nclass Bomb: pass")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (
        "bomb:Bomb",
        "plain_values:Nobody",
        "plain_values:Cell.__init__",
        "os:system",
        "",
        "plain_values",
        ":",
    ):
        with pytest.raises(SnapshotUnsupportedError, match="no such class among the modules imported"):
            codec.revive([EncodedObject(name, {})], anything)
    assert "bomb" not in sys.modules
    with pytest.raises(SnapshotUnsupportedError, match="of another release"):
        codec.revive([EncodedObject(class_name(Narrow), {"gone": 1})], anything)
    with pytest.raises(SnapshotUnsupportedError, match="customises pickling"):
        codec.revive([EncodedObject(class_name(Customised), {})], anything)
    with pytest.raises(SnapshotUnsupportedError, match="__new__ of its own"):
        codec.revive([EncodedObject("subprocess:Popen", {}), EncodedObject("builtins:bytearray", {})], anything)


def test_properties_do_not_run_when_an_object_is_revived():
    alive = codec.revive([EncodedObject(class_name(Trap), {"door": 1})], anything)
    assert vars(alive[0]) == {"door": 1}


class Trap:
    @property
    def door(self):
        raise AssertionError("opened")

    @door.setter
    def door(self, value):
        raise AssertionError("opened")


# Hostile and damaged bytes -------------------------------------------------------------------------------------------


def small():
    env = LockEnv()
    env.reset(seed=0)
    env.step(dial(1))
    return env.snapshot()


def sealed(table):
    """A frame around a table, with the right checksum."""
    return framing.frame(json.dumps(table).encode(), SCHEMA_VERSION)


def test_every_truncation_is_noticed_and_says_so():
    data = small().to_bytes()
    for end in range(1, len(data)):
        with pytest.raises(SnapshotFormatError, match=rf"truncated: {end} bytes of"):
            EnvSnapshot.from_bytes(data[:end])
    for other in (b"", b"PK\3\4", b"{}", b"\x80\x04", b"x" * 100):
        with pytest.raises(SnapshotFormatError, match="not a snapshot"):
            EnvSnapshot.from_bytes(other)
    with pytest.raises(SnapshotFormatError, match="1 bytes too many"):
        EnvSnapshot.from_bytes(data + b"x")
    for other in (None, "text", 5):
        with pytest.raises(TypeError, match="expected the bytes of a snapshot"):
            EnvSnapshot.from_bytes(other)
    assert EnvSnapshot.from_bytes(memoryview(bytearray(data))) == small()


def test_every_flipped_bit_is_noticed():
    data = small().to_bytes()
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with pytest.raises(SnapshotFormatError):
                EnvSnapshot.from_bytes(bytes(changed))


def test_another_schema_version_is_named():
    content = framing.unframe(small().to_bytes(), SCHEMA_VERSION)
    with pytest.raises(SnapshotFormatError, match=f"written by schema version 7, this release reads {SCHEMA_VERSION}"):
        EnvSnapshot.from_bytes(framing.frame(content, 7))


def framed(body, size):
    head = struct.pack("<IBQQ", SCHEMA_VERSION, 1, len(body), size)
    return framing.MAGIC + head + blake2b(framing.MAGIC + head + body, digest_size=16).digest() + body


def test_a_small_lie_takes_no_large_memory():
    body = zlib.compress(bytes(1 << 26))
    for size, message in ((1 << 26, "cannot hold"), (100, "not of the 100 bytes"), (1 << 60, "cannot hold")):
        with pytest.raises(SnapshotFormatError, match=message):
            EnvSnapshot.from_bytes(framed(body, size))
    with pytest.raises(SnapshotFormatError, match="does not unpack"):
        EnvSnapshot.from_bytes(framed(b"no", 10))
    zeros = EnvSnapshot("Some-v0", 0, np.zeros(1 << 22))
    assert EnvSnapshot.from_bytes(zeros.to_bytes()) == zeros


def table(*nodes, root=None):
    return {"root": [len(nodes) - 1] if root is None else root, "nodes": list(nodes)}


MT = {"bit_generator": "MT19937", "state": {"key": np.zeros(624, np.uint32), "pos": 10**6}}
PHILOX = np.random.Philox(0).state | {"buffer_pos": -5000}


@pytest.mark.parametrize(
    "hostile",
    [
        table(["array", ["<f8", [1 << 40], ""], []]),
        table(["array", ["<f8", [1 << 33, 1 << 33, 0], ""], []]),
        table(["array", ["<U0", [1 << 40], ""], []]),
        table(["array", ["|O", [1], "AAAAAAAAAAA="], []]),
        table(["array", ["<f8,O", [0], ""], []]),
        table(["array", [["record", 8, [["a", "|O", 0]]], [1], "AAAAAAAAAAA="], []]),
        table(["array", [["record", 8, [["a", "<f8", 100]]], [1], "AAAAAAAAAAA="], []]),
        table(["array", ["<f8", [-1], ""], []]),
        table(["array", ["<f8", [True], "AAAAAAAAAAA="], []]),
        table(["array", ["<V99999999999", [0], ""], []]),
        table(["objects", [1 << 40], []]),
        table(["objects", [2], [1]]),
        table(["tuple", None, [[0]]]),
        table(["tuple", None, [[1]]], ["tuple", None, [[0]]]),
        table(["list", None, [[7]]]),
        table(["list", None, [[0, 0]]]),
        table(["list", None, [["x"]]]),
        table(["deque", -1, []]),
        table(["set", None, [[0]]]),
        table(["dict", None, [1]]),
        table(["dict", None, [[0], 1]]),
        table(["frozenset", None, [[1]]], ["list", None, []]),
        table(["record", ["os.system", "command"], ["true"]]),
        table(["record", ["Turn", "text"], ["true"]]),
        table(["record", ["Turn"], ["true"]]),
        table(["enum", ["Turn", "text"], []]),
        table(["history", None, []], ["float", "x", []]),
        table(["int", "0x", []]),
        table(["nothing", None, []]),
        table(["object", [5], []]),
        table(["generator", ["Generator", [0], [["list", None, []]], None], []]),
        table(["generator", ["Random", *codec.flatten((3, (0,) * 624 + (625,), None), "")], []]),
        table(["generator", ["Generator", *codec.flatten(MT, ""), None], []]),
        table(["generator", ["RandomState", *codec.flatten(MT, ""), None], []]),
        table(["generator", ["BitGenerator", *codec.flatten(PHILOX, ""), None], []]),
        codec.flatten(MT, ""),
        {"root": None},
        {"root": [0], "nodes": [[]]},
        {"root": [0], "nodes": 5},
        [],
    ],
    ids=str,
)
def test_hostile_tables_are_refused_by_one_error(hostile):
    if isinstance(hostile, tuple):
        hostile = dict(zip(("root", "nodes"), hostile, strict=True))
    with pytest.raises(SnapshotFormatError):
        codec.decode(json.dumps(hostile).encode())
    with pytest.raises(SnapshotFormatError):
        EnvSnapshot.from_bytes(sealed(hostile))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-2, 9)
        | st.sampled_from(["list", "dict", "array", "<f8", "object", "tuple", "record", "Turn", "generator", ""]),
        lambda x: st.lists(x, max_size=4),
        max_leaves=30,
    )
)
@settings(max_examples=300, deadline=None)
def test_random_tables_never_raise_anything_else(nodes):
    data = json.dumps({"root": [0], "nodes": nodes}).encode()
    try:
        codec.decode(data)
    except SnapshotFormatError:
        return
    assume(False)


def test_garbage_inside_a_good_frame_is_refused():
    for content in (b"", b"[", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"root":[0],"nodes":[["dict",null,[]]]}'):
        with pytest.raises(SnapshotFormatError):
            EnvSnapshot.from_bytes(framing.frame(content, SCHEMA_VERSION))


# Snapshots -----------------------------------------------------------------------------------------------------------


@given(values, values, st.none() | st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_snapshots_come_back_and_are_equal_exactly_when_their_digests_are(payload, other, turn):
    taken = EnvSnapshot(
        "Some-v0", turn, payload, wrappers=(("TimeLimit", {"x": payload}),), observation=other, info={"x": other}
    )
    back = EnvSnapshot.from_bytes(taken.to_bytes())
    assert difference(taken, back) is None
    assert back == taken and hash(back) == hash(taken) and back.digest == taken.digest
    changed = EnvSnapshot("Some-v0", turn, other, wrappers=taken.wrappers)
    assert (changed == taken) == (changed.digest == taken.digest) == (difference(payload, other) is None)
    assert len(repr(taken)) < 120


def test_what_was_seen_is_no_part_of_a_snapshots_equality():
    one, two = EnvSnapshot("a", 1, 2, observation=1), EnvSnapshot("a", 1, 2, observation=2, info={"time": 3.0})
    assert one == two and one.digest == two.digest and difference(one, two) is not None
    for change in (
        {"env_id": "b"},
        {"turn": 2},
        {"payload": 2.0},
        {"adapter": "x"},
        {"config": {}},
        {"random_state": {}},
    ):
        other = EnvSnapshot(**({"env_id": "a", "turn": 1, "payload": 2} | change))
        assert other != one and other.digest != one.digest
    assert one != "a"


IN_ANOTHER_PROCESS = """
import sys
import gymnasium as gym
import lock_env, trace_envs
from trace_envs.snapshots import EnvSnapshot
from trace_envs.snapshots.digest import digest
lock_env.register()
taken = EnvSnapshot.from_bytes(sys.stdin.buffer.read())
assert EnvSnapshot.from_bytes(taken.to_bytes()) == taken
env = gym.make(taken.env_id, **KWARGS).unwrapped
env.restore(taken)
future = [env.step(action) for action in SCRIPT] + [env.reset()]
print(taken.digest, env.snapshot().digest, digest(future))
"""


@pytest.mark.parametrize(
    ("env_id", "kwargs", "script"),
    [
        ("TraceMultiHopQA-v0", {"search_dropout": 0.5}, [SEARCH, SEARCH, "nonsense", "<answer>no</answer>"]),
        ("Lock-v0", {}, [LISTEN, dial(2), LISTEN]),
    ],
)
def test_bytes_are_restored_in_another_process(env_id, kwargs, script):
    env = gym.make(env_id, **kwargs).unwrapped
    env.reset(seed=4)
    env.step(script[0] + " \ud800 ")
    taken = env.snapshot()
    program = IN_ANOTHER_PROCESS.replace("KWARGS", repr(kwargs)).replace("SCRIPT", repr(script))
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=taken.to_bytes(),
        stdout=subprocess.PIPE,
        cwd=Path(lock_env.__file__).parent,
        env={"PYTHONHASHSEED": "1"},
        check=True,
        timeout=120,
    )
    future = [env.step(action) for action in script] + [env.reset()]
    assert done.stdout.decode().split() == [taken.digest, env.snapshot().digest, digest(future)]


def test_native_snapshots_are_small_and_hold_no_corpus():
    env = MultiHopQAEnv()
    env.reset(seed=0)
    env.step(SEARCH)
    data = env.snapshot().to_bytes()
    assert len(data) < 10_000
    back = EnvSnapshot.from_bytes(data)
    assert back.payload == env.state and back.observation == env.observation()
    sibling = MultiHopQAEnv()
    sibling.restore(back)
    assert sibling.info() == env.info() and sibling.reset() == env.reset()


@pytest.mark.parametrize("bits", BIT_GENERATORS)
def test_the_random_state_of_every_bit_generator_is_carried(bits):
    env, sibling = LockEnv(), LockEnv()
    env.reset(seed=0)
    env.np_random, sibling.np_random = np.random.Generator(bits(5)), np.random.Generator(bits(6))
    env.np_random.integers(5, dtype=np.int32)
    sibling.restore(EnvSnapshot.from_bytes(env.snapshot().to_bytes()))
    assert [sibling.reset()[1] for _ in range(5)] == [env.reset()[1] for _ in range(5)]
    assert trace_envs.snapshot(env) == trace_envs.snapshot(sibling)
