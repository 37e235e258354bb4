import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocation.calibration import auc, brier, brier_skill, expected_calibration_error, reliability, running_mean

binary = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 1.0]), st.integers(0, 1)), min_size=1, max_size=40
)


@given(binary)
def test_auc_equals_its_definition(rows):
    ups, downs = [v for v, y in rows if y], [v for v, y in rows if not y]
    result = auc(*np.array(rows, dtype=float).T)
    if not ups or not downs:
        assert math.isnan(result)
    else:
        wins = sum((u > d) + 0.5 * (u == d) for u in ups for d in downs)
        assert result == pytest.approx(wins / (len(ups) * len(downs)))


@given(binary, st.integers(1, 12))
def test_calibration_error_equals_its_definition(rows, bins):
    error = 0.0
    for b in range(bins):
        inside = [(v, y) for v, y in rows if min(int(v * bins), bins - 1) == b]
        error += abs(sum(v for v, _ in inside) - sum(y for _, y in inside)) / len(rows)
    assert expected_calibration_error(*np.array(rows, dtype=float).T, bins=bins) == pytest.approx(error, abs=1e-12)


def test_reliability_leaves_empty_bins_empty():
    r = reliability([0.05, 0.06, 1.0], [0, 1, 1], bins=10)
    assert r.count.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert r.observed[0] == 0.5 and r.observed[9] == 1.0 and np.isnan(r.observed[1])


def test_brier_and_its_skill():
    assert brier([1.0, 0.0, 0.5], [1, 0, 1]) == pytest.approx(0.25 / 3)
    assert brier([1.0, 0.5], [1.0, 1.0], weights=[3, 1]) == pytest.approx(0.25 / 4)
    outcome = np.random.default_rng(0).integers(0, 2, 500).astype(float)
    assert brier_skill(outcome, outcome) == 1.0
    assert brier_skill(running_mean(outcome), outcome) == 0.0
    assert brier_skill(1 - outcome, outcome) < 0
    assert brier_skill([0.5, 0.5], [1, 0], reference=[0.0, 0.0]) == pytest.approx(0.5)
    assert math.isnan(brier_skill([0.5], [1], reference=[1.0]))
    assert brier_skill([1.0, 1.0], [1, 0], reference=[0.5, 0.5], weights=[3, 1]) == pytest.approx(1 - 0.25 / 0.25)


def test_the_running_mean_does_not_look_ahead():
    np.testing.assert_allclose(running_mean([1, 1, 0]), [0.5, 0.75, 2.5 / 3])
    assert running_mean([]).size == 0


@pytest.mark.parametrize("measure", [brier, brier_skill, expected_calibration_error, auc])
def test_bad_input_is_named(measure):
    for v, y, message in (
        ([], [], "non-empty"),
        ([0.5], [1, 0], "one length"),
        ([0.5, math.nan], [1, 0], "prediction 1 is nan"),
        ([0.5, 0.5], [1, 2], "outcome 1 is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(v, y)


def test_auc_refuses_graded_outcomes():
    with pytest.raises(ValueError, match=r"outcome\[1\] is 0.5.*success flag"):
        auc([0.2, 0.3], [1.0, 0.5])
    with pytest.raises(ValueError, match="bins"):
        reliability([0.5], [1], bins=0)
