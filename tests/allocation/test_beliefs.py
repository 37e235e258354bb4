import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocation.beliefs import KAPPA_BOUNDS, BetaBeliefs, fit_kappa, fit_rho, log_gamma


def test_a_belief_is_the_prediction_plus_the_counts():
    beliefs = BetaBeliefs()
    beliefs.update("a", 3, 1)
    alpha, beta = beliefs.belief(["a", "new"], [0.25, 0.5], 4.0)
    np.testing.assert_allclose(alpha, [1 + 3, 2])
    np.testing.assert_allclose(beta, [3 + 1, 2])
    alpha, _ = beliefs.belief(["a", "new"], [0.25, 0.5], [8.0, 2.0])
    np.testing.assert_allclose(alpha, [2 + 3, 1])


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 9), st.floats(0, 9)), max_size=30), st.floats(0.1, 1.0))
def test_lazy_decay_equals_decaying_every_count(events, decay):
    beliefs, s, f = BetaBeliefs(decay=decay), 0.0, 0.0
    for is_decay, up, down in events:
        if is_decay:
            beliefs.decay()
            s, f = s * decay, f * decay
        else:
            beliefs.update("a", up, down)
            s, f = s + up, f + down
    np.testing.assert_allclose(beliefs.counts("a"), (s, f), rtol=1e-9)


def test_keys_whose_counts_have_faded_are_forgotten():
    beliefs = BetaBeliefs(decay=0.5)
    for clock in range(200):
        beliefs.update(f"prompt {clock}", 1, 0)
        beliefs.update("every time", 1, 3)
        beliefs.decay()
    # Twenty updates fade a count below a millionth; keys are looked through every 50 updates.
    assert len(beliefs) <= 71 and beliefs.counts("prompt 0") == (0.0, 0.0)
    assert beliefs.last_sampled(["prompt 0", "prompt 199", "every time"]).tolist() == [-1, 199, 199]
    assert beliefs.counts("every time")[1] == pytest.approx(3.0)


def test_certain_predictions_are_clipped_and_bad_ones_are_named():
    beliefs = BetaBeliefs(epsilon=0.01)
    alpha, beta = beliefs.belief(["a", "b"], [0.0, 1.0], 2.0)
    np.testing.assert_allclose([*alpha, *beta], [0.02, 1.98, 1.98, 0.02])
    for bad in (math.nan, -0.1, 1.1, math.inf):
        with pytest.raises(ValueError, match=rf"'b' is {bad}"):
            beliefs.belief(["a", "b"], [0.5, bad], 2.0)
    with pytest.raises(ValueError, match="kappa"):
        beliefs.belief(["a"], [0.5], 0.0)
    with pytest.raises(ValueError, match="2 predictions"):
        beliefs.belief(["a", "b"], [0.5], 1.0)
    for counts in ((-1, 0), (0, math.nan)):
        with pytest.raises(ValueError, match="'c'"):
            beliefs.update("c", *counts)
    assert len(beliefs) == 0
    assert beliefs.belief([], [], 1.0)[0].shape == (0,)


def test_last_sampled_counts_policy_updates():
    beliefs = BetaBeliefs()
    beliefs.update("a", 1, 0)
    beliefs.decay()
    beliefs.update("b", 0, 2)
    assert beliefs.last_sampled(["a", "b", "c"]).tolist() == [0, 1, -1]
    assert beliefs.clock == 1


def test_state_survives_json():
    beliefs = BetaBeliefs(decay=0.8)
    beliefs.update("a", 3, 1)
    beliefs.decay()
    beliefs.update("b", 0.5, 0.5)
    fresh = BetaBeliefs()
    fresh.load_state_dict(json.loads(json.dumps(beliefs.state_dict())))
    assert fresh.state_dict() == beliefs.state_dict()
    assert fresh.counts("a") == beliefs.counts("a") == (pytest.approx(2.4), pytest.approx(0.8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "schema 9"),
        ({"counts": {"q7": [1]}}, "'q7'"),
        ({"counts": {"q7": [1, -1, 0]}}, "'q7'"),
        ({"counts": {"q7": [1, 1, 5]}}, "'q7'"),
        ({"counts": None}, "incomplete"),
        ({"decay": 3.0}, "decay"),
    ],
)
def test_a_bad_state_changes_nothing(change, message):
    beliefs = BetaBeliefs()
    beliefs.update("a", 1, 1)
    before = beliefs.state_dict()
    with pytest.raises(ValueError, match=message):
        beliefs.load_state_dict(before | change)
    with pytest.raises(ValueError, match="clock"):
        beliefs.load_state_dict({k: v for k, v in before.items() if k != "clock"})
    assert beliefs.state_dict() == before


@given(st.floats(1e-4, 1e6))
def test_log_gamma(x):
    assert float(log_gamma(x)) == pytest.approx(math.lgamma(x), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kappa", [2.0, 10.0, 40.0])
def test_fit_kappa_recovers_the_concentration(kappa):
    rng = np.random.default_rng(0)
    v = rng.uniform(0.1, 0.9, 3000)
    p = rng.beta(kappa * v, kappa * (1 - v))
    s = rng.binomial(16, p)
    assert fit_kappa(v, s, 16 - s) == pytest.approx(kappa, rel=0.15)


def test_fit_kappa_trusts_good_predictions_and_distrusts_useless_ones():
    rng = np.random.default_rng(1)
    v = rng.uniform(0, 1, 2000)
    good, useless = rng.binomial(8, v), rng.binomial(8, rng.permutation(v))
    assert fit_kappa(v, good, 8 - good) > 60
    assert fit_kappa(v, useless, 8 - useless) < 2
    assert fit_kappa(v, 8 * (v < 0.5), 8 * (v >= 0.5)) == KAPPA_BOUNDS[0]


def test_fit_kappa_without_information_is_the_lower_bound():
    assert fit_kappa([], [], []) == KAPPA_BOUNDS[0]
    assert fit_kappa([0.2, 0.9], [1, 0], [0, 1]) == KAPPA_BOUNDS[0]
    with pytest.raises(ValueError, match="entry 1 is nan"):
        fit_kappa([0.5, math.nan], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="shape"):
        fit_kappa([0.5], [1, 1], [1, 1])


def test_fit_kappa_is_the_maximum_of_a_fine_grid():
    rng = np.random.default_rng(2)
    v, s, f = rng.uniform(0.05, 0.95, 40), rng.integers(0, 9, 40), rng.integers(0, 9, 40)

    def likelihood(kappa: float) -> float:
        out = 0.0
        for vi, si, fi in zip(v, s, f, strict=True):
            a, b = kappa * vi, kappa * (1 - vi)
            out += math.lgamma(a + si) - math.lgamma(a) + math.lgamma(b + fi) - math.lgamma(b)
            out += math.lgamma(kappa) - math.lgamma(kappa + si + fi)
        return out

    assert likelihood(fit_kappa(v, s, f)) >= max(likelihood(k) for k in np.geomspace(*KAPPA_BOUNDS, 400)) - 1e-6


def test_rho_is_the_correlation_of_outcomes_around_the_prediction():
    rng = np.random.default_rng(3)
    v, rho = rng.uniform(0.2, 0.8, 4000), 0.25
    kappa = 1 / rho - 1
    drawn = rng.binomial(8, rng.beta(kappa * v, kappa * (1 - v)))
    assert fit_rho(v, drawn, 8 - drawn) == pytest.approx(rho, abs=0.02)
    independent = rng.binomial(8, v)
    assert fit_rho(v, independent, 8 - independent) < 0.02
    assert fit_rho([0.5, 0.9], [1, 0], [0, 1]) is None and fit_rho([], [], []) is None
