"""Branches that ask a vLLM engine one by one: the same forest whatever the delays, and an engine that outlives its callers."""

import asyncio
import copy
import gc
import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from echo_env import EvenPredictor
from vllm_models import assert_logprobs, disturb, forest_of, paths, shape, token_logprobs, wide_model

from agents.evaluate import make_vector
from agents.learner_config import LoraConfig
from agents.lora import add_adapters, saved_part
from agents.models import load_model
from agents.policies import TransformersPolicy
from agents.policies.engine_config import EngineConfig
from agents.policies.vllm_async import AsyncVLLMPolicy
from agents.policies.vllm_requests import Requests
from agents.tiny import build_model
from allocation import AsyncRunner, RolloutError, TraceAllocator, TraceConfig
from allocation.verify import verify


@pytest.fixture(scope="module")
def model(tokenizer):
    return wide_model(tokenizer)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(folder, tokenizer):
    policy = AsyncVLLMPolicy(folder, tokenizer, max_new_tokens=8, seed=3)
    yield policy
    policy.close()


@pytest.fixture
def loaded(policy, model):
    """Lets a test put weights of its own into the engine."""
    yield lambda changed, version: asyncio.run(policy.sync(changed, version))
    asyncio.run(policy.sync(model, 0))


def sampling_as(policy, **changes):
    """A policy on the same engine with other settings."""
    other = copy.copy(policy)
    other._requests = Requests(policy.codec, replace(policy.sampling, **changes), policy.max_length, entropy=False)
    return other


def runner(num_envs=5, budget=24):
    """What `echo_wrapper` is to the lock-step driver."""
    allocator = TraceAllocator(EvenPredictor(), TraceConfig(continuations=1.0, cap_per_rollout=None))
    return AsyncRunner(make_vector("Echo-v0", num_envs, {}), allocator=allocator, budget=budget, keep_snapshots=True)


class Delayed:
    """A policy whose callers, and whose answers, are held up at random."""

    def __init__(self, policy, seed):
        self.policy, self.rng = policy, random.Random(seed)
        self.asked = self.under_way = self.most = 0

    async def act(self, context):
        self.asked += 1
        await asyncio.sleep(self.rng.random() * 0.02)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        sample = await self.policy.act(context)
        self.under_way -= 1
        await asyncio.sleep(self.rng.random() * 0.02)
        return sample


def idle(policy):
    """Whether neither the engine nor its client holds a request."""
    engine = policy._engine
    blocks_are_free = asyncio.run(policy._thread.run(engine.reset_prefix_cache()))
    return blocks_are_free and not engine.output_processor.has_unfinished_requests()


def test_forests_are_what_the_model_and_the_environment_say(policy, model):
    forest = runner().run_sync(policy, seed=0)
    assert forest.ledger.continuations > 8
    assert_logprobs(model, forest)
    assert verify(forest).paths == sum(len(tree.leaves()) for tree in forest)
    samples = [sample for sample, _ in paths(forest)]
    assert {s.finish_reason for s in samples} == {"stop", "length"} and {s.version for s in samples} == {0}
    for sample in samples:
        assert sample.text == policy.codec.text_of(sample.action_ids)
    shown = sum(len(before) for _, before in paths(forest))
    assert 0 < forest.ledger.prefilled_tokens < 0.75 * shown
    assert forest.ledger.prefilled_tokens + forest.ledger.cached_tokens == shown


def test_greedy_forest_is_that_of_the_lock_step_policy(policy, model, tokenizer):
    ours = runner().run_sync(sampling_as(policy, temperature=0.0), seed=0)
    theirs = forest_of(TransformersPolicy(model, tokenizer, max_new_tokens=8, temperature=0.0))
    for tree in theirs:
        tree.sort()
    assert shape(ours) == shape(theirs)


def test_delays_and_slots_change_nothing(policy):
    expected = shape(runner().run_sync(policy, seed=0))
    for seed, num_envs in ((0, 5), (1, 5), (2, 12)):
        delayed = Delayed(policy, seed)
        assert shape(runner(num_envs).run_sync(delayed, seed=0)) == expected
        assert delayed.most > 2  # they did overlap
    assert shape(runner().run_sync(policy, seed=1)) != expected
    assert shape(runner().run_sync(sampling_as(policy, seed=4), seed=0)) != expected


def test_rollouts_of_one_prefix_differ(policy):
    forest = runner().run_sync(policy, seed=0)
    for tree in forest:
        first = {tuple(tree.nodes[child].sample.action_ids) for child in tree.root.children}
        assert len(first) > 1 or len(tree.root.children) == 1
    trees = [[n.sample.action_ids.tolist() for n in tree.nodes[1:]] for tree in forest]
    assert all(trees.count(t) == 1 for t in trees)


def test_a_cancelled_run_leaves_the_engine_usable(policy):
    expected = shape(runner().run_sync(policy, seed=0))
    endless = sampling_as(policy, max_new_tokens=policy.max_length)
    ids = endless.codec.stop_ids
    endless.codec.stop_ids = frozenset()
    try:

        async def cancelled():
            run = asyncio.create_task(runner().run(endless, seed=0))
            while policy._engine.get_num_unfinished_requests() < 5:
                await asyncio.sleep(0.01)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run

        asyncio.run(cancelled())
    finally:
        endless.codec.stop_ids = ids
    while policy._engine.output_processor.has_unfinished_requests():
        time.sleep(0.01)
    assert idle(policy)
    assert shape(runner().run_sync(policy, seed=0)) == expected


def test_weights_are_replaced_while_branches_ask(policy, model, loaded):
    weights = [model, disturb(copy.deepcopy(model), seed=1), disturb(copy.deepcopy(model), seed=2)]

    async def collected():
        delayed = Delayed(policy, 0)
        run = asyncio.create_task(runner(budget=60).run(delayed, seed=0))
        for version in (1, 2):
            while delayed.asked < 40 * version and not run.done():
                await asyncio.sleep(0.001)
            figures = await policy.sync(weights[version], version)
            assert figures.keys() == {"time/sync"} and policy.version == version
        return await run

    forest = asyncio.run(collected())
    versions = set()
    for sample, before in paths(forest):
        versions.add(sample.version)
        ids = [*before, *sample.action_ids]
        expected = token_logprobs(weights[sample.version], ids)[len(before) - 1 :]
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-3)
    assert versions == {0, 1, 2}


def test_a_sync_that_nobody_awaits_is_finished(policy, model, loaded):
    other = disturb(copy.deepcopy(model), seed=1)

    async def given_up():
        sync = asyncio.create_task(policy.sync(other, 5))
        await asyncio.sleep(0.001)
        sync.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sync

    asyncio.run(given_up())
    while policy.version != 5:
        time.sleep(0.01)
    forest = runner().run_sync(policy, seed=0)
    assert {s.version for s, _ in paths(forest)} == {5}
    assert_logprobs(other, forest)


def test_weights_from_folders(policy, model, tokenizer, loaded, tmp_path):
    other = disturb(copy.deepcopy(model), seed=1)
    other.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    loaded(tmp_path / "whole", 1)
    assert_logprobs(other, runner().run_sync(policy, seed=0))

    # Adapters on top of that folder, as training saves them.
    adapted, _ = load_model(str(tmp_path / "whole"))
    add_adapters(adapted, LoraConfig(rank=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.3)
    saved_part(adapted).save_pretrained(tmp_path / "adapters")
    loaded(tmp_path / "adapters", 2)
    forest = runner().run_sync(policy, seed=0)
    assert_logprobs(adapted, forest)
    with pytest.raises(AssertionError):
        assert_logprobs(other, forest)


def test_a_model_of_another_kind_is_refused(policy, model, tokenizer):
    with pytest.raises(ValueError, match=r"do not fit .* hidden_size is 64 against 32"):
        asyncio.run(policy.sync(build_model(len(tokenizer), width=64, layers=2, heads=1), 7))
    assert policy.version == 0
    assert_logprobs(model, runner().run_sync(policy, seed=0))


def test_no_room_ends_a_rollout(policy):
    forest = runner().run_sync(sampling_as(policy, max_context=30), seed=0)
    ended = [leaf for tree in forest for leaf in tree.leaves() if leaf.sample.finish_reason == "context"]
    assert ended and all(leaf.truncated and not leaf.is_correct and "30" in leaf.sample.note for leaf in ended)
    assert all(len(before) + len(sample.action_ids) <= 30 for sample, before in paths(forest))


def test_stop_strings_and_the_engines_death(folder, tokenizer, model):
    with_words = AsyncVLLMPolicy(folder, tokenizer, max_new_tokens=24, seed=1, stop=("e", "a"))
    forest = runner().run_sync(with_words, seed=0)
    stopped = [s for s, _ in paths(forest) if "e" in s.text or "a" in s.text]
    assert len(stopped) > 5
    for sample in stopped:
        before = with_words.codec.text_of(sample.action_ids[:-1])
        assert sample.finish_reason == "stop" and "e" not in before and "a" not in before
    assert_logprobs(model, forest)

    (process,) = with_words._engine.engine_core.resources.engine_manager.processes
    asked = []

    async def act(context):
        asked.append(context)
        if len(asked) == 20:
            os.kill(process.pid, signal.SIGKILL)
        return await with_words.act(context)

    with pytest.raises(RolloutError, match="engine process has died") as caught:
        runner().run_sync(act, seed=0)
    assert isinstance(caught.value.__cause__, RuntimeError) and len(asked) >= 20
    with pytest.raises(RuntimeError, match=r"engine process has died .*: close\(\) this policy"):
        asyncio.run(with_words.act(asked[0]))
    with pytest.raises(RuntimeError, match="engine process has died"):
        asyncio.run(with_words.sync(model, 1))
    assert with_words.version == 0
    with_words.close()
    with_words.close()
    for use in (with_words.act(asked[0]), with_words.sync(model, 1)):
        with pytest.raises(RuntimeError, match="this policy was closed; make another one"):
            asyncio.run(use)


def test_a_policy_that_is_dropped_ends_its_process(folder, tokenizer):
    environment = dict(os.environ)
    dropped = AsyncVLLMPolicy(folder, tokenizer)
    assert dict(os.environ) == environment
    (process,) = dropped._engine.engine_core.resources.engine_manager.processes
    assert process.is_alive()
    del dropped
    gc.collect()
    process.join(timeout=30)
    assert not process.is_alive()


def test_settings_that_are_refused(folder, tokenizer, tmp_path, capfd):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        AsyncVLLMPolicy("no such folder", tokenizer, max_new_tokens=0)
    with pytest.raises(FileNotFoundError, match=r"is no model folder \(no config.json\)"):
        AsyncVLLMPolicy(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"vLLM cannot run .* with these settings \(.*See root cause above"):
        AsyncVLLMPolicy(folder, tokenizer, engine=EngineConfig(block_size=48))
    assert "No common block size for 48" in capfd.readouterr().err
