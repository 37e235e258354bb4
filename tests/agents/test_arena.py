"""The arena from a record to its table."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_record import TinyPolicy, record

from allocation.allocators import METHODS
from allocation.arena.recorded import RecordedWorld
from allocation.arena.worlds import replay
from allocation.forest_table import ForestTable
from benchmarks import arena, arena_runs, arena_show
from benchmarks.arena_check import Bar
from benchmarks.arena_runs import Protocol


@pytest.fixture(scope="module")
def policy():
    return TinyPolicy(5, prompts=16)


@pytest.fixture(scope="module")
def path(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "tiny.npz"
    record(policy, spines=16, continuations=6).save(path)
    return path


@pytest.fixture(scope="module")
def world(path):
    return arena.load(path)


SHORT = {"seeds": 2, "warmup": 2, "batches": 2, "budget": 32, "group_size": 4}


@pytest.fixture(scope="module")
def ran(path, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    args = arena.Args(worlds=(path,), **SHORT, check=True, output=output)
    return arena.main(args), output


def full_gradient(policy, world, forest, estimator):
    dense, total = world.dense, np.zeros(policy.dim)
    paths = {-1: ()}
    weights_of = ForestTable.of(forest).per_tree(arena_runs.edge_weights(forest, estimator))
    for tree, weights in zip(forest, weights_of, strict=True):
        for node in tree.nodes[1:]:
            before, prompt = [], tree.prompt
            i = node.action
            while i >= 0:  # the path of actions is told by which of the policy's scores the row is
                before.append(i)
                i = dense.parent[i]
            for i in reversed(before):
                if i not in paths:
                    above = paths[dense.parent[i]]
                    row = dense.sketch[dense.edge_row[i]] * dense.sketch_scale[dense.edge_row[i]]
                    near = [np.abs(policy.score(prompt, (*above, a)) - row).sum() for a in (0, 1)]
                    paths[i] = (*above, int(np.argmin(near)))
            total += weights[node.id] * policy.score(prompt, paths[node.action])
    return total


@pytest.mark.parametrize("estimator", ["tree", "grpo"])
def test_cosine_and_norm_are_those_of_the_full_gradient(policy, world, estimator):
    allocator = arena_runs.make("trace", world, Protocol(budget=32), 0)
    true = policy.gradient()
    for seed in range(3):
        forest = replay(world, allocator, 32, np.random.default_rng(seed))
        estimate = full_gradient(policy, world, forest, estimator)
        figures = arena_runs.measure(world, forest, forest.trees, estimator)
        assert figures["norm2"] == pytest.approx(estimate @ estimate, rel=0.02)
        cosine = estimate @ true / np.linalg.norm(estimate) / np.linalg.norm(true)
        assert figures["cosine"] == pytest.approx(cosine, abs=0.02)
        assert figures["along"] == pytest.approx(estimate @ true / np.linalg.norm(true), rel=1e-3)


def test_more_rollouts_come_nearer_to_the_true_gradient(policy, world):
    cosines = []
    for budget in (16, 64, 256):
        protocol = Protocol(budget=budget, group_size=16, warmup=0, batches=4)
        cosines.append(arena_runs.run(world, "grpo", protocol, range(4))["cosine"].mean())
    assert cosines == sorted(cosines) and cosines[-1] > 0.85


def test_the_arena_writes_a_line_for_every_method_and_judges(ran):
    _, output = ran
    lines = [json.loads(line) for line in (output / "arena.jsonl").read_text().splitlines()]
    summary, *rows = lines
    assert summary["summary"]["prompts"] == 16 and summary["summary"]["gradient_reliability"] == 1.0
    assert {(r["comparison"], r["method"]) for r in rows} == {(c, m) for c in arena_show.COMPARISONS for m in METHODS}
    for row in rows:
        mean, low, high = row["ratio_tree"]
        assert 0 <= low <= mean <= high <= 1
        assert row["estimator"] in ("tree", "grpo") and row["config"]["seeds"] == 2
        assert str(output) not in json.dumps(row["config"]["worlds"])
    page = (output / "arena.md").read_text()
    assert "equal tokens" in page and all(f"| {m} |" in page for m in METHODS)
    assert (output / "arena.png").stat().st_size > 1000


@pytest.mark.parametrize("holds", [True, False])
def test_check_fails_with_any_bar(path, tmp_path, monkeypatch, capsys, holds):
    monkeypatch.setattr(arena, "bars", lambda results: [Bar("one", True), Bar(f"two of {len(results)}", holds)])
    args = arena.Args(worlds=(path,), **SHORT, methods=("grpo",), check=True, output=tmp_path)
    assert arena.main(args) is holds
    assert capsys.readouterr().out.strip().endswith(f"{'holds' if holds else 'FAILS'}: two of 2")


def test_at_equal_tokens_forests_cost_the_same(path):
    args = arena.Args(worlds=(path,), **{**SHORT, "seeds": 4, "batches": 4, "budget": 48})
    results = arena.compare(args, [path])
    equal = {r.method: r.tokens for r in results if r.comparison == "tokens"}
    plain = {r.method: r for r in results if r.comparison == "rollouts"}
    for method, tokens in equal.items():
        allowed = 0.06 * equal["grpo"] + 2 * plain[method].tokens / plain[method].budget
        assert abs(tokens - equal["grpo"]) < allowed, method
    assert plain["trace"].figures["rollouts"].max() <= 48


@pytest.mark.slow
def test_processes_change_nothing(path):
    args = arena.Args(worlds=(path,), **SHORT, methods=("trace",))
    one, two = (arena.compare(replace(args, workers=n), [path]) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a.method, a.comparison, a.budget) == (b.method, b.comparison, b.budget)
        np.testing.assert_equal(a.figures, b.figures)


def test_batches_are_measured_before_they_are_learned_from(world):
    figures = arena_runs.run_seed(world, "trace", Protocol(warmup=2, batches=2, budget=32), 0)
    again = arena_runs.run_seed(world, "trace", Protocol(warmup=2, batches=1, budget=32), 0)
    np.testing.assert_equal(figures[:3], again)


@pytest.mark.parametrize("predictor", ["counts", "ensemble"])
def test_other_predictors_can_be_tried(world, predictor):
    protocol = Protocol(warmup=3, batches=1, budget=32, predictor=predictor)
    assert not np.isnan(arena_runs.run_seed(world, "trace", protocol, 0)[-1]["auc_roots"])


def test_held_out_prompts_are_not_those_of_the_warm_up(world, monkeypatch):
    opened = []
    monkeypatch.setattr(
        RecordedWorld, "open", lambda self, prompt, real=RecordedWorld.open: opened.append(prompt) or real(self, prompt)
    )
    protocol = Protocol(warmup=2, batches=2, budget=32, held_out=True)
    arena_runs.run_seed(world, "grpo", protocol, 3)
    assert not set(opened[:8]) & set(opened[8:])


def test_without_recordings_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr(arena, "RECORDINGS", tmp_path)
    with pytest.raises(FileNotFoundError, match="record_dense"):
        arena.main(arena.Args(output=tmp_path))


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="unknown method 'nobody'; known: grpo"):
        arena.Args(methods=("grpo", "nobody"))


def test_a_method_may_be_given_other_settings(world):
    method = "trace:continuations=0.25,prefix_mode=exact,cap_per_rollout=None"
    config = arena_runs.make(method, world, Protocol(), 0).config
    default = arena_runs.make("trace", world, Protocol(), 0).config
    assert config == replace(default, continuations=0.25, prefix_mode="exact", cap_per_rollout=None)
    with pytest.raises(ValueError, match=r"trace has no setting nothing; it has: .*m_min"):
        arena_runs.make("trace:nothing=1", world, Protocol(), 0)
    with pytest.raises(ValueError, match="grpo has no setting m_min; it has: none"):
        arena_runs.make("grpo:m_min=1", world, Protocol(), 0)
    with pytest.raises(ValueError, match="name=value"):
        arena_runs.parse("trace:m_min")
