"""Learning on an environment that is not ours: a tabular policy on FrozenLake, rewarded only at the goal.

The agent loop is the one of any vector environment; advantages and loss are those that train language models.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.advantages import CreditConfig, estimate
from agents.losses import Clip, policy_loss
from allocation import MeanPredictor, TreeAllocationWrapper
from allocation.forest_table import ForestTable

UPDATES, EPOCHS = 40, 4


def lakes(num_envs):
    # Without slipping a uniformly random walk reaches the goal in about one episode of seventy.
    return gym.make_vec(
        "FrozenLake-v1", num_envs=num_envs, vectorization_mode="sync", is_slippery=False, max_episode_steps=30
    )


def collect(envs, logits, generator, seed):
    """Returns the forest, and by (tree, rollout, depth) the log-probability that the action of an edge was sampled with."""
    observations, info = envs.reset(seed=seed)
    sampled = {}
    while envs.active.any():
        rows = torch.log_softmax(logits[torch.as_tensor(observations)], -1)
        actions = torch.multinomial(rows.exp(), 1, generator=generator)[:, 0]
        where = info["trace"]
        for i in np.flatnonzero(envs.active):
            edge = int(where["tree"][i]), int(where["rollout"][i]), int(where["depth"][i]) + 1
            sampled[edge] = float(rows[i, actions[i]])
        observations, _, _, _, info = envs.step(actions.numpy())
    return envs.forest, sampled


def batch(forest, sampled, estimator):
    """One row for each edge: start, action, old log-probability, both parts of the advantage, coefficient."""
    table = ForestTable.of(forest)
    credit, rows = estimate(table, estimator, CreditConfig(advantage_std=estimator == "grpo")), []
    for row in np.flatnonzero(~table.is_root):
        tree, node = table.trees[table.tree[row]], table.node(row)
        state, action = int(tree.nodes[node.parent].observation), int(node.action)
        old = sampled[tree.index, node.rollout, node.depth]
        rows.append((state, action, old, credit.up[row], credit.down[row], credit.weight[row] / len(forest)))
    states, actions, *rest = zip(*rows, strict=True)
    return torch.tensor(states), torch.tensor(actions), *(torch.tensor(x, dtype=torch.float32) for x in rest)


def success_rate(logits, episodes=200):
    rng = np.random.default_rng(0)
    env = lakes(1).envs[0]
    probabilities = torch.softmax(logits.detach(), -1).numpy().astype(np.float64)
    probabilities /= probabilities.sum(-1, keepdims=True)
    total = 0.0
    for episode in range(episodes):
        state, _ = env.reset(seed=episode)
        done = False
        while not done:
            state, reward, terminated, truncated, _ = env.step(int(rng.choice(4, p=probabilities[state])))
            done = terminated or truncated
            total += reward
    return total / episodes


@pytest.mark.parametrize(("allocator", "estimator"), [("trace", "tree"), ("grpo", "grpo")])
def test_a_policy_learns_a_sparse_frozen_lake(allocator, estimator):
    logits = torch.zeros(16, 4, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    envs = TreeAllocationWrapper(
        lakes(16),
        allocator=allocator,
        predictor=MeanPredictor(),
        budget=64,
        success=lambda total_reward, info: total_reward > 0,
    )
    assert success_rate(logits) < 0.05
    continuations = 0
    for update in range(UPDATES):
        forest, sampled = collect(envs, logits.detach(), generator, seed=update)
        envs.allocator.update(forest)
        continuations += forest.ledger.continuations
        states, actions, old, up, down, coefficients = batch(forest, sampled, estimator)
        for _ in range(EPOCHS):
            logprobs = torch.log_softmax(logits, -1)[states, actions]
            loss, _ = policy_loss(logprobs, old, up, down, coefficients, Clip())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    envs.close()
    assert (continuations > 0) == (allocator == "trace")
    assert success_rate(logits) > 0.8
