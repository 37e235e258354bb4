"""Packed rows through whole models, three ways, against the models' own rows of single paths."""

import copy
import logging

import numpy as np
import pytest
import torch
from small_models import KINDS, SHAPE, VOCABULARY, branched, build, exact, make, relative
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agents import tree_attention
from agents.flat import flat_layout
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from agents.packing import packed_layout
from agents.tokens import EdgeTokens
from agents.tree_attention import ancestor_mask, block_mask, forward, supported
from allocation.forest_table import ForestTable

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _uncompiled():
    """FlexAttention on a CPU without half a minute of compilation."""
    with torch.compiler.set_stance("force_eager" if not torch.cuda.is_available() else "default"):
        yield


def both_layouts(limit=10**6):
    table = ForestTable.of(branched())
    tokens = EdgeTokens.of(table, np.flatnonzero(~table.is_root))
    prefixes = np.flatnonzero(table.num_children > 0)
    return [layout(tokens, prefixes, limit) for layout in (flat_layout, packed_layout)]


def read(layout, hidden_of):
    """Hidden states where tokens are predicted and values are read, in the order of tokens and of rows."""
    tokens, values = {}, {}
    for micro in layout.micro_batches:
        hidden = hidden_of(micro)
        tokens |= dict(zip(micro.token.tolist(), hidden[micro.row, micro.before], strict=True))
        values |= dict(zip(micro.value_node.tolist(), hidden[micro.value_row, micro.value_at], strict=True))
    return torch.stack([tokens[t] for t in sorted(tokens)] + [values[v] for v in sorted(values)])


def flat_hidden(model):
    decoder, device = model.get_decoder(), model.device
    return lambda micro: decoder(input_ids=torch.from_numpy(micro.ids).to(device), use_cache=False).last_hidden_state


def packed_hidden(model, how=None):
    def hidden(micro):
        ids, positions, ends = (torch.from_numpy(x).to(model.device) for x in (micro.ids, micro.positions, micro.ends))
        return forward(model.get_decoder(), ids, positions, ends, how=how)

    return hidden


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("how", ["paths", "dense", "flex"])
@pytest.mark.parametrize("name", KINDS)
def test_packed_hidden_states_are_those_of_single_paths(name, how, dtype, tolerance):
    model = exact(make(name)) if dtype == torch.float64 else make(name)
    for limit in (10**6, 40):
        flat, packed = both_layouts(limit)
        with torch.no_grad():
            expected, got = read(flat, flat_hidden(model)), read(packed, packed_hidden(model, how))
        assert relative(got, expected) < tolerance
        assert relative(read(packed, flat_hidden(model)), expected) > 0.1, "branches do not matter to this model"


@pytest.mark.parametrize("how", ["paths", "dense"])
@pytest.mark.parametrize("name", KINDS)
def test_packed_gradients_are_those_of_single_paths(name, how):
    model = exact(make(name))
    gradients = []
    for layout, hidden_of in zip(both_layouts(60), (flat_hidden(model), packed_hidden(model, how)), strict=True):
        model.zero_grad()
        hidden = read(layout, hidden_of)
        generator = torch.Generator().manual_seed(1)
        (hidden * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.get_decoder().parameters()]))
    assert relative(gradients[1], gradients[0]) < 1e-12


def test_several_rows_of_different_lengths():
    """Padding sees itself alone; what a row holds does not matter to the others."""
    model = make("qwen3").double()
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[9, 9, 5, 5, 5, 9, 9, 9, 9], [6, 6, 4, 4, 6, 6, 7, 8, 9]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4, 5], [0, 1, 2, 3, 2, 3, 0, 0, 0]])
    with torch.no_grad():
        found = {how: forward(model.get_decoder(), ids, positions, ends, how=how) for how in ("paths", "dense", "flex")}
        alone = forward(model.get_decoder(), ids[1:, :6], positions[1:, :6], ends[1:, :6], how="paths")
    for hidden in found.values():
        assert torch.isfinite(hidden).all() and relative(hidden, found["dense"]) < 1e-12
        assert relative(hidden[1:, :6], alone) < 1e-12


def test_the_block_mask_is_the_ancestor_mask():
    ends = torch.stack([torch.from_numpy(m.ends[0]) for m in both_layouts()[1].micro_batches])
    length = ends.shape[1]
    at = torch.arange(length)
    mask = block_mask(ends).mask_mod(torch.zeros(1, dtype=torch.long), None, at[:, None], at)
    assert torch.equal(mask, ancestor_mask(ends)[0, 0])
    brute = [[j <= i < ends[0, j] for j in range(length)] for i in range(length)]
    assert mask.tolist() == [[bool(x) for x in row] for row in brute]


# Which models.


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(tree_attention, "_warned", set())
    caplog.set_level(logging.WARNING, "agents.tree_attention")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "agents.tree_attention"]


@pytest.mark.parametrize("name", KINDS)
def test_families_that_pack(name, warnings):
    assert supported(make(name)) and not warnings()
    assert supported(make(name).to(torch.bfloat16)) and not warnings()


def unfit_models():
    wide = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "initializer_range")}
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return {
        "qwen3 with a window": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16, **sliding), "sliding_attention"),
        "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=64), "no further back than 64 tokens"),
        "bloom": (BloomForCausalLM, BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), ""),
        "mamba": (MambaForCausalLM, MambaConfig(**wide, state_size=4), ""),
    }


@pytest.mark.parametrize("name", unfit_models())
def test_others_do_not_and_one_warning_says_so(name, warnings):
    kind, config, reason = unfit_models()[name]
    model = build(config, kind)
    before = model.config._attn_implementation
    assert not supported(model) and not supported(model)
    (message,) = warnings()
    assert kind.__name__ in message and reason in message and "layout='flat'" in message
    assert model.config._attn_implementation == before


def test_a_model_with_positions_of_its_own_is_found_by_the_probe(warnings):
    model = make("llama")
    decoder = model.get_decoder()
    drop = decoder.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"position_ids": None}), with_kwargs=True
    )
    assert not supported(model) and "hidden states differ by" in warnings()[0]
    drop.remove()
    assert supported(model)


def test_a_window_that_no_layer_uses_is_none(warnings):
    assert supported(build(MistralConfig(**SHAPE, sliding_window=None), MistralForCausalLM))
    model = build(Qwen3Config(**SHAPE, head_dim=16, use_sliding_window=False, sliding_window=8), Qwen3ForCausalLM)
    assert supported(model) and not warnings()


def test_learned_positions_are_no_hindrance(warnings):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = build(config, GPT2LMHeadModel)
    assert supported(model) and not warnings()
    flat, packed = both_layouts()
    with torch.no_grad():
        assert relative(read(packed, packed_hidden(model)), read(flat, flat_hidden(model))) < 1e-5


def test_a_model_that_cannot_pack_learns_flat(warnings):
    """The same step, bit for bit, and all of its tokens computed."""
    steps = []
    for layout in ("packed", "flat"):
        kind, config, _ = unfit_models()["mistral"]
        model = build(copy.deepcopy(config), kind)
        learner = Learner(model, LearnerConfig(layout=layout), updates=1)
        figures = learner.update(branched()).figures
        assert figures["learner/computed_tokens"] >= figures["learner/flat_tokens"] > figures["learner/unique_tokens"]
        steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert steps[0].norm() > 0 and torch.equal(*steps) and len(warnings()) == 1


@pytest.mark.parametrize("how", ["paths", "dense", "flex"])
def test_the_configuration_is_as_before_also_after_an_error(how):
    model = make("llama")
    decoder, before = model.get_decoder(), model.config._attn_implementation
    micro = both_layouts()[1].micro_batches[0]
    ids, positions, ends = (torch.from_numpy(x) for x in (micro.ids, micro.positions, micro.ends))

    def fail(*_):
        raise ArithmeticError("in the middle")

    with torch.no_grad():
        forward(decoder, ids, positions, ends, how=how)
        assert model.config._attn_implementation == before
        with decoder.layers[1].register_forward_hook(fail), pytest.raises(ArithmeticError, match="in the middle"):
            forward(decoder, ids, positions, ends, how=how)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_under_autocast(name):
    model = make(name)
    flat, packed = both_layouts()
    found = []
    for layout, hidden_of in ((flat, flat_hidden(model)), (packed, packed_hidden(model))):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = read(layout, hidden_of).float()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        found.append((hidden.detach(), torch.cat([p.grad.flatten() for p in model.get_decoder().parameters()])))
    (expected, slow), (got, fast) = found
    assert fast.dtype == torch.float32 and relative(got, expected) < 3e-2 and relative(fast, slow) < 6e-2


# On a GPU.


@needs_gpu
@pytest.mark.parametrize("how", ["flex", "dense"])
@pytest.mark.parametrize("name", KINDS)
def test_on_a_gpu(name, how):
    model = make(name).to("cuda")
    gradients, states = [], []
    for layout, hidden_of in zip(both_layouts(), (flat_hidden(model), packed_hidden(model, how)), strict=True):
        model.zero_grad()
        hidden = read(layout, hidden_of)
        (hidden * torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden)).sum().backward()
        states.append(hidden.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.get_decoder().parameters()]))
    assert relative(*reversed(states)) < 1e-4 and relative(*reversed(gradients)) < 1e-4


@needs_gpu
def test_flex_is_what_a_gpu_gets(warnings):
    assert supported(make("qwen3").to("cuda")) and not warnings()
