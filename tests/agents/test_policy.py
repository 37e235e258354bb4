import numpy as np
import pytest
import torch
from echo_env import echo_forest, echo_wrapper
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from agents.flat import flat_layout
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from agents.policies import TransformersPolicy, collect
from agents.policies.chat import ChatCodec, new_messages
from agents.tokens import EdgeTokens
from allocation import Context, HiddenStatePredictor, TraceAllocator, TraceConfig, TreeAllocationWrapper
from allocation.forest_table import ForestTable
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.state import ToolCall


def edges(forest):
    return [(t, n) for t in forest for n in t.nodes if n.parent is not None]


def shown(tree, node):
    """All ids that the policy saw before it took the turn into a node."""
    ids = []
    for n in tree.path(tree.nodes[node.parent]):
        ids += [n.sample.action_ids] if n.sample is not None else []
        ids.append(n.context_ids)
    return np.concatenate(ids)


def greedy_answer(model, tokenizer, ids, limit):
    ids = torch.from_numpy(ids)[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("num_envs", "encode"), [(1, False), (5, True), (24, False)])
def test_greedy_actions_are_those_of_generate(model, tokenizer, num_envs, encode):
    forest = echo_forest(model, tokenizer, temperature=0.0, num_envs=num_envs, encode=encode)
    assert forest.ledger.continuations == 12
    for tree, node in edges(forest):
        assert node.sample.action_ids.tolist() == greedy_answer(model, tokenizer, shown(tree, node), 8)


def test_branches_of_sampled_rollouts_go_on_greedily(model, tokenizer, sampled):
    # Paths of different lengths and contents in one batch, from inner nodes that another policy sampled.
    contexts = []
    for tree in sampled:
        for node in tree.nodes:
            if not node.terminal:
                contexts.append(_context(len(contexts), tree, node))
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=6, temperature=0.0)
    samples = policy.act(contexts)
    assert len({c.node.depth for c in contexts}) > 2
    for context, sample in zip(contexts, samples, strict=True):
        assert sample.action_ids.tolist() == greedy_answer(model, tokenizer, _path_ids(context.tree, context.node), 6)


def _context(slot, tree, node):
    return Context(slot, tree, node, node.observation, node.info)


def _path_ids(tree, node):
    ids = []
    for n in tree.path(node):
        ids += [n.sample.action_ids] if n.sample is not None else []
        ids += [n.context_ids] if n.context_ids is not None else []
    return np.concatenate(ids)


def test_another_architecture(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    llama = LlamaForCausalLM(config).eval()
    forest = echo_forest(llama, tokenizer, temperature=0.0, budget=12)
    for tree, node in edges(forest):
        assert node.sample.action_ids.tolist() == greedy_answer(llama, tokenizer, shown(tree, node), 8)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_log_probs_are_those_of_one_full_pass(model, tokenizer, temperature):
    forest = echo_forest(model, tokenizer, temperature=temperature, seed=3)
    assert forest.ledger.continuations == 12
    for tree in forest:
        for leaf in tree.leaves():
            ids = _path_ids(tree, leaf)
            logprobs = torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0] / temperature, -1).numpy()
            start = 0
            for node in tree.path(leaf):
                if node.sample is not None:
                    at = np.arange(start, start + len(node.sample.action_ids))
                    np.testing.assert_allclose(node.sample.logprobs, logprobs[at - 1, ids[at]], atol=1e-4)
                    start = at[-1] + 1
                start += 0 if node.context_ids is None else len(node.context_ids)
            assert start == len(ids)


@torch.no_grad()
def test_features_are_the_last_hidden_state_of_the_prefix(model, tokenizer, sampled):
    for tree in sampled:
        for node in tree.nodes:
            if node.children:
                ids = torch.from_numpy(_path_ids(tree, node))[None]
                hidden = model.get_decoder()(ids).last_hidden_state[0, -1].numpy()
                np.testing.assert_allclose(node.features, hidden, atol=1e-4)


@torch.no_grad()
def test_encode_gives_the_hidden_state_of_prompts(model, tokenizer):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
    envs = echo_wrapper(policy=policy)
    envs.reset(seed=0)
    contexts = envs.contexts()
    features, tokens = policy.encode(contexts)
    assert tokens > 0
    for context, feature in zip(contexts, features, strict=True):
        ids = policy.codec.prompt_ids(context.info["messages"], context.info["tools"])
        hidden = model.get_decoder()(torch.from_numpy(ids)[None]).last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(feature, hidden, atol=1e-4)
        np.testing.assert_allclose(context.tree.root.features, hidden, atol=1e-4)


def test_the_learner_scores_the_ids_that_were_sampled(sampled):
    table = ForestTable.of(sampled)
    tokens = EdgeTokens.of(table, np.arange(len(table)))
    prefix = {i: _path_ids(t, t.nodes[n.parent]) for i, (t, n) in zip(tokens.rows, edges(sampled), strict=True)}
    seen = []
    for micro in flat_layout(tokens, np.zeros(0, dtype=np.int64), 500).micro_batches:
        for row, before, token in zip(micro.row, micro.before, micro.token, strict=True):
            node, at = tokens.node[token], token - tokens.start[np.searchsorted(tokens.rows, tokens.node[token])]
            sample = table.node(node).sample
            assert micro.ids[row, before + 1] == tokens.ids[token] == sample.action_ids[at]
            assert tokens.old_logprobs[token] == sample.logprobs[at]
            context = np.concatenate([prefix[node], sample.action_ids[:at]])
            assert np.array_equal(micro.ids[row, : before + 1], context)
            seen.append(token)
    assert sorted(seen) == list(range(len(tokens))), "a token is missing, or one is scored twice"


def test_text_is_what_the_ids_say(tokenizer, sampled):
    codec = ChatCodec(tokenizer)
    for _tree, node in edges(sampled):
        ids = node.sample.action_ids.tolist()
        kept = [i for i in ids if i != codec.end_id]
        assert node.action == node.sample.text == codec.text_of(ids) == tokenizer.decode(kept)
        assert len(node.sample.logprobs) == len(ids) > 0
    assert codec.text_of([codec.end_id]) == ""


def test_a_turn_that_was_cut_is_ended_for_it(tokenizer, sampled):
    end = tokenizer.eos_token_id
    reasons = set()
    for _, node in edges(sampled):
        ids = node.sample.action_ids
        reasons.add(node.sample.finish_reason)
        if node.sample.finish_reason == "length":
            assert len(ids) == 8 and ids[-1] != end
        else:
            assert ids[-1] == end
        assert end not in ids[:-1]
        if node.context_ids is not None:
            assert (node.context_ids[0] == end) == (node.sample.finish_reason == "length")
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("num_envs", [1, 4, 24])
@pytest.mark.parametrize("encode", [False, True])
def test_each_token_is_computed_once(model, tokenizer, num_envs, encode):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=1)
    given = []
    forward = policy._forward
    policy._forward = lambda cache, ids, keep: (given.append(ids.shape), forward(cache, ids, keep))[1]
    encoded = 0
    plain = policy.encode

    def counted(contexts):
        nonlocal encoded
        features, tokens = plain(contexts)
        encoded += tokens
        return features, tokens

    policy.encode = counted
    forest = echo_forest(model, tokenizer, seed=1, policy=policy, num_envs=num_envs, encode=encode)
    ledger = forest.ledger
    nodes = [n for t in forest for n in t.nodes]
    actions = sum(len(n.sample.action_ids) for n in nodes if n.sample is not None)
    assert ledger.generated_tokens == actions
    inner = [n for n in nodes if n.children]
    # The last token of an action is sampled without being fed, so it is fed in front of what the environment answered.
    needed = sum(len(n.context_ids) + (n.depth > 0) for n in inner)
    again = ledger.continuations + ledger.root_rollouts
    acting = ledger.prefilled_tokens - encoded
    if encode:
        # The prompts of all candidates were computed before, those of the chosen ones are not computed again.
        roots = sum(len(t.root.context_ids) for t in forest)
        assert encoded >= roots
        needed -= roots
    assert needed <= acting <= needed + again
    paths = sum(len(shown(t, n)) for t, n in edges(forest))
    assert acting + ledger.cached_tokens == paths
    assert ledger.cached_tokens > ledger.prefilled_tokens


def test_forgetting_the_cache_changes_nothing(model, tokenizer):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, temperature=0.0)
    cold = TransformersPolicy(model, tokenizer, max_new_tokens=8, temperature=0.0)
    envs = echo_wrapper()
    envs.reset(seed=0)
    compared = 0
    while envs.active.any():
        contexts = envs.contexts()
        warm = policy.act(contexts)
        cold.reset_cache()
        for a, b in zip(warm, cold.act(contexts), strict=True):
            assert np.array_equal(a.action_ids, b.action_ids) and np.array_equal(a.context_ids, b.context_ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            np.testing.assert_allclose(a.features, b.features, atol=1e-4)
            compared += b.prefilled > a.prefilled
        actions, samples = [""] * envs.num_envs, [None] * envs.num_envs
        for context, sample in zip(contexts, warm, strict=True):
            actions[context.slot], samples[context.slot] = sample.text, sample
        envs.step(actions, samples)
    assert compared > 10


def test_new_weights_need_a_new_cache(make_model, tokenizer):
    model = make_model()
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, temperature=0.0)
    first = echo_forest(model, tokenizer, policy=policy)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    policy.reset_cache()
    second = echo_forest(model, tokenizer, policy=policy)
    assert any(a.action != b.action for (_, a), (_, b) in zip(edges(first), edges(second), strict=False))
    for tree, node in edges(second):
        assert node.sample.action_ids.tolist() == greedy_answer(model, tokenizer, shown(tree, node), 8)


def test_the_same_seed_samples_the_same(model, tokenizer):
    def texts(forest):
        return [n.action for _, n in edges(forest)]

    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=4)
    first = texts(echo_forest(model, tokenizer, policy=policy))
    second = texts(echo_forest(model, tokenizer, policy=policy))
    third = texts(echo_forest(model, tokenizer, policy=TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=4)))
    assert first == third != second


@pytest.mark.parametrize("limit", [12, 25, 36])
def test_prompts_and_paths_longer_than_the_model_end_their_rollouts(make_model, tokenizer, limit):
    model = make_model(max_position_embeddings=limit)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8)
    predictor = HiddenStatePredictor(32, warmup_roots=1)
    envs = TreeAllocationWrapper(
        echo_wrapper(num_envs=4).envs,
        allocator=TraceAllocator(predictor, TraceConfig(continuations=1.0)),
        budget=16,
        encode=policy.encode,
    )
    learner = Learner(model, LearnerConfig(lr=1e-3, gain_lr=1e-3), updates=9)
    for seed in range(2):
        forest = collect(envs, policy, seed=seed)
        cut = [(t, n) for t, n in edges(forest) if len(n.sample.action_ids) == 0]
        assert cut and all(n.sample.finish_reason == "context" and n.truncated for _, n in cut)
        for tree, node in edges(forest):
            if len(node.sample.action_ids):
                assert len(shown(tree, node)) + len(node.sample.action_ids) <= limit
            else:
                assert len(shown(tree, node)) >= limit
        envs.allocator.update(forest)
        figures = learner.update(forest).figures
        # Where no rollout of a prompt has room to succeed, there is nothing to learn from it.
        assert (figures["loss/policy"] != 0.0) == (forest.effective_ratio() > 0) == (limit == 36)
        assert figures["learner/skipped"] == 0.0
        policy.reset_cache()


def test_prompts_longer_than_the_model_are_encoded_as_zeros_without_being_computed(make_model, tokenizer):
    model = make_model(max_position_embeddings=8)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=4)
    contexts = []
    for seed in range(4):
        envs = echo_wrapper(num_envs=12, budget=64)
        envs.reset(seed=seed)
        contexts += envs.contexts()
    trees = [c.tree for c in contexts]
    contexts = [c for i, c in enumerate(contexts) if c.tree not in trees[:i]]
    lengths = [len(policy.codec.prompt_ids(c.info["messages"], c.info["tools"])) for c in contexts]
    given = []
    forward = policy._forward
    policy._forward = lambda cache, ids, keep: (given.append(ids.shape), forward(cache, ids, keep))[1]
    features, computed = policy.encode(contexts)
    fits = np.array(lengths) <= 8
    assert fits.any() and not fits.all()
    assert (features[~fits] == 0).all() and (features[fits] != 0).any(1).all()
    assert computed == sum(n for n, fit in zip(lengths, fits, strict=True) if fit)
    assert all(width <= 8 for _, width in given)
    assert policy.encode([])[0].shape == (0, 32)


@pytest.mark.parametrize("limit", [14, 24])
def test_a_model_with_learned_positions_is_never_fed_one_that_it_lacks(tokenizer, limit):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=limit,
        n_embd=32,
        n_layer=1,
        n_head=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    gpt = GPT2LMHeadModel(config).eval()
    policy = TransformersPolicy(gpt, tokenizer, max_new_tokens=16)
    assert policy.max_length == limit
    forest = echo_forest(gpt, tokenizer, policy=policy, encode=True, num_envs=12, budget=36)
    lengths = {len(shown(t, n)) + len(n.sample.action_ids) for t, n in edges(forest) if len(n.sample.action_ids)}
    assert max(lengths) == limit, "too short: no row came to the end"


def test_keys_and_values_of_finished_trees_are_freed(model, tokenizer):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8)
    envs = echo_wrapper(num_envs=3)
    envs.reset(seed=0)
    finished = 0
    while envs.active.any():
        contexts = envs.contexts()
        sampled = policy.act(contexts)
        assert not any(t.finished for t in policy._segments)
        finished = max(finished, sum(t.finished for t in envs.forest))
        actions, samples = [""] * envs.num_envs, [None] * envs.num_envs
        for context, sample in zip(contexts, sampled, strict=True):
            actions[context.slot], samples[context.slot] = sample.text, sample
        envs.step(actions, samples)
    assert finished > 0


def test_the_policy_leaves_the_model_in_its_mode(make_model, tokenizer, monkeypatch):
    model = make_model()
    model.train()
    echo_forest(model, tokenizer, budget=8, encode=True)
    assert model.training and not any(p.grad is not None for p in model.parameters())
    policy = TransformersPolicy(model, tokenizer)
    envs = echo_wrapper()
    envs.reset(seed=0)
    monkeypatch.setattr(policy, "_prefill", lambda *args: 1 / 0)
    for method in (policy.act, policy.encode):
        with pytest.raises(ZeroDivisionError):
            method(envs.contexts())
        assert model.training


def test_policies_do_not_pile_up_on_a_model(make_model, tokenizer):
    model = make_model()
    for _ in range(3):
        echo_forest(model, tokenizer, budget=8)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_wrong_arguments_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        TransformersPolicy(model, tokenizer, temperature=-1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        TransformersPolicy(model, tokenizer, max_new_tokens=0)
    policy = TransformersPolicy(model, tokenizer)
    assert policy.act([]) == []
    envs = echo_wrapper()
    envs.reset(seed=0)
    context = envs.contexts()[0]
    context.info.pop("messages")
    with pytest.raises(ValueError, match=r"needs environments that give info\['messages'\]"):
        policy.act([context])


# Conversations as ids.


def test_a_conversation_is_a_concatenation_of_deltas(tokenizer):
    codec = ChatCodec(tokenizer)
    env = MultiHopQAEnv(top_k=2, system_prompt="", max_turns=4)
    env.reset(seed=0)
    ids = codec.prompt_ids(env.messages(), env.tools).tolist()
    queries = ["Where?", "zzzz", ""]
    for query in queries:
        text = env.action_format.render("Hm.", _search(query))
        env.step(text)
        ids += [*tokenizer.encode(text, add_special_tokens=False), codec.end_id]
        ids += codec.delta_ids(new_messages(env.messages()), ended=True).tolist()
    whole = tokenizer.apply_chat_template(env.messages(), tools=env.tools, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == whole


def _search(query):
    return ToolCall("search", {"query": query})
