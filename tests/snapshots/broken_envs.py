"""Environments that are each wrong in one way, and the one that is right which they are made from."""

import itertools
import os
import random
import threading

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TimeLimit


class Walk(gym.Env):
    """A walk with noise whose snapshots are right; the environments below each break one thing of it."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = {"turn": 0, "place": 0.0}
        return self.observation(), {}

    def observation(self):
        return np.array([self.state["turn"], self.state["place"]], np.float64)

    def noise(self):
        return self.np_random.normal()

    def step(self, action):
        self.state["turn"] += 1
        self.state["place"] += float(action) + self.noise()
        return self.observation(), float(action), self.state["turn"] == 9, False, {}

    def snapshot(self):
        return {"state": dict(self.state), "random": self.np_random.bit_generator.state}

    def restore(self, snapshot, *, seed=None):
        self.state = dict(snapshot["state"])
        self.np_random = np.random.default_rng(0)
        self.np_random.bit_generator.state = snapshot["random"]
        if seed is not None:
            self.np_random = np.random.default_rng(seed)


class GivesItsState(Walk):
    def snapshot(self):
        return super().snapshot() | {"state": self.state}


class TakesTheSnapshot(Walk):
    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=seed)
        self.state = snapshot["state"]


class ForgetsItsGenerator(Walk):
    def restore(self, snapshot, *, seed=None):
        self.state = dict(snapshot["state"])


class DrawsFromNumpy(Walk):
    def noise(self):
        return np.random.normal() if self.state["turn"] == 4 else 0.0  # noqa: NPY002


class DrawsFromPython(Walk):
    def noise(self):
        return random.random()


class ForgetsItsPlace(Walk):
    def restore(self, snapshot, *, seed=None):
        place = self.state["place"]
        super().restore(snapshot, seed=seed)
        self.state["place"] = place


class InfoWithAClock(Walk):
    clock = itertools.count()

    def step(self, action):
        *others, info = super().step(action)
        return *others, info | {"at": next(self.clock)}


class OnceInARow(Walk):
    """A second restore without a step between is one too many."""

    fresh = False

    def step(self, action):
        self.fresh = False
        return super().step(action)

    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=seed)
        if self.fresh:
            self.state["place"] += 1
        self.fresh = True


class InnerOnly(gym.Wrapper):
    """Restores the bare environment and leaves the wrappers between where they are."""

    def snapshot(self):
        return self.unwrapped.snapshot()

    def restore(self, snapshot, *, seed=None):
        self.unwrapped.restore(snapshot, seed=seed)


class LimitOfOurOwn(TimeLimit):
    """A limit whose attributes nobody looks at, since it is not Gymnasium's."""


class SeedsAtRandom(Walk):
    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=seed)
        if seed is not None:
            self.np_random = np.random.default_rng()


class SeedsByEpisode(Walk):
    episodes = 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        return super().reset(seed=seed)

    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=None if seed is None else seed + self.episodes)


class SeedsByRestores(Walk):
    """A seed straight after another restore is taken for another."""

    fresh = False

    def step(self, action):
        self.fresh = False
        return super().step(action)

    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=None if seed is None else seed + self.fresh)
        self.fresh = True


class SeedsByTheWay(Walk):
    """What a seed means depends on the steps taken since the last restore, if they were few."""

    steps = 0

    def step(self, action):
        self.steps += 1
        return super().step(action)

    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=None if seed is None else seed + (self.steps == 1))
        self.steps = 0


class KeepsTheSeed(Walk):
    luck = 0

    def noise(self):
        return super().noise() + self.luck

    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=seed)
        if seed is not None:
            self.luck = seed


class OneBuffer(Walk):
    """Whatever is taken after a restore is kept in one place, so that the next one replaces it."""

    restored = False

    def reset(self, *, seed=None, options=None):
        self.restored = False
        return super().reset(seed=seed)

    def snapshot(self):
        taken = super().snapshot()
        if not self.restored:
            return taken
        self.buffer = taken
        return {"turn": self.state["turn"]}

    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot if "state" in snapshot else self.buffer, seed=seed)
        self.restored = True


class Stamped(Walk):
    """Each snapshot has a running number."""

    count = 0

    def snapshot(self):
        self.count += 1
        return super().snapshot() | {"number": self.count}


class StampedSteps(Walk):
    """Each step leaves a time of day in the state."""

    clock = itertools.count()

    def step(self, action):
        self.state["at"] = next(self.clock)
        return super().step(action)


class Ticket:
    pass


class GivesTickets(Walk):
    """A snapshot is a ticket; what it stands for stays here."""

    kept: dict

    def snapshot(self):
        ticket = Ticket()
        self.__dict__.setdefault("kept", {})[ticket] = super().snapshot()
        return ticket

    def restore(self, snapshot, *, seed=None):
        super().restore(self.kept[snapshot], seed=seed)


class OneStateForAll(Walk):
    state = {}  # noqa: RUF012  # which is what is wrong with it

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        OneStateForAll.state = self.__dict__.pop("state")
        return observation, info

    def restore(self, snapshot, *, seed=None):
        super().restore(snapshot, seed=seed)
        OneStateForAll.state = self.__dict__.pop("state")


class MadeByChance(Walk):
    def __init__(self):
        self.drift = np.random.default_rng().random()

    def noise(self):
        return self.drift


class NeedsAReset(Walk):
    def restore(self, snapshot, *, seed=None):
        self.state["turn"] += 0
        super().restore(snapshot, seed=seed)


class Hashes(Walk):
    """The order of a set of texts is another in every process."""

    def noise(self):
        return float(list({"up", "down", "left", "right", "on", "back"}).index("up")) + 10 * hash("up") % 997


class KnowsItsProcess(Walk):
    def snapshot(self):
        return super().snapshot() | {"process": os.getpid()}


class HoldsALock(Walk):
    """Its snapshots refer to something that is no plain data."""

    lock = threading.Lock()

    def snapshot(self):
        return super().snapshot() | {"lock": self.lock}


class Noisy(Walk):
    """Draws from the operating system, and says so in its spec."""

    def noise(self):
        return np.random.default_rng().normal()


class NoisyWithAClock(Noisy):
    clock = itertools.count()

    def snapshot(self):
        return super().snapshot() | {"at": next(self.clock)}
