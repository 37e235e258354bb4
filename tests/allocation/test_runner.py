import asyncio
import threading
import zlib

import gymnasium as gym
import lock_env
import numpy as np
import pytest
from bit_env import BitEnv
from gymnasium.vector import SyncVectorEnv
from hooked_env import (
    ALLOCATORS,
    LONG,
    Batched,
    HookedEnv,
    Single,
    assert_same,
    guess,
    lock_step,
    nothing,
    path_generator,
    random_delays,
    trace,
    vector,
)

from agents.policies import ScriptedPolicy
from allocation import Root, Sample, UniformAllocator
from allocation.asking import Batches
from allocation.collection import Rollout
from allocation.ledger import Ledger
from allocation.runner import AsyncRunner
from allocation.scheduler import Job
from allocation.threads import Worker
from allocation.tree import Tree
from trace_envs.multihop_qa.oracle import oracle_action
from trace_envs.snapshots.replay import Replayable
from trace_envs.state import FinalAnswer, ToolCall


@pytest.fixture(scope="module", autouse=True)
def _registered():
    lock_env.register()


# The same forest, whatever the delays.


@pytest.mark.parametrize("allocator", ["trace", "grpo"])
@pytest.mark.parametrize("policy", [Batched, Single])
@pytest.mark.parametrize("options", [{}, {"max_concurrency": 3}, {"max_batch": 2}])
def test_the_forest_does_not_depend_on_delays(allocator, policy, options):
    common = {"budget": 48, "success": lambda total, info: total > 0.5}
    reference = lock_step(vector(nothing, 5, as_dict=True), guess, 3, allocator=ALLOCATORS[allocator](), **common)
    assert (reference.ledger.continuations == 24) == (allocator == "trace") and reference.effective_ratio() > 0
    envs = vector(random_delays, 7, as_dict=True)
    runner = AsyncRunner(envs, allocator=ALLOCATORS[allocator](), **common, **options)
    assert_same(runner.run_sync(policy(delays=random_delays), seed=3), reference)
    assert_same(runner.run_sync(policy(delays=random_delays), seed=3), reference)


@pytest.mark.parametrize("allocator", ["trace", "grpo"])
def test_what_is_drawn_by_the_rollouts_seed_does_not_depend_on_delays(allocator):
    def draw(context):
        return int(np.random.default_rng([context.seed, context.node.depth]).integers(2))

    common = {"budget": 48, "success": lambda total, info: total > 0.5}
    reference = lock_step(vector(nothing, 5, as_dict=True), draw, 3, allocator=ALLOCATORS[allocator](), **common)
    assert any(len({tree.nodes[c].action for c in tree.root.children}) > 1 for tree in reference)
    runner = AsyncRunner(vector(random_delays, 7, as_dict=True), allocator=ALLOCATORS[allocator](), **common)
    assert_same(runner.run_sync(Single(draw, delays=random_delays), seed=3), reference)


def lock_action(context):
    """Turns the dial, listens, errs; what it heard (a click, by chance) changes what comes next."""
    rng = path_generator(context)
    heard = zlib.crc32(context.observation.encode()) % 4 if context.node.depth else 1
    if heard == 0:
        return lock_env.OPEN if rng.random() < 0.5 else "no action at all"
    return lock_env.LISTEN if rng.random() < 0.5 else lock_env.dial(int(rng.integers(-1, 4)))


def as_sample(text, context):
    ids = np.arange(len(text))
    shown = np.arange(3 + context.node.depth)
    return Sample(
        text, ids, -0.1 * ids.astype(np.float32), shown, np.full(2, context.node.depth, np.float32), prefilled=2
    )


@pytest.mark.parametrize("allocator", ["trace", "grpo"])
def test_our_environments_with_sampled_tokens(allocator):
    def choose(context):
        return as_sample(lock_action(context), context)

    def envs(n):
        return gym.make_vec("Lock-v0", num_envs=n, vectorization_mode="sync", max_turns=6)

    reference = lock_step(envs(3), choose, 5, allocator=ALLOCATORS[allocator](), budget=32)
    ledger = reference.ledger
    assert ledger.tool_calls > 0 and ledger.generated_tokens > 0 and ledger.cached_tokens > 0
    runner = AsyncRunner(envs(6), allocator=ALLOCATORS[allocator](), budget=32)
    assert_same(runner.run_sync(Batched(choose, random_delays), seed=5), reference)
    assert_same(runner.run_sync(Single(choose, random_delays), seed=5), reference)
    report = runner.forest.verify(envs(3))
    assert report.trees == len(reference) and report.verdicts > 0


def oracle_that_errs(state, _):
    turns = list(state.turns())
    rng = np.random.default_rng(zlib.crc32(repr([state.task.task_id, [t.text for t in turns]]).encode()))
    if rng.random() < 0.2:
        return "Whatever.", FinalAnswer("nobody")
    if rng.random() < 0.2:
        return "Let me see.", ToolCall("search", {"query": "zebra"})
    return oracle_action(state.task, turns, rng)


def test_multi_hop_questions_with_a_scripted_policy():
    def envs(n):
        return gym.make_vec("TraceMultiHopQA-v0", num_envs=n, vectorization_mode="sync", top_k=2, max_turns=6)

    common = {"budget": 24, "keep_snapshots": True}
    policy = ScriptedPolicy(oracle_that_errs)
    reference = lock_step(envs(2), lambda c: policy.act([c])[0], 3, allocator=trace(), **common)
    runner = AsyncRunner(envs(5), allocator=trace(), **common)
    forest = runner.run_sync(policy, seed=3)
    assert_same(forest, reference)
    assert forest.ledger.continuations == 12 and forest.ledger.model_calls > 0


def test_a_foreign_environment():
    def balance(context):
        rng = path_generator(context)
        return int(context.observation[2] > 0) if rng.random() < 0.9 else int(rng.integers(2))

    def envs(n):
        return gym.make_vec("CartPole-v1", num_envs=n, vectorization_mode="sync", max_episode_steps=40)

    common = {"budget": 24, "success": lambda total, info: total >= 40}
    reference = lock_step(envs(2), balance, 1, allocator=trace(), **common)
    assert_same(AsyncRunner(envs(4), allocator=trace(), **common).run_sync(Batched(balance), seed=1), reference)


def test_wrappers_keep_their_state_per_branch():
    def make(hook):
        env = gym.wrappers.TimeLimit(HookedEnv(hook, turns=6, noise=0.5), 4)
        env = gym.wrappers.FrameStackObservation(gym.wrappers.NormalizeObservation(env), 2)
        return gym.wrappers.RecordEpisodeStatistics(env)

    def choose(context):
        return int(path_generator(context).random() < 0.5 + 0.1 * np.clip(context.observation[-1, 1], -4, 4))

    def success(total, info):
        return info["episode"]["l"] == 4

    common = {"budget": 32, "success": success}
    reference = lock_step(SyncVectorEnv([lambda: make(nothing)] * 3), choose, 2, allocator=trace(), **common)
    runner = AsyncRunner(SyncVectorEnv([lambda: make(random_delays)] * 5), allocator=trace(), **common)
    assert_same(runner.run_sync(Batched(choose), seed=2), reference)
    assert reference.effective_ratio() > 0 and any(n.truncated for t in reference for n in t.nodes)


def test_repeated_turns_are_counted_alike():
    def envs(n):
        return SyncVectorEnv([lambda: Replayable(gym.make("FrozenLake-v1", max_episode_steps=20))] * n)

    def choose(context):
        return int(path_generator(context).integers(4))

    common = {"budget": 32, "success": lambda total, info: total > 0}
    reference = lock_step(envs(3), choose, 2, allocator=trace(), **common)
    assert reference.ledger.replayed_turns > 0
    assert_same(AsyncRunner(envs(5), allocator=trace(), **common).run_sync(Batched(choose), seed=2), reference)


def test_without_a_seed_forests_go_on_and_candidates_can_be_named():
    runner = AsyncRunner(vector(nothing), allocator=UniformAllocator(4), budget=8)
    first = [t.key for t in runner.run_sync(Batched(), seed=1)]
    second = [t.key for t in runner.run_sync(Batched())]
    assert first != second
    assert [t.key for t in runner.run_sync(Batched(), roots=[Root(5)])] == ["5"]
    with pytest.raises(ValueError, match="no candidate prompt"):
        runner.run_sync(Batched(), roots=[])


def test_finished_trees_give_up_their_snapshots_unless_kept():
    for keep in (False, True):
        forest = AsyncRunner(vector(nothing), allocator=trace(), budget=16, keep_snapshots=keep).run_sync(
            Batched(), seed=0
        )
        inner = [n for t in forest for n in t.nodes if not n.terminal]
        assert inner and all((n.snapshot is not None) == keep for n in inner)


# Concurrency.


@pytest.mark.parametrize(("slots", "most", "together"), [(4, None, 4), (6, 3, 3), (2, 8, 2)])
def test_as_many_branches_as_allowed_are_under_way(slots, most, together):
    barrier = threading.Barrier(together, timeout=LONG)
    lock, seen = threading.Lock(), {"now": 0, "most": 0, "steps": 0}

    def hook(env, what):
        if what != "step":
            return
        with lock:
            seen["now"] += 1
            seen["steps"] += 1
            seen["most"] = max(seen["most"], seen["now"])
            first = seen["steps"] <= together
        if first:
            barrier.wait()  # opens only when that many steps are under way at once
        with lock:
            seen["now"] -= 1

    runner = AsyncRunner(vector(hook, slots), allocator=UniformAllocator(12), budget=12, max_concurrency=most)
    runner.run_sync(Single(delays=True), seed=0)
    assert seen["most"] == together and runner.forest.num_leaves == 12


def test_coroutines_are_awaited_at_once_and_bounded():
    now, most, full = 0, 0, asyncio.Event()

    async def policy(context):
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            full.set()
        await asyncio.wait_for(full.wait(), LONG)
        now -= 1
        return guess(context)

    runner = AsyncRunner(vector(nothing, 5), allocator=UniformAllocator(12), budget=12, max_concurrency=3)
    forest = runner.run_sync(policy, seed=0)
    assert most == 3 and forest.ledger.model_calls == forest.ledger.environment_turns


@pytest.mark.parametrize("policy", [Batched, Single])
def test_a_slow_branch_holds_up_nobody(policy):
    others, verdicts = threading.Event(), []
    lock, steps = threading.Lock(), []

    def hook(env, what):
        if what == "step":
            with lock:
                steps.append(env)
                slow = len(steps) == 1
            if slow:
                assert others.wait(LONG), "the slow branch waits for all the others, and they wait for it"

    def success(total, info):
        verdicts.append(total)
        if len(verdicts) == 11:
            others.set()
        return total > 0.5

    runner = AsyncRunner(vector(hook, 3), allocator=UniformAllocator(12), budget=12, success=success)
    assert runner.run_sync(policy(), seed=0).num_leaves == 12


def test_a_batch_policy_acts_while_others_step():
    acted = threading.Event()

    class Policy(Batched):
        def act(self, contexts):
            if self.sizes:
                acted.set()
            return super().act(contexts)

    lock, steps = threading.Lock(), []

    def hook(env, what):
        if what == "step":
            with lock:
                steps.append(env)
                first = len(steps) == 1
            if first:
                assert acted.wait(LONG), "no other branch was acted for while this one stepped"

    policy = Policy()
    runner = AsyncRunner(vector(hook, 2), allocator=UniformAllocator(6), budget=6, max_batch=1)
    forest = runner.run_sync(policy, seed=0)
    assert (
        set(policy.sizes) == {1} and forest.ledger.model_calls == len(policy.sizes) == forest.ledger.environment_turns
    )


def rollout(slot):
    tree = Tree("key", 0, slot)
    return Rollout(slot, Job(tree, tree.root, "root", 0), 0, tree.root, slot, {})


def test_all_that_wait_are_gathered():
    sizes, under_way, go_on = [], threading.Event(), threading.Event()

    def act(contexts):
        sizes.append(len(contexts))
        under_way.set()
        assert go_on.wait(LONG)
        return [10 * c.slot for c in contexts]

    async def main(most):
        ledger = Ledger()
        batches = Batches(act, Worker("test"), most, ledger)
        serving = asyncio.create_task(batches.serve())
        asking = [asyncio.create_task(batches.ask(rollout(i))) for i in range(3)]
        await asyncio.to_thread(under_way.wait, LONG)
        asking += [asyncio.create_task(batches.ask(rollout(i))) for i in range(3, 8)]
        await asyncio.sleep(0)
        go_on.set()
        answers = await asyncio.gather(*asking)
        serving.cancel()
        assert answers == [10 * i for i in range(8)] and ledger.model_calls == len(sizes)
        assert ledger.seconds["generate"] > 0

    asyncio.run(main(None))
    assert sizes == [3, 5]
    for event in (under_way, go_on):
        event.clear()
    sizes.clear()
    asyncio.run(main(2))
    assert sizes == [2, 2, 2, 2]


# Wrong use.


def test_wrong_arguments_are_named():
    for wrong, message in [
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1, got 0"),
        ({"max_batch": -1}, "max_batch must be at least 1, got -1"),
        ({"step_timeout": 0}, "step_timeout must be None or more than 0 seconds, got 0"),
        ({"on_timeout": "wait"}, "on_timeout must be 'truncate' or 'raise', got 'wait'"),
        ({"allocator": "pso"}, "unknown allocator 'pso'"),
    ]:
        with pytest.raises(ValueError, match=message):
            AsyncRunner(BitEnv(), **wrong)
    with pytest.raises(TypeError, match=r"expected a policy with act\(contexts\).*got function"):
        AsyncRunner(BitEnv()).run_sync(guess)


def test_a_worker_ends_with_its_last_reference():
    async def main():
        worker = Worker("ends")
        thread = await worker.call(threading.current_thread)
        assert thread.daemon and thread.name == "ends" and not worker.busy
        return thread

    thread = asyncio.run(main())
    thread.join(LONG)
    assert not thread.is_alive()
