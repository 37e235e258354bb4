"""Engines that differ: what they refuse to start with, stop strings, little memory, other kinds of model, and their end."""

import copy
import gc
import json
import os
import random
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_models import (
    IDS,
    assert_logprobs,
    assert_scores,
    disturb,
    first_contexts,
    forest_of,
    moe,
    paths,
    shape,
    wide_model,
)

from agents.policies.engine_config import EngineConfig
from agents.policies.vllm_policy import VLLMPolicy
from agents.tiny import build_model


@pytest.fixture(scope="module")
def model(tokenizer):
    return wide_model(tokenizer)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def start(tokenizer, folder):
    """Makes policies and closes them."""
    policies = []

    def make(folder=folder, **kwargs):
        policies.append(VLLMPolicy(folder, tokenizer, **{"max_new_tokens": 8, **kwargs}))
        return policies[-1]

    yield make
    for policy in policies:
        policy.close()


def test_stop_strings_end_actions(start, model):
    free = start(max_new_tokens=24, seed=1)
    expected = forest_of(free)
    texts = [s.text for s, _ in paths(expected)]
    free.close()
    # Pairs of characters that many answers hold, within a token and across two.
    pairs = {text[i : i + 2] for text in texts for i in range(0, len(text) - 1, 7)}
    pairs = {pair for pair in pairs if "\ufffd" not in pair}  # part of a character is no text yet
    words = tuple(sorted(pairs, key=lambda word: (-sum(word in text for text in texts), word))[:3])
    policy = start(max_new_tokens=24, seed=1, stop=words)
    stopped = [s for s, _ in paths(forest_of(policy))]
    assert sum(any(w in s.text for w in words) for s in stopped) > 5
    for sample in stopped:
        text = policy.codec.text_of(sample.action_ids)
        assert sample.text == text
        # No word is in the text before the last token, and the sample says that it was stopped if one is in it after that.
        assert not any(w in policy.codec.text_of(sample.action_ids[:-1]) for w in words)
        ended = sample.action_ids[-1] in policy.codec.stop_ids
        assert (sample.finish_reason == "stop") == (ended or any(w in text for w in words))
    assert_logprobs(model, forest_of(policy))


def test_little_memory_gives_the_same_forest(start, monkeypatch):
    settings = {"seed": 1, "max_new_tokens": 40, "temperature": 2.0}
    ample = start(**settings)
    expected = shape(forest_of(ample, num_envs=12))
    limit = ample.max_length
    ample.close()
    scarce = start(**settings, engine=EngineConfig(cpu_cache_gib=0.0003))
    assert scarce.max_length < limit
    scheduler, preempted = scarce.engine.llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), preempt(*a, **k))[1])
    assert shape(forest_of(scarce, num_envs=12)) == expected
    assert preempted  # requests were thrown out, and computed again


@pytest.mark.parametrize("size", [64, 128])
def test_larger_blocks_share_less(start, model, size):
    small = start(seed=1)
    expected = forest_of(small)
    small.close()
    large = start(seed=1, engine=EngineConfig(block_size=size))
    forest = forest_of(large)
    assert large.engine.block_size == size > small.engine.block_size
    assert shape(forest) == shape(expected)
    assert forest.ledger.prefilled_tokens > expected.ledger.prefilled_tokens


def test_long_prompts_are_sampled_reproducibly(start):
    """More new tokens at once than one step of the engine takes."""
    policy = start(seed=1)
    (context, *_), _ = first_contexts()
    asked = [[{"role": "user", "content": f"{number} " + "zq " * 600}] for number in range(4)]
    contexts = [replace(context, info={"messages": messages}) for messages in asked]
    samples = policy.act(contexts)
    budget = policy.engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert max(s.prefilled for s in samples) <= budget < sum(s.prefilled for s in samples)
    policy.reset_cache()
    again = policy.sibling(seed=1).act(contexts)
    assert [s.action_ids.tolist() for s in again] == [s.action_ids.tolist() for s in samples]


def test_float32_learner_and_bfloat16_engine(start, model, tmp_path):
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    policy = start(tmp_path, engine=EngineConfig(dtype="bfloat16"))
    at_start = policy.score(IDS)
    policy.sync(disturb(copy.deepcopy(model)), 1)
    assert np.abs(policy.score(IDS)[0] - at_start[0]).mean() > 0.05
    policy.sync(model, 2)  # rounded as the file was
    for a, b in zip(policy.score(IDS), at_start, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mixture_of_experts(start, tokenizer, tmp_path):
    model = moe(tokenizer)
    model.save_pretrained(tmp_path)
    policy = start(tmp_path)
    assert_scores(policy, model)
    policy.sync(disturb(model), 1)
    assert_scores(policy, model)


def test_the_process_is_put_back(start):
    state = dict(os.environ), random.getstate(), torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    threads, dtype = torch.set_num_threads, torch.get_default_dtype()
    policy = start()
    assert dict(os.environ) == state[0] and random.getstate() == state[1]
    forest_of(policy)
    policy.score(IDS)
    assert torch.equal(torch.random.get_rng_state(), state[2])
    assert np.array_equal(np.random.get_state()[1], state[3])  # noqa: NPY002
    assert torch.set_num_threads is threads and torch.get_default_dtype() is dtype and torch.is_grad_enabled()


def test_one_engine_in_a_process(start):
    policy = start()
    with pytest.raises(RuntimeError, match=r"holds a vLLM engine already.*close\(\).*sibling\(\)"):
        start()
    assert len(policy.score(IDS)) == 2


def test_closing_frees_the_engine(start, model):
    policy = start()
    sibling, engine = policy.sibling(seed=1), policy.engine.llm.llm_engine.engine_core.engine_core
    runner = engine.model_executor.driver_worker.worker.model_runner
    held = [weakref.ref(runner.model), weakref.ref(runner.kv_caches[0])]
    del runner, engine
    policy.close()
    sibling.close()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    contexts, _ = first_contexts()
    for use in (
        lambda: policy.act(contexts),
        lambda: sibling.score(IDS),
        lambda: policy.sync(model, 1),
        policy.reset_cache,
    ):
        with pytest.raises(RuntimeError, match="this vLLM policy is closed"):
            use()
    assert len(start().score(IDS)) == 2


def test_a_policy_that_is_dropped_makes_room(folder, tokenizer, start):
    policy = VLLMPolicy(folder, tokenizer)
    del policy
    gc.collect()
    assert len(start().score(IDS)) == 2


def refusal(start, *args, **kwargs):
    with pytest.raises(ValueError, match=r"^vLLM ") as caught:
        start(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_settings_that_vllm_refuses(start):
    assert "takes no blocks of 48 tokens here: leave engine.block_size unset" in refusal(
        start, engine=EngineConfig(block_size=48)
    )
    for gib in (1e-5, 1e5):
        assert "engine.cpu_cache_gib" in refusal(start, engine=EngineConfig(cpu_cache_gib=gib))
    assert len(start().score(IDS)) == 2  # nothing is left of what failed


def test_folders_that_hold_no_model(start, tmp_path):
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is no model folder \(no config.json\)"):
            start(missing)


def test_models_that_vllm_refuses(start, folder, tokenizer, tmp_path):
    unknown = shutil.copytree(folder, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["FooForCausalLM"]}))
    assert "knows no model of the kind of" in refusal(start, unknown)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    os.truncate(damaged / "model.safetensors", 3000)
    assert "cannot run" in refusal(start, damaged)
    narrow = tmp_path / "narrow"
    build_model(len(tokenizer), width=32, layers=1, heads=4).save_pretrained(narrow)
    assert "head_dim=8" in refusal(start, narrow)  # a kernel refuses it, not the loader
    assert len(start().score(IDS)) == 2


def test_direct_sync_is_within_one_process():
    with pytest.raises(ValueError, match=r"engine\.sync direct .* engine\.tensor_parallel is 2"):
        EngineConfig(sync="direct", tensor_parallel=2)
