"""Trees of rollouts: what was sampled, from where, and what it was worth.

Invariant: a node's parent has a smaller id, so one pass over the ids in reverse order is bottom-up; every terminal of every
rollout stays in the tree.

Words (docs/algorithm.md): an *edge* is a turn and is stored on the node that it leads to; a *root rollout* starts at the
prompt, a *continuation* at an inner prefix; both end at a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from allocation.ledger import Ledger
from allocation.sample import Sample

if TYPE_CHECKING:
    import gymnasium as gym
    from datasets import Dataset
    from gymnasium.vector import VectorEnv

    from allocation.export.rows import RolloutRecord
    from allocation.verify import VerifyReport
    from trace_envs.slots import Slots

Origin = Literal["root", "continuation"]


@dataclass(slots=True)
class Node:
    """A prefix: the history up to the end of a turn. Depth 0 is the root.

    Attributes:
        id: Position in the tree's list of nodes.
        parent: Id of the prefix before this turn; `None` at the root.
        depth: Number of turns taken.
        origin: Whether a root rollout or a continuation made the edge into this node.
        rollout: Number of the rollout (within the tree) that made it; -1 at the root.
        action: The action of the turn, as the environment was given it (text for the environments of this package).
        observation: What the environment answered (the prompt at the root).
        sample: Token ids and log-probs of the turn; `None` at the root and for policies without tokens.
        reward: Reward of the edge.
        terminated, truncated: How the episode stood after the edge.
        snapshot: The environment at this prefix; `None` at terminals, where none can be needed (`Collection.wanted`), and
            after `Tree.drop_snapshots`.
        info: The environment's info at this prefix; kept and dropped with the snapshot.
        context_ids: Tokens shown after this node's action and before the next, shared by every action sampled here.
        features: Hidden state at the end of this prefix; `None` until an action was sampled here.
        children: Ids of the nodes one turn further.
        is_correct: The environment's own verdict; `None` before the end.
        tool_errors: Malformed or refused calls up to here.
        tool_error: Whether this turn was one.
        components: Named scores of the outcome, where the environment gives them at the end.
        predicted: Predicted chance of success when the allocator last looked; `None` if it never did.
        messages: What the environment told the agent in this turn, as chat messages (the whole opening at the root); `None`
            where it keeps no conversation, and before a rollout through here has ended.
    """

    id: int
    parent: int | None
    depth: int
    origin: Origin
    rollout: int
    action: Any = ""
    observation: Any = ""
    sample: Sample | None = None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    snapshot: Any = None
    info: dict[str, Any] | None = None
    context_ids: np.ndarray | None = None
    features: np.ndarray | None = None
    children: tuple[int, ...] = ()
    is_correct: bool | None = None
    tool_errors: int = 0
    tool_error: bool = False
    components: Mapping[str, float] | None = None
    predicted: float | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None

    @property
    def terminal(self) -> bool:
        """Whether the episode ended here."""
        return self.terminated or self.truncated

    @property
    def num_tokens(self) -> int:
        """Tokens that this turn added to the context: those of the action and those shown after it."""
        action = 0 if self.sample is None else len(self.sample.action_ids)
        return action + (0 if self.context_ids is None else len(self.context_ids))


class Root(NamedTuple):
    """How to start an episode on one prompt: the arguments of `reset`."""

    seed: int
    options: dict[str, Any] | None = None


def total_reward(path: Sequence[Node]) -> float:
    """Returns the return of a path, added up from the root as a rollout does (`sum` rounds otherwise in newer Pythons)."""
    total = 0.0
    for node in path:
        total += node.reward
    return total


class Tree:
    """All rollouts of one prompt.

    Args:
        key: Name of the prompt: its task id, or its seed.
        index: Position in the forest.
        observation: First observation.
        info: What is known of the prompt and worth keeping with it (plain data).
        start: How its episode was opened: the arguments of `reset`; `None` for a tree that no driver made.
        carried: State that the wrappers brought with them into that episode; see `trace_envs.slots.Opened`.

    Attributes:
        rollout_seeds: By number of a rollout, the seed that was given when its anchor was restored: what was random in it is
            a function of this seed. `None` for one that has not begun.
        num_rollouts: Rollouts planned so far, root rollouts and continuations together.
        phases: By number of a rollout, when it was decided on: 0 before anything of this batch was seen, and one more for each
            planning that saw the outcomes of the phases before it. A tree that no scheduler planned has one phase of root
            rollouts and one of continuations.
        loss_weight: What the tree counts in the loss; 1 is its even share, 0 leaves it out (`Allocator.loss_weights`).
        tools: Schemas of the tools that the agent was offered; empty where the environment reports none.
        finished: Whether all of them have ended and none will be added; what was kept to branch the tree may go then.
    """

    def __init__(
        self,
        key: str,
        index: int,
        observation: Any,
        info: dict[str, Any] | None = None,
        *,
        start: Root | None = None,
        carried: tuple[tuple[str, Mapping[str, Any]], ...] = (),
    ):
        self.key = key
        self.index = index
        self.info = info or {}
        self.start = start
        self.carried = carried
        self.rollout_seeds: list[int | None] = []
        self.nodes: list[Node] = [Node(0, None, 0, "root", -1, observation=observation)]
        self.num_rollouts = 0
        self._phases: list[int] | None = None
        self.loss_weight = 1.0
        self.tools: tuple[Mapping[str, Any], ...] = ()
        self.finished = False

    @property
    def root(self) -> Node:
        """The prompt."""
        return self.nodes[0]

    @property
    def phases(self) -> Sequence[int]:
        """By number of a rollout, when it was decided on; see the class."""
        if self._phases is not None:
            return self._phases
        origins = {n.rollout: n.origin for n in reversed(self.nodes[1:])}
        return [int(origins.get(number) == "continuation") for number in range(1 + max(origins, default=-1))]

    def plan(self, phase: int) -> int:
        """Counts one more rollout, decided on in the given phase, and returns its number."""
        if self._phases is None:
            self._phases = []
        self._phases.append(phase)
        self.num_rollouts += 1
        return self.num_rollouts - 1

    def add(
        self,
        parent: Node,
        rollout: int,
        origin: Origin,
        action: Any = "",
        observation: Any = "",
        sample: Sample | None = None,
        reward: float = 0.0,
        terminated: bool = False,
        truncated: bool = False,
        snapshot: Any = None,
        info: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Node:
        """Adds the node that one turn from `parent` led to; for the arguments see `Node`."""
        if parent.terminated or parent.truncated:
            raise ValueError(f"node {parent.id} of tree {self.key!r} is terminal; nothing can follow it")
        nodes = self.nodes
        number = len(nodes)
        node = Node(
            number,
            parent.id,
            parent.depth + 1,
            origin,
            rollout,
            action,
            observation,
            sample,
            reward,
            terminated,
            truncated,
            snapshot,
            info,
            **fields,
        )
        nodes.append(node)
        parent.children += (number,)
        return node

    def path(self, node: Node) -> list[Node]:
        """Returns the nodes from the root to `node`, both included."""
        path = [node]
        while node.parent is not None:
            node = self.nodes[node.parent]
            path.append(node)
        return path[::-1]

    def full(self, node: Node) -> bool:
        """Returns whether a policy found no room for an action after a prefix: no rollout from there can go on."""
        followed = (self.nodes[child].sample for child in node.children)
        return any(sample is not None and sample.finish_reason == "context" for sample in followed)

    def leaves(self, origin: Origin | None = None) -> list[Node]:
        """Returns the terminals, those of one origin only if it is named."""
        return [n for n in self.nodes if n.terminal and origin in (None, n.origin)]

    def returns(self) -> np.ndarray:
        """Returns the sum of rewards from the root to each node, float64 [nodes]."""
        total = np.zeros(len(self.nodes))
        for node in self.nodes[1:]:
            total[node.id] = total[node.parent] + node.reward
        return total

    def values(self, kind: Literal["reward", "success"] = "reward") -> np.ndarray:
        """Returns bottom-up values: a leaf has its outcome, an inner node the mean of its children (TRACE, predictor targets).

        Args:
            kind: The outcome of a leaf: its return, or the environment's success flag.

        Returns:
            Float64 [nodes]; NaN where no terminal lies below.
        """
        value = np.full(len(self.nodes), np.nan)
        returns = self.returns() if kind == "reward" else None
        for node in reversed(self.nodes):
            if node.terminal:
                value[node.id] = returns[node.id] if returns is not None else float(bool(node.is_correct))
            else:
                below = [value[c] for c in node.children if not np.isnan(value[c])]
                if below:
                    value[node.id] = sum(below) / len(below)
        return value

    def weights(self) -> np.ndarray:
        """Returns each node's share of its tree: 1 at the root, divided evenly among children. Float64 [nodes]."""
        weight = np.zeros(len(self.nodes))
        weight[0] = 1.0
        for node in self.nodes[1:]:
            weight[node.id] = weight[node.parent] / len(self.nodes[node.parent].children)  # type: ignore[index]
        return weight

    def outcome_counts(self, origin: Origin | None = None) -> tuple[int, int]:
        """Returns the numbers of successful and failed terminals."""
        leaves = self.leaves(origin)
        successes = sum(bool(n.is_correct) for n in leaves)
        return successes, len(leaves) - successes

    def sort(self) -> None:
        """Renumbers the nodes by rollout, then depth: an order that does not depend on which rollout stepped first.

        Only for a finished tree: ids that were read before are no longer those of the same nodes. Parents stay before their
        children, since a rollout has a larger number than the one that its anchor belongs to.
        """
        self.nodes.sort(key=lambda n: (n.rollout, n.depth))
        new = {node.id: position for position, node in enumerate(self.nodes)}
        for node in self.nodes:
            node.id = new[node.id]
            node.parent = None if node.parent is None else new[node.parent]
            node.children = tuple(sorted(new[child] for child in node.children))

    def drop_snapshots(self) -> None:
        """Forgets the environments' states, which only the driver needs."""
        for node in self.nodes:
            node.snapshot = node.info = None


@dataclass
class Forest:
    """The trees of one batch, and what they cost.

    Attributes:
        trees: The trees.
        ledger: What they cost.
        slots: The environments that they were collected with; not copied or pickled along.
        success: What said which outcomes are successes; not copied or pickled along.
    """

    trees: list[Tree] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    slots: Slots | None = field(default=None, repr=False, compare=False)
    success: Callable[[float, dict[str, Any]], bool] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the environments behind: they may be processes."""
        return {**self.__dict__, "slots": None, "success": None}

    def __iter__(self) -> Iterator[Tree]:
        return iter(self.trees)

    def __len__(self) -> int:
        return len(self.trees)

    @property
    def num_leaves(self) -> int:
        """Number of terminals in all trees."""
        return sum(len(tree.leaves()) for tree in self.trees)

    def verify(
        self,
        envs: Slots | VectorEnv | gym.Env | None = None,
        *,
        success: Callable[[float, dict[str, Any]], bool] | None = None,
    ) -> VerifyReport:
        """Executes every recorded path again and compares what comes; see `allocation.verify.verify`.

        Args:
            envs: Where to do it; `None` takes the environments that the forest was collected with.
            success: What says which outcomes are successes; `None` takes the function that the forest was collected with.

        Raises:
            ForestVerificationError: The first difference, with its tree, node and turn.
        """
        from allocation.verify import verify  # which imports this module

        return verify(self, envs, success=success)

    def rollouts(self, advantages: np.ndarray | None = None) -> list[RolloutRecord]:
        """Returns a record of every finished rollout, for `allocation.export`; see `export.rows.rollout_records`."""
        from allocation.export.rows import rollout_records  # which imports this module

        return rollout_records(self, advantages)

    def to_dataset(self, advantages: np.ndarray | None = None) -> Dataset:
        """Returns the finished rollouts as a `datasets.Dataset`, a row each; see `allocation.export.datasets`.

        Args:
            advantages: Advantage of the edge into each node, float [nodes of all trees], roots included.

        Raises:
            ImportError: The package `datasets` is not installed.
        """
        from allocation.export.datasets import to_dataset

        return to_dataset(self.rollouts(advantages))

    def effective_ratio(self, origin: Origin | None = None) -> float:
        """Returns the share of prompts with both successes and failures among their terminals.

        Args:
            origin: `root` for the ratio over root rollouts alone; `None` for whole trees (larger wherever trees branch).
        """
        counts = [tree.outcome_counts(origin) for tree in self.trees]
        counts = [c for c in counts if sum(c)]
        return sum(s > 0 and f > 0 for s, f in counts) / len(counts) if counts else 0.0
