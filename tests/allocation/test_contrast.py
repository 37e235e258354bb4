import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocation.contrast import (
    ROOT_VALUES,
    BetaBinomial,
    PlugIn,
    Posterior,
    RootValue,
    Signal,
    exact_contrast,
    flip_success,
    power_moments,
    root_value,
)

parameter = st.floats(1e-3, 1e3)
pairs = st.lists(st.tuples(parameter, parameter), min_size=1, max_size=8).map(lambda p: np.array(p).T)


@pytest.mark.parametrize("name", sorted(ROOT_VALUES))
@given(pairs=pairs, m_max=st.integers(1, 24))
def test_root_values_start_at_zero_never_fall_and_are_concave_from_one(name, pairs, m_max):
    value = ROOT_VALUES[name]
    assert isinstance(value, RootValue)
    f = value.table(*pairs, m_max)
    assert f.shape == (pairs.shape[1], m_max + 1)
    assert not f[:, :2].any()
    increments = np.diff(f, axis=1)
    assert (increments >= 0).all()
    assert (np.diff(increments[:, 1:], axis=1) <= 1e-12).all()


@given(v=st.floats(0.001, 0.999), m_max=st.integers(2, 32))
def test_plug_in_formula(v, m_max):
    m = np.arange(m_max + 1)
    expected = np.where(m == 0, 0.0, 1 - v**m - (1 - v) ** m)
    np.testing.assert_allclose(PlugIn().table([3 * v], [3 * (1 - v)], m_max)[0], expected, atol=1e-12)


def test_plug_in_keeps_its_relative_accuracy_for_hopeless_prompts():
    f = PlugIn().table([1e-12], [1 - 1e-12], 4)[0]
    np.testing.assert_allclose(f[2:], [2e-12, 3e-12, 4e-12], rtol=1e-9)


@given(a=st.integers(1, 12), b=st.integers(1, 12), m_max=st.integers(1, 16))
def test_posterior_equals_exact_fractions(a, b, m_max):
    def moment(x: int, m: int) -> Fraction:
        out = Fraction(1)
        for j in range(m):
            out *= Fraction(x + j, a + b + j)
        return out

    expected = [0.0] + [float(1 - moment(a, m) - moment(b, m)) for m in range(1, m_max + 1)]
    np.testing.assert_allclose(Posterior().table([a], [b], m_max)[0], expected, atol=1e-13)


@pytest.mark.parametrize(("a", "b", "r"), [(1.5, 2.5, 0.3), (4.0, 1.2, 0.85), (2.0, 3.0, 0.5), (2.0, 3.0, 0.0)])
def test_posterior_flip_equals_numerical_integration_for_any_outcome(a, b, r):
    p = (np.arange(200_000) + 0.5) / 200_000
    density = p ** (a - 1) * (1 - p) ** (b - 1)
    q = r * p + (1 - r) * (1 - p)
    expected = [1 - np.average(q**k, weights=density) for k in range(9)]
    g = flip_success([a], [b], [r], 8, belief="posterior")[0]
    np.testing.assert_allclose(g, expected, atol=2e-5)


@given(pairs=pairs, r=st.floats(0, 1), k_max=st.integers(0, 12))
def test_the_graded_posterior_is_continuous_with_the_binary_one_and_concave(pairs, r, k_max):
    n = pairs.shape[1]
    g = flip_success(*pairs, np.full(n, r), k_max, belief="posterior")
    increments = np.diff(g, axis=1)
    assert (increments >= 0).all() and (np.diff(increments, axis=1) <= 1e-12).all()
    nearly = flip_success(*pairs, np.full(n, 1 - 1e-9), k_max, belief="posterior")
    np.testing.assert_allclose(nearly, flip_success(*pairs, np.ones(n), k_max, belief="posterior"), atol=1e-6)


@given(v=st.floats(0.01, 0.99), r=st.floats(0, 1))
def test_plug_in_is_the_limit_of_the_posterior(v, r):
    a, b = [1e9 * v], [1e9 * (1 - v)]
    np.testing.assert_allclose(Posterior().table(a, b, 16), PlugIn().table(a, b, 16), atol=1e-6)
    sharp = flip_success(a, b, [r], 16, belief="posterior")
    np.testing.assert_allclose(sharp, flip_success(a, b, [r], 16), atol=1e-6)
    np.testing.assert_allclose(exact_contrast(a, b, 16, belief="posterior"), exact_contrast(a, b, 16), atol=1e-6)


@given(v=st.floats(0.01, 0.99), r=st.floats(0, 1))
def test_plug_in_flip_formula(v, r):
    q = r * v + (1 - r) * (1 - v)
    np.testing.assert_allclose(flip_success([v], [1 - v], [r], 10)[0], 1 - q ** np.arange(11), atol=1e-12)


@given(v=st.floats(0.01, 0.99), k_max=st.integers(1, 10))
def test_exact_contrast_is_the_flip_averaged_over_the_outcome(v, k_max):
    a, b = [5 * v], [5 * (1 - v)]
    averaged = v * flip_success(a, b, [1.0], k_max) + (1 - v) * flip_success(a, b, [0.0], k_max)
    np.testing.assert_allclose(exact_contrast(a, b, k_max), averaged, atol=1e-12)
    assert exact_contrast(a, b, 1)[0, 1] == pytest.approx(2 * v * (1 - v))


def test_beta_binomial_bridges_plug_in_and_posterior():
    a, b = np.array([2.0, 0.4]), np.array([3.0, 3.6])
    np.testing.assert_allclose(BetaBinomial(0.0).table(a, b, 8), PlugIn().table(a, b, 8))
    # A Beta of concentration c has intra-class correlation 1 / (1 + c).
    for i in range(2):
        rho = 1 / (1 + a[i] + b[i])
        np.testing.assert_allclose(
            BetaBinomial(rho).table(a[i : i + 1], b[i : i + 1], 8), Posterior().table(a[i : i + 1], b[i : i + 1], 8)
        )
    with pytest.raises(ValueError, match="rho"):
        BetaBinomial(1.0)


def test_the_baselines_values():
    v = np.array([0.1, 0.45, 0.8])
    pcl = ROOT_VALUES["pcl"].table(v, 1 - v, 6)
    np.testing.assert_allclose(pcl[:, 2], [0.2, 0.9, 0.4])
    assert (pcl[:, 2:] == pcl[:, 2:3]).all()
    vip = ROOT_VALUES["vip"].table(v, 1 - v, 6)
    np.testing.assert_allclose(
        -np.diff(vip[:, 2:], axis=1), v[:, None] * (1 - v[:, None]) * np.diff(1 / np.arange(1, 6))
    )
    knapsack = ROOT_VALUES["knapsack"].table(v, 1 - v, 6)
    np.testing.assert_allclose(knapsack[:, 3], (1 - v**3 - (1 - v) ** 3) * v * (1 - v) ** 2)
    uniform = ROOT_VALUES["uniform"].table(v, 1 - v, 6)
    np.testing.assert_allclose(uniform, np.tile(uniform[0], (3, 1)))


def test_moments_of_extreme_beliefs_are_finite():
    moments = power_moments([1e-300, 1e300, 1e-3], [1.0, 1e300, 1e6], 64)
    assert np.isfinite(moments).all() and (moments >= 0).all() and (moments <= 1).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"beta\[1\] is nan"):
        PlugIn().table([1.0, 1.0], [1.0, np.nan], 4)
    with pytest.raises(ValueError, match=r"alpha\[0\] is 0"):
        PlugIn().table([0.0], [1.0], 4)
    with pytest.raises(ValueError, match=r"outcome\[0\] is 1.5"):
        flip_success([1.0], [1.0], [1.5], 4)
    with pytest.raises(ValueError, match="known: plug_in, posterior"):
        flip_success([1.0], [1.0], [1.0], 4, belief="no")
    with pytest.raises(ValueError, match="known: beta_binomial, knapsack, pcl"):
        root_value("no")
    assert root_value("beta_binomial", rho=0.3) == BetaBinomial(0.3)


@given(a=st.integers(1, 12), b=st.integers(1, 12), m=st.integers(2, 16))
def test_signal_is_the_expected_variance_within_a_group(a, b, m):
    expected = Fraction(0)
    for s in range(m + 1):
        chance = Fraction(math.comb(m, s))
        for j in range(m):
            chance *= Fraction(a + j if j < s else b + j - s, a + b + j)
        expected += chance * Fraction(s, m) * (1 - Fraction(s, m))
    assert Signal().table([a], [b], m)[0, m] == pytest.approx(float(expected), abs=1e-13)


@pytest.mark.parametrize(("a", "b"), [(0.4, 2.5), (1.5, 1.2), (30.0, 3.0)])
def test_signal_equals_numerical_integration(a, b):
    x = (np.arange(400_000) + 0.5) / 400_000
    p = x**4 / (x**4 + (1 - x) ** 4)  # denser where the density may be unbounded
    weight = p ** (a - 1) * (1 - p) ** (b - 1) * 4 * (x * (1 - x)) ** 3 / (x**4 + (1 - x) ** 4) ** 2
    f = Signal().table([a], [b], 8)[0]
    np.testing.assert_allclose(f[2:], np.average(p * (1 - p), weights=weight) * (1 - 1 / np.arange(2, 9)), rtol=1e-5)
