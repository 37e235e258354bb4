"""A decision process so small that everything that can happen in it can be listed, and a policy that acts by the list.

Invariant: whatever is random in a collection, the policy's actions and the environment's answers, is asked of one `Odometer`,
one choice at a time; so running the real code once for every sequence of choices meets every forest once, with the product of
the probabilities of its choices. What the code draws for itself (ties) has the same seed in every run and is part of the rule.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import gymnasium as gym
import numpy as np

from allocation import Sample
from trace_envs.snapshots import EnvSnapshot


class Odometer:
    """Runs a procedure once for every sequence of choices that it makes, depth first."""

    def __init__(self):
        self._script, self._options, self._at, self.probability = [], [], 0, 1.0

    def pick(self, probabilities):
        """Returns the choice of this run, an index; the first option where the script has nothing to say yet."""
        if self._at == len(self._script):
            self._script.append(0)
            self._options.append(len(probabilities))
        choice = self._script[self._at]
        assert self._options[self._at] == len(probabilities), "the procedure is not a function of its choices"
        self._at += 1
        self.probability *= float(probabilities[choice])
        return choice

    def runs(self, procedure):
        """Yields the probability and the result of each run."""
        while True:
            self._at, self.probability = 0, 1.0
            result = procedure()
            yield self.probability, result
            while self._script and self._script[-1] == self._options[-1] - 1:
                self._script.pop(), self._options.pop()
            if not self._script:
                return
            self._script[-1] += 1


@dataclass(frozen=True)
class World:
    """A decision process over histories (action, answer, action, answer, ...), with rewards that are all different.

    Attributes:
        turns: Turns of an episode.
        prompts: Number of prompts.
        slip: Chance that the answer to the first action is the other one.
        stops: Whether the first action 1 ends the episode.
    """

    turns: int = 2
    prompts: int = 1
    slip: float = 0.0
    stops: bool = False

    def over(self, history):
        return len(history) == 2 * self.turns or (self.stops and history[:1] == (1,))

    def answers(self, history, action):
        """Returns the probabilities of the answers 0 and 1."""
        slip = self.slip if not history else 0.0
        usual = (action + len(history) // 2) % 2
        return tuple(1 - slip if answer == usual else slip for answer in (0, 1))

    def reward(self, prompt, history):
        """Of the turn that led to a history."""
        return round(float(np.random.default_rng([prompt, *history]).normal()), 2)

    def context(self, prompt, history):
        """Tokens that are shown after a history."""
        return [prompt % 2, prompt // 2, 1] if not history else [history[-1]]

    @cached_property
    def prefixes(self):
        """All (prompt, history) that an action is taken in."""
        return [(p, h) for p in range(self.prompts) for h in self._below(())]

    def _below(self, history):
        yield history
        for action in (0, 1):
            for answer, chance in enumerate(self.answers(history, action)):
                after = (*history, action, answer)
                if chance and not self.over(after):
                    yield from self._below(after)


@dataclass(frozen=True)
class State:
    prompt: int
    history: tuple[int, ...] = ()
    total: float = 0.0


class WorldEnv(gym.Env):
    """A world as an environment whose chance is an odometer; observations are the prompt and the history, then -1."""

    def __init__(self, world, odometer):
        self.world, self.odometer = world, odometer
        self.observation_space = gym.spaces.Box(-1, 9, (1 + 2 * world.turns,), np.int64)
        self.action_space = gym.spaces.Discrete(2)
        self.state = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = State(options["prompt"])
        return self._observation(), {"task_id": f"prompt {self.state.prompt}"}

    def step(self, action):
        world, (prompt, history) = self.world, (self.state.prompt, self.state.history)
        chances = world.answers(history, int(action))
        possible = [answer for answer in (0, 1) if chances[answer]]
        answer = possible[self.odometer.pick([chances[a] for a in possible])] if len(possible) > 1 else possible[0]
        history = (*history, int(action), answer)
        reward = world.reward(prompt, history)
        self.state = replace(self.state, history=history, total=self.state.total + reward)
        over = world.over(history)
        return self._observation(), reward, over, False, {"is_correct": self.state.total > 0} if over else {}

    def _observation(self):
        seen = np.full(self.observation_space.shape, -1, dtype=np.int64)
        seen[: 1 + len(self.state.history)] = [self.state.prompt, *self.state.history]
        return seen

    def snapshot(self):
        return EnvSnapshot("WorldEnv", len(self.state.history) // 2, self.state)

    def restore(self, snapshot, *, seed=None):
        self.state = snapshot.payload


def place(observation):
    """Returns the (prompt, history) that an observation shows."""
    prompt, *history = (int(x) for x in observation if x >= 0)
    return prompt, tuple(history)


class OdometerPolicy:
    """Acts by an odometer, with the probabilities of a model, and hands on what a policy with a model does."""

    def __init__(self, exact, odometer):
        self.exact, self.odometer = exact, odometer

    def act(self, contexts):
        return [self._sample(context) for context in contexts]

    def _sample(self, context):
        prompt, history = place(context.observation)
        logprobs = self.exact.logprobs[self.exact.index[prompt, history]]
        action = self.odometer.pick(np.exp(logprobs))
        return Sample(
            str(action),
            np.array([action]),
            logprobs[[action]],
            np.array(self.exact.world.context(prompt, history)),
            entropy=float(-(np.exp(logprobs) * logprobs).sum()),
        )
