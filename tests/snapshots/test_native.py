import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import lock_env
import numpy as np
import pytest
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit, TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from lock_env import LISTEN, OPEN, LockEnv, dial, recite

import trace_envs
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.snapshots import SCHEMA_VERSION, EnvSnapshot, SnapshotUnsupportedError
from trace_envs.state import EpisodeState, FinalAnswer, FormatError, History, Task, ToolCall, Turn, turns_of

lock_env.register()

SEARCH = '<tool_call>{"name": "search", "arguments": {"query": "capital mayor founder"}}</tool_call>'
ACTIONS = st.one_of(
    st.sampled_from([dial(1), dial(2), dial(-1), LISTEN, LISTEN, SEARCH, SEARCH, recite(200), OPEN, dial(1) + LISTEN]),
    st.text(max_size=20),
)
SCRIPTS = st.lists(ACTIONS, max_size=5)
FAMILIES = {
    "lock": lambda **kwargs: LockEnv(max_observation_chars=100, **kwargs),
    "qa": lambda **kwargs: MultiHopQAEnv(search_dropout=0.5, **kwargs),
}
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def play(env, script):
    """Steps until the script or the episode ends; returns everything that was seen."""
    seen = []
    for action in script:
        if env.unwrapped.state.done:
            break
        seen.append(copy.deepcopy(env.step(action)))
    return seen


def moment(env):
    """Everything that can be seen of an environment, and what the next episode would be, without touching it."""
    return copy.deepcopy((env.observation(), env.info(), env.render(), env.np_random.bit_generator.state))


# Repeating the future ------------------------------------------------------------------------------------------------


@every_family
@given(before=SCRIPTS, after=SCRIPTS, other=SCRIPTS, seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_restored_environment_repeats_exactly(make, before, after, other, seed):
    env, sibling = make(render_mode="ansi"), make(render_mode="ansi")
    env.reset(seed=seed)
    play(env, before)
    taken, there = env.snapshot(), moment(env)
    future = [play(env, after), env.reset(), play(env, after)]
    for someone in (env, env, sibling):
        someone.restore(taken)
        assert moment(someone) == there
        play(someone, other)
        someone.restore(taken)
        assert [play(someone, after), someone.reset(), play(someone, after)] == future


class Branches(RuleBasedStateMachine):
    """Snapshots and forks at random moments of random episodes; each must stay what it was."""

    snapshots = Bundle("snapshots")
    forks = Bundle("forks")

    def __init__(self):
        super().__init__()
        self.env = LockEnv(render_mode="ansi", max_turns=5)
        self.env.reset(seed=0)
        self.there = moment(self.env)
        self.twins = []

    @rule()
    def reset(self):
        self.env.reset()
        self.there = moment(self.env)

    @rule(action=ACTIONS)
    def step(self, action):
        if not self.env.state.done:
            self.env.step(action)
            self.there = moment(self.env)

    @rule(target=snapshots)
    def snapshot(self):
        return self.env.snapshot(), self.there

    @rule(kept=snapshots)
    def restore(self, kept):
        taken, self.there = kept
        self.env.restore(taken)

    @rule(kept=snapshots, seed=st.integers(0, 2**128))
    def restore_with_a_seed(self, kept, seed):
        taken, there = kept
        self.env.restore(taken, seed=seed)
        self.there = moment(self.env)
        assert self.there[:3] == there[:3]

    @rule(target=forks)
    def fork(self):
        twin = [self.env.fork(), self.there]
        self.twins.append(twin)
        return twin

    @rule(twin=forks, action=ACTIONS)
    def step_a_fork(self, twin, action):
        if not twin[0].state.done:
            twin[0].step(action)
            twin[1] = moment(twin[0])

    @rule(twin=forks)
    def reset_a_fork(self, twin):
        twin[0].reset()
        twin[1] = moment(twin[0])

    @invariant()
    def nobody_moved_but_by_its_own_steps(self):
        for env, there in [(self.env, self.there), *self.twins]:
            assert moment(env) == there


TestBranches = Branches.TestCase
TestBranches.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@every_family
def test_branches_do_not_see_each_other(make):
    env = make()
    env.reset(seed=0)
    env.step(LISTEN)
    root = env.snapshot()
    ends = {}
    for name in ("left", "right"):
        env.restore(root)
        env.step(f"{name} {SEARCH}")
        ends[name] = env.snapshot()
    for name in ("left", "right", "left"):
        env.restore(ends[name])
        texts = [m["content"] for m in env.info()["messages"] if m["role"] == "assistant"]
        assert texts == [LISTEN, f"{name} {SEARCH}"]
    assert root.payload.turn == 1 and ends["left"] != ends["right"]


@every_family
def test_a_seed_changes_the_future_and_nothing_else(make):
    env = make(render_mode="ansi")
    env.reset(seed=0)
    chance = LISTEN if isinstance(env, LockEnv) else SEARCH
    env.step(chance)
    taken, there = env.snapshot(), moment(env)
    futures = []
    for seed in (None, 1, 2, 1, np.int64(2), 2**80, 0, None):
        env.restore(taken, seed=seed)
        assert moment(env)[:3] == there[:3]
        futures.append((play(env, [chance] * 4), env.reset()))
    plain, one, two, one_again, two_again, large, zero, plain_again = futures
    assert (plain, one, two) == (plain_again, one_again, two_again)
    for i, (steps, _) in enumerate([plain, one, two, large, zero]):
        assert all(steps != other for other, _ in [plain, one, two, large, zero][:i])


@every_family
def test_the_next_episode_is_restored_too(make):
    env, sibling = make(), make()
    env.reset(seed=3)
    taken = env.snapshot()
    episodes = [env.reset() for _ in range(5)]
    assert len({info["task_id"] for _, info in episodes}) > 1
    sibling.restore(taken)
    assert [sibling.reset() for _ in range(5)] == episodes


def test_a_finished_episode_can_be_restored():
    env = LockEnv()
    env.reset(options={"task_id": "0"})
    env.step(OPEN)
    taken, info = env.snapshot(), env.info()
    env.reset()
    env.restore(taken)
    assert env.info() == info and info["is_correct"]
    with pytest.raises(RuntimeError, match="over"):
        env.step(OPEN)


# What a snapshot is --------------------------------------------------------------------------------------------------


def test_a_snapshot_is_a_reference_and_branches_share_their_past():
    env = LockEnv()
    env.reset(seed=0)
    play(env, [LISTEN, dial(1), LISTEN])
    state, taken = env.state, env.snapshot()
    assert taken.payload is state
    assert (taken.env_id, taken.turn, taken.version) == ("LockEnv", 3, SCHEMA_VERSION)
    env.step(LISTEN)
    left = env.state
    env.restore(taken)
    assert env.state is state
    env.step(dial(1))
    assert env.state.history.before is left.history.before is state.history
    assert env.fork().state is env.state


def test_corpus_and_index_are_no_part_of_it():
    env = MultiHopQAEnv()
    env.reset(seed=0)
    env.step(SEARCH)
    assert env.state.world
    data = pickle.dumps(env.snapshot())
    assert len(data) < 10_000
    unseen = next(p for i, p in enumerate(env.dataset.passages) if i not in env.state.world and len(p.text) > 100)
    assert unseen.text.encode() not in data


def test_equal_moments_are_equal_and_hash_alike():
    env, sibling = LockEnv(), LockEnv()
    for someone in (env, sibling):
        someone.reset(seed=0, options={"task_id": "0"})
        play(someone, [dial(2), "nonsense", OPEN])
    one, two = env.snapshot(), sibling.snapshot()
    assert one == two and one is not two and hash(one) == hash(two)
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert hash(pickle.loads(pickle.dumps(one))) == hash(one)
    sibling.reset(options={"task_id": "0"})
    assert sibling.snapshot() != one


IN_ANOTHER_PROCESS = """
import pickle, sys
import gymnasium as gym
import trace_envs
taken, script = pickle.load(sys.stdin.buffer)
env = gym.make("TraceMultiHopQA-v0", search_dropout=0.5)
trace_envs.restore(env, taken)
pickle.dump([[env.step(action) for action in script], env.reset()], sys.stdout.buffer)
"""


def test_a_snapshot_travels_to_another_process():
    env = gym.make("TraceMultiHopQA-v0", search_dropout=0.5)
    env.reset(seed=4)
    play(env, [SEARCH, "nonsense \ud800"])
    taken = trace_envs.snapshot(env)
    script = [SEARCH, SEARCH, "<answer>no</answer>"]
    sent = pickle.dumps((taken, script))
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=sent,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        cwd=Path(__file__).parent,
        check=True,
        timeout=120,
    )
    assert pickle.loads(done.stdout) == [[env.step(action) for action in script], env.reset()]


LONG = 5_000


def long_episode(key=0):
    env = LockEnv(max_turns=LONG + 1)
    env.reset(seed=0)
    state = replace(env.state, key=key)
    for _ in range(LONG):
        state = env.advance(state, LISTEN)
    assert not state.done
    return env, state


def test_a_long_history_exhausts_nothing():
    env, state = long_episode()
    _, same = long_episode()
    _, other = long_episode(key=1)
    assert sys.getrecursionlimit() < LONG
    assert state == same and hash(state) == hash(same) and state.history is not same.history
    assert state != other and state.history != other.history
    assert state.history != state.history.before != None  # noqa: E711
    assert repr(state).count("click ") == LONG
    assert copy.deepcopy(state) == state
    taken = EnvSnapshot("LockEnv", state.turn, state)
    back = pickle.loads(pickle.dumps(taken))
    assert back == taken and len(turns_of(back.payload.history)) == LONG
    twin = env.fork()
    for someone, snapshot in ((env, taken), (twin, back)):
        someone.restore(snapshot)
    one, two = env.step(LISTEN), twin.step(LISTEN)
    assert one == two and one[3] and len(one[4]["messages"]) == 2 + 2 * (LONG + 1)


TURNS = st.lists(
    st.builds(
        Turn,
        st.sampled_from("ab"),
        st.one_of(
            st.builds(FinalAnswer, st.sampled_from("ab")),
            st.builds(FormatError, st.sampled_from("ab")),
            st.builds(
                ToolCall, st.just("dial"), st.dictionaries(st.just("by"), st.lists(st.integers(0, 1), max_size=1))
            ),
        ),
        st.sampled_from("ab"),
        st.booleans(),
    ),
    max_size=2,
)


def history(turns):
    linked = None
    for turn in turns:
        linked = History(turn, linked)
    return linked


@given(TURNS, TURNS)
@settings(max_examples=300)
def test_histories_are_equal_exactly_when_their_turns_are(left, right):
    assert turns_of(history(left)) == left
    assert (history(left) == history(right)) == (left == right)
    states = [EpisodeState(Task("t", "?"), 0, history=history(turns)) for turns in (left, right)]
    assert (states[0] == states[1]) == (left == right)
    assert (hash(states[0]) == hash(states[1])) or left != right
    assert history(left) != left or not left


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "seed", "message"),
    [
        ({"env_id": "Other-v3"}, None, "the snapshot is of 'Other-v3', this environment is 'LockEnv'"),
        ({"version": 99}, None, f"the snapshot has schema version 99, this release reads version {SCHEMA_VERSION}"),
        ({}, -1, "non-negative"),
    ],
)
def test_a_foreign_snapshot_or_seed_is_refused_and_changes_nothing(change, seed, message):
    env = LockEnv(render_mode="ansi")
    env.reset(seed=0)
    taken = replace(env.snapshot(), **change)
    env.step(LISTEN)
    there = moment(env)
    with pytest.raises(ValueError, match=message):
        env.restore(taken, seed=seed)
    assert moment(env) == there


def test_nothing_can_be_taken_before_the_first_reset():
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        LockEnv().snapshot()


class Repickled(gym.Env, gym.utils.EzPickle):
    """A copy of it would be another environment, at its beginning."""

    observation_space = action_space = gym.spaces.Discrete(2)


def test_an_environment_that_nothing_carries_is_refused():
    env = Repickled()
    taken = EnvSnapshot("Repickled", 0, None)
    for attempt in (
        lambda: trace_envs.snapshot(env),
        lambda: trace_envs.restore(env, taken),
        lambda: trace_envs.fork(env),
    ):
        with pytest.raises(SnapshotUnsupportedError, match=r"EzPickle.*restore\(snapshot, \*, seed=None\)"):
            attempt()


# Wrappers ------------------------------------------------------------------------------------------------------------


def wrapped(limit=4):
    """What `gym.make` builds (with its checker, order enforcer and time limit), and two more."""
    env = gym.make("Lock-v0", max_episode_steps=limit)
    return RecordEpisodeStatistics(TransformReward(env, lambda r: 2 * r), stats_key="statistics", buffer_length=3)


def without_clock(steps):
    for *_, info in steps:
        info.get("statistics", {}).pop("t", None)
    return steps


@given(st.integers(0, 3), st.booleans())
@settings(max_examples=10, deadline=None)
def test_wrappers_are_restored_with_the_environment(turns, fresh):
    env = wrapped()
    for _ in range(2):  # the second episode, for the queues to hold something
        env.reset(options={"task_id": "0"})
        play(env, [LISTEN, OPEN])
    env.reset(seed=1, options={"task_id": "0"})
    play(env, [LISTEN] * turns)
    taken = trace_envs.snapshot(env)

    def future(someone):
        steps = [someone.step(LISTEN) for _ in range(4 - turns)]
        assert [step[3] for step in steps] == [False] * (3 - turns) + [True]  # TimeLimit counts on from the snapshot
        return without_clock(steps), someone.reset(seed=9)

    there = future(env)
    for more in (1, 2):
        env = wrapped() if fresh else env
        trace_envs.restore(env, taken)
        assert future(env) == there
        # The log is of what has happened, in this environment.
        before, after = ([], [0.0]) if fresh else ([2.0, 2.0], [0.0] * (1 + more))
        assert list(env.return_queue) == (before + after)[-3:] and env.episode_count == len(before + after)
    trace_envs.restore(env, taken)
    _, reward, terminated, _, info = env.step(OPEN)
    assert (reward, terminated, info["statistics"]["l"], info["statistics"]["r"]) == (2.0, True, turns + 1, 2.0)


def test_a_wrapped_snapshot_holds_nothing_that_the_caller_can_change():
    env = gym.make("Lock-v0")
    _, info = env.reset(seed=0)
    taken = trace_envs.snapshot(env)
    before = pickle.dumps(taken)
    info["messages"].clear()
    env.step(LISTEN)[4]["messages"].clear()
    env.reset()
    assert pickle.dumps(taken) == before


def test_a_snapshot_goes_back_to_the_level_where_it_was_taken():
    env = gym.make("Lock-v0")
    env.reset(seed=0)
    outside, inside = trace_envs.snapshot(env), trace_envs.snapshot(env.unwrapped)
    assert outside.env_id == inside.env_id == "Lock-v0" and outside.payload is inside.payload
    env.step(LISTEN)
    state = env.unwrapped.state
    for target, taken in ((env, inside), (env.unwrapped, outside), (TimeLimit(env, 3), outside)):
        with pytest.raises(ValueError, match=r"taken through the wrappers .* this environment has .* same level"):
            trace_envs.restore(target, taken)
        assert env.unwrapped.state is state
    trace_envs.restore(env.unwrapped, inside)
    assert env.unwrapped.state is inside.payload


def test_a_seed_passes_through_wrappers():
    env = gym.make("Lock-v0")
    env.reset(seed=0)
    taken = trace_envs.snapshot(env)
    seen = []
    for seed in (5, 6, 5):
        trace_envs.restore(env, taken, seed=seed)
        seen.append(env.step(LISTEN)[0])
    assert seen[0] == seen[2] != seen[1]


# Forks ---------------------------------------------------------------------------------------------------------------


@every_family
@given(before=SCRIPTS, after=SCRIPTS, other=SCRIPTS)
@settings(max_examples=20, deadline=None)
def test_a_fork_has_the_same_future_and_its_own_life(make, before, after, other):
    env = make(render_mode="ansi")
    env.reset(seed=0)
    play(env, before)
    there = moment(env)
    twin, third = trace_envs.fork(env), env.fork()
    assert type(twin) is type(env) and moment(twin) == there and twin.np_random_seed == env.np_random_seed == 0
    future = [play(twin, after), twin.reset()]
    play(third, other)
    third.reset(seed=5)
    assert moment(env) == there
    assert [play(env, after), env.reset()] == future


def test_a_fork_shares_the_corpus_but_no_generator():
    env = MultiHopQAEnv()
    env.action_space.seed(0)
    twin = env.fork()  # before the first reset
    assert twin.dataset is env.dataset and twin.index is env.index
    samples = [twin.action_space.sample() for _ in range(5)]
    assert [env.action_space.sample() for _ in range(5)] == samples
    assert twin.reset(seed=1) == env.reset(seed=1)
    assert twin.np_random is not env.np_random


def test_a_fork_goes_through_wrappers():
    env = wrapped(limit=3)
    env.reset(seed=0)
    env.step(LISTEN)
    twin = trace_envs.fork(env)
    assert str(twin) == str(env) and twin.unwrapped.state is env.unwrapped.state
    future = without_clock([twin.step(LISTEN) for _ in range(2)])
    assert [step[3] for step in future] == [False, True] and twin.episode_count == 1
    assert env.unwrapped.state.turn == 1 and env.episode_count == 0
    assert without_clock([env.step(LISTEN) for _ in range(2)]) == future


class CountToThree(gym.Env):
    """Counts to three; its snapshots are plain integers."""

    observation_space = gym.spaces.Discrete(4)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return 0, {}

    def step(self, action):
        self.count += 1
        return self.count, float(action), self.count == 3, False, {}

    def snapshot(self):
        return self.count

    def restore(self, snapshot, *, seed=None):
        self.count = snapshot


def test_an_environment_may_have_snapshots_of_its_own_kind():
    env = gym.wrappers.TimeLimit(CountToThree(), 5)
    env.reset(seed=0)
    env.step(1)
    moment = trace_envs.snapshot(env)
    env.step(1)
    trace_envs.restore(env, moment)
    assert env.unwrapped.count == 1 and env._elapsed_steps == 1
    assert env.step(0)[0] == 2
