"""Does a training run that is killed go on as if nothing had happened?

A run is killed with SIGKILL at random moments, resumed, killed again or not, and compared with one that was left alone:
`metrics.jsonl` without what the clock says (`time/`), `trees.jsonl`, and the last checkpoint's weights and state, bit for bit.

Half of the kills come at any moment. The others are aimed, from outside, at what takes little time: start-up, the writing of a
checkpoint, evaluations. Which moment a kill hit is told from the files it left.

Every run is a process of its own with the command line's `main`, forked from one that has imported the libraries and done
nothing else: importing them touches no file of a run, and would take most of the time.

    python -m benchmarks.resume --check
    python -m benchmarks.resume --quick
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from agents.checkpoint import list_checkpoints
from agents.cli import main as command_line
from agents.manifest import read_manifest
from agents.runlog import METRICS, TREES, read_jsonl
from benchmarks import config_of, versions

KINDS = ("any", "checkpoint", "any", "evaluation", "any", "checkpoint", "any", "start-up")
"""What kills are aimed at, in turn."""

COMPARED = ("model.safetensors", "trainer.arrays", "trainer.json")
"""Files of the last checkpoint that must be the same."""


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        kills: Runs that are killed once.
        repeated: Kills of one further run that is killed again and again.
        updates: Policy updates of a run.
        budget: Rollouts of an update.
        eval_every: Updates between evaluations.
        seed: Seeds the moments.
        check: Exit with status 1 unless all runs end alike.
        quick: Few kills of short runs, within a minute; writes no results.
        arguments: Further arguments of `trace-envs train`, such as `--arguments="--layout flat"`.
        output: Directory of the results.
    """

    kills: int = 20
    repeated: int = 10
    updates: int = 12
    budget: int = 16
    eval_every: int = 4
    seed: int = 0
    check: bool = False
    quick: bool = False
    arguments: str = ""
    output: Path = Path("results")


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        kind: What it was aimed at.
        seconds: When, since the process was started.
        phase: What the run was doing: `start-up`, `checkpoint`, `evaluation` or `update`; `finished` if it came too late.
        update: Updates in the log by then.
    """

    kind: str
    seconds: float
    phase: str
    update: int


class Run:
    """A run that is started, killed and gone on with.

    Args:
        directory: Its directory, `<runs>/<name>`.
        arguments: Those of `trace-envs train`, but for `--runs` and `--name`.

    Attributes:
        directory: Its directory.
        output: What it has printed, from first to last.
    """

    def __init__(self, directory: Path, arguments: Sequence[str]):
        self.directory = directory
        self.output = directory.with_suffix(".out")
        self._where = ["--runs", str(directory.parent), "--name", directory.name]
        self._arguments = list(arguments)

    def start(self, more: Sequence[str] = ()) -> int:
        """Starts it, or goes on with it if it has a checkpoint; returns the number of the process.

        Args:
            more: Further arguments of `trace-envs train`.
        """
        begun = bool(list_checkpoints(self.directory / "checkpoints"))
        words = ["train", *(["--resume"] if begun else self._arguments), *self._where, *more]
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(file, 1)
                os.dup2(file, 2)
                # Python's own may have been put elsewhere, as a test's are.
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                status = command_line(words)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        return child

    def finish(self, more: Sequence[str] = ()) -> float:
        """Lets it run to its end; returns the seconds that took.

        Args:
            more: Further arguments of `trace-envs train`.

        Raises:
            RuntimeError: It failed; the message ends as its output does.
        """
        begin = time.perf_counter()
        status = os.waitstatus_to_exitcode(os.waitpid(self.start(more), 0)[1])
        if status != 0:
            raise RuntimeError(f"{self.directory} ended with status {status}: {self.output.read_text()[-2000:]}")
        return time.perf_counter() - begin

    def kill(self, kind: str, when: Callable[[float], bool]) -> Kill:
        """Starts it and kills it at a moment.

        Args:
            kind: What the kill is aimed at.
            when: Says of the seconds since the start whether the moment has come; asked a thousand times a second.

        Raises:
            RuntimeError: It failed before.
        """
        child, begin = self.start(), time.perf_counter()
        ended, status = 0, 0
        while not ended and not when(time.perf_counter() - begin):
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        seconds, code = time.perf_counter() - begin, os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{self.directory} ended with status {code}: {self.output.read_text()[-2000:]}")
        return Kill(kind, seconds, "finished" if code == 0 else self.phase(), self._logged()[0])

    def phase(self) -> str:
        """Returns what the run was doing, by the files that it left."""
        places = {path.name.split("-")[0] for path in (self.directory / "checkpoints").glob(".*")}
        if places:
            return "checkpoint"
        saved = [int(path.name.split("-")[1]) for path in list_checkpoints(self.directory / "checkpoints")]
        if not saved:
            return "start-up"
        logged, evaluated = self._logged()
        waiting = logged == saved[-1] and self.evaluation_is_due(saved[-1]) and not evaluated
        return "evaluation" if waiting else "update"

    def evaluation_is_due(self, update: int) -> bool:
        """Returns whether an evaluation follows an update, by the arguments."""
        given = dict(zip(self._arguments[::2], self._arguments[1::2], strict=False))
        return update % int(given["--eval-every"]) == 0 or update == int(given["--updates"])

    def _logged(self) -> tuple[int, bool]:
        """Returns the latest update in the log, and whether its evaluation is."""
        path, last, evaluated = self.directory / METRICS, 0, False
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:  # the last line, cut short
                continue
            evaluated = "eval/accuracy" in record
            last = record["update"]
        return last, evaluated

    def result(self) -> dict[str, Any]:
        """Returns what two runs are compared by."""
        records = read_jsonl(self.directory / METRICS)
        last = list_checkpoints(self.directory / "checkpoints")[-1]
        return {
            METRICS: [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records],
            TREES: (self.directory / TREES).read_bytes(),
            "update": last.name,
            **{name: read_manifest(last).files[name] for name in COMPARED},
        }


def moment(run: Run, kind: str, rng: np.random.Generator, length: float) -> Callable[[float], bool]:
    """Returns when to kill: at a random moment of the run, or a little after something was seen on disk.

    Args:
        run: The run, about to be started.
        kind: One of `KINDS`.
        rng: Draws the moment.
        length: Seconds that the run is expected to take.
    """
    checkpoints = run.directory / "checkpoints"
    share = float(rng.random())
    if kind in ("any", "start-up"):
        at = share * length * (0.15 if kind == "start-up" else 1.0)
        return lambda seconds: seconds >= at
    seen: list[float] = []
    skip = int(rng.integers(4))
    names: set[str] = set()

    def due(seconds: float) -> bool:
        # Each checkpoint that is begun (`.writing-*`) or each one that an evaluation follows, but for the first few.
        pattern = ".writing-*" if kind == "checkpoint" else "update-*"
        for path in checkpoints.glob(pattern):
            if kind == "checkpoint" or run.evaluation_is_due(int(path.name.split("-")[1])):
                names.add(path.name)
        if not seen and len(names) > (skip if kind == "checkpoint" else skip // 2):
            seen.append(seconds)
        # Writing takes some tens of milliseconds, most of them to flush; an evaluation takes some tenths of a second.
        return bool(seen) and seconds >= seen[0] + share * (0.06 if kind == "checkpoint" else 0.3)

    return due


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Returns the names of what differs between the results of two runs."""
    return [name for name in one if one[name] != other[name]]


def arguments_of(args: Args, checkpoint_every: int) -> list[str]:
    """Returns the arguments of `trace-envs train`."""
    given = {
        "--updates": args.updates,
        "--budget": args.budget,
        "--eval-every": args.eval_every,
        "--eval-per-level": 1,
        "--checkpoint-every": checkpoint_every,
        "--threads": 1,
    }
    return [str(word) for pair in given.items() for word in pair] + shlex.split(args.arguments)


def warm_up() -> None:
    """Imports what a run imports, once for all."""
    import torch.utils.tensorboard  # noqa: F401

    import agents.trainer  # noqa: F401


def measure(args: Args, runs: Path, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Kills and resumes; yields a record for each run, beginning with the one that is left alone.

    Args:
        args: Settings.
        runs: Directory for the runs.
        say: Told what happens.
    """
    reference = Run(runs / "reference", arguments_of(args, 3))
    length = reference.finish()
    expected = reference.result()
    yield {"run": "reference", "seconds": length, "kills": [], "differs": []}
    for number in range(args.kills + (args.repeated > 0)):
        rng = np.random.default_rng([args.seed, number])
        once = number < args.kills
        # With a checkpoint at every update much of the time is spent in writing them.
        every = (1, 3)[number % 2]
        run = Run(runs / f"run-{number}", arguments_of(args, every))
        kills: list[Kill] = []
        while len(kills) < (1 if once else args.repeated):
            kind = KINDS[(number + len(kills)) % len(KINDS)]
            # Short lives, if there are to be many: a run must not end before its last kill.
            kill = run.kill(kind, moment(run, kind, rng, length * (1.0 if once else 0.3)))
            if kill.phase == "finished":  # too late to be a kill
                if not once:
                    break
                shutil.rmtree(run.directory)
                continue
            kills.append(kill)
            say(f"run {number}, {kind}: killed after {kill.seconds:.2f} s, {kill.phase}, update {kill.update}")
        seconds = run.finish()
        differs = differences(expected, run.result())
        refused = run.output.read_text().count(" is refused: ")
        say(f"run {number}: " + (f"differs in {', '.join(differs)}" if differs else "the same"))
        yield {
            "run": f"run-{number}",
            "checkpoint_every": every,
            "seconds": seconds,
            "kills": [vars(k) for k in kills],
            "refused": refused,
            "differs": differs,
        }


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    """Returns kills by what they hit, and how many of the runs ended as the one that was left alone."""
    kills = [(kill, record) for record in records for kill in record["kills"]]
    table = Table("the kill came during", "kills", "of runs that ended alike", title="kill -9 and --resume")
    for phase in dict.fromkeys(["start-up", "update", "checkpoint", "evaluation", *(k["phase"] for k, _ in kills)]):
        hit = [record for kill, record in kills if kill["phase"] == phase]
        table.add_row(phase, str(len(hit)), str(sum(not record["differs"] for record in hit)))
    table.add_row("all", str(len(kills)), str(sum(not record["differs"] for _, record in kills)))
    return table


def markdown(args: Args, records: Sequence[dict[str, Any]]) -> str:
    """Returns the results as a page."""
    table = table_of(records)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    once, many = records[1 : args.kills + 1], records[args.kills + 1 :]
    lines = [
        "# Killed and resumed",
        "",
        f"{len(once)} runs of {args.updates} updates of {args.budget} rollouts, each killed once with SIGKILL and resumed"
        + (f", and one killed {len(many[0]['kills'])} times" if many else "")
        + f". Compared with a run that was left alone ({records[0]['seconds']:.1f} s): `metrics.jsonl` without `time/`, "
        "`trees.jsonl`, and the weights, the optimiser and all other state of the last checkpoint, bit for bit.",
        "",
        "| " + " | ".join(str(column.header) for column in table.columns) + " |",
        "|---|---|---|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether all runs ended alike."""
    if args.quick:
        few = {"kills": min(args.kills, 4), "repeated": min(args.repeated, 2)}
        args = replace(args, updates=4, budget=8, eval_every=2, **few)
    warm_up()
    # What is there by now is kept out of the children's garbage collections, which would copy every page of it.
    gc.collect()
    gc.freeze()
    console = Console()
    with tempfile.TemporaryDirectory() as runs:
        records = list(measure(args, Path(runs), lambda text: console.print(text, highlight=False)))
    console.print(table_of(records))
    console.print(
        f"the run that was left alone took {records[0]['seconds']:.1f} s; {sum(r.get('refused', 0) for r in records)} "
        "checkpoints were refused"
    )
    if not args.quick:
        args.output.mkdir(exist_ok=True)
        extra = {"config": config_of(args)} | versions("torch", "transformers", "safetensors")
        lines = [json.dumps(record | extra) + "\n" for record in records]
        (args.output / "resume.jsonl").write_text("".join(lines))
        (args.output / "resume.md").write_text(markdown(args, records))
    return not any(record["differs"] for record in records)


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.resume")
    sys.exit(0 if main(given) or not given.check else 1)
