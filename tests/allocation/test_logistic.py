import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.predictor import Anchor
from allocation.predictors import HiddenStatePredictor, LogisticPredictor
from allocation.predictors.inputs import input_matrix

DIM = 3


def anchors_at(features, depths):
    return [
        Anchor(np.asarray(f, np.float32), int(d), 8 - int(d), 0, path_features=np.asarray(f, np.float32))
        for f, d in zip(features, depths, strict=True)
    ]


def remembered(batches, *, prior, age_decay):
    """Inputs, targets and counts of everything that a predictor was given, worked out from the docstring."""
    x = np.concatenate([input_matrix(a, DIM, 0) for a, _, _ in batches]).astype(np.float64)
    z = np.clip((x - x.mean(0)) / (x.std(0) + 1e-2), -5, 5)
    z = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    target = np.concatenate([v for _, v, _ in batches])
    age = np.concatenate([np.full(len(v), len(batches) - 1 - i) for i, (_, v, _) in enumerate(batches)])
    count = np.concatenate([w for _, _, w in batches]) * age_decay**age
    root = np.concatenate([[a.depth == 0 for a in anchors] for anchors, _, _ in batches])
    if root.any() and not root.all():
        count[~root] *= count[root].sum() / count[~root].sum()
    return z, target, count


@st.composite
def histories(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batches = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 20))
        features, depths = rng.normal(size=(n, DIM)), rng.integers(0, 3, n)
        batches.append((anchors_at(features, depths), rng.integers(0, 5, n) / 4, rng.integers(1, 9, n).astype(float)))
    return batches


@given(histories(), st.sampled_from([0.3, 10.0, 300.0]), st.sampled_from([0.5, 1.0]))
@settings(deadline=None, max_examples=40)
def test_the_fit_is_the_optimum_that_the_docstring_states(batches, prior, age_decay):
    predictor = LogisticPredictor(DIM, words=0, prior=prior, age_decay=age_decay)
    for batch in batches:
        predictor.update(*batch)
    z, target, count = remembered(batches, prior=prior, age_decay=age_decay)
    # The optimum by Newton's method, from zero.
    w, penalty = np.zeros(z.shape[1]), np.append(np.full(z.shape[1] - 1, prior), 1e-9)
    for _ in range(200):
        p = 1 / (1 + np.exp(-z @ w))
        slope = z.T @ (count * (p - target)) + penalty * w
        curvature = (z.T * (count * p * (1 - p))) @ z + np.diag(penalty)
        step = np.linalg.solve(curvature, slope)
        w -= step / max(1.0, np.abs(step).max())
        if np.abs(w[-1]) > 10:
            return  # all outcomes alike: the constant, which has no prior, has no optimum
    got = predictor.predict([a for anchors, _, _ in batches for a in anchors])
    assert np.abs(got - 1 / (1 + np.exp(-z @ w))).max() < 2e-3


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(0)
    features, depths, values = rng.normal(size=(30, DIM)), rng.integers(0, 3, 30), rng.random(30)
    one, other = LogisticPredictor(DIM), LogisticPredictor(DIM)
    anchors, order = anchors_at(features, depths), rng.permutation(30)
    one.update(anchors, values, np.ones(30))
    other.update([anchors[i] for i in order], values[order], np.ones(30))
    np.testing.assert_allclose(one.predict(anchors), other.predict(anchors), atol=1e-3)


def test_the_first_batch_is_learned_at_once_where_a_head_has_hardly_moved():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(256, DIM))
    values = (features[:, 0] > 0).astype(float)
    anchors = anchors_at(features, rng.integers(0, 3, 256))
    found = {}
    for predictor in (LogisticPredictor(DIM), HiddenStatePredictor(DIM)):
        predictor.update(anchors, values, np.ones(256))
        found[type(predictor)] = np.abs(predictor.predict(anchors) - values).mean()
    assert found[LogisticPredictor] < 0.35 < 0.45 < found[HiddenStatePredictor]


def test_a_narrow_prior_believes_few_outcomes_less():
    anchors = anchors_at([[1, 0, 0], [-1, 0, 0]] * 4, [0] * 8)
    values = np.array([1.0, 0.0] * 4)
    wide, narrow = (LogisticPredictor(DIM, words=0, prior=prior) for prior in (1.0, 1000.0))
    for predictor in (wide, narrow):
        predictor.update(anchors, values, np.ones(8))
    assert wide.predict(anchors)[0] > 0.8 and 0.5 < narrow.predict(anchors)[0] < 0.52
    assert wide.ready and not LogisticPredictor(DIM).ready


def test_outcomes_that_are_all_alike_are_survived():
    anchors = anchors_at(np.eye(DIM), [0, 1, 2])
    predictor = LogisticPredictor(DIM)
    for _ in range(30):
        predictor.update(anchors, np.zeros(3), np.ones(3))
    assert ((predictor.predict(anchors) >= 0) & (predictor.predict(anchors) < 0.1)).all()
    predictor.update(anchors, np.ones(3), np.full(3, 1e4))
    assert (predictor.predict(anchors) > 0.9).all()


def test_bad_settings_and_states_are_refused():
    with pytest.raises(ValueError, match="prior must be positive, got 0"):
        LogisticPredictor(DIM, prior=0)
    with pytest.raises(ValueError, match="warmup_roots must be >= 0, got -1"):
        LogisticPredictor(DIM, warmup_roots=-1)
    with pytest.raises(ValueError, match="hidden states of size 3, got 4"):
        LogisticPredictor(DIM).predict(anchors_at(np.zeros((1, 4)), [0]))
    with pytest.raises(ValueError, match="the state has 16 weights, this predictor 17"):
        LogisticPredictor(4, words=0).load_state_dict(LogisticPredictor(3, words=0).state_dict())
