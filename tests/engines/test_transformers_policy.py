"""The transformers policy: limits, truncation, stop strings, and what a trainer asks of it."""

import numpy as np
import pytest
import torch
from echo_env import echo_forest, echo_wrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from agents.policies import TransformersPolicy, collect
from agents.policies.drawing import StopStrings, draw, truncated
from agents.policies.paths import path_ids
from agents.policies.sampling import Sampling


def edges(forest):
    return [(t, n) for t in forest for n in t.nodes[1:]]


def before(tree, node):
    """The ids of a path up to an action, the slow way."""
    ids = []
    for n in tree.path(tree.nodes[node.parent]):
        ids += [] if n.sample is None else n.sample.action_ids.tolist()
        ids += n.context_ids.tolist()
    return ids


@torch.no_grad()
def logprobs_of(model, tree, node, sampling):
    """Log-probs of an action by one plain pass over its whole path."""
    prefix, action = before(tree, node), node.sample.action_ids
    logits = model(torch.tensor([[*prefix, *action.tolist()]])).logits[0, len(prefix) - 1 : -1].float()
    found = torch.log_softmax(truncated(logits / sampling.temperature, sampling), -1)
    return found.gather(1, torch.from_numpy(action)[:, None])[:, 0].numpy()


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}]
)
def test_logprobs_are_those_of_the_distribution_sampled_from(model, tokenizer, settings):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=1, **settings)
    forest = echo_forest(model, tokenizer, policy=policy)
    assert forest.ledger.continuations > 4
    for tree, node in edges(forest):
        expected = logprobs_of(model, tree, node, policy.sampling)
        assert np.isfinite(expected).all(), "a token was sampled that was cut off"
        np.testing.assert_allclose(node.sample.logprobs, expected, atol=2e-5)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(0, 12), top_p=st.floats(0.05, 1.0))
def test_truncation_is_that_of_transformers(seed, top_k, top_p):
    logits = 3 * torch.randn(5, 11, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList(
        ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
    )
    ours = truncated(logits, Sampling(top_k=top_k, top_p=top_p))
    assert torch.equal(ours, warpers(None, logits) if warpers else logits)


def test_what_is_drawn_has_the_frequencies_that_its_logprobs_say():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.3, 1.0, -1.0, 2.0, -3.0]).repeat(20_000, 1)
    sampling = Sampling(temperature=1.5, top_k=4)
    ids, logprobs, _ = draw(logits, sampling, generator)
    share = torch.bincount(ids, minlength=5) / len(ids)
    assert share[4] == 0
    for token in range(4):
        said = logprobs[ids == token].exp()
        assert (said == said[0]).all() and abs(share[token] - said[0]) < 4 * (said[0] * (1 - said[0]) / 20_000) ** 0.5


@pytest.mark.parametrize("count", [0, 1, 3])
def test_stop_strings_end_an_action_as_a_slow_check_says(make_model, tokenizer, count):
    model = make_model(3)
    said = [n.action for _, n in edges(echo_forest(model, tokenizer))]
    # What such a model says is random, so the strings are taken from it.
    stop = tuple(text[2:4] for text in said if len(text) > 4)[:count] or ("never said",)
    free = TransformersPolicy(model, tokenizer, max_new_tokens=24, seed=5)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=24, seed=5, stop=stop)
    forest = echo_forest(model, tokenizer, policy=policy)
    hits = 0
    for _, node in edges(forest):
        ids = node.sample.action_ids.tolist()
        texts = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
        assert not any(s in text for text in texts[:-1] for s in stop), "it went on"
        hit = any(s in texts[-1] for s in stop)
        hits += hit
        ended = ids[-1] in policy.codec.stop_ids
        assert node.sample.finish_reason == ("stop" if hit or ended else "length")
    assert (hits > 0) == (count > 0)
    if not count:
        assert [n.action for _, n in edges(forest)] == [
            n.action for _, n in edges(echo_forest(model, tokenizer, policy=free))
        ]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stop_string_is_found_across_tokens_when_it_is_complete(tokenizer, data):
    text = data.draw(st.text(alphabet="ab </tolcé", min_size=1, max_size=40))
    stop = data.draw(st.text(alphabet="ab </tolcé", min_size=1, max_size=6))
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = StopStrings(tokenizer, (stop,))
    first = next((i for i in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:i])), None)
    assert next((i for i in range(1, len(ids) + 1) if found.hit(ids[:i])), None) == first


def test_an_episode_that_has_no_room_left_ends(model, tokenizer):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, max_context=40)
    forest = echo_forest(model, tokenizer, policy=policy)
    full = [(t, n) for t, n in edges(forest) if not n.sample.acted]
    assert full and len(full) == forest.ledger.unacted
    for tree, node in edges(forest):
        length = len(before(tree, node))
        assert node.sample.acted == (length < 40) and length + len(node.sample.action_ids) <= max(40, length)
        if not node.sample.acted:
            assert node.truncated and "40 (max_context" in node.observation


def test_weights_that_change_are_taken_over_and_every_sample_says_which_made_it(make_model, tokenizer):
    model = make_model(1)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8)
    first = echo_forest(model, tokenizer, policy=policy)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert policy.sync(model, 7) == {}
    second = echo_forest(model, tokenizer, policy=policy)
    assert {n.sample.version for _, n in edges(first)} == {0} and {n.sample.version for _, n in edges(second)} == {7}
    for tree, node in edges(second):
        np.testing.assert_allclose(node.sample.logprobs, logprobs_of(model, tree, node, policy.sampling), atol=2e-5)
    with pytest.raises(ValueError, match="make another policy for another model"):
        policy.sync(make_model(2), 8)


def test_a_sibling_has_a_stream_of_its_own(model, tokenizer):
    def texts(policy):
        return [n.action for _, n in edges(echo_forest(model, tokenizer, policy=policy))]

    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=1)
    state = policy.state_dict()
    sibling = policy.sibling(seed=2)
    alone = texts(TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=2))
    assert texts(sibling) == alone
    once = texts(policy)
    assert once == texts(TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=1)) != alone
    policy.load_state_dict(state)
    assert texts(policy) == once
    assert policy.sibling(seed=1, temperature=0.0).sampling.temperature == 0


def test_all_that_goes_through_the_model_is_counted(make_model, tokenizer):
    model, seen = make_model(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8)
    seen.clear()  # what making it has looked at
    forest = echo_forest(model, tokenizer, policy=policy)
    assert sum(policy.computed.values()) == sum(seen)
    assert policy.computed["prefill"] == forest.ledger.prefilled_tokens
    unique = sum(node.num_tokens for tree in forest for node in tree.nodes)
    assert policy.computed["prefill"] + policy.computed["decode"] <= unique + forest.ledger.continuations


def test_a_model_that_ends_at_once_and_one_that_never_does(make_model, tokenizer):
    for wanted, reason, count in ((True, "stop", 1), (False, "length", 6)):
        model = make_model()
        policy = TransformersPolicy(model, tokenizer, max_new_tokens=6)
        token = policy.codec.end_id if wanted else 65
        bias = torch.full((model.config.vocab_size,), -1e4)
        bias[token] = 1e4
        model.lm_head.register_forward_hook(lambda module, args, out, bias=bias: out + bias)
        forest = collect(echo_wrapper(num_envs=3, budget=8), policy, seed=0)
        assert all(n.sample.action_ids.tolist() == [token] * count for _, n in edges(forest))
        assert all(n.sample.finish_reason == reason for _, n in edges(forest))
        assert all(np.allclose(n.sample.logprobs, 0, atol=1e-5) for _, n in edges(forest))


def test_prefixes_that_were_shown_are_those_of_the_path(model, tokenizer):
    policy, seen = TransformersPolicy(model, tokenizer, max_new_tokens=8), []

    class Watched:
        def act(self, contexts):
            samples = policy.act(contexts)
            seen.extend((c.tree, c.node, path_ids(c, s.context_ids)) for c, s in zip(contexts, samples, strict=True))
            return samples

    forest = echo_forest(model, tokenizer, policy=Watched())
    assert len(seen) == len(edges(forest))
    for tree, node, ids in seen:
        assert all(before(tree, tree.nodes[child]) == ids.tolist() for child in node.children)


def test_keys_and_values_are_freed_when_their_tree_is_finished(model, tokenizer):
    policy, held = TransformersPolicy(model, tokenizer, max_new_tokens=8), []

    class Watched:
        def act(self, contexts):
            samples = policy.act(contexts)
            assert not any(tree.finished for tree in policy._segments)
            assert {c.tree for c in contexts} <= set(policy._segments)
            held.append(len(policy._segments))
            return samples

    forest = echo_forest(model, tokenizer, policy=Watched())
    assert all(tree.finished for tree in forest) and max(held) > 0
    policy.act([])
    assert not policy._segments and not policy._pending
    echo_forest(model, tokenizer, policy=policy)
    policy.close()
    assert not policy._segments and not policy._pending


def test_in_half_precision_logprobs_are_computed_in_single(make_model, tokenizer):
    model = make_model().bfloat16()
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8)
    forest = echo_forest(model, tokenizer, policy=policy)
    for tree, node in edges(forest):
        said = node.sample.logprobs
        # The model rounds to 8 bits, in another order for a row alone; a log-prob that was rounded too would lie on its grid.
        np.testing.assert_allclose(said, logprobs_of(model, tree, node, policy.sampling), atol=0.2)
        assert node.sample.features.dtype == np.float32
    every = torch.from_numpy(np.concatenate([n.sample.logprobs for _, n in edges(forest)]))
    assert (every != every.bfloat16().float()).float().mean() > 0.9


@pytest.mark.slow
def test_compiled_it_samples_the_same(make_model, tokenizer):
    model = make_model()
    plain = echo_forest(model, tokenizer, policy=TransformersPolicy(model, tokenizer, max_new_tokens=6, seed=3))
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=6, seed=3, compile=True)
    fast = echo_forest(model, tokenizer, policy=policy)
    assert [n.action for _, n in edges(fast)] == [n.action for _, n in edges(plain)]
    for (_, a), (_, b) in zip(edges(fast), edges(plain), strict=True):
        np.testing.assert_allclose(a.sample.logprobs, b.sample.logprobs, atol=2e-5)
