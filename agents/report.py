"""One self-contained page about a run: curves, where the budget went, and trees to unfold turn by turn.

Invariant: the page needs nothing but itself. It loads nothing, runs no script but the one in its template, and whatever
a model wrote is text in it, never markup. The same run directory gives the same page.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from agents.charts import draw, palette
from agents.display import compare_by_level, natural
from agents.runlog import CONFIG, METRICS, REPORT, TREES, iter_jsonl, read_jsonl
from agents.tasks import level_name

MAX_TREES = 200
MAX_TREE_BYTES = 4_000_000
"""Of rendered trees, so that the page stays below 5 MB however long the texts are."""
MAX_TEXT = 2_400
_FACTS = ("env_id", "dataset", "allocator", "estimator", "algorithm", "model", "updates", "seed")

Record = Mapping[str, Any]


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
    levels = level_name(str(config.get("env_id", "")))
    curves, budget, predictor = draw(records, levels)
    flat = _flatten(config)
    page = environment.get_template("report.html.j2").render(
        name=directory.resolve().name,
        facts={key: flat[key] for key in _FACTS if flat.get(key) is not None},
        config=config_text,
        updates=max((record["update"] for record in records), default=0),
        first=first,
        last=last,
        levels=compare_by_level(first, last),
        level_name=levels,
        roots=_tail_mean(records, "effective_ratio/roots"),
        whole=_tail_mean(records, "effective_ratio/tree"),
        ledger=_ledger(records),
        seconds=sum(record.get(key) or 0 for record in records for key in ("time/rollout", "time/update")),
        sections=[
            ("Learning curves", "Faint: each update. Strong: running mean.", curves),
            ("Where the budget went", "", budget),
            ("Predictor", "How well the predictor knew the outcomes before they came.", predictor),
        ],
        fitting_trees=partial(_fitting, chosen),
        tree_total=total,
        light=palette(0.0, 0.82),
        dark=palette(0.28, 1.0),
    )
    output = directory / REPORT
    unfinished = output.with_name(output.name + ".partial")
    unfinished.write_bytes(page.encode("utf-8", "replace"))
    os.replace(unfinished, output)
    return output
