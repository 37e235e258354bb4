"""Skipped batches: kept whole or not at all, read back as they were, never executed."""

import contextlib
import json
import math
import os
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from random_trees import forests
from safetensors.numpy import load_file

from agents import skipped
from agents.advantages import Credit, CreditConfig, estimate
from agents.skipped import list_skipped, load_skipped, save_skipped
from allocation import Sample, Tree
from allocation.forest_table import ForestTable

FIGURES = {"loss/policy": math.nan, "loss/grad_norm": math.inf, "loss/kl": -math.inf, "loss/tokens": np.float32(7)}


def batch(forest):
    table = ForestTable.of(forest)
    return table, estimate(table, "tree", CreditConfig())


def strict_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def assert_same(kept, table, credit):
    for name in ("tree", "parent", "depth", "rollout", "reward", "terminal", "success", "tokens", "phase"):
        np.testing.assert_array_equal(getattr(kept.table, name), getattr(table, name), err_msg=name)
    for name in ("up", "down", "weight", "target"):
        a, b = getattr(kept.credit, name), getattr(credit, name)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)
    for tree, original in zip(kept.table.trees, table.trees, strict=True):
        assert (tree.key, tree.index, tree.loss_weight) == (original.key, original.index, original.loss_weight)
        assert list(tree.phases) == list(original.phases)
        for node, twin in zip(tree.nodes, original.nodes, strict=True):
            assert node.children == twin.children and node.origin == twin.origin and node.is_correct == twin.is_correct
            assert (node.terminated, node.truncated, node.tool_error) == (
                twin.terminated,
                twin.truncated,
                twin.tool_error,
            )
            assert (node.action, node.observation) == (twin.action, twin.observation)
            assert (node.sample is None) == (twin.sample is None)
            if node.sample is not None:
                assert node.sample.text == twin.sample.text
                assert node.sample.version == twin.sample.version
                assert node.sample.finish_reason == twin.sample.finish_reason
                np.testing.assert_array_equal(node.sample.action_ids, twin.sample.action_ids)
                np.testing.assert_array_equal(node.sample.logprobs, twin.sample.logprobs)
            assert (node.context_ids is None) == (twin.context_ids is None)
            if node.context_ids is not None:
                np.testing.assert_array_equal(node.context_ids, twin.context_ids)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forests())
def test_a_batch_comes_back_as_it_was(tmp_path, forest):
    table, credit = batch(forest)
    assert_same(load_skipped(save_skipped(tmp_path, 1, table, credit, {})), table, credit)


def test_a_sampled_forest_comes_back_as_it_was(tmp_path, sampled):
    table, credit = batch(sampled)
    assert any(n.context_ids is not None for n in table.trees[0].nodes)
    kept = load_skipped(save_skipped(tmp_path, 12, table, credit, FIGURES))
    assert kept.update == 12
    assert_same(kept, table, credit)
    for tree in kept.table.trees:
        for node in tree.nodes[1:]:
            assert node.sample.context_ids is tree.nodes[node.parent].context_ids


def test_log_probs_of_double_precision_are_kept(tmp_path):
    tree = Tree("q", 0, "prompt")
    given = np.array([-1 / 3, -2 / 3])
    sample = Sample("a", np.array([1, 2]), given, np.zeros(0, dtype=np.int64))
    tree.add(tree.root, tree.plan(0), "root", sample=sample, terminated=True)
    kept = load_skipped(save_skipped(tmp_path, 1, *batch([tree]), {})).table.trees[0].nodes[1].sample.logprobs
    assert kept.dtype == np.float64 and np.array_equal(kept, given)


def test_numbers_that_are_not_finite_are_kept_in_strict_json(tmp_path, sampled):
    table, credit = batch(sampled)
    table.reward[3] = math.nan
    broken = Credit(np.where(credit.up > 0, math.inf, 0.0), credit.down, credit.weight, np.full(len(table), math.nan))
    path = save_skipped(tmp_path, 1, table, broken, FIGURES)
    assert strict_json(path / "batch.json")["figures"]["loss/grad_norm"] == "inf"
    kept = load_skipped(path)
    np.testing.assert_equal(kept.figures, {k: float(v) for k, v in FIGURES.items()})
    assert_same(kept, table, broken)


def test_texts_of_any_kind_are_kept(tmp_path):
    tree = Tree("q", 0, np.array([1, 2]))
    tree.add(tree.root, tree.plan(0), "root", action="half a surrogate \ud83d and \x00", observation=3, terminated=True)
    table = ForestTable.of([tree])
    path = save_skipped(tmp_path, 1, table, Credit.of(np.zeros(2), np.ones(2)), {})
    nodes = load_skipped(path).table.trees[0].nodes
    assert nodes[1].action == "half a surrogate \ud83d and \x00" and nodes[1].observation == "3"
    assert nodes[0].observation == "array([1, 2])"


def test_the_last_few_stay(tmp_path, sampled):
    table, credit = batch(sampled)
    (tmp_path / "notes").mkdir()
    for update in (7, 3, 999_999, 1_000_000):
        save_skipped(tmp_path, update, table, credit, {}, keep=2)
    assert [p.name for p in list_skipped(tmp_path)] == ["update-999999", "update-1000000"]
    # A resumed run that meets the same batch again, and one that was set back, keep theirs.
    assert load_skipped(save_skipped(tmp_path, 3, table, credit, {"a": 1.0}, keep=2)).figures == {"a": 1.0}
    assert load_skipped(save_skipped(tmp_path, 3, table, credit, {"a": 2.0}, keep=2)).figures == {"a": 2.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "update-000003", "update-1000000"]


@pytest.mark.parametrize("stop_at", range(12))
def test_wherever_saving_stops_no_half_folder_has_the_final_name(tmp_path, sampled, monkeypatch, stop_at):
    table, credit = batch(sampled)
    save_skipped(tmp_path, 1, table, credit, {"a": 1.0})
    save_skipped(tmp_path, 2, table, credit, {"a": 2.0})
    calls = 0

    class Killed(BaseException):
        pass

    def stopping(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > stop_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(skipped, "save_file", stopping(skipped.save_file))
        patch.setattr(skipped.os, "replace", stopping(os.replace))
        patch.setattr(skipped.os, "fsync", stopping(os.fsync))
        patch.setattr(skipped.shutil, "rmtree", stopping(skipped.shutil.rmtree))
        patch.setattr(type(tmp_path), "write_text", stopping(type(tmp_path).write_text))
        with contextlib.suppress(Killed):
            save_skipped(tmp_path, 2, table, credit, {"a": 3.0}, keep=1)
    for path in list_skipped(tmp_path):
        assert_same(load_skipped(path), table, credit)
    # The next one clears away what was left.
    save_skipped(tmp_path, 3, table, credit, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["update-000003"]


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle", "version", "short"])
def test_what_is_no_batch_is_refused_by_name(tmp_path, sampled, damage):
    table, credit = batch(sampled)
    path = save_skipped(tmp_path, 1, table, credit, {})
    arrays, plain = path / "batch.safetensors", path / "batch.json"
    if damage == "missing":
        arrays.unlink()
    elif damage == "cut":
        arrays.write_bytes(arrays.read_bytes()[:-9])
    elif damage == "pickle":
        arrays.write_bytes(pickle.dumps(load_file(arrays)))
    elif damage == "version":
        plain.write_text(plain.read_text().replace('"version": 2', '"version": 99'))
    else:
        plain.write_text(plain.read_text()[:100])
    with pytest.raises(ValueError, match="update-000001 is no folder of a skipped batch, or is damaged"):
        load_skipped(path)
