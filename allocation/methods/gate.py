"""Whether continuations are worth drawing here at all: a gate on the prefix stage, opened and closed by what was seen.

Invariant: the gate depends on finished forests alone, so it never looks at the batch that it decides about; while it is closed,
every `PROBE_EVERY`-th batch is open all the same, so that it can find out that things have changed.

A prefix stage can pay where failed rollouts hold prefixes of mid value although their prompt is not of mid value, and where
continuations end otherwise than the rollouts that they leave (docs/algorithm.md, "When the prefix stage can pay").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from allocation.tree import Forest

MID = (0.2, 0.8)
PROBE_EVERY = 8
PRIOR = 16.0
"""Failed rollouts that the estimate begins with, all of them in favour: the gate is open until there is evidence."""


class Gate:
    """Keeps the share of failed root rollouts that hold a prefix of mid value while their prompt's value is not mid.

    Args:
        threshold: The gate is open from this share on.
        decay: Factor on earlier evidence at each batch.
    """

    def __init__(self, threshold: float, decay: float = 0.9):
        self.threshold, self.decay = threshold, decay
        self._held, self._failed = PRIOR, PRIOR
        self._flips, self._continuations = 0.0, 0.0
        self._batches = 0

    @property
    def share(self) -> float:
        """The estimate."""
        return self._held / self._failed

    @property
    def open(self) -> bool:
        """Whether the next batch may draw continuations."""
        return self.share >= self.threshold or self._batches % PROBE_EVERY == PROBE_EVERY - 1

    def update(self, forest: Forest, *, trusted: bool = True) -> dict[str, float]:
        """Folds in a batch, by the predictions that were noted on its nodes; returns figures for the log.

        Trees whose prefixes were not looked at (`Node.predicted` is `None`) say nothing about the share.

        Args:
            forest: The finished batch, before the predictor has learned from it.
            trusted: Whether its predictions are worth anything; if not, only outcomes are counted.
        """
        held = failed = flips = continuations = 0
        for tree in forest:
            outcome = {leaf.rollout: bool(leaf.is_correct) for leaf in tree.leaves()}
            for node in tree.nodes[1:]:
                parent = tree.nodes[node.parent]  # type: ignore[index]
                if node.origin == "continuation" and parent.rollout != node.rollout and parent.rollout in outcome:
                    continuations += 1
                    flips += outcome[node.rollout] != outcome[parent.rollout]
            seen: dict[int, bool] = {}
            for node in tree.nodes[1:]:
                if node.origin == "root" and not node.terminal and node.predicted is not None:
                    seen[node.rollout] = seen.get(node.rollout, False) or MID[0] <= node.predicted <= MID[1]
            root = tree.root.predicted
            if root is None or not trusted:
                continue
            lost = [mid for rollout, mid in seen.items() if not outcome.get(rollout, True)]
            failed += len(lost)
            held += 0 if MID[0] <= root <= MID[1] else sum(lost)
        self._batches += 1
        if failed:
            self._held = self.decay * self._held + held
            self._failed = self.decay * self._failed + failed
        if continuations:
            self._flips = self.decay * self._flips + flips
            self._continuations = self.decay * self._continuations + continuations
        figures = {"gate/share": self.share, "gate/open": float(self.open)}
        if self._continuations:
            figures["gate/flips"] = self._flips / self._continuations
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Returns the evidence."""
        return {"evidence": np.array([self._held, self._failed, self._flips, self._continuations, self._batches])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        held, failed, flips, continuations, batches = (float(x) for x in state["evidence"])
        self._held, self._failed, self._flips, self._continuations = held, failed, flips, continuations
        self._batches = int(batches)
