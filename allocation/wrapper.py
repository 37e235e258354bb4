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
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from allocation.allocators import Allocator, make_allocator
from allocation.collection import (
    Collection,
    Context,
    Encode,
    Rollout,
    Root,
    Success,
    default_success,
    random_seeds,
)
from allocation.predictor import Predictor
from allocation.tree import Forest, Sample
from trace_envs.slots import Result, make_slots


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
        encode: Encode | None = None,
        success: Success = default_success,
        keep_snapshots: bool = False,
    ):
        if budget < 1:
            raise ValueError(f"budget must be at least 1 rollout, got {budget}")
        self.slots = make_slots(envs)
        self.envs = envs
        self.spec = self.slots.spec
        self.num_envs = self.slots.num_slots
        self.single_observation_space = self.slots.observation_space
        self.single_action_space = self.slots.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        # What an idle slot shows.
        blank: Any = create_empty_array(self.single_observation_space, n=1)
        self._placeholder = next(iter(iterate(batch_space(self.single_observation_space, 1), blank)))
        self.metadata = {**self.slots.metadata, "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        self.allocator = make_allocator(allocator, predictor=predictor) if isinstance(allocator, str) else allocator
        self.budget = budget
        self.forest = Forest()
        self._sources = roots
        self._encode = encode
        self._success = success
        self._keep_snapshots = keep_snapshots
        self._rollouts: list[Rollout | None] = [None] * self.num_envs
        self._collection: Collection | None = None
        self._rng = np.random.default_rng()

    @property
    def active(self) -> np.ndarray:
        """Which slots have work, bool [num_envs]."""
        return np.array([rollout is not None for rollout in self._rollouts])

    def contexts(self) -> list[Context]:
        """Returns what a policy has to act on, one context for each active slot."""
        return [rollout.context for rollout in self._rollouts if rollout is not None]

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
        collection = Collection(
            self.slots,
            self.allocator,
            self.budget,
            self._rng,
            success=self._success,
            keep_snapshots=self._keep_snapshots,
        )
        given = (options or {}).get("roots")
        self.forest, self._collection = collection.forest, collection
        collection.open(
            list(given) if given is not None else list(self._sources(self._rng, self.allocator.pool_size(self.budget))),
            self._encode,
        )
        self._rollouts = [collection.next(i) for i in range(self.num_envs)]
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
        if self._collection is None:
            raise RuntimeError("call reset() before step()")
        if len(actions) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} actions, one for each slot, got {len(actions)}")
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        final: dict[int, Result] = {}
        active = [i for i, rollout in enumerate(self._rollouts) if rollout is not None]
        for i, result in self.slots.step({i: actions[i] for i in active}, active).items():
            _, rewards[i], terminated[i], truncated[i], _, _ = result
            rollout = self._rollouts[i]
            assert rollout is not None
            if self._collection.record(rollout, actions[i], samples[i] if samples is not None else None, result):
                final[i] = result
                self._rollouts[i] = None
        # Freed slots are filled after every slot has stepped, so that who gets which job does not depend on slot order.
        for i in range(self.num_envs):
            if self._rollouts[i] is None:
                self._rollouts[i] = self._collection.next(i)
        return self._observations(), rewards, terminated, truncated, self._infos(final)

    def close(self, **kwargs: Any) -> None:
        """Closes the environments."""
        self.slots.close()

    def _observations(self) -> Any:
        space: Any = self.single_observation_space
        items = [r.observation if r is not None else self._placeholder for r in self._rollouts]
        batch: Any = create_empty_array(space, n=self.num_envs)
        return concatenate(space, items, batch)

    def _infos(self, final: dict[int, Result]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for i, rollout in enumerate(self._rollouts):
            if rollout is None and i not in final:
                continue
            info: dict[str, Any] = dict(rollout.info) if rollout is not None else {}
            if rollout is not None:
                node = rollout.node
                info["trace"] = {
                    "tree": rollout.job.tree.index,
                    "node_id": node.id,
                    "parent_id": -1 if node.parent is None else node.parent,
                    "depth": node.depth,
                    "rollout": rollout.job.rollout,
                    "is_continuation": rollout.job.origin == "continuation",
                }
            if i in final:
                info["final_obs"], info["final_info"] = final[i].observation, final[i].info
            infos = self._add_info(infos, info, i)
        return infos
