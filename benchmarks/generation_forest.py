"""The forests that `benchmarks.generation` lets engines sample, and what was asked of an engine turn by turn.

Invariant: the same seed asks for the same rollouts of the same questions; which tokens come is the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.evaluate import make_vector
from agents.models import env_settings
from agents.policies import Policy, collect
from agents.policies.paths import path_ids
from allocation import Context, Forest, Root, Sample, TreeAllocationWrapper, make_allocator
from benchmarks import data_folder

ENV_ID = "TraceMultiHopQA-v0"
DATA = data_folder()


@dataclass(frozen=True)
class Workload:
    """A forest to sample.

    Attributes:
        name: What it is called in the tables.
        method: Allocator, by name.
        data: `synthetic`, or the name of a real data set.
        prompts: Questions.
        rollouts: Rollouts, root rollouts and continuations together.
        max_new_tokens: Token limit of a turn.
    """

    name: str
    method: str
    data: str = "synthetic"
    prompts: int = 16
    rollouts: int = 128
    max_new_tokens: int = 48


WORKLOADS = {
    w.name: w
    for w in (
        Workload("groups", "grpo"),
        Workload("trees", "tree_grpo"),
        Workload("hotpotqa", "tree_grpo", "hotpotqa", prompts=4, rollouts=16),
    )
}
"""`groups`: eight rollouts of each prompt. `trees`: fewer, and continuations from their turns. `hotpotqa`: real questions."""


@dataclass
class Asked:
    """A policy that passes everything on and remembers what it was asked.

    Attributes:
        policy: It answers.
        calls: By call, the ids of each prefix from the start of the prompt, int64 [n].
        seconds: Time spent in the policy.
    """

    policy: Any
    calls: list[list[np.ndarray]] = field(default_factory=list)
    seconds: float = 0.0

    def act(self, contexts: Sequence[Context]) -> list[Sample]:
        """Acts, and times it."""
        start = time.perf_counter()
        samples = self.policy.act(contexts)
        self.seconds += time.perf_counter() - start
        self.calls.append([path_ids(c, s.context_ids) for c, s in zip(contexts, samples, strict=True)])
        return samples


def settings_of(data: str) -> dict[str, Any]:
    """Returns the arguments of the environment for a data set.

    Raises:
        FileNotFoundError: The files of a real one are not there.
    """
    if data == "synthetic":
        return {"split": "train"}
    path, corpus = DATA / data / f"{data}_train.json", DATA / data / f"{data}_train_corpus.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; set TRACE_DATA_DIR to the folder with the real data")
    return {"dataset": data, "data_path": str(path), "corpus_path": str(corpus)}


def sample_forest(policy: Policy, workload: Workload, seed: int) -> Forest:
    """Lets a policy sample a workload's forest."""
    kwargs = {**env_settings("tiny", ENV_ID), **settings_of(workload.data)}
    with closing(make_vector(ENV_ID, workload.rollouts, kwargs)) as envs:
        tasks = list(envs.envs[0].unwrapped.task_ids())  # type: ignore[attr-defined]
        order = np.random.default_rng(seed).permutation(len(tasks))[: workload.prompts]
        roots = [Root(seed + int(i), {"task_id": tasks[int(i)]}) for i in order]
        group = workload.rollouts // workload.prompts
        wrapper = TreeAllocationWrapper(
            envs, allocator=make_allocator(workload.method, group_size=group), budget=workload.rollouts
        )
        return collect(wrapper, policy, seed=seed, roots=roots)


def unique_tokens(forest: Forest) -> int:
    """Returns the different tokens of a forest: what was shown and sampled, what rollouts share counted once.

    What was shown where no action followed (it did not fit into the model) is not counted: no engine computes it.
    """
    total = 0
    for tree in forest:
        for node in tree.nodes:
            total += 0 if node.sample is None else len(node.sample.action_ids)
            followed = any((s := tree.nodes[child].sample) is not None and s.acted for child in node.children)
            total += len(node.context_ids) if followed and node.context_ids is not None else 0
    return total
