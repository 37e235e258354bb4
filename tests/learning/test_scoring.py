"""The scorer against whole logits of the model."""

import math

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from agents import scoring
from agents.layout import MicroBatch
from agents.scoring import Scorer

TEMPERATURE = 0.7


def flat_rows(ids, row, before, value_row=(), value_at=()):
    rows, length = ids.shape
    lists = [np.array(x, dtype=np.int64) for x in (row, before, range(len(row)), value_row, value_at, value_at)]
    return MicroBatch(np.asarray(ids), np.broadcast_to(np.arange(length), (rows, length)), None, *lists)


@pytest.fixture
def rows(model):
    ids = torch.randint(model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    micro = flat_rows(ids.numpy(), [0, 0, 2, 1, 1], [0, 10, 4, 2, 3], [1, 2], [11, 0])
    scored = ids[torch.from_numpy(micro.row), torch.from_numpy(micro.before) + 1]
    return micro, ids, scored


def definition(model, micro, ids, scored, temperature=TEMPERATURE):
    """Log-probs, entropies and hidden states from the whole model's output."""
    out = model(ids, output_hidden_states=True)
    logprobs = torch.log_softmax(out.logits[micro.row, micro.before] / temperature, -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, scored[:, None])[:, 0], entropy, out.hidden_states[-1][micro.value_row, micro.value_at]


def gradients(model, *outputs):
    """Of a sum in which every output counts differently."""
    model.zero_grad(set_to_none=True)
    sum((x * torch.arange(1, x.numel() + 1).reshape(x.shape)).sum() for x in outputs).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def granite(tokenizer):
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        logits_scaling=4.0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GraniteForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["qwen3", "granite"])
def test_scores_are_those_of_the_whole_output(kind, model, granite, rows):
    """Granite scales its logits, so its output layer alone would be wrong."""
    model = granite if kind == "granite" else model
    scorer = Scorer(model, temperature=TEMPERATURE)
    assert scorer.packs == (kind == "qwen3")
    got = scorer(rows[0], rows[2], entropy=True)
    expected = definition(model, *rows)
    for a, b in zip((got.logprobs, got.entropy, got.hidden), expected, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, atol=1e-5)
    a, b = gradients(model, got.logprobs, got.entropy, got.hidden), gradients(model, *expected)
    assert (a - b).norm() / b.norm() < 1e-5


def test_few_logits_are_held_at_a_time_and_nothing_else_changes(model, rows, monkeypatch):
    scorer = Scorer(model, temperature=TEMPERATURE)
    whole = scorer(rows[0], rows[2], entropy=True)
    expected = gradients(model, whole.logprobs, whole.entropy)
    limit = 2 * model.config.vocab_size
    monkeypatch.setattr(scoring, "MAX_LOGITS", limit)
    made = []
    with model.get_output_embeddings().register_forward_hook(lambda *a: made.append(a[2].numel())):
        got = scorer(rows[0], rows[2], entropy=True)
        assert len(made) == 3 and max(made) <= limit
        gradient = gradients(model, got.logprobs, got.entropy)
        assert len(made) == 6, "logits were kept for the backward pass"
        with torch.no_grad():
            scorer(rows[0], rows[2])
        assert len(made) == 9
    assert torch.allclose(got.logprobs, whole.logprobs, atol=1e-6)
    assert torch.allclose(got.entropy, whole.entropy, atol=1e-6)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


def test_a_vocabulary_beyond_the_limit_goes_one_token_at_a_time(model, rows, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LOGITS", 1)
    with torch.no_grad():
        got = Scorer(model, temperature=TEMPERATURE)(rows[0], rows[2])
        assert got.entropy is None and torch.allclose(got.logprobs, definition(model, *rows)[0], atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_close_and_its_softmax_is_in_float32(model, rows):
    exact = Scorer(model)(rows[0], rows[2], entropy=True)
    rough = Scorer(model, precision="bfloat16")(rows[0], rows[2], entropy=True)
    assert rough.logprobs.dtype == rough.entropy.dtype == torch.float32
    assert 1e-6 < (rough.logprobs - exact.logprobs).abs().max() < 0.3
    assert torch.allclose(rough.entropy, exact.entropy, atol=0.1)
    # In bfloat16 a log-prob near -5 would be a multiple of 1/32.
    assert (rough.logprobs * 32 % 1 != 0).any()


@torch.no_grad()
def test_greedy_sampling_is_scored_at_temperature_1(model, rows):
    greedy, plain = (Scorer(model, temperature=t)(rows[0], rows[2]).logprobs for t in (0.0, 1.0))
    assert torch.equal(greedy, plain)


@torch.no_grad()
def test_prefixes_alone_can_be_asked_for(model, rows):
    micro = flat_rows(rows[0].ids, [], [], [0], [5])
    got = Scorer(model)(micro, torch.zeros(0, dtype=torch.int64), entropy=True)
    assert len(got.logprobs) == len(got.entropy) == 0 and got.hidden.shape == (1, model.config.hidden_size)


def test_a_path_beyond_the_models_positions_is_refused(make_model, rows):
    model = make_model(max_position_embeddings=12)
    with torch.no_grad():
        assert math.isfinite(Scorer(model)(rows[0], rows[2]).logprobs.sum())
    model.config.max_position_embeddings = 11
    with pytest.raises(ValueError, match=r"a path has 12 tokens and the model has positions for 11 .*max_turns"):
        Scorer(model)(rows[0], rows[2])


def test_packed_rows_are_refused_where_logits_need_more_than_the_output_layer(granite):
    ids = np.zeros((1, 3), dtype=np.int64)
    at, none = np.arange(3)[None], np.zeros(0, dtype=np.int64)
    packed = MicroBatch(ids, at, at + 1, none, none, none, none, none, none)
    with pytest.raises(ValueError, match="GraniteForCausalLM cannot score packed rows"):
        Scorer(granite)(packed, torch.zeros(0, dtype=torch.int64))
