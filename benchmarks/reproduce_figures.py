"""The pictures of `benchmarks.reproduce`: learning curves, and where each method's budget went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.reproduce_tables import Row, at_tokens, by_method, comparisons


def _mean_shares(rows: Sequence[Row], what: str, names: Sequence[str]) -> np.ndarray:
    """Returns mean shares over runs, [names, stretches]; a name that a run does not have counts as none."""
    width = min(len(values) for row in rows for values in row["budget"][what].values())
    nothing = [0.0] * width
    return np.mean([[row["budget"][what].get(name, nothing)[:width] for name in names] for row in rows], axis=0)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draws the learning curves over tokens, means over seeds, one panel for each comparison."""
    panels = comparisons(rows)
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, layout="constrained")
    for axis, (title, chosen) in zip(axes[0], panels.items(), strict=True):
        for i, (name, found) in enumerate(by_method(chosen).items()):
            end = min(row["tokens"] for row in found.values())
            grid = np.linspace(0, end, 40)
            mean = np.mean([[at_tokens(row, t) for t in grid] for row in found.values()], axis=0)
            axis.plot(grid / 1e3, 100 * mean, label=f"{name} ({len(found)})", color=plt.get_cmap("tab20")(i))
        axis.set(xlabel="tokens sampled, thousands", ylabel="accuracy, %", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_budgets(rows: Sequence[Row], path: Path) -> None:
    """Draws heat maps: shares of rollouts by level (above) and by the anchor's depth (below), one column for each method.

    Each comparison has two rows of panels; time runs from left to right.
    """
    panels = comparisons([row for row in rows if row.get("budget")])
    if not panels:
        return
    most = max(len(by_method(chosen)) for chosen in panels.values())
    size = (1.9 * most + 1, 3.4 * len(panels))
    figure, axes = plt.subplots(2 * len(panels), most, figsize=size, squeeze=False, layout="constrained")
    for line, (title, chosen) in enumerate(panels.items()):
        for kind, what in enumerate(("level", "depth")):
            names = sorted({name for row in chosen for name in row["budget"][what]}, key=float)
            strip = axes[2 * line + kind]
            for axis, (method, found) in zip(strip, by_method(chosen).items(), strict=False):
                shares = _mean_shares(list(found.values()), what, names)
                drawn = axis.imshow(100 * shares, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=100)
                axis.set_yticks(range(len(names)), names, fontsize=6)
                axis.set_xticks([])
                axis.set_title(method, fontsize=8)
            if not kind:
                strip[0].set_title(f"{title}\n", fontsize=8, loc="left")
            for axis in strip[len(by_method(chosen)) :]:
                axis.axis("off")
            strip[0].set_ylabel(what, fontsize=8)
            figure.colorbar(drawn, ax=strip, label="rollouts, %")
    figure.savefig(path, dpi=110)
    plt.close(figure)
