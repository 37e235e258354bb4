"""How much does one batch say about the direction in which the policy improves?

Draws batches of rollouts from a fixed policy by TRACE, takes the gradient of each, and reports the mean cosine over pairs of
batches: 0 is pure noise, 1 no noise. By group of weights, since the groups differ by an order of magnitude.

    python -m benchmarks.gradient_noise --quick
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from agents.evaluate import make_vector
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from agents.models import load_model
from agents.policies import TransformersPolicy, collect
from agents.tasks import TaskDeck
from allocation import HiddenStatePredictor, TreeAllocationWrapper, make_allocator
from benchmarks import config_of, results_folder


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        model: Model to draw from.
        allocator: Where rollouts go.
        estimator: Advantages.
        batches: Batches to compare.
        warmup: Batches before them, from which the predictor learns.
        budget: Rollouts in a batch.
        seed: Seeds everything random.
        quick: Four batches only.
        output: Directory of the results.
    """

    model: str = "tiny"
    allocator: str = "trace"
    estimator: str = "tree"
    batches: int = 16
    warmup: int = 3
    budget: int = 128
    seed: int = 0
    quick: bool = False
    output: Path = Path("results")


def mean_cosine(gradients: torch.Tensor) -> float:
    """Returns the mean cosine over pairs of rows."""
    unit = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(1e-12)
    n = len(unit)
    return float(((unit @ unit.T).sum() - n) / (n * (n - 1)))


def main(args: Args) -> None:
    """Runs the benchmark."""
    model, tokenizer = load_model(args.model)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=48, seed=args.seed)
    envs = make_vector("TraceMultiHopQA-v0", args.budget, {"top_k": 2, "system_prompt": "", "split": "train"})
    predictor = HiddenStatePredictor(int(model.config.hidden_size), seed=args.seed)
    allocator = make_allocator(args.allocator, predictor=predictor)
    wrapper = TreeAllocationWrapper(
        envs,
        allocator=allocator,
        budget=args.budget,
        roots=TaskDeck(envs.envs[0].unwrapped.task_ids()),  # type: ignore[attr-defined]
        encode=policy.encode,
    )
    learner = Learner(model, LearnerConfig(estimator=args.estimator, max_grad_norm=float("inf")), updates=1)
    # A step of size 0 leaves the weights and the gradient where they are.
    learner.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    names = [name for name, _ in model.named_parameters()]
    rows: list[list[torch.Tensor]] = []
    for number in range(args.warmup + (4 if args.quick else args.batches)):
        forest = collect(wrapper, policy, seed=args.seed + number)
        allocator.update(forest)
        if number >= args.warmup:
            learner.update(forest)
            rows.append([p.grad.flatten().clone() for p in model.parameters()])
    groups: dict[str, list[int]] = {"all": list(range(len(names)))}
    for i, name in enumerate(names):
        parts = name.split(".")
        groups.setdefault(parts[-2] if "layers" in parts else name.removesuffix(".weight"), []).append(i)
    table = Table("weights", "number", "cosine of two batches", title=f"{len(rows)} batches of {args.budget} rollouts")
    args = replace(args, output=results_folder(args.output, args.quick))
    with (args.output / "gradient_noise.jsonl").open("w") as file:
        for group, members in groups.items():
            stacked = torch.stack([torch.cat([row[i] for i in members]) for row in rows])
            cosine = mean_cosine(stacked)
            table.add_row(group, f"{stacked.shape[1]:,}", f"{cosine:.3f}")
            config = config_of(args)
            record = {
                "group": group,
                "weights": stacked.shape[1],
                "cosine": cosine,
                "batches": len(rows),
                "config": config,
            }
            file.write(json.dumps(record | {"torch": torch.__version__}) + "\n")
    Console().print(table)
    envs.close()


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.gradient_noise"))
    sys.exit(0)
