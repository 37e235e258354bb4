"""The small learning problem: its values and gradients against enumeration, and its runs at a size that takes seconds."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from allocation import UniformAllocator
from allocation.arena.worlds import replay
from benchmarks import regimes
from benchmarks.regimes_world import ACTIONS, REGIMES, Regime, SkillWorld, Told

SMALL = Regime(((3, 0.6), (2, 0.3)), ((1.0, 2, 3, (0, 1)),), recover=0.25)


def enumerated(world, prompt):
    """The chance of success of a prompt, summed over all sequences of actions and of mended errors."""
    chain, total = world.chains[prompt], 0.0
    for actions in product(range(ACTIONS), repeat=len(chain)):
        chance = np.prod([world.policy[s, a] for s, a in zip(chain, actions, strict=True)])
        total += chance * world.regime.recover ** sum(a != world.right[s] for s, a in zip(chain, actions, strict=True))
    return total


def test_values_are_those_of_enumeration():
    world = SkillWorld(SMALL, seed=1, prompts=4)
    for prompt in range(len(world.chains)):
        tree = world.open(prompt)
        assert world.value(tree, tree.root) == pytest.approx(enumerated(world, prompt))
        assert tree.root.features[0] == pytest.approx(enumerated(world, prompt), rel=1e-6)
    assert world.success == pytest.approx(np.mean([enumerated(world, p) for p in range(len(world.chains))]))


def test_rollouts_succeed_as_often_as_values_say_and_lost_chains_never():
    world = SkillWorld(SMALL, seed=2, prompts=2)
    seen = {True: [], False: []}
    for batch in range(40):
        for tree in replay(world, UniformAllocator(16), 32, np.random.default_rng(batch)):
            for leaf in tree.leaves():
                path = tree.path(leaf)
                seen[bool(path[1].snapshot)].append((world.value(tree, path[1]), bool(leaf.is_correct)))
    values, outcomes = np.array(seen[False]).T
    assert abs(values.mean() - outcomes.mean()) < 4 * 0.5 / len(values) ** 0.5
    assert not any(outcome or value for value, outcome in seen[True]) and len(seen[True]) > 50


def test_the_gradient_points_where_success_rises():
    world = SkillWorld(SMALL, seed=3, prompts=6)
    exact = np.zeros_like(world.weights)
    for index in np.ndindex(*world.weights.shape):
        for sign in (1, -1):
            world.weights[index] += sign * 1e-5
            world.refresh()
            exact[index] += sign * world.success / 2e-5
            world.weights[index] -= sign * 1e-5
    world.refresh()
    settings = {"estimator": "grpo"}
    forests = (replay(world, UniformAllocator(8), 48, np.random.default_rng(i)) for i in range(400))
    found = np.mean([regimes.gradient(world, forest, settings) for forest in forests], axis=0)
    cosine = (found * exact).sum() / np.linalg.norm(found) / np.linalg.norm(exact)
    assert cosine > 0.98


def test_regimes_are_what_they_say():
    for name, regime in REGIMES.items():
        world = SkillWorld(regime, seed=0)
        assert len(world.chains) == 400 and 0 < world.success < 0.7, name
    hopeless = SkillWorld(REGIMES["skewed"], seed=0)
    values = [hopeless.value(t, t.root) for t in map(hopeless.open, range(400))]
    assert np.mean(np.array(values) < 0.01) == pytest.approx(0.35, abs=0.05)
    blind = SkillWorld(REGIMES["sparse, blind"], seed=0)
    forest = replay(blind, UniformAllocator(8), 16, np.random.default_rng(0))
    told = {float(n.features[0]) for tree in list(forest)[:1] for n in tree.nodes if not n.terminal}
    assert len(told) == 1, "nothing may tell that a chain is lost"


@pytest.mark.parametrize("method", ["grpo", "pcl", "treepo", "arpo", "trace", "trace_prefixes", "trace_plus"])
def test_every_kind_of_method_learns(method):
    row = regimes.train(regimes.Run("sparse", method, 0, 0.3, 3000, 64, "told"))
    assert row["success"] > 1.5 * row["curve"][0] and row["seed"] == 0
    assert (row["continuations"] > 0) == (method not in ("grpo", "pcl"))


def test_told_values_are_probabilities():
    world = SkillWorld(REGIMES["skewed"], seed=0)
    trees = [world.open(i) for i in range(20)]
    anchors = [type("A", (), {"features": t.root.features})() for t in trees]
    assert ((Told().predict(anchors) > 0) & (Told().predict(anchors) < 1)).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown name 'odd'; known: balanced, skewed"):
        regimes.Args(regimes=("odd",))


@pytest.mark.slow
def test_tables_and_pictures(tmp_path):
    args = regimes.Args(regimes=("skewed",), methods=("grpo", "pcl"), seeds=2, turns=600, output=tmp_path)
    regimes.main(args)
    lines = (tmp_path / "regimes.md").read_text().splitlines()
    assert any(line.startswith("| grpo") for line in lines) and (tmp_path / "regimes.png").stat().st_size > 1000
    regimes.main(replace(args, predictor="hidden_state", methods=("pcl",)))
    assert (tmp_path / "regimes_hidden_state.jsonl").read_text().count("\n") == 2
