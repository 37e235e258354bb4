"""`trace-envs train | evaluate | warm-start | show | bench`.

Invariant: a mistake of the user ends in one sentence on standard error and status 2; an interrupt ends with a checkpoint and
status 130.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

import trace_envs
from agents.config import TrainConfig, load_config, resolve, to_dict
from agents.display import before_after_table
from agents.evaluate import evaluate, make_env
from agents.figures import learner_line
from agents.models import env_settings, load_model
from agents.policies import SCRIPTS, Policy, ScriptedPolicy, TransformersPolicy
from agents.report import write_report
from agents.runlog import CONFIG, METRICS, read_jsonl
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
class EvaluateArgs:
    """Evaluates a scripted agent or a model on an environment.

    Attributes:
        env_id: Gymnasium environment.
        dataset: Data set: synthetic (if it is left out), hotpotqa, 2wikimultihopqa, musique or bamboogle.
        data_path: File with the questions of a real data set.
        corpus_path: File with the passages to search; the questions' own contexts if it is left out.
        split: Split of the data set.
        agent: A scripted agent, `oracle` or `bm25`, or `model`.
        model: With `--agent model`: `tiny`, a local folder, or a hub id.
        top_k: Passages that a search returns; if it is left out, what `tiny` was trained on, else the environment's default.
        max_turns: Turns after which an episode is truncated; the environment's default if it is left out.
        action_format: `hermes`, `react` or `tags`.
        system_prompt: First message; if it is left out, none for `tiny`, else the format's instructions.
        limit: Evaluate the first so many questions; 0 for all.
        temperature: Sampling temperature of a model; 0 is greedy.
        max_new_tokens: Token limit of one turn of a model.
        num_envs: Episodes that run side by side.
        seed: Seeds everything random.
        output: Also write the figures to this file, as JSON.
    """

    env_id: str = "TraceMultiHopQA-v0"
    dataset: str | None = None
    data_path: str | None = None
    corpus_path: str | None = None
    split: str = "test"
    agent: str = "oracle"
    model: str = "tiny"
    top_k: int | None = None
    max_turns: int | None = None
    action_format: str | None = None
    system_prompt: str | None = None
    limit: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 64
    num_envs: int = 64
    seed: int = 0
    output: Path | None = None


@dataclass(frozen=True)
class WarmStartArgs:
    """Trains the tiny agent from random weights on an oracle's trajectories, and saves it as a model folder.

    Attributes:
        output: Folder to write; `trace-envs train --model FOLDER` starts from it.
        seed: Seeds weights, questions and mistakes.
        threads: CPU threads of torch; 0 leaves torch's choice.
    """

    output: Path
    seed: int = 0
    threads: int = 0


@dataclass(frozen=True)
class ShowArgs:
    """Shows a run: the gain by hops, and where its report is.

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

    args = _parse(TrainArgs, argv, "train", default=TrainArgs(train=_train_defaults(argv)))
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
    console.print(before_after_table(before, after))
    total = trainer.total
    console.print(
        f"{total.root_rollouts + total.continuations:,} rollouts ({total.continuations:,} continuations), "
        f"{total.generated_tokens:,} tokens sampled; report: {report}"
    )
    console.print(learner_line(read_jsonl(config.directory / METRICS)))
    return 0


def evaluate_command(argv: Sequence[str]) -> int:
    """Runs `trace-envs evaluate`."""
    args = _parse(EvaluateArgs, argv, "evaluate")
    for name, least in (("limit", 0), ("max_new_tokens", 1), ("num_envs", 1), ("temperature", 0)):
        if not getattr(args, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(args, name)}")
    known = {
        "dataset": args.dataset,
        "data_path": args.data_path,
        "corpus_path": args.corpus_path,
        "split": args.split,
        "top_k": args.top_k,
        "max_turns": args.max_turns,
        "action_format": args.action_format,
        "system_prompt": args.system_prompt,
    }
    known = {name: value for name, value in known.items() if value is not None}
    if args.agent == "model":
        known = env_settings(args.model, args.env_id) | known
    with closing(make_env(args.env_id, known)) as env:
        task_ids = list(env.unwrapped.task_ids())  # type: ignore[attr-defined]
    task_ids = task_ids[: args.limit] if args.limit else task_ids
    policy = _policy(args)
    console = Console()
    record = evaluate(policy, args.env_id, known, task_ids, num_envs=args.num_envs, seed=args.seed)
    console.print(_evaluation_table(args, record))
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _policy(args: EvaluateArgs) -> Policy:
    if args.agent in SCRIPTS:
        return ScriptedPolicy(args.agent, action_format=args.action_format or "hermes", seed=args.seed)
    if args.agent != "model":
        raise ValueError(f"unknown agent {args.agent!r}; known: {', '.join([*SCRIPTS, 'model'])}")
    model, tokenizer = load_model(args.model)
    return TransformersPolicy(
        model, tokenizer, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed
    )


def _evaluation_table(args: EvaluateArgs, record: dict[str, Any]) -> Table:
    name = args.agent if args.agent in SCRIPTS else args.model
    table = Table(title=f"{name} on {args.dataset or args.env_id}, {record['eval/questions']} questions")
    table.add_column("measure")
    table.add_column("value", justify="right")
    labels = {
        "eval/em": "exact match",
        "eval/f1": "F1",
        "eval/supporting_recall": "recall of supporting passages",
    }
    for key, label in labels.items():
        if key in record:
            table.add_row(label, f"{100 * record[key]:.1f} %")
    table.add_row("turns", f"{record['eval/turns']:.2f}")
    table.add_row("tool errors", f"{record['eval/tool_errors']:.2f}")
    table.add_row("out of turns", f"{100 * record['eval/truncated']:.1f} %")
    for key, value in record.items():
        if key.startswith("eval/accuracy_by_hops/"):
            hops = key.rsplit("/", 1)[1]
            count = record[f"eval/questions_by_hops/{hops}"]
            table.add_row(
                f"accuracy, {hops} hops ({count})" if hops != "0" else f"accuracy ({count})", f"{100 * value:.1f} %"
            )
    return table


def warm_start_command(argv: Sequence[str]) -> int:
    """Runs `trace-envs warm-start`."""
    import torch
    from rich.progress import track

    from agents.warm_start import WarmStartConfig, warm_start

    args = _parse(WarmStartArgs, argv, "warm-start")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = WarmStartConfig(seed=args.seed)
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
    args = _parse(ShowArgs, argv, "show")
    if not (args.run / METRICS).is_file():
        raise FileNotFoundError(f"{args.run} is no run (no {METRICS}); runs are directories such as runs/trace")
    records = [r for r in read_jsonl(args.run / METRICS) if "eval/accuracy" in r]
    console = Console()
    if len(records) > 1:
        console.print(before_after_table(records[0], records[-1]))
    console.print(f"report: {write_report(args.run)}")
    return 0


def bench(argv: Sequence[str]) -> int:
    """Runs `trace-envs bench`."""
    import importlib.util
    import runpy

    args = _parse(BenchArgs, argv[:1], "bench")
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


def _parse(cls: type, argv: Sequence[str], command: str, **kwargs: Any) -> Any:
    return tyro.cli(cls, args=list(argv), prog=f"trace-envs {command}", **kwargs)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate_command,
    "warm-start": warm_start_command,
    "show": show,
    "bench": bench,
}

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
        return command(argv)
    except (ValueError, OSError, ImportError, FloatingPointError, SnapshotUnsupportedError) as error:
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
