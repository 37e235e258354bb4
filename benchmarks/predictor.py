"""How well do predictors know the outcomes of a policy that is being trained?

Prequential: at each update every predictor says what it thinks of the coming forest before it learns from it. The policy is
trained by the main recipe. Forests are of two kinds: those that the run's allocator chose, and evenly sampled ones. On chosen
forests most V are near one half by selection, so there is less to know; how much, the *ceiling* says: the skill of a predictor
that knew every V, from the chance left in outcomes of independent rollouts from the same prefix. The bar is set on evenly
sampled forests, by the predictor that learned from chosen ones, as it would in training.

    python -m benchmarks.predictor --check

Rows are collected once (about a quarter of an hour) and kept in `--rows`; predictors are then judged in a minute or two.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from agents.config import TrainConfig
from allocation.beliefs import BetaBeliefs
from allocation.calibration import Reliability, auc, brier, expected_calibration_error, reliability
from allocation.contrast import FloatArray
from allocation.predictor import DEPTH_GROUPS, Predictor
from allocation.predictors import PREDICTORS, MeanPredictor, make_predictor
from allocation.roots import IntArray
from benchmarks import config_of, results_folder
from benchmarks.predictor_rows import SOURCES, Rows, record

BAR_SKILL, BAR_AUC = 0.15, 0.75
BAR_PREDICTOR = "hidden_state"


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        predictors: Predictors to compare; `+tree` after a name lets it know how the other root rollouts of a tree ended.
        updates: Policy updates of the run.
        budget: Rollouts of a forest of either kind.
        start: Updates before this one are not scored: the predictors are cold.
        seed: Seeds the run and the predictors.
        quick: A run of a few updates: shows that all works, and measures nothing.
        check: Exit with 1 below the bar.
        rows: Where the collected rows are kept; they are collected if there is no such file.
        output: Directory of the results.
    """

    predictors: tuple[str, ...] = (*PREDICTORS, "hidden_state+tree", "counts+tree")
    updates: int = 110
    budget: int = 128
    start: int = 10
    seed: int = 0
    quick: bool = False
    check: bool = False
    rows: Path = Path(".cache/predictor/main-0.npz")
    output: Path = Path("results")


@dataclass(frozen=True)
class Judged:
    """What a predictor said of all rows before it learned from any of their update.

    Attributes:
        predicted: float [n].
        base: Running mean before the row's update, float [n].
        age: Updates since the row's prompt was last sampled by the stream that was learned from; -1 if never, int [n].
        seconds: Median processor time of learning from one forest, and of predicting one.
    """

    predicted: FloatArray
    base: FloatArray
    age: IntArray
    seconds: tuple[float, float]


def judge(rows: Rows, predictor: Predictor, learn: int, *, tree_outcomes: bool = False) -> Judged:
    """Runs a predictor along a recorded run.

    Args:
        rows: The recording.
        predictor: A fresh predictor.
        learn: Position in `SOURCES` of the forests that it learns from.
        tree_outcomes: Whether anchors know how the other root rollouts of their tree ended.
    """
    beliefs, mean = BetaBeliefs(decay=0.7), MeanPredictor()
    predicted, base = np.zeros(len(rows.value)), np.zeros(len(rows.value))
    age = np.full(len(rows.value), -1, dtype=np.int64)
    learning, predicting = [], []
    for update in range(int(rows.update.max()) + 1):
        for source in (1 - learn, learn):
            at = np.flatnonzero((rows.update == update) & (rows.source == source))
            anchors = list(rows.anchors(at, beliefs.counts, tree_outcomes))
            begin = time.thread_time()
            predicted[at] = predictor.predict(anchors)
            predicting.append(time.thread_time() - begin)
            base[at] = mean.predict(anchors)
            last = beliefs.last_sampled([rows.keys[t] for t in rows.tree[at]])
            age[at] = np.where(last < 0, -1, beliefs.clock - last)
        begin = time.thread_time()
        predictor.update(anchors, rows.value[at], rows.weight[at])
        learning.append(time.thread_time() - begin)
        mean.update(anchors, rows.value[at], rows.weight[at])
        for tree in np.unique(rows.tree[at]):
            beliefs.update(rows.keys[tree], *rows.outcomes[tree])
        beliefs.decay()
    return Judged(predicted, base, age, (float(np.median(learning)), float(np.median(predicting))))


def figures(rows: Rows, judged: Judged, at: np.ndarray) -> dict[str, float]:
    """Returns Brier score, skill, its ceiling, calibration error, AUC and number of some rows (a mask)."""
    p, y, w = judged.predicted[at], rows.value[at], rows.weight[at]
    if not at.any():
        return {"rows": 0}
    reference = brier(judged.base[at], y, w)
    depth = np.minimum(rows.counts[at, 0].astype(np.int64), rows.chance.shape[1] - 1)
    # The mean of w outcomes scatters by V (1 - V) / w around V, and counts w times.
    left = float(rows.chance[rows.source[at], depth].sum() / w.sum())
    return {
        "brier": brier(p, y, w),
        "skill": 1 - brier(p, y, w) / reference,
        "ceiling": 1 - left / reference,
        "ece": expected_calibration_error(p, y),
        "auc": auc(p, y > 0.5),
        "rows": int(at.sum()),
    }


def groups(rows: Rows, judged: Judged, start: int) -> dict[str, np.ndarray]:
    """Returns the rows to score together, by name: all, by depth, and roots by the age of their prompt's counts."""
    scored, depth = rows.update >= start, rows.counts[:, 0]
    found = {"all": scored}
    found |= {name: scored & (depth >= low) & (depth <= high) for name, low, high in DEPTH_GROUPS}
    root = scored & (depth == 0)
    found["roots_never_seen"] = root & (judged.age < 0)
    found["roots_seen_10"] = root & (judged.age >= 0) & (judged.age <= 10)
    found["roots_seen_longer_ago"] = root & (judged.age > 10)
    return found


def draw(diagrams: dict[str, dict[str, Reliability]], path: Path) -> None:
    """Draws the reliability diagrams of several predictors, one panel for each kind of forest."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(diagrams), figsize=(5 * len(diagrams), 4.6), sharey=True, squeeze=False)
    for panel, (source, by_name) in zip(panels[0], diagrams.items(), strict=True):
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for name, diagram in by_name.items():
            some = diagram.count > 0
            panel.plot(diagram.predicted[some], diagram.observed[some], marker="o", markersize=4, label=name)
        panel.set(title=f"{source} forests", xlabel="predicted", xlim=(0, 1), ylim=(0, 1))
    panels[0][0].set_ylabel("observed")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def collect_rows(args: Args, console: Console) -> Rows:
    """Returns the rows from the file, or collects them."""
    if not args.quick and args.rows.exists():
        return Rows.load(args.rows)
    with tempfile.TemporaryDirectory() as runs:
        config = TrainConfig(
            updates=4 if args.quick else args.updates,
            budget=32 if args.quick else args.budget,
            num_envs=32 if args.quick else args.budget,
            checkpoint_every=args.updates,
            keep_checkpoints=1,
            log_trees=0,
            runs=Path(runs),
            name="predictor",
            seed=args.seed,
            threads=1,
        )
        every, prompts = (4, 4) if args.quick else (max(1, args.updates // 5), 12)
        rows = record(config, dense_every=every, dense_prompts=prompts, log=console.print)
    if not args.quick:
        rows.save(args.rows)
    return rows


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether the bar holds."""
    console = Console()
    torch.set_num_threads(1)
    rows = collect_rows(args, console)
    start = 1 if args.quick else args.start
    width = rows.features.shape[1]
    args = replace(args, output=results_folder(args.output, args.quick))
    table = Table(
        *("predictor", "learned", "judged", "skill", "ceiling", "ECE", "AUC"),
        *(f"at {name.removeprefix('depth_').replace('_', '-')}" for name, _, _ in DEPTH_GROUPS),
        *("learn ms", "ask ms"),
        title=f"predictions before the outcome, {int(rows.update.max()) + 1 - start} updates",
    )
    diagrams: dict[str, dict[str, Reliability]] = {source: {} for source in SOURCES}
    reached: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    for name in args.predictors:
        kind, _, option = name.partition("+")
        for learn, taught in enumerate(SOURCES):
            predictor = make_predictor(kind, feature_dim=width, seed=args.seed)
            judged = judge(rows, predictor, learn, tree_outcomes=option == "tree")
            for source, forests in enumerate(SOURCES):
                by = {
                    group: figures(rows, judged, at & (rows.source == source))
                    for group, at in groups(rows, judged, start).items()
                }
                whole = by["all"]
                records.append(
                    {
                        "predictor": name,
                        "learned_from": taught,
                        "judged_on": forests,
                        **whole,
                        "by": by,
                        "seconds": judged.seconds,
                    }
                )
                table.add_row(*_cells(name, taught, forests, by, judged.seconds))
                if taught == "chosen":
                    at = (rows.update >= start) & (rows.source == source)
                    diagrams[forests][name] = reliability(judged.predicted[at], rows.value[at])
                if (name, taught, forests) == (BAR_PREDICTOR, "chosen", "uniform"):
                    reached = whole
    config = config_of(args)
    with (args.output / "predictor.jsonl").open("w") as file:
        for record_ in records:
            line = record_ | {"config": config, "torch": torch.__version__, "numpy": np.__version__}
            file.write(json.dumps(line) + "\n")
    draw(diagrams, args.output / "predictor.png")
    console.print(table)
    if not reached:
        return True
    console.print(
        f"{BAR_PREDICTOR}, learned from chosen forests, on evenly sampled ones: skill {reached['skill']:.3f} "
        f"(bar {BAR_SKILL}), AUC {reached['auc']:.3f} (bar {BAR_AUC})"
    )
    return reached["skill"] > BAR_SKILL and reached["auc"] > BAR_AUC


def _cells(
    name: str, taught: str, forests: str, by: dict[str, dict[str, float]], seconds: Sequence[float]
) -> list[str]:
    whole = by["all"]
    cells = [name, taught, forests]
    cells += [f"{whole[k]:+.2f}" for k in ("skill", "ceiling")] + [f"{whole[k]:.2f}" for k in ("ece", "auc")]
    cells += [f"{by[group].get('auc', np.nan):.2f}" for group, _, _ in DEPTH_GROUPS]
    return cells + [f"{1e3 * s:.0f}" for s in seconds]


if __name__ == "__main__":
    arguments = tyro.cli(Args, prog="python -m benchmarks.predictor")
    sys.exit(1 if not main(arguments) and arguments.check else 0)
