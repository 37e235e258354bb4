"""Is our verdict on BFCL v4 multi-turn that of the official checker?

*Agreement*: conversations are played in TraceToolUse-v0 turn by turn and judged by it, and the same calls are given to
`multi_turn_checker` of bfcl-eval: all 800 ground truths, and perturbed ones (calls dropped, doubled, reordered, altered, put in
another user turn, replaced by another task's).

*Cost*: `snapshot()` and `restore()` in mid-task, over a deep copy of the simulators that the last turn changed; both in turns
in one process.

    python -m benchmarks.bfcl_agreement --check
    python -m benchmarks.bfcl_agreement --quick
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track

from benchmarks import commit, config_of, versions
from benchmarks.arena_show import markdown, print_table
from trace_envs.state import ToolCall, ToolCalls
from trace_envs.tool_use import ToolUseEnv
from trace_envs.tool_use.bfcl.data import CATEGORIES, BFCLTask, Program, package_folder
from trace_envs.tool_use.bfcl.simulators import live, named, owners

COST_BAR = 1.0
CALLS = 8
TITLE = "Verdicts of TraceToolUse-v0 and of the official checker of BFCL v4"
HEAD = ["category", "what", "conversations", "right by the official checker", "agree", "bar", ""]

Turns = list[list[Program]]


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        perturbed: Perturbed conversations, over all categories.
        repeats: Repeats of the cost after a warm-up, both ways in turns.
        seed: Of the perturbations.
        quick: 20 ground truths of each category and 80 perturbed ones; writes no results.
        check: Exit with status 1 if a verdict differs or the cost misses its bar.
        output: Directory of the results.
    """

    perturbed: int = 2000
    repeats: int = 7
    seed: int = 0
    quick: bool = False
    check: bool = False
    output: Path = Path("results")


# Perturbations: each changes a conversation a little, in place. -------------------------------------------------------


def _somewhere(turns: Turns, rng: np.random.Generator) -> tuple[int, int]:
    places = [(t, i) for t, calls in enumerate(turns) for i in range(len(calls))]
    return places[int(rng.integers(len(places)))]


def drop(turns: Turns, rng: np.random.Generator, others: Sequence[Program]) -> None:
    """Leaves out a call."""
    t, i = _somewhere(turns, rng)
    del turns[t][i]


def double(turns: Turns, rng: np.random.Generator, others: Sequence[Program]) -> None:
    """Makes a call twice."""
    t, i = _somewhere(turns, rng)
    turns[t].insert(i, turns[t][i])


def reorder(turns: Turns, rng: np.random.Generator, others: Sequence[Program]) -> None:
    """Makes the calls of a user turn in another order."""
    t, _ = _somewhere(turns, rng)
    turns[t] = [turns[t][int(i)] for i in rng.permutation(len(turns[t]))]


def move(turns: Turns, rng: np.random.Generator, others: Sequence[Program]) -> None:
    """Makes a call in another user turn."""
    t, i = _somewhere(turns, rng)
    call = turns[t].pop(i)
    turns[int(rng.integers(len(turns)))].append(call)


def alter(turns: Turns, rng: np.random.Generator, others: Sequence[Program]) -> None:
    """Changes an argument of a call."""
    t, i = _somewhere(turns, rng)
    call = turns[t][i]
    arguments = dict(call.named)
    if arguments:
        name = list(arguments)[int(rng.integers(len(arguments)))]
        value = arguments[name]
        changed: list[Any] = [f"{value}x", str(value), None]
        if isinstance(value, int | float) and not isinstance(value, bool):
            changed = [value + 1, -value, value * 0.5, str(value)]
        elif isinstance(value, bool):
            changed = [not value]
        elif isinstance(value, list):
            changed = [value[1:], [*value, *value[:1]], value[::-1]]
        arguments[name] = changed[int(rng.integers(len(changed)))]
    else:
        arguments["unknown"] = 1
    turns[t][i] = Program(call.name, (), arguments)


def insert(turns: Turns, rng: np.random.Generator, others: Sequence[Program]) -> None:
    """Makes a call of another task that has the same simulators."""
    t = int(rng.integers(len(turns)))
    turns[t].insert(int(rng.integers(len(turns[t]) + 1)), others[int(rng.integers(len(others)))])


PERTURBATIONS: dict[str, Callable[[Turns, np.random.Generator, Sequence[Program]], None]] = {
    f.__name__: f for f in (drop, double, reorder, move, alter, insert)
}


# Verdicts. ------------------------------------------------------------------------------------------------------------


def ours(env: ToolUseEnv, task: BFCLTask, turns: Turns) -> bool:
    """Plays the calls in the environment, several in a turn, and returns its verdict."""
    env.reset(seed=0, options={"task_id": task.task_id})
    for calls in turns:
        for start in range(0, len(calls), CALLS):
            made = tuple(ToolCall(call.name, dict(call.named)) for call in calls[start : start + CALLS])
            env.step(env.action_format.render("", made[0] if len(made) == 1 else ToolCalls(made)))
        env.step("<answer>Done.</answer>")
    outcome = env.state.outcome
    assert outcome is not None
    return outcome.is_correct


def official(entry: dict[str, Any], truth: list[list[str]], turns: Turns, run: str) -> bool:
    """Returns the verdict of the official checker on the same calls.

    Args:
        entry: The task as the package has it.
        truth: Its ground truth, as the package has it.
        turns: The calls.
        run: A name that was never used: the checker keeps its simulators in its module under it.
    """
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    decoded = [
        [[_python(call) for call in calls[start : start + CALLS]] for start in range(0, len(calls), CALLS)]
        for calls in turns
    ]
    try:
        category = entry["id"].rsplit("_", 1)[0]
        return bool(multi_turn_checker(decoded, truth, entry, category, run)["valid"])
    finally:
        for name in [name for name in vars(multi_turn_utils) if name.startswith(run)]:
            delattr(multi_turn_utils, name)


def _python(call: Program) -> str:
    return f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.named.items())})"


def _raw(category: str) -> dict[str, tuple[dict[str, Any], list[list[str]]]]:
    folder = package_folder() / "data"
    file = f"BFCL_v4_{category}.json"
    entries, truths = (
        [json.loads(line) for line in (path / file).read_text(encoding="utf-8").splitlines()]
        for path in (folder, folder / "possible_answer")
    )
    by_id = {truth["id"]: truth["ground_truth"] for truth in truths}
    return {entry["id"]: (entry, by_id[entry["id"]]) for entry in entries}


def agreement(args: Args, console: Console) -> Iterator[dict[str, Any]]:
    """Yields a record for each category and kind of conversation."""
    for number, category in enumerate(CATEGORIES):
        env = ToolUseEnv(suite="bfcl-v4", category=category, split="all", system_prompt="", calls_per_turn=CALLS)
        raw = _raw(category)
        rng = np.random.default_rng([args.seed, number])
        tasks: list[BFCLTask] = [env.suite.task(task_id) for task_id in env.task_ids()]  # type: ignore[misc]
        truths = {t.task_id: [[named(t.classes, c) for c in calls] for calls in t.truth] for t in tasks}
        pools: dict[tuple[str, ...], list[Program]] = {}
        for task in tasks:
            pools.setdefault(task.classes, []).extend(call for calls in truths[task.task_id] for call in calls)
        work = [("ground truth", task) for task in (tasks[:20] if args.quick else tasks)]
        kinds = list(PERTURBATIONS)
        for i in range(args.perturbed // len(CATEGORIES)):
            work.append((kinds[i % len(kinds)], tasks[int(rng.integers(len(tasks)))]))
        count: Counter[tuple[str, bool, bool]] = Counter()
        different = []
        for i, (kind, task) in enumerate(track(work, category, console=console, disable=not console.is_terminal)):
            turns = [list(calls) for calls in truths[task.task_id]]
            if kind != "ground truth":
                PERTURBATIONS[kind](turns, rng, pools[task.classes])
            entry, truth = raw[task.task_id]
            mine, theirs = ours(env, task, turns), official(entry, truth, turns, f"run{number}x{i}")
            count[kind, mine, theirs] += 1
            if mine != theirs:
                different.append({"task_id": task.task_id, "kind": kind, "official": theirs})
        for kind in dict.fromkeys(kind for kind, _ in work):
            total = sum(n for (k, _, _), n in count.items() if k == kind)
            agree = count[kind, True, True] + count[kind, False, False]
            yield {
                "category": category,
                "kind": kind,
                "conversations": total,
                "right": count[kind, True, True] + count[kind, False, True],
                "agree": agree,
                "met": agree == total,
                "different": [d for d in different if d["kind"] == kind],
            }


def cost(args: Args) -> dict[str, Any]:
    """Returns the record of the cost, over tasks of all categories."""
    moments = []
    for category in CATEGORIES:
        env = ToolUseEnv(suite="bfcl-v4", category=category, split="test", system_prompt="", calls_per_turn=CALLS)
        rng = np.random.default_rng(args.seed)
        for task_id in env.task_ids():
            env.reset(seed=0, options={"task_id": task_id})
            for _ in range(3):
                before = env.state
                act = env.oracle(env.state, rng)
                env.step(env.action_format.render(*act))
                calls = act[1].calls if isinstance(act[1], ToolCalls) else (act[1],)
                names = {owners(env.state.task.classes)[c.name] for c in calls if isinstance(c, ToolCall)}
                if names and env.state.world != before.world:
                    graphs = env.state.world.simulators
                    moments.append((env, env.snapshot(), [live(name, graphs[name]) for name in names]))
                    break

    def restored() -> None:
        for env, snap, _ in moments:
            env.restore(snap)
            env.snapshot()

    def copied() -> None:
        for _, _, simulators in moments:
            copy.deepcopy(simulators)

    seconds: dict[str, list[float]] = {"restored": [], "copied": []}
    for repeat in range(args.repeats + 1):
        for name, work in (("restored", restored), ("copied", copied)):
            start = time.perf_counter()
            work()
            if repeat:  # the first warms up
                seconds[name].append((time.perf_counter() - start) / len(moments))
    mine, theirs = median(seconds["restored"]), median(seconds["copied"])
    return {
        "category": "all",
        "kind": "cost",
        "moments": len(moments),
        "snapshot_restore_us": 1e6 * mine,
        "deepcopy_us": 1e6 * theirs,
        "ratio": mine / theirs,
        "met": mine / theirs <= COST_BAR,
    }


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table, its headline first."""
    table = [HEAD]
    for r in rows:
        counts = [f"{r[name]:,}" for name in ("conversations", "right", "agree")]
        table.append([r["category"], r["kind"], *counts, "all", "met" if r["met"] else "MISSED"])
    return table


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws how many conversations of each kind are right, and how many verdicts agree."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for offset, (name, label) in enumerate(
        (("conversations", "conversations"), ("agree", "same verdict"), ("right", "right"))
    ):
        heights = [sum(row[name] for row in rows if row["kind"] == kind) for kind in kinds]
        axes.bar(np.arange(len(kinds)) + 0.27 * (offset - 1), heights, 0.27, label=label)
    axes.set_xticks(np.arange(len(kinds)), kinds)
    axes.set_title(TITLE)
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether all verdicts agree and the cost meets its bar."""
    if args.quick:
        args = replace(args, perturbed=80, repeats=3)
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = list(agreement(args, console))
    costs = cost(args)
    print_table(console, TITLE, cells(rows))
    for row in rows:
        for found in row["different"]:
            console.print(f"different: {found}", highlight=False)
    line = (
        f"snapshot and restore {costs['snapshot_restore_us']:.2f} us, deep copy of the changed simulators "
        f"{costs['deepcopy_us']:.0f} us: {costs['ratio']:.4f} times (bar {COST_BAR})"
    )
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        shared = {
            "config": config_of(args),
            "versions": versions("bfcl-eval", "gymnasium"),
            "seed": args.seed,
            "commit": commit(),
        }
        text = "".join(json.dumps(row | shared) + "\n" for row in (*rows, costs))
        (args.output / "bfcl_agreement.jsonl").write_text(text)
        (args.output / "bfcl_agreement.md").write_text(f"{markdown(TITLE, cells(rows))}\n{line}\n")
        draw(rows, args.output / "bfcl_agreement.png")
    console.print(line, highlight=False)
    agree, total = (sum(row[name] for row in rows) for name in ("agree", "conversations"))
    console.print(f"{agree:,} of {total:,} verdicts agree", highlight=False)
    return costs["met"] and agree == total


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.bfcl_agreement")
    sys.exit(0 if main(given) or not given.check else 1)
