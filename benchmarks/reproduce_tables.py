"""From the rows of `benchmarks.reproduce` to tables: means over seeds, and differences between runs of the same seed.

Invariant: the seed is the unit. An interval comes from resampling seeds; a difference is taken within a seed before anything is
averaged, so that what a seed shares (warm start, order of prompts) drops out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.reproduce_grid import METHODS

Row = Mapping[str, Any]
RESAMPLES = 10_000
BASE = "grpo"


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95 % bootstrap interval; no interval (NaN) for fewer than three seeds."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Returns the mean of values, one for each seed, with its percentile bootstrap interval."""
    x = np.asarray(values, dtype=float)
    if len(x) < 3:
        return Interval(float(x.mean()) if len(x) else float("nan"), float("nan"), float("nan"), len(x))
    picks = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.percentile(x[picks].mean(axis=1), [2.5, 97.5])
    return Interval(float(x.mean()), float(low), float(high), len(x))


def comparisons(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns the rows of each comparison by its title: runs of one environment, pool, size and split."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        size = row["size"]
        title = f"{row['world']}, {row['pool']} pool, {size['updates']} updates of {size['budget']} rollouts"
        found[title if row["split"] == "test" else f"{title}, {row['split']}"].append(row)
    return dict(found)


def by_method(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Returns the rows of one comparison by method and seed, methods in the order of the grid."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        found[row["method"]][row["seed"]] = row
    return {name: found[name] for name in sorted(found, key=list(METHODS).index)}


def paired(one: Mapping[int, Row], other: Mapping[int, Row], figure: str) -> Interval:
    """Returns the difference of a figure over the seeds that both have."""
    return interval([one[seed][figure] - other[seed][figure] for seed in sorted(set(one) & set(other))])


def at_tokens(row: Row, tokens: float) -> float:
    """Returns the accuracy on a run's curve when so many tokens were sampled, interpolated; its last one beyond the end."""
    curve = row["curve"]
    return float(np.interp(tokens, [p["tokens"] for p in curve], [p["accuracy"] for p in curve]))


def first_at(row: Row, accuracy: float, what: str) -> float:
    """Returns the tokens or rollouts at which a run's curve first reaches an accuracy; infinity if it never does.

    Args:
        row: The run.
        accuracy: What is to be reached.
        what: `tokens` or `rollouts`.
    """
    curve = row["curve"]
    for before, after in pairwise(curve):
        if after["accuracy"] >= accuracy:
            if before["accuracy"] >= accuracy:
                return float(before[what])
            part = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return float(before[what] + part * (after[what] - before[what]))
    return float("inf")


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the table of one comparison: a record for the warm start alone and one for each method."""
    methods = by_method(rows)
    base = methods.get(BASE, {})
    records = []
    everyone = {seed: row for found in methods.values() for seed, row in found.items()}
    if everyone:
        starts = {row["model"]: row["warm_accuracy"] for row in everyone.values()}
        records.append({"method": "warm start", "seeds": len(starts), "accuracy": interval(list(starts.values()))})
    for name, found in methods.items():
        shared = sorted(set(found) & set(base))
        savings: dict[str, list[float]] = {"tokens": [], "rollouts": []}
        for seed in shared:
            wanted = base[seed]["curve"][-1]["accuracy"]
            for what, parts in savings.items():
                parts.append(first_at(found[seed], wanted, what) / max(base[seed][what], 1))
        seeds = sorted(found)
        records.append(
            {
                "method": name,
                "seeds": len(seeds),
                "accuracy": interval([found[s]["accuracy"] for s in seeds]),
                "accuracy_by_pool": interval([found[s]["accuracy_by_pool"] for s in seeds]),
                "gain": paired(found, base, "accuracy") if name != BASE else None,
                "gain_by_pool": paired(found, base, "accuracy_by_pool") if name != BASE else None,
                "gain_at_tokens": interval(
                    [_difference_at_equal_tokens(found[s], base[s]) for s in shared] if name != BASE else []
                ),
                "ratio_roots": interval([found[s]["ratio_roots"] for s in seeds]),
                "ratio_tree": interval([found[s]["ratio_tree"] for s in seeds]),
                "tokens": interval([found[s]["tokens"] for s in seeds]),
                **{f"{what}_to_base": float(np.median(p)) if p else float("nan") for what, p in savings.items()},
            }
        )
    return records


def _difference_at_equal_tokens(one: Row, other: Row) -> float:
    tokens = min(one["tokens"], other["tokens"])
    return at_tokens(one, tokens) - at_tokens(other, tokens)


HEAD = [
    "method",
    "seeds",
    "accuracy, %",
    "by pool, %",
    "over grpo, points",
    "at equal tokens",
    "ratio roots, %",
    "ratio trees, %",
    "tokens, k",
    "tokens to grpo's end",
    "rollouts to it",
]


def cells(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a table as text, its headline first."""
    return [HEAD, *(_line(record) for record in records)]


def _line(record: Mapping[str, Any]) -> list[str]:
    def shown(name: str, factor: float = 100.0) -> str:
        value = record.get(name)
        if value is None or not value.count:
            return ""
        text = f"{factor * value.mean:.1f}"
        return text if np.isnan(value.low) else f"{text} [{factor * value.low:.1f}, {factor * value.high:.1f}]"

    def reached(what: str) -> str:
        ratio = record.get(f"{what}_to_base", float("nan"))
        return "" if np.isnan(ratio) or record["method"] == BASE else "never" if np.isinf(ratio) else f"{ratio:.2f}"

    return [
        record["method"],
        str(record["seeds"]),
        shown("accuracy"),
        shown("accuracy_by_pool"),
        shown("gain"),
        shown("gain_at_tokens"),
        shown("ratio_roots"),
        shown("ratio_tree"),
        shown("tokens", 1e-3),
        reached("tokens"),
        reached("rollouts"),
    ]


def set_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Returns accuracy, exact match and F1 of each evaluation set, where a world has several; a headline alone if not."""
    methods = by_method(rows)
    table = [["method", "set", "accuracy, %", "EM, %", "F1, %", "by level, %"]]
    for name, found in methods.items():
        for part in next(iter(found.values()))["sets"] if found else ():
            figures = [row["sets"][part] for row in found.values()]
            levels = [key for key in figures[0] if key.startswith("accuracy_by_level/")]

            def mean(key: str, figures: list[Mapping[str, float]] = figures) -> str:
                return f"{100 * np.mean([f[key] for f in figures]):.1f}" if key in figures[0] else ""

            per_level = " ".join(f"{100 * np.mean([f[key] for f in figures]):.0f}" for key in levels)
            table.append([name, part, mean("accuracy"), mean("em"), mean("f1"), per_level])
    return table
