"""Which checkpoints are kept, which are refused and why, and which one a run goes on from."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from saved import flip, names, save

from agents.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from agents.manifest import ManifestError, check_files, read_manifest, write_manifest
from agents.models import load_model


def test_the_last_few_are_kept(tmp_path):
    for update in (1, 2, 3, 10, 1_000_000):
        save(tmp_path, update, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["update-000003", "update-000010", "update-1000000"]
    assert load_latest(tmp_path, "run").update == 1_000_000
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_writing_an_update_again_replaces_it(tmp_path):
    save(tmp_path, 5, {"x": 1})
    assert load_checkpoint(save(tmp_path, 5, {"x": 2})).state == {"x": 2}
    assert names(tmp_path) == {"update-000005"}


# What is refused.


def files_of(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


FILES = [
    "manifest.json",
    "manifest.sha256",
    "model.safetensors",
    "more/model.safetensors",
    "more/tok.json",
    "tok.json",
    "trainer.arrays",
    "trainer.json",
]
DAMAGE = {
    "altered": lambda file, other: flip(file),
    "cut short": lambda file, other: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file, other: file.write_bytes(b""),
    "longer": lambda file, other: file.write_bytes(file.read_bytes() + b" "),
    "missing": lambda file, other: file.unlink(),
    "of another run": lambda file, other: shutil.copyfile(other, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_is_refused_by_name_and_the_one_before_is_used(tmp_path, caplog, name, damage):
    first = save(tmp_path / "one", 3, {"x": np.ones(50)})
    later = save(tmp_path / "one", 6, {"x": np.zeros(50)})
    other = save(tmp_path / "two", 6, {"x": np.full(50, 2.0), "y": 1}, fingerprint="other")
    assert files_of(later) == FILES
    DAMAGE[damage](later / name, other / name)
    with caplog.at_level(logging.WARNING):
        loaded = load_latest(tmp_path / "one", "run")
    # The tokenizer of both runs is the same, so a copy of it is no damage.
    harmless = damage == "of another run" and name.endswith("tok.json")
    assert loaded.path == (later if harmless else first)
    if harmless:
        assert not caplog.records
        return
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "going on from update-000003 instead" in record.message
    assert str(later) in record.message
    assert (name if not name.startswith("manifest") else "manifest.") in record.message
    assert later.exists(), "a refused checkpoint is kept"


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    path = save(tmp_path, 1, {"x": np.ones(3)})
    for name in ("manifest.json", "manifest.sha256", "trainer.json"):
        whole = (path / name).read_bytes()
        for i in range(0, 8 * len(whole), 3):
            data = bytearray(whole)
            data[i // 8] ^= 1 << (i % 8)
            (path / name).write_bytes(bytes(data))
            with pytest.raises(CheckpointError, match="update-000001 is refused"):
                load_checkpoint(path, "run")
        (path / name).write_bytes(whole)
    load_checkpoint(path, "run")


def rewritten(path, **header):
    """Gives a checkpoint a whole manifest that says something else."""
    write_manifest(path, dict(read_manifest(path).header) | header)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: rewritten(p, version=99), f"it has version 99, this release reads version {FORMAT_VERSION}"),
        (lambda p: rewritten(p, fingerprint="z"), "it is of another run: its settings have the digest 'z'"),
        (lambda p: rewritten(p, update=5), "it is of update 5, so it was renamed"),
        (
            lambda p: (p / "adapter_config.json").write_text("{}"),
            "its file adapter_config.json is not in manifest.json",
        ),
        (lambda p: [f.unlink() for f in p.rglob("manifest*")], "it has no manifest.json"),
        (lambda p: [shutil.rmtree(p), p.mkdir()], "it has no manifest.json"),
        (lambda p: [(p / "trainer.json").write_text("[1"), rewritten(p)], "Expecting"),
        (
            lambda p: [(p / "trainer.json").write_text('{"x": {"__tensor__": "9:/x"}}'), rewritten(p)],
            "9:/x' is missing",
        ),
        (lambda p: [(p / "trainer.arrays").write_bytes(b"{}"), rewritten(p)], "header"),
    ],
)
def test_versions_runs_and_contents_are_checked(tmp_path, caplog, change, reason):
    first, later = save(tmp_path, 1, {"x": np.ones(3)}), save(tmp_path, 2, {"x": np.zeros(3)})
    change(later)
    with caplog.at_level(logging.WARNING):
        assert load_latest(tmp_path, "run").path == first
    (record,) = caplog.records
    assert f"{later} is refused: " in record.message and reason in record.message


def test_if_none_can_be_used_each_is_listed(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*; start the run anew, without --resume"):
        load_latest(tmp_path, "run")
    first, later = save(tmp_path, 1), save(tmp_path, 2, fingerprint="other")
    (first / "tok.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_latest(tmp_path, "run")
    text = str(caught.value)
    assert text.startswith("no checkpoint can be used: ")
    assert text.index(f"{later} is refused: it is of another run") < text.index(
        f"{first} is refused: its file tok.json"
    )


def test_damaged_checkpoints_neither_count_nor_are_removed(tmp_path):
    for update in (1, 2, 3, 4):
        save(tmp_path, update, keep=4)
    flip(tmp_path / "update-000003" / "trainer.json")
    flip(tmp_path / "update-000004" / "trainer.json")
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == {f"update-00000{i}" for i in (2, 3, 4, 5)}
    flip(tmp_path / "update-000005" / "trainer.json")
    assert load_latest(tmp_path, "run").update == 2
    save(tmp_path, 3, keep=1)
    assert load_latest(tmp_path, "run").update == 3


def test_a_refused_checkpoint_that_is_in_the_way_is_kept_under_another_name(tmp_path, caplog):
    for number in (1, 2):
        path = save(tmp_path, 6, {"x": number})
        flip(path / "trainer.json")
        spoiled = (path / "trainer.json").read_bytes()
        with caplog.at_level(logging.WARNING):
            save(tmp_path, 6, {"x": 3})
        assert f"{path} cannot be used; it makes room for a new one and is kept as" in caplog.records[-1].message
        assert (tmp_path / f"refused-update-000006-{number}" / "trainer.json").read_bytes() == spoiled
        assert load_latest(tmp_path, "run").state == {"x": 3}
    foreign = save(tmp_path, 6, {"x": 4}, fingerprint="other")
    assert load_checkpoint(foreign).state == {"x": 4} and (tmp_path / "refused-update-000006-3").exists()


# The folder.


def test_a_manifest_can_be_checked_by_other_tools(tmp_path):
    path = save(tmp_path, 1)
    digest, name = (path / "manifest.sha256").read_text().split()
    assert name == "manifest.json" and hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    record = json.loads((path / name).read_text())
    assert record["header"] == {"version": FORMAT_VERSION, "update": 1, "fingerprint": "run"}
    entry = record["files"]["more/tok.json"]
    assert entry == {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}


@pytest.mark.parametrize("text", ["[]", "{}", '{"header": {}}', '{"header": {}, "files": {"a": 1}}', "{"])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    with pytest.raises(ManifestError, match="is no manifest"):
        read_manifest(tmp_path)


def test_a_file_that_cannot_be_read_is_no_crash(tmp_path):
    path = save(tmp_path, 1)
    manifest = read_manifest(path)
    (path / "tok.json").unlink()
    (path / "tok.json").symlink_to("nowhere")
    with pytest.raises(ManifestError, match=r"its files cannot be read .*tok\.json"):
        check_files(path, manifest)


def test_a_model_comes_back_and_a_cut_one_is_named(model, tokenizer, tmp_path):
    path = save_checkpoint(tmp_path, 1, model, tokenizer, {"x": 1}, fingerprint="run")
    loaded, words = load_model(str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert words.chat_template == tokenizer.chat_template and words.encode("Say a b") == tokenizer.encode("Say a b")
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text(), "the weights still lie in the file"
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"update-000001.*model\.safetensors"):
        load_model(str(path))
    with pytest.raises(CheckpointError, match=r"update-000001 is refused: its file model\.safetensors has"):
        load_latest(tmp_path, "run")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no model folder \(no config.json\); --model takes"):
        load_model(str(tmp_path))
