"""How many tokens does an engine compute for a forest, and how fast?

*Tokens*: all positions that went through the model (prefill, decode and padding), over the forest's different tokens: what was
shown and sampled, what rollouts share counted once. 1 would be an engine that computes each token once and nothing else.

*Speed*: sampled tokens a second of the transformers policy, over those of `model.generate` called once a turn with the same
prefixes; both in turns in one process, one thread.

vLLM is measured in an interpreter that has it: this one, or that of `make test-vllm` (`.venv-vllm`).

    python -m benchmarks.generation --check
    python -m benchmarks.generation --quick
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from matplotlib import pyplot as plt
from rich.console import Console

from agents.models import load_model
from agents.policies import TransformersPolicy
from agents.tiny import build_model
from benchmarks import commit, config_of, versions
from benchmarks.arena_show import markdown, print_table
from benchmarks.generation_forest import WORKLOADS, Asked, sample_forest, unique_tokens
from benchmarks.generation_peer import generate_calls

RATIO_BAR, SPEED_BAR = 1.1, 1.5
ROOT = Path(__file__).parents[1]
TITLE = "Tokens computed over a forest's different tokens, and tokens sampled a second"
HEAD = [
    "engine",
    "model",
    "forest",
    "different tokens",
    "computed",
    "ratio",
    "bar",
    "",
    "tokens / s",
    "of generate",
    "bar",
    "",
]


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        workloads: Forests, by name (`benchmarks.generation_forest.WORKLOADS`).
        repeats: Repeats after a warm-up, both ways in turns.
        width: Also measure the speed of a random model of this hidden size and four layers; 0 for none.
        vllm: Whether vLLM is measured.
        block_sizes: Block sizes of vLLM's cache; the first is held against the bar.
        seed: Of questions and sampling.
        quick: One forest, two repeats, transformers only; under a minute, and writes no results.
        check: Exit with status 1 if a bar is missed, or a part could not be measured.
        output: Directory of the results.
    """

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    repeats: int = 5
    width: int = 0
    vllm: bool = True
    block_sizes: tuple[int, ...] = (32, 64, 128)
    seed: int = 0
    quick: bool = False
    check: bool = False
    output: Path = Path("results")


def transformers_row(args: Args, name: str, width: int) -> dict[str, Any]:
    """Measures the transformers policy and `model.generate` on one workload.

    Args:
        args: Settings.
        name: The workload.
        width: Hidden size of a random model; 0 for the shipped one.
    """
    workload = WORKLOADS[name]
    model, tokenizer = load_model("tiny")
    if width:
        model = build_model(len(tokenizer), width=width, layers=4, heads=6, seed=args.seed).eval()
    ratios, speeds, peers, computed = [], [], [], {}
    for repeat in range(args.repeats + 1):  # the first warms up
        policy = TransformersPolicy(model, tokenizer, max_new_tokens=workload.max_new_tokens, seed=args.seed)
        asked = Asked(policy)
        forest = sample_forest(asked, workload, args.seed + repeat)
        peer = generate_calls(
            model,
            asked.calls,
            end_id=policy.codec.end_id,
            max_new_tokens=workload.max_new_tokens,
            seed=args.seed + repeat,
        )
        if repeat:
            computed = dict(policy.computed)
            ratios.append(sum(computed.values()) / unique_tokens(forest))
            speeds.append(forest.ledger.generated_tokens / asked.seconds)
            peers.append(peer.tokens / peer.seconds)
    times = median(a / b for a, b in zip(speeds, peers, strict=True))
    # A random model never ends its turns, so nothing of its forests is typical but the cost of a token.
    return {
        "engine": "transformers",
        "model": f"width {width}" if width else "tiny",
        "workload": name,
        "unique_tokens": unique_tokens(forest),
        "computed": computed,
        "ratio": median(ratios),
        "all_ratios": ratios,
        "ratio_bar": None if width else RATIO_BAR,
        "tokens_per_second": median(speeds),
        "peer_tokens_per_second": median(peers),
        "peer_ratio": peer.computed / unique_tokens(forest),
        "times": times,
        "times_bar": None if width else SPEED_BAR,
        "met": bool(width) or (median(ratios) <= RATIO_BAR and times >= SPEED_BAR),
        "load": os.getloadavg()[0],
        "versions": versions("torch", "transformers"),
    }


def vllm_interpreter() -> Path | None:
    """Returns an interpreter that has vLLM: this one, or that of `make test-vllm`."""
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    own = ROOT / ".venv-vllm" / "bin" / "python"
    return own if own.exists() else None


def vllm_rows(args: Args, interpreter: Path) -> Iterator[dict[str, Any]]:
    """Measures vLLM, an engine for each block size, in processes of their own."""
    for number, block_size in enumerate(args.block_sizes):
        words = ["--workloads", *args.workloads, "--block-size", str(block_size), "--repeats", str(args.repeats)]
        command = [str(interpreter), "-m", "benchmarks.generation_vllm", *words, "--seed", str(args.seed)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                bar = RATIO_BAR if number == 0 else None
                yield row | {
                    "engine": f"vllm, blocks of {block_size}",
                    "model": "tiny",
                    "ratio_bar": bar,
                    "met": bar is None or row["ratio"] <= bar,
                    "load": os.getloadavg()[0],
                }


def measure(args: Args) -> Iterator[dict[str, Any]]:
    """Yields the records."""
    for name in args.workloads:
        yield transformers_row(args, name, 0)
    if args.width:
        yield transformers_row(args, args.workloads[0], args.width)
    interpreter = vllm_interpreter() if args.vllm else None
    if interpreter is not None:
        yield from vllm_rows(args, interpreter)


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table, its headline first."""

    def verdict(value: float, bar: float | None, sign: str) -> list[str]:
        if bar is None:
            return ["", ""]
        met = value <= bar if sign == "<=" else value >= bar
        return [f"{sign} {bar}", "met" if met else "MISSED"]

    table = [HEAD]
    for row in rows:
        times = row.get("times")
        table.append(
            [row["engine"], row["model"], row["workload"], f"{row['unique_tokens']:,}"]
            + [
                f"{sum(row['computed'].values()):,}",
                f"{row['ratio']:.3f}",
                *verdict(row["ratio"], row["ratio_bar"], "<="),
            ]
            + [f"{row['tokens_per_second']:,.0f}", "" if times is None else f"{times:.2f} x"]
            + (["", ""] if times is None else verdict(times, row["times_bar"], ">="))
        )
    return table


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws both figures by engine and forest.

    Args:
        rows: The records.
        path: The PNG.
    """
    figure, (ratios, speeds) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = [f"{r['engine']}\n{r['workload']}" for r in rows if r["model"] == "tiny"]
    ratios.barh(names, [r["ratio"] for r in rows if r["model"] == "tiny"])
    ratios.axvline(RATIO_BAR, color="k", ls="--", lw=0.8)
    ratios.set_title("tokens computed over different tokens")
    timed = [r for r in rows if "times" in r]
    speeds.barh([f"{r['model']}\n{r['workload']}" for r in timed], [r["times"] for r in timed])
    speeds.axvline(SPEED_BAR, color="k", ls="--", lw=0.8)
    speeds.set_title("tokens a second over those of model.generate")
    for axes in (ratios, speeds):
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bottom_line(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the figures that the bars are of, the worst ones."""
    parts = []
    for engine in ("transformers", "vllm"):
        mine = [r for r in rows if r["engine"].startswith(engine) and r["ratio_bar"] is not None]
        parts += [f"{engine} computes {max(r['ratio'] for r in mine):.3f} (bar {RATIO_BAR})"] if mine else []
    times = [r["times"] for r in rows if r.get("times_bar") is not None]
    return "at worst: " + ", ".join([*parts, f"{min(times):.2f} times model.generate (bar {SPEED_BAR})"])


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether all bars hold and all parts were measured."""
    if args.quick:
        args = replace(args, workloads=("trees",), repeats=2, width=0, vllm=False)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = []
    for row in measure(args):
        rows.append(row)
        console.print(f"{row['engine']}, {row['model']}, {row['workload']}: {row['ratio']:.3f}", highlight=False)
    complete = not args.vllm or any(r["engine"].startswith("vllm") for r in rows)
    print_table(console, TITLE, cells(rows))
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        shared = {"config": config_of(args), "commit": commit()}
        (args.output / "generation.jsonl").write_text("".join(json.dumps(row | shared) + "\n" for row in rows))
        (args.output / "generation.md").write_text(markdown(TITLE, cells(rows)))
        draw(rows, args.output / "generation.png")
    if not complete:
        console.print("vLLM was not measured: no interpreter here has it; `make test-vllm` sets one up (.venv-vllm)")
    console.print(bottom_line(rows), highlight=False)
    return complete and all(row["met"] for row in rows)


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.generation")
    sys.exit(0 if main(given) or not given.check else 1)
