"""The sampled tokens of a forest's edges, in one order, whatever the layout that a model sees them in.

Invariant: what is scored is, id for id, what was sampled; text is never tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocation.forest_table import ForestTable


@dataclass(frozen=True, slots=True)
class EdgeTokens:
    """Sampled tokens of some edges: edge by edge in the order of the table's rows, each from its first token to its last.

    Attributes:
        table: The forest.
        rows: Rows of the edges, int64 [edges], rising.
        start: First token of each edge in the arrays below and the number of all tokens, int64 [edges + 1].
        node: Row of each token's edge, int64 [t].
        ids: Int64 [t].
        old_logprobs: Under the distribution that sampled, float32 [t], in nats; float64 if a policy gave such.
    """

    table: ForestTable
    rows: np.ndarray
    start: np.ndarray
    node: np.ndarray
    ids: np.ndarray
    old_logprobs: np.ndarray

    @classmethod
    def of(cls, table: ForestTable, rows: np.ndarray) -> EdgeTokens:
        """Reads the tokens of the edges into the given rows; edges without tokens are left out.

        Raises:
            ValueError: A sample has not one log-prob for each token.
        """
        rows = np.sort(np.asarray(rows, dtype=np.int64))
        rows = rows[table.tokens[rows] > 0]
        samples = [table.node(row).sample for row in rows]
        counts = table.tokens[rows]
        for row, sample in zip(rows, samples, strict=True):
            if sample is not None and len(sample.logprobs) != len(sample.action_ids):
                raise ValueError(
                    f"node {table.node(row).id} of tree {table.trees[table.tree[row]].key!r} has {len(sample.action_ids)} "
                    f"action_ids and {len(sample.logprobs)} logprobs: a policy must give one log-prob for each sampled token"
                )
        nothing = np.zeros(0, dtype=np.float32)
        return cls(
            table,
            rows,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.repeat(rows, counts),
            np.concatenate([nothing, *(s.action_ids for s in samples if s is not None)]).astype(np.int64),
            np.concatenate([nothing, *(s.logprobs for s in samples if s is not None)]),
        )

    def __len__(self) -> int:
        return len(self.ids)
