"""The paper's table at a size that two cores can run: methods x environments x pools of prompts x seeds.

Every run is a training run in a process of its own, resumed if it was broken off and never done twice: a row in the file of
results counts as done while no setting has changed since. Rows come out seed by seed and are written at once, so that whatever
is there when time runs out is paired. Step sizes are chosen for each method on the validation split, by
seeds that no comparison uses (`--tune`), and kept in `results/reproduce_steps.json`.

    python -m benchmarks.reproduce --quick
    python -m benchmarks.reproduce --worlds tools --tune
    python -m benchmarks.reproduce --worlds tools --seeds 8 --jobs 2
    python -m benchmarks.reproduce --check
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from benchmarks import config_of
from benchmarks.arena_show import markdown, print_table
from benchmarks.reproduce_figures import draw_budgets, draw_curves
from benchmarks.reproduce_grid import ABLATION, MAIN, METHODS, QUICK, WORLDS, Cell, Size, cells
from benchmarks.reproduce_runs import launch
from benchmarks.reproduce_tables import BASE, comparisons, set_cells, summary
from benchmarks.reproduce_tables import cells as table_cells

GAIN_BAR, RATIO_BAR, TOKENS_BAR = 0.028, 1.7, 0.5
TUNING_SEEDS = (1000, 1001)
STEPS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        worlds: Environments: `multihop`, `tools`, `math`.
        pools: Pools of training prompts: `balanced`, `skewed`, `sparse`.
        methods: Methods; `main` for the table's, `ablation` for TRACE with and without its stages.
        seeds: Seeds, from 0 on.
        warm_starts: Models to start from, by seed in turn; the shipped one if there are none. The folders must hold warm starts
            of the environment, so give one environment only.
        updates: Policy updates of a run.
        budget: Rollouts of each update.
        points: Evaluations on the way, besides those at the two ends.
        per_level: Tasks of each level in those.
        final_per_level: Tasks of each level in the evaluations at the end.
        last: Checkpoints that are evaluated at the end, the last ones; accuracy is their mean. Evaluation sets beside the main
            one are given to the very last.
        jobs: Runs side by side, one thread each; 0 for one to each core.
        tune: Choose step sizes instead of comparing.
        quick: Three methods, two seeds, a few small updates, and no files: under five minutes.
        check: Exit with status 1 if a learning bar of PERFORMANCE.md is missed; without a run it judges the committed rows.
        runs: Where runs are kept.
        output: Directory of the results. Runs whose rows are there are not done again; for that, name another one.
    """

    worlds: tuple[str, ...] = ("multihop",)
    pools: tuple[str, ...] = ("balanced",)
    methods: tuple[str, ...] = ("main",)
    seeds: int = 8
    warm_starts: tuple[str, ...] = ()
    updates: int = 110
    budget: int = 128
    points: int = 10
    per_level: int = 50
    final_per_level: int = 300
    last: int = 3
    jobs: int = 0
    tune: bool = False
    quick: bool = False
    check: bool = False
    runs: Path = Path("runs/reproduce")
    output: Path = Path("results")

    def __post_init__(self) -> None:
        for given, known in (
            (self.worlds, WORLDS),
            (self.pools, WORLDS["multihop"].pools),
            (self.methods, (*METHODS, "main", "ablation")),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"unknown name {name!r}; known: {', '.join(known)}")
        if self.warm_starts and len(self.worlds) > 1:
            raise ValueError("warm_starts are of one environment: give --worlds with one name")
        for name in ("seeds", "updates", "budget", "points", "per_level", "final_per_level", "last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def size(self) -> Size:
        """How large a run is."""
        return Size(self.updates, self.budget, self.points, self.per_level, self.final_per_level, self.last)

    @property
    def starts(self) -> tuple[str, ...]:
        """The warm starts, of which the seed picks one."""
        return self.warm_starts or ("tiny",)

    @property
    def all_methods(self) -> list[str]:
        """The methods by name, each once."""
        groups = {"main": MAIN, "ablation": ABLATION}
        return list(dict.fromkeys(m for name in self.methods for m in groups.get(name, (name,))))


def run_all(
    todo: Sequence[Cell], args: Args, console: Console, done: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Does runs, some side by side.

    Args:
        todo: The runs.
        args: The settings.
        console: Where it is said which of them failed.
        done: Called with each row as it comes.

    Returns:
        The rows of the runs that succeeded.
    """
    jobs = args.jobs or len(os.sched_getaffinity(0))
    rows = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(launch, cell, args.runs, args.starts): cell for cell in todo}
        for future in track(as_completed(futures), description="runs", total=len(todo), console=console):
            try:
                rows.append(future.result())
            except RuntimeError as error:
                console.print(f"[red]{error}", highlight=False)
            else:
                if done is not None:
                    done(rows[-1])
    return rows


def is_done(row: Mapping[str, Any], todo: Mapping[Cell, str]) -> bool:
    """Returns whether a row is that of a run as it would be done now; `todo` gives the fingerprints of runs."""
    return todo.get(Cell.of(row)) == row.get("fingerprint", "")


def ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows in the order of the grid, comparison by comparison."""
    pools = list(WORLDS["multihop"].pools)
    places = {name: i for i, name in enumerate((*WORLDS, *pools, *METHODS))}

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        names = [places[row[key]] for key in ("world", "pool", "method")]
        return *names[:2], tuple(row["size"].values()), row["split"], row["seed"], names[2], row["step"]

    return sorted(rows, key=place)


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows, all or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in ranked(rows)))
    part.replace(path)


def tune(args: Args, console: Console) -> None:
    """Chooses the step size of each method: the best mean accuracy on the validation split."""
    size = replace(args.size, last=1)
    todo = [
        Cell(world, args.pools[0], method, seed, step, "validation", size)
        for seed in TUNING_SEEDS
        for world in args.worlds
        for method in args.all_methods
        for step in STEPS
    ]
    found: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in run_all(todo, args, console):
        found[row["world"], row["method"]][row["step"]].append(row["accuracy"])
    path = args.output / "reproduce_steps.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for (world, method), by_step in found.items():
        means = {step: float(np.mean(values)) for step, values in by_step.items()}
        known[f"{world}/{method}"] = {
            "step": max(means, key=means.__getitem__),
            "validation": means,
            "pool": args.pools[0],
        }
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print_table(
        console,
        "Step sizes chosen on validation",
        [["run", "step", "accuracy by step"], *([k, f"{v['step']:g}", str(v["validation"])] for k, v in known.items())],
    )


def tuned(output: Path) -> dict[tuple[str, str], float]:
    """Returns the step sizes that were chosen, by world and method."""
    path = output / "reproduce_steps.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return {(world, method): v["step"] for k, v in known.items() for world, method in [k.split("/")]}


def verdicts(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """Returns the learning bars with whether our method meets each."""
    named = {record["method"]: record for record in records}
    ours = next((named[name] for name in ("trace_plus", "trace") if name in named), None)
    if ours is None or BASE not in named:
        return []
    ratio = ours["ratio_tree"].mean / max(named[BASE]["ratio_tree"].mean, 1e-9)
    gain = ours["gain"]
    bounds = "" if np.isnan(gain.low) else f" [{100 * gain.low:.1f}, {100 * gain.high:.1f}]"
    part = ours["tokens_to_base"]
    reached = "is not reached by half of the seeds" if np.isinf(part) else f"with {part:.2f} of its tokens"
    # Variants of ours, and of TRACE, are no baselines.
    rivals = [r["accuracy"].mean for name, r in named.items() if name in MAIN and name != ours["method"]]
    return [
        (f"effective ratio {ratio:.2f} times that of {BASE} (bar {RATIO_BAR})", ratio >= RATIO_BAR),
        (
            f"accuracy {100 * gain.mean:+.1f} points{bounds} over {BASE}, {gain.count} seeds "
            f"(bar +{100 * GAIN_BAR:.1f}, interval above 0)",
            gain.mean >= GAIN_BAR and gain.low > 0,
        ),
        (
            f"{BASE}'s final accuracy {reached} (bar {TOKENS_BAR})",
            ours["tokens_to_base"] <= TOKENS_BAR,
        ),
        ("ahead of every baseline", all(ours["accuracy"].mean > rival for rival in rivals)),
    ]


def report(
    rows: Sequence[Mapping[str, Any]], console: Console, output: Path | None = None, *, judge: bool = True
) -> bool:
    """Prints tables and, unless the runs are too small for them, verdicts; writes them if there is a folder.

    Returns:
        Whether every bar that was judged is met.
    """
    met, text = True, []
    for title, chosen in comparisons(rows).items():
        records = summary(chosen)
        print_table(console, title, table_cells(records))
        text.append(markdown(title, table_cells(records)))
        sets = set_cells(chosen)
        text.append(markdown(f"{title}: evaluation sets and levels", sets))
        for line, good in verdicts(records) if judge else ():
            met = met and good
            console.print(f"{'met   ' if good else 'MISSED'} {line}", highlight=False)
            text.append(f"* {'met' if good else '**missed**'}: {line}")
        text.append("")
    if output is not None:
        (output / "reproduce.md").write_text("\n".join(text))
        draw_curves(rows, output / "reproduce.png")
        draw_budgets(rows, output / "reproduce_budget.png")
    return met


def main(args: Args) -> bool:
    """Does what is asked; returns whether every bar is met."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows_file = args.output / "reproduce.jsonl"
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            args = replace(args, runs=Path(folder), methods=("grpo", "pcl", "trace_plus"), seeds=2)
            todo = list(cells(args.worlds, args.pools, args.all_methods, range(2), {}, split="test", size=QUICK))
            rows = ranked(run_all(todo, args, console))
            report(rows, console, judge=False)
            return len(rows) == len(todo)
    if args.tune:
        tune(args, console)
        return True
    if args.check:
        if not rows_file.exists():
            console.print(f"there are no results in {rows_file}: run python -m benchmarks.reproduce first")
            return False
        return report([json.loads(line) for line in rows_file.read_text().splitlines()], console)
    steps = tuned(args.output)
    grid = cells(args.worlds, args.pools, args.all_methods, range(args.seeds), steps, split="test", size=args.size)
    todo = {cell: cell.fingerprint(args.starts) for cell in grid}
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    known = {Cell.of(row) for row in rows if is_done(row, todo)}
    shared = {"config": config_of(args)}

    def done(row: dict[str, Any]) -> None:
        rows[:] = [other for other in rows if Cell.of(other) != Cell.of(row)] + [row | shared]
        save(rows_file, rows)

    run_all([cell for cell in todo if cell not in known], args, console, done)
    return report(ranked(rows), console, args.output)


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.reproduce")
    sys.exit(0 if main(given) or not given.check else 1)
