"""All terms of the loss at once, over two passes, against the definitions of the papers: PPO's with every option."""

import copy

import numpy as np
import torch
from slow_update import PLAIN, clipped, edge_logits, edge_logprobs, edges, noisy_forest, path_ids, relative

from agents.advantages import estimate, valued_prefixes
from agents.aggregation import edge_coefficients
from agents.critic import value_coefficients
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from agents.reference import FrozenReference
from allocation.forest_table import ForestTable

LR, TEMPERATURE = 0.02, 0.8
CONFIG = LearnerConfig(
    estimator="gae",
    gae_lambda=0.9,
    gamma=0.97,
    dual_clip=1.5,
    importance="truncated",
    importance_cap=1.3,
    kl_coef=0.2,
    entropy_coef=0.05,
    value_coef=0.7,
    value_clip=0.01,
    epochs=2,
    micro_tokens=300,
    **PLAIN,
)


def flat(*modules):
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


def value(model, critic, table, row):
    ids = path_ids(table.trees[table.tree[row]], table.node(row))
    return critic(model.get_decoder()(ids[None]).last_hidden_state[:, -1])[0]


def slow_ppo(model, critic, other, forest):
    """Takes two plain gradient steps, edge by edge and prefix by prefix."""
    table = ForestTable.of(forest)
    prefixes, before = valued_prefixes(table), np.zeros(len(table))
    with torch.no_grad():
        before[prefixes] = [float(value(model, critic, table, row)) for row in prefixes]
        old = {row: edge_logprobs(model, tree, node, TEMPERATURE) for row, tree, node in edges(forest, table)}
        reference = {row: edge_logprobs(other, tree, node, TEMPERATURE) for row, tree, node in edges(forest, table)}
    credit = estimate(table, "gae", CONFIG, values=before)
    coefficients, shares = edge_coefficients(table, credit, "prompt"), value_coefficients(table, credit.target)
    for _ in range(CONFIG.epochs):
        model.zero_grad()
        critic.zero_grad()
        for row, tree, node in edges(forest, table):
            whole = edge_logits(model, tree, node, TEMPERATURE)
            new = whole.gather(-1, torch.from_numpy(node.sample.action_ids)[:, None])[:, 0]
            weight = (old[row] - torch.from_numpy(node.sample.logprobs)).exp().clamp(max=CONFIG.importance_cap)
            gain = clipped((new - old[row]).exp(), credit.advantage[row], dual=CONFIG.dual_clip)
            apart = reference[row] - new
            bonus = CONFIG.entropy_coef * -(whole.exp() * whole).sum(-1)
            loss = weight * (CONFIG.kl_coef * (apart.exp() - 1 - apart) - gain) - bonus
            (coefficients[row] * loss).sum().backward()
        for row in prefixes:
            now = value(model, critic, table, row)
            moved = before[row] + (now - before[row]).clamp(-CONFIG.value_clip, CONFIG.value_clip)
            error = torch.maximum((now - credit.target[row]) ** 2, (moved - credit.target[row]) ** 2)
            (CONFIG.value_coef * 0.5 * shares[row] * error).backward()
        with torch.no_grad():
            for p in [*model.parameters(), *critic.parameters()]:
                p -= LR * p.grad


def test_every_term_at_once_is_what_the_papers_say(make_model, tokenizer):
    fast, slow, other = make_model(), make_model(), make_model(seed=1)
    forest = noisy_forest(fast, tokenizer)
    for tree, weight in zip(forest, np.resize([0.5, 0.0, 2.0, 1.0], len(forest)), strict=True):
        tree.loss_weight = float(weight)
    made = Learner(fast, CONFIG, updates=1, temperature=TEMPERATURE, reference=FrozenReference(other, temperature=0.8))
    critic = copy.deepcopy(made.critic)
    start = flat(fast, critic)
    sizes = [{"params": group["params"]} for group in made.optimizer.param_groups]
    made.optimizer = torch.optim.SGD(sizes, lr=LR)
    figures = made.update(forest).figures
    slow_ppo(slow, critic, other, forest)
    assert relative(flat(fast, made.critic) - start, flat(slow, critic) - start) < 1e-4
    assert figures["loss/clip_share"] > 0 and figures["importance/clipped"] > 0 and figures["loss/reference_kl"] > 0
