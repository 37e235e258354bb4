"""What a run writes, what a crash may cost, and what resuming may not lose."""

from __future__ import annotations

import json
import math
import os
import signal
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


def points(directory: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard")).Reload().Scalars(tag)
    return [(event.step, round(event.value, 6)) for event in events]


def test_what_is_kept_is_kept_byte_for_byte(tmp_path: Path) -> None:
    lines = [
        b'{"update":0,  "x": 1.50}\n',
        b'{"update": 1, "t": "\\ud83d\xc3\xa9", "n": 1e400}\n',
        b'{"x": 2, "update": 2}\n',
    ]
    for name in ("metrics.jsonl", "trees.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join(lines))
    with RunLog(tmp_path, resume=True) as log:
        log.truncate_after(1)
    for name in ("metrics.jsonl", "trees.jsonl"):
        assert (tmp_path / name).read_bytes() == b"".join(lines[:2])


def test_an_evaluation_counts_as_of_the_update_that_it_came_after(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for update in (1, 2, 3):
            log.log({"update": update, "train/success": 0.5})
            if update != 1:
                log.log({"update": update, "eval/accuracy": 0.25})
    with RunLog(tmp_path, resume=True) as log:
        log.truncate_after(2)
    assert [list(r) for r in read_jsonl(log.metrics_path)] == [
        ["update", "train/success"],
        ["update", "train/success"],
        ["update", "eval/accuracy"],
    ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "trees.jsonl"])
@pytest.mark.parametrize("line", [b'{"x": 1}', b'{"update": "2"}', b'{"update": true}', b"[1]", b"{"])
def test_a_line_that_is_no_record_stops_a_truncation_before_anything_is_lost(
    tmp_path: Path, name: str, line: bytes
) -> None:
    whole = b'{"update": 1}\n' + line + b'\n{"update": 3}\n'
    for file in ("metrics.jsonl", "trees.jsonl"):
        (tmp_path / file).write_bytes(whole if file == name else b'{"update": 1}\n{"update": 3}\n')
    before = [(tmp_path / file).read_bytes() for file in ("metrics.jsonl", "trees.jsonl")]
    with (
        RunLog(tmp_path, resume=True) as log,
        pytest.raises(DamagedLogError, match=rf"{name}, line 2: .*Delete or mend"),
    ):
        log.truncate_after(1)
    assert [(tmp_path / file).read_bytes() for file in ("metrics.jsonl", "trees.jsonl")] == before


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_truncation_that_is_stopped_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with RunLog(tmp_path) as log:
        for update in range(5):
            log.log({"update": update, "x": update})
            log.log_tree({"update": update})
    real, calls = os.replace, []

    def stop(*paths: Any) -> None:
        calls.append(paths)
        if number == 2 * len(calls) - 2:
            raise KeyboardInterrupt
        real(*paths)
        if number == 2 * len(calls) - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, RunLog(tmp_path, resume=True) as log:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            log.truncate_after(2)
    with RunLog(tmp_path, resume=True) as log:
        log.truncate_after(2)
    assert [r["update"] for r in read_jsonl(log.metrics_path)] == [0, 1, 2]
    assert [r["update"] for r in read_jsonl(log.trees_path)] == [0, 1, 2] and not list(tmp_path.glob("*.partial"))


def test_a_kill_loses_no_point_of_a_record_that_is_kept(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            log = RunLog(tmp_path)
            log.log({"update": 1, "train/success": 0.5})
            log.log({"update": 1, "eval/accuracy": 0.25})
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"update": 1, "train/success": 0.5},
        {"update": 1, "eval/accuracy": 0.25},
    ]
    assert points(tmp_path, "train/success") == [(1, 0.5)] and points(tmp_path, "eval/accuracy") == [(1, 0.25)]


def test_settings_are_whole_whenever_writing_them_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path, resume=True) as log:
        log.write_config({"seed": 0})
        for call in ("replace", "fsync"):
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
                patch.setattr(os, call, full)
                log.write_config({"seed": 1, "text": "x" * 1000})
            assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"seed": 0}
        log.write_config({"seed": 2})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"seed": 2}
    assert not list(tmp_path.glob("*.partial"))


def full(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_log_is_on_disk_once_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    with RunLog(tmp_path) as log:
        log.log({"update": 1})
        log.sync()
    assert synced == [log.metrics_path.stat().st_ino, log.trees_path.stat().st_ino]
