"""Low-rank adapters: what they change, what is saved of them, and that all else treats such a model like any other."""

import copy
import json
import sys

import pytest
import torch
from adapted import LAYOUTS, answer, log_probs, random_adapters, weights
from echo_env import echo_forest, random_model
from safetensors.torch import load_file, save_file

from agents import models
from agents.learner import Learner
from agents.learner_config import LearnerConfig, LoraConfig
from agents.lora import (
    add_adapters,
    has_adapters,
    load_adapters,
    merge,
    saved_part,
    target_names,
    without_adapters,
)
from agents.models import load_model
from agents.reference import AdapterReference, FrozenReference
from agents.scoring import Scorer


@pytest.fixture
def adapted(make_model):
    return random_adapters(add_adapters(make_model(), LoraConfig(rank=4), seed=1))


@pytest.fixture
def base_folder(tmp_path, make_model, tokenizer):
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, base_folder, tokenizer):
    """A folder of adapters alone, as a checkpoint is."""
    model, _ = load_model(str(base_folder))
    random_adapters(add_adapters(model, LoraConfig(rank=3), seed=1))
    saved_part(model).save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def test_fresh_adapters_change_nothing_but_what_is_trained(make_model):
    model = make_model()
    before, said = weights(model), answer(model)
    state = torch.get_rng_state()
    assert add_adapters(model, LoraConfig(rank=4), seed=1) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in model.modules())
    assert torch.equal(answer(model), said)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)
    assert len(trained) == 2 * 7 * 2, "two matrices for each of seven linear layers in two blocks"
    frozen = {n.replace(".base_layer", ""): p for n, p in weights(model).items() if n not in trained}
    assert frozen.keys() == before.keys() and all(torch.equal(frozen[n], before[n]) for n in before)


def test_a_model_in_training_stays_in_training(make_model):
    model = add_adapters(make_model().train(), LoraConfig(rank=2), seed=0)
    assert all(m.training for m in model.modules())


def test_the_seed_makes_the_adapters(make_model):
    def made(seed):
        return {n: p for n, p in weights(add_adapters(make_model(), LoraConfig(rank=2), seed)).items() if "lora_A" in n}

    first = made(5)
    torch.rand(3)
    again, other = made(5), made(6)
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)


def test_only_the_named_layers_get_adapters(make_model):
    model = add_adapters(make_model(), LoraConfig(rank=2, targets=("q_proj", "v_proj")), seed=0)
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    assert target_names(make_model()) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_wrong_settings_are_named(make_model, adapted):
    with pytest.raises(
        ValueError, match=r"no linear layer 'query'; known: down_proj, gate_proj, k_proj, o_proj, q_proj"
    ):
        add_adapters(make_model(), LoraConfig(rank=2, targets=("q_proj", "query")), seed=0)
    with pytest.raises(ValueError, match="no linear layer 'lm_head'"):
        add_adapters(make_model(), LoraConfig(rank=2, targets=("lm_head",)), seed=0)
    with pytest.raises(ValueError, match=r"lora\.rank must be at least 1"):
        add_adapters(make_model(), LoraConfig(), seed=0)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(adapted, LoraConfig(rank=2), seed=0)


def test_without_peft_the_extra_is_named(make_model, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = make_model()
    with pytest.raises(ImportError, match=r"pip install 'trace-envs\[lora\]'"):
        add_adapters(model, LoraConfig(rank=2), seed=0)
    with pytest.raises(ImportError, match=r"pip install 'trace-envs\[lora\]'"):
        load_model(str(folder))
    # A model without adapters never asks for it.
    assert not has_adapters(model) and saved_part(model) is model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_sampled_is_scored_the_same(adapted, tokenizer, layout):
    forest = echo_forest(adapted, tokenizer)
    with torch.no_grad():
        scored, stored = log_probs(lambda *a: Scorer(adapted)(*a).logprobs, forest, layout)
    torch.testing.assert_close(scored, stored, rtol=0, atol=1e-4)
    with without_adapters(adapted), torch.no_grad():
        base, _ = log_probs(lambda *a: Scorer(adapted)(*a).logprobs, forest, layout)
    assert (base - stored).abs().max() > 0.1, "the adapters are in use"


def test_adapters_can_be_switched_off_for_a_while(make_model, adapted):
    plain, trained = answer(make_model()), [n for n, p in adapted.named_parameters() if p.requires_grad]
    said = answer(adapted)
    with without_adapters(adapted):
        assert torch.equal(answer(adapted), plain)
    assert torch.equal(answer(adapted), said) and not torch.equal(said, plain)
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == trained
    # What was frozen stays so, and an error inside leaves them on.
    adapted.requires_grad_(False)
    with pytest.raises(KeyError), without_adapters(adapted):
        raise KeyError
    assert torch.equal(answer(adapted), said) and not any(p.requires_grad for p in adapted.parameters())


def test_a_merged_model_says_the_same_without_adapters(tmp_path, adapted, tokenizer, monkeypatch):
    before = weights(adapted)
    merged = merge(adapted)
    torch.testing.assert_close(answer(merged), answer(adapted), rtol=1e-4, atol=1e-3)
    assert not has_adapters(merged) and all(p.requires_grad for p in merged.parameters())
    assert has_adapters(adapted) and all(torch.equal(p, before[n]) for n, p in weights(adapted).items())
    merged.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # Such a folder is one of any model: engines that know no adapters, or have no peft, can read it.
    monkeypatch.setitem(sys.modules, "peft", None)
    torch.testing.assert_close(answer(load_model(str(tmp_path))[0]), answer(merged), rtol=0, atol=0)


# Folders.


def test_adapters_come_back_into_their_model(folder, tmp_path, tokenizer):
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    state = torch.get_rng_state()
    model, loaded_tokenizer = load_model(str(folder))
    assert torch.equal(torch.get_rng_state(), state) and not any(m.training for m in model.modules())
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    twin, _ = load_model(str(tmp_path / "base"))
    random_adapters(add_adapters(twin, LoraConfig(rank=3), seed=9))
    assert torch.equal(answer(model), answer(twin))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in twin.named_parameters()
    ]
    # And once more, trained a little.
    random_adapters(model, seed=2)
    saved_part(model).save_pretrained(tmp_path / "again")
    assert torch.equal(answer(load_model(str(tmp_path / "again"))[0]), answer(model))


def test_peft_itself_reads_the_folder(folder, base_folder):
    from peft import PeftModel

    model, _ = load_model(str(folder))
    assert torch.equal(answer(PeftModel.from_pretrained(load_model(str(base_folder))[0], folder).eval()), answer(model))


def test_adapters_of_the_shipped_model_name_it(tmp_path):
    model, tokenizer = load_model("tiny")
    saved_part(add_adapters(model, LoraConfig(rank=1), seed=0)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    again, same = load_model(str(tmp_path))
    assert same.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(answer(again), answer(model))


def test_saving_asks_no_hub(adapted, tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError("no network is needed to save")

    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", refuse)
    adapted.peft_config["default"].base_model_name_or_path = "somebody/a-model"
    saved_part(adapted).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base_model_name_or_path": "/gone/away"},
            "belong to the model /gone/away, which cannot be loaded: put it back",
        ),
        ({"base_model_name_or_path": None}, "does not say which model the adapters belong to"),
        ({"peft_type": "IA3"}, "of kind IA3; only LORA"),
        ({"modules_to_save": ["lm_head"]}, "use modules_to_save, which cannot be used here"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "use megatron_config, which cannot be used here"),
        ({"bias": "all"}, "use bias, which cannot be used here"),
        ({"r": 5}, "do not fit"),
        ({"target_modules": ["q_proj"]}, "do not fit"),
        ({"target_modules": ["query"]}, "do not fit"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused_with_a_reason(folder, settings, message):
    edit(folder, **settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(str(folder))


def test_damaged_folders_of_adapters_are_refused(folder, base_folder, tmp_path):
    edit(folder, base_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="which is adapters itself"):
        load_model(str(folder))
    edit(folder, base_model_name_or_path=str(base_folder))
    weights = folder / "adapter_model.safetensors"
    tensors, whole = load_file(weights), weights.read_bytes()
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(ValueError, match=r"do not fit their model: only one of the two has .*lora_"):
        load_model(str(folder))
    weights.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(str(folder))
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"no adapter_model\.safetensors: adapters are read from safetensors only"
    ):
        load_model(str(folder))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds adapters and a whole model"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no settings of adapters"):
        load_model(str(folder))


def test_adapters_on_the_hub_are_to_be_downloaded_first(monkeypatch, tokenizer):
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(models, "find_adapter_config_file", lambda name: f"/cache/{name}/adapter_config.json")
    with pytest.raises(ValueError, match="somebody/adapters on the hub is adapters: download it"):
        load_model("somebody/adapters")


def test_adapters_of_another_shape_of_model_are_refused(folder, tokenizer):
    from agents.tiny import build_model

    with pytest.raises(ValueError, match="do not fit"):
        load_adapters(build_model(len(tokenizer), width=64, layers=2), folder)


# Learning.


def test_an_update_moves_the_adapters_alone_and_away_from_the_reference(make_model, tokenizer):
    model = add_adapters(make_model(), LoraConfig(rank=4), seed=1)
    forest = echo_forest(model, tokenizer)
    reference = AdapterReference(model)
    first = FrozenReference(make_model())
    at_start = log_probs(reference, forest)[0]
    torch.testing.assert_close(at_start, log_probs(first, forest)[0], rtol=0, atol=0)

    before = weights(model)
    config = LearnerConfig(lr=1e-2, lr_warmup=0, lr_schedule="constant", kl_coef=0.1, epochs=2)
    learner = Learner(model, config, updates=4, reference=reference)
    trained = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    figures = learner.update(forest).figures
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    after = weights(model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(".lora_" in n for n in moved)
    # The second pass over the batch is the first that differs from the reference.
    assert figures["loss/reference_kl"] > 1e-6
    torch.testing.assert_close(log_probs(reference, forest)[0], at_start, rtol=0, atol=0)


def test_training_goes_on_from_a_folder_as_if_it_had_not_stopped(base_folder, tokenizer, tmp_path):
    config = LearnerConfig(lr=1e-2, lr_warmup=0, kl_coef=0.1)

    def learner_of(model):
        return Learner(model, config, updates=4, reference=AdapterReference(model))

    model = add_adapters(load_model(str(base_folder))[0], LoraConfig(rank=2), seed=0)
    forests = [echo_forest(random_model(tokenizer), tokenizer, seed=s) for s in (0, 1)]
    learner = learner_of(model)
    learner.update(forests[0])
    saved_part(model).save_pretrained(tmp_path / "checkpoint")
    resumed, _ = load_model(str(tmp_path / "checkpoint"))
    other = learner_of(resumed)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert other.update(forests[1]).figures == learner.update(forests[1]).figures
    ours, theirs = weights(model), weights(resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
