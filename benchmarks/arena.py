"""Which method gets the most out of a token? All methods on recorded dense forests, where values and gradients are known.

For each recording in `benchmarks/assets/dense` and each method of `allocation.allocators.METHODS`, several seeds: each a
sequence of batches at a fixed policy in which the method's predictor learns as it goes. The batches after the warm-up are
measured against the recording's own values and its true gradient (`allocation.arena.measures`). Methods are compared at equal
rollouts (the paper's way) and at equal generated tokens: then each method's number of rollouts is scaled until its forests
have as many tokens as those of `grpo`. The cosine is that of one such forest's gradient with the true one.

What to keep in mind when reading the table:

- Policy gradients are made as in training at its first step: `tree` advantages for methods with continuations, `grpo` ones
  without a standard deviation for the others (`--estimator` changes that), aggregated by prompt.
- The policy does not move and the prompts are few, so a predictor meets the same prompts again and again and predicts better
  than it would in training. `--held-out` measures on prompts it has not learned from.
- The recorded continuations of a prefix are also what its value was estimated from: `oracle` knows a little more than the
  truth.
- A rollout that had to be taken twice within a tree because the record had no other one left is counted (`repeated`).
- A record has hidden states, entropies and counts of tokens, but no texts and no log-probabilities: predictors do without.
- Intervals come from resampling seeds: they hold for the prompts that were recorded. Worlds beside each other show the rest.

    python -m benchmarks.arena --quick
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track

from allocation.allocators import METHODS
from allocation.arena.dense import DenseForest
from allocation.arena.recorded import RecordedWorld
from benchmarks import arena_show, config_of, results_folder
from benchmarks.arena_check import bars
from benchmarks.arena_runs import Protocol, estimator_of, make, parse, run
from benchmarks.arena_show import Result
from benchmarks.arena_stats import equal_token_budget

RECORDINGS = Path(__file__).parent / "assets" / "dense"


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        worlds: Recordings; all that ship with the project if none is named.
        methods: Methods; all if none is named. Other settings than the defaults go behind a colon, as in
            `trace:continuations=0.5,prefix_mode=exact`. `grpo` is always run: it sets the tokens.
        seeds: Sequences of batches for each method.
        warmup: Batches from which the predictor learns before those that count.
        batches: Batches that count.
        budget: Rollouts in a batch.
        group_size: Rollouts of a prompt, for methods with groups of a fixed size.
        estimator: Advantages: `auto`, `tree` or `grpo`.
        held_out: Measure on prompts that the predictor has not learned from.
        predictor: A name of `allocation.PREDICTORS`, for methods that need one.
        seed: First seed.
        workers: Processes.
        quick: Few seeds and batches, and the first recording alone if none is named.
        check: Judge the bars of the project; exit with 1 if one does not hold.
        output: Directory of the results.
    """

    worlds: tuple[Path, ...] = ()
    methods: tuple[str, ...] = ()
    seeds: int = 12
    warmup: int = 20
    batches: int = 20
    budget: int = 64
    group_size: int = 8
    estimator: str = "auto"
    held_out: bool = False
    predictor: str = "hidden_state"
    seed: int = 0
    workers: int = 1
    quick: bool = False
    check: bool = False
    output: Path = Path("results")

    def __post_init__(self) -> None:
        for method in self.methods:
            parse(method)
        for name in ("seeds", "batches", "budget", "group_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@lru_cache
def load(path: Path) -> RecordedWorld:
    """Returns the world of a recording, once in a process."""
    torch.set_num_threads(1)
    return RecordedWorld(DenseForest.load(path))


def at_equal_rollouts(path: Path, name: str, protocol: Protocol, seeds: range) -> Result:
    """Runs a method with the protocol's own budget."""
    return _result(path, "rollouts", name, protocol, seeds)


def at_equal_tokens(path: Path, first: Result, protocol: Protocol, seeds: range, target: float) -> Result:
    """Runs a method with as many rollouts as make a forest of `target` tokens.

    Args:
        path: The recording.
        first: What the method did at equal rollouts.
        protocol: As there.
        seeds: As there.
        target: Tokens to reach.
    """
    tried = {first.budget: replace(first, comparison="tokens")}

    def tokens_of(budget: int) -> float:
        if budget not in tried:
            tried[budget] = _result(path, "tokens", first.method, replace(protocol, budget=budget), seeds)
        return tried[budget].tokens

    return tried[equal_token_budget(tokens_of, first.budget, target)]


def _result(path: Path, comparison: str, name: str, protocol: Protocol, seeds: range) -> Result:
    world = load(path)
    estimator = estimator_of(make(name, world, protocol, 0), protocol)
    figures = run(world, name, protocol, seeds)
    return Result(path.stem, comparison, name, estimator, protocol.budget, figures, protocol.warmup)


def compare(args: Args, paths: list[Path]) -> list[Result]:
    """Runs all methods on all worlds, in both ways."""
    protocol = Protocol(**{f.name: getattr(args, f.name) for f in fields(Protocol)})
    seeds = range(args.seed, args.seed + args.seeds)
    methods = list(dict.fromkeys(("grpo", *(args.methods or METHODS))))
    jobs = [(path, name) for path in paths for name in methods]
    # Processes are made afresh, not forked: torch's threads would not survive it.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn) if args.workers > 1 else _Here() as pool:
        begun = [pool.submit(at_equal_rollouts, path, name, protocol, seeds) for path, name in jobs]
        results = [f.result() for f in track(begun, "equal rollouts", console=Console(stderr=True), transient=True)]
        tokens = {r.world: r.tokens for r in results if r.method == "grpo"}
        second = [
            pool.submit(at_equal_tokens, path, first, protocol, seeds, tokens[path.stem])
            for (path, _), first in zip(jobs, results, strict=True)
        ]
        results += [f.result() for f in track(second, "equal tokens", console=Console(stderr=True), transient=True)]
    return results


class _Later:
    """A call that is made when its result is asked for, so that a bar of progress moves."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]):
        self._function, self._arguments = function, arguments

    def result(self) -> Any:
        return self._function(*self._arguments)


class _Here:
    """What `ProcessPoolExecutor` does, in this process."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> _Later:
        return _Later(function, arguments)


def main(args: Args) -> bool:
    """Runs the arena; returns whether the bars hold, or were not asked for."""
    if args.quick:
        args = replace(args, seeds=min(args.seeds, 3), warmup=min(args.warmup, 8), batches=min(args.batches, 3))
    paths = sorted(args.worlds or RECORDINGS.glob("*.npz"))
    if args.quick and not args.worlds:
        paths = paths[:1]
    if not paths:
        raise FileNotFoundError(f"no recording in {RECORDINGS}; make one with python -m benchmarks.record_dense")
    results = compare(args, paths)
    console, page = Console(width=None if sys.stdout.isatty() else 240), ["# Arena", ""]
    args = replace(args, output=results_folder(args.output, args.quick))
    shared = {
        "config": config_of(args) | {"worlds": [path.name for path in paths]},
        "numpy": np.__version__,
        "torch": torch.__version__,
    }
    with (args.output / "arena.jsonl").open("w") as file:
        for path in paths:
            known = arena_show.summary(load(path))
            file.write(json.dumps({"world": path.stem, "summary": known} | shared) + "\n")
            line = arena_show.summary_line(known)
            console.print(f"[bold]{path.stem}[/bold]: {line}", highlight=False)
            page += [f"## {path.stem}", "", line, ""]
            for comparison in arena_show.COMPARISONS:
                here = [r for r in results if r.world == path.stem and r.comparison == comparison]
                tables = [(f"{path.stem}, equal {comparison}", arena_show.figures_table(here))]
                for reference in ("grpo", "trace_plus"):
                    if comparison == "tokens" and reference in {r.method for r in here}:
                        rows = arena_show.difference_table(here, reference)
                        tables.append((f"{path.stem}, equal tokens: difference to {reference}, paired", rows))
                if comparison == "tokens":
                    rows = arena_show.depth_table(here)
                    tables.append((f"{path.stem}, equal tokens: pairs of contrast / 1k tokens by depth", rows))
                for title, rows in tables:
                    arena_show.print_table(console, title, rows)
                    page.append(arena_show.markdown(title, rows))
        file.writelines(json.dumps(r.record() | shared) + "\n" for r in results)
    (args.output / "arena.md").write_text("\n".join(page))
    arena_show.draw(results, args.output / "arena.png")
    if not args.check:
        return True
    found = bars(results)
    for bar in found:
        console.print(f"{'holds' if bar.holds else 'FAILS'}: {bar.text}", highlight=False)
    return all(bar.holds for bar in found)


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Args, prog="python -m benchmarks.arena")) else 1)
