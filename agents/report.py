"""One self-contained page about a run: curves, where the budget went, and trees to unfold turn by turn.

Invariant: the page needs nothing but itself. It loads nothing, runs no script but the one in its template, and whatever
a model wrote is text in it, never markup. The same run directory gives the same page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from agents.display import by_group, compare_by_hops, natural
from agents.runlog import CONFIG, METRICS, REPORT, TREES, iter_jsonl, read_jsonl

MAX_TREES = 200
MAX_TREE_BYTES = 4_000_000
"""Of rendered trees, so that the page stays below 5 MB however long the texts are."""
MAX_TEXT = 2_400
_MAX_POINTS = 400
_RAMP = 8
_FACTS = ("env_id", "dataset", "allocator", "estimator", "algorithm", "model", "updates", "seed")

Record = Mapping[str, Any]


# --- charts ---
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


def _accuracy_chart(records: Sequence[Record]) -> Chart | None:
    hops = _groups(records, "eval/accuracy_by_hops")
    figure, axes = _axes("accuracy", percent=True)
    for color, name, label in zip(_shades(len(hops)), hops, _hops(hops), strict=True):
        x, y = _points(records, f"eval/accuracy_by_hops/{name}")
        axes.plot(x, y, color=color, linewidth=1.4, marker="o", markersize=2.5, label=label)
    x, y = _points(records, "eval/accuracy")
    if not len(x):
        return None
    axes.plot(x, y, color=_INK, linewidth=2.2, marker="o", markersize=4, label="all")
    axes.set_ylim(0, 1.02)
    note = "Held-out questions, by number of hops."
    return _svg(figure, "Accuracy on unseen questions", note, len(hops) + 1)


def _hops_chart(records: Sequence[Record]) -> Chart | None:
    names = _groups(records, "budget/by_hops")
    rows = [record for record in records if by_group(record, "budget/by_hops")]
    if not names:
        return None
    parts = np.array_split(np.arange(len(rows)), min(len(rows), 60))
    x = [float(np.mean([rows[i]["update"] for i in part])) for part in parts]
    keys = [f"budget/by_hops/{name}" for name in names]
    heights = [[float(np.mean([rows[i].get(key) or 0 for i in part])) for part in parts] for key in keys]
    if len(x) == 1:  # an area needs a width
        x, heights = [x[0] - 0.5, x[0] + 0.5], [height * 2 for height in heights]
    figure, axes = _axes("rollouts per update")
    axes.stackplot(x, heights, colors=_shades(len(names)), labels=_hops(names), linewidth=0)
    axes.margins(x=0)
    note = "Root rollouts and continuations, by the hops of their question."
    return _svg(figure, "By number of hops", note, len(names))


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


def _hops(names: Sequence[str]) -> list[str]:
    """Labels for a legend that has to fit on one line."""
    return [f"{name} hop{'' if name == '1' else 's'}" if i == 0 else name for i, name in enumerate(names)]


# --- trees ---
@dataclass(slots=True)
class Branch:
    """A run of turns without a fork, and the branches that part at its end."""

    name: str
    origin: str
    turns: list[Record] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    wins: int = 0
    leaves: int = 0


@dataclass(frozen=True, slots=True)
class TreeView:
    """A record of trees.jsonl, folded into branches."""

    record: Record
    root: Record
    branches: list[Branch]
    wins: int
    leaves: int
    continuations: int

    @property
    def mixed(self) -> bool:
        """Whether both outcomes occur."""
        return 0 < self.wins < self.leaves


def outcome(node: Record) -> bool | None:
    """Says how an episode ended: True, False, or None for a node that is no end."""
    return bool(node.get("is_correct")) if node.get("terminated") or node.get("truncated") else None


def _mixed(record: Record) -> bool:
    return len({outcome(node) for node in record.get("nodes", ())} - {None}) == 2


def fold(record: Record) -> TreeView:
    """Arranges the nodes of a tree for reading: chains become lists, and only forks nest.

    Args:
        record: A record of trees.jsonl.

    Returns:
        The same nodes as branches, each with its successes and ends counted.
    """
    children: dict[Any, list[Record]] = {}
    nodes = list(record.get("nodes", ()))
    root = next((node for node in nodes if node.get("parent") is None), {"id": None})
    for node in nodes:
        if node is not root:
            children.setdefault(node.get("parent"), []).append(node)

    def grow(node: Record, name: str) -> Branch:
        branch = Branch(name, str(node.get("origin", "root")))
        while True:
            branch.turns.append(node)
            below = children.pop(node["id"], [])  # popped, so that damaged parent links cannot run in a circle
            if len(below) != 1:
                break
            node = below[0]
        if (won := outcome(node)) is not None:
            branch.leaves, branch.wins = 1, int(won)
        branch.branches = split(below, f" after turn {node.get('depth', '?')}")
        branch.wins += sum(child.wins for child in branch.branches)
        branch.leaves += sum(child.leaves for child in branch.branches)
        return branch

    def split(below: list[Record], place: str) -> list[Branch]:
        count, named = {"root": 0, "continuation": 0}, []
        for node in below:
            kind = "continuation" if node.get("origin") == "continuation" else "root"
            count[kind] += 1
            label = f"continuation {count[kind]}" if kind == "continuation" else f"rollout {count[kind]}"
            if place:
                label = f"{label}{place}" if kind == "continuation" else "as first drawn"
            named.append(grow(node, label))
        return named

    branches = split(children.pop(root["id"], []), "")
    parents = {node["id"]: node for node in nodes}
    continuations = sum(
        node.get("origin") == "continuation" and parents.get(node.get("parent"), {}).get("origin") != "continuation"
        for node in nodes
    )
    wins, leaves = sum(b.wins for b in branches), sum(b.leaves for b in branches)
    return TreeView(record, root, branches, wins, leaves, continuations)


def select_trees(path: Path, limit: int = MAX_TREES) -> tuple[list[Record], int]:
    """Picks the trees worth reading, best first: half the latest mixed ones, then mixed ones spread over the run.

    Args:
        path: trees.jsonl; it may be missing. It is read twice and never held whole.
        limit: Most trees to pick.

    Returns:
        The chosen records and the number of trees in the file.
    """
    if not path.exists():
        return [], 0
    mixed = [_mixed(record) for record in iter_jsonl(path)]
    both = [i for i, flag in enumerate(mixed) if flag]
    chosen = dict.fromkeys(reversed(both[-(limit // 2) :]))
    early = both[: -(limit // 2)]
    spread = np.linspace(0, len(early) - 1, min(len(early), limit // 4))
    chosen |= dict.fromkeys(early[round(i)] for i in spread.tolist())
    chosen |= dict.fromkeys(reversed(range(len(mixed))))
    order = list(chosen)[:limit]
    wanted, found = set(order), {}
    for index, record in enumerate(iter_jsonl(path)):
        if index in wanted:
            found[index] = record
        if len(found) == len(wanted):
            break  # before a torn last line is met, and warned of, for a second time
    return [found[index] for index in order], len(mixed)


_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def _clip(text: object) -> str:
    """Shows control characters as pictures and leaves out the middle of what is too long to read."""
    string = str(text if text is not None else "").translate(_CONTROL)
    if len(string) <= MAX_TEXT:
        return string
    keep = MAX_TEXT // 2
    return f"{string[:keep]}\n[… {len(string) - 2 * keep:,} characters left out …]\n{string[-keep:]}"


# --- the page ---
def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            {k: v for k, v in _flatten(value).items() if k not in flat} if isinstance(value, Mapping) else {key: value}
        )
    return flat


def _tail_mean(records: Sequence[Record], key: str) -> float | None:
    values = [record[key] for record in records if isinstance(record.get(key), int | float)]
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail) if tail else None


def _ledger(records: Sequence[Record]) -> dict[str, float]:
    names = sorted({key for record in records for key in record if key.startswith("ledger/")})
    return {name.removeprefix("ledger/"): sum(record.get(name) or 0 for record in records) for name in names}


def _number(value: Any, form: str) -> str:
    return "–" if not isinstance(value, int | float) else format(value, form).replace("-", "−")


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _palette(start: float, stop: float) -> list[str]:
    colors = matplotlib.colormaps["viridis"](np.linspace(start, stop, _RAMP))
    return [str(matplotlib.colors.to_hex(color)) for color in colors]


def _fitting(chosen: Sequence[Record], draw: Callable[[TreeView], Markup]) -> list[tuple[Record, Markup]]:
    """Draws the chosen trees, the best first, until the page is full, and returns them with the latest first."""
    drawn: list[tuple[Record, Markup]] = []
    size = 0
    for record in chosen:
        html = draw(fold(record))
        size += len(html.encode("utf-8", "replace"))
        if size > MAX_TREE_BYTES:
            break
        drawn.append((record, html))
    return sorted(drawn, key=lambda pair: (-pair[0]["update"], natural(str(pair[0].get("tree", 0)))))


def write_report(run_directory: str | os.PathLike[str]) -> Path:
    """Writes `report.html` from what a run left behind.

    Args:
        run_directory: Holds `metrics.jsonl` and, where present, `config.yaml` and `trees.jsonl`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: The directory holds no `metrics.jsonl`.
        DamagedLogError: A line other than the last of one of the logs is damaged.
    """
    directory = Path(run_directory)
    if not (directory / METRICS).exists():
        raise FileNotFoundError(f"{directory} holds no {METRICS}: name the directory of a run, such as runs/<name>.")
    records = read_jsonl(directory / METRICS)
    path = directory / CONFIG
    config_text = path.read_text(encoding="utf-8") if path.exists() else ""
    config = yaml.safe_load(config_text) or {}
    chosen, total = select_trees(directory / TREES)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clip": _clip, "number": _number, "csp_hash": _csp_hash}
    environment.globals["outcome"] = outcome

    evaluations = [record for record in records if isinstance(record.get("eval/accuracy"), int | float)]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    with matplotlib.rc_context(_STYLE):
        curves = [_accuracy_chart(records), *(_line_chart(records, spec) for spec in _CURVES)]
        budget = [_hops_chart(records), _depth_chart(records)]
        predictor = [_line_chart(records, spec) for spec in _PREDICTOR]
    flat = _flatten(config)
    page = environment.get_template("report.html.j2").render(
        name=directory.resolve().name,
        facts={key: flat[key] for key in _FACTS if flat.get(key) is not None},
        config=config_text,
        updates=max((record["update"] for record in records), default=0),
        first=first,
        last=last,
        hops=compare_by_hops(first, last),
        roots=_tail_mean(records, "effective_ratio/roots"),
        whole=_tail_mean(records, "effective_ratio/tree"),
        ledger=_ledger(records),
        seconds=sum(record.get(key) or 0 for record in records for key in ("time/rollout", "time/update")),
        sections=[
            ("Learning curves", "Faint: each update. Strong: running mean.", list(filter(None, curves))),
            ("Where the budget went", "", list(filter(None, budget))),
            ("Predictor", "How well the predictor knew the outcomes before they came.", list(filter(None, predictor))),
        ],
        fitting_trees=partial(_fitting, chosen),
        tree_total=total,
        light=_palette(0.0, 0.82),
        dark=_palette(0.28, 1.0),
    )
    output = directory / REPORT
    unfinished = output.with_name(output.name + ".partial")
    unfinished.write_bytes(page.encode("utf-8", "replace"))
    os.replace(unfinished, output)
    return output
