from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
import threading

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, precondition, rule

from trace_envs.snapshots import (
    Replayable,
    ReplayDivergenceError,
    SnapshotUnsupportedError,
    adapter_for,
    reseed,
    restore,
    snapshot,
)
from trace_envs.snapshots.adapters import generators
from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.record import EnvSnapshot

gym.register_envs(ale_py)

# Shared by all environments; no seed reaches it.
HIDDEN = random.Random(0)


class Counter(gym.Env):
    """Counts, adds noise, and holds a lock; writes every observation into one and the same array."""

    def __init__(self):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float64)
        self.lock = threading.Lock()
        self.seen = np.zeros(2)
        self.raises = self.leaks_from = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen[:] = 0, self.np_random.random() + (options or {}).get("offset", [0])[0]
        if options:
            options["offset"][0] = 99
        return self.seen, {"seed": seed}

    def step(self, action):
        if self.raises is not None:
            raise self.raises
        self.seen[0] += 1
        self.seen[1] = self.np_random.random() + action[0]
        action[0] = 7
        if self.leaks_from is not None and self.seen[0] >= self.leaks_from:
            self.seen[1] += HIDDEN.random()
        return self.seen, float(self.seen[1]), False, False, {}


def act(value: float = 0.5) -> np.ndarray:
    return np.array([value])


def play(env: gym.Env, actions) -> list:
    return copy.deepcopy([env.step(copy.deepcopy(action))[:4] for action in actions])


# Against an environment that is made anew and stepped by hand ---------------------------------------------------------


class Against(RuleBasedStateMachine):
    """Every step is compared with one of a new environment in which all that led to the moment was done by hand."""

    name: str
    moments = Bundle("moments")

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed):
        self.env = Replayable(gym.make(self.name).unwrapped)
        self.reset(seed)

    def by_hand(self, done):
        self.oracle = gym.make(self.name).unwrapped
        self.done = list(done)
        for kind, value in done:
            if kind == "reset":
                observation, _ = self.oracle.reset(seed=value)
            elif kind == "reseed":
                generators.reseed(self.oracle, value)
            else:
                self.oracle.step(value)
        self.oracle.action_space.seed(0)
        return observation

    @rule(seed=st.none() | st.integers(0, 1000))
    def reset(self, seed):
        observation, _ = self.env.reset(seed=seed)
        used = self.env.snapshot().payload.start.seed
        assert seed in (None, used)
        assert difference(self.by_hand([("reset", used)]), observation) is None
        self.over = False

    @precondition(lambda self: not self.over)
    @rule(data=st.data())
    def step(self, data):
        action = data.draw(st.integers(0, self.oracle.action_space.n - 1))
        expected = self.oracle.step(action)
        came = self.env.step(action)
        assert difference(expected[:4], came[:4]) is None
        self.done.append(("step", action))
        self.over = expected[2]

    @rule(target=moments)
    def take(self):
        taken = self.env.snapshot()
        assert taken.turn == sum(kind == "step" for kind, _ in self.done)
        return taken, list(self.done), self.over, taken.digest

    @rule(moment=moments, seed=st.none() | st.integers(0, 1000), through_bytes=st.booleans())
    def restore(self, moment, seed, through_bytes):
        taken, done, over, digest = moment
        self.env.restore(EnvSnapshot.from_bytes(taken.to_bytes()) if through_bytes else taken, seed=seed)
        self.by_hand([*done, ("reseed", seed)] if seed is not None else done)
        self.over = over
        again = self.env.snapshot()
        assert (again.digest == digest == taken.digest) or seed is not None
        assert again.turn == taken.turn and again.episode_return == taken.episode_return
        assert difference(again.observation, taken.observation) is None

    @rule(seed=st.integers(0, 1000))
    def renew(self, seed):
        before = self.env.replayed_turns
        reseed(self.env, seed)
        assert self.env.replayed_turns == before
        generators.reseed(self.oracle, seed)
        self.done.append(("reseed", seed))


@pytest.mark.parametrize("name", ["FrozenLake-v1", "Blackjack-v1", "CartPole-v1"])
def test_against_an_environment_stepped_by_hand(name):
    machine = type(name, (Against,), {"name": name})
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, database=None)
    machine.TestCase("runTest").runTest()


# Environments that nothing else carries -------------------------------------------------------------------------------


def test_a_lock_is_no_hindrance():
    env = Replayable(Counter())
    assert adapter_for(env).name == "native"
    env.reset(seed=1)
    play(env, [act()] * 5)
    taken = snapshot(env)
    expected = play(env, [act(0.1)] * 5)
    restore(env, taken)
    assert env.replayed_turns == 5
    assert difference(expected, play(env, [act(0.1)] * 5)) is None
    sibling = Replayable(Counter())
    restore(sibling, taken)
    assert difference(expected, play(sibling, [act(0.1)] * 5)) is None


def test_an_atari_game_is_repeated():
    env = Replayable(gym.make("ALE/Breakout-v5").unwrapped)
    env.reset(seed=3)
    rng = np.random.default_rng(0)
    prefix, future = ([int(a) for a in rng.integers(4, size=30)] for _ in range(2))
    play(env, prefix)
    taken = env.snapshot()
    expected = play(env, future)
    restore(env, EnvSnapshot.from_bytes(taken.to_bytes()))
    assert difference(expected, play(env, future)) is None


def test_a_minigrid_mission_is_repeated():
    import minigrid  # noqa: F401  # registers its environments

    env = Replayable(gym.make("MiniGrid-DoorKey-5x5-v0").unwrapped)
    env.reset(seed=3)
    play(env, [1, 2, 2, 0, 3])
    taken = env.snapshot()
    expected = play(env, [2, 2, 1, 5])
    restore(env, EnvSnapshot.from_bytes(taken.to_bytes()))
    assert difference(expected, play(env, [2, 2, 1, 5])) is None


# What is recorded -----------------------------------------------------------------------------------------------------


def test_later_changes_do_not_reach_the_record():
    env = Replayable(Counter())
    options = {"offset": [3]}
    observation, _ = env.reset(seed=0, options=options)
    assert options == {"offset": [99]}, "the environment sees the caller's own options"
    first = observation.copy()
    action = act()
    env.step(action)
    assert action[0] == 7
    taken = env.snapshot()
    assert taken.payload.start.options == {"offset": [3]}
    assert taken.payload.history.turn.action[0] == 0.5
    play(env, [act()] * 3)
    env.restore(taken)
    assert np.array_equal(taken.payload.start.observation, first)
    assert taken.payload.start.options == {"offset": [3]}
    assert taken.payload.history.turn.action[0] == 0.5


def test_options_are_repeated():
    env = Replayable(gym.make("CartPole-v1").unwrapped)
    env.reset(seed=0, options={"low": -0.01, "high": 0.01})
    env.step(1)
    taken = env.snapshot()
    expected = play(env, [0, 1])
    env.reset(seed=5)
    env.restore(taken)
    assert difference(expected, play(env, [0, 1])) is None


def test_the_seeds_of_resets_follow_from_the_last_explicit_one():
    def episodes(env, count):
        return [env.reset()[1]["seed"] for _ in range(count)]

    env, other = Replayable(Counter()), Replayable(Counter())
    env.reset(seed=4)
    other.reset()
    other.reset(seed=4)
    assert (first := episodes(env, 3)) == episodes(other, 3)
    assert len(set(first)) == 3
    env.reset(seed=4)
    taken = env.snapshot()
    episodes(env, 5)
    env.restore(taken)
    assert episodes(env, 3) == first
    env.restore(taken, seed=9)
    renewed = episodes(env, 3)
    assert renewed != first
    env.restore(taken, seed=9)
    assert episodes(env, 3) == renewed


def test_two_environments_without_a_seed_differ():
    assert Replayable(Counter()).reset()[1] != Replayable(Counter()).reset()[1]


# What has to be repeated ----------------------------------------------------------------------------------------------


def test_only_missing_turns_are_repeated():
    env = Replayable(Counter())
    env.reset(seed=0)
    taken = [env.snapshot()]
    for _ in range(6):
        play(env, [act()])
        taken.append(env.snapshot())
    env.restore(taken[6])
    assert env.replayed_turns == 0
    env.restore(taken[2])
    assert env.replayed_turns == 2
    env.restore(taken[5])
    assert env.replayed_turns == 5
    env.restore(taken[5], seed=1)
    assert env.replayed_turns == 5
    play(env, [act()])
    later = env.snapshot()
    env.restore(taken[6])
    assert env.replayed_turns == 11
    env.restore(taken[0])
    env.restore(later)
    assert env.replayed_turns == 17
    assert difference(env.snapshot(), later) is None


def test_a_new_seed_replaces_one_of_the_same_moment():
    env = Replayable(Counter())
    env.reset(seed=0)
    play(env, [act()])
    taken = env.snapshot()
    env.restore(taken, seed=5)
    expected = env.snapshot().digest, play(env, [act()] * 3)
    for seed in (3, 4, 5):
        env.restore(taken, seed=seed) if seed == 3 else reseed(env, seed)
    assert env.snapshot().digest == expected[0]
    assert difference(expected[1], play(env, [act()] * 3)) is None


def test_after_a_step_that_raised_the_moment_is_not_trusted():
    env = Replayable(Counter())
    env.reset(seed=0)
    play(env, [act()] * 2)
    taken = env.snapshot()
    expected = play(env, [act()])
    env.restore(taken)
    repeated = env.replayed_turns
    env.env.raises = OSError("disk")
    with pytest.raises(OSError, match="disk"):
        env.step(act())
    env.env.raises = None
    env.env.seen[0] += 1  # half of a step's work
    env.restore(taken)
    assert env.replayed_turns == repeated + 2
    assert difference(expected, play(env, [act()])) is None


def test_wrappers_around_it_see_nothing_of_repeated_turns():
    env = RecordEpisodeStatistics(TimeLimit(Replayable(Counter()), 8))
    env.reset(seed=0)
    play(env, [act()] * 3)
    taken = snapshot(env)
    play(env, [act()] * 4)
    restore(env, taken)
    assert env.get_wrapper_attr("replayed_turns") == 3
    assert env.get_wrapper_attr("_elapsed_steps") == 3
    total = taken.episode_return
    for turn in range(5):
        _, reward, _, truncated, info = env.step(act())
        total += reward
        assert truncated == (turn == 4)
    assert info["episode"]["l"] == 8
    assert info["episode"]["r"] == pytest.approx(total)
    assert env.episode_count == 1


def test_around_a_whole_stack_its_limits_are_repeated_too():
    env = Replayable(gym.make("CartPole-v1", max_episode_steps=6))
    env.reset(seed=0)
    play(env, [0, 1, 0, 1])
    taken = snapshot(env)
    expected = play(env, [0, 1])
    assert expected[-1][3]
    restore(env, taken)
    assert difference(expected, play(env, [0, 1])) is None


# When it does not work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, 4, 6])
def test_a_hidden_generator_is_caught_at_its_turn(turn):
    env = Replayable(Counter())
    env.reset(seed=0)
    early = env.snapshot()
    env.env.leaks_from = turn
    play(env, [act()] * 6)
    late = env.snapshot()
    env.restore(early)
    with pytest.raises(
        ReplayDivergenceError, match=rf"at turn {turn}, the observation differs \(\[1\].*np_random"
    ) as caught:
        env.restore(late)
    assert caught.value.turn == turn
    for forbidden in (lambda: env.step(act()), env.snapshot):
        with pytest.raises(RuntimeError, match=r"restore\(\) failed; call reset\(\)"):
            forbidden()
    env.restore(early)
    env.step(act())
    with pytest.raises(ReplayDivergenceError):
        env.restore(late)
    env.reset(seed=0)
    env.step(act())


def test_reset_reward_flags_and_exceptions_are_compared():
    class Fickle(gym.Env):
        observation_space = action_space = gym.spaces.Discrete(5)
        change = None

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return int(self.change == "first observation"), {}

        def step(self, action):
            if self.change == "raised":
                raise OSError("no space left")
            return 0, float(self.change == "reward"), self.change == "terminated", self.change == "truncated", {}

    env = Replayable(Fickle())
    env.reset(seed=0)
    play(env, [0, 0])
    taken = env.snapshot()
    for what, turn in (("first observation", 0), ("reward", 1), ("terminated", 1), ("truncated", 1), ("raised", 1)):
        env.env.change = None
        env.reset(seed=0)
        env.env.change = what
        with pytest.raises(ReplayDivergenceError, match=f"{what}") as caught:
            env.restore(taken)
        assert caught.value.turn == turn
    assert isinstance(caught.value.__cause__, OSError)


def test_nondeterministic_environments_are_refused():
    env = Counter()
    env.spec = gym.envs.registration.EnvSpec("Dice-v0", entry_point=Counter, nondeterministic=True)
    with pytest.raises(
        SnapshotUnsupportedError, match=r"Dice-v0 is registered with nondeterministic=True.*snapshot\(\)"
    ):
        Replayable(env)


def test_changed_spaces_are_an_error():
    env = Replayable(Counter())
    env.reset(seed=0)
    env.env.action_space = gym.spaces.Box(-1, 1, (1,), np.float64)  # equal
    env.step(act())
    env.env.action_space = gym.spaces.Discrete(2)
    with pytest.raises(
        ValueError, match=r"Counter changed its action_space during an episode, from Box.* to Discrete\(2\)"
    ):
        env.step(act())


def test_before_reset_and_after_close_there_is_no_moment():
    env = Replayable(Counter())
    with pytest.raises(RuntimeError, match=r"reset\(\) was not called yet"):
        env.step(act())
    with pytest.raises(RuntimeError, match=r"reset\(\) was not called yet"):
        env.snapshot()
    env.reset(seed=0)
    taken = env.snapshot()
    env.close()
    for forbidden in (lambda: env.step(act()), env.snapshot, lambda: env.restore(taken)):
        with pytest.raises(RuntimeError, match="it is closed; make another"):
            forbidden()


def test_snapshots_of_other_environments_are_refused_and_change_nothing():
    env = Replayable(gym.make("FrozenLake-v1").unwrapped)
    env.reset(seed=0)
    env.step(1)
    before = env.snapshot().digest
    plain = gym.make("FrozenLake-v1").unwrapped
    plain.reset(seed=0)
    other = Replayable(gym.make("FrozenLake-v1", is_slippery=False).unwrapped)
    other.reset(seed=0)
    foreign = Replayable(gym.make("CartPole-v1").unwrapped)
    foreign.reset(seed=0)
    for taken, message in (
        (snapshot(plain), "no actions to repeat"),
        (other.snapshot(), "is_slippery"),
        (foreign.snapshot(), "CartPole-v1"),
    ):
        with pytest.raises(ValueError, match=message):
            env.restore(taken)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        env.restore(env.snapshot(), seed=-1)

    class Another(Counter):
        pass

    unregistered = Replayable(Counter())
    unregistered.reset(seed=0)
    another = Replayable(Another())
    another.reset(seed=0)
    with pytest.raises(ValueError, match=r"of a .*Counter.*Another"):
        another.restore(unregistered.snapshot())
    assert env.snapshot().digest == before
    assert env.replayed_turns == 0


# As values ------------------------------------------------------------------------------------------------------------


def test_ten_thousand_turns_need_no_recursion():
    env = Replayable(Counter())
    env.reset(seed=0)
    for _ in range(10_000):
        env.step(act())
    taken = env.snapshot()
    for again in (pickle.loads(pickle.dumps(taken)), copy.deepcopy(taken), EnvSnapshot.from_bytes(taken.to_bytes())):
        assert again == taken and hash(again) == hash(taken)
    assert again.digest == taken.digest
    play(env, [act()])
    env.restore(again)
    assert env.replayed_turns == 10_000
    assert difference(env.snapshot(), taken) is None
    assert len(repr(taken)) < 200


def test_branches_share_their_past():
    env = Replayable(Counter())
    env.reset(seed=0)
    play(env, [act()] * 3)
    taken = env.snapshot()
    branches = []
    for seed in (1, 2):
        env.restore(taken, seed=seed)
        play(env, [act()])
        branches.append(env.snapshot().payload.history)
    assert branches[0].before.before is branches[1].before.before is taken.payload.history


def test_the_spec_makes_it_again_wrapper_and_all():
    env = Replayable(gym.make("FrozenLake-v1"))
    again = env.spec.make()
    assert isinstance(again, Replayable)
    env.reset(seed=0)
    env.step(1)
    again.restore(env.snapshot())


def test_another_process_repeats_it(tmp_path):
    env = Replayable(gym.make("Blackjack-v1").unwrapped)
    env.reset(seed=11)
    while env.step(1)[2]:  # until a first card is not one too many
        env.reset()
    taken = env.snapshot()
    (tmp_path / "bytes").write_bytes(taken.to_bytes())
    (tmp_path / "pickle").write_bytes(pickle.dumps(taken))
    program = (
        "import pickle, sys, gymnasium as gym\n"
        "from trace_envs.snapshots import EnvSnapshot, Replayable, restore\n"
        "read = lambda name: open(sys.argv[1] + '/' + name, 'rb').read()\n"
        "for taken in (EnvSnapshot.from_bytes(read('bytes')), pickle.loads(read('pickle'))):\n"
        "    env = Replayable(gym.make('Blackjack-v1').unwrapped)\n"
        "    restore(env, taken, seed=3)\n"
        "    print(env.snapshot().digest, env.step(1)[:4])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True)
    restore(env, taken, seed=3)
    expected = f"{env.snapshot().digest} {env.step(1)[:4]}"
    assert done.stdout.splitlines() == [expected, expected]
