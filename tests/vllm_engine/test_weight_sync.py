"""New weights in the engine: they are the learner's, whichever way they came, and nothing of the old ones is left."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import load_file
from vllm_models import (
    IDS,
    assert_logprobs,
    assert_scores,
    disturb,
    first_contexts,
    forest_of,
    gpt2,
    moe,
    token_logprobs,
    untied,
    wide_model,
)

from agents.learner_config import LoraConfig
from agents.lora import add_adapters, has_adapters, merge
from agents.policies.engine_config import EngineConfig
from agents.policies.vllm_policy import VLLMPolicy
from agents.policies.weight_sync import engine_weights, load_direct, write_weights
from agents.tiny import build_model


def with_adapters(model):
    """The model with adapters that change it, as training leaves them."""
    add_adapters(model, LoraConfig(rank=4, alpha=8), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=["direct tied", "file tied", "direct untied", "file untied"])
def started(request, tokenizer, tmp_path_factory):
    """A policy for each way and kind of output layer, and the model that its engine has loaded."""
    way, kind = request.param.split()
    model = wide_model(tokenizer) if kind == "tied" else untied(tokenizer)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    policy = VLLMPolicy(folder, tokenizer, max_new_tokens=8, engine=EngineConfig(sync=way))
    yield policy, model
    policy.close()


@pytest.fixture
def policy(started):
    yield started[0]
    started[0].sync(started[1], 0)


@pytest.fixture
def learner(started):
    return disturb(copy.deepcopy(started[1]), seed=1)


def test_the_engine_has_the_learners_weights(policy, learner, started):
    assert_scores(policy, started[1])
    contexts, _ = first_contexts()
    policy.act(contexts)
    for version in (4, 5):
        before = policy.score(IDS)
        policy.sync(disturb(learner, seed=version), version)
        assert min(np.abs(a - b).mean() for a, b in zip(policy.score(IDS), before, strict=True)) > 0.05
        assert_scores(policy, learner)
        assert policy.version == policy.sibling(seed=0).version == version
        assert {s.version for s in policy.act(contexts)} == {version}
    assert_logprobs(learner, forest_of(policy.sibling(seed=1)))


def test_how_far_the_engine_moved(policy, learner, started):
    sibling = policy.sibling(seed=0)
    assert sibling.sync(started[1], 1).keys() == {"time/sync"}
    contexts, _ = first_contexts()
    samples = sibling.act(contexts)
    assert sibling.sync(started[1], 2)["engine/moved"] == 0.0
    moves = []
    for sample in samples:
        ids, start = [*sample.context_ids, *sample.action_ids], len(sample.context_ids) - 1
        new = token_logprobs(learner, ids)[start:]
        moves.extend(np.abs(new - sample.logprobs))
    figures = sibling.sync(learner, 3)
    assert figures["engine/moved"] == pytest.approx(np.mean(moves), abs=2e-3) and np.mean(moves) > 0.1
    assert figures["time/sync"] > 0


def test_the_learner_is_left_alone_and_cannot_reach_the_engine(policy, learner):
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    grads = [p.requires_grad for p in learner.parameters()]
    policy.sync(learner, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    assert [p.requires_grad for p in learner.parameters()] == grads
    scores = policy.score(IDS)
    disturb(learner, seed=2)
    for a, b in zip(policy.score(IDS), scores, strict=True):
        np.testing.assert_array_equal(a, b)


def test_adapters_arrive_merged(policy, started):
    learner = with_adapters(copy.deepcopy(started[1]))
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    assert max(np.abs(token_logprobs(learner, i) - token_logprobs(started[1], i)).mean() for i in IDS) > 0.05
    policy.sync(learner, 1)
    assert_scores(policy, learner)
    assert has_adapters(learner)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())


def test_keys_and_values_of_old_weights_are_forgotten(policy, learner, started):
    contexts, _ = first_contexts()
    context = contexts[0]
    context.info["messages"] = [{"role": "user", "content": "a b c " * 40}]
    prompt = policy.act([context])[0].context_ids

    def drift():
        sample = policy.sibling(seed=0).act([context])[0]
        expected = token_logprobs(learner, [*prompt, *sample.action_ids])[len(prompt) - 1 :]
        return sample.prefilled, float(np.abs(sample.logprobs - expected).max())

    # New weights alone would go on with the old keys and values:
    if policy.engine.config.sync == "direct":
        load_direct(policy.engine.llm, learner)
        prefilled, error = drift()
        assert prefilled < len(prompt) and error > 0.01
    policy.sync(learner, 1)
    prefilled, error = drift()
    assert prefilled == len(prompt) and error < 1e-3


def test_no_reset_while_requests_run(policy):
    from vllm import SamplingParams

    engine = policy.engine.llm.llm_engine
    request = engine.add_request(
        "running", {"prompt_token_ids": IDS[0]}, SamplingParams(max_tokens=5, detokenize=False)
    )
    engine.step()
    with pytest.raises(RuntimeError, match="requests are still running; sync between batches"):
        policy.reset_cache()
    engine.abort_request([request], internal=True)
    policy.reset_cache()


def test_a_model_of_another_kind_is_refused(policy, started, tokenizer):
    with pytest.raises(ValueError, match=r"do not fit .* hidden_size is 64 against 32"):
        policy.sync(build_model(len(tokenizer), width=64, layers=2, heads=1), 1)
    assert_scores(policy, started[1])


@pytest.mark.parametrize("make", [wide_model, untied, moe, gpt2], ids=lambda make: make.__name__)
def test_weights_are_named_as_in_a_checkpoint(make, tokenizer, tmp_path):
    model = make(tokenizer)
    model.save_pretrained(tmp_path / "saved")
    expected = load_file(tmp_path / "saved" / "model.safetensors")
    written = load_file(write_weights(model, tmp_path))
    assert written.keys() == expected.keys() == {name for name, _ in engine_weights(model)}
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize("make", [wide_model, untied, gpt2], ids=lambda make: make.__name__)
def test_adapters_are_merged_as_on_disk(make, tokenizer, tmp_path):
    learner = with_adapters(make(tokenizer))
    ours = dict(engine_weights(learner))
    merged = dict(engine_weights(merge(learner)))
    assert ours.keys() == merged.keys() == dict(engine_weights(make(tokenizer))).keys()
    assert all(torch.equal(ours[name], merged[name]) for name in merged)
