"""Settings of a training run, documented where they are defined.

Invariant: the resolved settings are saved with the run and run again unchanged (`--config runs/<name>/config.yaml`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from allocation import TraceConfig


@dataclass(frozen=True)
class EnvConfig:
    """Arguments of the environment; what is left out has the environment's own default.

    Attributes:
        dataset: Data set to ask questions from.
        data_path: File with the questions of a real data set.
        corpus_path: File with the passages to search.
        dataset_seed: Seed of the synthetic encyclopedia.
        top_k: Passages that a search returns.
        max_turns: Turns after which an episode is truncated.
        search_dropout: Chance that a passage found is withheld.
        reward: Terminal reward: `em` or `f1`.
        action_format: `hermes`, `react` or `tags`.
        system_prompt: First message; empty for none.
    """

    dataset: str | None = None
    data_path: str | None = None
    corpus_path: str | None = None
    dataset_seed: int | None = None
    top_k: int | None = 2
    max_turns: int | None = None
    search_dropout: float | None = None
    reward: str | None = None
    action_format: str | None = None
    system_prompt: str | None = ""

    def kwargs(self) -> dict[str, Any]:
        """Returns the arguments that were set."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `trace-envs train`. The defaults are the main job: the tiny agent on two CPU cores in about five minutes.

    Attributes:
        env_id: Gymnasium environment to learn.
        env: Its arguments.
        model: `tiny` (the shipped warm start), a local folder in transformers' format, or a hub id.
        allocator: Where the budget goes: `trace` or `grpo` (a fixed group at every prompt).
        trace: Settings of `trace`.
        group_size: Rollouts of a prompt under `grpo`.
        estimator: Advantages: `tree` (default) or `grpo` (flat groups).
        advantage_std: Divide a prompt's advantages by their standard deviation, with a floor.
        aggregation: How the loss averages: `prompt`, `trajectory`, `edge` or `token`.
        budget: Rollouts for each update, root rollouts and continuations together.
        updates: Policy updates.
        epochs: Optimiser steps on each batch of rollouts.
        lr: Step size of AdamW.
        lr_warmup: Updates over which the step size rises from zero.
        lr_schedule: What follows: `linear` falls to zero at the last update, `constant` stays.
        weight_decay: Of AdamW.
        clip_low: Lower bound of the probability ratio is 1 - this.
        clip_high: Upper bound of the probability ratio is 1 + this.
        max_grad_norm: Gradients are scaled down to this norm.
        temperature: Sampling temperature of training and evaluation.
        max_new_tokens: Token limit of one turn.
        num_envs: Rollouts that run side by side.
        micro_tokens: Padded tokens of a micro-batch of the learner.
        train_split: Split that training questions come from.
        eval_split: Split that is evaluated before and after.
        eval_per_hop: Questions of each number of hops in an evaluation; 0 for all.
        eval_every: Also evaluate every so many updates; 0 for only before and after.
        log_trees: Trees written to `trees.jsonl` for each update.
        checkpoint_every: Updates between checkpoints.
        keep_checkpoints: Checkpoints kept.
        runs: Directory of all runs.
        name: Name of this run, a directory in `runs`.
        seed: Seeds everything random.
        device: Where the model runs.
        threads: CPU threads of torch; 0 leaves torch's choice.
        trackers: Also log to `wandb` or `trackio`, where installed.
    """

    env_id: str = "TraceMultiHopQA-v0"
    env: EnvConfig = field(default_factory=EnvConfig)
    model: str = "tiny"
    allocator: str = "trace"
    trace: TraceConfig = field(default_factory=TraceConfig)
    group_size: int = 8
    estimator: str = "tree"
    advantage_std: bool = False
    aggregation: str = "prompt"
    budget: int = 128
    updates: int = 60
    epochs: int = 1
    lr: float = 2e-4
    lr_warmup: int = 5
    lr_schedule: str = "linear"
    weight_decay: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 48
    num_envs: int = 64
    micro_tokens: int = 8192
    train_split: str = "train"
    eval_split: str = "test"
    eval_per_hop: int = 100
    eval_every: int = 0
    log_trees: int = 4
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    runs: Path = Path("runs")
    name: str = "trace"
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "budget",
            "updates",
            "epochs",
            "max_new_tokens",
            "num_envs",
            "micro_tokens",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr_schedule not in ("linear", "constant"):
            raise ValueError(f"unknown lr_schedule {self.lr_schedule!r}; known: linear, constant")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive in training, got {self.temperature}")

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(self.runs) / self.name


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as plain data for YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(asdict(config))


def from_dict(cls: type, data: Any, where: str) -> Any:
    """Builds a configuration from plain data.

    Args:
        cls: The dataclass.
        data: What a YAML file held.
        where: Name of the file, for messages.

    Raises:
        ValueError: A field is unknown; the message lists the known ones.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected settings of {cls.__name__} as a mapping, got {type(data).__name__}")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{where}: unknown settings {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in data.items():
        hint = hints[name]
        if is_dataclass(hint):
            values[name] = from_dict(hint, value, f"{where}: {name}")  # type: ignore[arg-type]
        elif hint is Path:
            values[name] = Path(value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
            _check_type(values[name], hint, f"{where}: {name}")
    return cls(**values)


def _check_type(value: Any, hint: Any, where: str) -> None:
    """Refuses a value of the wrong type; an integer may stand for a float."""
    kinds = tuple(get_origin(h) or h for h in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
    kinds += (int,) if float in kinds else ()
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(sorted({"none" if k is type(None) else k.__name__ for k in kinds}))
        raise ValueError(f"{where}: expected {expected}, got {value!r}")


def load_config(path: str | Path) -> TrainConfig:
    """Reads a run's `config.yaml`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not valid YAML, or has unknown settings.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is no valid YAML: {error}") from error
    return from_dict(TrainConfig, data, str(path))
