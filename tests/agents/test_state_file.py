"""A nested state comes back from disk as it was, in type, dtype, shape and bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from saved import names, same, save

from agents.checkpoint import load_checkpoint, load_latest
from agents.state_file import flatten, read_state, restore, write_state


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(["float32", "float64", "float16", "int64", "int32", "uint8", "uint64", "bool"]))
    array = np.random.default_rng(draw(st.integers(0, 99))).normal(size=draw(st.lists(st.integers(0, 3), max_size=3)))
    array = np.abs(np.asarray(array * 9)).astype(dtype)
    if draw(st.booleans()):
        array = array.T
    if draw(st.booleans()) and array.ndim:
        array = array[::-1]
    kind = draw(st.sampled_from(["array", "scalar", "tensor", "bfloat16"]))
    if kind == "scalar":
        return array.dtype.type(array.sum())
    if kind == "array":
        return array
    tensor = torch.from_numpy(np.array(array))
    return tensor if kind == "tensor" else tensor.to(torch.bfloat16)


plain = st.none() | st.booleans() | st.integers(-(2**130), 2**130) | st.floats(allow_nan=False) | st.text(max_size=5)
marks = st.sampled_from(["__tensor__", "__array__", "__pairs__", "__tuple__", "__scalar__"])
keys = st.text(alphabet="ab/_0é", max_size=4) | st.integers(-3, 3) | st.none() | marks | st.tuples(st.integers(0, 3))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        plain | arrays(),
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )
)
@example({"a/b": np.ones(2), "a": {"b": np.zeros(2)}})
@example({1: np.ones(2), "1": np.zeros(2), (1, "x"): None, 0.5: "a"})
@example({"__tensor__": "0:"})
def test_nested_states_come_back(state):
    tensors = {}
    text = json.dumps(flatten(state, "", tensors))
    assert same(state, restore(json.loads(text), tensors))


def test_a_checkpoint_holds_all_of_a_state(tmp_path):
    rng = np.random.default_rng(3)
    shared = torch.arange(4.0)
    state = {
        "rng": rng.bit_generator.state,
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": shared[:2]}, 1: {"step": np.array(4.0)}},
        "betas": (0.9, 0.999),
        "view": np.arange(6).reshape(2, 3).T,
        "again": shared,
        "grown": shared[:1].expand(3),
        "half": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
        "flags": torch.tensor(True),
        "empty": torch.zeros(0, 3, dtype=torch.int64),
        "limits": [float("inf"), 0.1 + 0.2, -0.0],
        "numpy": np.float64(0.1),
        "swapped": np.arange(3, dtype=">i4"),
        "sampling": torch.Generator().manual_seed(1).get_state(),
        "odd": "\ud83d é",
    }
    path = save(tmp_path / "checkpoints", 12, state)
    assert path.name == "update-000012" and {"model.safetensors", "tok.json", "manifest.json"} <= names(path)
    loaded = load_latest(tmp_path / "checkpoints", "run")
    assert (loaded.path, loaded.update) == (path, 12)
    assert same(state | {"swapped": np.arange(3, dtype="i4")}, loaded.state)
    # Each in memory of its own: writing into one changes neither the file nor another.
    loaded.state["again"] += 1
    assert loaded.state["state"][0]["exp_avg"].tolist() == [0, 1] and load_checkpoint(path).state["again"][0] == 0
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_generators_go_on_where_they_were(tmp_path, name):
    rng, sampling = np.random.Generator(getattr(np.random, name)(5)), torch.Generator().manual_seed(7)
    rng.integers(9, size=3, dtype=np.uint32)  # leaves half a draw in the buffer
    torch.rand(3, generator=sampling)
    write_state(tmp_path, {"numpy": rng.bit_generator.state, "torch": sampling.get_state()})
    state = read_state(tmp_path)
    other, again = np.random.Generator(getattr(np.random, name)(0)), torch.Generator()
    other.bit_generator.state = state["numpy"]
    again.set_state(state["torch"])
    assert (
        other.integers(2**31, size=9, dtype=np.uint32).tolist() == rng.integers(2**31, size=9, dtype=np.uint32).tolist()
    )
    assert torch.equal(torch.rand(9, generator=again), torch.rand(9, generator=sampling))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1}, "/a/1 holds a set"),
        (b"x", "/a/1 holds a bytes"),
        (np.array(["x"]), "/a/1 holds a numpy array of <U1"),
        (np.array([None]), "/a/1 holds a numpy array of object"),
        (np.zeros(2, np.complex128), "/a/1 holds a numpy array of complex128"),
        (torch.zeros(2, dtype=torch.complex128), r"/a/1 holds a tensor of torch.complex128"),
        (torch.eye(2).to_sparse(), r"/a/1 holds a tensor of torch.float32 and torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "/a/1 holds a tensor of torch.float32"),
        ({b"k": 1}, "/a/1/b'k' holds a bytes"),
        ({np.int64(3): 1}, "/a/1/3 has a key of numpy or torch"),
        ({(0, np.int64(3)): 1}, r"/a/1/\(0, np.int64\(3\)\) has a key of numpy or torch"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path, value, message):
    with pytest.raises(TypeError, match=f"{message}.* which a checkpoint cannot keep"):
        save(tmp_path, 1, {"a": [0, value]})
    assert names(tmp_path) == set()
