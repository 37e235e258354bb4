"""Models and comparisons for the tests that run vLLM, whose kernels take no heads as narrow as those of the other tests."""

import copy
from dataclasses import replace

import numpy as np
import torch
from echo_env import echo_forest, echo_wrapper
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from agents.policies.vllm_requests import Requests
from agents.tiny import build_model

IDS = [[5, 7, 11, 200, 3, 9, 30, 31, 32, 33] * 4, list(range(2, 90))]


def wide_model(tokenizer, seed=0):
    """A random model with one head of width 32: what comes next depends on the context, and is the end token now and then."""
    model = build_model(len(tokenizer), width=32, layers=2, heads=1, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 3
    return model.eval()


def untied(tokenizer):
    """The same with an output layer of its own."""
    model = build_model(len(tokenizer), width=32, layers=2, heads=1)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return disturb(type(model)(config).eval(), size=0.1)


def moe(tokenizer):
    """A mixture of experts, which transformers keeps fused and a checkpoint apart."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config).eval()


def gpt2(tokenizer):
    """A model whose linear layers are transposed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=1)).eval()


def disturb(model, seed=0, size=0.05):
    """Moves every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


@torch.no_grad()
def token_logprobs(model, ids, temperature=1.0, top_k=0, top_p=1.0):
    """The slow way: one pass over all ids; log-probs of all but the first, float32 [n - 1]."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].float() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
    if top_p < 1:
        probabilities, order = logits.softmax(-1).sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        logits.scatter_(-1, order, torch.where(before < top_p, logits.gather(-1, order), -torch.inf))
    return logits.log_softmax(-1).gather(-1, torch.tensor(list(ids)[1:])[:, None])[:, 0].numpy()


def assert_scores(policy, model):
    """The engine computes with the weights of the model."""
    for ids, scores in zip(IDS, policy.score(IDS), strict=True):
        np.testing.assert_allclose(scores, token_logprobs(model, ids), atol=1e-3)


def paths(forest):
    """For each sampled edge: its sample, and the ids before it put together by hand."""
    for tree in forest:
        for node in tree.nodes[1:]:
            if not len(node.sample.action_ids):
                continue
            before = [tree.nodes[0].context_ids]
            for passed in tree.path(node)[1:-1]:
                before += [passed.sample.action_ids, passed.context_ids]
            yield node.sample, np.concatenate(before)


def assert_logprobs(model, forest, atol=1e-3, **sampling):
    """Every log-prob of a forest is the model's."""
    count = 0
    for sample, before in paths(forest):
        expected = token_logprobs(model, [*before, *sample.action_ids], **sampling)[len(before) - 1 :]
        np.testing.assert_allclose(sample.logprobs, expected, atol=atol)
        count += len(sample.action_ids)
    assert count > 50


def shape(forest):
    """What a forest holds, to be compared."""
    return [
        [(n.parent, n.sample and n.sample.action_ids.tolist(), n.observation, n.reward) for n in tree.nodes]
        for tree in forest
    ]


def sampling_as(policy, entropy=False, **changes):
    """A policy on the same engine with other settings."""
    other = policy.sibling(seed=policy.sampling.seed)
    other._requests = Requests(
        policy.codec, replace(policy.sampling, **changes), policy.engine.max_length, entropy=entropy
    )
    return other


def forest_of(policy, seed=0, **kwargs):
    """A forest with branches."""
    forest = echo_forest(None, None, seed, policy=policy, **kwargs)
    assert forest.ledger.continuations > 8
    return forest


def first_contexts(num_envs=5, **kwargs):
    """Contexts of fresh episodes, and the wrapper that they belong to."""
    envs = echo_wrapper(num_envs=num_envs, **kwargs)
    envs.reset(seed=0)
    return envs.contexts(), envs
