import numpy as np
import pytest
import torch
from bit_env import DepthPredictor, bit_vector, run

from allocation import (
    Forest,
    HiddenStatePredictor,
    MeanPredictor,
    Sample,
    TraceAllocator,
    TraceConfig,
    Tree,
    TreeAllocationWrapper,
)
from allocation.calibration import auc, brier
from allocation.predictor import (
    NUM_COUNTS,
    Anchor,
    anchor_of,
    anchors_of,
    counts_matrix,
    fit_report,
    other_outcomes,
    training_set,
)
from allocation.predictors.learned import LearningConfig

DIM = 8


def separable(n, seed, depths=(0, 3)):
    """Anchors whose success is decided by one direction of the hidden state, and its mirror image at prefixes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM)).astype(np.float32)
    depth = rng.choice(depths, size=n)
    y = (np.where(depth == 0, x[:, 0], -x[:, 0]) > 0).astype(float)
    return [Anchor(f, int(d), 8 - int(d), 0) for f, d in zip(x, depth, strict=True)], y


def taught(loss="mse", batches=25, **kwargs):
    predictor = HiddenStatePredictor(DIM, **{"loss": loss, "lr": 2e-3, "seed": 1, **kwargs})
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
    first, second = taught(batches=3), HiddenStatePredictor(DIM, lr=2e-3, seed=77)
    state = first.state_dict()
    second.load_state_dict(state)
    anchors, y = separable(64, 50)
    for _ in range(2):
        assert np.array_equal(first.predict(anchors), second.predict(anchors))
        assert first.update(anchors, y, np.ones(len(y))) == second.update(anchors, y, np.ones(len(y)))
    third = HiddenStatePredictor(DIM, lr=2e-3)
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
    state = predictor.state_dict()
    at_root = np.array([a.depth == 0 for a in anchors])
    assert len(state["roots"]["target"]) == len(state["prefixes"]["target"]) == 30
    assert np.array_equal(state["roots"]["target"][-at_root.sum() :], y[at_root])
    assert np.array_equal(state["roots"]["columns"]["0"][-1, :DIM], anchors[np.flatnonzero(at_root)[-1]].features)


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


def told(seed, rollouts=4, turns=4):
    """A tree with tokens, hidden states and texts, here and there without."""
    rng = np.random.default_rng(seed)
    tree = Tree("q", 0, "which city?", {"max_turns": 5})
    tree.root.features = rng.normal(size=DIM).astype(np.float32) if seed % 2 else None
    for rollout in range(rollouts):
        node = tree.nodes[int(rng.integers(len(tree.nodes)))] if rollout % 2 else tree.root
        node = tree.root if node.terminal else node
        origin = "continuation" if node.depth else "root"
        for turn in range(turns):
            logprobs = -rng.random(int(rng.integers(0, 4))).astype(np.float32)
            sample = Sample("go", np.zeros(len(logprobs), np.int64), logprobs, np.zeros(1, np.int64))
            features = rng.normal(size=DIM).astype(np.float32) if rng.random() < 0.8 else None
            last = turn == turns - 1
            node = tree.add(
                node, rollout, origin, f"act {turn}", turn, sample, terminated=last, features=features,
                is_correct=bool(rng.integers(2)) if last else None,
            )  # fmt: skip
    return tree


@pytest.mark.parametrize("tree_outcomes", [False, True])
def test_many_anchors_are_what_each_is_by_itself(tree_outcomes):
    trees = [told(seed) for seed in range(6)]
    pairs = [(t, n) for t in trees for n in t.nodes if not n.terminal]
    many = anchors_of(*zip(*pairs, strict=True), counts=lambda key: (3.0, 1.5), tree_outcomes=tree_outcomes)
    for (tree, node), anchor in zip(pairs, many, strict=True):
        known = tuple(other_outcomes(tree)[node.id]) if tree_outcomes else (0.0, 0.0)
        one = anchor_of(tree, node, (3.0, 1.5), known)
        for name in set(Anchor._fields) - {"features", "path_features", "render"}:
            assert getattr(anchor, name) == getattr(one, name), name
        assert anchor.features is one.features is node.features and anchor.text == one.text
        if one.path_features is None:
            assert anchor.path_features is None
        else:
            assert np.array_equal(anchor.path_features, one.path_features)


def test_an_anchor_s_text_is_its_path():
    tree = told(1, rollouts=1)
    node = tree.nodes[2]
    assert anchor_of(tree, node).text == ("which city?", "act 0", "0", "act 1", "1")
    assert anchor_of(tree, node).prompt == "which city?" and Anchor(None, 0, 1, 0).text == ()


def test_the_path_s_hidden_states_are_averaged_and_log_probabilities_kept():
    tree = Tree("q", 0, "prompt")
    tree.root.features = np.full(2, 1.0, np.float32)
    node = tree.root
    for logprobs, state in (([-1.0, -3.0], 2.0), ([-0.5], 6.0)):
        sample = Sample("", np.zeros(1, np.int64), np.array(logprobs, np.float32), np.zeros(0, np.int64))
        node = tree.add(node, 0, "root", sample=sample, features=np.full(2, state, np.float32))
    anchor = anchor_of(tree, node)
    assert anchor.path_features.tolist() == [3.0, 3.0]
    assert (anchor.last_logprob, anchor.least_logprob, anchor.total_logprob) == (-0.5, -2.0, -2.5)


def test_other_outcomes_leave_out_the_rollouts_through_a_node_and_continuations():
    for seed in range(8):
        tree = told(seed)
        for node, (up, down) in zip(tree.nodes, other_outcomes(tree).tolist(), strict=True):
            ends = [leaf.is_correct for leaf in tree.leaves("root") if node not in tree.path(leaf)]
            assert (up, down) == (sum(ends), len(ends) - sum(ends))


def test_the_counts_of_an_anchor():
    anchor = Anchor(None, 2, 4, 9, 3.0, 1.0, 0.0, 2.0, -0.5, -2.0, -2.5)
    row = counts_matrix([anchor])[0]
    expected = [0.25, 0.5, 1.0, 0.0, 4 / 6, np.log(5) / 3, 1 / 4, np.log(3) / 3, -0.5, -2.0, -2.5, -1.25]
    assert row == pytest.approx(expected, abs=1e-6) and len(row) == NUM_COUNTS
    assert counts_matrix([]).shape == (0, NUM_COUNTS)
    assert counts_matrix([Anchor(None, 0, 4, 0)])[0, 3] == 1.0


def test_the_words_of_the_prompt_can_be_learned_from():
    predictor = HiddenStatePredictor(0, lr=2e-3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        hard = rng.integers(2, size=60).astype(bool)
        anchors = [Anchor(None, 0, 5, 0, prompt=f"{'Why' if h else 'Who'} is it?") for h in hard]
        predictor.update(anchors, 1.0 - hard, np.ones(60))
    why, who, deaf = predictor.predict(
        [Anchor(None, 0, 5, 0, prompt="why is it?"), Anchor(None, 0, 5, 0, prompt="WHO is it?"), Anchor(None, 0, 5, 0)]
    )
    assert why < 0.2 and who > 0.8 and why < deaf < who


def test_old_rows_are_drawn_less_often_and_their_age_is_told():
    rows = {}
    for decay in (1.0, 0.5):
        predictor = HiddenStatePredictor(DIM, age_decay=decay, steps=0)
        for batch in range(4):
            anchors, y = separable(40, batch)
            rows[decay] = predictor.update(anchors, y, np.ones(40))
    counts = [sum(a.depth == 0 for a in separable(40, b)[0]) for b in range(4)]
    assert rows[1.0]["predictor/age_of_roots"] == pytest.approx(np.average([3, 2, 1, 0], weights=counts))
    weights = np.array(counts) * [1 / 8, 1 / 4, 1 / 2, 1]
    assert rows[0.5]["predictor/age_of_roots"] == pytest.approx(np.average([3, 2, 1, 0], weights=weights))


def test_learning_settings_out_of_range_are_named():
    for bad, message in (
        ({"lr": 0}, "lr"),
        ({"steps": -1}, "steps"),
        ({"age_decay": 0.0}, "age_decay"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; known: mse, log"),
    ):
        with pytest.raises(ValueError, match=message):
            LearningConfig(**bad)


def test_the_fit_report_scores_against_the_mean():
    values, weights = np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 2.0])
    perfect = fit_report(values, values, weights, 0.5)
    assert perfect["predictor/brier"] == 0.0 and perfect["predictor/skill"] == 1.0 and perfect["predictor/auc"] == 1.0
    assert fit_report(np.full(3, 0.5), values, weights, 0.5)["predictor/skill"] == 0.0
    assert "predictor/auc" not in fit_report(values, np.ones(3), weights, 0.5)


def test_the_fit_report_tells_depths_apart():
    rng = np.random.default_rng(0)
    depths = np.repeat([0, 1, 3, 9], [20, 20, 20, 7])
    values = rng.integers(2, size=67).astype(float)
    # Right at the roots, reversed one turn further.
    predicted = np.where(depths == 0, values, np.where(depths == 1, 1 - values, 0.5))
    report = fit_report(predicted, values, np.ones(67), 0.5, depths)
    assert report["predictor/auc/depth_0"] == 1.0 and report["predictor/skill/depth_0"] == 1.0
    assert report["predictor/auc/depth_1"] == 0.0 and report["predictor/skill/depth_1"] == -3.0
    assert report["predictor/auc/depth_2_3"] == 0.5 and report["predictor/skill/depth_2_3"] == 0.0
    assert "predictor/auc/depth_4_up" not in report, "seven anchors say nothing"
    for name in ("skill", "auc"):
        whole = fit_report(predicted, values, np.ones(67), 0.5)
        assert whole[f"predictor/{name}"] == report[f"predictor/{name}"]
