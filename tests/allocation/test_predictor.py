import numpy as np
import pytest
import torch
from bit_env import DepthPredictor, bit_vector, run

from allocation import (
    Forest,
    HiddenStatePredictor,
    MeanPredictor,
    TraceAllocator,
    TraceConfig,
    Tree,
    TreeAllocationWrapper,
)
from allocation.calibration import auc, brier
from allocation.predictor import Anchor, anchor_of, fit_report, training_set

DIM = 8


def separable(n, seed, depths=(0, 3)):
    """Anchors whose success is decided by one direction of the hidden state, and its mirror image at prefixes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    depth = rng.choice(depths, size=n)
    y = (np.where(depth == 0, x[:, 0], -x[:, 0]) > 0).astype(float)
    return [Anchor(f, int(d), 8 - int(d), 0) for f, d in zip(x, depth, strict=True)], y


def taught(loss="mse", batches=25, **kwargs):
    predictor = HiddenStatePredictor(DIM, loss=loss, seed=1, **kwargs)
    for batch in range(batches):
        anchors, y = separable(64, batch)
        predictor.update(anchors, y, np.ones(len(y)))
    return predictor


@pytest.mark.parametrize("loss", ["mse", "log"])
def test_it_learns_roots_and_prefixes_and_beats_the_mean_on_new_anchors(loss):
    predictor = taught(loss)
    anchors, y = separable(500, 999)
    p = predictor.predict(anchors)
    ones = np.ones(len(y))
    assert ((p > 0) & (p < 1)).all() and auc(p, y > 0.5) > 0.9
    assert brier(p, y, ones) < 0.6 * brier(np.full_like(p, y.mean()), y, ones)
    for depth in (0, 3):
        at = np.array([a.depth == depth for a in anchors])
        assert auc(p[at], y[at] > 0.5) > 0.9


def test_weights_count():
    anchors = [Anchor(np.ones(DIM, np.float32), 1, 2, 0)] * 100
    predictor = HiddenStatePredictor(DIM, steps=300, lr=1e-2)
    predictor.update(anchors, np.array([1.0, 0.0] * 50), np.array([9.0, 1.0] * 50))
    assert predictor.predict(anchors[:1])[0] == pytest.approx(0.9, abs=0.07)


def test_a_restored_predictor_continues_bit_for_bit():
    first, second = taught(batches=3), HiddenStatePredictor(DIM, seed=77)
    state = first.state_dict()
    second.load_state_dict(state)
    anchors, y = separable(64, 50)
    for _ in range(2):
        assert np.array_equal(first.predict(anchors), second.predict(anchors))
        assert first.update(anchors, y, np.ones(len(y))) == second.update(anchors, y, np.ones(len(y)))
    third = HiddenStatePredictor(DIM)
    third.load_state_dict(state)
    again = taught(batches=3)
    for predictor in (third, again):
        predictor.update(anchors, y, np.ones(len(y)))
    assert np.array_equal(third.predict(anchors), again.predict(anchors)), "the state was changed by whoever loaded it"


def test_it_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (
        HiddenStatePredictor(DIM, seed=3),
        HiddenStatePredictor(DIM, seed=3),
        HiddenStatePredictor(DIM),
    )
    anchors, y = separable(40, 0)
    results = []
    for predictor in (first, second, other):
        predictor.update(anchors, y, np.ones(len(y)))
        results.append(predictor.predict(anchors))
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])
    assert torch.equal(before, torch.get_rng_state())


def test_readiness_needs_roots():
    predictor = HiddenStatePredictor(DIM, warmup_roots=10)
    prefixes, y = separable(50, 0, depths=(2,))
    predictor.update(prefixes, y, np.ones(50))
    assert not predictor.ready
    roots, y = separable(10, 0, depths=(0,))
    predictor.update(roots, y, np.ones(10))
    assert predictor.ready
    restored = HiddenStatePredictor(DIM, warmup_roots=10)
    restored.load_state_dict(predictor.state_dict())
    assert restored.ready


def test_old_rows_leave_the_replay():
    predictor = HiddenStatePredictor(DIM, capacity=30, steps=0)
    for batch in range(3):
        anchors, y = separable(40, batch)
        predictor.update(anchors, y, np.ones(40))
    replay = predictor.state_dict()["replay"]
    roots = sum(a.depth == 0 for a in anchors)
    assert len(replay["roots"]["y"]) == len(replay["prefixes"]["y"]) == 30
    assert np.array_equal(replay["roots"]["x"][-roots:], np.stack([a.vector() for a in anchors if a.depth == 0]))


def test_hidden_states_of_another_size_are_named():
    anchor = Anchor(np.zeros(4, np.float32), 0, 3, 0)
    with pytest.raises(ValueError, match="made for hidden states of size 8, got 4"):
        HiddenStatePredictor(DIM).predict([anchor])


def test_anchors_without_hidden_states_can_stand_among_others():
    # A prompt too long for the model was never encoded.
    predictor = HiddenStatePredictor(DIM)
    anchors, y = separable(10, 0)
    anchors.append(Anchor(None, 0, 3, 0))
    predictor.update(anchors, np.append(y, 0.0), np.ones(11))
    p = predictor.predict(anchors)
    assert p.shape == (11,) and np.isfinite(p).all() and predictor.predict([]).shape == (0,)
    assert predictor.predict(anchors[-1:])[0] == pytest.approx(p[-1])


def test_counts_alone_can_be_learned_from():
    predictor = HiddenStatePredictor(0, steps=200, lr=1e-2)
    anchors = [Anchor(None, 0, 5, 0, s, 10.0 - s) for s in (0.0, 10.0)] * 20
    predictor.update(anchors, np.array([0.0, 1.0] * 20), np.ones(40))
    low, high = predictor.predict(anchors[:2])
    assert low < 0.2 and high > 0.8


def test_the_running_mean():
    mean = MeanPredictor(decay=0.5)
    anchors, _ = separable(4, 0)
    assert mean.predict(anchors).tolist() == [0.5] * 4 and not mean.ready
    mean.update(anchors, np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    assert mean.predict(anchors[:1])[0] == pytest.approx((0.25 + 3) / (0.5 + 4))
    other = MeanPredictor(decay=0.5)
    other.load_state_dict(mean.state_dict())
    assert other.predict(anchors[:1]) == mean.predict(anchors[:1])


def test_the_training_set_has_every_inner_node_with_its_value_and_leaves():
    allocator = TraceAllocator(DepthPredictor(), TraceConfig(continuations=1.0, cap_per_rollout=None))
    forest = run(TreeAllocationWrapper(bit_vector(4), allocator=allocator, budget=24))
    rows = training_set(forest)
    for tree, node, value, weight in rows:
        below = [leaf for leaf in tree.leaves() if node in tree.path(leaf)]
        assert weight == len(below) > 0 and not node.terminal
        kids = [tree.values("success")[c] for c in node.children]
        assert value == pytest.approx(np.mean(kids))
    assert len(rows) == sum(not n.terminal for t in forest for n in t.nodes)
    assert training_set(Forest([Tree("empty", 0, "prompt")])) == []


def test_an_anchor_knows_depth_turns_left_and_errors():
    tree = Tree("q", 0, "prompt", {"max_turns": 3})
    node = tree.add(tree.add(tree.root, 0, "root"), 0, "root", tool_errors=1)
    anchor = anchor_of(tree, node, (2.0, 1.0))
    assert (anchor.depth, anchor.turns_left, anchor.tool_errors) == (2, 1, 1)
    assert (anchor.successes, anchor.failures) == (2.0, 1.0)
    assert anchor_of(Tree("q", 0, "prompt"), tree.root).turns_left == 0


def test_the_fit_report_scores_against_the_mean():
    values, weights = np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 2.0])
    perfect = fit_report(values, values, weights, 0.5)
    assert perfect["predictor/brier"] == 0.0 and perfect["predictor/skill"] == 1.0 and perfect["predictor/auc"] == 1.0
    assert fit_report(np.full(3, 0.5), values, weights, 0.5)["predictor/skill"] == 0.0
    assert "predictor/auc" not in fit_report(values, np.ones(3), weights, 0.5)
