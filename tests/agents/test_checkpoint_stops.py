"""What is left when the saving of a checkpoint is killed or fails, at whatever moment."""

import logging
import os
import shutil
import sys

import pytest
import saved
from safetensors import SafetensorError
from saved import Saved, flip, names, save

import agents.checkpoint
import agents.manifest
import agents.state_file
from agents.checkpoint import CheckpointError, load_checkpoint, load_latest, save_checkpoint


def moments(place, shelf, work):
    """Does some work, and yields a copy of a directory as it was whenever it had changed: what a kill at that moment leaves."""
    traced = {m.__file__ for m in (agents.checkpoint, agents.manifest, agents.state_file, saved, shutil)}
    seen, copies = [], []

    def note():
        now = sorted((str(p), p.lstat().st_size, p.lstat().st_ino) for p in place.rglob("*"))
        if now not in seen[-1:]:
            seen.append(now)
            copies.append(shelf / str(len(copies)))
            sys.settrace(None)
            shutil.copytree(place, copies[-1])
            sys.settrace(trace)

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in traced or frame.f_code is note.__code__:
            return None
        if event == "line":
            note()
        return trace

    place.mkdir(exist_ok=True)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return copies


@pytest.mark.parametrize("kind", ["first", "next", "again", "only one", "over a damaged one", "after a kill"])
def test_a_kill_at_any_line_of_saving_leaves_the_old_or_the_new(tmp_path, kind):
    place = tmp_path / "place"
    if kind != "first":
        save(place, 3, {"x": 3}, keep=3)
    if kind in ("next", "again", "over a damaged one", "after a kill"):
        save(place, 2, {"x": 2}, keep=3)
    if kind == "over a damaged one":
        flip(place / "update-000003" / "trainer.json")
    if kind == "after a kill":
        (place / "update-000003").rename(place / ".replaced-000003")
        shutil.copytree(place / "update-000002", place / ".writing-000003")
        shutil.copytree(place / "update-000002", place / ".removing-update-000001")
    old = {"first": None, "over a damaged one": 2}.get(kind, 3)
    copies = moments(place, tmp_path / "shelf", lambda: save(place, 4 if kind == "next" else 3, {"x": 9}))
    found = []
    for copy in copies:
        try:
            found.append(load_latest(copy, "run").state["x"])
        except CheckpointError:
            found.append(None)
        # Whoever goes on tidies up, and keeps what was refused.
        save(copy, 5, {"x": 10})
        assert load_latest(copy, "run").state == {"x": 10}
        kept = names(copy)
        assert all(name.startswith(("update-", "refused-")) for name in kept), kept
        spoiled = "refused-update-000003-1" if "refused-update-000003-1" in kept else "update-000003"
        assert (kind != "over a damaged one") or (copy / spoiled / "trainer.json").exists()
        assert len([name for name in kept if load_able(copy / name)]) == (1 if found[-1] is None else 2)
    # First the old one, then, from one moment to the next, the new one for good.
    switch = found.index(9)
    assert len(found) > 10 and 0 < switch < len(found)
    assert found == [old] * switch + [9] * (len(found) - switch)


def load_able(path):
    try:
        return load_checkpoint(path, "run") is not None
    except (CheckpointError, ValueError):
        return False


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "os.open", "write_state", "write_manifest"])
@pytest.mark.parametrize("again", [False, True])
def test_a_failure_of_any_call_leaves_the_earlier_checkpoint_and_one_clear_error(tmp_path, monkeypatch, call, again):
    target = agents.checkpoint.os if call.startswith("os.") else agents.checkpoint
    name = call.split(".")[-1]
    real, update = getattr(target, name), 1 if again else 2
    calls = number = 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    for number in range(100):
        place, calls = tmp_path / str(number), 0
        save(place, 1, {"x": 1})
        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing)
            try:
                save(place, update, {"x": 2})
            except CheckpointError as error:
                assert "cannot be written ([Errno 28] No space left on device" in str(error)
                assert f"update-00000{update}" in str(error) and "make room for it" in str(error)
        assert load_latest(place, "run").state["x"] in (1, 2)
        save(place, 3, {"x": 3})
        assert load_latest(place, "run").update == 3 and all(n.startswith("update-") for n in names(place))
        if calls <= number:
            break
    assert number >= 1


def test_a_full_disk_that_safetensors_meets_is_the_same_error(tmp_path):
    class Full(Saved):
        def save_pretrained(self, directory):
            super().save_pretrained(directory)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save(tmp_path, 1, {"x": 1})
    with pytest.raises(CheckpointError, match=r"update-000002 cannot be written .*No space left"):
        save_checkpoint(tmp_path, 2, Full("model.safetensors"), Saved("tok.json"), {}, fingerprint="run")
    assert names(tmp_path) == {"update-000001"} and load_latest(tmp_path, "run").update == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_directory_is_one_clear_error(tmp_path):
    save(tmp_path, 1, {"x": 1})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written .*Permission denied"):
            save(tmp_path, 2)
        assert load_latest(tmp_path, "run").update == 1
    finally:
        tmp_path.chmod(0o700)


def test_a_directory_that_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"update-000002 cannot be written .*exists"):
        save(tmp_path / "checkpoints", 2)


def test_an_old_one_that_cannot_be_removed_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    def busy(path, ignore_errors=False):
        raise OSError(16, "Device or resource busy")

    save(tmp_path, 1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(agents.checkpoint.shutil, "rmtree", busy)
        assert save(tmp_path, 2, keep=1).exists()
    assert "update-000001 cannot be removed" in caplog.text
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == {"update-000003"}


def test_reading_writes_nothing(tmp_path):
    save(tmp_path, 2, {"x": 2})
    save(tmp_path, 3, {"x": 3})
    (tmp_path / "update-000003").rename(tmp_path / ".replaced-000003")
    (tmp_path / "notes").mkdir()
    (tmp_path / "update-abc").mkdir()
    before = names(tmp_path)
    loaded = load_latest(tmp_path, "run")
    assert loaded.update == 3 and loaded.path.name == ".replaced-000003" and names(tmp_path) == before
