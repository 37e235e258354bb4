"""One method on one recorded world: a sequence of batches from a fixed policy, each measured.

Invariant: methods with the same seed meet the same candidates in the same order, as far as the sizes of their pools agree; a
batch is measured before the method learns from it.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from agents.advantages import estimate
from agents.aggregation import edge_coefficients
from allocation import Forest, Node, Predictor, Tree, make_predictor
from allocation.allocators import METHODS, Allocator, TraceAllocator, make_allocator
from allocation.arena import measures
from allocation.arena.recorded import RecordedWorld
from allocation.arena.worlds import replay
from allocation.forest_table import ForestTable
from allocation.methods.oracle import OracleAllocator, TrueValues

PAIR_DEPTHS = 8
"""Depths at which pairs of contrast are counted one by one; the last one holds all deeper ones too."""


@dataclass(frozen=True)
class Protocol:
    """How a method is tried out.

    Attributes:
        budget: Rollouts of a batch.
        group_size: Rollouts of a prompt, for methods with groups of a fixed size.
        warmup: Batches before those that count; the method learns from all of them.
        batches: Batches that count.
        estimator: A name of `ESTIMATORS` (without a standard deviation), or `auto`: `tree` for methods that plan continuations
            and `grpo` for all others.
        held_out: Measure on prompts that the method has never learned from: the warm-up draws from one half of them, and the
            batches that count from the other half, without `Allocator.update`.
        predictor: A name of `PREDICTORS`, for methods that need one. A record has no texts and no log-probabilities: a
            predictor that reads them finds nothing there.
    """

    budget: int = 64
    group_size: int = 8
    warmup: int = 20
    batches: int = 20
    estimator: str = "auto"
    held_out: bool = False
    predictor: str = "hidden_state"


class _Watched:
    """A world that notes which candidates were opened."""

    def __init__(self, world: RecordedWorld):
        self._world = world
        self.draw, self.roll, self.value = world.draw, world.roll, world.value
        self.candidates: list[Tree] = []

    def open(self, prompt: int) -> Tree:
        """As the world's."""
        tree = self._world.open(prompt)
        self.candidates.append(tree)
        return tree


def parse(method: str) -> tuple[str, dict[str, Any]]:
    """Returns the name of a method and the settings that differ from its defaults.

    Args:
        method: A name of `METHODS`, alone or with settings of its configuration: `trace:continuations=0.5,prefix_mode=exact`.
            Values are read as Python has them, texts without quotes.

    Raises:
        ValueError: There is no such method, or a setting is not `name=value`.
    """
    name, _, rest = method.partition(":")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, text = part.partition("=")
        if not equals:
            raise ValueError(f"a setting must be name=value, got {part!r} in {method!r}")
        try:
            settings[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[key] = text
    return name, settings


def make(method: str, world: RecordedWorld, protocol: Protocol, seed: int) -> Allocator:
    """Returns a fresh method with a fresh predictor.

    Args:
        method: As `parse` reads it.
        world: Tells the predictor the size of the hidden states.
        protocol: Tells the size of a group.
        seed: Of the predictor.

    Raises:
        ValueError: The method has no such setting.
    """
    name, settings = parse(method)
    predictor: Predictor = make_predictor(protocol.predictor, feature_dim=world.feature_dim, seed=seed)
    if name == OracleAllocator.name:
        predictor = TrueValues(world.value)
    plain = make_allocator(name, predictor=predictor, group_size=protocol.group_size)
    if not settings:
        return plain
    config = plain.config if isinstance(plain, TraceAllocator) else None
    known = {f.name for f in fields(config)} if config is not None else set()
    if config is None or not set(settings) <= known:
        wrong = ", ".join(sorted(set(settings) - known))
        raise ValueError(f"{name} has no setting {wrong}; it has: {', '.join(sorted(known)) or 'none'}")
    config = replace(config, **settings)
    return make_allocator(name, predictor=predictor, group_size=protocol.group_size, config=config)


def estimator_of(allocator: Allocator, protocol: Protocol) -> str:
    """Returns the name of the estimator that goes with a method."""
    if protocol.estimator != "auto":
        return protocol.estimator
    return "tree" if allocator.root_budget(protocol.budget) < protocol.budget else "grpo"


def edge_weights(forest: Forest, estimator: str) -> np.ndarray:
    """Returns what the score of each edge counts in the policy gradient, float64 [nodes of all trees].

    That is the coefficient of one of its tokens times its advantage: the gradient of the loss at a ratio of 1. Advantages are
    not divided by a standard deviation.
    """
    table = ForestTable.of(forest)
    credit = estimate(table, estimator)
    return edge_coefficients(table, credit, "prompt") * credit.advantage


def measure(world: RecordedWorld, forest: Forest, candidates: Sequence[Tree], estimator: str) -> dict[str, float]:
    """Returns the figures of one forest that the method has not learned from yet."""
    ledger, v = forest.ledger, np.array([world.value(t, t.root) for t in candidates])
    counts = measures.root_counts(candidates)
    pairs = measures.forest_pairs(forest)
    weights = edge_weights(forest, estimator)
    rows = np.concatenate([world.edge_rows(tree) for tree in forest])
    sampled = rows >= 0
    gradient = measures.gradient_figures(world.scores, rows[sampled], weights[sampled])
    rollouts = ledger.root_rollouts + ledger.continuations
    figures = {
        "rollouts": float(rollouts),
        "tokens": float(ledger.generated_tokens),
        "roots": float(ledger.root_rollouts),
        "continuations": float(ledger.continuations),
        "prompts": float(len(forest)),
        "ratio_roots": forest.effective_ratio("root"),
        "ratio_tree": forest.effective_ratio(),
        "expected_ratio": measures.expected_effective_ratio(v, counts),
        "pairs": float(pairs.sum()),
        "root_regret": measures.root_regret(v, counts),
        "prefix_regret": measures.prefix_regret(forest, world.value),
        "along": gradient.along,
        "along2": gradient.along**2,
        "norm2": gradient.norm2,
        "cosine": gradient.cosine,
        "auc_roots": _auc(world, [(t, t.root) for t in candidates]),
        "auc_prefixes": _auc(world, [(t, n) for t in forest for n in t.nodes if n.depth and not n.terminal]),
        "repeats": sum(world.repeats(tree) for tree in forest) / max(rollouts, 1),
        "unspent": float(ledger.unspent),
        "stopped": float(ledger.outcome_stops),
        "filtered": float(ledger.filtered_prompts),
        "fallbacks": float(ledger.fallbacks),
    }
    at = np.zeros(PAIR_DEPTHS)
    np.add.at(at, np.minimum(np.arange(len(pairs)), PAIR_DEPTHS - 1), pairs)
    return figures | {f"pairs_{depth}": float(count) for depth, count in enumerate(at)}


def _auc(world: RecordedWorld, anchors: Sequence[tuple[Tree, Node]]) -> float:
    known = [(n.predicted, world.value(t, n)) for t, n in anchors if n.predicted is not None]
    known = [(p, v) for p, v in known if not np.isnan(v)]
    return measures.expected_auc(*zip(*known, strict=True)) if known else float("nan")


def run_seed(world: RecordedWorld, name: str, protocol: Protocol, seed: int) -> list[dict[str, float]]:
    """Returns the figures of a sequence of batches, those of the warm-up first."""
    allocator = make(name, world, protocol, seed)
    estimator = estimator_of(allocator, protocol)
    order = np.random.default_rng([seed, 0xA7E]).permutation(world.prompts)
    half = len(order) // 2
    seen, unseen = (world.only(order[:half]), world.only(order[half:])) if protocol.held_out else (world, world)
    found = []
    for number in range(protocol.warmup + protocol.batches):
        warm = number < protocol.warmup
        watched = _Watched(seen if warm else unseen)
        forest = replay(watched, allocator, protocol.budget, np.random.default_rng([seed, number]))
        found.append(measure(world, forest, watched.candidates, estimator))
        if warm or not protocol.held_out:
            allocator.update(forest)
    return found


def run(world: RecordedWorld, name: str, protocol: Protocol, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the figures of all seeds by name, float64 [seeds, warm-up and batches]."""
    table = [run_seed(world, name, protocol, seed) for seed in seeds]
    return {key: np.array([[batch[key] for batch in row] for row in table]) for key in table[0][0]}
