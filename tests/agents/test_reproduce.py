"""The comparison of methods: its arithmetic on rows made by hand, and its runs at a size that takes seconds."""

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agents.config import TrainConfig
from allocation import TracePlusConfig
from benchmarks import reproduce, reproduce_runs
from benchmarks.reproduce_grid import METHODS, QUICK, WORLDS, Cell, Method, Size, cells
from benchmarks.reproduce_tables import at_tokens, comparisons, first_at, interval, paired, summary


def row(method, seed, accuracies, tokens=1000, **more):
    points = [{"update": i, "rollouts": 10 * i, "tokens": tokens * i, "accuracy": a} for i, a in enumerate(accuracies)]
    figures = {"accuracy": accuracies[-1], "accuracy_by_pool": accuracies[-1], "ratio_roots": 0.3, "ratio_tree": 0.4}
    last = len(accuracies) - 1
    end = {
        "tokens": tokens * last,
        "rollouts": 10 * last,
        "warm_accuracy": accuracies[0],
        "model": "tiny",
        "curve": points,
    }
    what = {"world": "math", "pool": "balanced", "split": "test", "size": vars(QUICK), "method": method, "seed": seed}
    return {**what, **figures, **end, **more}


def test_an_interval_is_of_seeds():
    assert interval([0.5]).mean == 0.5 and math.isnan(interval([0.5]).low) and math.isnan(interval([0.5, 0.6]).high)
    found = interval([0.1, 0.2, 0.3, 0.4])
    assert found.low < 0.25 < found.high and found.mean == pytest.approx(0.25) and found.count == 4
    assert interval([0.2] * 5).low == interval([0.2] * 5).high == pytest.approx(0.2)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=9), st.floats(-0.3, 0.3))
def test_what_seeds_share_drops_out_of_differences(base, shift):
    one = {s: row("pcl", s, [0.0, a + shift]) for s, a in enumerate(base)}
    other = {s: row("grpo", s, [0.0, a]) for s, a in enumerate(base)}
    found = paired(one, other, "accuracy")
    assert found.mean == pytest.approx(shift, abs=1e-9) and found.high - found.low == pytest.approx(0.0, abs=1e-9)


def test_a_curve_between_its_points():
    run = row("grpo", 0, [0.2, 0.4, 0.3, 0.6])
    assert at_tokens(run, 500) == pytest.approx(0.3) and at_tokens(run, 9e9) == 0.6
    assert first_at(run, 0.3, "tokens") == pytest.approx(500) and first_at(run, 0.3, "rollouts") == pytest.approx(5)
    assert first_at(run, 0.1, "tokens") == 0 and first_at(run, 0.7, "tokens") == math.inf


def test_the_table_pairs_seeds_and_keeps_failures():
    rows = [row("grpo", s, [0.2, 0.4 + 0.1 * s]) for s in range(3)]
    rows += [row("pcl", s, [0.2, 0.5 + 0.1 * s], tokens=500) for s in range(2)]
    rows += [row("trace_plus", s, [0.2, 0.1]) for s in range(3)]
    warm, grpo, pcl, ours = summary(rows)
    assert warm["accuracy"].mean == pytest.approx(0.2) and grpo["gain"] is None
    assert pcl["seeds"] == 2 and pcl["gain"].count == 2 and pcl["gain"].mean == pytest.approx(0.1)
    # At 500 tokens grpo is half-way from .2 to .4 (.5), pcl at its end: .2 and .25 more.
    assert pcl["gain_at_tokens"].mean == pytest.approx(0.225) and pcl["tokens_to_base"] == pytest.approx(
        0.354, abs=0.02
    )
    assert ours["accuracy"].mean == pytest.approx(0.1) and ours["tokens_to_base"] == math.inf
    judged = dict(reproduce.verdicts(summary(rows)))
    assert not any(judged.values()) and len(judged) == 4


def test_only_other_methods_are_baselines():
    ours = [row("grpo", 0, [0.2, 0.4]), row("trace_plus", 0, [0.2, 0.5]), row("trace_plus_roots", 0, [0.2, 0.6])]
    ahead = "ahead of every baseline"
    assert dict(reproduce.verdicts(summary(ours)))[ahead]
    assert not dict(reproduce.verdicts(summary([*ours, row("trace", 0, [0.2, 0.6])])))[ahead]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_cell_is_a_run_that_differs_in_its_method_alone(world, method, tmp_path):
    one = Cell(world, "skewed", method, 4).config(tmp_path, ("a", "b", "c"))
    base = Cell(world, "skewed", "grpo", 4).config(tmp_path, ("a", "b", "c"))
    assert isinstance(one, TrainConfig) and one.model == "b" and one.env.system_prompt == ""
    differing = {f.name for f in fields(TrainConfig) if getattr(one, f.name) != getattr(base, f.name)}
    assert differing <= {*METHODS[method].settings, *METHODS["grpo"].settings, "name"}
    assert all(getattr(one, name) == value for name, value in METHODS[method].settings.items())


def test_cells_come_seed_by_seed_with_their_step_sizes():
    found = list(
        cells(["math"], ["balanced"], ["grpo", "pcl"], range(2), {("math", "pcl"): 2.0}, split="test", size=QUICK)
    )
    assert [(c.seed, c.method, c.step) for c in found] == [
        (0, "grpo", 1.0),
        (0, "pcl", 2.0),
        (1, "grpo", 1.0),
        (1, "pcl", 2.0),
    ]
    assert len({c.name for c in found}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"worlds": ("maths",)}, "unknown name 'maths'; known: multihop, tools, math"),
        ({"methods": ("ppo",)}, "unknown name 'ppo'"),
        ({"pools": ("odd",)}, "unknown name 'odd'; known: balanced, skewed, sparse"),
        ({"worlds": ("math", "tools"), "warm_starts": ("x",)}, "warm_starts are of one environment"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        reproduce.Args(**arguments)


@pytest.mark.slow
def test_runs_are_done_once_and_reported(tmp_path, monkeypatch):
    size = {"updates": 2, "budget": 16, "points": 1, "per_level": 1, "final_per_level": 2, "last": 2}
    args = reproduce.Args(
        worlds=("math",), methods=("grpo", "tree_grpo"), seeds=2, **size,
        runs=tmp_path / "runs", output=tmp_path / "results",
    )  # fmt: skip
    reproduce.main(args)
    rows = [json.loads(line) for line in (tmp_path / "results" / "reproduce.jsonl").read_text().splitlines()]
    assert [(r["seed"], r["method"]) for r in rows] == [(0, "grpo"), (0, "tree_grpo"), (1, "grpo"), (1, "tree_grpo")]
    assert all(len(r["curve"]) == 3 and r["rollouts"] <= 32 and r["sets"]["test"]["accuracy"] <= 1 for r in rows)
    assert (tmp_path / "results" / "reproduce.md").exists() and (tmp_path / "results" / "reproduce.png").exists()
    monkeypatch.setattr(reproduce_runs.subprocess, "run", lambda *a, **k: pytest.fail("a run was done twice"))
    reproduce.main(args)
    assert len((tmp_path / "results" / "reproduce.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_run_that_fails_is_said_and_the_others_go_on(tmp_path, capsys):
    size = Size(updates=1, budget=16, points=1, per_level=1, final_per_level=1, last=1)
    todo = [Cell("math", "balanced", "grpo", seed, size=size) for seed in (0, 1)]
    args = reproduce.Args(worlds=("math",), warm_starts=("tiny", str(tmp_path / "nothing")), runs=tmp_path)
    came = []
    rows = reproduce.run_all(todo, args, Console(width=200), came.append)
    assert [r["seed"] for r in rows] == [0] and came == rows
    assert "math-balanced-grpo-1" in capsys.readouterr().out


def test_rows_count_as_done_while_no_setting_has_changed(tmp_path, monkeypatch):
    cell = Cell("math", "balanced", "trace_plus", 1, size=QUICK)
    now = cell.fingerprint(("tiny",))
    assert cell.config(tmp_path, ("tiny",)).name.endswith(now) and now == cell.fingerprint(("tiny",))
    done = row("trace_plus", 1, [0.2, 0.3], fingerprint=now, step=1.0)
    assert reproduce.is_done(done, {cell: now}) and not reproduce.is_done(done, {})
    assert cell.fingerprint(("tiny", "other")) != now, "another warm start"
    other = Cell("math", "balanced", "trace", 1, size=QUICK).fingerprint(("tiny",))
    changed = Method(METHODS["trace_plus"].settings | {"trace_plus": TracePlusConfig(m_min=5)}, "")
    monkeypatch.setitem(METHODS, "trace_plus", changed)
    assert not reproduce.is_done(done, {cell: cell.fingerprint(("tiny",))})
    assert other == Cell("math", "balanced", "trace", 1, size=QUICK).fingerprint(("tiny",)), "which it is nothing to"
    assert not reproduce.is_done(row("trace_plus", 1, [0.2, 0.3], step=1.0), {cell: now}), "of an older version"


def test_rows_are_kept_in_the_order_of_the_grid_and_other_rows_stay(tmp_path, monkeypatch):
    path = tmp_path / "reproduce.jsonl"
    old = row("pcl", 0, [0.2, 0.3], step=1.0)
    reproduce.save(path, [old])
    size = vars(Size(updates=7))
    args = reproduce.Args(worlds=("math",), methods=("trace", "grpo"), seeds=1, updates=7, output=tmp_path)

    def launch(cell, runs, warm_starts):
        return row(cell.method, cell.seed, [0.2, 0.3], step=1.0, size=size, fingerprint=cell.fingerprint(warm_starts))

    monkeypatch.setattr(reproduce, "launch", launch)
    monkeypatch.setattr(reproduce, "report", lambda rows, *rest: [(r["size"]["updates"], r["method"]) for r in rows])
    expected = [(7, "grpo"), (7, "trace"), (QUICK.updates, "pcl")]
    assert reproduce.main(args) == expected
    assert [(r["size"]["updates"], r["method"]) for r in map(json.loads, path.read_text().splitlines())] == expected
    monkeypatch.setattr(reproduce, "launch", lambda *rest: pytest.fail("a run was done twice"))
    assert reproduce.main(args) == expected


def test_where_the_budget_went():
    records = [{"budget/by_level/1": 6, "budget/by_level/2": 2, "other": 9}] * 5 + [{"budget/by_level/2": 8}] * 5
    found = reproduce_runs.budget_by(records, "budget/by_level/")
    assert found == {"1": [0.75] * 5 + [0.0] * 5, "2": [0.25] * 5 + [1.0] * 5}
    assert reproduce_runs.budget_by([{}], "budget/by_level/") == {}


def test_runs_of_other_sizes_are_no_part_of_a_comparison():
    small, large = row("grpo", 0, [0.2, 0.4]), row("grpo", 0, [0.2, 0.5], size=vars(Size()))
    found = comparisons([small, large, row("pcl", 0, [0.2, 0.3])])
    assert [len(rows) for rows in found.values()] == [2, 1] and all("math, balanced pool" in title for title in found)
