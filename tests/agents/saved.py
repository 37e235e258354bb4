"""What the tests of checkpoints share: something to save, ways to look at what was saved, and ways to spoil it."""

import os

import numpy as np
import torch

from agents.checkpoint import save_checkpoint


class Saved:
    """Something with `save_pretrained`."""

    def __init__(self, name, text="x"):
        self.name, self.text = name, text

    def save_pretrained(self, directory):
        os.makedirs(directory / "more", exist_ok=True)
        (directory / self.name).write_text(self.text)
        (directory / "more" / self.name).write_text(self.text)


def save(directory, update, state=None, keep=2, fingerprint="run"):
    model, tokenizer = Saved("model.safetensors", f"{update} {state}"), Saved("tok.json")
    return save_checkpoint(directory, update, model, tokenizer, state or {}, keep=keep, fingerprint=fingerprint)


def same(a, b):
    """Whether two states are equal in type, dtype, shape and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def bits(tensor):
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage())


def names(directory):
    return {p.name for p in directory.iterdir()}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
