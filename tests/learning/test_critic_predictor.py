import copy

import numpy as np
import pytest
import torch
from echo_env import echo_wrapper

from agents.advantages import valued_prefixes
from agents.critic import Critic
from agents.critic_predictor import MARGIN, CriticPredictor
from agents.flat import flat_layout
from agents.packing import packed_layout
from agents.policies import TransformersPolicy, collect
from agents.scoring import Scorer
from agents.tokens import EdgeTokens
from allocation import TraceAllocator, TraceConfig
from allocation.forest_table import ForestTable
from allocation.predictor import Anchor


def anchor(features, depth=0):
    return Anchor(None if features is None else np.asarray(features, np.float32), depth, 1, 0)


def critic_of(weight, bias=0.5):
    critic = Critic(len(weight), 0)
    with torch.no_grad():
        critic.weight.copy_(torch.tensor(weight))
        critic.bias.fill_(bias)
    return critic


def test_it_says_what_the_critic_says():
    states = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    critic = critic_of([0.1, -0.1, 0.05, 0.0])
    expected = critic(torch.from_numpy(states)).detach().numpy()
    assert CriticPredictor(critic).predict([anchor(s) for s in states]) == pytest.approx(expected, abs=1e-6)


def test_values_outside_and_missing_states():
    predictor = CriticPredictor(critic_of([1.0]))
    anchors = [anchor([9.0]), anchor(None), anchor([-9.0]), anchor([0.25])]
    assert predictor.predict(anchors) == pytest.approx([1 - MARGIN, 0.5, MARGIN, 0.75])
    assert predictor.predict([]).shape == (0,)
    figures = predictor.update(anchors, np.array([1.0, 0.5, 0.0, 1.0]), np.array([0.0, 1.0, 0.0, 3.0]))
    assert figures == pytest.approx({"predictor/outside": 0.5, "predictor/bias": -0.25 * 3 / 4})
    with pytest.raises(ValueError, match="hidden states of size 1, got 2"):
        predictor.predict([anchor([0.0, 1.0])])


def test_it_looks_back_with_what_it_knew_and_never_trains_the_critic():
    critic = critic_of([0.1])
    predictor = CriticPredictor(critic, warmup=2)
    batch = [anchor([1.0])]
    for step in range(1, 4):
        before = predictor.predict(batch)
        with torch.no_grad():  # The learner's step comes before the allocator's.
            critic.weight.add_(0.1)
        taught = copy.deepcopy(critic.state_dict())
        assert predictor.predict(batch) == before == pytest.approx(0.5 + 0.1 * step)
        assert predictor.ready == (step > 2)
        predictor.update(batch, np.ones(1), np.ones(1))
        assert all(torch.equal(x, taught[name]) for name, x in critic.state_dict().items())
        assert predictor.predict(batch) == pytest.approx(0.6 + 0.1 * step)
    assert all(p.grad is None for p in critic.parameters())


def test_state():
    predictor = CriticPredictor(critic_of([0.1, 0.2]), warmup=1)
    predictor.update([anchor([1.0, 1.0])], np.ones(1), np.ones(1))
    state = copy.deepcopy(predictor.state_dict())
    other = CriticPredictor(Critic(2, 1), warmup=1)
    other.load_state_dict(state)
    assert other.ready
    np.testing.assert_array_equal(other.predict([anchor([0.3, 0.7])]), predictor.predict([anchor([0.3, 0.7])]))
    assert state["weight"] is not other.state_dict()["weight"]
    with pytest.raises(ValueError, match="of a critic of 2 inputs, this one has 3"):
        CriticPredictor(Critic(3, 0)).load_state_dict(state)


@pytest.fixture
def collected(model, tokenizer):
    """Two batches allocated by a critic, without and with warm-up behind it."""
    critic = Critic(int(model.config.hidden_size), 0)
    with torch.no_grad():
        critic.weight.mul_(20)
    predictor = CriticPredictor(critic, warmup=1)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, seed=0)
    envs = echo_wrapper(policy=policy)
    envs.allocator = allocator = TraceAllocator(predictor, TraceConfig(continuations=1.0, cap_per_rollout=None))
    return envs, policy, allocator, critic


def states_by_one_forward_pass(model, tree, node):
    """Hidden state at the end of a prefix, from the ids of its whole path."""
    ids = []
    for step in tree.path(node):
        ids += [] if step.sample is None else step.sample.action_ids.tolist()
        ids += [] if step.context_ids is None else step.context_ids.tolist()
    with torch.no_grad():
        out = model.model(input_ids=torch.tensor([ids]))
    return out.last_hidden_state[0, -1]


def test_a_collection_allocated_by_the_critic(collected, model, caplog):
    envs, policy, allocator, critic = collected
    first = collect(envs, policy, seed=0)
    assert not allocator.predictor.ready
    report = allocator.update(first)
    assert {"predictor/outside", "predictor/bias", "predictor/kappa"} <= set(report)
    assert "predictor/brier" not in report  # It was not to be trusted yet.
    second = collect(envs, policy, seed=1)
    assert allocator.predictor.ready and second.ledger.continuations > 0
    assert allocator.fallbacks == 0 and not caplog.records
    asked = 0
    for tree in second:
        for node in tree.nodes:
            if node.predicted is None:
                continue
            state = states_by_one_forward_pass(model, tree, node)
            assert node.features == pytest.approx(state.numpy(), abs=1e-4)
            expected = float(critic(state[None]).detach().clamp(MARGIN, 1 - MARGIN))
            assert node.predicted == pytest.approx(expected, abs=1e-4)
            asked += 1
    assert asked > len(second) and len({round(n.predicted, 6) for t in second for n in t.nodes if n.predicted}) > 8
    # Looking back: the critic has moved since, its report is on what was known when the batch was allocated.
    with torch.no_grad():
        critic.bias.add_(0.4)
    predicted = {(t.index, n.id): n.predicted for t in second for n in t.nodes if n.predicted is not None}
    report = allocator.update(second)
    assert 0 <= report["predictor/brier"] <= 1
    for tree in second:
        for node in tree.nodes:
            if (tree.index, node.id) in predicted:
                assert node.predicted == pytest.approx(predicted[tree.index, node.id], abs=1e-6)


@pytest.mark.parametrize("lay_out", [flat_layout, packed_layout])
def test_what_the_policy_gives_the_predictor_is_what_the_learner_gives_the_critic(collected, model, lay_out):
    envs, policy, _, _ = collected
    table = ForestTable.of(collect(envs, policy, seed=2))
    prefixes = valued_prefixes(table)
    layout = lay_out(EdgeTokens.of(table, np.zeros(0, dtype=np.int64)), prefixes, 256)
    scorer, seen = Scorer(model), []
    for micro in layout.micro_batches:
        with torch.no_grad():
            hidden = scorer(micro, torch.zeros(0, dtype=torch.int64)).hidden
        for row, state in zip(micro.value_node, hidden, strict=True):
            torch.testing.assert_close(state, torch.from_numpy(table.node(row).features), rtol=0, atol=1e-4)
            seen.append(row)
    assert sorted(seen) == prefixes.tolist() and len(layout.micro_batches) > 1
