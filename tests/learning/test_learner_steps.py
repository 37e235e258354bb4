"""What an update does to the weights, and when it does nothing."""

import weakref

import numpy as np
import pytest
import torch
from echo_env import echo_forest
from slow_update import learner, noisy_forest, step_gradient

from agents.advantages import ESTIMATORS
from agents.batch import path_tokens
from agents.learner import Learner
from agents.learner_config import LAYOUTS, LearnerConfig
from agents.steps import figure_names
from allocation import Forest


@pytest.fixture(scope="module")
def batch(model, tokenizer):
    return noisy_forest(model, tokenizer)


# What a step does to the weights.


def test_updates_raise_the_chance_of_what_did_better(make_model, tokenizer):
    model = make_model()
    made, forest = learner(model, lr=0.01, layout="flat"), echo_forest(model, tokenizer, seed=2, budget=20)
    losses = [made.update(forest).figures["loss/policy"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-4


def test_gradients_are_scaled_down(make_model, batch):
    model = make_model()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    figures = learner(model, lr=1.0, max_grad_norm=1e-3, layout="flat").update(batch).figures
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert figures["loss/grad_norm"] > 1e-3 and (after - before).norm().item() == pytest.approx(1e-3, rel=0.02)


def test_step_sizes_follow_the_schedule_by_group(make_model, batch):
    model = make_model()
    config = LearnerConfig(estimator="gae", lr=1e-3, gain_lr=1e-2, value_lr=1e-1, lr_warmup=2, layout="flat")
    made, seen = Learner(model, config, updates=4), []
    for _ in range(5):
        made.update(batch)
        seen.append([g["lr"] for g in made.optimizer.param_groups])
    assert np.array(seen) == pytest.approx(np.outer([0.5, 0.75, 0.5, 0.25, 0.0], [1e-3, 1e-2, 1e-1]))
    matrices, vectors, head = (g["params"] for g in made.optimizer.param_groups)
    assert {p.ndim for p in matrices} == {2} and {p.ndim for p in vectors} == {1}
    assert len(matrices) + len(vectors) == len(list(model.parameters())) and head == list(made.critic.parameters())


def test_weights_that_need_no_gradient_stay(make_model, batch):
    model = make_model()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    Learner(model, LearnerConfig(layout="flat", lr_warmup=0), updates=2).update(batch)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [p is not frozen for p in model.parameters()]


def test_dropout_is_off_and_torchs_generator_is_left_alone(make_model, batch):
    model = make_model().train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    state = torch.get_rng_state()
    config = {"estimator": "gae", "minibatches": 2, "importance": "truncated"}
    _, figures = step_gradient(model, batch, **config)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert figures == step_gradient(make_model(), batch, **config)[1]


def test_no_graph_outlives_its_micro_batch(make_model, batch):
    model = make_model()
    made, states, alive = learner(model, micro_tokens=1, layout="flat", entropy_coef=0.1), [], []

    def count(*_):
        alive.append(sum(state() is not None for state in states))

    decoder = model.get_decoder()
    read = decoder.register_forward_hook(lambda *a: states.append(weakref.ref(a[2].last_hidden_state)))
    with decoder.register_forward_pre_hook(count), read:
        made.update(batch)
    assert len(states) > 10 and alive == [0] * len(states)


# Nothing to learn.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_an_empty_forest_changes_nothing(make_model, estimator, layout):
    model = make_model()
    made = Learner(model, LearnerConfig(estimator=estimator, layout=layout, weight_decay=0.5, lr_warmup=0), updates=2)
    before = [p.detach().clone() for p in model.parameters()]
    update = made.update(Forest())
    assert update.figures == dict.fromkeys(figure_names(made.config), 0.0) and made.done == 1 and len(update.table) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_batch_without_contrast_changes_nothing(make_model, tokenizer):
    model = make_model()
    forest = echo_forest(model, tokenizer, budget=8)
    for tree in forest:
        for leaf in tree.leaves():
            leaf.reward = 1.0
    before = [p.detach().clone() for p in model.parameters()]
    made = Learner(model, LearnerConfig(lr=1.0, weight_decay=0.5, lr_warmup=0), updates=2)
    assert set(made.update(forest).figures.values()) == {0.0} and not made.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_path_beyond_the_models_positions_is_refused(make_model, batch):
    with pytest.raises(ValueError, match=r"a path has \d+ tokens and the model has positions for 20"):
        learner(make_model(max_position_embeddings=20), layout="flat").update(batch)


def test_prefixes_beyond_the_models_positions_have_no_value_to_learn(make_model, tokenizer):
    """Their turns were cut before the first token, so only a critic would look at them."""
    limit = 40
    model = make_model(max_position_embeddings=limit)
    forest = echo_forest(model, tokenizer, budget=16)
    made = Learner(model, LearnerConfig(estimator="gae", lr_warmup=0, layout="flat"), updates=2)
    update = made.update(forest)
    lengths = path_tokens(update.table)
    assert (lengths[~update.table.terminal] > limit).any() and (lengths <= limit).any()
    assert update.figures["loss/value"] > 0 and update.figures["learner/skipped"] == 0
