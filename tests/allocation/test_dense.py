import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.arena.dense import DenseForest
from allocation.arena.intervals import Z95, proportion_interval


def make(prompts, spines, turns, continuations, seed, p=0.4):
    """A made-up record: every rollout lasts `turns` turns and succeeds by chance."""
    rng = np.random.default_rng(seed)
    rows = []

    def rollout(prompt, number, parent, left, continuation):
        for i in range(left):
            end = i == left - 1
            correct = bool(end and rng.random() < p)
            rows.append((prompt, parent, number, continuation, end, False, correct, rng.random() < 0.2, float(correct)))
            parent = len(rows) - 1

    for prompt in range(prompts):
        start = len(rows)
        for number in range(spines):
            rollout(prompt, number, -1, turns, False)
        number = spines
        for node in range(start, start + spines * turns):
            depth = (node - start) % turns + 1
            for _ in range(continuations if depth < turns else 0):
                rollout(prompt, number, node, turns - depth, True)
                number += 1
    names = [
        "prompt",
        "parent",
        "rollout",
        "continuation",
        "terminated",
        "truncated",
        "is_correct",
        "tool_error",
        "reward",
    ]
    columns = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    n, edges = len(rows), max(1, 2 * len(rows) // 3)
    edge_row = np.arange(n)
    edge_row[edges:] = -1
    count = rng.integers(1, 20, size=prompts)
    return DenseForest(
        {"family": "made up", "gradient_reliability": 0.5},
        keys=np.array([f"t{i}" for i in range(prompts)]),
        hops=np.zeros(prompts, dtype=np.int16),
        prompt_tokens=np.full(prompts, 7),
        reference_successes=rng.binomial(count, p),
        reference_count=count,
        root_features=rng.normal(size=(prompts, 3)).astype(np.float16),
        **columns,
        action_tokens=rng.integers(0, 9, size=n),
        context_tokens=rng.integers(0, 9, size=n),
        edge_row=edge_row,
        features=rng.normal(size=(n, 3)).astype(np.float16),
        dot=rng.normal(size=edges).astype(np.float32),
        norm2=rng.random(edges).astype(np.float32),
        entropy=rng.random(edges).astype(np.float16),
        sketch=rng.integers(-127, 128, size=(edges, 4)).astype(np.int8),
        sketch_scale=rng.random(edges).astype(np.float32),
    )


def equal(a, b):
    assert a.meta == b.meta
    for field in fields(a):
        if field.name != "meta":
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert x.dtype == y.dtype and np.array_equal(x, y), field.name


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
def test_what_is_saved_is_loaded(tmp_path_factory, prompts, spines, turns, continuations, seed):
    dense = make(prompts, spines, turns, continuations, seed)
    path = tmp_path_factory.mktemp("dense") / "record.npz"
    dense.save(path)
    equal(DenseForest.load(path), dense)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 999))
def test_values_are_shares_of_successes(prompts, spines, turns, continuations, seed):
    dense = make(prompts, spines, turns, continuations, seed)
    ends = {
        (p, r): c for p, r, c, t in zip(dense.prompt, dense.rollout, dense.is_correct, dense.terminal, strict=True) if t
    }
    roots, inner = dense.root_values(), dense.prefix_values()
    for prompt in range(prompts):
        seen = [ends[prompt, r] for r in range(spines)]
        total, count = sum(seen) + dense.reference_successes[prompt], len(seen) + dense.reference_count[prompt]
        assert roots.count[prompt] == count and roots.value[prompt] == pytest.approx(total / count)
    for node in range(len(dense.parent)):
        # All rollouts that passed through it, and those that begin there.
        own = (dense.prompt[node], dense.rollout[node])
        begun = {
            (dense.prompt[c], dense.rollout[c])
            for c in np.flatnonzero(dense.parent == node)
            if dense.rollout[c] != own[1]
        }
        seen = [ends[key] for key in {own, *begun}]
        assert inner.count[node] == len(seen) and inner.value[node] == pytest.approx(np.mean(seen))
        assert dense.outcome[node] == ends[own]


def test_equal_prefixes_share_what_is_known_of_them():
    dense = make(1, 2, 2, 2, 3)
    alone = np.full_like(dense.edge_row, -1)
    same = alone.copy()
    first = [i for i in range(len(same)) if dense.depth[i] == 1 and not dense.continuation[i]]
    same[first] = 0
    merged = replace(dense, edge_row=same).prefix_values()
    apart = replace(dense, edge_row=alone).prefix_values()
    assert len(first) == 2 and merged.count[first].tolist() == [6, 6]
    assert merged.value[first[0]] == pytest.approx(np.mean([apart.value[i] for i in first]))


def test_the_gate_by_hand():
    # Two failed spines of prompt 0, never solved: one prefix with 1 of 2, one with 0 of 2. Prompt 1 is solved every other time.
    rows = [
        # prompt, parent, rollout, continuation, terminated, correct
        (0, -1, 0, False, False, False),
        (0, 0, 0, False, True, False),
        (0, -1, 1, False, False, False),
        (0, 2, 1, False, True, False),
        (0, 0, 2, True, True, True),
        (0, 2, 3, True, True, False),
        (1, -1, 0, False, False, False),
        (1, 6, 0, False, True, False),
        (1, 6, 1, True, True, True),
    ]
    prompt, parent, rollout, continuation, terminated, correct = map(np.array, zip(*rows, strict=True))
    none = np.zeros(len(rows), dtype=bool)
    base = make(2, 1, 1, 0, 0)
    dense = replace(
        base,
        **{
            "prompt": prompt,
            "parent": parent,
            "rollout": rollout,
            "continuation": continuation,
            "terminated": terminated,
            "truncated": none,
            "is_correct": correct,
            "tool_error": none,
            "reward": correct.astype(float),
            "action_tokens": np.ones(len(rows), dtype=int),
            "context_tokens": np.ones(len(rows), dtype=int),
            "edge_row": np.full(len(rows), -1),
            "features": np.zeros((len(rows), 3), dtype=np.float16),
            "reference_successes": np.array([0, 5]),
            "reference_count": np.array([10, 9]),
        },
    )
    gate = dense.gate()
    assert gate.failed == 3
    assert gate.with_mid_prefix == pytest.approx(2 / 3) and gate.while_root_is_not_mid == pytest.approx(1 / 3)
    assert gate.flips == pytest.approx(2 / 3)
    low, high = gate.interval
    assert 0 < low < 1 / 3 < high < 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_the_interval_solves_the_score_equation(a, b):
    s, n = min(a, b), max(a, b)
    low, high = (float(x[0]) for x in proportion_interval([s], [n]))
    if n == 0:
        assert (low, high) == (0, 1)
        return
    p = s / n
    assert 0 <= low <= p <= high <= 1
    for end in (low, high):
        # Both ends are those means from which the proportion is z standard errors away, but where an end is 0 or 1.
        assert (p - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / n, abs=1e-9)


def test_successes_beyond_the_count_are_refused():
    with pytest.raises(ValueError, match="between 0 and count"):
        proportion_interval([3], [2])


def spoil(path, **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"dot": d.dot[:-1]}, "dot|norm2 has .* edges"),
        (lambda d: {"parent": np.full_like(d.parent, len(d.parent))}, "parent is out of range at node 0"),
        (lambda d: {"edge_row": d.edge_row + 10_000}, "edge_row is out of range"),
        (lambda d: {"reward": np.full_like(d.reward, np.nan)}, "reward holds a value that is not finite"),
        (lambda d: {"terminated": np.zeros_like(d.terminated)}, "no terminal"),
        (lambda d: {"features": d.features.astype(int)}, "features must be an array of kind 'f'"),
        (lambda d: {"norm2": None}, "arrays missing \\['norm2'\\]"),
        (lambda d: {"more": d.dot}, "not known \\['more'\\]"),
        (lambda d: {"meta": np.frombuffer(b"{}", dtype=np.uint8)}, "no recorded forest"),
        (
            lambda d: {"meta": np.frombuffer(json.dumps({"format": "dense forest", "version": 9}).encode(), np.uint8)},
            "of version 9",
        ),
        (lambda d: {"keys": np.array([{"a": 1}], dtype=object)}, "no recorded forest"),
    ],
)
def test_a_file_that_is_not_whole_is_named(tmp_path, change, message):
    dense, path = make(2, 2, 3, 1, 0), tmp_path / "record.npz"
    dense.save(path)
    spoil(path, **change(dense))
    with pytest.raises(ValueError, match=message) as error:
        DenseForest.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path, keep):
    path = tmp_path / "record.npz"
    make(2, 2, 3, 1, 0).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ValueError, match=r"record\.npz is damaged"):
        DenseForest.load(path)
    with pytest.raises(FileNotFoundError, match="there is no recorded forest"):
        DenseForest.load(tmp_path / "other.npz")
