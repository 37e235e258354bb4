"""What `benchmarks.reproduce` compares: methods, environments, pools of prompts, seeds and warm starts.

Invariant: runs of a comparison differ in their method and in nothing else; seeds are paired, and seed s starts from warm start
s modulo their number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from agents.config import EnvConfig, TrainConfig
from agents.models import TINY, env_settings, shipped_for
from allocation.methods.trace_config import TraceConfig, TracePlusConfig


@dataclass(frozen=True)
class Method:
    """A method with the estimator of its paper.

    Attributes:
        settings: Fields of `TrainConfig` that it sets.
        what: What it is, in a few words.
    """

    settings: Mapping[str, Any]
    what: str


def _groups(allocator: str, what: str, size: int = 8) -> Method:
    settings = {"allocator": allocator, "estimator": "grpo", "advantage_std": True, "group_size": size}
    return Method(settings, what)


def _trace(what: str, **settings: Any) -> Method:
    return Method({"allocator": "trace", "estimator": "tree", "trace": TraceConfig(**settings)}, what)


def _ours(what: str, predictor: str | None = None, **settings: Any) -> Method:
    ours = {"allocator": "trace_plus", "estimator": "tree", "trace_plus": TracePlusConfig(**settings)}
    return Method(ours | ({"predictor": predictor} if predictor else {}), what)


METHODS: Mapping[str, Method] = {
    "grpo": _groups("grpo", "uniform groups of 8, divided by the group's standard deviation"),
    "grpo_4": _groups("grpo", "the same with groups of 4", 4),
    "dapo": _groups("dapo", "groups that are not mixed leave the loss"),
    "pcl": _groups("pcl", "groups at the prompts predicted nearest one half"),
    "mopps": _groups("mopps", "groups at the prompts drawn nearest one half"),
    "vip": _groups("vip", "rollouts divided by predicted variance"),
    "treepo": Method({"allocator": "treepo", "estimator": "treepo"}, "trees that branch at every depth"),
    "tree_grpo": Method({"allocator": "tree_grpo", "estimator": "tree_grpo"}, "random branches of random nodes"),
    "arpo": _groups("arpo", "branches where entropy rose"),
    "trace": _trace("the paper's TRACE"),
    "trace_roots": _trace("TRACE without its prefix stage", continuations=0.0),
    "trace_prefixes": _trace("TRACE at random prompts", root_value="uniform", pool_factor=1.0),
    "trace_neither": _trace("random prompts, no prefixes", root_value="uniform", pool_factor=1.0, continuations=0.0),
    "trace_plus": _ours("ours"),
    "trace_plus_top": _ours("ours at the best prompts, not at drawn ones", root_choice="best", pool_factor=3.0),
    "trace_plus_ensemble": _ours("ours with two predictors as one", predictor="ensemble"),
    "trace_plus_roots": _ours("ours without its prefix stage", continuations=0.0),
    "trace_plus_prefixes": _ours("ours at random prompts", root_value="uniform", pool_factor=1.0),
}
"""By name; `warm_start`, which learns nothing, is the first evaluation of any of them."""

MAIN = ("grpo", "grpo_4", "dapo", "pcl", "mopps", "vip", "treepo", "tree_grpo", "arpo", "trace", "trace_plus")
ABLATION = (
    *("grpo", "trace_neither", "trace_prefixes", "trace_roots", "trace"),
    *("trace_plus_prefixes", "trace_plus_roots", "trace_plus_top", "trace_plus"),
)


@dataclass(frozen=True)
class World:
    """An environment with its pools of prompts and its evaluation sets.

    Attributes:
        env_id: The environment.
        pools: Shares of the levels in training, by name; empty shares for the tasks as they are.
        sets: Splits that a run is evaluated on at its end, the main one first, with further arguments of the environment.
    """

    env_id: str
    pools: Mapping[str, tuple[float, ...]]
    sets: Mapping[str, Mapping[str, Any]]


POOLS: Mapping[str, tuple[float, ...]] = {
    "balanced": (),
    # Many easy prompts and some hopeless ones, few between (FINDINGS, point 1).
    "skewed": (8.0, 2.0, 1.0, 0.0, 2.0, 4.0),
    # Nothing that is solved in a turn or two.
    "sparse": (0.0, 0.0, 0.0, 1.0, 2.0, 2.0),
}
WORLDS: Mapping[str, World] = {
    "multihop": World(
        "TraceMultiHopQA-v0",
        POOLS,
        {"test": {}, "test_longer": {"max_turns": 12}, "test_compositions": {}, "test_distractors": {}},
    ),
    "tools": World("TraceToolUse-v0", POOLS, {"test": {}}),
    "math": World("TraceMath-v0", POOLS, {"test": {}}),
}


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        updates: Policy updates.
        budget: Rollouts of each.
        points: Evaluations on the way, besides those at the two ends.
        per_level: Tasks of each level in those.
        final_per_level: Tasks of each level in the evaluations at the end, one for each of the last checkpoints on the main set
            and one of the very last on others.
        last: Number of these checkpoints.
    """

    updates: int = 110
    budget: int = 128
    points: int = 10
    per_level: int = 50
    final_per_level: int = 300
    last: int = 3

    @property
    def every(self) -> int:
        """Updates between checkpoints and evaluations."""
        return max(self.updates // (self.points + 1), 1)


QUICK = Size(updates=8, budget=32, points=3, per_level=4, final_per_level=8, last=2)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        world: A name of `WORLDS`.
        pool: One of its pools.
        method: A name of `METHODS`.
        seed: Of everything random.
        step: Factor on the step sizes.
        split: Split that it is evaluated on.
        size: How large it is.
    """

    world: str
    pool: str
    method: str
    seed: int
    step: float = 1.0
    split: str = "test"
    size: Size = field(default_factory=Size)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Cell:
        """Returns the run that plain data with its fields, such as a row of results, is of."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__} | {"size": Size(**row["size"])})

    @property
    def name(self) -> str:
        """What it is called; runs that differ in a field have different names."""
        size = "-".join(str(value) for value in vars(self.size).values())
        return f"{self.world}-{self.pool}-{self.method}-{self.seed}-{self.step:g}-{self.split}-{size}"

    def fingerprint(self, warm_starts: Sequence[str]) -> str:
        """Returns 12 hex digits of all settings of the run: another default of a method or of training gives others."""
        config = asdict(self._config(warm_starts))
        for method in {"trace", "trace_plus"} - {config["allocator"]}:
            del config[method]  # settings of a method that is not used
        text = json.dumps(config, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def config(self, folder: Path, warm_starts: Sequence[str]) -> TrainConfig:
        """Returns the settings of the run; its folder is named by the run and by its fingerprint.

        Args:
            folder: Where runs are kept.
            warm_starts: Models to start from; the seed picks one.
        """
        name = f"{self.name}-{self.fingerprint(warm_starts)}"
        return replace(self._config(warm_starts), runs=folder, name=name)

    def _config(self, warm_starts: Sequence[str]) -> TrainConfig:
        world, size = WORLDS[self.world], self.size
        plain = TrainConfig()
        model = warm_starts[self.seed % len(warm_starts)]
        # Other warm starts of the tiny agent want to be asked as the shipped one does.
        env = EnvConfig(**env_settings(shipped_for(TINY, world.env_id), world.env_id))
        return replace(
            TrainConfig(
                env_id=world.env_id,
                env=env,
                model=model,
                budget=size.budget,
                num_envs=size.budget,
                updates=size.updates,
                train_levels=world.pools[self.pool],
                eval_split=self.split,
                eval_per_level=size.per_level,
                eval_every=size.every,
                checkpoint_every=size.every,
                keep_checkpoints=size.last,
                log_trees=0,
                lr=plain.lr * self.step,
                gain_lr=plain.gain_lr * self.step,
                seed=self.seed,
                threads=1,
            ),
            **METHODS[self.method].settings,
        )


def cells(
    worlds: Sequence[str],
    pools: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    steps: Mapping[tuple[str, str], float],
    *,
    split: str,
    size: Size,
) -> Iterator[Cell]:
    """Yields all runs, seed by seed, so that what is done when time runs out is paired.

    Args:
        worlds: Names of `WORLDS`.
        pools: Names of their pools.
        methods: Names of `METHODS`.
        seeds: The seeds.
        steps: Factors on the step sizes by world and method; 1 where there is none.
        split: Split to evaluate on.
        size: How large a run is.
    """
    for seed in seeds:
        for world in worlds:
            for pool in pools:
                for method in methods:
                    yield Cell(world, pool, method, seed, steps.get((world, method), 1.0), split, size)
