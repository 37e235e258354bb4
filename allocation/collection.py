"""`Collection`: one forest in the making; what every driver of rollouts shares.

Invariant: an edge is in the forest as soon as its step was taken, and what a driver is told to do next depends on the seed
and on the outcomes alone, never on the order in which slots happen to finish.

A driver opens the collection, then for each free slot asks `next` for a rollout, steps it, and tells `record` what came. The
randomness of a rollout is a function of the collection's seed, its tree and its number; so is that of planning a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from collections.abc import Collection as CollectionOf
from dataclasses import dataclass
from hashlib import blake2b
from itertools import repeat
from typing import Any

import numpy as np

from allocation.batching import value
from allocation.conversations import keep_messages, keep_opening
from allocation.endings import Ended
from allocation.methods.base import Allocator
from allocation.sample import Sample
from allocation.scheduler import Job, Scheduler
from allocation.tree import Forest, Node, Root, Tree, total_reward
from trace_envs.slots import Result, Slots

MAX_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy is asked to act on.

    Attributes:
        slot: Slot of the vector; a policy may keep caches by slot.
        tree: The prompt's tree so far.
        node: The prefix to act from; `tree.path(node)` leads to it from the root.
        observation: The environment's last observation.
        info: The environment's last info (`messages`, `tools`, ... for the environments of this package).
        seed: Seed of the rollout that asks, the same whatever the order in which rollouts ask; `None` for a prefix of no
            rollout.
    """

    slot: int
    tree: Tree
    node: Node
    observation: Any
    info: dict[str, Any]
    seed: int | None = None


Encode = Callable[[Sequence[Context]], tuple[np.ndarray, int]]
Success = Callable[[float, dict[str, Any]], bool]


@dataclass(slots=True)
class Rollout:
    """A job under way in a slot, the seed of what is random in it, and where it has got to since the episode began."""

    slot: int
    job: Job
    seed: int
    node: Node
    observation: Any
    info: dict[str, Any]
    total_reward: float = 0.0

    @property
    def context(self) -> Context:
        """What a policy has to act on."""
        return Context(self.slot, self.job.tree, self.node, self.observation, self.info, self.seed)

    @property
    def where(self) -> str:
        """Where it stands, in words, for the note on an exception."""
        node = self.node
        return f"tree {self.job.tree.key!r}, node {node.id} (turn {node.depth}), rollout {self.job.rollout}"


def random_seeds(rng: np.random.Generator, count: int) -> list[Root]:
    """The default source of prompts: a seed each, which for any environment is a way to start an episode."""
    return [Root(int(s)) for s in rng.integers(MAX_SEED, size=count)]


def rollout_seed(entropy: int, tree: int, rollout: int) -> int:
    """Returns the seed of a rollout: a function of the collection, the tree's index and the rollout's number."""
    # A hash, not a generator: making a generator takes longer than a step of a small environment.
    digest = blake2b(f"{entropy} {tree} {rollout}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % MAX_SEED


def _count_in(info: dict[str, Any], name: str) -> int:
    """Returns a count that environments of this package report; one of another package may mean something else by the name."""
    count = info.get(name, 0)
    return int(count) if isinstance(count, int | np.integer) else 0


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
        self.forest = Forest(slots=slots, success=success)
        self._slots = slots
        self._allocator = allocator
        self._budget = budget
        self._rng = rng
        self._success = success
        self._keep = keep_snapshots
        self._entropy = int(rng.integers(MAX_SEED))
        self._scheduler: Scheduler | None = None
        self._closed = False
        self._replayed = slots.replayed_turns()

    def open(self, candidates: Sequence[Root], encode: Encode | None = None, slot: int = 0) -> None:
        """Opens the candidates in one slot, one after the other, and runs the root stage.

        Args:
            candidates: The prompts to choose from.
            encode: Returns the candidates' hidden states, float32 [n, d], and the number of tokens computed for them.
            slot: Where.
        """
        if not candidates:
            raise ValueError("no candidate prompt: the source of roots returned an empty list")
        ledger = self.forest.ledger
        root_budget = self._allocator.root_budget(self._budget)
        opened = [self._open(root, slot) for root in candidates]
        trees = [context.tree for context in opened]
        if encode is not None:
            with ledger.timed("encode"):
                hidden, computed = encode(opened)
            ledger.prefilled_tokens += computed
            for tree, features in zip(trees, hidden, strict=True):
                tree.root.features = features
        rest = self._budget - root_budget
        with ledger.timed("allocate"):
            self._scheduler = Scheduler(self._allocator, self.forest, trees, root_budget, rest, self._rng)

    def close(self) -> None:
        """Lets `open` go no further: for a driver that leaves a thread behind in it."""
        self._closed = True

    def _open(self, root: Root, slot: int) -> Context:
        if self._closed:
            raise RuntimeError("the collection was closed while its candidates were opened")
        try:
            opened = self._slots.open(slot, root.seed, copy.deepcopy(root.options))  # it may take them apart
        except Exception as error:
            error.add_note(f"opening a prompt by reset(seed={root.seed}, options={root.options})")
            raise
        known = {"seed": root.seed, **opened.facts}
        key = str(opened.info.get("task_id", root.seed))
        tree = Tree(key, -1, opened.observation, known, start=root, carried=opened.carried)
        tree.root.snapshot, tree.root.info = opened.snapshot, opened.info
        keep_opening(tree, opened.info)
        return Context(slot, tree, tree.root, opened.observation, opened.info)

    @property
    def done(self) -> bool:
        """Whether all work is finished."""
        return self._scheduler is not None and self._scheduler.done

    def wanted(self, rollout: Rollout) -> bool:
        """Returns whether the moments of a rollout have to be kept; it does not change while the rollout lasts.

        A prompt's anchors are chosen when the last of its root rollouts is finished, and again after each wave of
        continuations but the last (`Allocator.allocate_prefixes`). So none lies on a continuation of the last wave, on a root
        rollout that was added afterwards, or in a tree without a budget of continuations, as every tree is where the
        allocator spends all of the budget on roots.
        """
        assert self._scheduler is not None
        return self._keep or self._scheduler.will_branch(rollout.job.tree)

    def next(self, slot: int) -> Rollout | None:
        """Sends a free slot to the next anchor; `None` if there is no work now (more may come as rollouts finish)."""
        rollout = self.take(slot)
        if rollout is not None:
            try:
                with self.forest.ledger.timed("restore"):
                    self._slots.restore(slot, rollout.node.snapshot, rollout.seed)
            except Exception as error:
                error.add_note(f"on the way back to {rollout.where}")
                raise
        return rollout

    def take(self, slot: int) -> Rollout | None:
        """Does what `next` does but leaves it to the driver to restore the slot to `rollout.node` with `rollout.seed`."""
        assert self._scheduler is not None
        job = self._scheduler.next()
        if job is None:
            return None
        ledger, tree, node = self.forest.ledger, job.tree, job.node
        seed = rollout_seed(self._entropy, tree.index, job.rollout)
        tree.rollout_seeds.extend([None] * (tree.num_rollouts - len(tree.rollout_seeds)))
        tree.rollout_seeds[job.rollout] = seed
        ledger.restores += 1
        if job.origin == "root":
            ledger.root_rollouts += 1
        else:
            ledger.continuations += 1
        return Rollout(slot, job, seed, node, node.observation, node.info or {}, total_reward(tree.path(node)))

    def record(self, rollout: Rollout, action: Any, sample: Sample | None, result: Result) -> bool:
        """Adds the edge that a step made and moves the rollout on; returns whether the rollout is over."""
        return bool(self.record_all([rollout], [value(action)], [sample], [result]))

    def record_all(
        self,
        rollouts: CollectionOf[Rollout],
        actions: Sequence[Any],
        samples: Sequence[Sample | None] | None,
        results: Sequence[Result],
    ) -> list[Rollout]:
        """Adds the edges that steps made and moves their rollouts on; returns the rollouts that are over.

        Args:
            rollouts: Those that stepped.
            actions: What each of them did; kept as they are, so they must be the forest's own.
            samples: The actions as sampled; `None` for a policy without tokens.
            results: What came.
        """
        ledger, ended = self.forest.ledger, []
        ledger.environment_turns += len(rollouts)
        each = repeat(None) if samples is None else samples
        # The tuples of `zip` and the results are taken apart in one go: no lookup by name in what is in every step.
        for rollout, action, sample, (observation, reward, terminated, truncated, info, taken) in zip(
            rollouts, actions, each, results, strict=False
        ):
            job, parent = rollout.job, rollout.node
            if sample is not None:
                self._count(job.tree, parent, sample)
            # What `Tree.add` does, without the call and by position.
            nodes = job.tree.nodes
            number = len(nodes)
            rollout.node = node = Node(
                number,
                parent.id,
                parent.depth + 1,
                job.origin,
                job.rollout,
                action,
                observation,
                sample,
                reward,
                terminated,
                truncated,
                taken,
                None if taken is None else info,
            )
            nodes.append(node)
            parent.children += (number,)
            if info:
                ledger.tool_calls += _count_in(info, "tool_calls") - _count_in(rollout.info, "tool_calls")
                node.tool_errors = _count_in(info, "tool_errors")
                node.tool_error = bool(info.get("tool_error", False))
            rollout.observation, rollout.info = observation, info
            rollout.total_reward += reward
            if terminated or truncated:
                ended.append(rollout)
        for rollout in ended:  # once all edges are there: the verdict may raise
            node = rollout.node
            try:
                # Without an answer of the environment there is nothing to judge.
                unanswered = isinstance(rollout.info, Ended)
                node.is_correct = not unanswered and bool(self._success(rollout.total_reward, rollout.info))
            except Exception as error:
                error.add_note(f"in {rollout.where}: the end of the episode")
                raise
            node.components = rollout.info.get("reward_components")
            keep_messages(rollout.job.tree, node, rollout.info, answered=not unanswered)
            if node.sample is not None and not node.sample.acted:
                ledger.unacted += 1
                ledger.environment_turns -= 1
            self._finish(rollout.job)
        return ended

    def _count(self, tree: Tree, parent: Node, sample: Sample) -> None:
        """Counts the tokens of a sample, and keeps what it says about the prefix that it left."""
        ledger = self.forest.ledger
        if sample.finish_reason == "error":
            pass  # where no answer came, nothing is known of the prefix
        elif parent.context_ids is None:
            parent.context_ids, parent.features = sample.context_ids, sample.features
        elif sample.context_ids is not parent.context_ids and not np.array_equal(
            sample.context_ids, parent.context_ids
        ):
            raise ValueError(
                f"two actions at node {parent.id} of tree {tree.key!r} were sampled after different context_ids "
                f"({len(parent.context_ids)} and {len(sample.context_ids)} ids): a policy must show a prefix in the same "
                "tokens each time"
            )
        ledger.prefilled_tokens += sample.prefilled
        if sample.generated is not None:  # an engine that counts and gives no ids: what it reused is its own business
            ledger.generated_tokens += sample.generated
            return
        ledger.generated_tokens += len(sample.action_ids)
        if len(sample.action_ids) or sample.prefilled:  # neither: the context did not fit, so nothing was reused
            ledger.cached_tokens += sum(n.num_tokens for n in tree.path(parent)) - sample.prefilled

    def _finish(self, job: Job) -> None:
        assert self._scheduler is not None
        ledger = self.forest.ledger
        with ledger.timed("allocate"):
            over = self._scheduler.finished(job)
        if over:
            # Not after every rollout: it asks all slots.
            replayed = self._slots.replayed_turns()
            ledger.replayed_turns += replayed - self._replayed
            self._replayed = replayed
        for tree in over:
            if not self._keep:
                tree.drop_snapshots()
