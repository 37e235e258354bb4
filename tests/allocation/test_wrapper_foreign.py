"""Environments as users write them: no verdict, reused buffers, exceptions; and what wrong use is told."""

import gymnasium as gym
import numpy as np
import pytest
from bit_env import BitEnv, DepthPredictor, bit_vector, follow_hints, run, wrapped

from allocation import TreeAllocationWrapper, UniformAllocator


class Walk(gym.Env):
    """A walk of four steps in the plane; observations and infos are written into the same objects again and again."""

    def __init__(self, fails_at=None, grows_at=None):
        self.observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float64)
        self.fails_at, self.grows_at = fails_at, grows_at
        self.at, self.steps, self.buffer = np.zeros(2), 0, np.zeros(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = self.np_random.uniform(-1, 1, 2), 0
        return self.seen(), {}

    def step(self, action):
        self.at, self.steps = self.at + action, self.steps + 1
        action[:] = 7.0  # what an environment does with its argument is its own affair
        if self.steps == self.fails_at:
            raise ZeroDivisionError("the ground gave way")
        return self.seen(), float(self.at[0]), self.steps == 4, False, {}

    def seen(self):
        self.buffer[:] = self.at
        return np.zeros(3) if self.steps == self.grows_at else self.buffer

    def get_state(self):
        return self.at.copy(), self.steps

    def set_state(self, state):
        self.at, self.steps = state[0].copy(), state[1]


def walks(num_envs=3, budget=9, allocator="trace", **kwargs):
    vector = gym.vector.SyncVectorEnv([lambda: Walk(**kwargs)] * num_envs)
    return TreeAllocationWrapper(vector, allocator=allocator, budget=budget, success=lambda total, info: total > 0)


def test_what_is_recorded_is_a_value():
    envs = walks()
    rng, given = np.random.default_rng(0), np.empty((3, 2))
    envs.reset(seed=0)
    sums = {}
    while envs.active.any():
        given[:] = rng.uniform(-1, 1, given.shape)  # one buffer for every step
        contexts, actions = envs.contexts(), given.copy()
        old = {id(c.tree): len(c.tree.nodes) for c in contexts}
        envs.step(given)
        for tree in envs.forest:
            for node in tree.nodes[old.get(id(tree), len(tree.nodes)) :]:
                slot = next(c.slot for c in contexts if c.tree is tree and np.array_equal(actions[c.slot], node.action))
                sums[tree.index, node.id] = tree.nodes[node.parent].observation + actions[slot]
    assert envs.forest.ledger.continuations > 0 and len(sums) == envs.forest.ledger.environment_turns
    for tree in envs.forest:
        for node in tree.nodes[1:]:
            assert np.array_equal(node.observation, sums[tree.index, node.id])
    envs.close()


def test_an_exception_says_where_and_leaves_the_forest():
    envs = walks(fails_at=3)
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    forest = envs.forest
    with pytest.raises(ZeroDivisionError, match="the ground gave way") as caught:
        while envs.active.any():
            before = envs.contexts()
            envs.step(rng.uniform(-1, 1, (3, 2)))
    context = before[0]
    notes = "\n".join(caught.value.__notes__)
    assert f"tree {context.tree.key!r}, node {context.node.id} (turn 2), rollout 0" in notes
    assert envs.forest is forest and forest.ledger.environment_turns == 6 == sum(len(t.nodes) - 1 for t in forest)
    with pytest.raises(RuntimeError, match=r"call reset\(\) before step\(\).*ended with an exception"):
        envs.step(np.zeros((3, 2)))
    envs.reset(seed=1)
    assert envs.active.all() and envs.forest is not forest


def test_an_environment_that_leaves_its_space_is_named():
    envs = walks(grows_at=2)
    envs.reset(seed=0)
    envs.step(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"observation of slot 0 does not fit.*got an array of shape \(3,\)"):
        envs.step(np.zeros((3, 2)))


def test_an_environment_without_a_verdict_needs_success():
    envs = wrapped(verdict=False)
    with pytest.raises(ValueError, match=r"gives no info\['is_correct'\].*pass success=lambda") as caught:
        run(envs)
    assert any("the end of the episode" in note for note in caught.value.__notes__)
    assert envs.forest.num_leaves >= 1, "what was collected is gone"
    forest = run(wrapped(verdict=False, success=lambda total, info: total > 0.5))
    assert {leaf.is_correct for t in forest for leaf in t.leaves()} == {True, False}
    assert all(leaf.is_correct == (leaf.reward > 0.5) for t in forest for leaf in t.leaves())


def test_success_is_given_the_return_of_the_whole_path():
    seen = []
    vector = gym.make_vec("CartPole-v1", 4, "sync")
    envs = TreeAllocationWrapper(vector, budget=12, success=lambda total, info: bool(seen.append(total)) or total > 20)
    envs.action_space.seed(0)
    envs.reset(seed=0)
    while envs.active.any():
        envs.step(envs.action_space.sample())
    returns = [t.returns()[leaf.id] for t in envs.forest for leaf in t.leaves()]
    assert sorted(seen) == sorted(returns) and envs.forest.ledger.continuations > 0


def test_a_closed_wrapper_says_so():
    envs = wrapped(2)
    envs.reset(seed=0)
    envs.close()
    envs.close()
    for call in (lambda: envs.step([0, 0]), lambda: envs.reset(seed=0)):
        with pytest.raises(RuntimeError, match=r"after close\(\): the environments are closed; make and wrap new ones"):
            call()
    assert len(envs.forest) > 0


def test_a_forest_outlives_its_wrapper():
    forest = run(wrapped(2))
    assert forest.slots is not None
    forest.verify()


def test_wrong_use_is_named():
    envs = wrapped(3)
    with pytest.raises(RuntimeError, match=r"call reset\(\) before step\(\)"):
        envs.step([0, 0, 0])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="expected 3 actions, one for each slot, got 2"):
        envs.step([0, 0])
    with pytest.raises(ValueError, match=r"the actions are no batch of .* \(TypeError: a text is one action\)"):
        envs.step("001")
    with pytest.raises(ValueError, match="budget must be at least 1 rollout, got 0"):
        wrapped(budget=0)
    with pytest.raises(ValueError, match=r"unknown allocator 'pso'; known: grpo, .*trace"):
        TreeAllocationWrapper(BitEnv(), allocator="pso")
    with pytest.raises(
        ValueError, match=r"budget 3 is smaller than one group of m_min=4: raise the budget or lower m_min"
    ):
        wrapped(budget=3).reset(seed=0)
    with pytest.raises(TypeError, match=r"or a single environment, got str; make one with gym\.make_vec"):
        TreeAllocationWrapper("BitEnv")


def test_no_snapshot_is_taken_where_no_branch_can_begin(monkeypatch):
    taken = []
    monkeypatch.setattr(BitEnv, "snapshot", lambda self, real=BitEnv.snapshot: (taken.append(self), real(self))[1])
    for allocator in (UniformAllocator(4), DepthPredictor()):
        if isinstance(allocator, DepthPredictor):
            envs, roots = wrapped(4, 32), None
        else:
            envs = TreeAllocationWrapper(bit_vector(4), allocator=allocator, budget=32)
            roots = 8
        rng = np.random.default_rng(0)
        obs, _ = envs.reset(seed=0)
        opened = len(taken)
        assert roots in (None, opened)
        wanted = 0
        while envs.active.any():
            inner = {id(c.tree): len(c.tree.nodes) for c in envs.contexts()}
            obs, *_ = envs.step(follow_hints(obs, rng))
            fresh = [n for t in envs.forest for n in t.nodes[inner.get(id(t), len(t.nodes)) :] if not n.terminal]
            wanted += sum(n.origin == "root" for n in fresh) if roots is None else 0
        assert len(taken) - opened == wanted and (wanted > 0) == (roots is None)
        taken.clear()
