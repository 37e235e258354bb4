"""Continuations of continuations through the policy of transformers: its cache, its token ids and its costs."""

import numpy as np
import pytest
import torch
from echo_env import echo_forest

from agents.evaluate import make_vector
from agents.policies import TransformersPolicy
from allocation import TraceConfig, TreeAllocationWrapper, make_allocator
from allocation.methods.branching import ARPOAllocator

METHODS = pytest.mark.parametrize("name", ["treepo", "tree_grpo"])


def wrapper(name, num_envs=4, budget=32):
    envs = make_vector("Echo-v0", num_envs, {"max_turns": 7})
    return TreeAllocationWrapper(envs, allocator=make_allocator(name, group_size=16), budget=budget)


def chained(tree):
    return [
        n for n in tree.nodes[1:] if n.rollout != tree.nodes[n.parent].rollout and tree.nodes[n.parent].origin != "root"
    ]


@METHODS
def test_a_cache_over_several_waves_changes_nothing(name, model, tokenizer):
    warm = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=2)
    cold = TransformersPolicy(model, tokenizer, max_new_tokens=8, temperature=0.0)
    greedy = TransformersPolicy(model, tokenizer, max_new_tokens=8, temperature=0.0)
    envs = wrapper(name)
    envs.reset(seed=0)
    spared = 0
    while envs.active.any():
        contexts = envs.contexts()
        cold.reset_cache()
        for a, b in zip(greedy.act(contexts), cold.act(contexts), strict=True):
            assert np.array_equal(a.action_ids, b.action_ids) and np.array_equal(a.context_ids, b.context_ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            np.testing.assert_allclose(a.features, b.features, atol=1e-4)
            spared += b.prefilled > a.prefilled
        actions, samples = [""] * envs.num_envs, [None] * envs.num_envs
        for context, sample in zip(contexts, warm.act(contexts), strict=True):
            actions[context.slot], samples[context.slot] = sample.text, sample
        envs.step(actions, samples)
    assert spared > 20 and envs.forest.ledger.prefix_waves > 1 and sum(len(chained(t)) for t in envs.forest) > 3
    assert all(n.snapshot is None and n.info is None for t in envs.forest for n in t.nodes)


@METHODS
def test_each_token_is_computed_once_over_several_waves(name, model, tokenizer):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=3)
    forest = echo_forest(model, tokenizer, seed=3, policy=policy, envs=wrapper(name))
    ledger = forest.ledger
    assert ledger.prefix_waves > 1 and sum(len(chained(t)) for t in forest) > 3
    nodes = [n for t in forest for n in t.nodes]
    # The last token of an action is sampled without being fed; that of an anchor is fed again for each branch.
    needed = sum(len(n.context_ids) + (n.depth > 0) for n in nodes if n.children)
    assert needed <= ledger.prefilled_tokens <= needed + ledger.continuations + ledger.root_rollouts
    assert ledger.generated_tokens == sum(len(n.sample.action_ids) for n in nodes if n.sample is not None)
    assert forest.verify(make_vector("Echo-v0", 2, {"max_turns": 7})).paths == forest.num_leaves == 32


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@torch.no_grad()
def test_entropies_are_those_of_one_full_pass(model, tokenizer, temperature):
    settings = {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
    forest = echo_forest(
        model,
        tokenizer,
        3,
        policy=TransformersPolicy(model, tokenizer, entropy=True, **settings),
        envs=wrapper("treepo"),
    )
    compared = 0
    for tree in forest:
        for leaf in tree.leaves():
            path = tree.path(leaf)
            segments = [
                part
                for n in path
                for part in (None if n.sample is None else n.sample.action_ids, n.context_ids)
                if part is not None
            ]
            logits = model(torch.from_numpy(np.concatenate(segments))[None]).logits[0] / (temperature or 1.0)
            entropy = torch.distributions.Categorical(logits=logits).entropy().numpy()
            start = len(tree.root.context_ids)
            for node in path[1:]:
                count = len(node.sample.action_ids)
                assert node.sample.entropy == pytest.approx(entropy[start - 1 : start + count - 1].mean(), abs=1e-4)
                start += count + (0 if node.context_ids is None else len(node.context_ids))
                compared += 1
    assert compared > 40
    plain = echo_forest(
        model, tokenizer, 3, policy=TransformersPolicy(model, tokenizer, **settings), envs=wrapper("treepo")
    )
    sampled = [[n.action for t in f for n in t.nodes] for f in (forest, plain)]
    assert sampled[0] == sampled[1], "asking for entropies must not change what is sampled"
    assert all(n.sample.entropy is None for t in plain for n in t.nodes[1:])


@pytest.mark.parametrize("allocator", [ARPOAllocator(16, root_share=0.125), "trace"])
def test_branching_by_the_policys_own_entropy(allocator, model, tokenizer):
    if allocator == "trace":
        config = TraceConfig(prefix_mode="entropy", continuations=1.0, cap_per_rollout=None)
        allocator = make_allocator("trace", config=config)
    envs = TreeAllocationWrapper(make_vector("Echo-v0", 4, {"max_turns": 7}), allocator=allocator, budget=32)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=1, entropy=allocator.uses_entropy)
    ledger = echo_forest(model, tokenizer, 1, policy=policy, envs=envs).ledger
    assert ledger.continuations > 8 and ledger.root_rollouts + ledger.continuations == 32
    silent = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=1)
    with pytest.raises(ValueError, match="entropy=True"):
        echo_forest(model, tokenizer, 1, policy=silent, envs=envs)
