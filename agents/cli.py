"""`trace-envs train | evaluate | warm-start | show | bench`.

Invariant: a mistake of the user ends in one sentence on standard error and status 2; an interrupt ends with a checkpoint and
status 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

import trace_envs
from agents.cli_evaluate import evaluate_command, parse
from agents.config import TrainConfig, load_config, resolve, to_dict
from agents.display import before_after_table
from agents.figures import engine_line, learner_line
from agents.report import write_report
from agents.runlog import CONFIG, METRICS, read_jsonl
from agents.tasks import level_name
from allocation import RolloutError
from trace_envs.snapshots import SnapshotUnsupportedError

if TYPE_CHECKING:
    from agents.trainer import Trainer

Config = Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class TrainArgs:
    """Trains an agent.

    Attributes:
        train: Settings of the run.
        config: Read the settings from a saved config.yaml; what is given on the command line wins.
        resume: Go on from the latest checkpoint of the run `<runs>/<name>`, under its own settings unless others are given;
            without a name, of the run named `trace*` that was started or resumed last.
        dry_run: Print the resolved settings and stop.
    """

    train: Config
    config: Path | None = None
    resume: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class WarmStartArgs:
    """Trains the tiny agent from random weights on an oracle's trajectories, and saves it as a model folder.

    Attributes:
        output: Folder to write; `trace-envs train --model FOLDER` starts from it.
        env_id: Gymnasium environment, one with an oracle.
        seed: Seeds weights, questions and mistakes.
        threads: CPU threads of torch; 0 leaves torch's choice.
    """

    output: Path
    env_id: str = "TraceMultiHopQA-v0"
    seed: int = 0
    threads: int = 0


@dataclass(frozen=True)
class ShowArgs:
    """Shows a run: the gain by level of the tasks, and where its report is.

    Attributes:
        run: Directory of the run, such as runs/trace.
    """

    run: Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class BenchArgs:
    """Runs a benchmark of a clone of the repository: `trace-envs bench NAME [arguments]`.

    Attributes:
        name: Name of a module in benchmarks/.
    """

    name: Annotated[str, tyro.conf.Positional]


def train(argv: Sequence[str]) -> int:
    """Runs `trace-envs train`."""
    from agents.trainer import Trainer

    args = parse(TrainArgs, argv, "train", default=TrainArgs(train=_train_defaults(argv)))
    config = resolve(args.train, resume=args.resume)
    console = Console()
    if args.dry_run:
        import yaml

        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        return 0
    trainer = Trainer(config, resume=args.resume)
    with closing(trainer):
        return _train(trainer, console)


def _train_defaults(argv: Sequence[str]) -> TrainConfig:
    """Returns the settings that those on the command line are laid over."""
    # Not the real parser: settings that go together with those of a file need not go together with the defaults.
    first = argparse.ArgumentParser("trace-envs train", add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--runs", type=Path, default=TrainConfig().runs)
    first.add_argument("--name")
    given, _ = first.parse_known_args(argv)
    if given.config is not None:
        return load_config(given.config)
    if not given.resume:
        return TrainConfig()
    where = resolve(TrainConfig(runs=given.runs, name=given.name), resume=True)
    if not (where.directory / CONFIG).is_file():
        known = ", ".join(sorted(path.parent.name for path in given.runs.glob(f"*/{CONFIG}"))) or "none"
        raise FileNotFoundError(f"--resume: {where.directory} is no run (no {CONFIG}); runs in {given.runs}: {known}")
    # The run may have been moved, or be reached from another directory.
    return replace(load_config(where.directory / CONFIG), runs=where.runs, name=where.name)


def _train(trainer: Trainer, console: Console) -> int:
    config = trainer.config
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(
        f"{config.env_id}: {config.allocator} on a model of {parameters:,} parameters, {config.updates} updates of "
        f"{config.budget} rollouts, seed {config.seed}; writing to {config.directory}"
    )
    try:
        before, after = trainer.run()
    except KeyboardInterrupt:
        runs = "" if config.runs == TrainConfig().runs else f" --runs {config.runs}"
        console.print(
            f"interrupted after update {trainer.update}; go on with: trace-envs train --resume --name {config.name}{runs}"
        )
        return 130
    report = write_report(config.directory)
    console.print(before_after_table(before, after, level_name(config.env_id)))
    total = trainer.total
    console.print(
        f"{total.root_rollouts + total.continuations:,} rollouts ({total.continuations:,} continuations), "
        f"{total.generated_tokens:,} tokens sampled; report: {report}"
    )
    records = read_jsonl(config.directory / METRICS)
    for line in (learner_line(records), engine_line(records)):
        if line is not None:
            console.print(line)
    return 0


def warm_start_command(argv: Sequence[str]) -> int:
    """Runs `trace-envs warm-start`."""
    import torch
    from rich.progress import track

    from agents.warm_start import config_for, warm_start

    args = parse(WarmStartArgs, argv, "warm-start")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = config_for(args.env_id, args.seed)
    console = Console()
    steps = iter(track(range(sum(phase.steps for phase in config.phases)), "warm start", console=console))

    def progress(step: int, loss: float) -> None:
        next(steps, None)
        if step % 50 == 0:
            console.print(f"step {step}: {loss:.3f} nats a token")

    model, _ = warm_start(config, args.output, progress=progress)
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters saved to {args.output}")
    return 0


def show(argv: Sequence[str]) -> int:
    """Runs `trace-envs show`."""
    args = parse(ShowArgs, argv, "show")
    if not (args.run / METRICS).is_file():
        raise FileNotFoundError(f"{args.run} is no run (no {METRICS}); runs are directories such as runs/trace")
    records = [r for r in read_jsonl(args.run / METRICS) if "eval/accuracy" in r]
    console = Console()
    if len(records) > 1:
        console.print(before_after_table(records[0], records[-1], level_name(_env_id(args.run))))
    console.print(f"report: {write_report(args.run)}")
    return 0


def _env_id(run: Path) -> str:
    """Returns the environment of a run; empty if its settings are gone."""
    import yaml

    path = run / CONFIG
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return str(config.get("env_id", "")) if isinstance(config, dict) else ""


def bench(argv: Sequence[str]) -> int:
    """Runs `trace-envs bench`."""
    import importlib.util
    import runpy

    args = parse(BenchArgs, argv[:1], "bench")
    sys.path.insert(0, str(Path.cwd()))
    if importlib.util.find_spec("benchmarks") is None:
        raise FileNotFoundError("there is no benchmarks/ here; run this command in a clone of the repository")
    module = f"benchmarks.{args.name}"
    if importlib.util.find_spec(module) is None:
        known = sorted(p.stem for p in Path("benchmarks").glob("[a-z]*.py"))
        raise ValueError(f"unknown benchmark {args.name!r}; known: {', '.join(known)}")
    sys.argv = [module, *argv[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate_command,
    "warm-start": warm_start_command,
    "show": show,
    "bench": bench,
}

MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, SnapshotUnsupportedError)
"""What a user's mistake is raised as."""

USAGE = """usage: trace-envs {train,evaluate,warm-start,show,bench} [arguments]

  train      train an agent (without arguments: the tiny agent on TraceMultiHopQA-v0, about five minutes on two cores)
  evaluate   score a scripted agent or a model on a data set
  warm-start make the tiny agent's starting point
  show       print a run's gain and write its report
  bench      run a benchmark of a clone

'trace-envs COMMAND --help' lists the arguments of a command and their defaults."""


def run_safely(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command; a user's mistake becomes one sentence and status 2."""
    try:
        try:
            return command(argv)
        except RolloutError as error:
            # Where it happened matters to who wrote the policy; a server that is not there is nothing of a single branch.
            if not isinstance(error.__cause__, MISTAKES):
                raise
            raise error.__cause__ from None
    except MISTAKES as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `trace-envs`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    trace_envs.register_envs()
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_safely(COMMANDS[argv[0]], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
