"""What methods with a predictor share: beliefs about prompts and prefixes, and what happens when the predictor fails.

Invariant: a predictor that raises, or answers with anything but probabilities, never stops a batch: the method then allocates
as it does before the predictor is ready, says so in the log and counts it (`fallbacks`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from allocation.beliefs import KAPPA_BOUNDS, BetaBeliefs, fit_kappa
from allocation.contrast import FloatArray
from allocation.methods.base import Allocator
from allocation.predictor import MeanPredictor, Predictor, anchor_of, fit_report, training_set
from allocation.tree import Forest, Node, Tree

logger = logging.getLogger(__name__)


class PredictedAllocator(Allocator):
    """An allocator with a predictor and with Beta beliefs about prompts.

    Args:
        predictor: Estimates success at roots and prefixes.
        kappa: Weight of the predictor in the beliefs, in pseudo-rollouts; `None` fits it to calibration.
        decay: Factor on a prompt's counts at each policy update.

    Attributes:
        kappa: The weight in use.
    """

    def __init__(self, predictor: Predictor, *, kappa: float | None = None, decay: float = 0.7):
        self.predictor = predictor
        self.beliefs = BetaBeliefs(decay=decay)
        self.base = MeanPredictor()
        self.kappa = 4.0 if kappa is None else kappa
        self._fits_kappa = kappa is None

    def predict(self, trees: Sequence[Tree], nodes: Sequence[Node]) -> FloatArray | None:
        """Returns the predicted chance of success at nodes, float64 [n]; `None` if the predictor is not to be trusted.

        What was predicted is noted on the nodes.

        Args:
            trees: The tree of each node.
            nodes: Roots or prefixes.
        """
        anchors = [anchor_of(t, n, self.beliefs.counts(t.key)) for t, n in zip(trees, nodes, strict=True)]
        try:
            predicted = np.asarray(self.predictor.predict(anchors), dtype=np.float64)
            ready = self.predictor.ready
        except Exception as error:
            return self._fall_back(f"the predictor failed ({type(error).__name__}: {error})")
        if predicted.shape != (len(nodes),):
            return self._fall_back(f"the predictor gave an array of shape {predicted.shape} for {len(nodes)} anchors")
        bad = ~((predicted >= 0) & (predicted <= 1))
        if bad.any():
            i = int(np.argmax(bad))
            return self._fall_back(f"the predictor gave {predicted[i]} for node {nodes[i].id} of tree {trees[i].key!r}")
        for node, value in zip(nodes, predicted.tolist(), strict=True):
            node.predicted = value
        return predicted if ready else None

    def _fall_back(self, reason: str) -> None:
        self.fallbacks += 1
        logger.warning("%s: %s; allocating uniformly instead", self.name, reason)

    def root_beliefs(self, trees: Sequence[Tree]) -> tuple[FloatArray, FloatArray] | None:
        """Returns Beta parameters of the success probability of each prompt; `None` if the predictor is not to be trusted."""
        predicted = self.predict(trees, [t.root for t in trees])
        return None if predicted is None else self.beliefs.belief([t.key for t in trees], predicted, self.kappa)

    def update(self, forest: Forest) -> dict[str, float]:
        """Scores the predictor on the batch, trains it, and folds the root outcomes into the beliefs."""
        rows = training_set(forest)
        if not rows:
            return {}
        anchors = [anchor_of(tree, node, self.beliefs.counts(tree.key)) for tree, node, _, _ in rows]
        values = np.array([row[2] for row in rows])
        weights = np.array([row[3] for row in rows])
        report: dict[str, float] = {}
        # The predictions made now are those that the next batch would have met, had the policy not moved.
        predicted = self.predict([row[0] for row in rows], [row[1] for row in rows]) if self.predictor.ready else None
        if predicted is not None:
            report |= fit_report(predicted, values, weights, float(self.base.predict(anchors[:1])[0]))
            if self._fits_kappa:
                self._fit_kappa(rows, predicted, report["predictor/skill"])
        self.base.update(anchors, values, weights)
        try:
            report |= self.predictor.update(anchors, values, weights)
        except Exception as error:
            self._fall_back(f"the predictor could not learn ({type(error).__name__}: {error})")
        for tree in forest:
            self.beliefs.update(tree.key, *tree.outcome_counts("root"))
        self.beliefs.decay()
        return report | {"predictor/kappa": self.kappa}

    def _fit_kappa(self, rows: Sequence[tuple[Tree, Node, float, float]], predicted: FloatArray, skill: float) -> None:
        """Moves kappa towards the value under which the prompts' root outcomes were most likely.

        Predictions that do not beat the running mean lose half of their weight instead (docs/algorithm.md section 3).
        """
        if skill <= 0:
            self.kappa = max(KAPPA_BOUNDS[0], self.kappa * 0.5)
            return
        roots = [
            (p, *tree.outcome_counts("root"))
            for p, (tree, node, _, _) in zip(predicted, rows, strict=True)
            if node.depth == 0
        ]
        if not roots:
            return
        v, s, f = (np.array(column, dtype=float) for column in zip(*roots, strict=True))
        # One batch says little about a concentration, so the estimate moves slowly, on a log scale.
        self.kappa = float(np.exp(0.8 * np.log(self.kappa) + 0.2 * np.log(fit_kappa(v, s, f))))

    def state_dict(self) -> dict[str, Any]:
        """Returns the predictor, the beliefs and kappa."""
        return {
            "predictor": self.predictor.state_dict(),
            "beliefs": self.beliefs.state_dict(),
            "base": self.base.state_dict(),
            "kappa": self.kappa,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.predictor.load_state_dict(state["predictor"])
        self.beliefs.load_state_dict(state["beliefs"])
        self.base.load_state_dict(state["base"])
        self.kappa = float(state["kappa"])
