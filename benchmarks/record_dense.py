"""Records a dense forest: many rollouts of a few prompts from one policy, for the arena to replay allocators on.

For each prompt, root rollouts (spines), continuations at every inner prefix of each of them, and reference rollouts from which
the true policy gradient is estimated; for each recorded turn the gradient of its log-probability, as a sketch. That takes about
twenty minutes for the shipped sizes on one core. The assets in `benchmarks/assets/dense` were made like this:

    python -m benchmarks.record_dense --label "warm start" --output benchmarks/assets/dense/multihop_warm.npz
    trace-envs train --name base --allocator trace_plus --checkpoint-every 20 --keep-checkpoints 20
    python -m benchmarks.record_dense --model runs/base/checkpoints/update-000040 --label "40 updates" \
        --output benchmarks/assets/dense/multihop_u40.npz
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.progress import Progress

from agents.evaluate import make_vector
from agents.models import ENV_SETTINGS, load_model
from agents.policies import TransformersPolicy, collect
from allocation import Forest, Root, Tree, TreeAllocationWrapper, UniformAllocator
from allocation.arena.dense import DenseForest
from allocation.methods.base import Allocator
from benchmarks import config_of
from benchmarks.dense_scores import CountSketch, Reference, Scorer, path_ids


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        output: File to write.
        model: Policy: `tiny`, or a folder in transformers' format.
        label: What the record says of it.
        env_id: Environment; its policy is asked as the shipped tiny agent is.
        split: Where the prompts come from.
        prompts: Prompts, drawn at random from the split's own mix.
        spines: Root rollouts of each.
        continuations: Continuations from each inner prefix of each spine.
        reference: Further root rollouts of each prompt, for the true gradient.
        sketch: Buckets of a score's sketch.
        features: Principal components that are kept of the hidden states.
        together: Prompts that are collected at a time.
        seed: Seeds everything random.
        quick: A very small record.
    """

    output: Path
    model: str = "tiny"
    label: str = ""
    env_id: str = "TraceMultiHopQA-v0"
    split: str = "train"
    prompts: int = 64
    spines: int = 16
    continuations: int = 4
    reference: int = 192
    sketch: int = 64
    features: int = 24
    together: int = 16
    seed: int = 1
    quick: bool = False


class Everywhere(Allocator):
    """The same number of root rollouts at every prompt, and of continuations at every inner prefix of each.

    Args:
        prompts: Number of prompts.
        spines: Root rollouts.
        continuations: Continuations.
    """

    name = "everywhere"
    most_turns = 64

    def __init__(self, prompts: int, spines: int, continuations: int):
        self.prompts, self.spines, self.continuations = prompts, spines, continuations

    @property
    def budget(self) -> int:
        """Rollouts that are enough for it; most stay unspent."""
        return self.prompts * self.spines * (1 + self.continuations * self.most_turns)

    def pool_size(self, budget: int) -> int:
        """All prompts."""
        return self.prompts

    def root_budget(self, budget: int) -> int:
        """All spines."""
        return self.prompts * self.spines

    def allocate_prefixes(
        self, tree: Tree, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """The same at every inner prefix, once."""
        if wave or not self.continuations:
            return []
        return [(n.id, self.continuations) for n in tree.nodes if n.depth and not n.terminal]

    def max_rollouts(self, tree: Tree) -> int:
        """No more root rollouts in the place of continuations."""
        return self.spines


class Recorder:
    """Turns trees into rows of a record.

    Args:
        scorer: For the scores of edges.
        gradient: The true gradient, float32 [size].
        sketch: For the sketches of scores.
    """

    def __init__(self, scorer: Scorer, gradient: torch.Tensor, sketch: CountSketch):
        self._scorer, self._gradient, self._sketch = scorer, gradient, sketch
        self._rows: dict[tuple[int, int, bytes], int] = {}
        self.nodes: list[tuple[Any, ...]] = []
        self.features: list[np.ndarray | None] = []
        self.edges: list[tuple[float, float, float]] = []
        self.sketches: list[np.ndarray] = []

    def add(self, prompt: int, tree: Tree) -> None:
        """Adds a finished tree."""
        tree.sort()
        # The tree's root is not a node of the record, and its number is 0.
        before = len(self.nodes) - 1
        for node in tree.nodes[1:]:
            assert node.parent is not None
            tokens = 0 if node.sample is None else len(node.sample.action_ids)
            self.nodes.append(
                (
                    prompt,
                    before + node.parent if node.parent else -1,
                    node.rollout,
                    node.origin == "continuation",
                    node.terminated,
                    node.truncated,
                    bool(node.is_correct),
                    node.tool_error,
                    node.reward,
                    tokens,
                    0 if node.context_ids is None else len(node.context_ids),
                    self._row(prompt, tree, node) if tokens else -1,
                )
            )
            self.features.append(None if node.terminal else node.features)

    def _row(self, prompt: int, tree: Tree, node: Any) -> int:
        ids, positions = path_ids(tree, node)
        key = (prompt, len(positions[-1]), ids.tobytes())
        if key not in self._rows:
            score, entropy = self._scorer.score(ids, positions[-1])
            self._rows[key] = len(self.edges)
            self.edges.append((float(score @ self._gradient), float(score @ score), entropy))
            self.sketches.append(self._sketch(score).numpy())
        return self._rows[key]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what was recorded of nodes and edges, as `DenseForest` has it, features apart."""
        names = (
            "prompt parent rollout continuation terminated truncated is_correct tool_error reward action_tokens "
            "context_tokens edge_row"
        )
        kinds = "int16 int32 int32 bool bool bool bool bool float32 int16 int16 int32"
        columns = zip(names.split(), kinds.split(), zip(*self.nodes, strict=True), strict=True)
        arrays = {name: np.array(column, dtype=kind) for name, kind, column in columns}
        sketches = np.array(self.sketches)
        scale = np.maximum(np.abs(sketches).max(axis=1), 1e-30) / 127
        dot, norm2, entropy = np.array(self.edges, dtype=np.float32).T.copy()
        return arrays | {
            "dot": dot,
            "norm2": norm2,
            "entropy": entropy.astype(np.float16),
            "sketch": np.round(sketches / scale[:, None]).astype(np.int8),
            "sketch_scale": scale.astype(np.float32),
        }


def reduce(
    roots: Sequence[np.ndarray], inner: Sequence[np.ndarray | None], components: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns principal components of hidden states, each with unit variance at the first, and the share they explain.

    Args:
        roots: Of the prompts.
        inner: Of the nodes; `None` for terminals, which get zeros.
        components: How many; no more than there are dimensions.
    """
    known = np.array([i for i, x in enumerate(inner) if x is not None], dtype=np.int64)
    x = np.stack([*roots, *(inner[i] for i in known)]).astype(np.float64)
    mean = x.mean(axis=0)
    _, size, directions = np.linalg.svd(x - mean, full_matrices=False)
    components = min(components, len(directions))
    projected = (x - mean) @ directions[:components].T / max(float(size[0]) / np.sqrt(len(x)), 1e-12)
    nodes = np.zeros((len(inner), components), dtype=np.float16)
    nodes[known] = projected[len(roots) :]
    explained = float((size[:components] ** 2).sum() / max(float((size**2).sum()), 1e-300))
    return projected[: len(roots)].astype(np.float16), nodes, explained


def record(args: Args) -> DenseForest:
    """Collects, scores and returns a record."""
    if args.quick:
        args = Args(args.output, args.model, args.label, args.env_id, args.split, 3, 4, 2, 8, 16, 4, 3, args.seed)
    model, tokenizer = load_model(args.model, dtype="float32")
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=48, seed=args.seed)
    kwargs = {**ENV_SETTINGS["tiny"].get(args.env_id, {}), "split": args.split}
    rng = np.random.default_rng([args.seed, 77])
    with closing(make_vector(args.env_id, 128, kwargs)) as envs, Progress() as progress:
        ids = envs.envs[0].unwrapped.task_ids()  # type: ignore[attr-defined]
        roots = [Root(int(rng.integers(2**31)), {"task_id": ids[i]}) for i in rng.permutation(len(ids))[: args.prompts]]
        scorer = Scorer(model)
        reference = Reference(scorer, len(roots))
        bar = progress.add_task("reference rollouts", total=len(roots))
        counts: list[tuple[int, int]] = []
        for tree in trees_of(envs, policy, roots, args, UniformAllocator(args.reference), args.reference, 1000):
            counts.append(reference.add(tree))
            progress.advance(bar)
        recorder = Recorder(scorer, reference.gradient(), CountSketch(scorer.size, args.sketch, args.seed))
        bar = progress.add_task("spines and continuations", total=len(roots))
        known: list[tuple[int, int, np.ndarray]] = []
        for prompt, tree in enumerate(trees_of(envs, policy, roots, args, None, 0, 5000)):
            recorder.add(prompt, tree)
            root = tree.root
            assert root.context_ids is not None and root.features is not None
            known.append((int(tree.info.get("level", 0)), len(root.context_ids), root.features))
            progress.advance(bar)
    root_features, features, explained = reduce([k[2] for k in known], recorder.features, args.features)
    meta = {
        "family": args.env_id,
        "label": args.label,
        "env_kwargs": kwargs,
        "temperature": 1.0,
        "features_explained": explained,
        "config": {**config_of(args), "output": args.output.name, "model": Path(args.model).name},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "gymnasium")},
        "python": platform.python_version(),
        **reference.quality(),
    }
    return DenseForest(
        meta,
        keys=np.array([root.options["task_id"] for root in roots]),  # type: ignore[index]
        hops=np.array([k[0] for k in known], dtype=np.int16),
        prompt_tokens=np.array([k[1] for k in known], dtype=np.int16),
        reference_successes=np.array([s for s, _ in counts], dtype=np.int32),
        reference_count=np.array([n for _, n in counts], dtype=np.int32),
        root_features=root_features,
        features=features,
        **recorder.arrays(),
    )


def trees_of(
    envs: Any,
    policy: TransformersPolicy,
    roots: Sequence[Root],
    args: Args,
    allocator: Allocator | None,
    each: int,
    seed: int,
) -> Iterator[Tree]:
    """Yields the finished tree of each prompt, in order, and keeps no more than a few prompts' in memory."""
    for start in range(0, len(roots), args.together):
        part = roots[start : start + args.together]
        everywhere = Everywhere(len(part), args.spines, args.continuations)
        wrapper = TreeAllocationWrapper(
            envs,
            allocator=allocator or everywhere,
            budget=each * len(part) if allocator else everywhere.budget,
        )
        forest: Forest = collect(wrapper, policy, seed=args.seed + seed + start, roots=part)
        policy.reset_cache()
        by_key = {tree.key: tree for tree in forest}
        for root in part:
            yield by_key.pop(str(root.options["task_id"]))  # type: ignore[index]


def main(args: Args) -> None:
    """Runs the recording."""
    dense = record(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    dense.save(args.output)
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, {dense.num_prompts} prompts, {len(dense.parent)} turns, "
        f"{len(dense.dot)} different; reliability of the gradient {dense.meta['gradient_reliability']:.2f}; {dense.gate()}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.record_dense"))
