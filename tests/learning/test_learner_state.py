"""Steps that must not be made, the check of the layout, and what a learner keeps between updates."""

import copy
import logging

import numpy as np
import pytest
import torch
from echo_env import echo_forest

from agents import learner as learner_module
from agents import tree_attention
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from agents.skipped import load_skipped

SETTINGS = {"lr": 1e-3, "gain_lr": 1e-3, "lr_warmup": 0, "layout": "flat"}


@pytest.fixture
def make_forest(model, tokenizer):
    return lambda seed=2: echo_forest(model, tokenizer, seed=seed, budget=40)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def unchanged(before, model):
    return [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]


def kept(state):
    """A copy of an optimiser's state that later steps cannot reach."""
    return copy.deepcopy(state)


def same_state(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def spoil(forest, what):
    """Makes one number of a forest's first tree not finite."""
    node = forest.trees[0].leaves()[0]
    if what == "log-prob":
        for n in forest.trees[0].nodes[1:]:
            n.sample.logprobs = np.full_like(n.sample.logprobs, np.nan)
    else:
        node.reward = {"reward": np.nan, "infinite reward": np.inf}[what]
    return forest


@pytest.mark.parametrize("estimator", ["tree", "gae"])
@pytest.mark.parametrize("what", ["reward", "infinite reward", "log-prob"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_kept(make_model, make_forest, tmp_path, what, estimator):
    model = make_model()
    made = Learner(model, LearnerConfig(estimator=estimator, **SETTINGS), updates=9, directory=tmp_path)
    made.update(make_forest())
    before, state = weights(model), kept(made.optimizer.state_dict()["state"])
    forest = spoil(make_forest(3), what)
    update = made.update(forest)
    assert all(unchanged(before, model)) and same_state(state, made.optimizer.state_dict()["state"])
    assert update.figures["learner/skipped"] == 1 and all(np.isfinite(x) for x in update.figures.values())
    (folder,) = tmp_path.iterdir()
    batch = load_skipped(folder)
    assert len(batch.table) == len(update.table)
    np.testing.assert_array_equal(batch.table.reward, update.table.reward)
    assert made.update(make_forest(4)).figures["learner/skipped"] == 0
    assert not any(unchanged(before, model)), "the next one is a step like any other"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_though_the_loss_is(make_model, make_forest, value):
    model = make_model()
    made = Learner(model, LearnerConfig(**SETTINGS), updates=9)
    made.update(make_forest())
    before, state = weights(model), kept(made.optimizer.state_dict()["state"])
    with model.get_input_embeddings().weight.register_hook(lambda g: g * value):
        assert made.update(make_forest(3)).figures["learner/skipped"] == 1
    assert all(unchanged(before, model)) and same_state(state, made.optimizer.state_dict()["state"])


def test_only_the_minibatch_that_is_not_finite_is_skipped(make_model, make_forest):
    forest = spoil(make_forest(), "log-prob")
    assert len(forest) > 2
    model = make_model()
    made = Learner(model, LearnerConfig(minibatches=len(forest), epochs=2, **SETTINGS), updates=9)
    steps = []
    made.optimizer.register_step_pre_hook(lambda *_: steps.append(made.done))
    update = made.update(forest)
    trained = {t for t, a in zip(update.table.tree, update.credit.advantage, strict=True) if a}
    assert 0 in trained and update.figures["learner/skipped"] == 2 and len(steps) == 2 * (len(trained) - 1) > 0
    assert all(np.isfinite(x) for x in update.figures.values()) and update.figures["loss/grad_norm"] > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_run_of_skipped_updates_ends(make_model, make_forest, caplog):
    model = make_model()
    made = Learner(model, LearnerConfig(max_skipped=3, **SETTINGS), updates=99)
    bad, good = spoil(make_forest(), "reward"), make_forest(3)
    for forest in (bad, bad, good, bad):
        made.update(forest)
    assert caplog.text.count("skipped a step that is not finite") == 3 and "for want of a directory" in caplog.text
    # The count goes on in a run that is resumed.
    resumed = Learner(model, made.config, updates=99)
    resumed.load_state_dict(made.state_dict())
    resumed.update(bad)
    with pytest.raises(FloatingPointError, match=r"update 6 skipped .*3 updates in a row \(max_skipped\).*--lr"):
        resumed.update(bad)


# The check of the layout.


def test_the_first_batch_with_something_to_learn_is_checked_and_no_other(make_model, make_forest, caplog):
    config = LearnerConfig(**(SETTINGS | {"layout": "packed"}), check_layout=True)
    plain, checked = make_model(), make_model()
    one = Learner(plain, LearnerConfig(**(SETTINGS | {"layout": "packed"})), updates=9)
    two = Learner(checked, config, updates=9)
    caplog.set_level(logging.INFO)
    for seed in (2, 3):
        assert one.update(make_forest(seed)).figures == two.update(make_forest(seed)).figures
    assert caplog.text.count("packed and flat agree") == 1
    assert all(unchanged(weights(plain), checked))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("estimator", ["tree", "gae"])
def test_the_check_passes_in_every_precision(make_model, make_forest, estimator, precision, caplog):
    config = LearnerConfig(
        **(SETTINGS | {"layout": "packed"}), check_layout=True, precision=precision, estimator=estimator
    )
    caplog.set_level(logging.INFO)
    Learner(make_model(), config, updates=9).update(make_forest())
    assert "packed and flat agree" in caplog.text


def test_a_layout_that_differs_is_found_before_a_step(make_model, make_forest, monkeypatch):
    model = make_model()

    def shifted(*args):
        layout = packed(*args)
        for micro in layout.micro_batches:
            micro.before[len(micro.before) // 2] -= 1
        return layout

    packed = learner_module.packed_layout
    monkeypatch.setattr(learner_module, "packed_layout", shifted)
    # As a fault of the attention would be, which the ids do not show.
    monkeypatch.setattr(learner_module, "assert_exact", lambda *args: None)
    made = Learner(model, LearnerConfig(**(SETTINGS | {"layout": "packed"}), check_layout=True), updates=9)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"check_layout: the packed \w+ differs from the flat one.*layout='flat'"):
        made.update(make_forest())
    assert all(unchanged(before, model))


# State.


@pytest.mark.parametrize(
    "settings", [{}, {"estimator": "gae"}, {"importance": "truncated", "entropy_coef": 0.01, "lr_schedule": "cosine"}]
)
def test_a_learner_goes_on_bit_for_bit(make_model, make_forest, settings):
    config = LearnerConfig(**SETTINGS, minibatches=2, epochs=2, **settings)
    model = make_model()
    made = Learner(model, config, updates=9)
    for seed in (2, 3):
        made.update(make_forest(seed))
    state, saved = copy.deepcopy(made.state_dict()), copy.deepcopy(model.state_dict())
    last = made.update(make_forest(4)).figures
    other = make_model()
    other.load_state_dict(saved)
    resumed = Learner(other, config, updates=9, seed=1)
    resumed.load_state_dict(state)
    assert resumed.done == 2 and resumed.update(make_forest(4)).figures == last
    assert all(unchanged(weights(model), other))
    assert same_state(made.state_dict(), resumed.state_dict())
    fresh = make_model()
    fresh.load_state_dict(saved)
    Learner(fresh, config, updates=9).update(make_forest(4))
    assert not any(unchanged(weights(model), fresh)), "the state says nothing here"


@pytest.mark.parametrize("done", [0, 1])
def test_step_sizes_are_those_of_the_settings_that_a_run_goes_on_with(make_model, make_forest, done):
    def made(model, factor):
        sizes = {"lr": 1e-3 * factor, "gain_lr": 2e-3 * factor, "value_lr": 3e-3 * factor, "weight_decay": 0.1 * factor}
        return Learner(model, LearnerConfig(estimator="gae", lr_warmup=0, lr_schedule="constant", **sizes), updates=9)

    model = make_model()
    before, after = made(model, 1), made(model, 10)
    for seed in range(done):
        before.update(make_forest(seed))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    after.update(make_forest(5))
    found = [(group["lr"], group["weight_decay"]) for group in after.optimizer.param_groups]
    assert found == [(1e-2, 1.0), (2e-2, 0.0), (3e-2, 0.0)]


def test_a_state_with_a_critic_is_refused_by_a_learner_without(make_model):
    with_critic = Learner(make_model(), LearnerConfig(estimator="gae"), updates=9)
    without = Learner(make_model(), LearnerConfig(), updates=9)
    for a, b in ((with_critic, without), (without, with_critic)):
        with pytest.raises(ValueError, match="has a critic, the other does not; resume with the same estimator"):
            a.load_state_dict(b.state_dict())


def test_a_model_that_cannot_be_packed_is_trained_flat_with_one_warning(make_model, make_forest, monkeypatch, caplog):
    monkeypatch.setattr(tree_attention, "_unfit", lambda model: "it is of a test")
    monkeypatch.setattr(tree_attention, "_warned", set())
    fallen, flat = make_model(), make_model()
    made = Learner(fallen, LearnerConfig(**(SETTINGS | {"layout": "packed"}), check_layout=True), updates=9)
    Learner(flat, LearnerConfig(**SETTINGS), updates=9).update(make_forest())
    made.update(make_forest())
    assert caplog.text.count("cannot read packed rows") == 1 and all(unchanged(weights(flat), fallen))
