"""What the tests of adapters and references share: log-probs of a whole forest, and adapters that matter."""

import numpy as np
import torch

from agents.flat import flat_layout
from agents.packing import packed_layout
from agents.tokens import EdgeTokens
from allocation.forest_table import ForestTable

LAYOUTS = {"flat": flat_layout, "packed": packed_layout}
NO_VALUES = np.zeros(0, dtype=np.int64)


def log_probs(score, forest, layout="flat"):
    """Log-probs of all sampled tokens of a forest, in the order of `EdgeTokens`, and those of the sampler."""
    table = ForestTable.of(forest)
    tokens = EdgeTokens.of(table, np.flatnonzero(~table.is_root))
    out = torch.full((len(tokens),), torch.nan)
    for micro in LAYOUTS[layout](tokens, NO_VALUES, 512).micro_batches:
        out[torch.from_numpy(micro.token)] = score(micro, torch.from_numpy(tokens.ids[micro.token]))
    return out, torch.from_numpy(tokens.old_logprobs)


def random_adapters(model, seed=0, scale=0.3):
    """Gives the adapters weights that change what the model says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def answer(model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits
