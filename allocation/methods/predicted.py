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
from allocation.predictor import Anchor, Predictor, anchors_of, fit_report, training_set
from allocation.predictors.counts import MeanPredictor
from allocation.predictors.ensemble import EnsemblePredictor
from allocation.tree import Forest, Node, Tree

logger = logging.getLogger(__name__)

START_KAPPA = 4.0
"""Weight of a predictor, in observations, before there is anything to calibrate it by."""


class PredictedAllocator(Allocator):
    """An allocator with a predictor and with Beta beliefs about prompts.

    Args:
        predictor: Estimates success at roots and prefixes.
        kappa: Weight of the predictor in the beliefs, in pseudo-rollouts; `None` fits it to calibration.
        decay: Factor on a prompt's counts at each policy update.
        tree_outcomes: Let the predictor know, at a prefix, how the other root rollouts of its tree ended. Only for methods that
            look at outcomes anyway: no allocation by such predictions is exogenous.

    Attributes:
        kappa: The weight in use at roots.
        prefix_kappa: The weight in use at prefixes.
    """

    def __init__(
        self, predictor: Predictor, *, kappa: float | None = None, decay: float = 0.7, tree_outcomes: bool = False
    ):
        self.predictor = predictor
        self.beliefs = BetaBeliefs(decay=decay)
        self.base = MeanPredictor()
        self.kappa = self.prefix_kappa = START_KAPPA if kappa is None else kappa
        self.tree_outcomes = tree_outcomes
        self._fits_kappa = kappa is None

    def predict(self, trees: Sequence[Tree], nodes: Sequence[Node]) -> FloatArray | None:
        """Returns the predicted chance of success at nodes, float64 [n]; `None` if the predictor is not to be trusted.

        What was predicted is noted on the nodes.

        Args:
            trees: The tree of each node.
            nodes: Roots or prefixes.
        """
        found = self.predict_with_kappa(trees, nodes)
        return None if found is None else found[0]

    def predict_with_kappa(self, trees: Sequence[Tree], nodes: Sequence[Node]) -> tuple[FloatArray, FloatArray] | None:
        """Returns predictions as `predict` does, and the weight of each in observations; float64 [n] each.

        The weight is `kappa` at roots and `prefix_kappa` at prefixes; where they are fitted and the predictor is an ensemble,
        it is larger where the members agree (`kappa_of_spread`).
        """
        found = self._ask(self._anchors(trees, nodes), trees, nodes)
        if found is None:
            return None
        predicted, share = found
        level = np.where([n.depth == 0 for n in nodes], self.kappa, self.prefix_kappa)
        return predicted, np.clip(level * share, *KAPPA_BOUNDS) if self._fits_kappa else level

    def _anchors(self, trees: Sequence[Tree], nodes: Sequence[Node]) -> list[Anchor]:
        return anchors_of(trees, nodes, self.beliefs.counts, tree_outcomes=self.tree_outcomes)

    def _ask(
        self, anchors: Sequence[Anchor], trees: Sequence[Tree], nodes: Sequence[Node]
    ) -> tuple[FloatArray, FloatArray] | None:
        """Returns predictions and their weights relative to `kappa`; `None` if the predictor is not ready or fails."""
        spread = np.full(len(anchors), START_KAPPA)
        try:
            if isinstance(self.predictor, EnsemblePredictor):
                predicted, spread = self.predictor.predict_with_kappa(anchors)
            else:
                predicted = np.asarray(self.predictor.predict(anchors), dtype=np.float64)
            ready = self.predictor.ready
        except Exception as error:
            self._fall_back(f"the predictor failed ({type(error).__name__}: {error})")
            return None
        if predicted.shape != (len(nodes),):
            self._fall_back(f"the predictor gave an array of shape {predicted.shape} for {len(nodes)} anchors")
            return None
        bad = ~((predicted >= 0) & (predicted <= 1))
        if bad.any():
            i = int(np.argmax(bad))
            self._fall_back(f"the predictor gave {predicted[i]} for node {nodes[i].id} of tree {trees[i].key!r}")
            return None
        for node, value in zip(nodes, predicted.tolist(), strict=True):
            node.predicted = value
        return (predicted, spread / START_KAPPA) if ready else None

    def _fall_back(self, reason: str) -> None:
        self.fallbacks += 1
        logger.warning("%s: %s; allocating uniformly instead", self.name, reason)

    def root_beliefs(self, trees: Sequence[Tree]) -> tuple[FloatArray, FloatArray] | None:
        """Returns Beta parameters of the success probability of each prompt; `None` if the predictor is not to be trusted."""
        found = self.predict_with_kappa(trees, [t.root for t in trees])
        return None if found is None else self.beliefs.belief([t.key for t in trees], *found)

    def update(self, forest: Forest) -> dict[str, float]:
        """Scores the predictor on the batch, trains it, and folds the root outcomes into the beliefs."""
        rows = training_set(forest)
        if not rows:
            return {}
        trees, nodes = [row[0] for row in rows], [row[1] for row in rows]
        anchors = self._anchors(trees, nodes)
        values, weights = np.array([row[2] for row in rows]), np.array([row[3] for row in rows])
        depths = np.array([n.depth for n in nodes])
        report: dict[str, float] = {}
        # The predictions made now are those that the next batch would have met, had the policy not moved.
        found = self._ask(anchors, trees, nodes)
        if found is not None:
            predicted, share = found
            base = float(self.base.predict(anchors[:1])[0])
            report |= fit_report(predicted, values, weights, base, depths)
            if self._fits_kappa:
                self._fit_kappa(trees, nodes, predicted, share, (predicted - values) ** 2 - (base - values) ** 2)
        self.base.update(anchors, values, weights)
        try:
            report |= self.predictor.update(anchors, values, weights)
        except Exception as error:
            self._fall_back(f"the predictor could not learn ({type(error).__name__}: {error})")
        for tree in forest:
            self.beliefs.update(tree.key, *tree.outcome_counts("root"))
        self.beliefs.decay()
        return report | {"predictor/kappa": self.kappa, "predictor/kappa_of_prefixes": self.prefix_kappa}

    def _fit_kappa(
        self,
        trees: Sequence[Tree],
        nodes: Sequence[Node],
        predicted: FloatArray,
        share: FloatArray,
        excess: FloatArray,
    ) -> None:
        """Moves both weights towards those under which the outcomes were most likely.

        At roots these are the outcomes of root rollouts, at prefixes those of continuations alone: the rollout through a prefix
        may be the reason that it was chosen. Predictions that do not beat the running mean lose half of their weight instead
        (docs/algorithm.md section 3).

        Args:
            trees: The tree of each anchor.
            nodes: The anchors.
            predicted: Their predictions.
            share: Weights of the predictions relative to the one that is fitted.
            excess: Squared errors of the predictions less those of the running mean.
        """
        counts: dict[tuple[int, int], list[float]] = {}
        for tree in {id(t): t for t in trees}.values():
            for leaf in tree.leaves():
                node = leaf
                while node.parent is not None and node.rollout == leaf.rollout:
                    node = tree.nodes[node.parent]
                counts.setdefault((tree.index, node.id), [0.0, 0.0])[0 if leaf.is_correct else 1] += 1
        seen = np.array([counts.get((t.index, n.id), (0.0, 0.0)) for t, n in zip(trees, nodes, strict=True)])
        is_root = np.array([n.depth == 0 for n in nodes])
        for name, at in (("kappa", is_root), ("prefix_kappa", ~is_root)):
            kappa = getattr(self, name)
            informative = at & (seen.sum(axis=1) > 1)
            if not at.any():
                continue
            if excess[at].sum() >= 0:
                kappa = max(KAPPA_BOUNDS[0], kappa * 0.5)
            elif informative.any():
                fitted = fit_kappa(predicted[informative], *seen[informative].T, relative=share[informative])
                # One batch says little about a concentration, so the estimate moves slowly, on a log scale.
                kappa = float(np.exp(0.8 * np.log(kappa) + 0.2 * np.log(fitted)))
            setattr(self, name, kappa)

    def state_dict(self) -> dict[str, Any]:
        """Returns the predictor, the beliefs, the weights and the number of fallbacks."""
        return {
            "predictor": self.predictor.state_dict(),
            "beliefs": self.beliefs.state_dict(),
            "base": self.base.state_dict(),
            "kappa": self.kappa,
            "prefix_kappa": self.prefix_kappa,
            "fallbacks": self.fallbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; a `kappa` that is not fitted and `decay` are settings and stay those of this run."""
        self.predictor.load_state_dict(state["predictor"])
        retention = self.beliefs.retention
        self.beliefs.load_state_dict(state["beliefs"])
        self.beliefs.retention = retention
        self.base.load_state_dict(state["base"])
        if self._fits_kappa:
            self.kappa, self.prefix_kappa = float(state["kappa"]), float(state["prefix_kappa"])
        self.fallbacks = int(state["fallbacks"])
