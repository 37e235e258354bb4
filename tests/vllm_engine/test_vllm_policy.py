"""The vLLM policy against transformers and against what its engine says that it did."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_models import (
    assert_logprobs,
    first_contexts,
    forest_of,
    paths,
    sampling_as,
    shape,
    token_logprobs,
    wide_model,
)

from agents.policies import TransformersPolicy
from agents.policies.vllm_policy import VLLMPolicy
from agents.policies.vllm_requests import stream_seed


@pytest.fixture(scope="module")
def model(tokenizer):
    return wide_model(tokenizer)


@pytest.fixture(scope="module")
def policy(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    policy = VLLMPolicy(folder, tokenizer, max_new_tokens=8, seed=3)
    yield policy
    policy.close()


@pytest.fixture
def loaded(policy, model):
    """Lets a test put weights of its own into the engine."""
    yield lambda changed: policy.sync(changed, 1)
    policy.sync(model, 0)


@pytest.fixture
def asked(policy, monkeypatch):
    """What the engine is given, request by request, and the tokens that its scheduler had computed, step by step."""
    prompts, steps = [], []
    generate, scheduler = policy.engine.generate, policy.engine.llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def listening_generate(ids, params):
        prompts.extend(ids)
        return generate(ids, params)

    def listening_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        steps.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(policy.engine, "generate", listening_generate)
    monkeypatch.setattr(scheduler, "schedule", listening_schedule)
    return prompts, steps


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}],
    ids=str,
)
def test_logprobs_are_those_of_the_distribution_sampled_from(policy, model, sampling):
    assert_logprobs(model, forest_of(sampling_as(policy, **sampling)), **sampling)


def test_greedy_forest_is_that_of_the_transformers_policy(policy, model, tokenizer):
    ours = forest_of(policy.sibling(seed=0, temperature=0.0))
    theirs = forest_of(TransformersPolicy(model, tokenizer, max_new_tokens=8, temperature=0.0))
    assert shape(ours) == shape(theirs)
    for (sample, _), (other, _) in zip(paths(ours), paths(theirs), strict=True):
        np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-3)
        assert sample.finish_reason == other.finish_reason and sample.text == other.text


def test_what_is_computed_is_the_concatenation_on_the_tree(policy, asked):
    forest = forest_of(policy.sibling(seed=0))
    given_, on_tree = asked[0], [before.tolist() for _, before in paths(forest)]
    assert sorted(given_) == sorted(on_tree) and len(given_) == forest.ledger.environment_turns


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequences=st.lists(st.lists(st.integers(0, 319), min_size=2, max_size=80), min_size=1, max_size=4))
def test_scores_are_the_models(policy, model, sequences):
    vocabulary = model.config.vocab_size
    sequences = [[i % vocabulary for i in ids] for ids in sequences]
    for ids, scores in zip(sequences, policy.score(sequences), strict=True):
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, token_logprobs(model, ids), atol=1e-3)


def test_scores_need_room(policy):
    limit = policy.engine.max_length
    assert len(policy.score([[5] * (limit - 1)])[0]) == limit - 2 and policy.score([]) == []
    for ids in ([5], [5] * limit):
        with pytest.raises(ValueError, match=f"from 2 to {limit - 1} tokens .* got {len(ids)}"):
            policy.score([ids])


def test_counts_are_what_the_scheduler_had_computed(policy, asked):
    policy.reset_cache()
    sibling = policy.sibling(seed=0)
    forest = forest_of(sibling)
    assert sum(sibling.computed.values()) == sum(asked[1])
    assert sibling.computed["prefill"] == forest.ledger.prefilled_tokens
    assert sibling.computed["decode"] == sum(len(s.action_ids) - 1 for s, _ in paths(forest))
    everything = sum(len(ids) for ids in asked[0])
    assert forest.ledger.prefilled_tokens < 0.75 * everything
    again = policy.sibling(seed=0)
    assert shape(forest_of(again)) == shape(forest) and again.computed["prefill"] < sibling.computed["prefill"]


def test_rollouts_that_leave_one_prefix_share_its_blocks_within_one_step(policy, asked):
    policy.reset_cache()
    (context, *_), _ = first_contexts()
    size = policy.engine.block_size
    context.info["messages"] = [{"role": "user", "content": "a b c " * 40}]
    samples = policy.sibling(seed=0).act([context] * 4)
    length = len(asked[0][0])
    shared = (length - 1) // size * size
    assert shared >= size and [s.prefilled for s in samples] == [length] + [length - shared] * 3
    assert asked[1][0] == length + 3 * (length - shared)
    assert len({tuple(s.action_ids) for s in samples}) > 1


def test_same_seed_same_forest(policy):
    first = shape(forest_of(policy.sibling(seed=5)))
    assert shape(forest_of(policy.sibling(seed=5))) == first
    assert shape(forest_of(policy.sibling(seed=6))) != first


def test_state_goes_on_where_it_stood(policy):
    one = policy.sibling(seed=5)
    forest_of(one)
    state = copy.deepcopy(one.state_dict())
    expected = shape(forest_of(one, seed=1))
    other = policy.sibling(seed=5)
    assert shape(forest_of(other, seed=1)) != expected
    other.load_state_dict(state)
    assert shape(forest_of(other, seed=1)) == expected


@given(st.integers(), st.integers(0, 10**9), st.integers(0, 10**9))
def test_streams_differ(seed, one, other):
    assert 0 <= stream_seed(seed, one) < 2**63
    assert (stream_seed(seed, one) == stream_seed(seed, other)) == (one == other)
    assert stream_seed(seed, one) != stream_seed(seed + 1, one)


def test_a_sibling_leaves_its_policy_alone(policy):
    before, computed = policy.state_dict(), dict(policy.computed)
    sibling = policy.sibling(seed=9, temperature=0.5)
    forest_of(sibling)
    assert policy.state_dict() == before and policy.computed == computed
    assert policy.sampling.temperature == 1.0 and sibling.sampling.temperature == 0.5
    assert sibling.engine is policy.engine and policy.sibling(seed=9).sampling.temperature == 1.0


def test_actions_end_at_the_end_token_or_the_limit(policy):
    samples = [s for s, _ in paths(forest_of(policy.sibling(seed=0)))]
    reasons = {s.finish_reason for s in samples}
    assert reasons == {"stop", "length"}
    for sample in samples:
        ended = sample.action_ids[-1] in policy.codec.stop_ids
        assert (sample.finish_reason == "stop") == ended
        assert ended or len(sample.action_ids) == 8
        assert not set(sample.action_ids[:-1].tolist()) & policy.codec.stop_ids
        assert sample.text == policy.codec.text_of(sample.action_ids)
        assert len(sample.logprobs) == len(sample.action_ids) and sample.entropy is None and sample.features is None


def test_room_ends_actions_and_rollouts(policy, asked):
    contexts, _ = first_contexts()
    unlimited = sampling_as(policy, temperature=0.0, max_new_tokens=20).act(contexts)
    lengths = [len(s.context_ids) for s in unlimited]
    assert len(set(lengths)) > 1
    limit = sorted(lengths)[-1]
    del asked[0][:]
    tight = sampling_as(policy, temperature=0.0, max_new_tokens=20, max_context=limit)
    assert tight.max_length == limit
    for sample, free, length in zip(tight.act(contexts), unlimited, lengths, strict=True):
        room = limit - length
        np.testing.assert_array_equal(sample.action_ids, free.action_ids[:room])
        if room == 0:
            assert (sample.finish_reason, sample.text, sample.prefilled) == ("context", "", 0) and not sample.acted
            assert f"{length} tokens" in sample.note and str(limit) in sample.note
            np.testing.assert_array_equal(sample.context_ids, free.context_ids)
        elif len(free.action_ids) > room:
            assert sample.finish_reason == "length"
    assert len(asked[0]) == sum(length < limit for length in lengths) < len(lengths)
    assert tight.state_dict() == {"requests": len(asked[0])}


def test_the_engines_length_is_the_last_limit(policy, model):
    assert policy.max_length == policy.engine.max_length == model.config.max_position_embeddings
    assert sampling_as(policy, max_context=10**6).max_length == policy.max_length


def test_end_token_at_once(policy, model, loaded, tokenizer):
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.model.norm.weight.zero_()  # every token is as likely as any; the first is the end token
    assert tokenizer.eos_token_id == 0
    loaded(silent)
    contexts, _ = first_contexts()
    for sample in policy.sibling(seed=0, temperature=0.0).act(contexts):
        assert sample.action_ids.tolist() == [0] and (sample.text, sample.finish_reason) == ("", "stop")
        np.testing.assert_allclose(sample.logprobs, -np.log(len(tokenizer)), atol=1e-4)


def test_endless_repetition_is_cut(policy, model, loaded, tokenizer):
    parrot = copy.deepcopy(model)
    with torch.no_grad():
        for layer in parrot.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = parrot.get_input_embeddings().weight
        embedding.div_(embedding.norm(dim=-1, keepdim=True))  # the likeliest token is the one just read
    loaded(parrot)
    contexts, _ = first_contexts()
    last = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for sample in policy.sibling(seed=0, temperature=0.0).act(contexts):
        assert sample.action_ids.tolist() == [last] * 8 and sample.finish_reason == "length"
        assert sample.text == "<|assistant|>" * 8


def test_entropy_is_an_estimate_from_the_sample(policy):
    for sample, _ in paths(forest_of(sampling_as(policy, entropy=True))):
        assert sample.entropy == pytest.approx(-float(np.mean(sample.logprobs)))


def test_no_hidden_states(policy):
    assert policy.gives_features is False
    with pytest.raises(NotImplementedError, match="--predictor text"):
        policy.encode([])


def test_an_interrupted_batch_leaves_nothing_behind(policy, monkeypatch):
    contexts, _ = first_contexts()
    expected = [s.action_ids.tolist() for s in policy.sibling(seed=2).act(contexts)]
    engine = policy.engine.llm.llm_engine
    step, left = engine.step, [2]

    def interrupted():
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        policy.sibling(seed=1).act(contexts)
    monkeypatch.undo()
    assert not engine.has_unfinished_requests()
    policy.reset_cache()
    assert [s.action_ids.tolist() for s in policy.sibling(seed=2).act(contexts)] == expected


@pytest.mark.parametrize("wrong", ["prompt", "logprobs", "count"])
def test_an_engine_that_computes_other_tokens_is_refused(policy, monkeypatch, wrong):
    generate = policy.engine.generate

    def drifted(ids, params):
        outputs = generate(ids, params)
        if wrong == "prompt":
            outputs[1].prompt_token_ids[0] += 1
        elif wrong == "logprobs":
            outputs[1].outputs[0].logprobs.token_ids[0] += 1
        else:
            outputs[1].outputs[0].token_ids = [*outputs[1].outputs[0].token_ids, 5]
        return outputs

    monkeypatch.setattr(policy.engine, "generate", drifted)
    message = "prompt tokens that are not the" if wrong == "prompt" else "log-probs for other tokens"
    with pytest.raises(RuntimeError, match=message):
        policy.sibling(seed=0).act(first_contexts()[0])


def test_an_environment_without_messages_is_refused(policy):
    (context, *_), _ = first_contexts()
    del context.info["messages"]
    with pytest.raises(ValueError, match=r"info\['messages'\]"):
        policy.act([context])


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"stop": "word"}, "stop must be a sequence"),
    ],
)
def test_settings_out_of_range_are_refused_before_the_engine_starts(policy, tokenizer, settings_, message):
    with pytest.raises(ValueError, match=message):
        VLLMPolicy("no such folder", tokenizer, **settings_)


def test_temperatures_that_vllm_would_change_are_refused(policy):
    with pytest.raises(ValueError, match=r"no temperature between 0 and 0\.01, got 0\.005"):
        policy.sibling(seed=0, temperature=0.005)
