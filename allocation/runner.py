"""`AsyncRunner`: each branch goes on as soon as it can, so that a slow tool holds up nobody else.

Invariant: for a policy whose action is a function of the prompt and the path, the forest is the one that
`TreeAllocationWrapper` collects (nodes in the order of `Tree.sort`), whatever the delays.

The collection decides and is called from the event loop alone; environments are opened, restored and stepped in a thread for
each slot, a batch policy acts in a thread of its own. What a policy may be:

* an object whose `act(contexts)` returns one action for each context: it is given all the branches that wait at the moment,
  while the others step (continuous batching);
* an object whose `act(context)` is a coroutine function, or such a function itself: it is awaited for each branch.

An action is a `Sample`, or, for environments that are not given text, the action itself.

Phases overlap here, so `ledger.seconds` counts busy time: `step` and `restore` are summed over the slots, and so is `generate`
for a coroutine; for a batch policy `generate` is the time of its calls. Their sum may exceed the wall-clock.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from allocation.allocators import make_allocator
from allocation.asking import AsyncFunction, AsyncPolicy, Batches, BatchPolicy, RolloutError, act_of, blamed, error_at
from allocation.batching import value
from allocation.collection import Collection, Encode, Rollout, Success, default_success, random_seeds
from allocation.endings import Ended, end_without_action, end_without_answer
from allocation.methods.base import Allocator
from allocation.predictor import Predictor
from allocation.sample import TIMED_OUT, Sample
from allocation.threads import Worker
from allocation.tree import Forest, Root
from trace_envs.slots import LocalSlots, Result, SlotError, Slots, make_slots

__all__ = ["AsyncPolicy", "AsyncRunner", "BatchPolicy", "RolloutError"]

logger = logging.getLogger(__name__)


class AsyncRunner:
    """Collects forests, each branch at its own pace.

    Args:
        envs: A vector of environments, or an environment for a row of one; see `trace_envs.slots.make_slots`.
        allocator: An allocator, or the name of one (`allocation.allocators.ALLOCATORS`).
        predictor: For an allocator given by name.
        budget: Rollouts in a forest, root rollouts and continuations together.
        roots: Source of candidate prompts; see `TreeAllocationWrapper`.
        encode: Called with the candidates' contexts before the root stage; see `TreeAllocationWrapper`.
        success: Called with the episode's return and last info; says whether it succeeded.
        keep_snapshots: Keep every node's snapshot and info after its tree is finished.
        max_concurrency: Most branches under way at once; `None` for as many as there are slots. Slots beyond it are spare.
        max_batch: Most contexts in one call of a batch policy; `None` for all that wait.
        step_timeout: Seconds that one step of an environment may take; `None` for no limit. Going back to an anchor may take
            as long for each turn on the way there.
        on_timeout: What becomes of a rollout whose step takes longer. `truncate` ends it there with a failure: a terminal
            node, truncated, reward 0, `is_correct` false, components `{"timed_out": 1.0}`, whose observation says so where
            observations are text and is the last one where they are not. `raise` is a `RolloutError`. Either way the
            environment is left to itself and replaced; a slot whose environment cannot be replaced is not used until its step
            has come back and another forest is begun.

    Attributes:
        forest: The forest of the last `run`; after an error or a cancellation, what was recorded until then.

    Raises:
        ValueError: An argument is out of range, or the allocator's name unknown.
        TypeError: The environments cannot be stepped one by one.
    """

    def __init__(
        self,
        envs: VectorEnv | gym.Env | Slots,
        *,
        allocator: Allocator | str = "trace",
        predictor: Predictor | None = None,
        budget: int = 64,
        roots: Callable[[np.random.Generator, int], Sequence[Root]] = random_seeds,
        encode: Encode | None = None,
        success: Success = default_success,
        keep_snapshots: bool = False,
        max_concurrency: int | None = None,
        max_batch: int | None = None,
        step_timeout: float | None = None,
        on_timeout: Literal["truncate", "raise"] = "truncate",
    ):
        for name, most in (("budget", budget), ("max_concurrency", max_concurrency), ("max_batch", max_batch)):
            if most is not None and most < 1:
                raise ValueError(f"{name} must be at least 1, got {most}")
        if step_timeout is not None and not step_timeout > 0:
            raise ValueError(f"step_timeout must be None or more than 0 seconds, got {step_timeout}")
        if on_timeout not in ("truncate", "raise"):
            raise ValueError(f"on_timeout must be 'truncate' or 'raise', got {on_timeout!r}")
        self.allocator = make_allocator(allocator, predictor=predictor) if isinstance(allocator, str) else allocator
        self.allocator.check(budget)
        self.slots = make_slots(envs)
        self.budget = budget
        self.max_concurrency, self.max_batch = max_concurrency, max_batch
        self.step_timeout, self.on_timeout = step_timeout, on_timeout
        self.forest = Forest()
        self._sources = roots
        self._encode = encode
        self._success = success
        self._keep_snapshots = keep_snapshots
        self._rng = np.random.default_rng()
        self._running = False
        self._workers = [Worker(f"slot {i}") for i in range(self.slots.num_slots)]
        self._policy_worker = Worker("policy")
        # Slots whose environment is beyond use although its thread is not held up: processes that died or were given up.
        self._broken: set[int] = set()
        self._replacing: dict[int, asyncio.Task[bool]] = {}

    async def run(
        self,
        policy: BatchPolicy | AsyncPolicy | AsyncFunction,
        *,
        seed: int | None = None,
        roots: Sequence[Root] | None = None,
    ) -> Forest:
        """Runs a policy until the budget is spent.

        It may be cancelled: no task is left, environments that were in the middle of something are replaced, what was
        recorded is in `forest`, and another run may follow.

        Args:
            policy: See the top of this module.
            seed: Seeds the choice of candidates, the allocation's ties and the environments' randomness. Without it the
                generator goes on where the last forest left it.
            roots: Candidate prompts; `None` draws them from the source.

        Returns:
            The finished forest, each tree sorted.

        Raises:
            RolloutError: The first thing that went wrong after the prompts were opened: in the policy, an environment or
                the verdict. The other branches are cancelled.
            TypeError: The policy is none.
        """
        act = act_of(policy)
        if self._running:
            raise RuntimeError("this runner is collecting a forest already; await that, or make another runner")
        self._running = True
        try:
            return await self._collect(act, seed, roots)
        finally:
            self._running = False

    def run_sync(
        self,
        policy: BatchPolicy | AsyncPolicy | AsyncFunction,
        *,
        seed: int | None = None,
        roots: Sequence[Root] | None = None,
    ) -> Forest:
        """Does what `run` does, in an event loop of its own; an interrupt (Ctrl-C) cancels it cleanly."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.run(policy, seed=seed, roots=roots))
        raise RuntimeError(
            "run_sync() was called inside a running event loop (a notebook?): await runner.run(...) there"
        )

    def close(self) -> None:
        """Closes the environments."""
        self.slots.close()

    async def _collect(self, act: Callable[..., Any], seed: int | None, roots: Sequence[Root] | None) -> Forest:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        rng = self._rng
        collection = Collection(
            self.slots, self.allocator, self.budget, rng, success=self._success, keep_snapshots=self._keep_snapshots
        )
        self.forest = collection.forest
        usable = await self._usable()
        if not usable:
            raise RuntimeError("every environment hangs and none can be replaced: make the runner anew")

        def open_candidates() -> None:
            drawn = self._sources(rng, self.allocator.pool_size(self.budget)) if roots is None else roots
            collection.open(list(drawn), self._encode, usable[0])

        if self._policy_worker.busy:
            self._policy_worker = Worker("policy")
        try:
            await self._in_slot(usable[0], open_candidates)
            await _Run(self, collection, act, usable).finish()
        except BaseException:
            collection.close()
            await self._usable()  # no environment is left hanging
            raise
        finally:
            for tree in self.forest:
                if tree.finished:
                    tree.sort()
        return self.forest

    async def _usable(self) -> list[int]:
        """Returns the slots that can be used; replaces environments that are in the middle of something, or broken."""
        held_up = [i for i, worker in enumerate(self._workers) if worker.busy or i in self._broken]
        held_up += self._replacing.keys() - set(held_up)
        replaced = dict(zip(held_up, await asyncio.gather(*map(self._replace, held_up)), strict=True))
        return [slot for slot in range(self.slots.num_slots) if replaced.get(slot, True)]

    async def _replace(self, slot: int) -> bool:
        """Leaves a slot's environment and thread to themselves and makes others; returns whether that was possible."""
        task = self._replacing.get(slot)
        if task is None:
            task = self._replacing[slot] = asyncio.create_task(self._make_another(slot))
            task.add_done_callback(lambda _: self._replacing.pop(slot, None))
        # A replacement that has begun is finished, whoever stops waiting for it: two at once would lose an environment.
        return await asyncio.shield(task)

    async def _make_another(self, slot: int) -> bool:
        worker = Worker(f"slot {slot}")
        try:
            await worker.call(self.slots.replace, slot)
        except Exception as error:
            logger.warning("slot %d is given up for now: %s", slot, error)
            return False
        self._workers[slot] = worker
        self._broken.discard(slot)
        return True

    async def _in_slot(self, slot: int, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return await self._workers[slot].call(function, *args)
        except (SlotError, TimeoutError) as error:
            if isinstance(error, SlotError) or not isinstance(self.slots, LocalSlots):
                self._broken.add(slot)
            raise


class _Run:
    """What is under way in one call of `AsyncRunner.run`."""

    def __init__(self, runner: AsyncRunner, collection: Collection, act: Callable[..., Any], usable: Sequence[int]):
        self._runner = runner
        self._collection = collection
        self._ledger = collection.forest.ledger
        self._act = act
        self._batches: Batches | None = None
        if not inspect.iscoroutinefunction(act):
            self._batches = Batches(act, runner._policy_worker, runner.max_batch, self._ledger)
        self._spare = deque(usable)
        self._drivers = min(len(usable), runner.max_concurrency or len(usable))
        self._more = asyncio.Event()

    async def finish(self) -> None:
        """Carries out all the work there is."""
        try:
            async with asyncio.TaskGroup() as group:
                batches = group.create_task(self._batches.serve()) if self._batches is not None else None
                drivers = [group.create_task(self._drive(self._spare.popleft())) for _ in range(self._drivers)]
                await asyncio.wait(drivers)
                if batches is not None:
                    batches.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0]  # noqa: B904 (it has its cause; the group says nothing more)

    async def _drive(self, slot: int) -> None:
        """Carries out rollouts in one slot, and in another when that is lost."""
        while (rollout := await self._take(slot)) is not None:
            if await self._carry_out(rollout):
                continue
            if not self._spare:
                self._drivers -= 1
                if not self._drivers and not self._collection.done:
                    raise error_at(
                        rollout, rollout.node.depth, "no slot is left: its environment hung and has no successor"
                    )
                return
            slot = self._spare.popleft()

    async def _take(self, slot: int) -> Rollout | None:
        """Waits for the next rollout; `None` when all work is finished."""
        while not self._collection.done:
            rollout = self._collection.take(slot)
            if rollout is not None:
                return rollout
            await self._more.wait()
        return None

    async def _carry_out(self, rollout: Rollout) -> bool:
        """Goes from the anchor to a terminal; returns whether the slot can be used further."""
        await self._restore(rollout)
        over = False
        while not over:
            answer = await self._ask(rollout)
            action, sample = (answer.text, answer) if isinstance(answer, Sample) else (value(answer), None)
            if sample is not None and not sample.acted:
                result = end_without_action(rollout, sample)
            else:
                # The environment gets a copy: it may change its argument, which is still to be recorded.
                result = await self._step(rollout, value(action))
            with blamed(rollout, 0, "the verdict on the episode"):
                over = self._collection.record(rollout, action, sample, result)
        self._more.set()
        self._more = asyncio.Event()
        hangs = isinstance(result.info, Ended) and (sample is None or sample.acted)
        return not hangs or await self._runner._replace(rollout.slot)

    async def _restore(self, rollout: Rollout) -> None:
        runner, node = self._runner, rollout.node
        limit = None if runner.step_timeout is None else runner.step_timeout * (node.depth + 1)
        what = "going back to this node" + ("" if limit is None else f" (within {limit:g} s)")
        # Environments in processes keep the time themselves, as in a step.
        local = isinstance(runner.slots, LocalSlots)
        with blamed(rollout, 0, what), self._ledger.timed("restore"):
            async with asyncio.timeout(limit if local else None):
                await runner._in_slot(rollout.slot, self._go_back, rollout, limit)

    def _go_back(self, rollout: Rollout, limit: float | None) -> None:
        slots = self._runner.slots
        slots.restore(rollout.slot, rollout.node.snapshot, rollout.seed)
        slots.settle(rollout.slot, limit)

    async def _ask(self, rollout: Rollout) -> Any:
        if self._batches is not None:
            return await self._batches.ask(rollout)
        with blamed(rollout, 1, "the policy"), self._ledger.timed("generate"):
            answer = await self._act(rollout.context)
        self._ledger.model_calls += 1
        return answer

    async def _step(self, rollout: Rollout, action: Any) -> Result:
        runner, limit, began = self._runner, self._runner.step_timeout, time.perf_counter()
        # Environments in processes keep the time themselves; no thread of theirs may be left reading what comes next.
        local, keep = isinstance(runner.slots, LocalSlots), self._collection.wanted(rollout)
        with blamed(rollout, 1, "the environment"), self._ledger.timed("step"):
            try:
                async with asyncio.timeout(limit if local else None):
                    return await runner._in_slot(rollout.slot, runner.slots.step_one, rollout.slot, action, keep, limit)
            except TimeoutError as error:
                if limit is None or time.perf_counter() - began < limit:
                    raise  # the environment's own
                sentence = f"The environment did not answer within {limit:g} s."
                if runner.on_timeout == "raise":
                    raise error_at(rollout, rollout.node.depth + 1, sentence) from error
        self._ledger.timeouts += 1
        logger.warning("tree %r, turn %d: %s", rollout.job.tree.key, rollout.node.depth + 1, sentence)
        return end_without_answer(rollout, TIMED_OUT, sentence)
