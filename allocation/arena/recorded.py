"""A recorded dense forest as a world: rollouts are looked up, never generated.

Invariant: everything in a replayed forest was recorded, node by node, and no recorded rollout is used twice in a tree while the
record holds another one for the same prefix.

A root rollout is one of the prompt's spines. A continuation is the rest of any recorded rollout of the prompt that passes
through the same prefix, all of which are draws from the same distribution: those recorded as continuations of that very
prefix, and, where different rollouts came to the same prefix word for word, those of the others too. A rollout serves once in
a tree, whether as a whole or from some prefix on. When none is left, all are there again; `RecordedTree.repeats` counts the
rollouts that were taken once more.

There are no texts and no log-probabilities in the record: `Sample.text` is empty and `Sample.logprobs` and all token ids are
zeros of the right length.

A prefix that a continuation came to has as a rule no other rollout through it. Branching there takes the rest of that very
rollout again: counted, and without contrast. So a method that branches off continuations, wave after wave, is shown at a
disadvantage that grows with its share of repeats, and the arena's table has that share in a column.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from allocation.arena.dense import DenseForest
from allocation.arena.measures import EdgeScores
from allocation.roots import IntArray
from allocation.sample import Sample
from allocation.scheduler import Job
from allocation.tree import Node, Tree


class RecordedTree(Tree):
    """A tree whose edges are recorded ones: `Node.action` is the number of the node in the record.

    Attributes:
        prompt: Number of the prompt in the record.
        taken: How often each recorded rollout, named by its terminal, is in the tree.
        repeats: Rollouts that were in the tree already when they were taken.
    """

    def __init__(self, key: str, observation: Any, info: dict[str, Any], prompt: int):
        super().__init__(key, -1, observation, info)
        self.prompt = prompt
        self.taken: dict[int, int] = {}
        self.repeats = 0


class RecordedWorld:
    """Replays a dense forest; see `allocation.arena.worlds.World`.

    Args:
        dense: The record.

    Attributes:
        dense: The record.
        prompts: Numbers of the prompts that are drawn from, int64 [n].
        feature_dim: Size of the hidden states.
        scores: What is known of the gradients of the recorded edges.

    Raises:
        ValueError: The estimate of the true gradient holds no signal.
    """

    def __init__(self, dense: DenseForest):
        if not dense.meta["gradient_norm2_unbiased"] > 0:
            raise ValueError(
                "the record's true gradient is nothing but noise (gradient_norm2_unbiased is "
                f"{dense.meta['gradient_norm2_unbiased']}): record more reference rollouts"
            )
        self.dense = dense
        self.prompts: IntArray = np.arange(dense.num_prompts)
        self.feature_dim = int(dense.features.shape[1])
        self.scores = EdgeScores(
            dense.dot.astype(np.float64),
            dense.norm2.astype(np.float64),
            dense.sketch.astype(np.float64) * dense.sketch_scale[:, None],
            float(dense.meta["gradient_norm2_unbiased"]),
        )
        self._root_features = dense.root_features.astype(np.float32)
        self._features = dense.features.astype(np.float32)
        self._root_value = dense.root_values().value
        self._value = dense.prefix_values().value
        self._edge, self._prompt = dense.edge_row.tolist(), dense.prompt.tolist()
        self._next, self._end = _rest_of_rollouts(dense)
        # What can follow a prefix: every recorded node that comes next, whatever rollout it belongs to.
        self._followers: dict[int, list[int]] = {}
        for node, (parent, prompt) in enumerate(zip(dense.parent.tolist(), self._prompt, strict=True)):
            prefix = self._prefix(parent) if parent >= 0 else -1 - prompt
            self._followers.setdefault(prefix, []).append(node)
        self._fields: list[dict[str, Any] | None] = [None] * len(dense.parent)
        self._zeros: dict[int, np.ndarray] = {}

    def only(self, prompts: IntArray) -> RecordedWorld:
        """Returns a world that draws from some of the prompts alone; everything else is shared with this one."""
        other = copy.copy(self)
        other.prompts = np.sort(prompts)
        return other

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns the numbers of `count` different prompts, int64; with one generator, fewer are the first of more."""
        return rng.permutation(self.prompts)[:count]

    def open(self, prompt: int) -> RecordedTree:
        """Returns a fresh tree of a prompt."""
        dense = self.dense
        info = {"max_turns": int(dense.depth.max(initial=0)), "hops": int(dense.hops[prompt])}
        tree = RecordedTree(str(dense.keys[prompt]), "", info, prompt)
        tree.root.context_ids = self._tokens(int(dense.prompt_tokens[prompt]))
        tree.root.features = self._root_features[prompt]
        return tree

    def roll(self, job: Job, rng: np.random.Generator) -> None:
        """Carries out one rollout by looking it up; see the module."""
        tree, node = job.tree, job.node
        assert isinstance(tree, RecordedTree)
        prefix = self._prefix(node.action) if node.depth else -1 - tree.prompt
        choices, end, taken = self._followers[prefix], self._end, tree.taken
        times = [taken.get(end[c], 0) for c in choices]
        fewest = min(times)
        free = [c for c, n in zip(choices, times, strict=True) if n == fewest]
        record = free[int(rng.integers(len(free)))]
        taken[end[record]] = fewest + 1
        tree.repeats += fewest > 0
        while record >= 0:
            node = tree.add(node, job.rollout, job.origin, **(self._fields[record] or self._fill(record)))
            record = self._next[record]

    def value(self, tree: Tree, node: Node) -> float:
        """Returns the near-true chance of success; of a terminal, its outcome."""
        if node.terminal:
            return float(bool(node.is_correct))
        if node.depth == 0:
            assert isinstance(tree, RecordedTree)
            return float(self._root_value[tree.prompt])
        return float(self._value[node.action])

    def edge_rows(self, tree: Tree) -> IntArray:
        """Returns the row in `scores` of the edge into each node, int64 [nodes]; -1 at the root and where no token was."""
        return np.array([-1, *(self._edge[n.action] for n in tree.nodes[1:])], dtype=np.int64)

    def repeats(self, tree: Tree) -> int:
        """Returns how many rollouts of a tree were in it already when they were taken."""
        assert isinstance(tree, RecordedTree)
        return tree.repeats

    def _prefix(self, record: int) -> int:
        """Returns a name of the prefix at a recorded node: equal prefixes share it, and none is negative (roots are)."""
        return self._edge[record] if self._edge[record] >= 0 else len(self.dense.dot) + record

    def _tokens(self, count: int) -> np.ndarray:
        if count not in self._zeros:
            self._zeros[count] = np.zeros(count, dtype=np.int64)
            self._zeros[count].flags.writeable = False
        return self._zeros[count]

    def _fill(self, record: int) -> dict[str, Any]:
        """Returns what a node has that replays a recorded one; the same objects at every replay."""
        dense = self.dense
        ids, parent, row = self._tokens(int(dense.action_tokens[record])), int(dense.parent[record]), self._edge[record]
        if parent >= 0:
            shown, features = int(dense.context_tokens[parent]), self._features[parent]
        else:
            shown, features = int(dense.prompt_tokens[dense.prompt[record]]), self._root_features[dense.prompt[record]]
        entropy = float(dense.entropy[row]) if row >= 0 else None
        terminal = bool(dense.terminal[record])
        fields: dict[str, Any] = {
            "action": record,
            "sample": Sample("", ids, ids.astype(np.float32), self._tokens(shown), features, entropy=entropy),
            "reward": float(dense.reward[record]),
            "terminated": bool(dense.terminated[record]),
            "truncated": bool(dense.truncated[record]),
            "is_correct": bool(dense.is_correct[record]) if terminal else None,
            "tool_errors": int(dense.tool_errors[record]),
            "tool_error": bool(dense.tool_error[record]),
            "context_ids": None if terminal else self._tokens(int(dense.context_tokens[record])),
            "features": None if terminal else self._features[record],
        }
        self._fields[record] = fields
        return fields


def _rest_of_rollouts(dense: DenseForest) -> tuple[list[int], list[int]]:
    """Returns for each recorded node the next one of its own rollout (-1 at a terminal), and the terminal that it comes to."""
    count = len(dense.parent)
    following, end = [-1] * count, list(range(count))
    parent, rollout = dense.parent.tolist(), dense.rollout.tolist()
    for node in range(count - 1, -1, -1):
        before = parent[node]
        if before >= 0 and rollout[before] == rollout[node]:
            following[before], end[before] = node, end[node]
    return following, end
