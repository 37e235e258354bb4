"""The pictures of a run's report: learning curves, where the budget went, and how good the predictor was.

Invariant: a picture is inline SVG whose colours are the page's CSS variables, so it needs nothing else and follows the reader's
light or dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from agents.display import by_group, natural

_MAX_POINTS = 400
_RAMP = 8

Record = Mapping[str, Any]

# Matplotlib draws with the stand-in colours below, which are then replaced by the page's CSS variables: so the pictures
# follow the reader's light or dark mode. The template sets the variables, from palettes safe for colour-blind eyes.
_INK, _MUTED, _GRID = "#010101", "#010102", "#010103"
_SERIES = tuple(f"#0102{i:02x}" for i in range(4))
_STEPS = tuple(f"#0103{i:02x}" for i in range(_RAMP))
_CSS = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--line)"}
_CSS |= {color: f"var(--s{i})" for i, color in enumerate(_SERIES)} | {c: f"var(--r{i})" for i, c in enumerate(_STEPS)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture of the page: its heading, what to look at, and the SVG."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class _Lines:
    title: str
    note: str
    keys: Mapping[str, str]
    label: str
    percent: bool = False
    zero: bool = False


_CURVES = (
    _Lines("Success in training", "Share of rollouts that end in success, on the prompts the allocator chose.",
           {"train/success": "success", "train/reward": "reward"}, "mean over rollouts", True),
    _Lines("Effective ratio", "Share of active prompts with both outcomes: over root rollouts alone, over whole trees.",
           {"effective_ratio/roots": "root rollouts", "effective_ratio/tree": "whole tree"}, "mixed prompts", True),
    _Lines("Gradient norm", "Before clipping.", {"loss/grad_norm": "norm"}, "norm"),
    _Lines("Divergence", "Of the policy from the weights that sampled and from the frozen reference, where there is one.",
           {"loss/kl": "sampling weights", "loss/reference_kl": "reference"}, "nats a token", zero=True),
    _Lines("Critic", "Share of the variance of returns that the critic's values explain.",
           {"critic/explained_variance": "explained variance"}, "share", zero=True),
)  # fmt: skip
_PREDICTOR = (
    _Lines("Skill", "Brier skill over the running mean: at 0 the predictor is worth no more than the mean.",
           {"predictor/skill": "skill"}, "skill", zero=True),
    _Lines("Brier score and AUC", "Brier: mean squared error, lower is better. AUC: 0.5 is chance, 1 perfect ranking.",
           {"predictor/brier": "Brier", "predictor/auc": "AUC"}, "score"),
)  # fmt: skip


def _points(records: Iterable[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns updates and values of an entry, averaged in buckets where there are more than a picture can show."""
    pairs = [(r["update"], float(r[key])) for r in records if isinstance(r.get(key), int | float)]
    array = np.array(pairs, dtype=float).reshape(-1, 2)
    if len(array) > _MAX_POINTS:
        array = np.array([part.mean(axis=0) for part in np.array_split(array, _MAX_POINTS)])
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    half = len(values) // 30
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _axes(label: str, *, percent: bool = False, xlabel: str = "update") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, axes


def _svg(figure: Figure, title: str, note: str, legend: int = 0) -> Chart:
    if legend > 1:
        figure.axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(legend, 7), borderaxespad=0.2)
    buffer = io.StringIO()
    # The salt keeps the ids of two pictures in one page apart, and the same from run to run; no metadata means no date.
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text)
    text = re.sub(r"#010[123][0-9a-f]{2}", lambda match: _CSS.get(match[0], match[0]), text)
    text = re.sub(r"(?<=[0-9]px )[^;\"]*sans-serif[^;\"]*", "var(--font)", text)
    return Chart(title, note, Markup(text))


def _line_chart(records: Sequence[Record], spec: _Lines) -> Chart | None:
    figure, axes = _axes(spec.label, percent=spec.percent)
    drawn = 0
    for color, (key, label) in zip(_SERIES, spec.keys.items(), strict=False):
        x, y = _points(records, key)
        if not len(x):
            continue
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(x, _smooth(y), color=color, linewidth=1.8, label=label, marker="o" if len(x) == 1 else None)
        drawn += 1
    if spec.zero:
        axes.axhline(0, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    return _svg(figure, spec.title, spec.note, drawn) if drawn else None


def _shades(count: int) -> list[str]:
    return [_STEPS[round(i * (_RAMP - 1) / max(1, count - 1))] for i in range(count)]


def _groups(records: Iterable[Record], prefix: str) -> list[str]:
    return sorted({name for record in records for name in by_group(record, prefix)}, key=natural)


def _accuracy_chart(records: Sequence[Record], level_name: str) -> Chart | None:
    levels = _groups(records, "eval/accuracy_by_level")
    figure, axes = _axes("accuracy", percent=True)
    for color, name, label in zip(_shades(len(levels)), levels, _legend(levels, level_name), strict=True):
        x, y = _points(records, f"eval/accuracy_by_level/{name}")
        axes.plot(x, y, color=color, linewidth=1.4, marker="o", markersize=2.5, label=label)
    x, y = _points(records, "eval/accuracy")
    if not len(x):
        return None
    axes.plot(x, y, color=_INK, linewidth=2.2, marker="o", markersize=4, label="all")
    axes.set_ylim(0, 1.02)
    note = f"Held-out tasks, by {level_name}."
    return _svg(figure, "Accuracy on unseen tasks", note, len(levels) + 1)


def _level_chart(records: Sequence[Record], level_name: str) -> Chart | None:
    names = _groups(records, "budget/by_level")
    rows = [record for record in records if by_group(record, "budget/by_level")]
    if not names:
        return None
    parts = np.array_split(np.arange(len(rows)), min(len(rows), 60))
    x = [float(np.mean([rows[i]["update"] for i in part])) for part in parts]
    keys = [f"budget/by_level/{name}" for name in names]
    heights = [[float(np.mean([rows[i].get(key) or 0 for i in part])) for part in parts] for key in keys]
    if len(x) == 1:  # an area needs a width
        x, heights = [x[0] - 0.5, x[0] + 0.5], [height * 2 for height in heights]
    figure, axes = _axes("rollouts per update")
    axes.stackplot(x, heights, colors=_shades(len(names)), labels=_legend(names, level_name), linewidth=0)
    axes.margins(x=0)
    note = f"Root rollouts and continuations, by the {level_name} of their task."
    return _svg(figure, f"By {level_name}", note, len(names))


def _depth_chart(records: Sequence[Record]) -> Chart | None:
    names = _groups(records, "budget/by_depth")
    if not names:
        return None
    totals = [sum(by_group(record, "budget/by_depth").get(name, 0) for record in records) for name in names]
    figure, axes = _axes("share of rollouts", xlabel="depth of the anchor (0: the prompt)", percent=True)
    share = np.array(totals) / max(1, sum(totals))
    bars = axes.bar(names, share, color=[_SERIES[0]] + [_SERIES[1]] * (len(names) - 1), width=0.7)
    axes.bar_label(bars, [f"{100 * value:.0f}%" for value in share], fontsize=8, padding=2)
    return _svg(figure, "By depth of the anchor", "Where rollouts start, over the whole run: the prompt or a turn.")


def _legend(names: Sequence[str], level_name: str) -> list[str]:
    """Labels for a legend that has to fit on one line."""
    return [f"{level_name} {name}" if i == 0 else name for i, name in enumerate(names)]


def draw(records: Sequence[Record], level_name: str = "level") -> tuple[list[Chart], list[Chart], list[Chart]]:
    """Draws what the records of a run have figures for.

    Args:
        records: The run's metrics.
        level_name: What levels of tasks count, in one word.

    Returns:
        Learning curves, pictures of the budget, and pictures of the predictor.
    """
    with matplotlib.rc_context(_STYLE):
        curves = [_accuracy_chart(records, level_name), *(_line_chart(records, spec) for spec in _CURVES)]
        budget = [_level_chart(records, level_name), _depth_chart(records)]
        predictor = [_line_chart(records, spec) for spec in _PREDICTOR]
    return list(filter(None, curves)), list(filter(None, budget)), list(filter(None, predictor))


def palette(start: float, stop: float) -> list[str]:
    """Returns the colours of a ramp, as CSS; `start` and `stop` are positions in viridis, in [0, 1]."""
    colors = matplotlib.colormaps["viridis"](np.linspace(start, stop, _RAMP))
    return [str(matplotlib.colors.to_hex(color)) for color in colors]
