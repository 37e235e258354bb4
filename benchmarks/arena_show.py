"""The arena's tables and picture.

Invariant: a table on the terminal and one in Markdown have the same cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from allocation.arena.dense import MID
from allocation.arena.measures import expected_auc
from allocation.arena.recorded import RecordedWorld
from benchmarks.arena_runs import PAIR_DEPTHS
from benchmarks.arena_stats import METRICS, Interval, Sample, gate_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend

COMPARISONS = ("rollouts", "tokens")
COMPARED = ("ratio_roots", "ratio_tree", "cosine", "snr_per_1k")
"""Figures whose paired differences are shown."""

_PERCENT = {"ratio_roots", "ratio_tree", "expected_ratio", "root_regret", "prefix_regret", "repeats"}
_WHOLE = {"rollouts", "tokens", "unspent", "stopped", "filtered", "fallbacks"}
_COLUMNS = {
    "rollouts": "rollouts",
    "tokens": "tokens",
    "ratio_roots": "eff. ratio, roots",
    "ratio_tree": "eff. ratio, trees",
    "expected_ratio": "expected ratio",
    "pairs_per_1k": "pairs / 1k tokens",
    "root_regret": "root regret",
    "prefix_regret": "prefix regret",
    "cosine": "cosine",
    "snr_per_1k": "SNR / 1k tokens",
    "auc_roots": "AUC roots",
    "auc_prefixes": "AUC prefixes",
    "repeats": "repeated",
}
_BARE = {"rollouts", "tokens", "repeats"}  # shown without an interval


@dataclass(frozen=True)
class Result:
    """What one method did on one world.

    Attributes:
        world: Name of the recording.
        comparison: What all methods had the same number of: one of `COMPARISONS`.
        method: Its name.
        estimator: Advantages.
        budget: Rollouts of a batch.
        figures: By name, float64 [seeds, batches], the warm-up first.
        warmup: Batches of the warm-up.
    """

    world: str
    comparison: str
    method: str
    estimator: str
    budget: int
    figures: dict[str, np.ndarray]
    warmup: int

    @property
    def tokens(self) -> float:
        """Mean generated tokens of a forest after the warm-up."""
        return float(self.figures["tokens"][:, self.warmup :].mean())

    @property
    def sample(self) -> Sample:
        """The batches after the warm-up."""
        return Sample({name: x[:, self.warmup :] for name, x in self.figures.items()})

    def record(self) -> dict[str, Any]:
        """Returns it as plain data; `by_batch` shows the cold start."""
        sample = self.sample
        return {
            "world": self.world,
            "comparison": self.comparison,
            "method": self.method,
            "estimator": self.estimator,
            "budget": self.budget,
            "seeds": sample.seeds,
            "batches": sample.forests,
            **{name: _plain(sample.interval(name)) for name in METRICS},
            "pairs_by_depth": [_number(x) for x in pairs_by_depth(self)],
            "by_batch": {
                name: [_number(x) for x in self.figures[name].mean(axis=0)]
                for name in ("ratio_roots", "ratio_tree", "cosine", "tokens")
            },
        }


def summary(world: RecordedWorld) -> dict[str, Any]:
    """Returns what is known of a world before any method is tried: the gate, and how sure the true gradient is.

    The gate is given with and without the condition on the root, and with an interval over prompts.
    """
    dense = world.dense
    gate, v, inner = dense.gate(), dense.root_values().value, ~dense.terminal
    return {
        "label": dense.meta.get("label", ""),
        "prompts": dense.num_prompts,
        "spines": int((dense.terminal & ~dense.continuation).sum()),
        "continuations": int((dense.terminal & dense.continuation).sum()),
        "rollouts_behind_a_prefix": _number(np.median(dense.prefix_values().count[inner])) if inner.any() else None,
        "mean_success": _number(v.mean()),
        "prompts_mid": _number(((v >= MID[0]) & (v <= MID[1])).mean()),
        "gate": _plain(gate_interval(dense)),
        "failed_with_mid_prefix": _number(gate.with_mid_prefix),
        "continuations_that_flip": _number(gate.flips),
        "auc_of_the_truth": _number(expected_auc(v, v)),
        "gradient_reliability": _number(dense.meta["gradient_reliability"]),
    }


def summary_line(found: dict[str, Any]) -> str:
    """Returns the summary as a sentence."""
    gate, low, high = (100 * x if x is not None else float("nan") for x in found["gate"])
    return (
        f"{found['prompts']} prompts, mean success {found['mean_success']:.2f}, {found['prompts_mid']:.0%} of them mid-value; "
        f"{found['spines']} spines, {found['continuations']} continuations. Gate (failed rollouts that hold a mid-value prefix "
        f"while their root is not mid-value): {gate:.1f}% [{low:.1f}, {high:.1f}]; with any root "
        f"{found['failed_with_mid_prefix']:.1%}; continuations that end otherwise {found['continuations_that_flip']:.1%}. "
        f"AUC at roots if their values were known: {found['auc_of_the_truth'] or float('nan'):.3f}. "
        f"Reliability of the true gradient {found['gradient_reliability']:.2f} (cosines are corrected for it)."
    )


def pairs_by_depth(result: Result) -> np.ndarray:
    """Returns pairs of contrast per 1,000 generated tokens by depth of their lowest common ancestor, float64 [PAIR_DEPTHS]."""
    after = {name: x[:, result.warmup :] for name, x in result.figures.items()}
    return np.array([1000 * after[f"pairs_{d}"].mean() / after["tokens"].mean() for d in range(PAIR_DEPTHS)])


def _number(x: float) -> float | None:
    return None if not np.isfinite(x) else round(float(x), 6)


def _plain(interval: Interval) -> list[float | None]:
    return [_number(interval.mean), _number(interval.low), _number(interval.high)]


def cell(name: str, interval: Interval, *, signed: bool = False) -> str:
    """Returns a figure as text, give or take the longer arm of its interval (the lines on disk have both ends)."""
    if np.isnan(interval.mean):
        return ""
    scale, digits = (100, 1) if name in _PERCENT else (1, 0 if name in _WHOLE else 3)
    mean = f"{scale * interval.mean:{'+' if signed else ''}.{digits}f}{'%' if name in _PERCENT else ''}"
    arm = max(interval.high - interval.mean, interval.mean - interval.low)
    return mean if name in _BARE or np.isnan(arm) else f"{mean} ±{scale * arm:.{digits}f}"


def figures_table(results: Sequence[Result]) -> list[list[str]]:
    """Returns the cells of the table of all methods, the head first."""
    rows = [["method", "estimator", *_COLUMNS.values()]]
    for result in results:
        sample = result.sample
        rows.append([result.method, result.estimator, *(cell(n, sample.interval(n)) for n in _COLUMNS)])
    return rows


def difference_table(results: Sequence[Result], reference: str) -> list[list[str]]:
    """Returns the cells of the table of paired differences to one method, the head first."""
    samples = {r.method: r.sample for r in results}
    rows = [["method", *(_COLUMNS[name] for name in COMPARED)]]
    for method, sample in samples.items():
        if method != reference:
            pairs = ((name, sample.minus(samples[reference], name)) for name in COMPARED)
            rows.append([method, *(cell(name, interval, signed=True) for name, interval in pairs)])
    return rows


def depth_table(results: Sequence[Result]) -> list[list[str]]:
    """Returns the cells of the table of pairs of contrast per 1,000 tokens by depth, the head first."""
    rows = [["method", *(f"depth {d}" for d in range(PAIR_DEPTHS - 1)), f"depth {PAIR_DEPTHS - 1}+"]]
    return rows + [[r.method, *(f"{x:.2f}" for x in pairs_by_depth(r))] for r in results]


def print_table(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints cells on the terminal."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def markdown(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Returns cells as Markdown under a headline."""
    lines = [f"### {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows[1:]), ""])


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws what the methods reach at equal tokens, a row for each world.

    Args:
        results: Of all worlds; those at equal rollouts are left out.
        path: The PNG.
    """
    worlds = list(dict.fromkeys(r.world for r in results))
    methods = list(dict.fromkeys(r.method for r in results))
    colors = dict(zip(methods, plt.get_cmap("tab20")(np.linspace(0, 1, len(methods))), strict=True))
    panels = ("ratio_roots", "ratio_tree", "cosine", "snr_per_1k")
    size = (18, 1.6 + (1.0 + 0.3 * len(methods)) * len(worlds))
    figure, axes = plt.subplots(len(worlds), len(panels) + 2, figsize=size, squeeze=False, layout="constrained")
    for line, world in zip(axes, worlds, strict=True):
        here = [r for r in results if r.world == world and r.comparison == "tokens"]
        at = np.arange(len(here))
        for axis, panel in zip(line, panels, strict=False):
            for y, r in zip(at, here, strict=True):
                i = r.sample.interval(panel)
                axis.plot([i.low, i.high], [y, y], color=colors[r.method], lw=3, alpha=0.5)
                axis.plot([i.mean], [y], "o", color=colors[r.method])
        left, depths = np.zeros(len(here)), np.array([pairs_by_depth(r) for r in here])
        for depth in range(PAIR_DEPTHS):
            shade = plt.get_cmap("viridis")(depth / (PAIR_DEPTHS - 1))
            line[-2].barh(at, depths[:, depth], left=left, color=shade, label=str(depth))
            left += depths[:, depth]
        for axis in line[:-1]:
            axis.set_yticks(at, [] if axis is not line[0] else [r.method for r in here], fontsize=8)
            axis.set_ylim(len(here) - 0.4, -0.6)
        for r in here:
            line[-1].plot(r.figures["ratio_roots"].mean(axis=0), color=colors[r.method], lw=1)
        if here:
            line[-1].axvline(here[0].warmup - 0.5, color="gray", lw=0.8, ls=":")
        line[0].set_ylabel(world)
    titles = [*(_COLUMNS[panel] for panel in panels), "pairs / 1k tokens, by depth", "eff. ratio, roots, by batch"]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    axes[0, -2].legend(fontsize=6, ncol=2, title="depth", title_fontsize=6)
    figure.suptitle(
        "All methods at equal generated tokens; bars are 95 % intervals; dotted: end of the warm-up", fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
