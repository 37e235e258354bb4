"""How many cells a second does the Python sandbox run, and what does a warm process save?

*warm*: `Sandbox.run` with a warm process for each worker, called from as many threads (bar: 200 calls a second on two cores).
*fresh*: a bare `python -I -c` for each call, with no isolation at all, from as many threads (bar: warm is 5 times as fast).
*replay*: a call after 1 to 16 earlier cells, which are run again each time: what the state of an episode costs.

    python -m benchmarks.sandbox --check
    python -m benchmarks.sandbox --quick
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from matplotlib import pyplot as plt
from rich.console import Console

from benchmarks import commit, config_of, versions
from benchmarks.arena_show import markdown, print_table
from trace_envs.sandbox import Limits, Sandbox

RATE_BAR, RATIO_BAR = 200.0, 5.0
TITLE = "Calls of the Python sandbox"
CELLS = {
    "nothing": "1",
    "word problem": "eggs = 16 - 3 - 4\nprint(eggs * 2)",
    "countdown": (
        "from itertools import permutations\n"
        "print(sum(1 for p in permutations([3, 7, 25, 50, 75]) if p[0] * p[1] + p[2] == 46))"
    ),
    "fractions": "from fractions import Fraction\nprint(sum(Fraction(1, n) for n in range(1, 60)))",
}
"""What agents write, shortest first; the bars are for `word problem`."""
JUDGED = "word problem"


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        calls: Calls of each repetition.
        repeats: Repetitions; the median counts, and warm and fresh alternate.
        workers: Warm processes, and threads that call; 0 for one to each core, two at most.
        quick: A tenth of the calls, and no files.
        check: Exit with status 1 if a bar is missed.
        output: Directory of the results.
    """

    calls: int = 400
    repeats: int = 5
    workers: int = 0
    quick: bool = False
    check: bool = False
    output: Path = Path("results")


def rate(call: Callable[[str], str], code: str, wanted: str, calls: int, workers: int) -> float:
    """Returns calls per second of a function that runs code, from several threads.

    Raises:
        RuntimeError: A call printed something else than it should.
    """
    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        outputs = list(pool.map(call, [code] * calls))
        seconds = time.perf_counter() - start
    if set(outputs) != {wanted}:
        raise RuntimeError(f"expected {wanted!r}, got {(set(outputs) - {wanted}).pop()!r}")
    return calls / seconds


def fresh(code: str) -> str:
    """Runs code in a fresh interpreter that nothing holds back."""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, env={})
    return done.stdout


def measure(args: Args, sandbox: Sandbox, workers: int) -> list[dict[str, Any]]:
    """Returns a row for each cell, and one for each number of replayed cells."""
    rows = []
    for name, code in CELLS.items():
        printed = code if "print" in code else f"print({code})"
        wanted = fresh(printed)
        warm_rates, fresh_rates = [], []
        for repeat in range(args.repeats + 1):
            warm = rate(lambda c: sandbox.run(c).output, code, wanted, args.calls, workers)
            bare = rate(fresh, printed, wanted, max(args.calls // 8, workers), workers)
            if repeat:  # the first starts the warm processes
                warm_rates.append(warm)
                fresh_rates.append(bare)
        a, b = median(warm_rates), median(fresh_rates)
        met = None if name != JUDGED else a >= RATE_BAR and a / b >= RATIO_BAR
        rows.append({"cell": name, "replayed": 0, "warm": a, "fresh": b, "ratio": a / b, "met": met})
    for earlier in (1, 2, 4, 8, 16):
        before = [CELLS[JUDGED]] * earlier
        rates = [
            rate(lambda c, b=before: sandbox.run(c, b).output, "eggs", "9\n", args.calls // 4, workers)
            for _ in range(args.repeats)
        ]
        rows.append(
            {"cell": JUDGED, "replayed": earlier, "warm": median(rates), "fresh": None, "ratio": None, "met": None}
        )
    return rows


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table, its headline first."""
    table = [["cell", "replayed", "warm calls/s", "fresh python -I /s", "ratio", f"bar {RATE_BAR:g}/s, {RATIO_BAR:g}x"]]
    for row in rows:
        bare, ratio = (f"{row['fresh']:.0f}", f"{row['ratio']:.1f}") if row["fresh"] else ("", "")
        verdict = "" if row["met"] is None else "met" if row["met"] else "MISSED"
        table.append([row["cell"], str(row["replayed"]), f"{row['warm']:.0f}", bare, ratio, verdict])
    return table


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws calls per second over the number of replayed cells."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    grown = [row for row in rows if row["cell"] == JUDGED]
    axes.plot([row["replayed"] for row in grown], [row["warm"] for row in grown], marker="o", label="warm")
    axes.axhline(next(row["fresh"] for row in grown), color="C1", label="fresh python -I, no replay")
    axes.axhline(RATE_BAR, color="grey", linestyle=":", label="bar")
    axes.set(xlabel="earlier cells, run again", ylabel="calls per second", title=TITLE)
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether its bars are met."""
    if args.quick:
        args = replace(args, calls=max(args.calls // 10, 8), repeats=2)
    workers = args.workers or min(2, len(os.sched_getaffinity(0)))
    with Sandbox(Limits(), workers=workers) as sandbox:
        isolation = asdict(sandbox.isolation)
        rows = measure(args, sandbox, workers)
    console = Console(width=None if sys.stdout.isatty() else 160)
    print_table(console, TITLE, cells(rows))
    held = ", ".join(f"{name} {value}" for name, value in isolation.items())
    console.print(f"{workers} workers; {held}", highlight=False)
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        shared = {
            "config": config_of(args),
            "versions": versions("numpy"),
            "workers": workers,
            "isolation": isolation,
            "commit": commit(),
        }
        (args.output / "sandbox.jsonl").write_text("".join(json.dumps(row | shared) + "\n" for row in rows))
        (args.output / "sandbox.md").write_text(f"{markdown(TITLE, cells(rows))}\n{workers} workers; {held}\n")
        draw(rows, args.output / "sandbox.png")
    judged = [row for row in rows if row["met"] is not None]
    for row in judged:
        console.print(f"{row['warm']:.0f} calls/s, {row['ratio']:.1f} times a fresh interpreter", highlight=False)
    return all(row["met"] for row in judged)


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.sandbox")
    sys.exit(0 if main(given) or not given.check else 1)
