"""A forest as one record for each rollout: what every export format is made from.

Invariant: a record's ids are the prompt's and, turn by turn, what was sampled and what was shown before the next action, as
they were; it ends with the last token that was sampled, since what was observed after that no policy was shown. Without the
turns that `shared_turns` counts, the `loss_mask`s of a forest's records cover each sampled token exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from allocation.sample import TIMED_OUT, UNACTED
from allocation.tree import Forest, Node, Origin, Tree
from allocation.tree_record import as_text
from trace_envs.messages import encodable

_NO_ANSWER = (TIMED_OUT, *UNACTED.values())


@dataclass(frozen=True, slots=True, eq=False)
class RolloutRecord:
    """One rollout from the prompt to its end; a continuation's record begins at the prompt too.

    p prompt tokens, c tokens after the prompt, t turns.

    Attributes:
        task_id: Name of the prompt: the tree's key.
        tree: The tree's index in its forest.
        rollout: Number within the tree of the rollout that reached the end.
        origin: Whether that was a root rollout or a continuation.
        nodes: Ids of the path's nodes, the root first, int64 [t + 1].
        has_ids: Whether the policy gave token ids; the token fields are empty if not.
        prompt_ids: Int64 [p].
        completion_ids: Actions and observations after the prompt, int64 [c].
        loss_mask: 1 for tokens that the policy sampled, 0 for those that it was shown, int8 [c].
        logprobs: Of the sampled tokens under the distribution that sampled them, in nats; 0 for the others; float32 [c].
        turn_ids: Turn of each token, from 0; an observation belongs to the turn that it answers; int64 [c].
        rewards: Reward of each turn, float64 [t].
        advantages: Advantage of each turn, float64 [t]; `None` if none were given.
        finish_reasons: Why each action ended (`Sample.finish_reason`), [t]; `context` and `error` in the last place say that
            there was no action.
        versions: Updates that the weights had seen which sampled each action, int64 [t].
        is_correct: The environment's own verdict.
        terminated: The episode came to an end of its own.
        truncated: It was cut off.
        components: Named scores of the outcome; empty where there are none.
        messages: The conversation as OpenAI-style chat messages, every text encodable. Environments that keep none are told as
            `user` (observations) and `assistant` (actions); what is no text as its `repr`.
        tools: Schemas of the tools that the agent was offered.
    """

    task_id: str
    tree: int
    rollout: int
    origin: Origin
    nodes: np.ndarray
    has_ids: bool
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    turn_ids: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray | None
    finish_reasons: tuple[str, ...]
    versions: np.ndarray
    is_correct: bool
    terminated: bool
    truncated: bool
    components: Mapping[str, float]
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]

    @property
    def group(self) -> str:
        """What the records of one tree have in common and those of others do not."""
        return f"{self.tree}/{self.task_id}"

    @property
    def total_reward(self) -> float:
        """The return, added up turn by turn as the rollout did."""
        total = 0.0
        for reward in self.rewards.tolist():
            total += reward
        return total

    @property
    def num_actions(self) -> int:
        """Turns in which there was an action."""
        return sum(reason not in UNACTED for reason in self.finish_reasons)

    def mask(self, first_turn: int = 0) -> np.ndarray:
        """Returns which tokens to train on, int8 [c]: those sampled in the given turn or later."""
        return self.loss_mask * (self.turn_ids >= first_turn).astype(np.int8)

    def token_rewards(self) -> np.ndarray:
        """Returns the reward of each turn at its last sampled token and 0 elsewhere, float64 [c].

        A turn without tokens leaves its reward to the turn before it, and the first turns to the one after. All is lost if
        nothing was sampled at all.
        """
        placed = np.zeros(len(self.completion_ids))
        sampled = np.flatnonzero(self.loss_mask)
        if len(sampled):
            # The last sampled token of each turn or of one before it.
            upto = np.searchsorted(self.turn_ids[sampled], np.arange(len(self.rewards)), side="right")
            first = upto[np.argmax(upto > 0)]
            np.add.at(placed, sampled[np.maximum(upto, first) - 1], self.rewards)
        return placed

    def token_advantages(self) -> np.ndarray:
        """Returns the advantage of each sampled token's turn and 0 elsewhere, float64 [c].

        Raises:
            ValueError: The records were made without advantages.
        """
        if self.advantages is None:
            raise ValueError("these records hold no advantages; make them by forest.rollouts(advantages=...)")
        return self.advantages[self.turn_ids] * self.loss_mask

    def __eq__(self, other: object) -> bool:
        """Compares everything, arrays with their types."""
        if not isinstance(other, RolloutRecord):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]  # it holds arrays


def rollout_records(
    forest: Forest | Sequence[Tree], advantages: np.ndarray | Sequence[float] | None = None
) -> list[RolloutRecord]:
    """Returns a record of every finished rollout, tree by tree, and in a tree in the order of the last nodes' ids.

    Args:
        forest: A forest, or some trees.
        advantages: Advantage of the edge into each node, float [nodes of all trees], in the order of a `ForestTable`, such as
            `Update.credit.advantage`; roots have an entry that is not read.

    Raises:
        ValueError: There is not one advantage for each node, or a sample has not one log-prob for each token.
    """
    trees = list(forest)
    sizes = [len(tree.nodes) for tree in trees]
    if advantages is not None:
        advantages = np.asarray(advantages, dtype=np.float64)
        if advantages.shape != (sum(sizes),):
            raise ValueError(
                f"advantages must have one entry for each of the forest's {sum(sizes)} nodes, roots included, "
                f"got shape {advantages.shape}"
            )
    records, start = [], 0
    for tree, size in zip(trees, sizes, strict=True):
        mine = None if advantages is None else advantages[start : start + size]
        records += _tree_records(tree, mine)
        start += size
    return records


def records_of(rollouts: Forest | Sequence[RolloutRecord]) -> list[RolloutRecord]:
    """Returns the records of a forest, or those given."""
    return rollout_records(rollouts) if isinstance(rollouts, Forest) else list(rollouts)


def shared_turns(records: Sequence[RolloutRecord]) -> list[int]:
    """Returns how many of each record's first turns an earlier one of these records holds too.

    Args:
        records: Some records of one forest; those left out are not counted as earlier ones.
    """
    seen: set[tuple[str, int]] = set()
    shared = []
    for record in records:
        edges = [(record.group, node) for node in record.nodes[1:].tolist()]
        shared.append(sum(edge in seen for edge in edges))  # a path: what was seen comes first
        seen.update(edges)
    return shared


def masks_of(records: Sequence[RolloutRecord], once: bool) -> list[np.ndarray]:
    """Returns each record's mask; with `once`, of every token in the first record alone that holds it."""
    first = shared_turns(records) if once else [0] * len(records)
    return [record.mask(turn) for record, turn in zip(records, first, strict=True)]


def _tree_records(tree: Tree, advantages: np.ndarray | None) -> list[RolloutRecord]:
    tools = tuple(_encodable(tool) for tool in tree.tools)
    records: list[RolloutRecord] = []
    for leaf in tree.leaves():
        path = tree.path(leaf)
        edges = path[1:]
        told = all(n.messages is not None for n in path)
        has_ids = _has_ids(path)
        records.append(
            RolloutRecord(
                task_id=encodable(tree.key),
                tree=tree.index,
                rollout=leaf.rollout,
                origin=leaf.origin,
                nodes=np.array([n.id for n in path], dtype=np.int64),
                has_ids=has_ids,
                **_tokens(tree, path if has_ids else path[:1]),
                rewards=np.array([n.reward for n in edges], dtype=np.float64),
                advantages=None if advantages is None else advantages[[n.id for n in edges]],
                finish_reasons=tuple("stop" if n.sample is None else n.sample.finish_reason for n in edges),
                versions=np.array([0 if n.sample is None else n.sample.version for n in edges], dtype=np.int64),
                is_correct=bool(leaf.is_correct),
                terminated=bool(leaf.terminated),
                truncated=bool(leaf.truncated),
                components={name: float(x) for name, x in (leaf.components or {}).items()},
                messages=tuple(_told(path) if told else _retold(path)),
                tools=tools,
            )
        )
    return records


def _has_ids(path: Sequence[Node]) -> bool:
    """Returns whether a path's tokens are known: those of its prompt, and of all that was done after it."""
    samples = [n.sample for n in path[1:]]
    if any(sample is None or (sample.acted and sample.generated is not None) for sample in samples):
        return False
    return _length(path[0].context_ids) > 0 or not any(sample is not None and sample.acted for sample in samples)


def _length(ids: np.ndarray | None) -> int:
    return 0 if ids is None else len(ids)


def _tokens(tree: Tree, path: Sequence[Node]) -> dict[str, np.ndarray]:
    """Returns the token fields of a record."""
    ids, logprobs, mask, turns, end = [], [], [], [], 0
    for turn, node in enumerate(path[1:]):
        sample = node.sample
        assert sample is not None
        sampled = len(sample.action_ids)
        if sampled != len(sample.logprobs):
            raise ValueError(
                f"node {node.id} of tree {tree.key!r} has {sampled} action_ids and {len(sample.logprobs)} logprobs: "
                "a policy must give one log-prob for each sampled token"
            )
        shown = _length(node.context_ids)
        ids += [sample.action_ids, () if node.context_ids is None else node.context_ids]
        logprobs += [sample.logprobs, np.zeros(shown)]
        mask += [np.ones(sampled), np.zeros(shown)]
        turns.append(np.full(sampled + shown, turn))
        if sampled:
            end = sum(map(len, turns)) - shown

    def joined(parts: Sequence[Any], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=dtype), *(np.asarray(part, dtype=dtype) for part in parts)])[:end]

    prompt = path[0].context_ids
    return {
        "prompt_ids": np.zeros(0, dtype=np.int64) if prompt is None else np.array(prompt, dtype=np.int64),
        "completion_ids": joined(ids, np.int64),
        "loss_mask": joined(mask, np.int8),
        "logprobs": joined(logprobs, np.float32),
        "turn_ids": joined(turns, np.int64),
    }


def _told(path: Sequence[Node]) -> list[dict[str, Any]]:
    """Returns the conversation as the environment keeps it, with the actions as they were given to it."""
    messages: list[dict[str, Any]] = []
    for node in path:
        if node.parent is not None and _acted(node):
            messages.append({"role": "assistant", "content": encodable(as_text(node.action))})
        messages += [_encodable(m) for m in node.messages or ()]
    return messages


def _retold(path: Sequence[Node]) -> list[dict[str, Any]]:
    """Returns a conversation made from actions and observations."""
    messages = []
    for node in path:
        if node.parent is not None and _acted(node):
            messages.append({"role": "assistant", "content": encodable(as_text(node.action))})
        observed = encodable(as_text(node.observation))
        if observed and (node.components is None or dict(node.components) not in _NO_ANSWER):
            messages.append({"role": "user", "content": observed})
    return messages


def _acted(node: Node) -> bool:
    return node.sample is None or node.sample.acted


def _encodable(value: Any) -> Any:
    """Returns plain data with every text in it encodable."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {encodable(str(name)): _encodable(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(x) for x in value]
    return value


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=True)
    return type(left) is type(right) and left == right
