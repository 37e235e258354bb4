import pickle
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation import Tree, UniformAllocator
from allocation.arena.synthetic import POPULATIONS, Population, SyntheticWorld, mixture_quantile
from allocation.arena.worlds import replay
from allocation.calibration import auc
from allocation.predictor import path_text
from allocation.scheduler import Job

NAMES = sorted(POPULATIONS)


def rollout(world, tree, node, seed, origin="root"):
    """Carries out one rollout by hand; returns its nodes."""
    before = len(tree.nodes)
    job = Job(tree, node, origin, tree.num_rollouts)
    tree.num_rollouts += 1
    world.roll(job, np.random.default_rng(seed))
    return tree.nodes[before:]


def plain(nodes):
    """What a rollout looks like to an allocator."""
    return [
        (
            n.depth,
            n.action,
            n.observation,
            n.is_correct,
            n.terminated,
            len(n.sample.action_ids),
            n.sample.entropy,
            None if n.features is None else n.features.tolist(),
        )
        for n in nodes
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(0, 2**32),
    st.integers(0, 999),
    st.floats(0, 0.99),
    st.integers(1, 5),
    st.floats(0, 3),
)
def test_the_value_of_a_prefix_is_the_mean_of_the_values_one_turn_on(name, seed, prompt, movement, balls, spread):
    world = SyntheticWorld(name, seed, prompts=1000, movement=movement, balls=balls, weight_spread=spread)
    tree = world.open(prompt)
    rollout(world, tree, tree.root, seed)
    for node in tree.nodes:
        if node.terminal:
            continue
        state = world.state(tree, node)
        after = world.successors(state)
        chances, values = np.array([s.probability for s in after]), np.array([s.value for s in after])
        assert chances.sum() == pytest.approx(1, abs=1e-12) and (chances >= 0).all()
        assert ((values >= 0) & (values <= 1)).all()
        assert chances @ values == pytest.approx(world.value(tree, node), abs=1e-12)
        assert chances @ (values - state.value) ** 2 == pytest.approx(state.spread**2, abs=1e-12)
        child = tree.nodes[node.children[0]]
        value = world.value(tree, child)
        assert value in ([0.0, 1.0] if child.terminal else [s.value for s in after])
        assert child.terminal == state.last
        if child.terminal:
            assert value == float(child.is_correct) == child.reward


def test_the_true_value_is_what_the_whole_tree_below_gives_when_every_branch_is_followed():
    world = SyntheticWorld(turns=(1, 3), balls=2, prompts=50)

    def mean_outcome(state, prompt):
        total = 0.0
        for after in world.successors(state):
            # Whatever the variant above the balls, the turns after it are fair.
            action = after.bits + (7 << (1 if state.last else 2))
            below = after.value if state.last else mean_outcome(world._after(state, action, prompt), prompt)
            total += after.probability * below
        return total

    for number in range(50):
        assert mean_outcome(world._root(number), world._prompt(number)) == pytest.approx(
            world.root_values([number])[0], abs=1e-12
        )


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_succeed_as_often_as_the_value_says_from_roots_and_from_prefixes(name):
    world, pulls = SyntheticWorld(name, 3), []
    for prompt in range(60):
        tree = world.open(prompt)
        first = rollout(world, tree, tree.root, prompt)
        for anchor in [tree.root, *first[:-1]][:3]:
            value, origin = world.value(tree, anchor), "continuation" if anchor.depth else "root"
            ends = [rollout(world, tree, anchor, [prompt, anchor.depth, i], origin)[-1] for i in range(20)]
            pulls.append((sum(n.is_correct for n in ends), 20 * value, 20 * value * (1 - value)))
            assert all(n.origin == origin for n in ends)
    seen, expected, variance = np.array(pulls).T
    z = (seen - expected).sum() / np.sqrt(variance.sum())
    assert abs(z) < 4.5
    # Not only on average: squared deviations are those of binomial draws (their spread is from 180 groups).
    assert ((seen - expected) ** 2).sum() / variance.sum() == pytest.approx(1, abs=0.6)


def test_values_move_by_the_dial_and_bottlenecks_decide_in_one_turn():
    def decided_before_the_end(**dials):
        world, shares = SyntheticWorld(turns=(6, 6), weight_spread=0.0, **dials), []
        for prompt in range(300):
            tree = world.open(prompt)
            path = [tree.root, *rollout(world, tree, tree.root, prompt)]
            v = np.array([world.value(tree, n) for n in path])
            shares.append([*(v[1:] - v[:-1]) ** 2, v[0] * (1 - v[0])])
        moved = np.array(shares)
        return moved[:, :5].sum() / moved[:, 6].sum(), np.sort(moved[:, :5], axis=1)[:, -1].sum() / moved[:, :5].sum()

    slow, fast = decided_before_the_end(movement=0.05)[0], decided_before_the_end(movement=0.6)[0]
    assert slow == pytest.approx(1 - 0.95**5, abs=0.08) and fast == pytest.approx(1 - 0.4**5, abs=0.1)
    one_turn = decided_before_the_end(movement=0.005, bottleneck=1000.0)[1]
    gradual = decided_before_the_end(movement=0.2)[1]
    assert one_turn > 0.95 > 0.8 > gradual


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_a_function_of_seed_prompt_and_path(name):
    one, other = SyntheticWorld(name, 5), SyntheticWorld(name, 5)
    for prompt in (0, 17, 9_999):
        a, b = one.open(prompt), other.open(prompt)
        assert plain(rollout(one, a, a.root, 1)) == plain(rollout(other, b, b.root, 1))
        # The order of rollouts and what else is in the tree make no difference.
        rollout(other, b, b.root, 2)
        anchor = next((n for n in a.nodes if n.depth == 1 and not n.terminal), a.root)
        left, right = rollout(one, a, anchor, 3), rollout(other, b, b.nodes[anchor.id], 3)
        assert plain(left) == plain(right)
        assert [one.value(a, n) for n in left] == [other.value(b, n) for n in right]
    elsewhere = SyntheticWorld(name, 6).root_values(np.arange(50))
    assert not np.allclose(elsewhere, one.root_values(np.arange(50)), atol=1e-3)


def test_a_state_that_was_dropped_is_worked_out_again():
    world = SyntheticWorld("recoverable")
    tree = world.open(4)
    rollout(world, tree, tree.root, 0)
    states = [world.state(tree, n) for n in tree.nodes if not n.terminal]
    tree.drop_snapshots()
    assert [world.state(tree, n) for n in tree.nodes if not n.terminal] == states


def test_continuations_of_one_prefix_are_independent_and_differ():
    world = SyntheticWorld("recoverable")
    tree = world.open(1)
    first = rollout(world, tree, tree.root, 0)
    anchor = first[2]
    ends = [rollout(world, tree, anchor, seed, "continuation") for seed in range(40)]
    assert len({tuple(n.action for n in nodes) for nodes in ends}) == 40
    assert {nodes[-1].is_correct for nodes in ends} == {True, False}
    assert all(nodes[0].parent == anchor.id for nodes in ends)


def test_root_values_follow_the_mixture():
    quantile = mixture_quantile(((1.0, 2.0, 5.0), (3.0, 6.0, 1.0)))
    rng = np.random.default_rng(0)
    component = rng.random(200_000) < 0.25
    draws = np.where(component, rng.beta(2, 5, 200_000), rng.beta(6, 1, 200_000))
    levels = np.linspace(0.02, 0.98, 25)
    assert np.allclose([quantile(u) for u in levels], np.quantile(draws, levels), atol=0.005)
    uniform = mixture_quantile(((1.0, 1.0, 1.0),))
    assert np.allclose([uniform(u) for u in levels], levels, atol=1e-4)
    assert 0 < uniform(1e-12) < uniform(1 - 1e-12) < 1


def hidden_auc(**dials):
    """How well the hidden state tells, along its best linear direction, prefixes above one half from those below."""
    world = SyntheticWorld("balanced", 1, **dials)
    forest = replay(world, UniformAllocator(2), 800, np.random.default_rng(0))
    rows = [(n.features, world.value(t, n)) for t in forest for n in t.nodes if not n.terminal]
    features, values = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    half = len(rows) // 2
    logit = np.log(values / (1 - values)).clip(-5, 5)
    solution = np.linalg.lstsq(features[:half], logit[:half], rcond=None)[0]
    return auc(1 / (1 + np.exp(-features[half:] @ solution)), values[half:] > 0.5)


def test_hidden_states_tell_as_much_as_the_dial_says():
    found = [hidden_auc(feature_noise=noise) for noise in (0.0, 0.3, 1.0, 3.0, 100.0)]
    assert found[0] > 0.999 and found == sorted(found, reverse=True)
    assert found[1] > 0.98 and 0.9 < found[2] < 0.97 and 0.7 < found[3] < 0.87 and found[4] < 0.6


def test_texts_and_hidden_states_never_hold_the_value_itself():
    world = SyntheticWorld()
    tree = world.open(3)
    end = rollout(world, tree, tree.root, 0)[-1]
    text = " ".join(path_text(tree, end))
    assert text.count("it looks like ") == end.depth and str(world.value(tree, tree.root)) not in text
    blind = SyntheticWorld(feature_dim=0)
    tree = blind.open(3)
    rollout(blind, tree, tree.root, 0)
    assert all(n.features is None and n.observation == "" for n in tree.nodes)


def test_entropy_tells_where_the_next_turn_decides_and_tokens_are_heavy_tailed():
    world = SyntheticWorld("skewed")
    forest = replay(world, UniformAllocator(4), 1200, np.random.default_rng(0))
    rows = [
        (n.sample.entropy, world.state(t, t.nodes[n.parent]).spread, len(n.sample.action_ids), world.value(t, t.root))
        for t in forest
        for n in t.nodes[1:]
    ]
    entropy, spread, tokens, value = np.array(rows).T
    assert np.corrcoef(entropy, spread)[0, 1] > 0.85
    assert tokens.mean() > 1.2 * np.median(tokens) and np.quantile(tokens, 0.99) > 4 * np.median(tokens)
    assert tokens[value < 0.2].mean() > 1.4 * tokens[value > 0.9].mean()
    assert forest.ledger.generated_tokens == tokens.sum() and forest.ledger.environment_turns == len(tokens)


@pytest.mark.parametrize("count", [1, 10, 499, 500, 1000, 5000])
def test_draw_gives_different_prompts_each_as_likely(count):
    world = SyntheticWorld(prompts=1000)
    drawn = world.draw(np.random.default_rng(0), count)
    assert len(drawn) == min(count, 1000) == len(set(drawn.tolist())) and drawn.min() >= 0 and drawn.max() < 1000
    if count < 100:
        seen = np.bincount(
            np.concatenate([world.draw(np.random.default_rng(i), count) for i in range(20_000 // count)]),
            minlength=1000,
        )
        assert abs(seen[:500].sum() / seen.sum() - 0.5) < 0.02 and seen.max() < 60


def test_of_two_counts_the_smaller_gets_a_head_of_what_the_larger_gets():
    world = SyntheticWorld(prompts=1000)
    few, many = (world.draw(np.random.default_rng(4), count) for count in (30, 450))
    assert few.tolist() == many[:30].tolist()


def test_memory_does_not_grow_with_the_population():
    sizes, peaks = [], []
    for prompts in (100_000, 10**6):
        world = SyntheticWorld("skewed", prompts=prompts)
        tracemalloc.start()
        replay(world, UniformAllocator(8), 256, np.random.default_rng(0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(len(pickle.dumps(world)))
    assert sizes[0] == pytest.approx(sizes[1], abs=16) and peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"turns": (3, 2)}, "turns must be"),
        ({"movement": 1.0}, "movement must be"),
        ({"roots": ()}, "roots must be"),
        ({"roots": ((1.0, 0.0, 1.0),)}, "roots must be"),
        ({"colour": 1}, "unknown dials colour"),
    ],
)
def test_dials_out_of_range_are_refused(dials, message):
    with pytest.raises(ValueError, match=message):
        SyntheticWorld(**dials)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown population 'hard'; known: balanced, "):
        SyntheticWorld("hard")
    with pytest.raises(ValueError, match=r"prompt must lie in \[0, 10\), got 10"):
        SyntheticWorld(prompts=10).open(10)


def test_every_dial_is_documented():
    assert all(f"\n        {f.name}: " in Population.__doc__ for f in fields(Population))
    assert isinstance(SyntheticWorld().open(0), Tree)
