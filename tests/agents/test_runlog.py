"""What a run writes, what a crash may cost, and what resuming may not lose."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.runlog import DamagedLogError, RunLog, read_jsonl


def test_a_run_holds_its_files(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as log:
        log.write_config({"seed": 0, "hidden": (1, 2), "path": Path("a/b"), "cap": math.inf})
        log.log({"update": 0, "eval/accuracy": 0.5})
        log.log_tree({"update": 0, "tree": 0, "nodes": []})
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "trees.jsonl", "checkpoints", "tensorboard"}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config == {"seed": 0, "hidden": [1, 2], "path": "a/b", "cap": math.inf}
    assert read_jsonl(log.metrics_path) == [{"update": 0, "eval/accuracy": 0.5}]
    log.close()  # a second time does nothing


def test_values_become_plain_json(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(
            {
                "update": np.int64(3),
                "a": math.nan,
                "b": -math.inf,
                "c": np.float32(0.5),
                "d": np.bool_(True),
                "e": [1, math.inf],
            }
        )
        assert (
            log.metrics_path.read_text() == '{"update": 3, "a": null, "b": null, "c": 0.5, "d": true, "e": [1, null]}\n'
        )
        with pytest.raises(TypeError, match=r"'train/x' holds a Tensor.*\.item\(\)"):
            log.log({"update": 4, "train/x": torch.tensor(1.0)})
        for update in (None, "1", True, 1.5):
            with pytest.raises(ValueError, match="integer 'update'"):
                log.log({"update": update})
    assert len(read_jsonl(log.metrics_path)) == 1  # what was refused left nothing behind


@given(st.text(st.characters(), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("run")
    with RunLog(path) as log:
        log.log_tree({"update": 0, "text": text})
        log.log_tree({"update": 1, "text": "\ud83d\u2028" + text})
    assert [record["text"] for record in read_jsonl(path / "trees.jsonl")] == [text, "\ud83d\u2028" + text]


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.log({"update": 1})
    assert read_jsonl(log.metrics_path) == [{"update": 1}]
    log.close()


def test_a_torn_last_line_costs_one_record_wherever_it_tears(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole, last = b'{"update": 1}\n', '{"update": 2, "name": "naïve \\"x\\""}'.encode()
    for cut in range(1, len(last)):
        path.write_bytes(whole + last[:cut])
        with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl, line 2.*cut short"):
            assert read_jsonl(path) == [{"update": 1}]
        with pytest.warns(RuntimeWarning, match="removed a last line"), RunLog(tmp_path, resume=True) as log:
            log.log({"update": 2})
        assert read_jsonl(path) == [{"update": 1}, {"update": 2}]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"update": 1}')
    with RunLog(tmp_path, resume=True) as log:
        log.log({"update": 2})
    assert [record["update"] for record in read_jsonl(log.metrics_path)] == [1, 2]


def test_a_torn_line_longer_than_a_block_is_removed(tmp_path: Path) -> None:
    (tmp_path / "trees.jsonl").write_bytes(b'{"update": 1}\n{"update": 2, "text": "' + b"x" * 200_000)
    with pytest.warns(RuntimeWarning, match="removed"):
        RunLog(tmp_path, resume=True).close()
    assert (tmp_path / "trees.jsonl").read_bytes() == b'{"update": 1}\n'


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"12", b"\xff\xfe", b"\x00\x00"])
def test_damage_elsewhere_names_file_and_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n\n' + damage + b'\n{"update": 2}\n')
    with pytest.raises(DamagedLogError, match=r"metrics\.jsonl, line 3"):
        read_jsonl(path)


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log({"update": 1})
    with pytest.raises(FileExistsError, match=r"--resume.*--name"):
        RunLog(tmp_path)
    with RunLog(tmp_path, resume=True) as log:
        log.log({"update": 2})
    assert [record["update"] for record in read_jsonl(log.metrics_path)] == [1, 2]


def test_resuming_from_an_earlier_checkpoint_drops_what_came_after(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        for update in range(6):
            log.log({"update": update, "train/success": 0.1 * update})
            log.log_tree({"update": update, "text": "é\ud83d"})
    with RunLog(tmp_path, resume=True) as log:
        log.truncate_after(3)
        log.log({"update": 4, "train/success": 0.9})
        log.log_tree({"update": 4})
    assert [record["update"] for record in read_jsonl(log.metrics_path)] == [0, 1, 2, 3, 4]
    assert [record["update"] for record in read_jsonl(log.trees_path)] == [0, 1, 2, 3, 4]
    assert not list(tmp_path.glob("*.partial"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/success")
    assert [(event.step, round(event.value, 6)) for event in events][-2:] == [(3, 0.3), (4, 0.9)]


def test_tensorboard_gets_the_numbers_and_nothing_else(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        log.log({"update": 1, "a/number": 2, "a/text": "x", "a/nan": math.nan, "a/list": [1], "a/flag": True})
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"] == ["a/number"]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        with RunLog(tmp_path / name) as log:
            log.write_config({"seed": 0})
            log.log({"update": 1, "x": 0.1})
            log.log_tree({"update": 1, "nodes": [{"id": 0}]})
    for file in ("config.yaml", "metrics.jsonl", "trees.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_trackers_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="known: wandb, trackio"):
        RunLog(tmp_path / "run", trackers=("mlflow",))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"not installed: pip install 'trace-envs\[wandb\]'"):
        RunLog(tmp_path / "run", trackers=("wandb",))
    assert not (tmp_path / "run").exists()

    calls: list[Any] = []
    fake = types.ModuleType("trackio")
    fake.init = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    fake.log = lambda values, step: calls.append((step, values))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append("finish")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with RunLog(tmp_path / "run", trackers=("trackio",)) as log:
        log.write_config({"seed": 0})
        log.log({"update": 1, "x": 0.5, "name": "y"})
    assert calls == [
        {"project": "trace-envs", "name": "run", "config": {"seed": 0}, "resume": "never"},
        (1, {"x": 0.5}),
        "finish",
    ]
    assert json.loads(log.metrics_path.read_text())["name"] == "y"
