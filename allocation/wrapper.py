"""`TreeAllocationWrapper`: a vector of environments whose free slots go where the allocator sends them.

Invariant: one `step` of the wrapper is one step of every active slot; a finished slot is not reset but restored to the next
anchor, and what was finished is in the forest.

Candidate prompts are opened by resetting the environment of the first slot, one after the other; the slots then start from
the snapshots taken there, so the other environments of the vector are never reset.

To an agent it is an ordinary Gymnasium vector environment with autoreset in the same step: the observation returned for a
finished slot is the one of its next rollout, the last one is in `info["final_obs"]`. The loop ends when no slot is active.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from allocation.allocators import make_allocator
from allocation.batching import batch_observations, placeholder, single_actions, value
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
from allocation.endings import end_without_action
from allocation.methods.base import Allocator
from allocation.positions import Positions
from allocation.predictor import Predictor
from allocation.sample import Sample
from allocation.tree import Forest
from trace_envs.slots import Result, Slots, make_slots
from trace_envs.snapshots.adapters.kinds import ATOMS


class TreeAllocationWrapper(VectorEnv):
    """Collects a forest of rollouts under a budget.

    Args:
        envs: A vector made by `gym.make_vec`, or an environment for a vector of one; see `trace_envs.slots.make_slots`.
        allocator: An allocator, or the name of one (`allocation.allocators.ALLOCATORS`).
        predictor: For an allocator given by name.
        budget: Rollouts in a forest, root rollouts and continuations together.
        roots: Source of candidate prompts: called with a generator and a number, returns that many `Root`s.
        encode: Called with the candidates' contexts before the root stage; returns their hidden states, float32 [n, d], and
            the number of tokens that were computed for them, which the ledger counts as prefilled.
            `None` leaves the predictor without features at roots until an action was sampled there.
        success: Called with the episode's return and last info; says whether it succeeded.
        keep_snapshots: Take a snapshot at every node that is not a terminal, and keep it and the info after the tree is
            finished, to branch from it by hand. Otherwise there is one only where a branch may still begin.

    Attributes:
        forest: What has been collected since the last `reset`; it stays when an environment raises.
    """

    closed = True  # until there is something to close

    def __init__(
        self,
        envs: VectorEnv | gym.Env | Slots,
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
        self.allocator = make_allocator(allocator, predictor=predictor) if isinstance(allocator, str) else allocator
        self.allocator.check(budget)
        self.slots = make_slots(envs)
        self.closed = False
        self.envs = envs
        self.spec = self.slots.spec
        self.num_envs = self.slots.num_slots
        self.single_observation_space = self.slots.observation_space
        self.single_action_space = self.slots.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._placeholder = placeholder(self.single_observation_space)
        self.metadata = {**self.slots.metadata, "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        self.budget = budget
        self.forest = Forest()
        self._sources = roots
        self._encode = encode
        self._success = success
        self._keep_snapshots = keep_snapshots
        self._live: dict[int, Rollout] = {}  # by slot, in their order
        self._keep: set[int] = set()  # slots whose moments are to be kept
        self._positions = Positions(self.num_envs)
        self._ended: dict[str, np.ndarray] = {}  # positions of the rollouts that ended in the last step
        self._collection: Collection | None = None
        self._rng = np.random.default_rng()

    @property
    def active(self) -> np.ndarray:
        """Which slots have work, bool [num_envs]."""
        return self._positions.active.copy()

    def contexts(self) -> list[Context]:
        """Returns what a policy has to act on, one context for each active slot."""
        return [rollout.context for rollout in self._live.values()]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts a new forest: draws candidates, runs the root stage, and fills the slots.

        Args:
            seed: Seeds the choice of candidates, the allocation's ties and the environments' randomness. Without it the
                generator goes on where the last forest left it.
            options: `{"roots": [Root, ...]}` names the candidates instead of drawing them.

        Returns:
            The batch of observations and the info of a vector environment.
        """
        self._check_open("reset")
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._collection, self._live, self._positions = None, {}, Positions(self.num_envs)
        collection = Collection(
            self.slots,
            self.allocator,
            self.budget,
            self._rng,
            success=self._success,
            keep_snapshots=self._keep_snapshots,
        )
        given = (options or {}).get("roots")
        self.forest = collection.forest
        collection.open(
            list(given) if given is not None else list(self._sources(self._rng, self.allocator.pool_size(self.budget))),
            self._encode,
        )
        self._fill(collection, [])
        self._collection = collection
        return self._observations(), self._infos({})

    def step(  # type: ignore[override]
        self, actions: Any, samples: Sequence[Sample | None] | None = None
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps every active slot; actions of idle slots are ignored. When all work is done it does nothing.

        Args:
            actions: A batch as `action_space.sample()` gives it, or a list with one action for each slot.
            samples: The actions as sampled, with token ids and log-probs, for a policy that will learn from them.

        Returns:
            Observations, rewards float64 [n], terminated bool [n], truncated bool [n], infos. `infos["trace"]` says where
            each active slot stands now; `infos["final_info"]["trace"]` where a finished one ended.

        Raises:
            Exception: Whatever an environment or `success` raised, with a note that names the tree, node and turn. What was
                collected stays in `forest`; the next call must be `reset`.
        """
        rewards, terminated, truncated, final = self.advance(actions, samples)
        return self._observations(), rewards, terminated, truncated, self._infos(final)

    def advance(
        self, actions: Any, samples: Sequence[Sample | None] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, Result]]:
        """Does all that `step` does but putting observations and infos together, for drivers that look at `contexts`.

        Args:
            actions: As for `step`.
            samples: As for `step`.

        Returns:
            Rewards, terminated, truncated, and by slot the last step of each rollout that ended in it.
        """
        self._check_open("step")
        collection = self._collection
        if collection is None:
            raise RuntimeError(
                "call reset() before step(): there is no forest, or its collection ended with an exception"
            )
        # What follows is in every step of every slot: short loops, and few objects that the garbage collector would track
        # (`zip(*results)` alone makes it run twice as often).
        items = single_actions(actions, self.action_space, self.num_envs)
        live, busy = self._live, len(self._live) == self.num_envs
        given = own = items if busy else [items[i] for i in live]
        if not ATOMS.issuperset(map(type, given)):
            # One copy is recorded, the other is the environment's, which may change its argument.
            given, own = [value(action) for action in given], [value(action) for action in given]
        self._collection = None  # If anything raises, slots and forest no longer agree.
        try:
            by_slot = self._step(dict(zip(live, own, strict=True)), samples)
        except Exception as error:
            self._locate(error, list(live.values()))
            raise
        sampled = None if samples is None else [samples[i] for i in live]
        ended = collection.record_all(live.values(), given, sampled, [by_slot[i] for i in live])
        nodes = [rollout.node for rollout in live.values()]
        self._positions.move([node.id for node in nodes])
        rewards = np.zeros(self.num_envs)
        rewards[... if busy else self._positions.active] = [node.reward for node in nodes]
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        final: dict[int, Result] = {}
        for rollout in ended:
            i = rollout.slot
            final[i] = by_slot[i]
            terminated[i], truncated[i] = by_slot[i].terminated, by_slot[i].truncated
        if final:
            self._ended = self._positions.info(terminated | truncated)
            # Freed slots are filled after every slot has stepped, so that who gets which job does not depend on slot order.
            self._fill(collection, list(final))
        self._collection = collection
        return rewards, terminated, truncated, final

    def _step(self, actions: dict[int, Any], samples: Sequence[Sample | None] | None) -> dict[int, Result]:
        """Steps the environments, but for those whose policy has no action: their rollouts end."""
        silent = {} if samples is None else {i: s for i in actions if (s := samples[i]) is not None and not s.acted}
        if not silent:
            return self.slots.step(actions, self._keep)
        acting = {i: action for i, action in actions.items() if i not in silent}
        results = self.slots.step(acting, self._keep) if acting else {}
        return {i: end_without_action(self._live[i], silent[i]) if i in silent else results[i] for i in actions}

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the environments."""
        self.slots.close()

    def __del__(self) -> None:
        """Leaves the environments open: a forest may still be verified in them."""

    def _check_open(self, name: str) -> None:
        if self.closed:
            raise RuntimeError(f"{name}() after close(): the environments are closed; make and wrap new ones")

    def _fill(self, collection: Collection, freed: list[int]) -> None:
        """Sends every free slot to the next anchor, as far as there is work.

        Args:
            collection: Knows where there is work.
            freed: Slots whose rollout is over, ascending.
        """
        live, positions = self._live, self._positions
        # Slots that had no work before may have some now.
        free = freed if len(live) == self.num_envs else [i for i in range(self.num_envs) if i in freed or i not in live]
        for i in free:
            rollout = collection.next(i)
            if rollout is None:
                positions.clear(i)
                live.pop(i, None)
                continue
            job = rollout.job
            positions.start(i, job.tree.index, rollout.node, job.rollout, job.origin)
            live[i] = rollout
            (self._keep.add if collection.wanted(rollout) else self._keep.discard)(i)
        if free is not freed:  # a slot may have gone from idle to busy
            self._live = dict(sorted(live.items()))

    @staticmethod
    def _locate(error: Exception, live: list[Rollout]) -> None:
        """Notes on an exception of the slots where in the forest it came from."""
        # Its own slot comes first; later notes may tell what failed in others.
        named = (re.match(r"while .*?slot (\d+)", note) for note in getattr(error, "__notes__", ()))
        slot = getattr(error, "slot", next((int(found[1]) for found in named if found), None))
        for rollout in live:
            if slot == rollout.slot or len(live) == 1:
                error.add_note(f"in the step from {rollout.where}")

    def _observations(self) -> Any:
        items = [rollout.observation for rollout in self._live.values()]
        if len(items) < self.num_envs:
            shown = dict(zip(self._live, items, strict=True))
            items = [shown.get(i, self._placeholder) for i in range(self.num_envs)]
        return batch_observations(items, self.single_observation_space)

    def _infos(self, final: dict[int, Result]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for i, rollout in self._live.items():
            if rollout.info:
                infos = self._add_info(infos, rollout.info, i)
        if final:
            last = np.full(self.num_envs, None, dtype=object)
            last_info: dict[str, Any] = {}
            for i, result in final.items():
                last[i] = value(result.observation)  # the forest keeps its own
                if result.info:
                    last_info = self._add_info(last_info, result.info, i)
            ended = self._ended["_tree"]
            infos["final_obs"], infos["_final_obs"] = last, ended.copy()
            infos["final_info"], infos["_final_info"] = last_info, ended.copy()
            last_info["trace"], last_info["_trace"] = self._ended, ended.copy()
        if self._live:
            active = self._positions.active
            infos["trace"], infos["_trace"] = self._positions.info(active), active.copy()
        return infos
