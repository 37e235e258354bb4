"""What one optimiser step holds in memory, in a process of its own.

Invariant: both layouts compute the whole forest in one pass, without accumulation.

Two figures. `saved`: bytes of what is kept for the backward pass, each storage once, parameters left out; flat rows are
computed one by one and none of what they keep is freed, so no padding is counted. `peak`: what the process grows to beyond what
it was after a step on a small forest, as the operating system sees it; flat rows are padded to one batch.

    python -m benchmarks.packing_memory --layout packed
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from agents.learner import Learner
from agents.learner_config import LearnerConfig
from allocation import Forest
from benchmarks.packing_forest import Shape, forest_of, model_of, shape_of

ONE_PASS = 10**9
SMALL = Shape(1, 2, 0, 20, 2, 10, 10)


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        layout: `packed` or `flat`.
        shape: Of the forest, by name (`benchmarks.packing_forest.SHAPES`).
        width: Hidden size.
        layers: Number of layers.
        seed: Of weights and tokens.
        trees: Of the forest; 0 for as many as the shape has.
    """

    layout: str = "packed"
    shape: str = "2.5"
    width: int = 384
    layers: int = 4
    seed: int = 0
    trees: int = 0


def saved_bytes(learner: Learner, forest: Forest) -> int:
    """Returns the bytes of all storages that an update keeps for its backward passes, parameters left out.

    None of them is freed before the update ends, so what later micro-batches keep does not hide behind it.
    """
    parameters = {p.untyped_storage().data_ptr() for p in learner.model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.update(forest)
    return sum(storage.nbytes() for storage in held.values())


def _most_resident() -> int:
    """Returns the most bytes that the process has held so far (Linux; `ru_maxrss` would count the parent's, too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(args: Args) -> dict[str, int]:
    """Measures one step; to be called in a fresh process."""
    torch.set_num_threads(1)
    model = model_of(args.width, args.layers, args.seed)
    forest = forest_of(shape_of(args.shape, args.trees), args.seed)
    learner = Learner(model, LearnerConfig(layout=args.layout, micro_tokens=ONE_PASS), updates=10)
    learner.update(forest_of(SMALL, args.seed))
    before = _most_resident()
    learner.update(forest)
    peak = _most_resident() - before
    rows = ONE_PASS if args.layout == "packed" else 1
    learner = Learner(model, LearnerConfig(layout=args.layout, micro_tokens=rows), updates=10)
    return {"saved": saved_bytes(learner, forest), "peak": peak}


def in_fresh_process(args: Args) -> dict[str, int]:
    """Measures in a process that has done nothing else."""
    words = [word for name, value in vars(args).items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.packing_memory", *words]
    root = Path(__file__).parents[1]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {found.returncode}: {found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Args, prog="python -m benchmarks.packing_memory"))))
