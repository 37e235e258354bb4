"""Snapshots through Gymnasium's wrappers: each of them, and random stacks."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import ale_py
import gymnasium as gym
import lock_env
import numpy as np
import pytest
from gymnasium import wrappers as gw
from gymnasium.error import ClosedEnvironmentError
from hypothesis import given, settings
from hypothesis import strategies as st
from lock_env import LISTEN, OPEN, dial
from stack_tools import Tally, arrays, cart, half, held, layers, play

import trace_envs
from trace_envs import SnapshotUnsupportedError, SnapshotWrapper
from trace_envs.snapshots import EnvSnapshot
from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.wrappers import ALIKE, KNOWN, carried_state, kind_of, restore_carried

lock_env.register()
gym.register_envs(ale_py)


def atari(**kwargs: Any) -> gym.Env:
    return gym.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0, **kwargs)


def hill() -> gym.Env:
    return gym.make("MountainCarContinuous-v0")


def positive(observation: np.ndarray) -> np.ndarray:
    return np.abs(observation)


STACKS: dict[str, Callable[[], gym.Env]] = {
    "TimeLimit": lambda: gw.TimeLimit(cart(), 9),
    "OrderEnforcing": lambda: gw.OrderEnforcing(cart(disable_env_checker=True).unwrapped),
    "PassiveEnvChecker": lambda: gw.PassiveEnvChecker(cart().unwrapped),
    "Autoreset": lambda: gw.Autoreset(cart(max_episode_steps=5)),
    "RecordEpisodeStatistics": lambda: gw.RecordEpisodeStatistics(cart(max_episode_steps=9)),
    "DelayObservation": lambda: gw.DelayObservation(cart(), 3),
    "TimeAwareObservation": lambda: gw.TimeAwareObservation(cart(), normalize_time=True),
    "FrameStackObservation": lambda: gw.FrameStackObservation(cart(), 4),
    "NormalizeObservation": lambda: gw.NormalizeObservation(cart()),
    "NormalizeReward": lambda: gw.NormalizeReward(hill()),
    "MaxAndSkipObservation": lambda: gw.MaxAndSkipObservation(cart(), 3),
    "AtariPreprocessing": lambda: gw.AtariPreprocessing(atari(), terminal_on_life_loss=True),
    "StickyAction": lambda: gw.StickyAction(cart(), 0.5, (1, 4)),
    "TransformAction": lambda: gw.TransformAction(cart(), lambda a: 1 - a, gym.spaces.Discrete(2)),
    "ClipAction": lambda: gw.ClipAction(hill()),
    "RescaleAction": lambda: gw.RescaleAction(hill(), np.float32(0), np.float32(1)),
    "TransformReward": lambda: gw.TransformReward(cart(), half),
    "ClipReward": lambda: gw.ClipReward(hill(), -0.01, 0.01),
    "TransformObservation": lambda: gw.TransformObservation(cart(), half, cart().observation_space),
    "FilterObservation": lambda: gw.FilterObservation(gym.make("MiniGrid-DoorKey-5x5-v0"), ["image"]),
    "FlattenObservation": lambda: gw.FlattenObservation(gym.make("Blackjack-v1")),
    "GrayscaleObservation": lambda: gw.GrayscaleObservation(atari()),
    "ResizeObservation": lambda: gw.ResizeObservation(atari(), (30, 40)),
    "ReshapeObservation": lambda: gw.ReshapeObservation(cart(), (2, 2)),
    "RescaleObservation": lambda: gw.RescaleObservation(hill(), np.float32(0), np.float32(1)),
    "DtypeObservation": lambda: gw.DtypeObservation(cart(), np.float64),
    "AddRenderObservation": lambda: gw.AddRenderObservation(cart(render_mode="rgb_array")),
    "RenderCollection": lambda: gw.RenderCollection(cart(render_mode="rgb_array")),
    "AddWhiteNoise": lambda: gw.AddRenderObservation(gw.AddWhiteNoise(cart(render_mode="rgb_array"), 0.3)),
    "ObstructView": lambda: gw.AddRenderObservation(gw.ObstructView(cart(render_mode="rgb_array"), 0.3, 8)),
}
LATER: dict[str, Callable[[], gym.Env]] = {  # not in all releases
    "RepeatAction": lambda: gw.RepeatAction(cart(), 2),
    "DiscretizeAction": lambda: gw.DiscretizeAction(hill(), 5),
    "DiscretizeObservation": lambda: gw.DiscretizeObservation(hill(), 5),
    "NumpyToTorch": lambda: gw.NumpyToTorch(cart()),
}
NEEDS = {"AtariPreprocessing": "cv2", "ResizeObservation": "cv2", "NumpyToTorch": "array_api_compat"}
for _name, _make in LATER.items():
    if _name == "NumpyToTorch" or hasattr(gw, _name):
        STACKS[_name] = _make
for _name, _module in NEEDS.items():
    if importlib.util.find_spec(_module) is None:
        del STACKS[_name]


@pytest.mark.parametrize("name", STACKS)
def test_every_wrapper_goes_on_as_it_was(name: str) -> None:
    env, sibling = STACKS[name](), STACKS[name]()
    assert name in [type(wrapper).__name__ for wrapper in layers(env)]
    rng = np.random.default_rng(len(name))
    env.action_space.seed(1)
    for before in (0, 1, 5):
        env.reset(seed=4)  # the second and third time round, wrappers bring something along
        assert not any(
            step[2] or step[3] for step in play(env, [env.action_space.sample() for _ in range(before)])[:-1]
        )
        actions = [env.action_space.sample() for _ in range(12)]
        taken, there = trace_envs.snapshot(env), held(env)
        expected = play(env, actions)
        again = EnvSnapshot.from_bytes(taken.to_bytes())
        for target, moment in ((env, taken), (env, taken), (sibling, taken), (sibling, again)):
            target.reset(seed=int(rng.integers(100)))
            play(target, actions[::-1][:4])
            trace_envs.restore(target, moment)
            assert difference(held(target), there) is None
            assert difference(play(target, actions), expected) is None
        fresh = STACKS[name]()
        trace_envs.restore(fresh, again)
        assert difference(play(fresh, actions), expected) is None


@pytest.mark.parametrize("name", STACKS)
def test_branches_and_forks_of_every_wrapper_are_independent(name: str) -> None:
    env = STACKS[name]()
    env.action_space.seed(2)
    env.reset(seed=5)
    play(env, [env.action_space.sample() for _ in range(3)])
    taken = trace_envs.snapshot(env)
    twin, third = trace_envs.fork(env), trace_envs.fork(trace_envs.fork(env))
    assert [type(w) for w in layers(twin)] == [type(w) for w in layers(env)] and twin.spec == env.spec
    mine = {id(w) for w in layers(env)} | {id(env.unwrapped), id(env.np_random)}
    for other in (twin, third):
        assert not mine & ({id(w) for w in layers(other)} | {id(other.unwrapped), id(other.np_random)})
    left, right = ([env.action_space.sample() for _ in range(6)] for _ in range(2))
    futures = []
    for actions in (left, right):
        trace_envs.restore(env, taken)
        futures.append(play(env, actions))
    # Step by step in turns, in three environments; none sees the others.
    trace_envs.restore(env, taken)
    shown: list[list[Any]] = [[], [], []]
    for i in range(6):
        for seen, someone, actions in zip(shown, (env, twin, third), (left, right, left), strict=True):
            if not (seen and (seen[-1][2] or seen[-1][3])) or name == "Autoreset":
                seen += play(someone, [actions[i]])
    assert difference(shown, [futures[0], futures[1], futures[0]]) is None


def test_nothing_else_outlives_a_reset() -> None:
    """What `carried_state` lists for Gymnasium's wrappers is all that a reset does not make anew."""
    for name, make in STACKS.items():
        used, fresh = make(), make()
        used.action_space.seed(0)
        used.reset(seed=1)
        play(used, [used.action_space.sample() for _ in range(4)])
        restore_carried(fresh, carried_state(used))
        results = [(arrays(observation), info) for observation, info in (env.reset(seed=2) for env in (used, fresh))]
        assert difference(results[0], results[1]) is None, name
        if name != "AtariPreprocessing":  # which looks at what it keeps only after it has written it
            assert difference(held(used), held(fresh)) is None, name


def test_the_table_knows_every_attribute_of_the_installed_release() -> None:
    covered = set()
    for make in STACKS.values():
        env = make()
        env.reset(seed=0)
        for wrapper in layers(env):
            name = type(wrapper).__name__
            covered.add(name)
            if name != "AddWhiteNoise":
                assert kind_of(wrapper) is KNOWN[name], vars(wrapper).keys() - ALIKE - KNOWN[name].known
    public = {
        name for name in gw.__all__ if inspect.isclass(vars(gw).get(name)) and issubclass(vars(gw)[name], gym.Wrapper)
    }
    assert public - covered <= {"RecordVideo", "HumanRendering", *NEEDS}
    assert public <= KNOWN.keys()


def test_a_recording_is_a_log(tmp_path: Any) -> None:
    pytest.importorskip("moviepy")
    env = gw.RecordVideo(cart(render_mode="rgb_array"), str(tmp_path), episode_trigger=lambda _: False)
    assert kind_of(env) is KNOWN["RecordVideo"]
    env.reset(seed=0)
    env.start_recording("a")
    taken = trace_envs.snapshot(env)
    env.step(0)
    frames = len(env.recorded_frames)
    trace_envs.restore(env, taken)
    assert len(env.recorded_frames) == frames > 0
    env.recorded_frames = []  # or it would warn that nobody wrote them


def test_a_window_is_no_part_of_a_moment() -> None:
    assert kind_of(gw.HumanRendering(cart(render_mode="rgb_array"))) is KNOWN["HumanRendering"]


# Random stacks -------------------------------------------------------------------------------------------------------

ANY = {
    "limit": lambda env: gw.TimeLimit(env, 7),
    "statistics": lambda env: gw.RecordEpisodeStatistics(env, stats_key=f"statistics {len(layers(env))}"),
    "order": gw.OrderEnforcing,
    "sticky": lambda env: gw.StickyAction(env, 0.4),
    "reward": lambda env: gw.NormalizeReward(env),
    "double": lambda env: gw.TransformReward(env, lambda r: 2 * r),
    "tracked": SnapshotWrapper,
}
BOXES = {
    "stack": lambda env: gw.FrameStackObservation(env, 2),
    "delay": lambda env: gw.DelayObservation(env, 2),
    "normalize": gw.NormalizeObservation,
    "flatten": gw.FlattenObservation,
    "skip": lambda env: gw.MaxAndSkipObservation(env, 2),
}


def without_clocks(steps: list[Any]) -> list[Any]:
    for step in steps:
        for key in [key for key in step[4] if key.startswith("statistics")]:
            assert step[4][key].pop("t") >= 0
    return steps


@settings(max_examples=40, deadline=None)
@given(data=st.data(), box=st.booleans(), seed=st.integers(0, 1000), before=st.integers(0, 4))
def test_random_stacks(data: st.DataObject, box: bool, seed: int, before: int) -> None:
    chosen = data.draw(st.lists(st.sampled_from([*ANY, *(BOXES if box else ())]), max_size=5))

    def make() -> gym.Env:
        env = cart() if box else gym.make("Lock-v0")
        for name in chosen:
            env = {**ANY, **BOXES}[name](env)
        return env

    env = make()
    rng = np.random.default_rng(seed)
    pick = (lambda: int(rng.integers(2))) if box else (lambda: [LISTEN, dial(1), "nonsense"][rng.integers(3)])
    env.reset(seed=seed)
    if any(step[2] or step[3] for step in play(env, [pick() for _ in range(before)])):
        env.reset()
    taken, there = trace_envs.snapshot(env), strip(held(env))
    actions = [pick() for _ in range(9)]
    expected = without_clocks(play(env, actions))
    fork_of = None
    for target in (env, make()):
        trace_envs.restore(target, taken)
        assert difference(strip(held(target)), there) is None
        fork_of = fork_of or trace_envs.fork(target)
        assert difference(strip_steps(without_clocks(play(target, actions))), strip_steps(expected)) is None
    assert difference(strip_steps(without_clocks(play(fork_of, actions))), strip_steps(expected)) is None
    futures = []
    for target, moment_seed in ((env, 1), (make(), 1)):
        trace_envs.restore(target, taken, seed=moment_seed)
        futures.append(strip_steps(without_clocks(play(target, actions))))
    trace_envs.restore(env, taken)
    trace_envs.reseed(env, 1)
    futures.append(strip_steps(without_clocks(play(env, actions))))
    assert difference(futures[0], futures[1]) is None and difference(futures[0], futures[2]) is None


def strip(attributes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the infos that `SnapshotWrapper` keeps, which hold clocks."""
    return [{name: value for name, value in found.items() if name != "_info"} for found in attributes]


def strip_steps(steps: list[Any]) -> list[Any]:
    return [(*step[:5], strip(step[5])) for step in steps]


# Statistics ----------------------------------------------------------------------------------------------------------


def test_statistics_of_every_branch_are_those_of_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    env = gw.RecordEpisodeStatistics(gym.make("CartPole-v1", max_episode_steps=12))
    rng = np.random.default_rng(0)
    env.reset(seed=1)
    moments, ends = [(trace_envs.snapshot(env), 0, 0.0)], 0
    while ends < 25:
        taken, length, spent = moments[rng.integers(len(moments))]
        now += 100.0  # time goes by between the branches
        trace_envs.restore(env, taken)
        for _ in range(rng.integers(1, 13)):
            now += 1.5
            *_, terminated, truncated, info = env.step(int(rng.integers(2)))
            length, spent = length + 1, spent + 1.5
            if terminated or truncated:
                ends += 1
                assert info["episode"] == {"r": float(length), "l": length, "t": pytest.approx(spent)}
                assert env.episode_count == ends and env.length_queue[-1] == length
                break
            moments.append((trace_envs.snapshot(env), length, spent))
            assert moments[-1][0].turn == length and moments[-1][0].episode_return == length


# What wrappers bring along --------------------------------------------------------------------------------------------


def test_an_episode_can_begin_again_with_what_wrappers_brought() -> None:
    make = lambda: gw.NormalizeReward(gw.NormalizeObservation(gw.FrameStackObservation(cart(), 2)))  # noqa: E731
    env, other = make(), make()
    env.reset(seed=0)
    play(env, [1, 0, 1])
    carried = carried_state(env)
    assert [name for name, state in carried if state] == ["NormalizeReward", "NormalizeObservation"]
    first = env.reset(seed=3), play(env, [1, 1, 0])
    pickled = pickle.loads(pickle.dumps(carried))
    for target in (env, other):
        restore_carried(target, pickled)
        assert difference(carried_state(target), carried) is None
        assert difference((target.reset(seed=3), play(target, [1, 1, 0])), first) is None
    assert carried_state(cart()) == ()
    restore_carried(cart(), ())
    with pytest.raises(ValueError, match=r"NormalizeReward.*this environment has none"):
        restore_carried(cart(), carried)
    with pytest.raises(ValueError, match="brought along by the wrappers none"):
        restore_carried(make(), ())


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_refused_restore_changes_nothing() -> None:
    env = gw.FrameStackObservation(gw.RecordEpisodeStatistics(cart()), 2)
    env.reset(seed=0)
    taken = trace_envs.snapshot(env)
    play(env, [1, 0])
    there, moment = held(env), trace_envs.snapshot(env.unwrapped)

    def changed(**fields: Any) -> EnvSnapshot:
        return EnvSnapshot(**{name: getattr(taken, name) for name in EnvSnapshot.__dataclass_fields__} | fields)

    states = [(name, dict(state)) for name, state in taken.wrappers]
    states[0][1].pop("obs_queue")
    wrong = [
        (changed(version=99), "schema version 99"),
        (changed(env_id="Other-v0"), "the snapshot is of 'Other-v0'"),
        (changed(wrappers=taken.wrappers[1:]), "same level"),
        (changed(wrappers=tuple(states)), "FrameStackObservation holds.*this release"),
        (changed(adapter="replay"), "adapter 'replay'"),
        (changed(payload=3), "int"),
    ]
    for bad, message in wrong:
        with pytest.raises(ValueError, match=message):
            trace_envs.restore(env, bad)
        assert difference(held(env), there) is None and moment == trace_envs.snapshot(env.unwrapped)
    with pytest.raises(ValueError, match="negative"):
        trace_envs.restore(env, taken, seed=-1)
    assert difference(held(env), there) is None
    with pytest.raises(TypeError, match="expected an EnvSnapshot"):
        trace_envs.restore(env, taken.to_bytes())  # type: ignore[arg-type]


def test_a_wrapper_of_another_release_is_named() -> None:
    env = cart()
    env.reset(seed=0)
    taken = trace_envs.snapshot(env)
    del env._elapsed_steps
    for attempt in (lambda: trace_envs.snapshot(env), lambda: trace_envs.restore(env, taken)):
        with pytest.raises(
            SnapshotUnsupportedError, match=r"TimeLimit of Gymnasium .* has no attribute '_elapsed_steps'"
        ):
            attempt()


def test_an_attribute_that_somebody_added_is_carried() -> None:
    env = gw.ClipReward(hill(), -1.0, 1.0)
    env.reset(seed=0)
    env.note = [1]
    taken = trace_envs.snapshot(env)
    env.note.append(2)
    trace_envs.restore(env, taken)
    assert env.note == [1]
    assert kind_of(gw.ClipReward(hill(), -1.0, 1.0)) is KNOWN["ClipReward"]


@pytest.mark.parametrize("make", [cart, lambda: gym.make("Lock-v0"), lambda: SnapshotWrapper(cart().unwrapped)])
def test_nothing_is_restored_after_close(make: Callable[[], gym.Env]) -> None:
    env = make()
    env.reset(seed=0)
    taken = trace_envs.snapshot(env)
    env.close()
    with pytest.raises(ClosedEnvironmentError, match=r"closed; make another"):
        trace_envs.restore(env, taken)


def test_what_is_known_of_a_moment_outside_of_wrappers() -> None:
    env = gym.make("Lock-v0")
    observation, _ = env.reset(seed=0)
    assert trace_envs.snapshot(env).observation == observation
    env.step(OPEN)
    for wrap, seen, total in (
        (lambda e: gw.RecordEpisodeStatistics(e), True, 0.0),
        (lambda e: gw.TransformObservation(e, str.upper, None), False, env.unwrapped.snapshot().episode_return),
        (lambda e: gw.TransformReward(e, half), True, None),
        (Tally, False, None),
    ):
        taken = trace_envs.snapshot(wrap(env))
        assert (taken.observation is not None) == seen and taken.episode_return == total and taken.turn == 1
