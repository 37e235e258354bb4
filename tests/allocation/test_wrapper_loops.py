"""Agents that know nothing of trees, in environments that are not ours: one loop for all of them."""

import gymnasium as gym
import minigrid  # noqa: F401  # registers its environments
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import NormalizeObservation, RecordEpisodeStatistics, TimeLimit, TransformObservation

import trace_envs  # noqa: F401  # registers ours
from allocation import TreeAllocationWrapper


def agent(envs, seed, busy):
    """An ordinary loop over a vector that resets in the same step, until no slot is busy.

    Returns (return, length, last observation, last info) of each episode.
    """
    envs.action_space.seed(seed)
    obs, info = envs.reset(seed=seed)
    returns, lengths, episodes = np.zeros(envs.num_envs), np.zeros(envs.num_envs, int), []
    while (now := busy(envs, episodes)).any():
        obs, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
        assert obs in envs.observation_space
        assert reward.shape == terminated.shape == truncated.shape == (envs.num_envs,)
        returns += reward
        lengths += now
        done = terminated | truncated
        assert ("final_obs" in info) == done.any()
        for i in np.flatnonzero(done):
            assert (
                info["_final_obs"][i]
                and info["_final_info"][i]
                and info["final_obs"][i] in envs.single_observation_space
            )
            last = {k: v[i] for k, v in info["final_info"].items() if not k.startswith("_") and not isinstance(v, dict)}
            episodes.append((returns[i], lengths[i], info["final_obs"][i], last))
            returns[i] = lengths[i] = 0
    return episodes


def works(envs, episodes):
    return envs.active


def won(total_reward, info):
    return total_reward > 0


def wrap(name, num_envs, *, mode="sync", budget=12, allocator="trace", success=won, **kwargs):
    vector = gym.make_vec(name, num_envs, vectorization_mode=mode, **kwargs)
    return TreeAllocationWrapper(vector, allocator=allocator, budget=budget, success=success)


def check(envs, episodes, budget=12):
    """The agent saw every rollout end; those that began at a root it saw whole."""
    forest = envs.forest
    assert len(episodes) == budget == forest.num_leaves and not envs.active.any()
    whole = sorted((tree.returns()[leaf.id], leaf.depth) for tree in forest for leaf in tree.leaves("root"))
    seen = [(r, n) for r, n, _, _ in episodes]
    assert all(seen.count(pair) >= whole.count(pair) for pair in whole)
    assert sum(n for _, n in seen) == forest.ledger.environment_turns


def test_the_loop_runs_on_a_plain_vector_too():
    envs = gym.make_vec("CartPole-v1", 3, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})
    assert len(agent(envs, 0, lambda envs, episodes: np.full(3, len(episodes) < 5))) >= 5
    envs.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_cartpole_in_a_vector(mode):
    envs = wrap("CartPole-v1", 3, mode=mode, success=lambda total, info: total > 20)
    check(envs, agent(envs, 0, works))
    assert envs.forest.ledger.continuations == 8
    envs.close()


def test_the_same_forest_in_this_process_and_in_others():
    forests = []
    for mode in ("sync", "async"):
        envs = wrap("CartPole-v1", 3, mode=mode, success=lambda total, info: total > 20)
        agent(envs, 0, works)
        forests.append([[(n.parent, n.action, n.observation.tobytes()) for n in t.nodes] for t in envs.forest])
        envs.close()
    assert forests[0] == forests[1]


def test_cartpole_alone():
    envs = TreeAllocationWrapper(gym.make("CartPole-v1"), budget=6, success=lambda total, info: total > 20)
    check(envs, agent(envs, 0, works), 6)
    envs.close()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("FrozenLake-v1", {"is_slippery": True}),
        ("Blackjack-v1", {}),  # a tuple of numbers
        ("MiniGrid-Empty-5x5-v0", {"max_steps": 12}),  # a dictionary of an image, a number and a text
        ("TraceMultiHopQA-v0", {"max_turns": 3}),  # text, and so are the actions
        ("MountainCarContinuous-v0", {"max_episode_steps": 15}),  # actions are rows of an array
    ],
)
def test_observations_and_actions_of_any_kind(name, kwargs):
    envs = wrap(name, 3, **kwargs)
    check(envs, agent(envs, 1, works))
    assert len({t.key for t in envs.forest}) == len(envs.forest)
    envs.close()


@pytest.mark.parametrize("allocator", ["trace", "grpo"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_recorded_episode_statistics_are_those_of_the_path(mode, allocator):
    envs = wrap(
        "CartPole-v1",
        3,
        mode=mode,
        budget=16,
        allocator=allocator,
        success=lambda total, info: info["episode"]["r"] > 20,
        wrappers=[RecordEpisodeStatistics],
    )
    envs.action_space.seed(0)
    _, info = envs.reset(seed=0)
    ended = continued = 0
    while envs.active.any():
        _, _, terminated, truncated, info = envs.step(envs.action_space.sample())
        for i in np.flatnonzero(terminated | truncated):
            where, episode = info["final_info"]["trace"], info["final_info"]["episode"]
            tree = envs.forest.trees[where["tree"][i]]
            leaf = tree.nodes[where["node_id"][i]]
            assert leaf.terminal and info["final_info"]["_episode"][i]
            assert episode["r"][i] == tree.returns()[leaf.id] and episode["l"][i] == leaf.depth == where["depth"][i]
            assert leaf.is_correct == (episode["r"][i] > 20)
            assert (where["parent_id"][i], where["rollout"][i]) == (leaf.parent, leaf.rollout)
            ended, continued = ended + 1, continued + bool(where["is_continuation"][i])
    assert ended == 16 and continued == envs.forest.ledger.continuations
    assert (continued > 0) == (allocator == "trace")
    envs.close()


def test_nested_wrappers_keep_their_state_per_branch():
    limit = 9
    envs = wrap(
        "FrozenLake-v1",
        4,
        budget=24,
        is_slippery=False,
        wrappers=[
            lambda env: TransformObservation(env, lambda o: np.eye(16)[o], gym.spaces.Box(0, 1, (16,), np.float64)),
            NormalizeObservation,
            lambda env: TimeLimit(env, limit),
        ],
    )
    agent(envs, 3, works)
    envs.forest.verify()
    assert envs.forest.ledger.continuations > 0
    lengths = [leaf.depth for tree in envs.forest for leaf in tree.leaves() if leaf.truncated]
    assert lengths and set(lengths) == {limit}, "a branch did not inherit the turns of its prefix"
    envs.close()


def test_a_step_after_the_end_changes_nothing():
    envs = wrap("FrozenLake-v1", 2, budget=4, allocator="grpo")
    agent(envs, 0, works)
    before = envs.forest.ledger.counts()
    obs, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
    assert obs in envs.observation_space and not (reward.any() or terminated.any() or truncated.any()) and info == {}
    assert envs.forest.ledger.counts() == before and envs.forest.num_leaves == 4
    envs.close()
