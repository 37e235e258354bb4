"""Trees of rollouts as what TRL's `GRPOTrainer(rollout_func=...)` returns.

Invariant: for each prompt that the trainer names there is one row, in its order; the rows of one group are the ends of one
tree, and every row's tokens are those that were sampled and shown, id for id.

Checked against TRL 1.16, `trl/trainer/grpo_trainer.py`: `GRPOTrainer._generate` hands over the prompts of the batch, each as
often as this process is to sample it, and takes the dictionary of `allocation.export.to_trl`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from agents.evaluate import make_vector
from agents.policies.base import collect
from agents.policies.transformers_policy import TransformersPolicy
from agents.trl.environments import task_prompts
from allocation import Forest, Root, TreeAllocationWrapper, make_allocator
from allocation.export.rows import RolloutRecord
from allocation.export.trl import to_trl
from allocation.methods.base import Allocator
from allocation.roots import IntArray
from trace_envs.messages import encodable

GROUPED = ("grpo", "treepo", "tree_grpo", "arpo")
"""Methods that sample every prompt equally often, as TRL's groups want it."""

Prompt = Sequence[Mapping[str, Any]]
Rollouts = Callable[[Sequence[Prompt], Any], dict[str, Any]]


def rollout_func(
    env_id: str,
    *,
    allocator: str = "tree_grpo",
    num_envs: int = 64,
    max_new_tokens: int = 64,
    max_context: int | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    done: Callable[[Forest], None] | None = None,
    **env_kwargs: Any,
) -> Rollouts:
    """Returns what `GRPOTrainer(rollout_func=...)` takes: it samples trees from the trainer's model, as it is at the moment.

    Each group of `num_generations` rollouts is one tree with that many ends. Temperature, `top_p`, `top_k` and the arguments of
    the chat template are the trainer's. Rewards go with the rows, for `environment_reward`.

    Args:
        env_id: Registered id of the environment; the trainer's data are rows of `trl_dataset(env_id, **env_kwargs)`.
        allocator: How a tree grows: one of `GROUPED` (`grpo` for no tree at all).
        num_envs: Environments that run side by side.
        max_new_tokens: Token limit of one turn; TRL's `max_completion_length` is not looked at.
        max_context: Token limit of an episode, prompt, actions and observations together; `None` for what the model can take.
        stop: Strings that end an action.
        seed: Seeds sampling and environments, each process of a trainer in its own way.
        done: Called with each forest.
        **env_kwargs: The environment's arguments.

    Raises:
        ValueError: The allocator has groups of no fixed size, or the environment's id or an argument is unknown.
    """
    if allocator not in GROUPED:
        raise ValueError(
            f"TRL wants equally many rollouts of every prompt, which allocator {allocator!r} does not give; "
            f"use one of {', '.join(GROUPED)}, or train with trace-envs train"
        )
    sampling = {"max_new_tokens": max_new_tokens, "max_context": max_context, "stop": stop}
    return _TreeRollouts(env_id, env_kwargs, allocator, num_envs, sampling, seed, done)


class _TreeRollouts:
    """A trainer's source of rollouts; see `rollout_func`."""

    def __init__(
        self,
        env_id: str,
        env_kwargs: dict[str, Any],
        allocator: str,
        num_envs: int,
        sampling: dict[str, Any],
        seed: int,
        done: Callable[[Forest], None] | None,
    ):
        self._task_ids = _by_prompt(task_prompts(env_id, None, env_kwargs))
        self._envs = make_vector(env_id, num_envs, env_kwargs)
        self._env_id, self._allocator, self._sampling, self._seed, self._done = env_id, allocator, sampling, seed, done
        self._policy: TransformersPolicy | None = None
        self._rng: np.random.Generator | None = None

    def __call__(self, prompts: Sequence[Prompt], trainer: Any) -> dict[str, Any]:
        """Returns a row for each prompt.

        Args:
            prompts: Conversations that wait for their first answer, those of one group side by side.
            trainer: The `GRPOTrainer`.

        Raises:
            ValueError: A prompt is of no task of the environment or of several, or the trainer's settings cannot be followed.
        """
        policy = self._policy_of(trainer)
        rng = self._rng = self._rng or np.random.default_rng([self._seed, trainer.accelerator.process_index])
        group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        groups = list(self._groups(prompts, group))
        tasks = defaultdict(list)  # by size: a process may have part of a group only
        for number, (task_id, size) in enumerate(groups):
            tasks[size].append((number, task_id))
        records: dict[int, list[RolloutRecord]] = {}
        for size, wanted in tasks.items():
            roots = [Root(int(rng.integers(2**31)), {"task_id": task_id}) for _, task_id in wanted]
            forest = self._collect(policy, roots, size, int(rng.integers(2**31)))
            of_tree = itertools.groupby(forest.rollouts(), key=lambda record: record.tree)
            records |= {number: list(ends) for (number, _), (_, ends) in zip(wanted, of_tree, strict=True)}
        rows = [record for number in range(len(groups)) for record in records[number]]
        return to_trl(rows, pad_token_id=trainer.processing_class.pad_token_id)

    def _collect(self, policy: TransformersPolicy, roots: list[Root], size: int, seed: int) -> Forest:
        allocator = _EqualTrees(make_allocator(self._allocator, group_size=size), size)
        envs = TreeAllocationWrapper(self._envs, allocator=allocator, budget=size * len(roots))
        forest = collect(envs, policy, seed=seed, roots=roots)
        if self._done is not None:
            self._done(forest)
        return forest

    def _groups(self, prompts: Sequence[Prompt], most: int) -> Iterable[tuple[str, int]]:
        """Yields the task of each group and how many of its rollouts are wanted here."""
        for prompt, same in itertools.groupby(map(_words, prompts)):
            task_ids, count = self._task_ids.get(prompt, ()), len(list(same))
            if not task_ids:
                raise ValueError(
                    f"no task of {self._env_id!r} has the prompt {prompt[-1][1]!r:.80}: make the trainer's data with "
                    "trl_dataset and the same arguments as rollout_func"
                )
            if len(task_ids) > 1:
                raise ValueError(
                    f"tasks {task_ids[0]!r} and {task_ids[1]!r} of {self._env_id!r} are asked in the same words, and TRL hands "
                    "over nothing else: leave them out of the trainer's data by trl_dataset(task_ids=...)"
                )
            for start in range(0, count, most):
                yield task_ids[0], min(most, count - start)

    def _policy_of(self, trainer: Any) -> TransformersPolicy:
        """Returns a policy on the trainer's model that knows nothing of earlier weights."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._policy is None or self._policy.model is not model:
            self._policy = self._make_policy(model, trainer)
        self._policy.sync(model, trainer.state.global_step)
        return self._policy

    def _make_policy(self, model: Any, trainer: Any) -> TransformersPolicy:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "rollout_func samples from a model that is whole in each process, which FSDP and DeepSpeed do not keep: train "
                "without them, or use environment_factory"
            )
        for name, neutral in (("min_p", (None, 0.0)), ("repetition_penalty", (None, 1.0))):
            if (value := getattr(trainer, name)) not in neutral:
                raise ValueError(f"rollout_func does not know {name}, got {value}; leave it out of GRPOConfig")
        return TransformersPolicy(
            model,
            trainer.processing_class,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k or 0,
            seed=int(np.random.default_rng([self._seed, trainer.accelerator.process_index, 1]).integers(2**31)),
            entropy=make_allocator(self._allocator).uses_entropy,
            template_kwargs=trainer.chat_template_kwargs or None,
            **self._sampling,
        )


class _EqualTrees(Allocator):
    """A method, with as many rollouts in each tree, also where its share of root rollouts does not go up evenly.

    Args:
        method: Decides everything else.
        size: Rollouts of a tree.
    """

    def __init__(self, method: Allocator, size: int):
        self.method, self.size = method, size
        self.name, self.uses_entropy = method.name, method.uses_entropy

    def pool_size(self, budget: int) -> int:
        """See the method."""
        return self.method.pool_size(budget)

    def root_budget(self, budget: int) -> int:
        """See the method."""
        return self.method.root_budget(budget)

    def prefix_budgets(self, root_counts: IntArray, total: int, rng: np.random.Generator) -> IntArray:
        """What each tree lacks."""
        return self.size - root_counts

    def allocate_prefixes(
        self, tree: Any, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """See the method."""
        return self.method.allocate_prefixes(tree, budget, rng, wave)


def _by_prompt(prompts: Mapping[str, Prompt]) -> dict[tuple[tuple[str, str], ...], list[str]]:
    found = defaultdict(list)
    for task_id, prompt in prompts.items():
        found[_words(prompt)].append(task_id)
    return dict(found)


def _words(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], encodable(m["content"])) for m in prompt)
