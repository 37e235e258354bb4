"""All forests of a rule with their probabilities, and the exact gradient that their updates are compared with.

Invariant: the forests are collected by `TreeAllocationWrapper` and learned from by `Learner`; only the truth is computed here,
by summing over everything that can happen.

The policy is a Qwen3 of two tokens in float64: an action is one token, so the softmax over the vocabulary is the policy.
"""

from functools import cached_property

import numpy as np
import torch
from enumeration_world import Odometer, OdometerPolicy, WorldEnv, place
from gymnasium.vector import SyncVectorEnv
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from agents.advantages import CreditConfig, estimate
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from agents.policies import collect
from allocation import Forest, Root, TreeAllocationWrapper
from allocation.forest_table import ForestTable

HUGE, TINY = 1e30, 1e-300
"""A bound that never binds, and a step that changes no weight."""


def tiny_model(seed=0):
    """Returns a Qwen3 of two tokens in float64, its weights large enough for uneven policies that depend on the history."""
    config = Qwen3Config(
        vocab_size=2,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).double().eval()
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, Qwen3RMSNorm):  # which rounds to float32
                setattr(module, name, torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    return model


class Exact:
    """Probabilities, values and their gradients under a model, by summing over everything that can happen.

    Attributes:
        index: Position of each (prompt, history) in the arrays.
        logprobs: Of both actions, float64 [prefixes, 2].
        scores: Gradients of these, float64 [prefixes, 2, parameters].
        value: Expected sum of all rewards of the episode after each prefix less those before it, float64 [prefixes].
        value_gradient: Its gradient by autograd, float64 [prefixes, parameters]; at the empty history that of J.
    """

    def __init__(self, world, model):
        self.world, self.model = world, model
        self.index = {prefix: i for i, prefix in enumerate(world.prefixes)}
        logprobs = self._logprobs()
        self.logprobs = logprobs.detach().numpy()
        self.scores = np.stack([[self._gradient(p) for p in row] for row in logprobs])
        values = {}
        for prompt, history in reversed(world.prefixes):
            values[prompt, history] = self._value(prompt, history, logprobs, values)
        self.value = np.array([float(values[p].detach()) for p in world.prefixes])
        self.value_gradient = np.stack([self._gradient(values[p]) for p in world.prefixes])

    def _logprobs(self):
        """One plain forward pass over every prefix."""
        rows = []
        for prompt, history in self.world.prefixes:
            tokens = self.world.context(prompt, ())
            for turn in range(0, len(history), 2):
                tokens += [history[turn], *self.world.context(prompt, history[: turn + 2])]
            rows.append(tokens)
        ends = torch.tensor([len(r) - 1 for r in rows])
        ids = torch.tensor([r + [0] * (int(ends.max()) + 1 - len(r)) for r in rows])
        logits = self.model(input_ids=ids, use_cache=False).logits
        return torch.log_softmax(logits[torch.arange(len(rows)), ends], -1)

    def _value(self, prompt, history, logprobs, values):
        total = 0.0
        for action in (0, 1):
            chance = logprobs[self.index[prompt, history], action].exp()
            for answer, probability in enumerate(self.world.answers(history, action)):
                after = (*history, action, answer)
                if probability:
                    rest = 0.0 if self.world.over(after) else values[prompt, after]
                    total = total + chance * probability * (self.world.reward(prompt, after) + rest)
        return total

    def _gradient(self, scalar):
        parameters = list(self.model.parameters())
        grads = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]).numpy()


class Forests:
    """Every forest that an allocator can come to in a world, with its probability.

    Args:
        exact: The world and the policy.
        allocator: Makes an allocator; called once for each forest.
        budget: Rollouts of a forest.
        prompts: Candidates.

    Attributes:
        forests: All forests, in the order of the odometer.
        probability: Of each, float64 [forests].
        loss_weights: `Tree.loss_weight` of each tree as the allocator left it, for each forest.
    """

    def __init__(self, exact, allocator, budget, prompts=(0,), num_envs=3):
        self.exact, odometer = exact, Odometer()
        vector = SyncVectorEnv([lambda: WorldEnv(exact.world, odometer)] * num_envs)
        envs = TreeAllocationWrapper(vector, allocator=allocator(), budget=budget)
        policy, roots = OdometerPolicy(exact, odometer), [Root(p, {"prompt": p}) for p in prompts]

        def run():
            envs.allocator = allocator()
            return collect(envs, policy, seed=7, roots=roots)

        runs = list(odometer.runs(run))
        self.probability = np.array([p for p, _ in runs])
        self.forests = [f for _, f in runs]
        self.loss_weights = [[t.loss_weight for t in f] for f in self.forests]
        assert abs(self.probability.sum() - 1) < 1e-12

    @cached_property
    def table(self):
        """The trees of all forests, one after the other."""
        return ForestTable.of([t for f in self.forests for t in f])

    @cached_property
    def share(self):
        """Share of each row's tree in the average of its forest's prompts, times the forest's probability, float64 [n]."""
        sizes = np.array([len(f) for f in self.forests])
        return np.repeat(self.probability / sizes, sizes)[self.table.tree]

    @cached_property
    def taken(self):
        """The (prefix, action) of each edge as an index into `Exact.scores`, int64 [n]; -1 at roots."""
        prefix = [place(n.observation) for t in self.table.trees for n in t.nodes]
        actions = [n.action for t in self.table.trees for n in t.nodes]
        pairs = zip(self.table.parent, actions, strict=True)
        return np.array([-1 if p < 0 else 2 * self.exact.index[prefix[p]] + int(a) for p, a in pairs])

    @cached_property
    def gradient(self):
        """The gradient of J, averaged over prompts, by autograd, float64 [parameters]."""
        roots = np.flatnonzero(self.table.is_root)
        prompts = [self.exact.index[place(t.root.observation)] for t in self.table.trees]
        return self.share[roots] @ self.exact.value_gradient[prompts]

    def restarts(self, beta=0.5):
        """Returns beta E[sum over the rollouts of later phases of grad V(anchor) / m], float64 [parameters].

        m is the number of the tree's rollouts of phase 0; sums are averaged over prompts.
        """
        table = self.table
        edges = np.flatnonzero(~table.is_root)
        first = edges[table.rollout[edges] != table.rollout[table.parent[edges]]]
        m = np.bincount(table.tree[first[table.phase[first] == 0]], minlength=len(table.trees))
        later = first[table.phase[first] > 0]
        return beta * (self.share[later] / m[table.tree[later]]) @ self.exact.value_gradient[self.taken[later] // 2]

    def expected_scores(self, estimator, values=None, by_prefix=False, **config):
        """Returns E[sum of weight times advantage times score], averaged over prompts.

        That is what `Learner` steps along on average but for the length of the step, from the same credit, in numpy.

        Args:
            estimator: By name.
            values: A critic's values by prefix, float64 [prefixes], for `gae`.
            by_prefix: Return the parts that come from the actions at each prefix, [prefixes, parameters].
            config: Of the estimator.
        """
        each = None if values is None else self._values(values)
        credit = estimate(self.table, estimator, CreditConfig(**config), values=each)
        edges = np.flatnonzero(~self.table.is_root)
        coefficients = (self.share * credit.weight * credit.advantage)[edges]
        scores = self.exact.scores
        counts = np.bincount(self.taken[edges], weights=coefficients, minlength=2 * len(scores))
        found = np.einsum("pa,pad->pd", counts.reshape(-1, 2), scores)
        return found if by_prefix else found.sum(0)

    def _values(self, values):
        prefix = [place(n.observation) for t in self.table.trees for n in t.nodes]
        return np.array([values[self.exact.index[p]] if p in self.exact.index else 0.0 for p in prefix])

    def expected_update(self, estimator, *, together=True, **config):
        """Returns minus the expected gradient that `Learner.update` takes its step with.

        Args:
            estimator: By name.
            together: Give the learner all forests as one batch whose trees weigh as much as their forest is probable, which
                is the same where prompts are averaged and paths are equally long; otherwise one forest after the other.
            config: Of the learner.
        """
        forests, model = self.forests, self.exact.model
        if not together:
            return self.probability @ np.stack([learner_gradient(model, f, estimator, **config) for f in forests])
        trees = len(self.table.trees)
        for forest, probability, weights in zip(forests, self.probability, self.loss_weights, strict=True):
            for tree, weight in zip(forest, weights, strict=True):
                tree.loss_weight = weight * probability * trees / len(forest)
        try:
            return learner_gradient(model, Forest(list(self.table.trees)), estimator, **config)
        finally:
            for forest, weights in zip(forests, self.loss_weights, strict=True):
                for tree, weight in zip(forest, weights, strict=True):
                    tree.loss_weight = weight


def learner_gradient(model, forest, estimator, **config):
    """Returns minus the gradient that an update takes its step with, float64 [parameters]; the weights stay as they are."""
    settings = {"max_grad_norm": HUGE, "lr": TINY, "gain_lr": TINY, "value_lr": TINY, "value_coef": 0.0, "lr_warmup": 0}
    learner = Learner(model, LearnerConfig(estimator=estimator, **settings | {"micro_tokens": 512} | config), updates=1)
    taken = []

    def keep(optimizer, args, kwargs):
        taken.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])

    learner.optimizer.register_step_pre_hook(keep)
    learner.update(forest)
    model.zero_grad()
    assert len(taken) <= 1, "one epoch, one minibatch"
    if not taken:  # nothing to train: there is no contrast in the forest
        return np.zeros(sum(p.numel() for p in model.parameters()))
    return -torch.cat([g.flatten() for g in taken[0]]).numpy()
