"""Every recorded path can be executed again; what cannot be, is found and named."""

import copy
import pickle

import gymnasium as gym
import leaky_env
import numpy as np
import pytest
from bit_env import BitEnv, DepthPredictor, bit_vector, follow_hints, run
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, RecordEpisodeStatistics, TimeLimit

from allocation import MeanPredictor, TreeAllocationWrapper
from allocation.verify import ForestVerificationError, VerifyReport, verify
from trace_envs.slots import make_slots
from trace_envs.snapshots import EnvSnapshot


def wrapped(envs, budget=16, **kwargs):
    return TreeAllocationWrapper(envs, allocator="trace", predictor=DepthPredictor(), budget=budget, **kwargs)


def bits(cls=BitEnv, slots=3, budget=16, **kwargs):
    """A forest of `cls`, collected by following its hints."""
    return run(wrapped(SyncVectorEnv([lambda: cls(**kwargs)] * slots), budget))


def sample(envs, seed=0):
    """A forest of random actions."""
    envs.reset(seed=seed)
    envs.action_space.seed(seed)
    while envs.active.any():
        envs.step(envs.action_space.sample())
    return envs.forest


def expected(forest):
    """What a report has to count, found in another way."""
    ends = [(tree, node) for tree in forest for node in tree.nodes if not node.children]
    verdicts = sum(node.terminal and node.is_correct is not None for _, node in ends)
    return len(forest), len(ends), sum(node.depth for _, node in ends), verdicts


def has_continuations(forest):
    return any(node.origin == "continuation" for tree in forest for node in tree.nodes)


# What is right -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize("as_dict", [False, True])
def test_a_right_forest_is_verified(slots, as_dict):
    forest = bits(slots=slots, as_dict=as_dict)
    assert has_continuations(forest)
    before = pickle.dumps(forest)
    for _ in range(2):
        assert forest.verify() == VerifyReport(*expected(forest))
    assert pickle.dumps(forest) == before


def test_another_environment_does_as_well():
    forest = bits()
    kept = pickle.loads(pickle.dumps(forest))
    with pytest.raises(ValueError, match=r"does not hold the environments .* pass one: forest\.verify\(gym\.make"):
        kept.verify()
    for envs in (BitEnv(), bit_vector(7), make_slots(BitEnv())):
        assert verify(kept, envs) == VerifyReport(*expected(forest))
    with pytest.raises(ForestVerificationError, match="observation"):
        kept.verify(BitEnv(noise=0.9))


def test_a_forest_in_the_making_is_verified_as_far_as_it_has_got():
    undisturbed = bits()
    envs, rng = wrapped(bit_vector(3)), np.random.default_rng(0)
    observations, _ = envs.reset(seed=0)
    assert envs.forest.verify(BitEnv()) == VerifyReport(len(envs.forest), len(envs.forest), 0, 0)
    while envs.active.any():
        observations, *_ = envs.step(follow_hints(observations, rng))
        assert envs.forest.verify(BitEnv()) == VerifyReport(*expected(envs.forest))
        if envs.active.any():
            with pytest.raises(ValueError, match=r"forest is not finished, .* pass another one"):
                envs.forest.verify()
    assert [[n.action for n in t.nodes] for t in envs.forest] == [[n.action for n in t.nodes] for t in undisturbed]


def test_environments_in_processes_of_their_own_do_as_well():
    envs = wrapped(AsyncVectorEnv([BitEnv] * 2))
    try:
        forest = run(envs)
        assert has_continuations(forest)
        assert forest.verify() == VerifyReport(*expected(forest)) == verify(forest, BitEnv())
    finally:
        envs.close()


def foreign(name, **kwargs):
    return lambda: gym.make(name, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        foreign("CartPole-v1"),
        foreign("FrozenLake-v1", max_episode_steps=20),
        foreign("Taxi-v4", max_episode_steps=10),
        foreign("Blackjack-v1"),
        lambda: NormalizeObservation(TimeLimit(BitEnv(verdict=False), 3)),
        lambda: RecordEpisodeStatistics(gym.make("CartPole-v1", max_episode_steps=12)),
    ],
    ids=["CartPole", "FrozenLake", "Taxi", "Blackjack", "NormalizeObservation", "RecordEpisodeStatistics"],
)
def test_forests_of_foreign_environments_are_verified(make):
    envs = wrapped(SyncVectorEnv([make] * 3), budget=48, success=lambda total, info: total > 10)
    forest = sample(envs)
    # A second forest begins where the first one left the wrappers.
    for _ in range(2):
        assert has_continuations(forest)
        trees, paths, turns, verdicts = expected(forest)
        assert verdicts > 0 and forest.verify() == VerifyReport(trees, paths, turns, verdicts)
        sent = pickle.loads(
            pickle.dumps(forest)
        )  # which leaves the measure of success behind, and no info has a verdict
        assert sent.verify(make()) == VerifyReport(trees, paths, turns, 0)
        assert verify(sent, make(), success=lambda total, info: total > 10) == VerifyReport(*expected(forest))
        forest = sample(envs, seed=1)


def test_forests_of_text_are_verified():
    words = [
        '<tool_call>{"name": "search", "arguments": {"query": "the capital"}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"query": "who was born there"}}</tool_call>',
        "no call",
        "<answer>Paris</answer>",
    ]
    make = foreign("TraceMultiHopQA-v0", search_dropout=0.5, max_turns=5)
    envs = TreeAllocationWrapper(SyncVectorEnv([make] * 3), predictor=MeanPredictor(), budget=12)
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    while envs.active.any():
        envs.step([words[int(rng.choice(4, p=[0.4, 0.4, 0.1, 0.1]))] for _ in range(3)])
    forest = envs.forest
    assert any(node.tool_error for tree in forest for node in tree.nodes)
    assert forest.verify() == VerifyReport(*expected(forest))
    assert forest.verify(make()).turns > 0


# What is wrong -------------------------------------------------------------------------------------------------------


class Named(BitEnv):
    """Subclasses are environments of another kind."""

    def snapshot(self):
        return EnvSnapshot(type(self).__name__, len(self.state.guesses), self.state)


class Forgetful(Named):
    """Its snapshots leave out a count that observations show from turn 2 on."""

    count = 0

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.count += 1
        return super().step(action)

    def _observation(self):
        return super()._observation() + np.array([100 * self.count if len(self.state.guesses) >= 2 else 0, 0])


class Windy(Named):
    """Its rewards at turn 3 come from a generator of the module."""

    wind = np.random.default_rng()

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + (self.wind.random() if observation[0] == 3 else 0), *rest


class Restless(Named):
    """Every reset begins another episode, whatever the seed."""

    episodes = 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        observation, info = super().reset(seed=seed)
        return observation + np.array([1000 * self.episodes, 0]), info


class SeededByTheWay(Named):
    """A restore with a seed means something else than the same seed given where one is."""

    def step(self, action):
        self.stepped = True
        return super().step(action)

    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=None if seed is None else seed + 2**31 * self.stepped)

    stepped = True

    def reset(self, *, seed=None, options=None):
        self.stepped = False
        return super().reset(seed=seed)


def first_difference(caught, forest):
    error = caught.value
    tree = forest.trees[error.index]
    node = tree.nodes[error.node]
    assert (tree.key, node.depth) == (error.tree, error.turn)
    assert f"tree {error.tree!r} (number {error.index}), node {error.node}, turn {error.turn}" in str(error)
    return node


def test_a_snapshot_that_forgets_is_found():
    # Many turns, and no two wrong guesses: continuations leave from the middle.
    forest = bits(Forgetful, turns=6, noise=0.0, budget=24)
    assert has_continuations(forest)
    with pytest.raises(ForestVerificationError, match=r"differ in observation\[0\]: \d+ != \d+") as caught:
        forest.verify()
    node = first_difference(caught, forest)
    assert node.depth >= 2
    assert "as it was the first time, so the snapshot of node" in str(caught.value)


def test_a_hidden_generator_is_found_and_the_turn_is_named():
    forest = bits(Windy, turns=6)
    with pytest.raises(
        ForestVerificationError, match=r"turn 3: recorded and repeated differ in reward: .* != "
    ) as caught:
        forest.verify()
    assert first_difference(caught, forest).depth == 3


def test_the_leaky_environment_is_caught():
    leaky_env.register()
    envs = wrapped(gym.make_vec("Leaky-v0", 2, "sync"), success=lambda total, info: total > 0)
    forest = sample(envs)
    message = r"turn 3: recorded and repeated differ in observation\[1\]: .* != .*module-level generators"
    with pytest.raises(ForestVerificationError, match=message) as caught:
        forest.verify()
    assert first_difference(caught, forest).depth == 3


def test_a_reset_that_ignores_its_seed_is_found():
    forest = bits(Restless)
    message = r"node 0, turn 0: .* observation\[0\]: \d000 != \d+000; reset\(\) does not give the same episode"
    with pytest.raises(ForestVerificationError, match=message) as caught:
        forest.verify()
    assert first_difference(caught, forest).depth == 0


def test_a_seed_must_mean_the_same_however_a_moment_was_reached():
    forest = bits(SeededByTheWay, turns=6)
    with pytest.raises(ForestVerificationError, match="observation"):
        forest.verify()


CHANGES = {
    "observation": lambda node: setattr(node, "observation", node.observation + np.array([0, 1])),
    "reward": lambda node: setattr(node, "reward", node.reward + 2.0**-40),
    "terminated": lambda node: setattr(node, "terminated", not node.terminated),
    "truncated": lambda node: setattr(node, "truncated", True),
    "tool_error": lambda node: setattr(node, "tool_error", True),
    "is_correct": lambda node: setattr(node, "is_correct", not node.is_correct),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_was_changed_is_found_where_it_is(name):
    original = bits(budget=8)
    for tree in original:
        for node in tree.nodes[1:]:
            if name == "is_correct" and not node.terminal:
                continue
            forest = copy.deepcopy(original)
            CHANGES[name](forest.trees[tree.index].nodes[node.id])
            with pytest.raises(ForestVerificationError, match=f"differ in {name}") as caught:
                forest.verify(BitEnv())
            assert (caught.value.index, caught.value.node) == (tree.index, node.id)


def test_another_measure_of_success_is_passed_along():
    envs = wrapped(bit_vector(3), success=lambda total, info: not info["is_correct"])
    forest = run(envs)
    assert forest.verify() == VerifyReport(*expected(forest))
    assert verify(forest, success=lambda total, info: not info["is_correct"]) == VerifyReport(*expected(forest))
    with pytest.raises(ForestVerificationError, match=r"is_correct: (True != False|False != True)"):
        verify(forest, success=lambda total, info: info["is_correct"])
