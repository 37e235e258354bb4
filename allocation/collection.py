"""`Collection`: one forest in the making; what every driver of rollouts shares.

Invariant: an edge is in the forest as soon as its step was taken, and what a driver is told to do next depends on the seed
and on the outcomes alone, never on the order in which slots happen to finish.

A driver opens the collection, then for each free slot asks `next` for a rollout, steps it, and tells `record` what came. The
randomness of a rollout is a function of the collection's seed, its tree and its number; so is that of planning a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allocation.allocators import Allocator
from allocation.scheduler import Job, Scheduler
from allocation.tree import Forest, Node, Sample, Tree
from trace_envs.slots import Result, Slots

MAX_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Root:
    """How to start an episode on one prompt: the arguments of `reset`."""

    seed: int
    options: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy is asked to act on.

    Attributes:
        slot: Slot of the vector; a policy may keep caches by slot.
        tree: The prompt's tree so far.
        node: The prefix to act from; `tree.path(node)` leads to it from the root.
        observation: The environment's last observation.
        info: The environment's last info (`messages`, `tools`, ... for the environments of this package).
    """

    slot: int
    tree: Tree
    node: Node
    observation: Any
    info: dict[str, Any]


Encode = Callable[[Sequence[Context]], tuple[np.ndarray, int]]
Success = Callable[[float, dict[str, Any]], bool]


@dataclass(slots=True)
class Rollout:
    """A job under way in a slot, and where it has got to."""

    slot: int
    job: Job
    node: Node
    observation: Any
    info: dict[str, Any]

    @property
    def context(self) -> Context:
        """What a policy has to act on."""
        return Context(self.slot, self.job.tree, self.node, self.observation, self.info)


def random_seeds(rng: np.random.Generator, count: int) -> list[Root]:
    """The default source of prompts: a seed each, which for any environment is a way to start an episode."""
    return [Root(int(s)) for s in rng.integers(MAX_SEED, size=count)]


def default_success(total_reward: float, info: dict[str, Any]) -> bool:
    """The environment's own verdict.

    Raises:
        ValueError: The environment gives none.
    """
    if "is_correct" not in info:
        raise ValueError(
            "the environment gives no info['is_correct'] at the end of an episode; pass "
            "success=lambda total_reward, info: ... to TreeAllocationWrapper"
        )
    return bool(info["is_correct"])


class Collection:
    """Collects one forest.

    Args:
        slots: The environments.
        allocator: Where the budget goes.
        budget: Rollouts, root rollouts and continuations together.
        rng: Draws the candidates, breaks ties of the root stage, and seeds everything else.
        success: Called with the episode's return and last info; says whether it succeeded.
        keep_snapshots: Keep every node's snapshot and info after its tree is finished.
    """

    def __init__(
        self,
        slots: Slots,
        allocator: Allocator,
        budget: int,
        rng: np.random.Generator,
        *,
        success: Success = default_success,
        keep_snapshots: bool = False,
    ):
        self.forest = Forest()
        self._slots = slots
        self._allocator = allocator
        self._budget = budget
        self._rng = rng
        self._success = success
        self._keep = keep_snapshots
        self._entropy = int(rng.integers(MAX_SEED))
        self._scheduler: Scheduler | None = None
        self._replayed = slots.replayed_turns()

    def open(self, candidates: Sequence[Root], encode: Encode | None = None) -> None:
        """Opens the candidates in the first slot, one after the other, and runs the root stage.

        Args:
            candidates: The prompts to choose from.
            encode: Returns the candidates' hidden states, float32 [n, d], and the number of tokens computed for them.
        """
        if not candidates:
            raise ValueError("no candidate prompt: the source of roots returned an empty list")
        ledger = self.forest.ledger
        root_budget = self._allocator.root_budget(self._budget)
        opened = [self._open(root) for root in candidates]
        trees = [context.tree for context in opened]
        if encode is not None:
            with ledger.timed("encode"):
                hidden, computed = encode(opened)
            ledger.prefilled_tokens += computed
            for tree, features in zip(trees, hidden, strict=True):
                tree.root.features = features
        with ledger.timed("allocate"):
            counts = np.asarray(self._allocator.allocate_roots(trees, root_budget, self._rng))
        chosen = [(tree, int(m)) for tree, m in zip(trees, counts, strict=True) if m > 0]
        for index, (tree, _) in enumerate(chosen):
            tree.index = index
            self.forest.trees.append(tree)
        rest = self._budget - root_budget
        self._scheduler = Scheduler(self._allocator, self.forest, [m for _, m in chosen], rest, self._rng)

    def _open(self, root: Root) -> Context:
        opened = self._slots.open(0, root.seed, root.options)
        known = {"seed": root.seed, **opened.facts}
        tree = Tree(str(opened.info.get("task_id", root.seed)), -1, opened.observation, known)
        tree.root.snapshot, tree.root.info = opened.snapshot, opened.info
        return Context(0, tree, tree.root, opened.observation, opened.info)

    @property
    def done(self) -> bool:
        """Whether all work is finished."""
        return self._scheduler is not None and self._scheduler.done

    def next(self, slot: int) -> Rollout | None:
        """Sends a free slot to the next anchor; `None` if there is no work now (more may come as rollouts finish)."""
        assert self._scheduler is not None
        job = self._scheduler.next()
        if job is None:
            return None
        ledger = self.forest.ledger
        seed = int(np.random.default_rng([self._entropy, job.tree.index, job.rollout]).integers(MAX_SEED))
        with ledger.timed("restore"):
            self._slots.restore(slot, job.node.snapshot, seed)
        ledger.restores += 1
        if job.origin == "root":
            ledger.root_rollouts += 1
        else:
            ledger.continuations += 1
        return Rollout(slot, job, job.node, job.node.observation, job.node.info or {})

    def record(self, rollout: Rollout, action: Any, sample: Sample | None, result: Result) -> bool:
        """Adds the edge that a step made and moves the rollout on; returns whether the rollout is over."""
        tree, parent, ledger = rollout.job.tree, rollout.node, self.forest.ledger
        observation, reward, terminated, truncated, info, taken = result
        over = terminated or truncated
        ledger.environment_turns += 1
        ledger.tool_calls += int(info.get("tool_calls", 0)) - int(rollout.info.get("tool_calls", 0))
        if sample is not None:
            if parent.context_ids is None:
                parent.context_ids, parent.features = sample.context_ids, sample.features
            ledger.generated_tokens += len(sample.action_ids)
            ledger.prefilled_tokens += sample.prefilled
            if len(sample.action_ids) or sample.prefilled:  # neither: the context did not fit, so nothing was reused
                ledger.cached_tokens += sum(n.num_tokens for n in tree.path(parent)) - sample.prefilled
        node = tree.add(
            parent,
            rollout.job.rollout,
            rollout.job.origin,
            action=action,
            observation=observation,
            sample=sample,
            snapshot=taken,
            info=None if over else info,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            tool_errors=int(info.get("tool_errors", 0)),
            tool_error=bool(info.get("tool_error", False)),
        )
        rollout.node, rollout.observation, rollout.info = node, observation, info
        if over:
            node.is_correct = self._success(sum(n.reward for n in tree.path(node)), info)
            node.components = info.get("reward_components")
            self._finish(rollout.job)
        return over

    def _finish(self, job: Job) -> None:
        assert self._scheduler is not None
        ledger = self.forest.ledger
        with ledger.timed("allocate"):
            self._scheduler.finished(job)
        replayed = self._slots.replayed_turns()
        ledger.replayed_turns += replayed - self._replayed
        self._replayed = replayed
        if job.tree.finished and not self._keep:
            job.tree.drop_snapshots()
