"""Batches from synthetic worlds for the tests: driven in any order, and as plain data."""

import numpy as np

from allocation import Forest, make_allocator
from allocation.arena.synthetic import SyntheticWorld
from allocation.arena.worlds import replay
from allocation.collection import MAX_SEED, rollout_seed
from allocation.methods.oracle import TrueValues
from allocation.scheduler import Scheduler


class HiddenView:
    """A predictor that reads off the hidden state what a trained one would; ready after the first batch."""

    def __init__(self, world, ready=False):
        self.direction, self.ready = world._direction, ready

    def predict(self, anchors):
        seen = np.array([0.0 if a.features is None else 3 * float(a.features @ self.direction) for a in anchors])
        return 1 / (1 + np.exp(-seen))

    def update(self, anchors, values, weights):
        assert len(anchors) == len(values) == len(weights)
        self.ready = True
        return {}

    def state_dict(self):
        return {"ready": self.ready}

    def load_state_dict(self, state):
        self.ready = bool(state["ready"])


def make(name, world, group_size=8, ready=False):
    predictor = TrueValues(world.value) if name == "oracle" else HiddenView(world, ready)
    return make_allocator(name, predictor=predictor, group_size=group_size)


def drive(world, allocator, budget, rng, slots, order):
    """Does what `replay` does, but with several rollouts under way, finished in a random order."""
    entropy = int(rng.integers(MAX_SEED))
    trees = [world.open(int(p)) for p in world.draw(rng, allocator.pool_size(budget))]
    forest = Forest()
    roots = allocator.root_budget(budget)
    scheduler = Scheduler(allocator, forest, trees, roots, budget - roots, rng)
    running, handed = [], []
    while not scheduler.done:
        while len(running) < slots and (job := scheduler.next()) is not None:
            assert job.tree in forest.trees and not job.tree.finished
            running.append(job)
            handed.append(job)
        job = running.pop(int(order.integers(len(running))))
        world.roll(job, np.random.default_rng(rollout_seed(entropy, job.tree.index, job.rollout)))
        over = scheduler.finished(job)
        assert all(tree.finished for tree in over)
    assert not running and scheduler.next() is None
    return forest, handed


def batches(world, allocator, budget, count, seed=0):
    """Replays some batches, the allocator learning from each; returns the forests."""
    forests = []
    for number in range(count):
        forests.append(replay(world, allocator, budget, np.random.default_rng([seed, number])))
        allocator.update(forests[-1])
    return forests


def shape(forest):
    """Everything that was sampled, as plain data in an order that does not depend on which rollout was finished first."""
    for tree in forest:
        tree.sort()
    return [
        (
            t.key,
            t.loss_weight,
            [(n.parent, n.depth, n.origin, n.rollout, n.action, n.is_correct) for n in t.nodes],
        )
        for t in forest
    ]


def small_world(name="balanced", **dials):
    return SyntheticWorld(name, **{"prompts": 200} | dials)
