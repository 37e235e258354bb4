"""A synthetic population of prompts whose true values are known, for budgets and populations that no machine here can sample.

Invariant: the value of a prefix is the mean of the values one turn later, weighted by their chances, and a terminal's value
is its outcome: values are a martingale in depth by construction, as they are under any fixed policy (docs/algorithm.md,
"When the prefix stage can pay"). Everything about a prompt is a function of (seed, number), everything about a prefix of
(seed, number, actions): nothing is stored for prompts that are not open.

How values move. A turn draws `balls` balls, each a success with the value of the prefix as its chance. A ball worth the
share s moves the value v to v + s (1 - v) if it is a success and to v - s v if not, which is v on average: Polya's urn, with
balls that weigh a constant share of the urn. Of the variance of the outcome, v (1 - v), a ball leaves 1 - s^2. The last turn
has one ball that is worth everything. What a turn's balls are worth differs from prefix to prefix, so there are decision
points and idle turns; the entropy of an action tells of it.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import blake2b
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from allocation.contrast import FloatArray
from allocation.sample import Sample
from allocation.scheduler import Job
from allocation.tree import Node, Tree

_normal: Callable[[float], float] = NormalDist().inv_cdf
_NOISE_ROWS = 1 << 14
_LONGEST = 4096
_VARIANTS = 1 << 24
_GRID = np.linspace(-16.0, 16.0, 8193)


@dataclass(frozen=True)
class Population:
    """Dials of a `SyntheticWorld`.

    Attributes:
        prompts: Number of prompts.
        roots: Components (weight, a, b) of the Beta mixture that root values are drawn from.
        turns: Fewest and most turns of a rollout.
        stop: Chance that a turn from the fewest on is the last one.
        movement: Share, in [0, 1), of the variance of the outcome that a turn decides at a prefix of average weight.
        balls: Balls of a turn; the values one turn on are 2 ** balls at most.
        weight_spread: How much prefixes differ in what their next turn decides: standard deviation of the log weight.
        bottleneck: Factor on the weight of one turn of each prompt, a random one of those that all rollouts have; 1 for none.
        tokens: Median of the tokens of an action of a prompt that always succeeds.
        token_spread: Standard deviation of their logarithm; the tail is that of a lognormal, cut at 4,096.
        hardness: Actions of a prompt of value v are 1 + hardness (1 - v) times as long.
        observation_tokens: Tokens that the environment shows, at the root and after each turn.
        feature_dim: Size of hidden states; 0 for none.
        feature_noise: Standard deviation of the noise in what hidden states tell, which is a third of the logit of the value.
        entropy_noise: Standard deviation of the noise in what the entropy of an action tells, which is twice the standard
            deviation of the value one turn on.

    Raises:
        ValueError: A number is out of range.
    """

    prompts: int = 10_000
    roots: tuple[tuple[float, float, float], ...] = ((1.0, 1.0, 1.0),)
    turns: tuple[int, int] = (2, 8)
    stop: float = 0.2
    movement: float = 0.3
    balls: int = 3
    weight_spread: float = 1.0
    bottleneck: float = 1.0
    tokens: float = 24.0
    token_spread: float = 0.8
    hardness: float = 1.0
    observation_tokens: int = 16
    feature_dim: int = 8
    feature_noise: float = 1.0
    entropy_noise: float = 0.1

    def __post_init__(self) -> None:
        for name, met, wanted in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("roots", bool(self.roots) and all(x > 0 for row in self.roots for x in row), "rows of positive numbers"),
            ("turns", 1 <= self.turns[0] <= self.turns[1], "fewest and most turns, 1 <= fewest <= most"),
            ("stop", 0 <= self.stop <= 1, "in [0, 1]"),
            ("movement", 0 <= self.movement < 1, "in [0, 1)"),
            ("balls", 1 <= self.balls <= 8, "from 1 to 8"),
            ("bottleneck", self.bottleneck >= 0, "not negative"),
            ("tokens", self.tokens > 0, "positive"),
            ("observation_tokens", 0 <= self.observation_tokens <= _LONGEST, f"from 0 to {_LONGEST}"),
            *((f, 0 <= getattr(self, f) <= 10, "in [0, 10]") for f in ("weight_spread", "token_spread", "hardness")),
            *((f, getattr(self, f) >= 0, "not negative") for f in ("feature_dim", "feature_noise", "entropy_noise")),
        ):
            if not met:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


_SKEWED = ((0.4, 12.0, 1.0), (0.3, 0.5, 20.0), (0.3, 1.5, 1.5))
POPULATIONS: dict[str, Population] = {
    "balanced": Population(),
    "skewed": Population(roots=_SKEWED),
    "sparse": Population(roots=((0.9, 0.3, 12.0), (0.1, 2.0, 3.0))),
    "bottleneck": Population(roots=_SKEWED, movement=0.005, bottleneck=1000.0, weight_spread=0.0),
    "recoverable": Population(roots=((1.0, 1.2, 1.8),), turns=(6, 16), movement=0.12, weight_spread=0.5),
}
"""Populations by name.

`balanced`: root values spread evenly. `skewed`: many easy and some hopeless prompts. `sparse`: hardly any success.
`bottleneck`: one turn of each prompt decides nearly everything, the prefix stage's worst case. `recoverable`: many turns, of
which none decides much, its best.
"""


class State(NamedTuple):
    """A prefix of a synthetic prompt.

    Attributes:
        key: Hash of (seed, prompt, actions); all that is random about the prefix comes from it.
        value: True chance of success.
        depth: Turns taken.
        last: Whether the next turn is the last one.
        share: What each ball of the next turn is worth, in [0, 1].
        spread: Standard deviation of the value one turn on.
        noise: Two numbers in (0, 1) that the length and the entropy of the action that led here are made of.
    """

    key: bytes
    value: float
    depth: int
    last: bool
    share: float
    spread: float
    noise: tuple[float, float]


class Successor(NamedTuple):
    """What one turn may lead to: the colours of the balls as the bits of a number, their chance, and the value then."""

    bits: int
    probability: float
    value: float


class _Prompt(NamedTuple):
    """What a prompt is: its hash, its value, the factor on the length of its actions, and its bottleneck turn."""

    key: bytes
    numbers: tuple[float, ...]
    value: float
    length: float
    bottleneck: int


class SyntheticWorld:
    """Draws prompts and rollouts from a population; see `allocation.arena.worlds.World`.

    Actions are numbers: the colours of the turn's balls, and above them the number of a variant, which says nothing about the
    value now but makes rollouts that were equally lucky different.

    Args:
        population: A `Population`, or the name of one (`POPULATIONS`).
        seed: Makes populations different.
        **dials: Fields of the population to replace.

    Attributes:
        population: The dials in use.
        feature_dim: Size of the hidden states.

    Raises:
        ValueError: The name is unknown or a dial is out of range.
    """

    def __init__(self, population: Population | str = "balanced", seed: int = 0, **dials: object):
        if isinstance(population, str):
            if population not in POPULATIONS:
                raise ValueError(f"unknown population {population!r}; known: {', '.join(POPULATIONS)}")
            population = POPULATIONS[population]
        unknown = sorted(set(dials) - {f.name for f in fields(Population)})
        if unknown:
            raise ValueError(
                f"unknown dials {', '.join(unknown)}; known: fields of allocation.arena.synthetic.Population"
            )
        self.population = replace(population, **dials)  # type: ignore[arg-type]
        self.feature_dim = self.population.feature_dim
        self._seed = seed
        self._root_quantile = mixture_quantile(self.population.roots)
        rng = np.random.default_rng([seed, 0x5EED])
        direction = rng.standard_normal(self.feature_dim)
        self._direction = (direction / max(float(np.linalg.norm(direction)), 1e-12)).astype(np.float32)
        self._noise = rng.standard_normal((_NOISE_ROWS, self.feature_dim), dtype=np.float32)
        self._tokens = np.zeros(_LONGEST, dtype=np.int64)
        self._tokens.setflags(write=False)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns the numbers of `count` different prompts, int64 [count], or of all.

        Below half of the population it takes the memory of the answer alone, and of two counts the smaller gets a head of what
        the larger gets.
        """
        n = self.population.prompts
        if 2 * count >= n:
            return rng.permutation(n)[:count]
        found: dict[int, None] = {}  # of numbers drawn with replacement each counts at its first coming
        while len(found) < count:
            found.update(dict.fromkeys(rng.integers(n, size=count).tolist()))
        return np.array(list(found)[:count], dtype=np.int64)

    def open(self, prompt: int) -> Tree:
        """Returns a fresh tree of a prompt.

        Raises:
            ValueError: There is no such prompt.
        """
        if not 0 <= prompt < self.population.prompts:
            raise ValueError(f"prompt must lie in [0, {self.population.prompts}), got {prompt}")
        state = self._root(prompt)
        info = {"prompt": prompt, "max_turns": self.population.turns[1]}
        tree = Tree(f"prompt {prompt}", -1, "", info)
        self._show(tree.root, state)
        return tree

    def roll(self, job: Job, rng: np.random.Generator) -> None:
        """Carries out one rollout; what comes is a function of the state of the anchor and of `rng` alone."""
        tree, node = job.tree, job.node
        prompt = self._prompt(tree.info["prompt"])
        state = self.state(tree, node)
        while True:
            action, after = self._turn(state, rng, prompt)
            sample = self._sample(node, state, after, prompt)
            if node.context_ids is None:
                node.context_ids = sample.context_ids
            success = after.value > 0.5
            terminal = {"terminated": True, "is_correct": success, "reward": float(success)} if state.last else {}
            node = tree.add(node, job.rollout, job.origin, action, "", sample, **terminal)  # type: ignore[arg-type]
            if state.last:
                return
            self._show(node, after)
            state = after

    def value(self, tree: Tree, node: Node) -> float:
        """Returns the true chance of success from a node; at a terminal its outcome."""
        return float(bool(node.is_correct)) if node.terminal else self.state(tree, node).value

    def state(self, tree: Tree, node: Node) -> State:
        """Returns the state of a node that is no terminal: the one kept on it, or the same one worked out from its actions."""
        if isinstance(node.snapshot, State):
            return node.snapshot
        number = tree.info["prompt"]
        prompt, state = self._prompt(number), self._root(number)
        for step in tree.path(node)[1:]:
            state = self._after(state, step.action, prompt)
        return state

    def root_values(self, prompts: np.ndarray) -> FloatArray:
        """Returns the true chance of success of prompts, float64 [n], without opening them."""
        return np.array([self._root(int(prompt)).value for prompt in prompts])

    def successors(self, state: State) -> list[Successor]:
        """Lists what one turn may lead to; chances sum to 1, and the mean of the values is the value of `state`."""
        found = [Successor(0, 1.0, state.value)]
        for ball in range(1 if state.last else self.population.balls):
            found = [
                Successor(bits | (colour << ball), p * (v if colour else 1 - v), _moved(v, colour, state.share))
                for bits, p, v in found
                for colour in (0, 1)
            ]
        return found

    # Prompts and prefixes as functions of their names.

    def _prompt(self, number: int) -> _Prompt:
        key, u = _hash(f"{self._seed} {number}".encode())
        value = self._root_quantile(u[0])
        return _Prompt(key, u, value, 1 + self.population.hardness * (1 - value), int(u[1] * self.population.turns[0]))

    def _root(self, number: int) -> State:
        prompt = self._prompt(number)
        return self._prefix(prompt.key, prompt.numbers, prompt.value, 0, prompt)

    def _after(self, state: State, action: int, prompt: _Prompt) -> State:
        """Returns the prefix that an action leads to."""
        value = state.value
        for ball in range(1 if state.last else self.population.balls):
            value = _moved(value, (action >> ball) & 1, state.share)
        key, u = _hash(state.key + action.to_bytes(8, "little"))
        return self._prefix(key, u, value, state.depth + 1, prompt)

    def _prefix(self, key: bytes, u: tuple[float, ...], value: float, depth: int, prompt: _Prompt) -> State:
        dials = self.population
        fewest, most = dials.turns
        last = depth + 1 >= most or (depth + 1 >= fewest and u[2] < dials.stop)
        weight = math.exp(dials.weight_spread * _normal(u[3]))
        if depth == prompt.bottleneck:
            weight *= dials.bottleneck
        undecided = 0.0 if last else (1 - dials.movement) ** weight
        share = (1.0 - undecided ** (1 / dials.balls)) ** 0.5
        return State(key, value, depth, last, share, ((1 - undecided) * value * (1 - value)) ** 0.5, (u[4], u[5]))

    # Rollouts.

    def _turn(self, state: State, rng: np.random.Generator, prompt: _Prompt) -> tuple[int, State]:
        balls = 1 if state.last else self.population.balls
        value, action = state.value, int(rng.integers(_VARIANTS)) << balls
        for ball, u in enumerate(rng.random(balls).tolist()):
            colour = int(u < value)
            action |= colour << ball
            value = _moved(value, colour, state.share)
        return action, self._after(state, action, prompt)

    def _sample(self, node: Node, before: State, after: State, prompt: _Prompt) -> Sample:
        """Returns the action that led to `after` as a policy would have given it: how long, and how sure."""
        dials = self.population
        length = dials.tokens * prompt.length * math.exp(dials.token_spread * _normal(after.noise[0]))
        entropy = abs(2 * before.spread + dials.entropy_noise * _normal(after.noise[1]))
        count = int(min(max(length, 1), _LONGEST))
        logprobs = np.full(count, -entropy, dtype=np.float32)
        shown = self._tokens[: dials.observation_tokens]
        return Sample("", self._tokens[:count], logprobs, shown, node.features, entropy=entropy)

    def _show(self, node: Node, state: State) -> None:
        """Puts on a node what may be known of it: its state for the world, a hidden state and a text for predictors."""
        node.snapshot = state
        if not self.feature_dim:
            return
        row = self._noise[int.from_bytes(state.key[:4], "little") % _NOISE_ROWS]
        truth = min(max(math.log(max(state.value, 1e-9) / max(1 - state.value, 1e-9)), -9.0), 9.0) / 3
        node.features = truth * self._direction + self.population.feature_noise * row
        # The same view in words: what a reader of hidden states sees along the one direction that tells something.
        node.observation = f"it looks like {round(2 * float(node.features @ self._direction))}"


def _moved(value: float, colour: int, share: float) -> float:
    """Returns the value after a ball: a success takes it the share of the way to 1, a failure the share of the way to 0."""
    return value + share * (1 - value) if colour else value - share * value


def _hash(data: bytes) -> tuple[bytes, tuple[float, ...]]:
    """Returns a key and six numbers in (0, 1), functions of `data`; much faster than making a generator."""
    digest = blake2b(data, digest_size=40).digest()
    return digest[24:], tuple([(x + 0.5) / 2**32 for x in struct.unpack_from("<6I", digest)])


def mixture_quantile(components: tuple[tuple[float, float, float], ...]) -> Callable[[float], float]:
    """Returns the quantile function of a mixture of Beta distributions, (0, 1) -> (0, 1).

    Of each density in logit space the sums over a grid, interpolated: a thousandth at worst, and a function of its argument
    alone, which is what matters here.

    Args:
        components: Rows (weight, a, b), all positive.
    """
    log_v, log_rest = -np.logaddexp(0, -_GRID), -np.logaddexp(0, _GRID)
    below = np.zeros_like(_GRID)
    for weight, a, b in components:
        log_density = a * log_v + b * log_rest
        density = np.exp(log_density - log_density.max())
        cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
        below += weight * cumulative / cumulative[-1]
    below /= below[-1]
    return partial(_interpolate, below.tolist(), _GRID.tolist())


def _interpolate(below: list[float], grid: list[float], u: float) -> float:
    i = min(bisect_right(below, u), len(below) - 1)
    low, high = below[i - 1], below[i]
    x = grid[i - 1] + (grid[i] - grid[i - 1]) * ((u - low) / (high - low) if high > low else 0.5)
    return 1 / (1 + math.exp(-x))
