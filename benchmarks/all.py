"""Every benchmark, one after the other, and one table of what came of them.

Each runs in a process of its own with `--check`. Small runs (`--quick`) show that it works; their verdicts are of small runs:
the status of this command then says only whether every benchmark came to its end.

    python -m benchmarks.all --quick
    python -m benchmarks.all --only sandbox tool_turns
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track

from benchmarks.arena_show import print_table

BENCHMARKS = {
    "snapshots": "snapshot and restore >= 100x deep copy, >= 5x ale-py; memory <= 1.5x; wrapper <= 30 %",
    "retrieval": "scores of rank-bm25 to 1e-9, >= 100x its speed, >= 1.5x that of bm25s",
    "environment": "turns >= 30x those with rank-bm25's own scoring",
    "generation": "tokens computed <= 1.1 of the different ones, >= 1.5x model.generate",
    "packing": "a step >= 0.8 S times as fast, equal gradients",
    "allocation_scale": "allocation <= 2 % of the iteration, objective >= 0.999 of the exact program's",
    "arena": "gradient signal of the methods at equal tokens",
    "regimes": "where allocation pays, on a problem that is known exactly (no bar)",
    "predictor": "Brier skill > 0.15, AUC > 0.75",
    "gradient_noise": "how little one batch says (no bar)",
    "resume": "killed runs end bit for bit alike",
    "bfcl_agreement": "all verdicts agree; snapshot <= a deep copy",
    "sandbox": ">= 200 calls/s, >= 5x a fresh interpreter",
    "tool_turns": "a turn <= 2x json and the bare call",
    "reproduce": "effective ratio >= 1.7x grpo, accuracy >= grpo + 2.8, half the tokens",
}
"""Bars by benchmark."""
NO_CHECK = frozenset({"gradient_noise", "regimes"})
NOT_JUDGED_SMALL = frozenset({"reproduce"})
_BOX = set("━─│┃┏┓┗┛┡┩├┤┴┬╇┳┻└┘┌┐╷╵╭╮╰╯ ")


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        quick: The small form of each.
        only: Names of some; all if there are none.
    """

    quick: bool = False
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in BENCHMARKS:
                raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")


def last_words(output: str) -> str:
    """Returns the last line of an output that is no part of a table's frame; of a row of a table its cells."""
    for line in reversed(output.splitlines()):
        words = [cell.strip() for cell in line.replace("┃", "│").split("│")]
        if set(line) - _BOX and any(words):
            return "  ".join(word for word in words if word)
    return ""


def run(name: str, quick: bool) -> tuple[int, float, str, str]:
    """Runs a benchmark; returns its status, how long it took, its last words and what went wrong."""
    options = ["--quick"] * quick + ["--check"] * (name not in NO_CHECK)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = done.stderr.strip().splitlines()[-1] if "Traceback" in done.stderr else ""
    return done.returncode, time.perf_counter() - start, last_words(done.stdout), wrong


def main(args: Args) -> bool:
    """Runs them; returns whether all came to their end and, unless they were small, met their bars."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    table, good = [["benchmark", "bar", "last figure", "verdict", "seconds"]], True
    for name in track(args.only or tuple(BENCHMARKS), description="benchmarks", console=console):
        status, seconds, words, wrong = run(name, args.quick)
        done = "no bar" if name in NO_CHECK else "too small" if args.quick and name in NOT_JUDGED_SMALL else "met"
        verdict = f"failed: {wrong}" if wrong else "missed" if status else done
        table.append([name, BENCHMARKS[name], words[:90], verdict, f"{seconds:.0f}"])
        good = good and not wrong and (args.quick or not status)
    print_table(console, "Benchmarks" + ", small runs" * args.quick, table)
    return good


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Args, prog="python -m benchmarks.all")) else 1)
