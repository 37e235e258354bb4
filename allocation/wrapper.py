"""`TreeAllocationWrapper`: a vector of environments whose free slots go where the allocator sends them.

Invariant: one `step` of the wrapper is one step of every active slot; a finished slot is not reset but restored to the next
anchor, and what was finished is in the forest.

Candidate prompts are opened by resetting the environment of the first slot, one after the other; the slots then start from
the snapshots taken there, so the other environments of the vector are never reset.

To an agent it is an ordinary Gymnasium vector environment with autoreset in the same step: the observation returned for a
finished slot is the one of its next rollout, the last one is in `info["final_obs"]`. The loop ends when no slot is active.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

import trace_envs
from allocation.allocators import Allocator, make_allocator
from allocation.predictor import Predictor
from allocation.scheduler import Job, Scheduler
from allocation.tree import Forest, Node, Sample, Tree

MAX_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Root:
    """How to start an episode on one prompt: the arguments of `reset`."""

    seed: int
    options: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What a policy is asked to act on.

    Attributes:
        slot: Slot of the vector; a policy may keep caches by slot.
        tree: The prompt's tree so far.
        node: The prefix to act from; `tree.path(node)` leads to it from the root.
        observation: The environment's last observation.
        info: The environment's last info (`messages`, `tools`, ... for the environments of this package).
    """

    slot: int
    tree: Tree
    node: Node
    observation: Any
    info: dict[str, Any]


@dataclass(slots=True)
class _Slot:
    job: Job
    node: Node
    observation: Any
    info: dict[str, Any]


def random_seeds(rng: np.random.Generator, count: int) -> list[Root]:
    """The default source of prompts: a seed each, which for any environment is a way to start an episode."""
    return [Root(int(s)) for s in rng.integers(MAX_SEED, size=count)]


def default_success(total_reward: float, info: dict[str, Any]) -> bool:
    """The environment's own verdict.

    Raises:
        ValueError: The environment gives none.
    """
    if "is_correct" not in info:
        raise ValueError(
            "the environment gives no info['is_correct'] at the end of an episode; pass "
            "success=lambda total_reward, info: ... to TreeAllocationWrapper"
        )
    return bool(info["is_correct"])


class TreeAllocationWrapper(VectorEnv):
    """Collects a forest of rollouts under a budget.

    Args:
        envs: A vector made by `gym.make_vec(..., vectorization_mode="sync")`, or an environment for a vector of one.
        allocator: An allocator, or the name of one (`allocation.allocators.ALLOCATORS`).
        predictor: For an allocator given by name.
        budget: Rollouts in a forest, root rollouts and continuations together.
        roots: Source of candidate prompts: called with a generator and a number, returns that many `Root`s.
        encode: Called with the candidates' contexts before the root stage; returns their hidden states, float32 [n, d], and
            the number of tokens that were computed for them, which the ledger counts as prefilled.
            `None` leaves the predictor without features at roots until an action was sampled there.
        success: Called with the episode's return and last info; says whether it succeeded.
        keep_snapshots: Keep every node's snapshot and info after its tree is finished, to branch from it by hand.
    """

    def __init__(
        self,
        envs: VectorEnv | gym.Env,
        *,
        allocator: Allocator | str = "trace",
        predictor: Predictor | None = None,
        budget: int = 64,
        roots: Callable[[np.random.Generator, int], Sequence[Root]] = random_seeds,
        encode: Callable[[Sequence[Context]], tuple[np.ndarray, int]] | None = None,
        success: Callable[[float, dict[str, Any]], bool] = default_success,
        keep_snapshots: bool = False,
    ):
        if isinstance(envs, gym.Env):
            self._envs: Sequence[gym.Env] = [envs]
            self.spec = envs.spec
        elif isinstance(envs, SyncVectorEnv):
            self._envs = envs.envs
            self.spec = envs.spec
        else:
            raise TypeError(
                f"expected a SyncVectorEnv or a single environment, got {type(envs).__name__}; make it with "
                f'gym.make_vec(..., vectorization_mode="sync")'
            )
        if budget < 1:
            raise ValueError(f"budget must be at least 1 rollout, got {budget}")
        self.envs = envs
        self.num_envs = len(self._envs)
        self.single_observation_space = self._envs[0].observation_space
        self.single_action_space = self._envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        # What an idle slot shows.
        blank: Any = create_empty_array(self.single_observation_space, n=1)
        self._placeholder = next(iter(iterate(batch_space(self.single_observation_space, 1), blank)))
        self.metadata = {**envs.metadata, "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        self.allocator = make_allocator(allocator, predictor=predictor) if isinstance(allocator, str) else allocator
        self.budget = budget
        self.forest = Forest()
        self._sources = roots
        self._encode = encode
        self._success = success
        self._keep_snapshots = keep_snapshots
        self._slots: list[_Slot | None] = [None] * self.num_envs
        self._scheduler: Scheduler | None = None
        self._rng = np.random.default_rng()

    @property
    def active(self) -> np.ndarray:
        """Which slots have work, bool [num_envs]."""
        return np.array([slot is not None for slot in self._slots])

    def contexts(self) -> list[Context]:
        """Returns what a policy has to act on, one context for each active slot."""
        return [
            Context(i, slot.job.tree, slot.node, slot.observation, slot.info)
            for i, slot in enumerate(self._slots)
            if slot is not None
        ]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts a new forest: draws candidates, runs the root stage, and fills the slots.

        Args:
            seed: Seeds the choice of candidates, the allocation's ties and the environments' randomness. Without it the
                generator goes on where the last forest left it.
            options: `{"roots": [Root, ...]}` names the candidates instead of drawing them.

        Returns:
            The batch of observations and the info of a vector environment.
        """
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self.forest = Forest()
        ledger = self.forest.ledger
        root_budget = self.allocator.root_budget(self.budget)
        given = (options or {}).get("roots")
        candidates = (
            list(given) if given is not None else list(self._sources(self._rng, self.allocator.pool_size(self.budget)))
        )
        if not candidates:
            raise ValueError("no candidate prompt: the source of roots returned an empty list")
        trees, contexts = [], []
        for root in candidates:
            tree, context = self._open(root)
            trees.append(tree)
            contexts.append(context)
        if self._encode is not None:
            with ledger.timed("encode"):
                hidden, computed = self._encode(contexts)
            ledger.prefilled_tokens += computed
            for tree, features in zip(trees, hidden, strict=True):
                tree.root.features = features
        with ledger.timed("allocate"):
            counts = np.asarray(self.allocator.allocate_roots(trees, root_budget, self._rng))
        chosen = [(tree, int(m)) for tree, m in zip(trees, counts, strict=True) if m > 0]
        for index, (tree, _) in enumerate(chosen):
            tree.index = index
            self.forest.trees.append(tree)
        rest = self.budget - root_budget
        self._scheduler = Scheduler(self.allocator, self.forest, [m for _, m in chosen], rest, self._rng)
        self._slots = [None] * self.num_envs
        for i in range(self.num_envs):
            self._assign(i)
        return self._observations(), self._infos({})

    def step(  # type: ignore[override]
        self, actions: Sequence[Any], samples: Sequence[Sample | None] | None = None
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps every active slot; actions of idle slots are ignored.

        Args:
            actions: One action for each slot.
            samples: The actions as sampled, with token ids and log-probs, for a policy that will learn from them.

        Returns:
            Observations, rewards float64 [n], terminated bool [n], truncated bool [n], infos.
        """
        if self._scheduler is None:
            raise RuntimeError("call reset() before step()")
        if len(actions) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} actions, one for each slot, got {len(actions)}")
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        final: dict[int, tuple[Any, dict[str, Any]]] = {}
        for i, slot in enumerate(self._slots):
            if slot is None:
                continue
            sample = samples[i] if samples is not None else None
            observation, rewards[i], terminated[i], truncated[i], info = self._envs[i].step(actions[i])
            self._record(slot, i, actions[i], sample, observation, float(rewards[i]), terminated[i], truncated[i], info)
            if terminated[i] or truncated[i]:
                final[i] = (observation, info)
                self._finish(slot)
                self._slots[i] = None
        # Freed slots are filled after every slot has stepped, so that who gets which job does not depend on slot order.
        for i in range(self.num_envs):
            if self._slots[i] is None:
                self._assign(i)
        return self._observations(), rewards, terminated, truncated, self._infos(final)

    def close(self, **kwargs: Any) -> None:
        """Closes the environments."""
        self.envs.close(**kwargs)

    def _open(self, root: Root) -> tuple[Tree, Context]:
        env = self._envs[0]
        observation, info = env.reset(seed=root.seed, options=root.options)
        task = getattr(getattr(env.unwrapped, "state", None), "task", None)
        known = {"seed": root.seed}
        limit = getattr(env.unwrapped, "max_turns", None) or getattr(env.spec, "max_episode_steps", None)
        if limit is not None:
            known["max_turns"] = int(limit)
        known |= {name: getattr(task, name) for name in ("hops", "kind") if hasattr(task, name)}
        tree = Tree(str(info.get("task_id", root.seed)), -1, observation, known)
        tree.root.snapshot, tree.root.info = trace_envs.snapshot(env), info
        return tree, Context(0, tree, tree.root, observation, info)

    def _assign(self, i: int) -> None:
        assert self._scheduler is not None
        job = self._scheduler.next()
        if job is None:
            return
        ledger = self.forest.ledger
        env = self._envs[i]
        with ledger.timed("restore"):
            trace_envs.restore(env, job.node.snapshot, seed=int(self._rng.integers(MAX_SEED)))
        ledger.restores += 1
        if job.origin == "root":
            ledger.root_rollouts += 1
        else:
            ledger.continuations += 1
        self._slots[i] = _Slot(job, job.node, job.node.observation, job.node.info or {})

    def _record(
        self,
        slot: _Slot,
        i: int,
        action: Any,
        sample: Sample | None,
        observation: Any,
        reward: float,
        terminated: bool,
        truncated: bool,
        info: dict[str, Any],
    ) -> None:
        tree, parent, ledger = slot.job.tree, slot.node, self.forest.ledger
        over = bool(terminated or truncated)
        ledger.environment_turns += 1
        ledger.tool_calls += int(info.get("tool_calls", 0)) - int(slot.info.get("tool_calls", 0))
        if sample is not None:
            if parent.context_ids is None:
                parent.context_ids, parent.features = sample.context_ids, sample.features
            ledger.generated_tokens += len(sample.action_ids)
            ledger.prefilled_tokens += sample.prefilled
            if len(sample.action_ids) or sample.prefilled:  # neither: the context did not fit, so nothing was reused
                ledger.cached_tokens += sum(n.num_tokens for n in tree.path(parent)) - sample.prefilled
        node = tree.add(
            parent,
            slot.job.rollout,
            slot.job.origin,
            action=action if isinstance(action, str) else repr(action),
            observation=observation,
            sample=sample,
            snapshot=None if over else trace_envs.snapshot(self._envs[i]),
            info=None if over else info,
            reward=reward,
            terminated=bool(terminated),
            truncated=bool(truncated),
            tool_errors=int(info.get("tool_errors", 0)),
            tool_error=bool(info.get("tool_error", False)),
        )
        if over:
            total = sum(n.reward for n in tree.path(node))
            node.is_correct = self._success(total, info)
            node.components = info.get("reward_components")
        slot.node, slot.observation, slot.info = node, observation, info

    def _finish(self, slot: _Slot) -> None:
        assert self._scheduler is not None
        with self.forest.ledger.timed("allocate"):
            self._scheduler.finished(slot.job)
        if slot.job.tree.finished and not self._keep_snapshots:
            slot.job.tree.drop_snapshots()

    def _observations(self) -> Any:
        space: Any = self.single_observation_space
        items = [slot.observation if slot is not None else self._placeholder for slot in self._slots]
        batch: Any = create_empty_array(space, n=self.num_envs)
        return concatenate(space, items, batch)

    def _infos(self, final: dict[int, tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for i, slot in enumerate(self._slots):
            if slot is None and i not in final:
                continue
            info: dict[str, Any] = dict(slot.info) if slot is not None else {}
            if slot is not None:
                node = slot.node
                info["trace"] = {
                    "tree": slot.job.tree.index,
                    "node_id": node.id,
                    "parent_id": -1 if node.parent is None else node.parent,
                    "depth": node.depth,
                    "rollout": slot.job.rollout,
                    "is_continuation": slot.job.origin == "continuation",
                }
            if i in final:
                info["final_obs"], info["final_info"] = final[i]
            infos = self._add_info(infos, info, i)
        return infos
