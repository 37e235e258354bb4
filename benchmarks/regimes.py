"""In which regimes does it pay to choose prompts, and to branch from prefixes? A learning problem that is known exactly.

Runs of `benchmarks.reproduce` take minutes each and are noisy; here a linear policy learns chains of shared skills
(`benchmarks.regimes_world`) from outcomes alone, in a second or two, through the same allocators, trees and estimators. Values
are told exactly (`--predictor told`), so that what is compared is allocation and not prediction; `--predictor hidden_state`
learns them. Runs stop at equal numbers of turns, which stand for tokens; Adam's step size falls to zero over a run and is
chosen for each method and regime by the success at the end of four seeds that are not reported. Reported is the exact chance of
success over the pool.

    python -m benchmarks.regimes --quick
    python -m benchmarks.regimes
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track

from agents.advantages import CreditConfig, estimate
from agents.aggregation import edge_coefficients
from allocation import make_allocator, make_predictor
from allocation.allocators import Allocator
from allocation.arena.worlds import replay
from allocation.forest_table import ForestTable
from allocation.tree import Forest
from benchmarks import commit, config_of, versions
from benchmarks.arena_show import markdown, print_table
from benchmarks.regimes_world import REGIMES, SkillWorld, Told
from benchmarks.reproduce_grid import METHODS
from benchmarks.reproduce_tables import Interval, interval

STEPS = (0.15, 0.3, 0.6, 1.2)
TUNING_SEEDS = (900, 901, 902, 903)
BASE = "grpo"
POINTS = 20


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        regimes: Names of `regimes_world.REGIMES`; all if there are none.
        methods: Names of `reproduce_grid.METHODS`.
        seeds: Seeds of each, from 0 on.
        turns: Turns that a run may take.
        budget: Rollouts of an update.
        predictor: `told`, or a name of `PREDICTORS`.
        jobs: Processes; 0 for one to each core.
        quick: Two regimes, three methods, few seeds and turns, and no files.
        output: Directory of the results.
    """

    regimes: tuple[str, ...] = ()
    methods: tuple[str, ...] = (
        *("grpo", "pcl", "mopps", "vip", "treepo", "tree_grpo", "arpo", "trace", "trace_roots"),
        *("trace_plus", "trace_plus_top", "trace_plus_roots", "trace_plus_prefixes"),
    )
    seeds: int = 12
    turns: int = 6_000
    budget: int = 64
    predictor: str = "told"
    jobs: int = 0
    quick: bool = False
    output: Path = Path("results")

    def __post_init__(self) -> None:
        for given, known in ((self.regimes, REGIMES), (self.methods, METHODS)):
            for name in given:
                if name not in known:
                    raise ValueError(f"unknown name {name!r}; known: {', '.join(known)}")


@dataclass(frozen=True)
class Run:
    """One run; see `Args`."""

    regime: str
    method: str
    seed: int
    step: float
    turns: int
    budget: int
    predictor: str


def allocator_of(run: Run, world: SkillWorld) -> Allocator:
    """Returns a fresh allocator of the run's method."""
    settings = METHODS[run.method].settings
    predictor: Any = (
        Told()
        if run.predictor == "told"
        else make_predictor(run.predictor, feature_dim=world.feature_dim, seed=run.seed)
    )
    name, group_size = settings["allocator"], settings.get("group_size", 8)
    return make_allocator(name, predictor=predictor, group_size=group_size, config=settings.get(name))


def gradient(world: SkillWorld, forest: Forest, settings: Mapping[str, Any]) -> np.ndarray:
    """Returns the policy gradient of a forest, float64 [DIM, ACTIONS]."""
    table = ForestTable.of(forest)
    credit = estimate(table, settings["estimator"], CreditConfig(advantage_std=settings.get("advantage_std", False)))
    weights = edge_coefficients(table, credit, "prompt") * credit.advantage
    found, row = np.zeros_like(world.policy), 0
    for tree in table.trees:
        for node in tree.nodes:
            if weights[row] and node.depth:
                skill = world.skill_of(tree, node)
                found[skill] -= weights[row] * world.policy[skill]
                found[skill, node.action] += weights[row]
            row += 1
    return world.features.T @ found


class Adam:
    """Adam without weight decay, in numpy: its steps have about the same length however strong the signal is."""

    def __init__(self, shape: tuple[int, ...], step: float, beta1: float = 0.9, beta2: float = 0.999):
        self.step, self.beta1, self.beta2, self.count = step, beta1, beta2, 0
        self.m, self.v = np.zeros(shape), np.zeros(shape)

    def __call__(self, g: np.ndarray) -> np.ndarray:
        """Returns the step uphill."""
        self.count += 1
        self.m += (1 - self.beta1) * (g - self.m)
        self.v += (1 - self.beta2) * (g * g - self.v)
        m, v = self.m / (1 - self.beta1**self.count), self.v / (1 - self.beta2**self.count)
        return self.step * m / (np.sqrt(v) + 1e-8)


def train(run: Run) -> dict[str, Any]:
    """Returns the row of a run."""
    world = SkillWorld(REGIMES[run.regime], run.seed, exact=run.predictor == "told")
    allocator, settings = allocator_of(run, world), METHODS[run.method].settings
    optimizer = Adam(world.weights.shape, run.step)
    turns, rollouts, updates = [0], 0, 0
    curve, ratios, continuations = [world.success], [], 0
    while turns[-1] < run.turns:
        forest = replay(world, allocator, run.budget, np.random.default_rng([run.seed, updates]))
        world.weights += (1 - turns[-1] / run.turns) * optimizer(gradient(world, forest, settings))
        allocator.update(forest)
        world.refresh()
        updates += 1
        turns.append(turns[-1] + forest.ledger.environment_turns)
        rollouts += forest.ledger.root_rollouts + forest.ledger.continuations
        continuations += forest.ledger.continuations
        ratios.append((forest.effective_ratio("root"), forest.effective_ratio()))
        curve.append(world.success)
    at = np.linspace(0, run.turns, POINTS + 1)
    return {
        **vars(run),
        "curve": np.interp(at, turns, curve).tolist(),
        "success": float(np.interp(run.turns, turns, curve)),
        "area": float(np.interp(at, turns, curve).mean()),
        "ratio_roots": float(np.mean([r for r, _ in ratios])),
        "ratio_tree": float(np.mean([r for _, r in ratios])),
        "continuations": continuations / max(rollouts, 1),
        "updates": updates,
    }


def run_all(runs: Sequence[Run], args: Args, console: Console, what: str) -> list[dict[str, Any]]:
    """Does runs side by side; rows come in their order."""
    with ProcessPoolExecutor(args.jobs or None, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(train, runs, chunksize=4)
        return list(track(found, description=what, total=len(runs), console=console))


def compare(args: Args, console: Console) -> list[dict[str, Any]]:
    """Tunes the step of each method in each regime, then returns the rows of the seeds that count."""
    regimes = args.regimes or tuple(REGIMES)
    rest = (args.turns, args.budget, args.predictor)
    grid = [(r, m) for r in regimes for m in args.methods]
    tuning = [Run(r, m, s, step, *rest) for r, m in grid for step in STEPS for s in TUNING_SEEDS]
    ends: dict[tuple[str, str, float], list[float]] = {}
    for row in run_all(tuning, args, console, "step sizes"):
        ends.setdefault((row["regime"], row["method"], row["step"]), []).append(row["success"])
    best = {(r, m): max(STEPS, key=lambda step: float(np.mean(ends[r, m, step]))) for r, m in grid}
    runs = [Run(r, m, s, best[r, m], *rest) for r, m in grid for s in range(args.seeds)]
    return run_all(runs, args, console, "runs")


def shown(found: Interval, signed: bool = False) -> str:
    """Returns an interval in per cent or points."""
    mean = f"{100 * found.mean:{'+' if signed else ''}.1f}"
    return f"{mean} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def turns_to(row: Mapping[str, Any], success: float) -> float:
    """Returns the share of a run's turns after which it first has a chance of success; infinity if it never has."""
    curve = np.array(row["curve"])
    reached = np.flatnonzero(curve >= success)
    if not len(reached):
        return float("inf")
    i = int(reached[0])
    part = (success - curve[i - 1]) / (curve[i] - curve[i - 1]) if i else 0.0
    return (i - 1 + part) / (len(curve) - 1) if i else 0.0


HEAD = (
    "method", "success at the end, %", "over grpo", "over pcl", "turns to grpo's end", "ratio roots, %", "ratio trees, %",
    "continuations, %", "step",
)  # fmt: skip


def cells(rows: Sequence[Mapping[str, Any]], regime: str) -> list[list[str]]:
    """Returns the table of a regime, its headline first."""
    by: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["regime"] == regime:
            by.setdefault(row["method"], {})[row["seed"]] = row
    table = [list(HEAD)]
    for method, found in by.items():
        line = [method, shown(interval([r["success"] for r in found.values()]))]
        for base in (BASE, "pcl"):
            known = base in by and base != method
            line.append(
                shown(interval([found[s]["success"] - by[base][s]["success"] for s in found]), True) if known else ""
            )
        shares = [turns_to(found[s], by[BASE][s]["success"]) for s in found] if BASE in by and method != BASE else []
        middle = float(np.median(shares)) if shares else float("nan")
        line.append("" if not shares else "never" if np.isinf(middle) else f"{middle:.2f}")
        means = [np.mean([r[k] for r in found.values()]) for k in ("ratio_roots", "ratio_tree", "continuations")]
        table.append([*line, *(f"{100 * m:.0f}" for m in means), f"{next(iter(found.values()))['step']:g}"])
    return table


def tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """Returns a title and cells for each regime."""
    return [(f"{name}: {REGIMES[name].what}", cells(rows, name)) for name in dict.fromkeys(r["regime"] for r in rows)]


def merged(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes rows to a file in the place of those of the same regimes and methods; returns all, in the order of the grid."""
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = {(row["regime"], row["method"]) for row in rows}
    found = [row for row in known if (row["regime"], row["method"]) not in new] + list(rows)
    found.sort(key=lambda r: (list(REGIMES).index(r["regime"]), list(METHODS).index(r["method"]), r["seed"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws success over turns, means over seeds, one panel for each regime."""
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    columns = min(3, len(regimes))
    lines = -(-len(regimes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 4 * lines), squeeze=False, layout="constrained")
    for axis, regime in zip(axes.flat, regimes, strict=False):
        chosen = [row for row in rows if row["regime"] == regime]
        for i, method in enumerate(dict.fromkeys(row["method"] for row in chosen)):
            curves = [row["curve"] for row in chosen if row["method"] == method]
            at = np.linspace(0, chosen[0]["turns"], len(curves[0])) / 1e3
            width = 3 if method == "trace_plus" else 1.5
            axis.plot(at, 100 * np.mean(curves, axis=0), label=method, color=plt.get_cmap("tab20")(i), linewidth=width)
        axis.set(title=regime, xlabel="turns, thousands", ylabel="success, %")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    for axis in axes.flat[len(regimes) :]:
        axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args) -> None:
    """Runs the benchmark."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    if args.quick:
        methods = ("grpo", "pcl", "trace_plus")
        args = replace(args, regimes=("skewed", "sparse"), methods=methods, seeds=2, turns=3000)
    rows = compare(args, console)
    if not args.quick:
        name = "regimes" if args.predictor == "told" else f"regimes_{args.predictor}"
        args.output.mkdir(parents=True, exist_ok=True)
        shared = {"config": config_of(args), "versions": versions("numpy"), "commit": commit()}
        rows = merged(args.output / f"{name}.jsonl", [row | shared for row in rows])
        (args.output / f"{name}.md").write_text("\n".join(markdown(title, table) for title, table in tables(rows)))
        draw(rows, args.output / f"{name}.png")
    for title, table in tables(rows):
        print_table(console, title, table)


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.regimes"))
