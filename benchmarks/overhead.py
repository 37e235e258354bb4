"""What does `TreeAllocationWrapper` add to a step of a plain vector environment?

Both sides take the same actions on CartPole-v1, many steps in a row with every slot busy. What an adapter does (snapshot and
restore) and what an allocator does (choosing anchors) is measured by a clock around each call and taken off the wrapper's time
for the figure that has a bar: the rest is the wrapper's own bookkeeping. The figure with them is given beside it.

The bar is that of `grpo`, which takes a snapshot at each root only and so shows the wrapper alone; `trace` takes one at every
turn of its root rollouts.

Three things that are not bookkeeping stay in the figure, since no clock around a call can take them off:

- Python's garbage collector, wherever it falls: a forest grows by a few tracked objects with every turn, a plain vector keeps
  none. With `trace`, whose snapshots are kept until their tree is finished, its full collections are the largest item.
  Objects that were there before (imported modules) are kept out of its sight on both sides.
- Freeing the snapshots of a finished tree, with `trace` as well.
- Steps of environments that were snapshotted once: in Python 3.11 an object whose `__dict__` was asked for is a little slower
  from then on.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from allocation import TreeAllocationWrapper
from benchmarks import config_of
from trace_envs import snapshots

BAR = 0.30


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        num_envs: Slots of the vector.
        steps: Steps of the vector in one repeat.
        repeats: Repeats, plain and wrapped in turns; the median counts.
        seed: Seeds environments and actions.
        output: Directory of the results.
    """

    num_envs: int = 64
    steps: int = 300
    repeats: int = 9
    seed: int = 0
    output: Path = Path("results")


class Stopwatch:
    """Adds up the time spent in functions, the clock's own time left in.

    Attributes:
        seconds: Time so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that does the same and is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


@contextmanager
def timed_adapters() -> Iterator[Stopwatch]:
    """Times every snapshot and restore that slots in this process ask for."""
    watch = Stopwatch()
    with (
        mock.patch.object(snapshots, "snapshot", watch.around(snapshots.snapshot)),
        mock.patch.object(snapshots, "restore", watch.around(snapshots.restore)),
    ):
        yield watch


def _seconds(step: Callable[[Any], Any], actions: list[np.ndarray]) -> float:
    start = time.perf_counter()
    for action in actions:
        step(action)
    return time.perf_counter() - start


def wrapper_overhead(
    num_envs: int = 64,
    steps: int = 300,
    repeats: int = 9,
    seed: int = 0,
    allocators: tuple[str, ...] = ("grpo", "trace"),
) -> dict[str, Any]:
    """Measures a step of CartPole-v1 in a vector, plain and wrapped.

    Args:
        num_envs: Slots of the vector.
        steps: Steps of the vector in one repeat.
        repeats: Repeats; each measures plain and wrapped, one after the other.
        seed: Seeds environments and actions.
        allocators: Names of the allocators to measure with.

    Returns:
        `plain`: microseconds of a plain step of the vector. By name of the allocator: `wrapped`, microseconds of a wrapped one;
        `adapter` and `allocator`, those of them in snapshots and restores, and in choosing anchors; `overhead`,
        (wrapped - adapter - allocator) / plain - 1; `uncorrected`, wrapped / plain - 1; each the median over the repeats.
    """
    gc.collect()
    gc.freeze()
    try:
        return _measure(num_envs, steps, repeats, seed, allocators)
    finally:
        gc.unfreeze()


def _measure(num_envs: int, steps: int, repeats: int, seed: int, allocators: tuple[str, ...]) -> dict[str, Any]:
    plain = gym.make_vec("CartPole-v1", num_envs, "sync")
    plain.action_space.seed(seed)
    actions = [plain.action_space.sample() for _ in range(steps)]
    plain.reset(seed=seed)
    found: dict[str, Any] = {}
    every_plain = []
    for name in allocators:
        envs = TreeAllocationWrapper(
            gym.make_vec("CartPole-v1", num_envs, "sync"),
            allocator=name,
            # An episode lasts about 20 steps; a budget that is not spent within the steps keeps every slot busy.
            budget=num_envs * max(4, steps // 5),
            success=lambda total_reward, info: total_reward > 20,
        )
        rows = []
        for repeat in range(repeats):
            envs.reset(seed=seed + repeat)
            _seconds(plain.step, actions[:30])
            _seconds(envs.step, actions[:30])
            before = _seconds(plain.step, actions)
            choosing = Stopwatch()
            prefixes = choosing.around(envs.allocator.allocate_prefixes)
            with timed_adapters() as watch, mock.patch.object(envs.allocator, "allocate_prefixes", prefixes):
                wrapped = _seconds(envs.step, actions)
            base = (before + _seconds(plain.step, actions)) / 2
            if not envs.active.all():
                raise RuntimeError("the budget was spent within the measurement: slots were idle")
            every_plain.append(base)
            own = wrapped - watch.seconds - choosing.seconds
            rows.append((wrapped, watch.seconds, choosing.seconds, own / base - 1, wrapped / base - 1))
        took, adapter, chose, overhead, uncorrected = (median(column) for column in zip(*rows, strict=True))
        found[name] = {
            "wrapped": took / steps * 1e6,
            "adapter": adapter / steps * 1e6,
            "allocator": chose / steps * 1e6,
            "overhead": overhead,
            "uncorrected": uncorrected,
        }
        envs.close()
    plain.close()
    return {"plain": median(every_plain) / steps * 1e6, **found}


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether the bar holds."""
    found = wrapper_overhead(args.num_envs, args.steps, args.repeats, args.seed)
    title = f"CartPole-v1 x {args.num_envs}, bar {BAR:.0%}"
    table = Table("", "us a step", "in adapters", "in allocator", "overhead", "all included", title=title)
    table.add_row("plain", f"{found['plain']:.0f}", "", "", "", "")
    args.output.mkdir(exist_ok=True)
    config = config_of(args)
    with (args.output / "overhead.jsonl").open("w") as file:
        for name, row in ((k, v) for k, v in found.items() if k != "plain"):
            table.add_row(
                name,
                f"{row['wrapped']:.0f}",
                f"{row['adapter']:.0f}",
                f"{row['allocator']:.0f}",
                f"{row['overhead']:+.0%}",
                f"{row['uncorrected']:+.0%}",
            )
            record = {"allocator": name, "plain": found["plain"], **row, "bar": BAR, "config": config}
            file.write(json.dumps(record | {"gymnasium": gym.__version__}) + "\n")
    Console().print(table)
    return found["grpo"]["overhead"] <= BAR


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Args, prog="python -m benchmarks.overhead")) else 1)
