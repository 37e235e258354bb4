"""References: frozen, without side effects, and of the policy's vocabulary."""

import pytest
import torch
from adapted import LAYOUTS, answer, log_probs, random_adapters, weights
from echo_env import echo_forest

from agents.learner_config import LoraConfig
from agents.lora import add_adapters, saved_part
from agents.models import load_model
from agents.reference import AdapterReference, FrozenReference, make_reference
from agents.scoring import Scorer
from agents.tiny import build_model, build_tokenizer
from agents.tokenizer_checks import check_vocabulary


def touched(model):
    return [(n, p.requires_grad, p.grad) for n, p in model.named_parameters()], [m.training for m in model.modules()]


@pytest.fixture(scope="module")
def forest(model, tokenizer):
    return echo_forest(model, tokenizer, temperature=0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_copy_says_what_the_model_said_when_it_was_made(make_model, forest, layout):
    model = make_model()
    before = touched(model)
    reference = FrozenReference(model, temperature=0.7)
    assert touched(model) == before, "the policy's model is left as it was"
    first, sampled = log_probs(reference, forest, layout)
    torch.testing.assert_close(first, sampled, rtol=0, atol=1e-4)
    assert not first.requires_grad and not any(p.requires_grad for p in reference.model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(log_probs(reference, forest, layout)[0], first, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fresh_adapters_have_their_base_for_reference(make_model, forest, layout):
    model = add_adapters(make_model(), LoraConfig(rank=4), seed=0)
    frozen = log_probs(FrozenReference(make_model(), temperature=0.7), forest, layout)[0]
    reference = AdapterReference(model, temperature=0.7)
    torch.testing.assert_close(log_probs(reference, forest, layout)[0], frozen, rtol=0, atol=0)
    # Whatever the adapters become.
    random_adapters(model)
    torch.testing.assert_close(log_probs(reference, forest, layout)[0], frozen, rtol=0, atol=0)
    with torch.no_grad():
        policy = log_probs(lambda *a: Scorer(model, temperature=0.7)(*a).logprobs, forest, layout)[0]
    assert (policy - frozen).abs().max() > 0.1


def test_asking_leaves_no_trace(make_model, forest):
    model = random_adapters(add_adapters(make_model(), LoraConfig(rank=4), seed=0))
    for mode in (True, False):
        model.train(mode)
        for reference in (AdapterReference(model), FrozenReference(model)):
            before, state = touched(model), torch.get_rng_state()
            assert not log_probs(reference, forest)[0].requires_grad
            assert touched(model) == before and torch.equal(torch.get_rng_state(), state)


def test_a_reference_scores_without_dropout(tokenizer, forest):
    dropping = build_model(len(tokenizer), width=32, layers=2)
    for block in dropping.model.layers:
        block.self_attn.attention_dropout = 0.5
    reference = FrozenReference(dropping.train())
    first = log_probs(reference, forest)[0]
    torch.testing.assert_close(log_probs(reference, forest)[0], first, rtol=0, atol=0)


def test_bfloat16_is_close(make_model, forest):
    exact = log_probs(FrozenReference(make_model()), forest)[0]
    rough = log_probs(FrozenReference(make_model(), precision="bfloat16"), forest)[0]
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().mean() < 0.2


def test_a_model_without_adapters_has_none_to_switch_off(make_model):
    with pytest.raises(ValueError, match=r"add them first \(agents\.lora\.add_adapters\), or use FrozenReference"):
        AdapterReference(make_model())


# The reference of a run is what the run started from.


@pytest.fixture
def start(tmp_path, make_model, tokenizer):
    folder = tmp_path / "start"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_reference_of_a_run_is_the_model_that_it_started_from(start, make_model, tokenizer, forest):
    now = make_model(seed=5)
    made = make_reference(str(start), now, tokenizer, temperature=0.7)
    assert isinstance(made, FrozenReference)
    torch.testing.assert_close(*log_probs(made, forest), rtol=0, atol=1e-4)


def test_with_adapters_it_is_the_base_and_no_second_model(start, tokenizer, forest):
    model, _ = load_model(str(start))
    random_adapters(add_adapters(model, LoraConfig(rank=2), seed=0))
    made = make_reference(str(start), model, tokenizer, temperature=0.7)
    assert isinstance(made, AdapterReference) and made.model is model
    torch.testing.assert_close(*log_probs(made, forest), rtol=0, atol=1e-4)


def test_a_run_that_started_from_adapters_has_those_for_reference(start, tmp_path, tokenizer):
    model, _ = load_model(str(start))
    random_adapters(add_adapters(model, LoraConfig(rank=2), seed=0))
    saved_part(model).save_pretrained(tmp_path / "adapters")
    first, kept = answer(model), weights(model)
    random_adapters(model, seed=3)
    made = make_reference(str(tmp_path / "adapters"), model, tokenizer)
    assert isinstance(made, FrozenReference) and torch.equal(answer(made.model), first)
    assert all(torch.equal(p, kept[n]) for n, p in made.model.named_parameters())


# Vocabularies.


def test_vocabularies_that_do_not_fit_are_refused(start, make_model, tokenizer):
    model, size = make_model(), len(tokenizer)
    check_vocabulary(model, tokenizer, make_model(seed=1))
    check_vocabulary(build_model(size + 7, width=32), tokenizer)  # padded, as many are
    with pytest.raises(
        ValueError, match=rf"policy has a vocabulary of {size} tokens and the reference one of {size + 1}"
    ):
        check_vocabulary(model, tokenizer, build_model(size + 1, width=32))
    with pytest.raises(ValueError, match=rf"tokenizer has {size} ids and the model embeddings for {size - 1}"):
        check_vocabulary(build_model(size - 1, width=32), tokenizer)
    larger = build_tokenizer(["Say a b c and more"], vocab_size=280)
    larger.add_tokens([f"<{i}>" for i in range(size)])
    with pytest.raises(ValueError, match=r"model\.resize_token_embeddings"):
        check_vocabulary(model, larger)
    with pytest.raises(ValueError, match="or set kl_coef=0"):
        make_reference(str(start), build_model(size + 1, width=32), tokenizer)
