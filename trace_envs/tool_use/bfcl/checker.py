"""The official checks after each user turn.

Invariant: the verdict is that of `multi_turn_checker` of bfcl-eval, which `benchmarks/bfcl_agreement.py` compares with.

A user turn passes if something was called in it, every simulator's public attributes are those of the ground truth, and what
the calls have returned since the beginning holds what the ground truth's calls of this turn return, as often as they do, in any
order. A turn whose ground truth is empty always passes; whatever is called in it counts for the state of later turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from trace_envs.tool_use.bfcl.graph import Graph
from trace_envs.tool_use.bfcl.simulators import live


def state_matches(simulators: Mapping[str, Graph], truth: Mapping[str, Graph]) -> bool:
    """Compares public attributes as the official state check does."""
    return all(simulators[name] == graph or _same(name, simulators[name], graph) for name, graph in truth.items())


def _same(name: str, graph: Graph, truth: Graph) -> bool:
    # Graphs may differ in what is not looked at: private attributes, and the order in which things came to be.
    mine, wanted = live(name, graph), live(name, truth)
    return all(
        getattr(mine, attribute) == value for attribute, value in vars(wanted).items() if not attribute.startswith("_")
    )


def responses_match(results: Sequence[str], truth: Sequence[str]) -> bool:
    """Says whether all results of the ground truth are among those there are."""
    return not Counter(truth) - Counter(results)
