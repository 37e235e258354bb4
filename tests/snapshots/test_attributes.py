"""The adapter that copies attributes: exact on Gymnasium's and MiniGrid's environments, and refusing by name what it cannot."""

from __future__ import annotations

import copy
import ctypes
import pickle
import random
import subprocess
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import minigrid  # noqa: F401 (registers its environments)
import numpy as np
import pytest
from gymnasium.utils import EzPickle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stack_tools import bare_pair

from trace_envs import SnapshotUnsupportedError
from trace_envs.snapshots import EnvSnapshot
from trace_envs.snapshots.adapters import adapter_for, declare_static
from trace_envs.snapshots.adapters.standins import Named
from trace_envs.snapshots.compare import difference

IDS = [
    "CartPole-v1",
    "FrozenLake-v1",
    "Taxi-v4",
    "Blackjack-v1",
    "MountainCarContinuous-v0",
    "Acrobot-v1",
    "Pendulum-v1",
    "CliffWalking-v1",
    "MiniGrid-DoorKey-6x6-v0",
    "MiniGrid-Dynamic-Obstacles-6x6-v0",
]
RANDOM_IN_STEP = {"FrozenLake-v1", "Blackjack-v1", "MiniGrid-Dynamic-Obstacles-6x6-v0"}


def future(env: gym.Env, actions: list[Any]) -> list[Any]:
    """What an environment returns for some actions, as far as the episode goes, and what is left of it then."""
    results = []
    for action in actions:
        results.append(env.step(action))
        if results[-1][2]:
            break
    return [*results, env.np_random.random()]


def put(env: gym.Env, taken: EnvSnapshot, seed: int | None = None) -> None:
    adapter_for(env).put(env, taken, seed)


@pytest.mark.parametrize("env_id", IDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**31), before=st.integers(0, 12), after=st.integers(1, 20))
def test_the_future_repeats_bit_for_bit_here_and_in_a_sibling(env_id: str, seed: int, before: int, after: int) -> None:
    env, sibling = bare_pair(env_id)
    env.action_space.seed(seed)
    actions = [env.action_space.sample() for _ in range(before + after)]
    env.reset(seed=seed)
    for done, action in enumerate(actions[:before]):
        if env.step(action)[2]:
            env.reset()
            before = done
            break
    adapter = adapter_for(env)
    assert adapter.name == "deepcopy"
    taken = adapter.take(env)
    expected = future(env, actions[before:])
    env.reset()
    future(env, actions[:3])
    adapter.put(env, taken, None)
    assert difference(adapter.take(env).payload, taken.payload) is None
    assert difference(future(env, actions[before:]), expected) is None
    adapter.put(env, taken, None)
    assert difference(future(env, actions[before:]), expected) is None
    sibling.reset(seed=seed + 1)
    adapter.put(sibling, taken, None)
    assert difference(future(sibling, actions[before:]), expected) is None


@pytest.mark.parametrize("env_id", IDS)
def test_a_seed_decides_what_is_random_from_there_on(env_id: str) -> None:
    env, sibling = bare_pair(env_id)
    env.reset(seed=3)
    sibling.reset(seed=4)
    taken = adapter_for(env).take(env)
    actions = [0 if isinstance(env.action_space, gym.spaces.Discrete) else env.action_space.sample()] * 15
    futures = []
    for seed in (7, 7, 8, 9):
        put(env, taken, seed)
        put(sibling, taken, seed)
        futures.append(future(env, actions))
        assert difference(futures[-1], future(sibling, actions)) is None
    assert difference(futures[0], futures[1]) is None
    assert len({repr(f[-1]) for f in futures}) == 3
    if env_id in RANDOM_IN_STEP:
        assert any(difference(futures[0][:-1], f[:-1]) for f in futures[2:])


def test_renewing_is_putting_back_the_present_with_a_seed() -> None:
    env, sibling = bare_pair("FrozenLake-v1")
    env.reset(seed=1)
    taken = adapter_for(env).take(env)
    adapter_for(env).renew(env, 5)
    put(sibling, taken, 5)
    assert difference(future(env, [1] * 9), future(sibling, [1] * 9)) is None


class Bare(gym.Env):
    """A counter; tests put things into it."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Discrete(100)

    def __init__(self, **attributes: Any):
        self.count = 0
        vars(self).update(attributes)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.count = 0
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.count += 1
        return self.count, 0.0, False, False, {}


Point = namedtuple("Point", "x y")


class Node:
    """A plain object with slots and attributes."""

    __slots__ = ("_Node__hidden", "__dict__", "left")

    def __init__(self, left: Any):
        self.left = left
        self.__hidden = [left]
        self.right: Any = None

    @property
    def hidden(self) -> list[Any]:
        return self.__hidden


def test_aliases_cycles_and_references_to_the_environment_are_kept() -> None:
    env, other = Bare(), Bare()
    shared = [1, 2]
    node = Node(shared)
    node.right = node
    env.board, env.tree, env.log = shared, node, deque([shared], maxlen=3)
    env.owner, env.callback, env.pair = env, env.step, Point(shared, env)
    env.table, env.ordered = {"self": env, (1, 2): shared}, OrderedDict(a=shared)
    taken = adapter_for(env).take(env)
    shared.append(3)
    env.extra = "appeared afterwards"
    for target in (env, other):
        put(target, taken)
        assert target.board == [1, 2]
        assert target.board is target.tree.left is target.tree.hidden[0] is target.log[0] is target.pair.x
        assert target.board is target.table[1, 2] is target.ordered["a"]
        assert target.log.maxlen == 3
        assert target.tree.right is target.tree
        assert target.owner is target.pair.y is target.table["self"] is target.callback.__self__ is target
        assert not hasattr(target, "extra")
        target.board.append(9)
    put(env, taken)
    assert env.board == [1, 2]
    assert env.board is not other.board


@dataclass(frozen=True, slots=True)
class Frozen:
    """Customises pickling, but only as dataclasses do."""

    parts: list[Any]


LEAVES = (
    st.none()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3).map(bytearray)
    | st.sets(st.integers())
    | st.builds(lambda n: np.arange(n).reshape(1, n)[:, ::-1], st.integers(0, 5))
    | st.builds(lambda n: np.array([n, {"k": [n]}], object), st.integers())
    | st.builds(np.float32, st.floats(width=32))
)
PARTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Point, inner, inner)
        | st.builds(Frozen, st.lists(inner, max_size=2))
        | st.builds(Node, inner)
        | st.dictionaries(st.integers() | st.tuples(st.text(max_size=2)), inner, max_size=3)
        | st.builds(lambda d: defaultdict(list, d), st.dictionaries(st.text(max_size=2), inner, max_size=2))
        | st.builds(lambda d: OrderedDict(d), st.dictionaries(st.text(max_size=2), inner, max_size=2))
        | st.builds(lambda xs: deque(xs, maxlen=4), st.lists(inner, max_size=3))
        | st.lists(inner, min_size=1, max_size=2).map(lambda xs: [xs, xs[0], {"again": xs}])
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=PARTS)
def test_copies_are_those_of_deepcopy(parts: Any) -> None:
    env, other = Bare(parts=parts), Bare()
    expected = copy.deepcopy(parts)
    put(other, adapter_for(env).take(env))
    assert difference(other.parts, expected) is None
    assert difference(env.parts, expected) is None
    # Aliases inside are where they were: pickling writes each object once and refers to it after that.
    assert shape(other.parts) == shape(parts)


def shape(value: Any) -> list[int]:
    """In the order of a walk, the number of the first place at which each mutable part was met."""
    met: dict[int, int] = {}
    places, pending = [], [value]
    while pending:
        part = pending.pop()
        if isinstance(part, list | dict | Node | np.ndarray | bytearray):
            places.append(met.setdefault(id(part), len(met)))
        if isinstance(part, list | tuple | deque):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
    return places


def test_tensors_are_copied_by_their_own_means() -> None:
    torch = pytest.importorskip("torch")
    env = Bare(hidden={"h": torch.ones(3)})
    env.same = env.hidden["h"]
    taken = adapter_for(env).take(env)
    env.same[0] = 7
    put(env, taken)
    assert torch.equal(env.hidden["h"], torch.ones(3))
    assert env.same is env.hidden["h"]
    env.same[0] = 7
    put(env, taken)
    assert torch.equal(env.same, torch.ones(3))


@pytest.mark.parametrize("env_id", IDS)
def test_snapshots_can_be_pickled_and_written(env_id: str) -> None:
    env, sibling = bare_pair(env_id)
    env.reset(seed=8)
    sibling.reset(seed=9)
    taken = adapter_for(env).take(env)
    actions = [env.action_space.sample() for _ in range(10)]
    expected = future(env, actions)
    for again in (pickle.loads(pickle.dumps(taken)), EnvSnapshot.from_bytes(taken.to_bytes())):
        assert difference(again, taken) is None
        assert again.digest == taken.digest
        put(sibling, again)
        assert difference(future(sibling, actions), expected) is None


def test_arrays_that_share_memory_still_do() -> None:
    env = Bare(board=np.arange(12).reshape(3, 4), ones=np.asfortranarray(np.ones((2, 3))))
    env.row, env.column, env.back = env.board[1], env.board[:, ::2], env.ones.T[::-1]
    env.fixed = np.zeros(3)
    env.fixed.flags.writeable = False
    taken = adapter_for(env).take(env)
    env.board[:] = 0
    again = EnvSnapshot.from_bytes(taken.to_bytes())
    for target, snapshot in ((env, taken), (Bare(), taken), (Bare(), again)):
        put(target, snapshot)
        assert target.row.tolist() == [4, 5, 6, 7]
        target.board[1, 2] = 100
        assert target.row[2] == target.column[1, 1] == 100
        target.back[0, 0] = 5
        assert target.ones[0, 2] == 5
        assert not target.fixed.flags.writeable


def test_generators_of_every_kind_are_carried_and_seeded_apart() -> None:
    env = Bare(
        a=np.random.Generator(np.random.Philox(1)), b=np.random.RandomState(2), c=random.Random(3), d=[random.Random(4)]
    )
    env.e = env.a
    env.reset(seed=1)
    env.c.gauss(0, 1)
    env.a.spawn(2)

    def draws(target: Any) -> list[float]:
        first = [target.a.random(), target.e.random(), target.b.random_sample(), target.c.gauss(0, 1)]
        return [*first, target.d[0].random(), target.np_random.random(), target.a.spawn(1)[0].random()]

    taken = adapter_for(env).take(env)
    assert type(taken.payload.values["c"]) is not random.Random
    expected = draws(env)
    for snapshot in (taken, EnvSnapshot.from_bytes(taken.to_bytes())):
        for target in (env, Bare()):
            put(target, snapshot)
            assert target.a is target.e
            assert draws(target) == expected
            put(target, snapshot, 5)
            new = draws(target)
            put(target, snapshot, 5)
            assert draws(target) == new
            assert not set(new) & set(expected)
    env.x, env.y = np.random.default_rng(0), np.random.default_rng(0)
    put(env, adapter_for(env).take(env), 1)
    assert env.x.random() != env.y.random()


def test_a_generator_not_yet_asked_for_is_part_of_the_moment() -> None:
    env = Bare()
    taken = adapter_for(env).take(env)
    first = env.np_random.random()
    put(env, taken)
    assert env.np_random.random() == first


def test_spaces_stay_and_their_generators_are_carried() -> None:
    env = Bare(observation_space=gym.spaces.Dict(a=gym.spaces.Discrete(1000), b=gym.spaces.Box(0, 1, (2,))))
    space = env.observation_space
    space.seed(3)
    taken = adapter_for(env).take(env)
    expected = space.sample()
    put(env, taken)
    assert env.observation_space is space
    assert difference(space.sample(), expected) is None
    put(env, taken, 1)
    assert difference(space.sample(), expected) is not None


def test_functions_are_shared_and_closures_stay_each_environments_own() -> None:
    def made(target: Bare) -> Any:
        return lambda: target.count

    env, other = Bare(rule=max, module=np), Bare()
    env.look, other.look = made(env), made(other)
    taken = adapter_for(env).take(env)
    env.rule = min
    other.count = 5
    put(env, taken)
    assert env.rule is max and env.module is np
    put(other, taken)
    other.count = 8
    assert other.rule is max
    assert other.look() == 8


def test_windows_are_kept_by_the_one_who_has_them() -> None:
    env = gym.make("CartPole-v1", render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    before = adapter_for(env).take(env)
    frame = env.render()
    assert env.screen is not None
    screen, taken = env.screen, adapter_for(env).take(env)
    env.step(1)
    for snapshot in (before, taken):
        put(env, snapshot)
        assert env.screen is screen
        assert np.array_equal(env.render(), frame)
    EnvSnapshot.from_bytes(taken.to_bytes())
    env.close()


def test_slots_of_the_environment_are_carried() -> None:
    class Slotted(Bare):
        __slots__ = ("cards", "unset")

    env = Slotted()
    env.cards = [1]
    taken = adapter_for(env).take(env)
    env.cards.append(2)
    env.unset = 3
    put(env, taken)
    assert env.cards == [1]
    assert not hasattr(env, "unset")


class Pickled:
    """Customises pickling."""

    def __getstate__(self) -> dict:
        return {}


class Closing:
    """Looks after something."""

    def __del__(self) -> None: ...


class Breaking:
    """Cannot be copied."""

    def __deepcopy__(self, memo: dict) -> None:
        raise OSError("disk full")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (threading.Lock(), "lock"),
        ((i for i in range(3)), "generator"),
        (ctypes.c_int(3), "ctypes"),
        (ctypes.create_string_buffer(3), "ctypes"),
        (Pickled(), "Pickled, which customises pickling"),
        (Closing(), "__del__"),
        (Breaking(), "OSError: disk full"),
        (random.SystemRandom(), "operating system"),
        (np.frombuffer(bytearray(8), np.uint8), "is an array in memory of a builtins"),
        (weakref.ref(threading.Event()), "weakly"),
        (sys.stdout, "TextIO|EncodedFile|cannot be copied"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_copied_is_named_with_its_path(value: object, said: str) -> None:
    env = Bare(world=types.SimpleNamespace(parts=[0, {"it": value}]))
    with pytest.raises(SnapshotUnsupportedError, match=said) as caught:
        adapter_for(env)
    assert "parts" in str(caught.value) and "['it']" in str(caught.value)
    assert "Replayable" in str(caught.value)
    late = Bare()
    adapter = adapter_for(late)
    late.thing = [value]
    with pytest.raises(SnapshotUnsupportedError, match=r"env\.thing\[0\]"):
        adapter.take(late)


def test_an_environment_that_customises_pickling_is_refused() -> None:
    class Repickled(Bare, EzPickle):
        pass

    with pytest.raises(SnapshotUnsupportedError, match=r"customises pickling .__getstate__ of EzPickle"):
        adapter_for(Repickled())


class Tabled(Bare):
    """Has a table that no step changes."""

    def __init__(self, size: int = 3):
        super().__init__(table={i: [(1.0, i)] for i in range(size)})


def test_declared_tables_are_shared_and_compared() -> None:
    before = adapter_for(Tabled()).take(Tabled())
    assert "table" in before.payload.values
    declare_static(Tabled, "table")
    env, other, different = Tabled(), Tabled(), Tabled(4)
    table, own = env.table, other.table
    taken = adapter_for(env).take(env)
    assert "table" not in taken.payload.values
    put(env, taken)
    put(other, taken)
    assert env.table is table and other.table is own
    different.count = 7
    with pytest.raises(ValueError, match=r"tables .table. differ"):
        put(different, taken)
    assert different.count == 7
    with pytest.raises(TypeError, match="class of environments"):
        declare_static(int, "table")  # type: ignore[arg-type]


def test_tables_of_toy_text_are_not_copied() -> None:
    for env_id in ("Taxi-v4", "FrozenLake-v1", "CliffWalking-v1"):
        env = gym.make(env_id).unwrapped
        env.reset(seed=0)
        assert "P" not in adapter_for(env).take(env).payload.values
    lakes = [gym.make("FrozenLake-v1", map_name=None, desc=desc).unwrapped for desc in (["SF", "HG"], ["SH", "FG"])]
    for lake in lakes:
        lake.reset(seed=0)
    with pytest.raises(ValueError, match="desc="):
        put(lakes[1], adapter_for(lakes[0]).take(lakes[0]))


def test_arguments_that_differ_are_named() -> None:
    icy = gym.make("FrozenLake-v1", is_slippery=True, render_mode="ansi").unwrapped
    dry = gym.make("FrozenLake-v1", is_slippery=False).unwrapped
    icy.reset(seed=0)
    dry.reset(seed=0)
    with pytest.raises(ValueError, match=r"is_slippery=True; this one was made with is_slippery=False"):
        put(dry, adapter_for(icy).take(icy))


def test_a_class_that_is_another_is_refused() -> None:
    with pytest.raises(ValueError, match="attributes of 'test_attributes:Bare'"):
        put(Tabled(), adapter_for(Bare()).take(Bare()))


def test_nothing_changes_when_a_snapshot_is_refused() -> None:
    env, target = Bare(), Bare()
    env.node = Node(1)
    data = adapter_for(env).take(env).to_bytes()
    assert b"test_attributes:Node" not in data  # compressed
    forged = EnvSnapshot.from_bytes(data)
    vars(target)["count"] = 4
    node = forged.payload.values["node"]
    object.__setattr__(node, "class_name", "subprocess:Popen")
    with pytest.raises(SnapshotUnsupportedError, match="none of the classes"):
        put(target, forged)
    assert vars(target) == {"count": 4}


def test_bytes_name_no_function_that_is_not_the_environments_own() -> None:
    env = Bare(rule=max, helper=future)
    taken = EnvSnapshot.from_bytes(adapter_for(env).take(env).to_bytes())
    for target in (env, Bare()):
        put(target, taken)
        assert target.rule is max and target.helper is future
    taken.payload.values["rule"] = Named("os", "system")
    with pytest.raises(SnapshotUnsupportedError, match=r"env\.rule is os\.system, which is none of the functions"):
        put(env, taken)


ELSEWHERE = """
import sys
import gymnasium as gym
import minigrid
from trace_envs.snapshots import EnvSnapshot
from trace_envs.snapshots.adapters import adapter_for
env = gym.make(sys.argv[1]).unwrapped
taken = EnvSnapshot.from_bytes(sys.stdin.buffer.read())
adapter_for(env).put(env, taken, None)
results = [env.step(int(a)) for a in sys.argv[2]]
print(repr([(str(o), r, t) for o, r, t, _, _ in results]), env.np_random.random())
print(type(getattr(env, "carrying", None)).__name__, adapter_for(env).take(env).payload is None)
"""


@pytest.mark.parametrize("env_id", ["CartPole-v1", "MiniGrid-DoorKey-6x6-v0"])
def test_bytes_restore_in_another_process(env_id: str) -> None:
    env = gym.make(env_id).unwrapped
    env.reset(seed=2)
    if "Key" in env_id:
        env.carrying = next(cell for cell in env.grid.grid if type(cell).__name__ == "Key")
        env.grid.grid[env.grid.grid.index(env.carrying)] = None
    else:
        env.step(1)
    taken = adapter_for(env).take(env)
    actions = "2105" if "Key" in env_id else "1010"
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, env_id, actions], input=taken.to_bytes(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    results = [env.step(int(a)) for a in actions]
    expected = f"{[(str(o), r, t) for o, r, t, _, _ in results]!r} {env.np_random.random()}"
    assert done.stdout.decode().splitlines()[0] == expected
    put(env, EnvSnapshot.from_bytes(taken.to_bytes()))
    assert difference(adapter_for(env).take(env), taken) is None
    if "Key" in env_id:
        assert type(env.carrying).__name__ == "Key"


def test_the_decision_is_made_once_for_each_environment() -> None:
    env = Bare(lock=threading.Lock())
    for _ in range(2):
        with pytest.raises(SnapshotUnsupportedError, match=r"Bare cannot be branched .*native: .*deepcopy: env\.lock"):
            adapter_for(env)
    assert adapter_for(Bare()).name == "deepcopy"
