"""The update done slowly: every edge alone, with its whole path before it, by the definitions of the papers."""

import numpy as np
import torch
from echo_env import echo_forest

from agents.advantages import estimate
from agents.aggregation import edge_coefficients
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from allocation.forest_table import ForestTable

PLAIN = {"lr_warmup": 0, "lr_schedule": "constant", "max_grad_norm": 1e9}


def path_ids(tree, node):
    """Token ids from the start of the prompt to the end of a prefix."""
    ids = []
    for n in tree.path(node):
        ids += [n.sample.action_ids] if n.sample is not None else []
        ids += [n.context_ids] if n.context_ids is not None else []
    return torch.from_numpy(np.concatenate(ids))


def edge_logits(model, tree, node, temperature=1.0):
    """Logits at the tokens of the edge into a node, float [tokens, vocabulary]."""
    before, action = path_ids(tree, tree.nodes[node.parent]), torch.from_numpy(node.sample.action_ids)
    logits = model(torch.cat([before, action])[None]).logits[0, len(before) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


def edge_logprobs(model, tree, node, temperature=1.0):
    """Log-probs of the tokens of the edge into a node, float [tokens]."""
    return edge_logits(model, tree, node, temperature).gather(-1, torch.from_numpy(node.sample.action_ids)[:, None])[
        :, 0
    ]


def edges(forest, table=None):
    """Every edge with tokens: its row in the table, tree and node."""
    table = table or ForestTable.of(forest)
    for row in range(len(table)):
        node = table.node(row)
        if node.sample is not None and len(node.sample.action_ids):
            yield row, table.trees[table.tree[row]], node


def clipped(rho, advantage, low=0.2, high=0.28, dual=0.0):
    """PPO's term for one advantage, as the papers write it; float [tokens]."""
    term = torch.minimum(rho * advantage, rho.clamp(1 - low, 1 + high) * advantage)
    return torch.maximum(term, torch.full_like(term, dual * advantage)) if dual and advantage < 0 else term


def replicas(table, advantage_of_leaf):
    """Advantages of an edge as if it were there once for every terminal below it; a list for each row."""
    below = [[] for _ in range(len(table))]
    for leaf in table.leaves:
        row = leaf
        while row >= 0:
            below[row].append(advantage_of_leaf[leaf])
            row = table.parent[row]
    return below


def slow_losses(model, forest, config, *, advantages=None, old=None, weigh=None, temperature=1.0):
    """Yields the loss of each edge, to be differentiated one by one.

    Args:
        model: The model.
        forest: The batch.
        config: A `LearnerConfig`.
        advantages: A list for each row, of which the mean of the clipped terms counts; without, the estimator's own.
        old: Log-probs of the tokens of each row that ratios are relative to; without, those as sampled.
        weigh: What each token of a row counts on top; without, 1.
        temperature: Of the sampling.
    """
    table = ForestTable.of(forest)
    credit = estimate(table, config.estimator, config)
    coefficients = edge_coefficients(table, credit, config.aggregation)
    for row, tree, node in edges(forest, table):
        new = edge_logprobs(model, tree, node, temperature)
        before = torch.from_numpy(node.sample.logprobs) if old is None else old[row]
        rho = (new - before).exp()
        each = [credit.advantage[row]] if advantages is None else advantages[row]
        terms = sum(clipped(rho, a, config.clip_low, config.clip_high, config.dual_clip) for a in each) / len(each)
        yield -(coefficients[row] * (1.0 if weigh is None else weigh[row]) * terms).sum()


def gradient(model):
    """The gradient as one vector."""
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def slow_gradient(model, losses):
    """The gradient of the sum of losses, and that sum."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return gradient(model), total


def relative(a, b):
    """Distance of two vectors relative to the second."""
    return ((a - b).norm() / b.norm()).item()


def noisy_forest(model, tokenizer):
    """A forest whose stored log-probs are somewhat off, so that ratios differ and some are clipped. Read only."""
    forest = echo_forest(model, tokenizer, seed=2, budget=40)
    rng = np.random.default_rng(0)
    for tree in forest:
        for node in tree.nodes[1:]:
            noise = rng.normal(scale=0.3, size=len(node.sample.logprobs))
            node.sample.logprobs = (node.sample.logprobs + noise).astype(np.float32)
    assert forest.ledger.continuations > 9 and len(forest) > 3
    return forest


def learner(model, *, lr=0.0, reference=None, directory=None, updates=10, **config):
    """A learner of plain gradient steps of one size; of size 0 unless it says otherwise."""
    made = Learner(model, LearnerConfig(**(PLAIN | config)), updates=updates, reference=reference, directory=directory)
    parameters = [p for group in made.optimizer.param_groups for p in group["params"]]
    made.optimizer = torch.optim.SGD(parameters, lr=lr)
    return made


def step_gradient(model, forest, **config):
    figures = learner(model, **config).update(forest).figures
    return gradient(model), figures
