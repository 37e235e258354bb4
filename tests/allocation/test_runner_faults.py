import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import lock_env
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from hooked_env import (
    LONG,
    Batched,
    Hang,
    HookedEnv,
    Single,
    assert_node,
    assert_same,
    guess,
    lock_step,
    nothing,
    only_timeout,
    random_delays,
    trace,
    vector,
)

from allocation import UniformAllocator
from allocation.runner import AsyncRunner, RolloutError
from trace_envs.slots import LocalSlots, ProcessSlots


@pytest.fixture
def hang():
    made = []

    def make(*args, **kwargs):
        made.append(Hang(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.release.set()


# Time-outs.


@pytest.mark.parametrize("policy", [Batched, Single])
def test_a_step_that_hangs_is_a_failure_and_its_environment_replaced(policy, hang):
    envs = vector(hang(9), 3)
    before = list(envs.envs)
    runner = AsyncRunner(envs, allocator=trace(), budget=24, success=lambda *_: True, step_timeout=0.3)
    forest = runner.run_sync(policy(), seed=0)
    tree, node = only_timeout(forest)
    assert node.truncated and not node.terminated and node.is_correct is False and node.reward == 0
    assert np.array_equal(node.observation, tree.nodes[node.parent].observation), "numbers: the last observation stays"
    assert sum(leaf.is_correct for t in forest for leaf in t.leaves()) == forest.num_leaves - 1 == 23
    assert sum(a is not b for a, b in zip(before, runner.slots.envs, strict=True)) == 1
    assert forest.ledger.environment_turns == sum(len(t.nodes) - 1 for t in forest)


class SlowLock(lock_env.LockEnv):
    hang = None

    def call_tool(self, state, call):
        if call.name == "listen":
            self.hang(self, "step")
        return super().call_tool(state, call)


def slow_lock(hang):
    def make():
        env = SlowLock(max_turns=4)
        env.hang = hang
        return env

    return make


def test_where_observations_are_text_the_node_says_so(hang):
    def choose(context):
        return lock_env.LISTEN if context.node.depth == 1 else lock_env.dial(1 if context.node.depth == 0 else -1)

    runner = AsyncRunner(
        SyncVectorEnv([slow_lock(hang(2))] * 2), allocator=UniformAllocator(6), budget=6, step_timeout=0.3
    )
    _, node = only_timeout(runner.run_sync(Batched(choose), seed=0))
    assert node.observation == "The environment did not answer within 0.3 s."
    assert node.action == lock_env.LISTEN and node.depth == 2 and node.is_correct is False
    assert not node.tool_error and runner.forest.num_leaves == 6


def test_a_step_that_hangs_is_an_error_if_asked(hang):
    runner = AsyncRunner(vector(hang(5), 3), allocator=trace(), budget=16, step_timeout=0.3, on_timeout="raise")
    with pytest.raises(RolloutError, match=r"did not answer within 0\.3 s") as caught:
        runner.run_sync(Batched(), seed=0)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert_node(runner.forest, caught.value)
    assert_same(runner.run_sync(Batched(), seed=0), lock_step(vector(nothing), guess, 0, allocator=trace(), budget=16))


def test_a_time_out_of_the_environment_itself_is_an_error():
    def hook(env, what):
        if what == "step":
            raise TimeoutError("the database is down")

    runner = AsyncRunner(vector(hook), allocator=trace(), budget=16, step_timeout=LONG)
    with pytest.raises(RolloutError, match="TimeoutError: the database is down"):
        runner.run_sync(Batched(), seed=0)
    assert runner.forest.ledger.timeouts == 0


def single_slots(hook, num):
    """Environments that cannot be made again."""
    return LocalSlots([HookedEnv(hook) for _ in range(num)])


@pytest.mark.parametrize("most", [None, 1])
def test_a_slot_that_cannot_be_replaced_is_retired(hang, most):
    hung = hang(4)
    runner = AsyncRunner(single_slots(hung, 2), allocator=trace(), budget=16, step_timeout=0.3, max_concurrency=most)
    forest = runner.run_sync(Batched(), seed=0)
    only_timeout(forest)
    assert forest.num_leaves == 16
    reference = lock_step(vector(nothing), guess, 0, allocator=trace(), budget=16)
    assert_same(runner.run_sync(Batched(), seed=0), reference)


def test_without_a_slot_left_there_is_an_error(hang):
    hung = hang(6)
    runner = AsyncRunner(single_slots(hung, 1), allocator=trace(), budget=16, step_timeout=0.3)
    with pytest.raises(RolloutError, match="no slot is left") as caught:
        runner.run_sync(Batched(), seed=0)
    tree, node = only_timeout(runner.forest)
    assert (caught.value.tree, caught.value.node) == (tree.key, node.id)
    with pytest.raises(RuntimeError, match="every environment hangs"):
        runner.run_sync(Batched(), seed=0)
    hung.release.set()
    while runner._workers[0].busy:
        threading.Event().wait(0.001)
    assert runner.run_sync(Batched(), seed=0).num_leaves == 16, "an environment that came back is used again"


def test_an_anchor_that_is_never_reached_is_an_error(hang):
    runner = AsyncRunner(vector(hang(2, "restore")), allocator=trace(), budget=16, step_timeout=0.3)
    with pytest.raises(
        RolloutError, match=r"turn 0: going back to this node \(within 0\.3 s\) failed with TimeoutError"
    ):
        runner.run_sync(Batched(), seed=0)


SCRIPT = """
import threading
from hooked_env import Batched, HookedEnv

from allocation import UniformAllocator
from allocation.runner import AsyncRunner

def hook(env, what):
    if what == "step":
        threading.Event().wait()

runner = AsyncRunner(HookedEnv(hook), allocator=UniformAllocator(1), budget=1, step_timeout=0.2)
print(runner.run_sync(Batched(), seed=0).ledger.timeouts)
"""


def test_a_tool_that_hangs_for_ever_does_not_hold_up_the_exit():
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parents[1], here, here.parent)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr


# Environments in processes.


class HangOnce:
    """Hangs at one step in whichever process comes first; the file that it leaves says so."""

    def __init__(self, marker, how=lambda: threading.Event().wait()):
        self.marker, self.how = marker, how

    def __call__(self, env, what):
        if what == "step" and len(env.state.guesses) == 2:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return
            self.how()


@pytest.fixture
def processes():
    made = []

    def make(hook, num_envs=3):
        made.append(ProcessSlots([lambda: HookedEnv(hook)] * num_envs))
        return made[-1]

    yield make
    for slots in made:
        slots.close()


@pytest.mark.parametrize("policy", [Batched, Single])
def test_processes_give_the_same_forest(policy, processes):
    runner = AsyncRunner(processes(random_delays), allocator=trace(), budget=32, step_timeout=LONG)
    reference = lock_step(vector(nothing), guess, 3, allocator=trace(), budget=32)
    for _ in range(2):
        assert_same(runner.run_sync(policy(delays=random_delays), seed=3), reference)


def alive(slots):
    return [worker.process for worker in slots._workers if worker.process.is_alive()]


def test_a_process_that_hangs_is_replaced(processes, tmp_path):
    slots = processes(HangOnce(tmp_path / "hung"))
    before = alive(slots)
    runner = AsyncRunner(slots, allocator=trace(), budget=16, step_timeout=0.5)
    tree, node = only_timeout(runner.run_sync(Batched(), seed=0))
    assert node.depth == 3 and node.truncated and np.array_equal(node.observation, tree.nodes[node.parent].observation)
    assert len(alive(slots)) == 3 and sum(process.is_alive() for process in before) == 2
    reference = lock_step(vector(nothing), guess, 0, allocator=trace(), budget=16)
    assert_same(runner.run_sync(Batched(), seed=0), reference)


def test_a_process_that_hangs_is_an_error_if_asked(processes, tmp_path):
    slots = processes(HangOnce(tmp_path / "hung"))
    before = alive(slots)
    runner = AsyncRunner(slots, allocator=trace(), budget=16, step_timeout=0.5, on_timeout="raise")
    with pytest.raises(RolloutError, match=r"turn 3: The environment did not answer within 0\.5 s") as caught:
        runner.run_sync(Batched(), seed=0)
    assert_node(runner.forest, caught.value)
    assert len(alive(slots)) == 3 and not set(before) <= set(alive(slots))
    assert runner.run_sync(Batched(), seed=0).num_leaves == 16


def test_a_process_that_dies_is_an_error_and_replaced(processes, tmp_path):
    slots = processes(HangOnce(tmp_path / "died", lambda: os._exit(3)))
    runner = AsyncRunner(slots, allocator=trace(), budget=16)
    with pytest.raises(
        RolloutError, match=r"turn 3: the environment failed with SlotError: .*died \(exit code 3"
    ) as caught:
        runner.run_sync(Batched(), seed=0)
    assert_node(runner.forest, caught.value)
    reference = lock_step(vector(nothing), guess, 0, allocator=trace(), budget=16)
    assert_same(runner.run_sync(Batched(), seed=0), reference)


def test_cancellation_ends_a_process_that_hangs(processes, tmp_path):
    slots = processes(HangOnce(tmp_path / "hung"))
    before = alive(slots)
    runner = AsyncRunner(slots, allocator=trace(), budget=16)

    async def main():
        task = asyncio.create_task(runner.run(Batched(), seed=0))
        while not (tmp_path / "hung").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert len(alive(slots)) == 3 and not all(process.is_alive() for process in before)
    reference = lock_step(vector(nothing), guess, 0, allocator=trace(), budget=16)
    assert_same(runner.run_sync(Batched(), seed=0), reference)


# Errors.


class Broken(Exception):
    pass


@pytest.mark.parametrize("kind", [Broken, StopIteration, asyncio.CancelledError])
@pytest.mark.parametrize("policy", [Batched, Single])
@pytest.mark.parametrize("who", ["the policy", "the environment"])
def test_the_first_exception_names_its_node(who, policy, kind):
    calls, failing, lock = 0, True, threading.Lock()

    def fail(*_):
        nonlocal calls
        with lock:
            calls += 1
            mine = calls == 20 and failing
        if mine:
            raise kind("out of order")

    def hook(env, what):
        if who == "the environment" and what == "step":
            fail()

    def choose(context):
        if who == "the policy":
            fail()
        return guess(context)

    runner = AsyncRunner(vector(hook), allocator=trace(), budget=24)

    async def main():
        with pytest.raises(
            RolloutError, match=f"{who}.* failed with .*out of order|coroutine raised StopIteration"
        ) as caught:
            await runner.run(policy(choose), seed=0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "others went on"
        return caught.value

    error = asyncio.run(main())
    cause = error.__cause__
    assert isinstance(cause, kind) or isinstance(cause.__cause__, kind)
    assert_node(runner.forest, error)
    assert 0 < runner.forest.ledger.environment_turns == sum(len(t.nodes) - 1 for t in runner.forest)
    failing = False
    reference = lock_step(vector(nothing), guess, 0, allocator=trace(), budget=24)
    assert_same(runner.run_sync(Batched(), seed=0), reference)


def test_a_verdict_that_fails_names_the_terminal():
    runner = AsyncRunner(vector(nothing, verdict=False), allocator=trace(), budget=16)
    with pytest.raises(RolloutError, match=r"the verdict on the episode failed.*pass success=") as caught:
        runner.run_sync(Batched(), seed=0)
    tree = next(t for t in runner.forest if t.key == caught.value.tree)
    assert tree.nodes[caught.value.node].terminal and tree.nodes[caught.value.node].depth == caught.value.turn


def test_an_environment_that_cannot_be_opened_fails_as_it_is():
    def hook(env, what):
        if what == "reset":
            raise Broken("no such prompt")

    with pytest.raises(Broken, match="no such prompt"):
        AsyncRunner(vector(hook), budget=16).run_sync(Batched(), seed=0)


def test_a_policy_that_returns_too_little_is_named():
    class Forgetful(Batched):
        def act(self, contexts):
            return super().act(contexts)[1:]

    with pytest.raises(RolloutError, match=r"act\(\) was given (\d+) contexts and returned \d+ actions"):
        AsyncRunner(vector(nothing), allocator=trace(), budget=16).run_sync(Forgetful(), seed=0)


# Cancellation.


def cancelled(runner, policy, hung):
    """Cancels a run as soon as something hangs, in an event loop of its own."""

    async def main():
        task = asyncio.create_task(runner.run(policy, seed=0))
        assert await asyncio.to_thread(hung.reached.wait, LONG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.mark.parametrize("what", ["reset", "restore", "step"])
@pytest.mark.parametrize("policy", [Batched, Single])
def test_a_cancelled_run_stops_at_once_and_another_may_follow(what, policy, hang):
    hung = hang(5, what)
    envs = vector(hung)
    before = list(envs.envs)
    runner = AsyncRunner(envs, allocator=trace(), budget=24)
    cancelled(runner, policy(), hung)
    assert any(a is not b for a, b in zip(before, runner.slots.envs, strict=True))
    turns = sum(len(t.nodes) - 1 for t in runner.forest)
    assert runner.forest.ledger.environment_turns == turns and (turns > 0 or what != "step")
    reference = lock_step(vector(nothing), guess, 0, allocator=trace(), budget=24)
    assert_same(runner.run_sync(policy(), seed=0), reference)
    hung.release.set()  # what was left behind must not disturb
    assert_same(runner.run_sync(policy(), seed=0), reference)


def test_a_policy_that_hangs_can_be_cancelled(hang):
    hung = hang(3)

    class Policy(Batched):
        def act(self, contexts):
            hung(None, "step")
            return super().act(contexts)

    runner = AsyncRunner(vector(nothing), allocator=trace(), budget=24)
    cancelled(runner, Policy(), hung)
    reference = lock_step(vector(nothing), guess, 0, allocator=trace(), budget=24)
    assert_same(runner.run_sync(Policy(), seed=0), reference)


def test_an_interrupt_stops_run_sync(hang):
    hung = hang(7, then=lambda: os.kill(os.getpid(), signal.SIGINT))
    runner = AsyncRunner(vector(hung), allocator=trace(), budget=24)
    with pytest.raises(KeyboardInterrupt):
        runner.run_sync(Batched(), seed=0)
    assert sum(len(t.nodes) - 1 for t in runner.forest) > 0
    reference = lock_step(vector(nothing), guess, 0, allocator=trace(), budget=24)
    assert_same(runner.run_sync(Batched(), seed=0), reference)


def test_one_forest_at_a_time():
    runner = AsyncRunner(vector(nothing), allocator=trace(), budget=16)

    async def main():
        first = asyncio.create_task(runner.run(Single(), seed=0))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="collecting a forest already"):
            await runner.run(Single())
        with pytest.raises(RuntimeError, match=r"inside a running event loop.*await runner.run"):
            runner.run_sync(Single())
        return await first

    assert asyncio.run(main()).num_leaves == 16
