import json
import os

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import agents.checkpoint
from agents.checkpoint import CheckpointError, _flatten, _restore, list_checkpoints, load_checkpoint, save_checkpoint
from agents.models import load_model


class Saved:
    """Something with `save_pretrained`."""

    def __init__(self, name):
        self.name = name

    def save_pretrained(self, directory):
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, self.name), "w") as file:
            file.write("x")


def save(directory, update, state=None, keep=2):
    return save_checkpoint(directory, update, Saved("model.safetensors"), Saved("tok.json"), state or {}, keep=keep)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(["float32", "float64", "int64", "int32", "uint8", "bool"]))
    array = np.random.default_rng(draw(st.integers(0, 99))).normal(size=draw(st.lists(st.integers(0, 3), max_size=3)))
    array = np.asarray(array * 9).astype(dtype)
    if draw(st.booleans()):
        array = array.T
    return torch.from_numpy(array.copy()) if draw(st.booleans()) else array


plain = st.none() | st.booleans() | st.integers(-(2**130), 2**130) | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(alphabet="ab/_0é", max_size=4) | st.integers(-3, 3)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        plain | arrays(),
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )
)
@example({"a/b": np.ones(2), "a": {"b": np.zeros(2)}})
@example({1: np.ones(2), "1": np.zeros(2)})
def test_nested_states_come_back(state):
    tensors = {}
    text = json.dumps(_flatten(state, "", tensors))
    assert same(state, _restore(json.loads(text), tensors))


def test_a_checkpoint_holds_all_of_a_state(tmp_path):
    rng = np.random.default_rng(3)
    shared = torch.arange(4.0)
    state = {
        "rng": rng.bit_generator.state,
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": shared[:2]}, 1: {"step": np.array(4.0)}},
        "betas": (0.9, 0.999),
        "view": np.arange(6).reshape(2, 3).T,
        "again": shared,
        "numpy": np.float64(0.1),
        "sampling": torch.Generator().manual_seed(1).get_state(),
    }
    path = save(tmp_path / "checkpoints", 12, state)
    assert path.name == "update-000012" and {"model.safetensors", "tok.json"} <= {p.name for p in path.iterdir()}
    update, loaded = load_checkpoint(path)
    assert update == 12 and same(state | {"betas": [0.9, 0.999], "numpy": 0.1}, loaded)
    other = np.random.default_rng(0)
    other.bit_generator.state = loaded["rng"]
    assert other.random() == rng.random()


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(TypeError, match="/a/1 holds a set, which a checkpoint cannot keep"):
        save(tmp_path, 1, {"a": [0, {1}]})
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("point", ["os.replace", "save_file", "_sync"])
def test_a_crash_while_writing_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, point):
    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    first = save(tmp_path, 1, {"x": np.ones(3)})
    with monkeypatch.context() as patch:
        patch.setattr(agents.checkpoint.os if point == "os.replace" else agents.checkpoint, point.split(".")[-1], crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, {"x": np.zeros(3)})
    assert list_checkpoints(tmp_path) == [first] and load_checkpoint(first)[0] == 1
    second = save(tmp_path, 2, {"x": np.zeros(3)})
    assert list_checkpoints(tmp_path) == [first, second] and {p.name for p in tmp_path.iterdir()} == {
        p.name for p in (first, second)
    }
    assert load_checkpoint(second)[1]["x"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_while_replacing_a_checkpoint_leaves_it(tmp_path, monkeypatch, renames):
    real, calls = os.replace, []

    def crash(*args):
        if len(calls) == renames:
            raise KeyboardInterrupt
        calls.append(args)
        real(*args)

    only = save(tmp_path, 4, {"x": 1})
    with monkeypatch.context() as patch:
        patch.setattr(agents.checkpoint.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 4, {"x": 2})
    assert list_checkpoints(tmp_path) == [only] and load_checkpoint(only) == (4, {"x": 1})
    # What the crash left is swept up by the next save, whichever update it is of.
    later = save(tmp_path, 5, {"x": 3})
    assert {p.name for p in tmp_path.iterdir()} == {only.name, later.name}


def test_the_last_few_are_kept(tmp_path):
    for update in (1, 2, 3, 10):
        save(tmp_path, update, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["update-000002", "update-000003", "update-000010"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_writing_an_update_again_replaces_it(tmp_path):
    save(tmp_path, 5, {"x": 1})
    assert load_checkpoint(save(tmp_path, 5, {"x": 2})) == (5, {"x": 2})


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE = {
    "cut state": lambda d: cut(d / "trainer.json"),
    "cut tensors": lambda d: cut(d / "trainer.safetensors"),
    "empty tensors": lambda d: (d / "trainer.safetensors").write_bytes(b""),
    "no state": lambda d: (d / "trainer.json").unlink(),
    "no tensors": lambda d: (d / "trainer.safetensors").unlink(),
    "not text": lambda d: (d / "trainer.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda d: (d / "trainer.json").write_text("[]"),
    "a part": lambda d: (d / "trainer.json").write_text('{"version": 1}'),
    "a tensor missing": lambda d: save_file(
        dict(list(load_file(d / "trainer.safetensors").items())[1:]), d / "trainer.safetensors"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_with_the_name_of_the_checkpoint(tmp_path, damage):
    path = save(tmp_path, 7, {"x": np.ones(50), "y": np.zeros(3)})
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError, match=r"update-000007 cannot be read.*remove it to use an earlier one"):
        load_checkpoint(path)


def test_another_version_is_refused(tmp_path):
    path = save(tmp_path, 7)
    record = json.loads((path / "trainer.json").read_text())
    (path / "trainer.json").write_text(json.dumps(record | {"version": 99}))
    with pytest.raises(CheckpointError, match="update-000007 has version 99, this release reads version 1"):
        load_checkpoint(path)


def test_a_model_comes_back_and_a_cut_one_is_named(model, tokenizer, tmp_path):
    path = save_checkpoint(tmp_path, 1, model, tokenizer, {"x": 1})
    loaded, words = load_model(str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert words.chat_template == tokenizer.chat_template and words.encode("Say a b") == tokenizer.encode("Say a b")
    cut(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"update-000001.*model\.safetensors"):
        load_model(str(path))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no model folder \(no config.json\); --model takes"):
        load_model(str(tmp_path))
