import itertools
import json

import numpy as np
import pytest

from benchmarks import allocation_scale
from benchmarks.allocation_exact import CONTINUATIONS, DEPTHS, ROLLOUTS, best_prefix_objective, prefix_rows, root_rows
from benchmarks.allocation_scale import Args, growth, largest, main, peak_bytes, sizes

SHARE = {
    "kind": "share",
    "figure": "predictor and both stages, share of the main job",
    "share_of_encode": 0.01,
    "seconds_per_update": 1.0,
    "value": 0.015,
    "met": True,
}


@pytest.mark.parametrize("cap", [None, 2])
def test_the_program_finds_what_trying_everything_finds(cap):
    rng = np.random.default_rng(0)
    # Any worth, concave or not; spent among the first prefixes of each rollout alone, so that everything can be tried.
    worth = np.full((2, ROLLOUTS, DEPTHS, CONTINUATIONS + 1), -100.0)
    worth[..., 0] = 0
    worth[:, :2, :2] = rng.random((2, 2, 2, CONTINUATIONS + 1))
    best = 0.0
    for prompt in worth[:, :2, :2]:
        found = -np.inf
        for counts in itertools.product(range(CONTINUATIONS + 1), repeat=4):
            k = np.array(counts).reshape(2, 2)
            if k.sum() <= CONTINUATIONS and (cap is None or (k.sum(axis=1) <= cap).all()):
                found = max(found, prompt[np.arange(2)[:, None], np.arange(2), k].sum())
        best += found
    assert best_prefix_objective(worth.reshape(-1, CONTINUATIONS + 1), cap) == pytest.approx(best)


def test_both_stages_reach_the_best_allocation():
    rows = root_rows(200, 0, ("plug_in", "posterior"), (0.0, 0.1)) + prefix_rows(100, 0, (None, 3))
    assert len(rows) == 12 and all(0.999 <= row["value"] <= 1 + 1e-9 for row in rows)
    assert {row["budget"] for row in rows if "prompts" in row} == {200}
    assert {row["budget"] for row in rows if "prefixes" in row} == {100 * CONTINUATIONS}


def test_growth_is_measured_at_every_size(monkeypatch):
    monkeypatch.setattr(allocation_scale, "GROWTH", {k: (v[0], v[1], 20) for k, v in allocation_scale.GROWTH.items()})
    monkeypatch.setattr(allocation_scale, "largest", lambda args, name: 63)
    rows = growth(Args(repeats=1))
    assert [row["sizes"] for row in rows] == [[20, 63]] * 5
    for row in rows:
        assert all(x > 0 for x in row["microseconds"] + row["peak_bytes"]) and np.isfinite(row["value"])
        assert row["met"] == (row["value"] <= row["bar"])


def test_sizes_and_memory():
    assert sizes(100, 10_000) == [100, 316, 1000, 3162, 10_000]
    assert peak_bytes(lambda: np.zeros(10**6)) >= 8 * 10**6 > peak_bytes(lambda: np.zeros(10**4))
    args = Args()
    assert largest(args, "root stage, arrays") == 10**6 and largest(args, "root stage, trees and predictor") == 10**5


@pytest.mark.parametrize(("met", "status"), [(True, 0), (False, 1)])
def test_the_check_fails_where_a_bar_is_missed(tmp_path, monkeypatch, capsys, met, status):
    grown = {
        "kind": "growth",
        "figure": "growth, stage",
        "unit": "prompts",
        "sizes": [10, 100],
        "value": 1.0,
        "met": met,
    }
    grown |= {"microseconds": [1.0, 10.0], "peak_bytes": [1, 10], "memory_slope": 1.0}
    monkeypatch.setattr(allocation_scale, "share", lambda args: [dict(SHARE)])
    monkeypatch.setattr(allocation_scale, "growth", lambda args: [grown])
    assert main(Args(prompts=64, check=True, output=tmp_path)) == status
    assert main(Args(prompts=64, output=tmp_path)) == 0
    rows = [json.loads(line) for line in (tmp_path / "allocation_scale.jsonl").read_text().splitlines()]
    assert len(rows) == 14 and all(row["config"]["prompts"] == 64 and "torch" in row["versions"] for row in rows)
    page = (tmp_path / "allocation_scale.md").read_text()
    assert ("MISSED" in page) == (not met) and "1.50%" in page
    assert (tmp_path / "allocation_scale.png").stat().st_size > 10_000 and "growth, stage" in capsys.readouterr().out
