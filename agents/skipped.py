"""Batches whose loss or gradient was not finite, kept for inspection.

Invariant: a folder has its final name only once it is whole and on disk; what it holds is read without executing anything,
and gives back the batch bit for bit, so that the step can be tried again.

A folder `update-<number>` holds `batch.json` (figures, texts and structure, for people) and `batch.safetensors` (numbers).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from agents.advantages import Credit
from allocation.forest_table import ForestTable
from allocation.sample import Sample
from allocation.tree import Tree

KEEP = 8
"""How many batches stay in a directory: those of the last updates."""
FORMAT_VERSION = 2
PLAIN, ARRAYS = "batch.json", "batch.safetensors"
_WRITING, _REMOVING = ".writing-", ".removing-"


@dataclass(frozen=True, slots=True)
class SkippedBatch:
    """A batch that was kept.

    Attributes:
        update: Number of the update that met it.
        table: The forest: structure, rewards, token ids, log-probs of the sampler and the version of its weights, and texts; no
            snapshots and no features.
            Actions and observations that were no texts are their `repr`.
        credit: What its edges were given.
        figures: Of the update; some may not be finite.
    """

    update: int
    table: ForestTable
    credit: Credit
    figures: dict[str, float]


def save_skipped(
    directory: Path, update: int, table: ForestTable, credit: Credit, figures: Mapping[str, float], *, keep: int = KEEP
) -> Path:
    """Keeps a batch, and removes the oldest ones when there are more than enough.

    Args:
        directory: Where such batches live; the new one is `update-<number>` in it, and replaces one of that name.
        update: Number of the update.
        table: Its forest.
        credit: What its edges were given.
        figures: Of the update, finite or not.
        keep: How many stay, at least 1.

    Returns:
        The folder.

    Raises:
        OSError: It cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in (f"{_WRITING}*", f"{_REMOVING}*"):
        for stale in directory.glob(pattern):
            shutil.rmtree(stale)
    final, temporary = directory / f"update-{update:06d}", directory / f"{_WRITING}{update:06d}"
    temporary.mkdir()
    try:
        save_file(_arrays(table, credit), temporary / ARRAYS)
    except SafetensorError as error:  # which is what a full disk gives
        raise OSError(f"{temporary / ARRAYS}: {error}") from error
    plain = {
        "version": FORMAT_VERSION,
        "update": update,
        "figures": {name: _to_json(x) for name, x in figures.items()},
        "trees": [_tree(tree) for tree in table.trees],
    }
    (temporary / PLAIN).write_text(json.dumps(plain, indent=1, allow_nan=False))
    for path in (temporary / ARRAYS, temporary / PLAIN, temporary):
        _sync(path)
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    _sync(directory)
    others = [path for path in list_skipped(directory) if path != final]
    for path in others[: max(len(others) + 1 - keep, 0)]:
        _remove(path)
    return final


def list_skipped(directory: Path) -> list[Path]:
    """Returns the folders of the batches that were kept, by number of the update."""
    found = [p for p in directory.glob("update-*") if re.fullmatch(r"update-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("update-")))


def load_skipped(path: Path) -> SkippedBatch:
    """Reads what `save_skipped` wrote.

    Args:
        path: The folder.

    Raises:
        ValueError: It is no such folder, or is damaged.
    """
    try:
        plain, arrays = json.loads((path / PLAIN).read_text()), load_file(path / ARRAYS)
        if plain["version"] != FORMAT_VERSION:
            raise ValueError(f"it has version {plain['version']}, this release reads version {FORMAT_VERSION}")
        trees, row = [], 0
        for index, record in enumerate(plain["trees"]):
            tree = _rebuilt(record, arrays, row)
            tree.loss_weight = float(arrays["loss_weight"][index])
            trees.append(tree)
            row += len(tree.nodes)
        credit = Credit(arrays["up"], arrays["down"], arrays["weight"], arrays.get("target"))
        figures = {name: float(x) for name, x in plain["figures"].items()}
        return SkippedBatch(int(plain["update"]), ForestTable.of(trees), credit, figures)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no folder of a skipped batch, or is damaged ({type(error).__name__}: {error})"
        ) from error


def _arrays(table: ForestTable, credit: Credit) -> dict[str, np.ndarray]:
    """Returns the numbers of a batch; row i of those without a start belongs to node i of the table."""
    nodes = [node for tree in table.trees for node in tree.nodes]
    nothing, silent = np.zeros(0), np.zeros(0, dtype=np.float32)
    actions = [nothing if n.sample is None else n.sample.action_ids for n in nodes]
    logprobs = [silent if n.sample is None else n.sample.logprobs for n in nodes]
    contexts = [nothing if n.context_ids is None else n.context_ids for n in nodes]
    arrays = {
        "parent": np.array([-1 if n.parent is None else n.parent for n in nodes], dtype=np.int64),
        "rollout": table.rollout,
        "reward": table.reward,
        "loss_weight": np.array([t.loss_weight for t in table.trees], dtype=np.float64),
        "action_ids": np.concatenate([nothing, *actions]).astype(np.int64),
        "action_start": _starts(actions),
        "logprobs": np.concatenate([silent, *logprobs]),
        "context_ids": np.concatenate([nothing, *contexts]).astype(np.int64),
        "context_start": _starts(contexts),
        "up": credit.up,
        "down": credit.down,
        "weight": credit.weight,
    }
    if credit.target is not None:
        arrays["target"] = credit.target
    # safetensors writes memory as it lies, whatever the strides say.
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _starts(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, parts)]).astype(np.int64)


def _tree(tree: Tree) -> dict[str, Any]:
    """Returns the texts and the structure of a tree."""
    return {
        "task_id": tree.key,
        "index": tree.index,
        "phases": [int(phase) for phase in tree.phases],
        "nodes": [
            {
                "origin": n.origin,
                "action": _text(n.action),
                "observation": _text(n.observation),
                "sampled": None if n.sample is None else [n.sample.text, n.sample.finish_reason, n.sample.version],
                "shown": n.context_ids is not None,
                "terminated": bool(n.terminated),
                "truncated": bool(n.truncated),
                "is_correct": None if n.is_correct is None else bool(n.is_correct),
                "tool_error": bool(n.tool_error),
            }
            for n in tree.nodes
        ],
    }


def _rebuilt(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], first: int) -> Tree:
    """Returns a tree from its record and the rows of the arrays from `first` on."""

    def cut(name: str, starts: str, row: int) -> np.ndarray:
        return arrays[name][arrays[starts][row] : arrays[starts][row + 1]]

    tree = Tree(str(record["task_id"]), int(record["index"]), record["nodes"][0]["observation"])
    for phase in record["phases"]:
        tree.plan(phase)
    for row, node in enumerate(record["nodes"], start=first):
        context = cut("context_ids", "context_start", row) if node["shown"] else None
        if row == first:
            tree.root.context_ids = context
            continue
        parent, sample = tree.nodes[int(arrays["parent"][row])], None
        if node["sampled"] is not None:
            text, reason, version = node["sampled"]
            shown = np.zeros(0, dtype=np.int64) if parent.context_ids is None else parent.context_ids
            ids, logprobs = cut("action_ids", "action_start", row), cut("logprobs", "action_start", row)
            sample = Sample(text, ids, logprobs, shown, None, reason, version=int(version))
        tree.add(
            parent,
            int(arrays["rollout"][row]),
            node["origin"],
            node["action"],
            node["observation"],
            sample,
            float(arrays["reward"][row]),
            node["terminated"],
            node["truncated"],
            context_ids=context,
            is_correct=node["is_correct"],
            tool_error=node["tool_error"],
        )
    return tree


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _to_json(x: float) -> float | str:
    """Returns a number as JSON can hold it: one that is not finite as its text, which `float` reads."""
    return float(x) if math.isfinite(x) else str(float(x))


def _remove(path: Path) -> None:
    """Removes a folder; it is renamed first, so that none is half there under its final name."""
    removing = path.with_name(_REMOVING + path.name)
    os.replace(path, removing)
    shutil.rmtree(removing)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
