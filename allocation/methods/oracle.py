"""TRACE with true values: what its stages can do at best.

Invariant: nothing is learned; every answer is a function of the values given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from allocation.contrast import FloatArray
from allocation.methods.trace import TraceAllocator
from allocation.methods.trace_config import TraceConfig
from allocation.predictor import Anchor, Predictor
from allocation.tree import Forest, Node, Tree


class TrueValues:
    """Stands in the place of a predictor where values are known: in the arena, or where they can be enumerated.

    Args:
        value: Chance of success from a node, such as `World.value`; NaN, where nothing is known, is taken for one half.
    """

    ready = True

    def __init__(self, value: Callable[[Tree, Node], float]):
        self.value = value

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """There is nothing to tell from an anchor: values belong to nodes."""
        raise TypeError("true values are known of nodes, not of anchors: use them with the method 'oracle'")

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Nothing to learn."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class OracleAllocator(TraceAllocator):
    """`oracle`: TRACE's two stages at true values, without exploration. For the arena and for tests; no run can have it.

    Args:
        predictor: The true values.
        config: As of `trace`; if it is left out, the defaults with `explore=0`.

    Raises:
        ValueError: The predictor is none that knows true values.
    """

    name = "oracle"

    def __init__(self, predictor: Predictor, config: TraceConfig | None = None):
        if not isinstance(predictor, TrueValues):
            raise ValueError(
                f"the method 'oracle' needs true values: pass predictor=TrueValues(value), got {type(predictor).__name__}"
            )
        super().__init__(predictor, config or TraceConfig(explore=0.0))
        self._value = predictor.value

    def predict_with_kappa(self, trees: Sequence[Tree], nodes: Sequence[Node]) -> tuple[FloatArray, FloatArray]:
        """Returns the true values with a weight beside which no outcome counts."""
        values = np.nan_to_num([self._value(t, n) for t, n in zip(trees, nodes, strict=True)], nan=0.5)
        for node, value in zip(nodes, values.tolist(), strict=True):
            node.predicted = value
        return values, np.full(len(values), 1e6)

    def update(self, forest: Forest) -> dict[str, float]:
        """Learns what rollouts cost and whether continuations pay; of success there is nothing to learn."""
        return self.update_stages(forest)
