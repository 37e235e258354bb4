"""The packing benchmark on forests of a few tokens."""

import json
import shutil
import sys

import pytest
import torch

from benchmarks import packing, packing_memory
from benchmarks.packing_forest import SHAPES, Shape, forest_of, shape_of

TINY = {"layers": 1, "widths": (32,), "shapes": ("tiny", "apart"), "repeats": 2, "micro_tokens": 256}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape(2, 4, 3, 40, 3, 4, 6))
    monkeypatch.setitem(SHAPES, "apart", Shape(2, 2, 0, 4, 3, 4, 6))

    def here(args):
        """A process that has done other things before has no peak of its own."""
        return packing_memory.measure(args) | {"peak": 1000 if args.layout == "packed" else 3000}

    monkeypatch.setattr(packing_memory, "in_fresh_process", here)


def run(tmp_path, **changed):
    met = packing.main(packing.Args(output=tmp_path, **(TINY | changed)))
    return met, [json.loads(line) for line in (tmp_path / "packing.jsonl").read_text().splitlines()]


def test_a_record_for_each_measurement(tmp_path, capsys):
    met, rows = run(tmp_path, seed=3)
    assert met and [(r["kind"], r["shape"]) for r in rows] == [
        (k, s) for s in TINY["shapes"] for k in ("speed", "memory")
    ]
    for row in rows:
        assert row["config"]["seed"] == 3 and row["config"]["layers"] == 1
        assert {"torch", "transformers", "python"} <= set(row["versions"]) and "commit" in row
        assert row["bar"] is None, "bars are those of a wider model"
    shared, _, apart, none = rows
    assert shared["S"] == shared["flat_tokens"] / shared["unique_tokens"] > 2 and 1 < apart["S"] < 1.3
    assert shared["computed_tokens"]["packed"] == shared["computed_tokens"]["dense"] == shared["unique_tokens"]
    assert shared["computed_tokens"]["flat"] >= shared["flat_tokens"]
    for row in (shared, apart):
        assert 0 < row["gradient_difference"] < 1e-5
        for way in packing.WAYS:
            assert len(row["all_seconds"][way]) == 2 and min(row["all_seconds"][way]) <= row["seconds"][way]
        assert row["value"] == pytest.approx(row["seconds"]["flat"] / row["seconds"]["packed"] / row["S"])
    assert none["peak_times"] == 3 and rows[1]["times"] > 1.5
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("at worst: gradients apart by")
    assert (tmp_path / "packing.png").stat().st_size > 10_000
    page = (tmp_path / "packing.md").read_text()
    assert f"| 32 | {shared['S']:.2f} |" in page and "Kept for the backward pass" in page


def test_a_bar_that_is_missed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packing, "BAR_WIDTH", 32)
    monkeypatch.setattr(packing, "BAR", 100.0)
    met, rows = run(tmp_path)
    assert not met and [r["met"] for r in rows] == [False, False, True, True], "little is shared in the second forest"
    out = capsys.readouterr().out
    assert out.count("MISSED") == 2 and "(bar 100.0 S)" in out.strip().splitlines()[-1]


def test_gradients_that_differ_miss_their_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "GRADIENT_BAR", 0.0)
    met, rows = run(tmp_path, memory=False, shapes=("tiny",))
    assert not met and rows[0]["gradient_difference"] > 0


def test_quick_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "2.5", SHAPES["tiny"])
    monkeypatch.setattr(packing, "BAR_WIDTH", 32)
    packing.main(packing.Args(output=tmp_path / "none", quick=True, layers=1))
    assert not (tmp_path / "none").exists() and "speed" in capsys.readouterr().out.splitlines()[-1]


def test_bytes_are_those_of_each_storage_once_and_of_no_parameter():
    model = torch.nn.Linear(8, 4, bias=False)

    class Step:
        def __init__(self):
            self.model = model

        def update(self, forest):
            for x in forest:
                y = model(x)  # keeps x and the weights
                z = y.exp()  # keeps z
                (z * z).sum().backward()  # keeps z twice more

    rows = [torch.randn(10, 8), torch.randn(3, 8)]
    assert packing_memory.saved_bytes(Step(), rows) == 4 * sum(x.numel() + len(x) * 4 for x in rows)


def test_memory_in_a_fresh_process(monkeypatch):
    monkeypatch.undo()
    args = packing_memory.Args(layout="packed", shape="1", width=32, layers=1, trees=1)
    found = packing_memory.in_fresh_process(args)
    assert found["saved"] == packing_memory.measure(args)["saved"] and found["peak"] > 0
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="ended with status 1"):
        packing_memory.in_fresh_process(args)


def test_forests_are_those_of_their_seed_and_shape():
    (one,), (same,), (other,) = (forest_of(shape_of("tiny", 1), seed) for seed in (0, 0, 1))
    ids = [[n.sample.action_ids.tolist() for n in tree.nodes[1:]] for tree in (one, same, other)]
    assert ids[0] == ids[1] != ids[2]
    origins = [n.origin for n in one.nodes if n.terminal]
    assert origins.count("root") == 4 and origins.count("continuation") == 3
    assert one.phases == [0] * 4 + [1] * 3
    assert len(one.root.context_ids) == SHAPES["tiny"].prompt
