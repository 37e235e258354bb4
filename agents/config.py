"""Settings of a training run, documented where they are defined.

Invariant: the resolved settings are saved with the run and run again unchanged (`--config runs/<name>/config.yaml`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import count
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
import yaml

from agents.learner_config import LearnerConfig
from agents.models import env_settings, shipped_for
from agents.policies.engine_config import EngineConfig
from agents.policies.sampling import Sampling
from agents.runlog import CONFIG
from allocation import PREDICTORS, TraceConfig, TracePlusConfig
from allocation.allocators import METHODS

DEFAULT_NAME = "trace"
POLICIES = ("transformers", "vllm")
"""What can sample in training."""
CRITIC = "critic"
"""Name of the predictor that is the critic itself."""
NEED_FEATURES = ("hidden_state", "logistic", "ensemble", CRITIC)
"""Predictors that read the policy's hidden states."""
# A checkpoint is of these: another value would be ignored, or make what comes after no continuation of what came before.
FIXED_ON_RESUME = (
    "env_id",
    "env",
    "train_split",
    "train_levels",
    "eval_split",
    "model",
    "policy",
    "allocator",
    "predictor",
    "lora",
    "seed",
)


@dataclass(frozen=True)
class EnvConfig:
    """Arguments of the environment; what is left out is what a shipped model brings, else the environment's own default.

    Attributes:
        dataset: Data set to ask questions from.
        data_path: File with the questions of a real data set.
        corpus_path: File with the passages to search.
        dataset_seed: Seed of the synthetic encyclopedia.
        top_k: Passages that a search returns.
        suite: Of TraceToolUse-v0: `embedded` or `bfcl-v4`.
        category: Of TraceToolUse-v0 and TraceMath-v0: kind of tasks.
        levels: Of TraceMath-v0: levels of the problems.
        calls_per_turn: Of TraceToolUse-v0: most calls of one turn.
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
    top_k: int | None = None
    suite: str | None = None
    category: str | None = None
    levels: tuple[int, ...] | None = None
    calls_per_turn: int | None = None
    max_turns: int | None = None
    search_dropout: float | None = None
    reward: str | None = None
    action_format: str | None = None
    system_prompt: str | None = None

    def kwargs(self) -> dict[str, Any]:
        """Returns the arguments that were set."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class TrainConfig(LearnerConfig):
    """Settings of `trace-envs train`. The defaults are the main job: the tiny agent on two CPU cores in about five minutes.

    Those of the learner are `agents.learner_config.LearnerConfig`'s.

    Attributes:
        env_id: Gymnasium environment to learn.
        env: Its arguments.
        model: `tiny` (the shipped warm start), a local folder in transformers' format, or a hub id.
        policy: What samples: `transformers` (the learner's own weights) or `vllm`, which gets the weights after each update.
        engine: Settings of vLLM.
        allocator: Where the budget goes: `trace_plus` (ours), `trace` (the paper's), `grpo` (a fixed group at every prompt), or
            another of the methods in docs/methods.md.
        trace: Settings of `trace`.
        trace_plus: Settings of `trace_plus`.
        predictor: What predicts success, for methods that need it: `hidden_state`, `logistic`, `text`, `counts` or
            `ensemble`; or `critic`, with `--estimator gae`, for the critic itself. If it is left out, `hidden_state`, or `text`
            with an engine that gives no hidden states.
        group_size: Rollouts of a prompt, for methods with groups of a fixed size.
        budget: Rollouts for each update, root rollouts and continuations together.
        updates: Policy updates (`--max-steps` says the same).
        temperature: Sampling temperature of training and evaluation.
        top_p: Sample from the likeliest tokens that share this probability only; 1 from all. Leave it: see docs/engines.md.
        top_k: Sample from so many of the likeliest tokens only; 0 from all. Leave it, for the same reason.
        stop: Strings that end a turn, such as `</tool_call>`.
        max_new_tokens: Token limit of one turn.
        max_context: Token limit of an episode; if it is left out, what the model can take.
        thinking: Passed to the chat template as `enable_thinking`, for models that have such a switch.
        compile: Compile the decoding of the transformers policy.
        num_envs: Rollouts that run side by side.
        train_split: Split that training questions come from.
        train_levels: Shares of the levels, from level 1 on, in the pool of training tasks, such as `4 4 1 0 0 1` for many easy
            ones and some hopeless; the pool is the largest with these shares. If it is left out, all tasks.
        eval_split: Split that is evaluated before and after.
        eval_per_level: Tasks of each level (number of hops, for instance) in an evaluation; 0 for all.
        eval_every: Also evaluate every so many updates; 0 for only before and after.
        log_trees: Trees written to `trees.jsonl` for each update.
        checkpoint_every: Updates between checkpoints.
        keep_checkpoints: Checkpoints kept.
        runs: Directory of all runs.
        name: Name of this run, a directory in `runs`; if it is left out, the first free of trace, trace-2, trace-3, ...
        seed: Seeds everything random.
        device: Where the model runs.
        threads: CPU threads of torch; 0 leaves torch's choice.
        trackers: Also log to `wandb` or `trackio`, where installed.
    """

    env_id: str = "TraceMultiHopQA-v0"
    env: EnvConfig = field(default_factory=EnvConfig)
    model: str = "tiny"
    policy: str = "transformers"
    engine: EngineConfig = field(default_factory=EngineConfig)
    allocator: str = "trace_plus"
    trace: TraceConfig = field(default_factory=TraceConfig)
    trace_plus: TracePlusConfig = field(default_factory=TracePlusConfig)
    predictor: str | None = None
    group_size: int = 8
    budget: int = 128
    updates: Annotated[int, tyro.conf.arg(aliases=["--max-steps"])] = 110
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 48
    max_context: int | None = None
    thinking: bool | None = None
    compile: bool = False
    num_envs: int = 128
    train_split: str = "train"
    train_levels: tuple[float, ...] = ()
    eval_split: str = "test"
    eval_per_level: int = 100
    eval_every: int = 0
    log_trees: int = 4
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    runs: Path = Path("runs")
    name: str | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "budget",
            "updates",
            "num_envs",
            "checkpoint_every",
            "keep_checkpoints",
            "group_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_per_level", "eval_every", "log_trees", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        known = {
            "policy": POLICIES,
            "allocator": [name for name in METHODS if name != "oracle"],  # methods of the user's own among them
            "predictor": [None, *PREDICTORS, CRITIC],
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                names = ", ".join(v for v in values if v is not None)
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {names}")
        if self.policy == "vllm" and self.predictor in NEED_FEATURES:
            raise ValueError(
                f"predictor {self.predictor!r} reads hidden states, which vLLM does not give; use --predictor text or counts"
            )
        if self.predictor == CRITIC and self.estimator != "gae":
            raise ValueError(f"predictor 'critic' needs a critic: estimator 'gae', got {self.estimator!r}")
        if self.name is not None and (Path(self.name).name != self.name or self.name in ("", "..")):
            raise ValueError(
                f"name must be that of one directory, got {self.name!r}; --runs says in which directory it lies"
            )
        if self.train_levels and (min(self.train_levels) < 0 or not 0 < sum(self.train_levels) < float("inf")):
            raise ValueError(f"train_levels must be shares, none negative and not all zero, got {self.train_levels}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive in training, got {self.temperature}")
        _ = self.sampling  # says what is out of range

    @property
    def sampling(self) -> Sampling:
        """How actions are sampled in training."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
            max_context=self.max_context,
            seed=self.seed,
        )

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template is given besides messages and tools."""
        return {} if self.thinking is None else {"enable_thinking": self.thinking}

    @property
    def ignored(self) -> list[str]:
        """What was given to no effect: settings of another allocator, or of another engine; each with the reason."""
        sections = {"trace": TraceConfig(), "trace_plus": TracePlusConfig()}
        found = [
            f"settings of {name} are ignored: the allocator is {self.allocator}"
            for name, plain in sections.items()
            if name != self.allocator and getattr(self, name) != plain
        ]
        if self.compile and self.policy != "transformers":
            found.append(f"compile is ignored: the policy is {self.policy}, whose compilation is engine.eager")
        return found

    @property
    def directory(self) -> Path:
        """The run's directory."""
        if self.name is None:
            raise ValueError("the run has no name yet; `resolve` gives it one")
        return Path(self.runs) / self.name


def resolve(config: TrainConfig, *, resume: bool = False) -> TrainConfig:
    """Settles what was left open: the name of the run, and what follows from the model, the policy and each other.

    Args:
        config: The settings as given.
        resume: Whether the name is that of a run to go on with.

    Raises:
        FileNotFoundError: There is no run to go on with.
    """
    brought = env_settings(config.model, config.env_id)
    env = replace(config.env, **{k: v for k, v in brought.items() if getattr(config.env, k) is None})
    name = config.name or (_latest_name(config.runs) if resume else _free_name(config.runs))
    foreign = config.policy != "transformers"
    return replace(
        config,
        env=env,
        model=shipped_for(config.model, config.env_id),
        name=name,
        predictor=config.predictor or ("text" if foreign else "hidden_state"),
        # Other kernels give other log-probs for the same weights.
        importance=("truncated" if foreign else "none") if config.importance == "auto" else config.importance,
    )


def _free_name(runs: Path) -> str:
    names = (DEFAULT_NAME if i == 1 else f"{DEFAULT_NAME}-{i}" for i in count(1))
    return next(name for name in names if not (Path(runs) / name).exists())


def _latest_name(runs: Path) -> str:
    """Returns the run named `trace*` that was started or gone on with last (either writes its settings)."""
    found = sorted(Path(runs).glob(f"{DEFAULT_NAME}*/{CONFIG}"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise FileNotFoundError(f"--resume: {runs} holds no run named {DEFAULT_NAME}*; name one with --name")
    return found[-1].parent.name


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that cannot change in the middle of a run, by name."""
    plain = to_dict(config)
    values = {name: plain[name] for name in FIXED_ON_RESUME if name != "env"}
    values |= {f"env.{name}": value for name, value in plain["env"].items()}
    # Estimators without a critic may take each other's place.
    return values | {"estimator 'gae'": config.estimator == "gae"}


def fingerprint(config: TrainConfig) -> str:
    """Returns a digest of the settings that cannot change in the middle of a run; a checkpoint fits runs that share it."""
    return hashlib.sha256(json.dumps(_fixed(config), sort_keys=True).encode()).hexdigest()[:16]


def check_resumable(config: TrainConfig, saved: TrainConfig) -> None:
    """Refuses settings that cannot change in the middle of a run.

    Args:
        config: The settings to go on with, resolved.
        saved: The settings of the run.

    Raises:
        ValueError: Some differ; the message names them.
    """
    new, old = _fixed(config), _fixed(saved)
    changed = [name for name in new if new[name] != old[name]]
    if changed:
        what = "; ".join(f"{k} is {old[k]!r} in the run, {new[k]!r} was given" for k in changed)
        raise ValueError(f"--resume cannot change {', '.join(changed)}: {what}")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as plain data for YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    # What a run is about comes first, not what its class inherits.
    own = type(config).__annotations__
    return plain(dict(sorted(asdict(config).items(), key=lambda item: item[0] not in own)))


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
