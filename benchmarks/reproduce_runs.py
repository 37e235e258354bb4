"""One run of `benchmarks.reproduce`: training, the evaluations at its end, and the row that comes of it.

Invariant: a run that was broken off goes on from its last checkpoint; one that has a row is never done again, unless a setting
has changed since, which makes it another run with a folder of its own.

    python -m benchmarks.reproduce_runs '<cell as JSON>' --runs FOLDER --warm-starts MODEL...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from agents.checkpoint import list_checkpoints
from agents.config import TrainConfig
from agents.evaluate import evaluate
from agents.models import load_model
from agents.policies import TransformersPolicy
from agents.runlog import METRICS, read_jsonl
from agents.tasks import eval_task_ids, with_split
from agents.trainer import Trainer
from benchmarks import commit, versions
from benchmarks.reproduce_grid import WORLDS, Cell

ROW = "row.json"
BINS = 10
"""Stretches of a run in a heat map."""
SLOTS = 256
"""Episodes side by side at the end: a step of a small model takes little longer for many."""


@dataclass(frozen=True)
class Args:
    """Settings of one run.

    Attributes:
        cell: The run, as JSON.
        runs: Where runs are kept.
        warm_starts: Models to start from; the seed picks one.
    """

    cell: tyro.conf.Positional[str]
    runs: Path
    warm_starts: tuple[str, ...]


def launch(cell: Cell, runs: Path, warm_starts: Sequence[str]) -> dict[str, Any]:
    """Does a run in a process of its own, unless it is done; returns its row.

    Raises:
        RuntimeError: It failed; the message ends with what it printed last.
    """
    row = cell.config(runs, warm_starts).directory / ROW
    if not row.exists():
        command = [sys.executable, "-m", "benchmarks.reproduce_runs", json.dumps(asdict(cell)), "--runs", str(runs)]
        done = subprocess.run(
            [*command, "--warm-starts", *warm_starts],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{cell.name} failed:\n{done.stderr[-2000:]}")
    return json.loads(row.read_text())


def final_figures(config: TrainConfig, cell: Cell) -> dict[str, Any]:
    """Returns the accuracies on each evaluation set: the mean of the last checkpoints on the main one, else the last one's."""
    world = WORLDS[cell.world]
    sets = {cell.split: world.sets.get(cell.split, {})} | (dict(world.sets) if cell.split in world.sets else {})
    figures: dict[str, Any] = {}
    checkpoints = list_checkpoints(config.directory / "checkpoints")[-cell.size.last :]
    for name, arguments in sets.items():
        records = []
        for path in checkpoints if name == cell.split else checkpoints[-1:]:
            model, tokenizer = load_model(str(path))
            kwargs = with_split(config.env_id, {**config.env.kwargs(), **arguments}, name)
            limits = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
            policy = TransformersPolicy(model, tokenizer, **limits, seed=config.seed + 1)
            ids = eval_task_ids(config.env_id, kwargs, cell.size.final_per_level)
            records.append(evaluate(policy, config.env_id, kwargs, ids, num_envs=SLOTS))
        kept = [key for key in records[0] if key.split("/")[1] in ("accuracy", "em", "f1") or "by_level" in key]
        figures[name] = {key.removeprefix("eval/"): float(np.mean([r[key] for r in records])) for key in kept}
    return figures


def budget_by(records: Sequence[Mapping[str, float]], prefix: str) -> dict[str, list[float]]:
    """Returns how a run's rollouts are divided in each stretch of it.

    Args:
        records: The records of the updates.
        prefix: `budget/by_level/` or `budget/by_depth/`.

    Returns:
        By level or depth, the share of the stretch's rollouts in each of at most `BINS` stretches.
    """
    parts = [part for part in np.array_split(np.arange(len(records)), BINS) if len(part)]
    names = {key.removeprefix(prefix) for record in records for key in record if key.startswith(prefix)}
    counts = {n: [sum(records[i].get(prefix + n, 0) for i in p) for p in parts] for n in sorted(names, key=float)}
    totals = np.maximum(np.sum(list(counts.values()), axis=0), 1) if counts else np.ones(len(parts))
    return {name: (np.array(found) / totals).tolist() for name, found in counts.items()}


def row_of(cell: Cell, config: TrainConfig, metrics: Sequence[dict[str, Any]], final: dict[str, Any]) -> dict[str, Any]:
    """Returns all that is reported of a run."""
    updates = [record for record in metrics if "train/success" in record]
    rollouts = np.cumsum([r["ledger/root_rollouts"] + r["ledger/continuations"] for r in updates])
    tokens = np.cumsum([r["ledger/generated_tokens"] for r in updates])
    curve = []
    for record in metrics:
        if "eval/accuracy" in record:
            done = record["update"]
            spent = (int(rollouts[done - 1]), int(tokens[done - 1])) if done else (0, 0)
            curve.append(
                {"update": done, "rollouts": spent[0], "tokens": spent[1], "accuracy": record["eval/accuracy"]}
            )
    accuracy = final[cell.split]["accuracy"]
    levels = {int(k.rsplit("/", 1)[1]): v for k, v in final[cell.split].items() if k.startswith("accuracy_by_level/")}
    shares = config.train_levels or tuple(1.0 for _ in levels)
    weights = {level: share for level, share in enumerate(shares, 1) if level in levels}
    by_pool = sum(levels[k] * w for k, w in weights.items()) / sum(weights.values())
    half = updates[len(updates) // 2 :]
    return {
        **asdict(cell),
        "model": config.model,
        "fingerprint": config.directory.name.rsplit("-", 1)[1],
        "warm_accuracy": curve[0]["accuracy"],
        "accuracy": accuracy,
        "accuracy_by_pool": by_pool,
        "sets": final,
        "ratio_roots": float(np.mean([r["effective_ratio/roots"] for r in updates])),
        "ratio_tree": float(np.mean([r["effective_ratio/tree"] for r in updates])),
        "ratio_tree_late": float(np.mean([r["effective_ratio/tree"] for r in half])),
        "rollouts": int(rollouts[-1]),
        "tokens": int(tokens[-1]),
        "continuations": int(sum(r["ledger/continuations"] for r in updates)),
        "curve": curve,
        "budget": {what: budget_by(updates, f"budget/by_{what}/") for what in ("level", "depth")},
        "versions": versions("torch", "transformers", "gymnasium"),
        "commit": commit(),
    }


def main(args: Args) -> None:
    """Trains, evaluates, and writes the row."""
    cell = Cell.of(json.loads(args.cell))
    config = cell.config(args.runs, args.warm_starts)
    resume = bool(list_checkpoints(config.directory / "checkpoints"))
    with closing(Trainer(config, resume=resume)) as trainer:
        trainer.run()
        config = trainer.config
    row = row_of(cell, config, read_jsonl(config.directory / METRICS), final_figures(config, cell))
    part = config.directory / f"{ROW}.part"
    part.write_text(json.dumps(row) + "\n")
    part.replace(config.directory / ROW)


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.reproduce_runs"))
