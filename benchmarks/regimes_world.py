"""A learning problem that is small enough to be known exactly: prompts are chains of skills, and the policy is linear.

A prompt is a sequence of skills; at each turn the policy picks one of `ACTIONS` actions for the next skill, and only one
is right. A wrong one is mended by the environment with the chance `recover` (a search that finds the passage all the same); if
not, the chain is lost, and the rollout goes on to its end without knowing. Outcomes come at the end alone. Skills are shared by
all prompts, as abilities are: what is learned in short chains helps in long ones. The policy knows a skill by `DIM` features,
fewer than there are skills, so that a step for one disturbs the others, as in a network: without that, no step would be too
long and noise would cost nothing.

Invariant: the value of a prefix is the product of the chances of its remaining skills, 0 if it is lost; it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from allocation.predictor import Anchor
from allocation.sample import Sample
from allocation.scheduler import Job
from allocation.tree import Node, Tree

ACTIONS, DIM = 8, 32
_CLIP = 1e-4


@dataclass(frozen=True)
class Regime:
    """What prompts there are and what the policy can do at the start.

    Attributes:
        skills: Groups of skills (number, chance of the right action).
        chains: Kinds of prompts (share, fewest turns, most turns, groups that its skills are drawn from).
        recover: Chance that a wrong action is mended.
        visible: Whether a lost chain shows in the hidden state.
        what: The regime in words.
    """

    skills: tuple[tuple[int, float], ...]
    chains: tuple[tuple[float, int, int, tuple[int, ...]], ...]
    recover: float = 0.0
    visible: bool = True
    what: str = ""


_SKILLS = ((20, 0.98), (40, 0.6), (10, 0.002))  # mastered, in reach, out of reach
REGIMES: dict[str, Regime] = {
    "balanced": Regime(_SKILLS, ((1.0, 1, 4, (1,)),), what="1 to 4 turns, all in reach"),
    "skewed": Regime(
        _SKILLS,
        ((0.5, 1, 4, (0,)), (0.35, 2, 6, (1, 2)), (0.15, 1, 4, (1,))),
        what="half mastered, a third hopeless, the rest in reach",
    ),
    "sparse": Regime(_SKILLS, ((1.0, 6, 10, (1,)),), what="6 to 10 turns in reach each, success rare, errors visible"),
    "sparse, blind": Regime(
        _SKILLS, ((1.0, 6, 10, (1,)),), visible=False, what="the same, but nothing tells that a chain is lost"
    ),
    "sparse, mended": Regime(
        ((60, 0.4),), ((1.0, 8, 12, (0,)),), recover=0.6, what="8 to 12 turns, errors often mended, values move slowly"
    ),
    "bottleneck": Regime(
        ((40, 0.98), (20, 0.05)), ((1.0, 5, 6, (0, 1)),), what="5 or 6 turns, some of which hardly ever succeed"
    ),
}
"""By name."""


class SkillWorld:
    """Prompts of a regime with a policy that can be changed; see `allocation.arena.worlds.World`.

    Args:
        regime: The regime.
        seed: Draws the prompts.
        prompts: Their number.
        exact: Whether the hidden state is the true value (for `Told`), not what remains to be done.

    Attributes:
        weights: The policy's parameters, float64 [DIM, ACTIONS]; call `refresh` after a change.
        features: What it knows skills by, unit vectors, float64 [skills, DIM].
        right: The right action of each skill, int64 [skills].
        policy: Chances of the actions, float64 [skills, ACTIONS].
    """

    def __init__(self, regime: Regime, seed: int, prompts: int = 400, exact: bool = True):
        rng = np.random.default_rng([seed, 0x5C1])
        self.regime, self.exact = regime, exact
        chances = np.concatenate([np.full(n, p) for n, p in regime.skills])
        edges = np.cumsum([0, *(n for n, _ in regime.skills)])
        groups = [np.arange(a, b) for a, b in pairwise(edges)]
        self.right = rng.integers(ACTIONS, size=len(chances))
        self._start = np.zeros((len(chances), ACTIONS))
        self._start[np.arange(len(chances)), self.right] = np.log(chances * (ACTIONS - 1) / (1 - chances))
        self.features = rng.standard_normal((len(chances), DIM))
        self.features /= np.linalg.norm(self.features, axis=1, keepdims=True)
        self.weights = np.zeros((DIM, ACTIONS))
        self.chains: list[np.ndarray] = []
        for share, fewest, most, kinds in regime.chains:
            known = np.concatenate([groups[k] for k in kinds])
            # One skill of each group at least, so that a hopeless chain is hopeless.
            for _ in range(round(share * prompts)):
                musts = [rng.choice(groups[k]) for k in kinds]
                length = max(int(rng.integers(fewest, most + 1)), len(musts))
                self.chains.append(rng.permutation([*musts, *rng.choice(known, length - len(musts))]))
        self.feature_dim = 1 if exact else len(chances) + 1  # of the hidden state
        self.refresh()

    def refresh(self) -> None:
        """Takes over changed weights."""
        logits = self._start + self.features @ self.weights
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        self.policy = shifted / shifted.sum(axis=1, keepdims=True)
        self._cumulative = self.policy.cumsum(axis=1)
        self._entropy = -(self.policy * np.log(np.maximum(self.policy, 1e-300))).sum(axis=1)
        hit = self.policy[np.arange(len(self.right)), self.right]
        self._step = hit + (1 - hit) * self.regime.recover
        self._ahead = [np.append(self._step[c][::-1].cumprod()[::-1], 1.0) for c in self.chains]

    @property
    def success(self) -> float:
        """The exact mean chance of success over all prompts."""
        return float(np.mean([ahead[0] for ahead in self._ahead]))

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns the numbers of `count` different prompts, or of all, int64 [count]."""
        return rng.permutation(len(self.chains))[:count]

    def open(self, prompt: int) -> Tree:
        """Returns a fresh tree of a prompt."""
        tree = Tree(f"prompt {prompt}", -1, "", {"prompt": prompt, "max_turns": len(self.chains[prompt])})
        self._show(tree, tree.root, lost=False)
        return tree

    def roll(self, job: Job, rng: np.random.Generator) -> None:
        """Carries out one rollout."""
        tree, node = job.tree, job.node
        chain = self.chains[tree.info["prompt"]]
        lost, nothing = bool(node.snapshot), np.zeros(0, dtype=np.int64)
        while True:
            skill = chain[node.depth]
            action = min(int(np.searchsorted(self._cumulative[skill], rng.random(), side="right")), ACTIONS - 1)
            lost = lost or (action != self.right[skill] and rng.random() >= self.regime.recover)
            logprob = np.log(self.policy[skill, action : action + 1]).astype(np.float32)
            entropy = float(self._entropy[skill])
            sample = Sample("", np.array([action]), logprob, nothing, node.features, entropy=entropy)
            if node.context_ids is None:
                node.context_ids = nothing
            last = node.depth + 1 == len(chain)
            end = {"terminated": True, "is_correct": not lost, "reward": float(not lost)} if last else {}
            node = tree.add(node, job.rollout, job.origin, action, "", sample, **end)  # type: ignore[arg-type]
            if last:
                return
            self._show(tree, node, lost)

    def value(self, tree: Tree, node: Node) -> float:
        """Returns the exact chance of success from a node."""
        if node.terminal:
            return float(bool(node.is_correct))
        return 0.0 if node.snapshot else float(self._ahead[tree.info["prompt"]][node.depth])

    def skill_of(self, tree: Tree, node: Node) -> int:
        """Returns the skill that the action into a node was an attempt at."""
        return int(self.chains[tree.info["prompt"]][node.depth - 1])

    def _show(self, tree: Tree, node: Node, lost: bool) -> None:
        node.snapshot = lost
        chain = self.chains[tree.info["prompt"]]
        if self.exact:
            # What can be known: if losses do not show, the value is that of what has probably happened.
            value = self.value(tree, node) if self.regime.visible else float(self._ahead[tree.info["prompt"]][0])
            node.features = np.array([value], dtype=np.float32)
        else:
            features = np.zeros(self.feature_dim, dtype=np.float32)
            np.add.at(features, chain[node.depth :], 1.0)
            features[-1] = float(lost and self.regime.visible)
            node.features = features


class Told:
    """A predictor that is told the truth by the hidden state (`SkillWorld` with `exact`)."""

    ready = True

    def predict(self, anchors: Sequence[Anchor]) -> np.ndarray:
        """Returns the values, kept from 0 and 1."""
        return np.clip([a.features[0] for a in anchors if a.features is not None], _CLIP, 1 - _CLIP).astype(np.float64)

    def update(self, anchors: Sequence[Anchor], values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Nothing to learn."""
        return {}

    def state_dict(self) -> dict[str, object]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Nothing to restore."""
