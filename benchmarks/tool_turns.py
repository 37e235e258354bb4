"""What does a function-calling turn cost in TraceToolUse-v0, beside the bare call of the function?

Oracle episodes of the embedded suite are played again, all calls of them, in two ways side by side:

*turn*: `env.step(text)` and `env.snapshot()`: the text is found, parsed and checked against the schema, the function is called,
history and info with its messages are made, the moment is kept.
*bare*: `json.loads` of the call and the function itself, on the same world (bar: a turn takes at most twice as long).
*checked*: bare, and the arguments checked by the package `jsonschema`, as a loop of one's own would have to do (no bar).

    python -m benchmarks.tool_turns --check
    python -m benchmarks.tool_turns --quick
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import jsonschema
import numpy as np
import tyro
from matplotlib import pyplot as plt
from rich.console import Console

from benchmarks import commit, config_of, versions
from benchmarks.arena_show import markdown, print_table
from trace_envs.state import EpisodeState, ToolCall
from trace_envs.tool_use import ToolUseEnv
from trace_envs.tool_use.embedded.generate import DOMAINS

BAR = 2.0
TITLE = "A function-calling turn, microseconds"
HEAD = ["world", "calls", "turn", "of it step", "bare", "checked", "turn / bare", f"bar {BAR:g}", "turn / checked"]


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        tasks: Tasks of each world.
        repeats: Repetitions; the median counts, the ways alternate.
        quick: Fewer of both, and no files.
        check: Exit with status 1 if the bar is missed.
        output: Directory of the results.
    """

    tasks: int = 120
    repeats: int = 9
    quick: bool = False
    check: bool = False
    output: Path = Path("results")


@dataclass(frozen=True)
class Moment:
    """A call that the oracle makes, where it makes it."""

    state: EpisodeState
    text: str
    body: str


def moments(category: str, tasks: int) -> tuple[ToolUseEnv, list[Moment]]:
    """Returns every call of the oracle in the first tasks of a world."""
    env = ToolUseEnv(category=category, split="test", system_prompt="")
    rng, found = np.random.default_rng(0), []
    for task_id in env.task_ids()[:tasks]:
        env.reset(seed=0, options={"task_id": task_id})
        while not env.state.done:
            thought, act = env.oracle(env.state, rng)
            text = env.write(thought, act)
            if isinstance(act, ToolCall):
                start, end = text.index("<tool_call>") + len("<tool_call>"), text.index("</tool_call>")
                found.append(Moment(env.state, text, text[start:end]))
            env.step(text)
    return env, found


def measure(category: str, args: Args) -> dict[str, Any]:
    """Returns the row of a world."""
    env, calls = moments(category, args.tasks)
    functions = {function.__name__: function for function in DOMAINS[category].functions}
    validators = {
        tool["function"]["name"]: jsonschema.Draft202012Validator(tool["function"]["parameters"]) for tool in env.tools
    }
    snapshots = [replace(env.snapshot(), payload=moment.state) for moment in calls]

    def restored() -> None:
        for snapshot in snapshots:
            env.restore(snapshot)

    def turns() -> None:
        for snapshot, moment in zip(snapshots, calls, strict=True):
            env.restore(snapshot)
            env.step(moment.text)
            env.snapshot()

    def steps() -> None:
        for snapshot, moment in zip(snapshots, calls, strict=True):
            env.restore(snapshot)
            env.step(moment.text)

    def bare() -> None:
        for moment in calls:
            call = json.loads(moment.body)
            functions[call["name"]](moment.state.world.data, **call["arguments"])

    def checked() -> None:
        for moment in calls:
            call = json.loads(moment.body)
            validators[call["name"]].validate(call["arguments"])
            functions[call["name"]](moment.state.world.data, **call["arguments"])

    ways: dict[str, Callable[[], None]] = {
        "restored": restored,
        "turns": turns,
        "steps": steps,
        "bare": bare,
        "checked": checked,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:  # the first warms up
                seconds[name].append(1e6 * (time.perf_counter() - start) / len(calls))
    middle = {name: median(values) for name, values in seconds.items()}
    turn, step = middle["turns"] - middle["restored"], middle["steps"] - middle["restored"]
    ratio = turn / middle["bare"]
    return {
        "world": category,
        "calls": len(calls),
        "turn_us": turn,
        "step_us": step,
        "bare_us": middle["bare"],
        "checked_us": middle["checked"],
        "ratio": ratio,
        "ratio_checked": turn / middle["checked"],
        "met": ratio <= BAR,
    }


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table, its headline first."""
    table = [HEAD]
    for row in rows:
        times = [f"{row[name]:.1f}" for name in ("turn_us", "step_us", "bare_us", "checked_us", "ratio")]
        verdict = "met" if row["met"] else "MISSED"
        table.append([row["world"], str(row["calls"]), *times, verdict, f"{row['ratio_checked']:.2f}"])
    return table


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the three times of each world."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for offset, (name, label) in enumerate(
        (("turn_us", "turn and snapshot"), ("checked_us", "json, jsonschema, call"), ("bare_us", "json and call"))
    ):
        axes.bar(np.arange(len(rows)) + 0.27 * (offset - 1), [row[name] for row in rows], 0.27, label=label)
    axes.set_xticks(np.arange(len(rows)), [row["world"] for row in rows])
    axes.set(ylabel="microseconds a call", title="A function-calling turn")
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether the bar is met in every world."""
    if args.quick:
        args = replace(args, tasks=24, repeats=3)
    rows = [measure(category, args) for category in DOMAINS]
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        shared = {"config": config_of(args), "versions": versions("gymnasium", "jsonschema"), "commit": commit()}
        (args.output / "tool_turns.jsonl").write_text("".join(json.dumps(row | shared) + "\n" for row in rows))
        (args.output / "tool_turns.md").write_text(f"{markdown(TITLE, cells(rows))}\n")
        draw(rows, args.output / "tool_turns.png")
    print_table(console, TITLE, cells(rows))
    ratios = [row["ratio"] for row in rows]
    console.print(f"a turn takes {min(ratios):.1f} to {max(ratios):.1f} times json and the bare call", highlight=False)
    return all(row["met"] for row in rows)


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.tool_turns")
    sys.exit(0 if main(given) or not given.check else 1)
