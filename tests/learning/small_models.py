"""Small models of the families that read packed rows, and trees of random tokens for them."""

import numpy as np
import torch
from token_trees import number_tokens
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from allocation import Sample, Tree

VOCABULARY = 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
KINDS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}), "llama": (LlamaConfig, LlamaForCausalLM, {})}


def build(config, kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def make(name, **changed):
    config, kind, extra = KINDS[name]
    return build(config(**(SHAPE | extra | changed)), kind)


def exact(model):
    """In float64, with norms that do not go down to float32 on the way."""
    model = model.double()
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                double = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                double.weight = norm.weight
                setattr(module, name, double)
    return model


def branched(seed=0, turns=3):
    """Two trees with branches of branches, tokens of any id below `VOCABULARY`."""
    rng = np.random.default_rng(seed)
    forest = []
    for index in range(2):
        tree = Tree(str(index), index, "")
        for number in range(5):
            inner = [n for n in tree.nodes if n.depth and not n.terminal]
            node = tree.root if number < 2 else inner[int(rng.integers(len(inner)))]
            origin, rollout = ("root" if number < 2 else "continuation"), tree.plan(int(number >= 2))
            while node.depth < turns:
                n = int(rng.integers(1, 6))
                sample = Sample("", np.zeros(n, dtype=np.int64), -rng.random(n).astype(np.float32), np.zeros(0))
                last = node.depth == turns - 1
                reward = float(rng.random()) if last else 0.0
                node = tree.add(node, rollout, origin, sample=sample, reward=reward, terminated=last)
        forest.append(tree)
    return number_tokens(forest, rng, vocabulary=VOCABULARY)


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()
