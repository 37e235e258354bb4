"""What does the packed layout save? One optimiser step on a forest, packed against flat.

S is the number of tokens that the flat layout computes over that of different ones, the most that packing could save if a
token cost the same wherever it stands.

* speed: `Learner.update` on the same forest, packed and flat in turns, one thread; medians after a warm-up. Bar: at width 384
  with 4 layers the packed step is at least 0.8 S times as fast by the clock on the wall, from S of about 1.5 on; narrower
  models, and a forest in which little is shared (S near 1), are reported. So are CPU time, on which a busy machine tells less,
  and the packed step with the whole ancestor mask in SDPA in place of attention along paths. More than S can come out: flat
  rows are padded, and S does not count that.
* gradient: the relative difference of the first step's gradients (bar: 1e-5).
* memory: what is kept for the backward pass if the whole forest is computed in one pass (bar: the flat layout keeps at least
  0.8 S times as much), and the peak of the process (`benchmarks.packing_memory`).

    python -m benchmarks.packing --check
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import tyro
from matplotlib import pyplot as plt
from rich.console import Console

from agents import tree_attention
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from allocation import Forest
from benchmarks import commit, config_of, packing_memory, versions
from benchmarks.arena_show import markdown, print_table
from benchmarks.packing_forest import SHAPES, forest_of, model_of, shape_of

BAR = 0.8
"""Of speed and memory, as a share of S."""
BAR_WIDTH = 384
GRADIENT_BAR = 1e-5
SHARED = 1.3
"""From this S on there is something to save, and bars hold."""
WAYS = ("flat", "packed", "dense")
DENSE_REPEATS = 2
"""Of the way that is there for comparison and takes as long as the others together."""
MEMORY_HEAD = ("width", "S", "flat", "packed", "saves", "of S", "bar", "", "peak of the process saves")
SPEED_HEAD = (
    *("width", "S", "unique tokens", "flat", "packed", "saves", "of S", "bar", ""),
    *("by CPU time", "dense mask saves", "gradients differ by", "load"),
)


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        shapes: Forests, by name (`benchmarks.packing_forest.SHAPES`).
        widths: Hidden sizes.
        layers: Layers of the models.
        trees: Trees of each forest; 0 for as many as its shape has.
        repeats: Repeats after a warm-up, all ways in turns.
        micro_tokens: Padded tokens of a micro-batch.
        memory: Whether memory is measured, in processes of its own.
        seed: Of weights and tokens.
        quick: One width and one tree, three repeats, no dense mask, no memory; under a minute, and writes no results.
        check: Exit with status 1 if a bar is missed.
        output: Directory of the results.
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    widths: tuple[int, ...] = (384, 128, 64)
    layers: int = 4
    trees: int = 0
    repeats: int = 5
    micro_tokens: int = 8192
    memory: bool = True
    seed: int = 0
    quick: bool = False
    check: bool = False
    output: Path = Path("results")


@dataclass(frozen=True)
class Timed:
    """Seconds of one update, and its figures and gradient."""

    wall: float
    cpu: float
    figures: dict[str, float]
    gradient: torch.Tensor


def update(learner: Learner, forest: Forest, way: str) -> Timed:
    """Times one update; `dense` replaces the attention of packed rows."""
    dense = partial(tree_attention.forward, how="dense")
    with mock.patch.object(tree_attention, "forward", dense) if way == "dense" else nullcontext():
        wall, cpu = time.perf_counter(), time.process_time()
        figures = learner.update(forest).figures
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gradient = torch.cat([p.grad.flatten() for p in learner.model.parameters()])
    return Timed(wall, cpu, figures, gradient)


def speed(args: Args, shape: str, width: int, ways: Sequence[str]) -> dict[str, Any]:
    """Times all ways in turns, after a warm-up whose gradients are compared."""
    forest = forest_of(shape_of(shape, args.trees), args.seed)
    learners = {}
    for way in ways:
        config = LearnerConfig(layout="flat" if way == "flat" else "packed", micro_tokens=args.micro_tokens)
        learners[way] = Learner(model_of(width, args.layers, args.seed), config, updates=100)
    first = {way: update(learner, forest, way) for way, learner in learners.items()}
    flat = first["flat"]
    apart = {w: float((t.gradient - flat.gradient).norm() / flat.gradient.norm()) for w, t in first.items()}
    found: dict[str, list[Timed]] = {way: [] for way in ways}
    before = os.getloadavg()[0]
    gc.collect()
    for repeat in range(args.repeats):
        for way, learner in learners.items():
            if way != "dense" or repeat < DENSE_REPEATS:
                found[way].append(update(learner, forest, way))
    wall = {way: median(t.wall for t in times) for way, times in found.items()}
    cpu = {way: median(t.cpu for t in times) for way, times in found.items()}
    tokens = {name: int(flat.figures[f"learner/{name}_tokens"]) for name in ("flat", "unique")}
    computed = {way: int(t.figures["learner/computed_tokens"]) for way, t in first.items()}
    s = tokens["flat"] / tokens["unique"]
    counts = width == BAR_WIDTH and s >= SHARED
    value = wall["flat"] / wall["packed"] / s
    difference = max(apart.values())
    return {
        "kind": "speed",
        "shape": shape,
        "width": width,
        "layers": args.layers,
        "S": s,
        **{f"{name}_tokens": n for name, n in tokens.items()},
        "computed_tokens": computed,
        "seconds": wall,
        "cpu_seconds": cpu,
        "all_seconds": {way: [t.wall for t in times] for way, times in found.items()},
        "times": {way: wall["flat"] / wall[way] for way in ways if way != "flat"},
        "cpu_times": {way: cpu["flat"] / cpu[way] for way in ways if way != "flat"},
        "load": [before, os.getloadavg()[0]],
        "gradient_difference": difference,
        "value": value,
        "bar": BAR if counts else None,
        "met": difference <= GRADIENT_BAR and (not counts or value >= BAR),
    }


def memory(args: Args, shape: str, width: int, s: float) -> dict[str, Any]:
    """Measures memory of both layouts, each in a fresh process."""
    found = {
        layout: packing_memory.in_fresh_process(
            packing_memory.Args(layout, shape, width, args.layers, args.seed, args.trees)
        )
        for layout in ("flat", "packed")
    }
    value = found["flat"]["saved"] / found["packed"]["saved"] / s
    counts = width == BAR_WIDTH and s >= SHARED
    return {
        "kind": "memory",
        "shape": shape,
        "width": width,
        "layers": args.layers,
        "S": s,
        "bytes": found,
        "times": value * s,
        "peak_times": found["flat"]["peak"] / found["packed"]["peak"],
        "value": value,
        "bar": BAR if counts else None,
        "met": not counts or value >= BAR,
    }


def measure(args: Args) -> Iterator[dict[str, Any]]:
    """Yields the records, those of one width after another."""
    ways = WAYS[:2] if args.quick else WAYS
    for width in args.widths:
        for shape in args.shapes:
            row = speed(args, shape, width, ways)
            yield row
            if args.memory and width == max(args.widths):
                yield memory(args, shape, width, row["S"])


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Returns the cells of the tables, a headline first."""

    def verdict(row: dict[str, Any]) -> list[str]:
        bar = "" if row["bar"] is None else f">= {row['bar']}"
        return [f"{row['value']:.2f} S", bar, "MISSED" if not row["met"] else "met" if bar else ""]

    speeds = [[*SPEED_HEAD]]
    memories = [[*MEMORY_HEAD]]
    for row in rows:
        start = [str(row["width"]), f"{row['S']:.2f}"]
        if row["kind"] == "speed":
            dense = row["times"].get("dense")
            speeds.append(
                [*start, f"{row['unique_tokens']:,}"]
                + [f"{row['seconds'][way]:.2f} s" for way in ("flat", "packed")]
                + [f"{row['times']['packed']:.2f} x", *verdict(row), f"{row['cpu_times']['packed']:.2f} x"]
                + ["" if dense is None else f"{dense:.2f} x", f"{row['gradient_difference']:.0e}"]
                + [f"{row['load'][1]:.1f}"]
            )
        else:
            held = [f"{row['bytes'][layout]['saved'] / 2**20:,.0f} MiB" for layout in ("flat", "packed")]
            memories.append([*start, *held, f"{row['times']:.2f} x", *verdict(row), f"{row['peak_times']:.2f} x"])
    titles = {"Packed against flat: one optimiser step": speeds, "Kept for the backward pass, in one pass": memories}
    return {title: cells for title, cells in titles.items() if len(cells) > 1}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws what is saved over S, by width.

    Args:
        rows: Of both kinds.
        path: The PNG.
    """
    figure, (times, held) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for width in dict.fromkeys(r["width"] for r in rows):
        mine = sorted((r for r in rows if r["width"] == width and r["kind"] == "speed"), key=lambda r: r["S"])
        (line,) = times.plot([r["S"] for r in mine], [r["times"]["packed"] for r in mine], "o-", label=f"width {width}")
        if all("dense" in r["times"] for r in mine):
            dense = [r["times"]["dense"] for r in mine]
            times.plot([r["S"] for r in mine], dense, "o:", color=line.get_color(), label=f"width {width}, dense mask")
    mine = sorted((r for r in rows if r["kind"] == "memory"), key=lambda r: r["S"])
    held.plot([r["S"] for r in mine], [r["times"] for r in mine], "o-", label="kept for the backward pass")
    held.plot([r["S"] for r in mine], [r["peak_times"] for r in mine], "o:", label="peak of the process")
    most = max(r["S"] for r in rows)
    for axes, title in ((times, "flat over packed, seconds of a step"), (held, "flat over packed, memory")):
        axes.plot([1, most], [1, most], "k-", lw=0.8, label="S")
        axes.plot([1, most], [BAR, BAR * most], "k--", lw=0.8, label=f"{BAR} S")
        axes.set_xlabel("S: flat tokens over different tokens")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bottom_line(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the figures that the bars are of, the worst ones."""
    parts = []
    for kind, what in (("speed", "speed"), ("memory", "memory")):
        values = [r["value"] for r in rows if r["kind"] == kind and r["bar"] is not None]
        parts += [f"{what} {min(values):.2f} S (bar {BAR} S)"] if values else []
    apart = max(r["gradient_difference"] for r in rows if r["kind"] == "speed")
    return "at worst: " + ", ".join([*parts, f"gradients apart by {apart:.1e} (bar {GRADIENT_BAR:.0e})"])


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether all bars hold."""
    if args.quick:
        args = replace(args, shapes=("2.5",), widths=(BAR_WIDTH,), trees=1, repeats=3, memory=False)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = []
    for row in measure(args):
        rows.append(row)
        console.print(
            f"{row['kind']}, width {row['width']}: {row['value']:.2f} S at S = {row['S']:.2f}; "
            f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
            highlight=False,
        )
    shown = tables(rows)
    for title, cells in shown.items():
        print_table(console, title, cells)
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        shared = {"config": config_of(args), "versions": versions("torch", "transformers"), "commit": commit()}
        lines = [json.dumps(row | shared) + "\n" for row in rows]
        (args.output / "packing.jsonl").write_text("".join(lines))
        (args.output / "packing.md").write_text("\n".join(markdown(title, cells) for title, cells in shown.items()))
        draw(rows, args.output / "packing.png")
    console.print(bottom_line(rows), highlight=False)
    return all(row["met"] for row in rows)


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.packing")
    sys.exit(0 if main(given) or not given.check else 1)
