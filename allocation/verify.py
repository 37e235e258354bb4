"""`verify(forest, env)`: executes every recorded path again, from its reset, and compares what comes with what is recorded.

Invariant: nothing is restored here. A snapshot that misses part of the state shows as a continuation that differs from its
clean repetition, a hidden source of randomness as a difference anywhere.

A path is the way from a root to a node without children. The randomness of a rollout is a function of its seed
(`Tree.rollout_seeds`), so a path is repeated by the reset of its tree and, at the first edge of each rollout on it, a reseed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import gymnasium as gym
from gymnasium.vector import VectorEnv

from allocation.batching import value
from allocation.sample import TIMED_OUT
from allocation.tree import Forest, Node, Tree, total_reward
from trace_envs.slots import LocalSlots, Opened, Result, Slots, make_slots
from trace_envs.snapshots.compare import difference

REPEATS = 3
Success = Callable[[float, dict[str, Any]], bool]


class ForestVerificationError(AssertionError):
    """A path did not give the same again.

    Attributes:
        tree: Key of the tree.
        index: Its position in the forest.
        node: Id of the first node that differs.
        turn: The turn that led to it, from 1; 0 is the reset.
    """

    def __init__(self, tree: str, index: int, node: int, turn: int, message: str):
        super().__init__(tree, index, node, turn, message)
        self.tree, self.index, self.node, self.turn = tree, index, node, turn
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was executed again, and was the same.

    Attributes:
        trees: Number of trees.
        paths: Number of paths, one for each node without children.
        turns: Number of turns taken for them.
        verdicts: Number of terminals whose `is_correct` could be compared.
    """

    trees: int
    paths: int
    turns: int
    verdicts: int


class _Edge(NamedTuple):
    """What is compared of a turn."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    tool_error: bool


@dataclass(slots=True)
class _Walk:
    """A path under way in a slot: its nodes from the root, and how many of its turns were taken."""

    tree: Tree
    nodes: list[Node]
    taken: int = 0

    @property
    def over(self) -> bool:
        return self.taken == len(self.nodes) - 1


def verify(
    forest: Forest, envs: Slots | VectorEnv | gym.Env | None = None, *, success: Success | None = None
) -> VerifyReport:
    """Executes every path of a forest again and compares every observation, reward and flag.

    Rollouts that are not finished are compared as far as they have got.

    Args:
        forest: The forest.
        envs: Where to do it: slots, a vector or one environment, with the wrappers that the forest was collected with.
            `None` takes the environments that it was collected with; recorded episode statistics then count the repetitions
            too.
        success: The function that said what a success is; `None` takes the one that the forest was collected with, or
            `info["is_correct"]` where that is not known (it is neither copied nor pickled with the forest).

    Returns:
        What was compared.

    Raises:
        ForestVerificationError: The first difference, with its tree, node and turn.
        ValueError: There is no environment, it is still in use, or the forest was not collected by a driver of this package.
    """
    slots = _slots(forest, envs)
    success = success or forest.success
    paths = _paths(forest)
    walks: dict[int, _Walk] = {}
    count = turns = verdicts = 0
    while True:
        for slot in range(slots.num_slots):
            while slot not in walks and (walk := next(paths, None)) is not None:
                _begin(slots, slot, walk)
                count += 1
                if not walk.over:  # no rollout has left this root yet
                    walks[slot] = walk
        if not walks:
            return VerifyReport(len(forest), count, turns, verdicts)
        for slot, walk in walks.items():
            _reseed(slots, slot, walk)
        actions = {slot: value(walk.nodes[walk.taken + 1].action) for slot, walk in walks.items()}
        for slot, result in slots.step(actions).items():
            walk = walks[slot]
            walk.taken += 1
            turns += 1
            verdicts += _compare(slots, slot, walk, result, success)
            if walk.over:
                del walks[slot]


def _slots(forest: Forest, envs: Slots | VectorEnv | gym.Env | None) -> Slots:
    if any(tree.start is None for tree in forest):
        raise ValueError(
            "the forest does not say how its episodes began (Tree.start), so they cannot be repeated; collect it with "
            "TreeAllocationWrapper or another driver of this package"
        )
    chosen = forest.slots if envs is None else envs
    if chosen is None:
        raise ValueError(
            "the forest does not hold the environments that it was collected with (they are neither copied nor pickled); "
            "pass one: forest.verify(gym.make(...)), with the same wrappers"
        )
    slots = make_slots(chosen)
    if _shared(slots, forest.slots) and not all(tree.finished for tree in forest):
        raise ValueError(
            "the forest is not finished, and verifying would move the environments that it is being collected with; pass "
            "another one, with the same wrappers: forest.verify(gym.make(...))"
        )
    return slots


def _shared(one: Slots, other: Slots | None) -> bool:
    """Whether the slots have an environment in common."""
    if isinstance(one, LocalSlots) and isinstance(other, LocalSlots):
        return bool({id(env.unwrapped) for env in one.envs} & {id(env.unwrapped) for env in other.envs})
    return one is other


def _paths(forest: Forest) -> Iterator[_Walk]:
    for tree in forest:
        for node in tree.nodes:
            if not node.children:
                # A step that ran out of time has no result to compare, and may take as long again; without an action there
                # was none.
                timed_out = node.truncated and node.components == TIMED_OUT
                unacted = node.sample is not None and not node.sample.acted
                yield _Walk(tree, tree.path(node)[: -1 if timed_out or unacted else None])


def _begin(slots: Slots, slot: int, walk: _Walk) -> None:
    """Opens the episode of a path and compares the first observation."""
    tree = walk.tree
    found = difference(tree.root.observation, _open(slots, slot, tree).observation)
    if found is not None:
        _fail(
            walk, _joined("observation", found), "reset() does not give the same episode for the same seed and options"
        )


def _open(slots: Slots, slot: int, tree: Tree) -> Opened:
    assert tree.start is not None  # _slots has looked
    return slots.open(slot, tree.start.seed, copy.deepcopy(tree.start.options), tree.carried)


def _reseed(slots: Slots, slot: int, walk: _Walk) -> None:
    """Gives the randomness of a rollout at its first edge."""
    before, node = walk.nodes[walk.taken : walk.taken + 2]
    seed = walk.tree.rollout_seeds[node.rollout]
    if node.rollout != before.rollout and seed is not None:
        slots.reseed(slot, seed)


def _edge(result: Result) -> _Edge:
    tool_error = bool(result.info.get("tool_error", False))
    return _Edge(result.observation, result.reward, result.terminated, result.truncated, tool_error)


def _compare(slots: Slots, slot: int, walk: _Walk, result: Result, success: Success | None) -> int:
    """Compares what a turn gave with its node; returns how many verdicts were compared (0 or 1)."""
    node, again = walk.nodes[walk.taken], _edge(result)
    recorded = _Edge(node.observation, node.reward, node.terminated, node.truncated, node.tool_error)
    found = difference(recorded, again)
    if found is not None:
        _fail(walk, found.removeprefix("."), _diagnosis(slots, slot, walk, again))
    if node.is_correct is None or (success is None and "is_correct" not in result.info):
        return 0
    total = total_reward(walk.nodes)
    correct = bool(result.info["is_correct"] if success is None else success(total, result.info))
    if correct != node.is_correct:
        advice = "if another success=... said what a success is, pass it: forest.verify(success=...)"
        _fail(walk, f"is_correct: {node.is_correct} != {correct}", advice)
    return 1


def _diagnosis(slots: Slots, slot: int, walk: _Walk, once: _Edge) -> str:
    """Repeats the path a few times more, to tell a snapshot that misses something from what no seed reaches."""
    for _ in range(REPEATS):
        if difference(once, _repeated(slots, slot, walk)) is not None:
            return (
                "repeated once more it is another again: the environment has a source of randomness or state that no seed "
                "reaches; look for module-level generators, class attributes, caches"
            )
    first = next(n for n in walk.nodes if n.rollout == walk.nodes[walk.taken].rollout)
    return (
        f"repeated {REPEATS} times more it is as it was the first time, so the snapshot of node {first.parent} (turn "
        f"{first.depth - 1}), where its rollout began, or one before it misses part of the state"
    )


def _repeated(slots: Slots, slot: int, walk: _Walk) -> _Edge | None:
    """Takes the turns of a path as far as it has come; returns what the last one gave, `None` if the episode ended before."""
    again = _Walk(walk.tree, walk.nodes[: walk.taken + 1])
    _open(slots, slot, walk.tree)
    edge = None
    while not again.over:
        if edge is not None and (edge.terminated or edge.truncated):
            return None
        _reseed(slots, slot, again)
        again.taken += 1
        edge = _edge(slots.step({slot: value(again.nodes[again.taken].action)})[slot])
    return edge


def _joined(name: str, found: str) -> str:
    return name + found if found.startswith(("[", ".")) else f"{name}: {found}"


def _fail(walk: _Walk, found: str, advice: str) -> NoReturn:
    tree, node, turn = walk.tree, walk.nodes[walk.taken], walk.taken
    where = f"tree {tree.key!r} (number {tree.index}), node {node.id}, turn {turn}"
    message = (
        f"verify: {where}: recorded and repeated differ in {found}; {advice}; trace_envs.check_snapshot(env) says more"
    )
    raise ForestVerificationError(tree.key, tree.index, node.id, turn, message)
