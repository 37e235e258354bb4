"""Adapters of known pairs: the Arcade Learning Environment, and environments with methods of their own."""

from __future__ import annotations

import copy
import threading
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stack_tools import bare_pair

from trace_envs import SnapshotUnsupportedError
from trace_envs.snapshots import EnvSnapshot
from trace_envs.snapshots.adapters import adapter_for, twins
from trace_envs.snapshots.adapters.atari import _held, _hold, _restore
from trace_envs.snapshots.compare import difference

gym.register_envs(ale_py)


def future(env: gym.Env, actions: list[Any]) -> list[Any]:
    """What an environment returns for some actions, as far as the episode goes."""
    results = []
    for action in actions:
        results.append(env.step(action))
        if results[-1][2] or results[-1][3]:
            break
    return results


def put(env: gym.Env, taken: EnvSnapshot, seed: int | None = None) -> None:
    adapter_for(env).put(env, taken, seed)


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "ALE/Breakout-v5"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**31), before=st.integers(1, 80))
def test_an_emulator_goes_on_as_it_would_have(env_id: str, seed: int, before: int) -> None:
    env, sibling = bare_pair(env_id)
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    actions = rng.integers(env.action_space.n, size=before + 40)
    future(env, actions[:before])
    if env.ale.game_over():
        env.reset()
    adapter = adapter_for(env)
    assert adapter.name == "ale"
    screen, memory = env.ale.getScreenRGB(), env.ale.getRAM()
    taken = adapter.take(env)
    assert np.array_equal(env.ale.getScreenRGB(), screen)
    assert np.array_equal(env.ale.getRAM(), memory)
    expected = future(env, actions[before:])
    env.reset()
    future(env, rng.integers(env.action_space.n, size=5))
    sibling.reset(seed=seed + 1)
    future(sibling, rng.integers(env.action_space.n, size=7))
    for target, snapshot in ((env, taken), (sibling, EnvSnapshot.from_bytes(taken.to_bytes()))):
        put(target, snapshot)
        assert difference(adapter.take(target), taken) is None
        assert difference(future(target, actions[before:]), expected) is None


def test_the_held_action_is_read_for_every_action_and_strength() -> None:
    env, other = bare_pair("ALE/Breakout-v5")
    for target, different in ((env, 4), (gym.make("ALE/MsPacman-v5").unwrapped, 9)):
        target.reset(seed=1)
        future(target, [1, 2, 3] * 5)
        state = target.clone_state(include_rng=True).serialize()
        seen = set()
        for action in range(18):
            for strength in (1.0, 0.3):
                _hold(target.ale, state, action, strength)
                _restore(target.ale, state)
                held = _held(target.ale)
                seen.add(held)
                # What was read, held again, is read again.
                _hold(target.ale, state, *held)
                _restore(target.ale, state)
                assert _held(target.ale) == held
                assert target.clone_state(include_rng=True).serialize() == state
        assert len(seen) >= different
    assert {round(strength, 3) for _, strength in seen} == {1.0}
    assert other is not env


def test_the_held_action_matters_and_is_carried() -> None:
    env, _ = bare_pair("ALE/Pong-v5")
    env.reset(seed=5)
    future(env, [0] * 20)
    state = env.clone_state(include_rng=True).serialize()
    futures = []
    for action in (3, 4):
        _hold(env.ale, state, action, 1.0)
        _restore(env.ale, state)
        taken = adapter_for(env).take(env)
        assert taken.payload.held == (action, 1.0)
        outcomes = []
        for seed in range(40):
            put(env, taken, seed)
            outcomes.append(env.step(0)[0].tobytes())
        futures.append(outcomes)
    # Where the first frames repeat the held action, the futures differ; where they do not, they are the same.
    same = [a == b for a, b in zip(*futures, strict=True)]
    assert any(same) and not all(same)


def test_two_restores_share_their_luck_exactly_when_they_share_their_seed() -> None:
    env, sibling = bare_pair("ALE/Pong-v5")
    env.reset(seed=2)
    sibling.reset(seed=3)
    future(env, [2, 3] * 20)
    taken = adapter_for(env).take(env)
    actions = [2, 3, 0, 1] * 12

    def after(target: gym.Env, seed: int | None) -> list[Any]:
        put(target, taken, seed)
        return future(target, actions)

    assert difference(after(env, None), after(sibling, None)) is None
    first = after(env, 7)
    assert difference(first, after(sibling, 7)) is None
    assert difference(first, after(env, 7)) is None
    assert difference(first, after(env, 8)) is not None
    assert difference(first, after(env, None)) is not None


def test_the_frame_counter_survives() -> None:
    env, sibling = bare_pair("ALE/Pong-v5")
    env.reset(seed=0)
    future(env, [0] * 30)
    taken, at = adapter_for(env).take(env), env.ale.getFrameNumber()
    assert at == 120
    env.reset(seed=1)
    sibling.reset(seed=1)
    for target in (env, sibling):
        put(target, taken)
        assert target.ale.getFrameNumber() == at
        assert target.ale.getEpisodeFrameNumber() == at


def test_stochastic_frame_skips_and_games_without_sticky_actions() -> None:
    env = gym.make("ALE/Pong-v5", frameskip=(2, 6), repeat_action_probability=0.0).unwrapped
    env.reset(seed=0)
    future(env, [0] * 10)
    taken = adapter_for(env).take(env)
    assert taken.payload.held is None
    expected = future(env, [2, 3] * 10)
    put(env, taken)
    assert difference(future(env, [2, 3] * 10), expected) is None
    put(env, taken, 4)
    assert difference(future(env, [2, 3] * 10), expected) is not None


def test_an_emulator_of_another_game_is_refused() -> None:
    pong, breakout = bare_pair("ALE/Pong-v5")[0], bare_pair("ALE/Breakout-v5")[0]
    with pytest.raises(ValueError, match="game="):
        put(breakout, adapter_for(pong).take(pong))
    odd = gym.make("ALE/Pong-v5", repeat_action_probability=0.5).unwrapped
    with pytest.raises(ValueError, match="repeat_action_probability"):
        put(odd, adapter_for(pong).take(pong))


class Dice(gym.Env):
    """Adds up throws of a die."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Discrete(10_000)

    def __init__(self) -> None:
        self.throws: list[int] = []
        self.lock = threading.Lock()  # so that attributes cannot be copied

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.throws.clear()
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.throws.append(int(self.np_random.integers(1, 1000)))
        return sum(self.throws), 0.0, False, False, {}


class GetSet(Dice):
    """Hands out its live list, and works on with what it is handed."""

    def get_state(self) -> list[int]:
        return self.throws

    def set_state(self, state: list[int]) -> None:
        self.throws = state


class Cloning(Dice):
    """The other pair."""

    def clone_state(self, include_rng: bool = False) -> list[int]:
        return self.throws

    def restore_state(self, state: list[int]) -> None:
        self.throws = state


class Copying(Dice):
    """Copies itself."""

    def copy(self) -> Dice:
        made = type(self)()
        made.throws = list(self.throws)
        made.dealer = made
        made.throw = made.step
        return made


class DeepCopying(Copying):
    """Says how it is deep-copied."""

    copy = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Dice:
        return Copying.copy(self)


PAIRS = {
    GetSet: "get_state()/set_state(state)",
    Cloning: "clone_state(include_rng)/restore_state(state)",
    Copying: "copy()",
    DeepCopying: "__deepcopy__",
}


@pytest.mark.parametrize("cls", PAIRS)
def test_pairs_carry_the_state_and_the_generator(cls: type[Dice]) -> None:
    env, sibling = cls(), cls()
    env.reset(seed=1)
    sibling.reset(seed=2)
    future(env, [0] * 3)
    assert adapter_for(env).name == PAIRS[cls]
    taken = adapter_for(env).take(env)
    expected = future(env, [0] * 5)
    for target in (env, sibling, env):
        put(target, taken)
        assert len(target.throws) == 3
        assert future(target, [0] * 5) == expected
    put(env, taken, 5)
    new = future(env, [0] * 5)
    put(sibling, taken, 5)
    assert future(sibling, [0] * 5) == new != expected
    put(sibling, taken, 6)
    assert future(sibling, [0] * 5) != new
    assert env.np_random_seed == 5


class Hand:
    """A plain object."""

    def __init__(self, throws: list[int]):
        self.throws = throws


class Handing(GetSet):
    """Its state is an object of a class of its own."""

    def get_state(self) -> Any:
        return [Hand(self.throws)]

    def set_state(self, state: Any) -> None:
        self.throws = state[0].throws


class Lockless(Copying):
    """A copy of it is plain data."""

    def __init__(self) -> None:
        super().__init__()
        del self.lock

    def copy(self) -> Dice:
        made = super().copy()
        del made.throw
        return made


@pytest.mark.parametrize("cls", [GetSet, Cloning, Handing, Lockless])
def test_pairs_of_plain_data_go_through_bytes(cls: type[Dice]) -> None:
    env = cls()
    env.reset(seed=1)
    env.step(0)
    taken = adapter_for(env).take(env)
    expected = future(env, [0] * 5)
    other = cls()
    put(other, EnvSnapshot.from_bytes(taken.to_bytes()))
    assert future(other, [0] * 5) == expected


@pytest.mark.parametrize("cls", [Copying, DeepCopying])
def test_the_copy_takes_the_place_of_the_original(cls: type[Dice]) -> None:
    env = cls()
    env.reset(seed=1)
    taken = adapter_for(env).take(env)
    put(env, taken)
    assert env.dealer is env
    assert env.throw.__self__ is env


class Inward(Copying):
    """Its copies refer to themselves from inside."""

    def copy(self) -> Dice:
        made = super().copy()
        made.world = [made]
        return made


def test_a_copy_that_refers_to_itself_from_inside_is_refused_and_nothing_changes() -> None:
    env = Inward()
    env.reset(seed=1)
    taken = adapter_for(env).take(env)
    env.step(0)
    throws = env.throws
    with pytest.raises(SnapshotUnsupportedError, match="refers to itself from inside"):
        put(env, taken)
    assert env.throws is throws


class Misbehaving(Dice):
    """What its deep copy does is given."""

    def __init__(self, does: Any):
        super().__init__()
        self.does = does

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.does(self)


def _raise(env: gym.Env) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (lambda env: env, "returned the environment itself"),
        (lambda env: Dice(), "returned a Dice"),
        (_raise, "raised OSError: disk full"),
        (lambda env: threading.Event().wait(), "did not return within"),
    ],
    ids=["itself", "another type", "raises", "hangs"],
)
def test_deep_copies_that_do_not_work_are_refused(does: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "TIME_LIMIT", 0.2)
    with pytest.raises(SnapshotUnsupportedError, match=f"copy.deepcopy of Misbehaving {said}"):
        adapter_for(Misbehaving(does))
    env = Misbehaving(lambda own: copy.copy(Dice.__new__(Misbehaving)))
    adapter = adapter_for(env)
    env.does = does
    with pytest.raises(SnapshotUnsupportedError, match=f"{said}.*Replayable"):
        adapter.take(env)


def test_methods_of_other_signatures_are_no_pairs() -> None:
    class Physical(Dice):
        def get_state(self) -> list[int]:
            return self.throws

        def set_state(self, qpos: Any, qvel: Any) -> None: ...

    class Asking(Dice):
        def copy(self, deep: bool) -> None: ...

        def get_state(self, which: str) -> None: ...

        def set_state(self, state: Any) -> None: ...

    for cls in (Physical, Asking):
        with pytest.raises(SnapshotUnsupportedError, match="it has no get_state") as caught:
            adapter_for(cls())
        assert "deepcopy: env.lock" in str(caught.value)


def test_a_state_that_cannot_be_copied_is_named() -> None:
    class Locked(GetSet):
        def get_state(self) -> Any:
            return self.lock

    env = Locked()
    with pytest.raises(SnapshotUnsupportedError, match="lock that cannot be copied"):
        adapter_for(env).take(env)
