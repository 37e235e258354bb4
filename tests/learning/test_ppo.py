"""PPO end to end: forests of an environment, the critic and the learner."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from echo_env import EchoEnv, EvenPredictor

from agents.advantages import ESTIMATORS, Credit, register
from agents.critic_predictor import CriticPredictor
from agents.evaluate import make_vector
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from agents.policies import TransformersPolicy, collect
from allocation import TraceAllocator, TraceConfig, TreeAllocationWrapper
from allocation.forest_table import ForestTable
from trace_envs.state import Outcome


class KindEnv(EchoEnv):
    """One turn or two; every other task cannot be solved, and the others ask for letters that add up to an even number."""

    def __init__(self, **kwargs):
        super().__init__(**({"max_turns": 2} | kwargs))

    def judge(self, state, answer):
        kind = int(state.task.task_id.rsplit("-", 1)[1]) % 2 == 0
        right = kind and sum(map(ord, "".join(t.text for t in state.turns()))) % 2 == 0
        return Outcome(is_correct=right, reward=float(right), components={"em": float(right)})


@pytest.fixture(scope="module", autouse=True)
def _kind():
    if "Kind-v0" not in gym.registry:
        gym.register(id="Kind-v0", entry_point=KindEnv)


def wrapper(budget=32, predictor=None):
    return TreeAllocationWrapper(
        make_vector("Kind-v0", 8, {}),
        allocator=TraceAllocator(predictor or EvenPredictor(), TraceConfig(continuations=0.5, cap_per_rollout=None)),
        budget=budget,
    )


def policy_of(model, tokenizer, seed=0):
    return TransformersPolicy(model, tokenizer, max_new_tokens=4, seed=seed)


def success(forest):
    """Mean over prompts that can be solved, NaN if there are none."""
    solvable = [t.values("success")[0] for t in forest if int(t.key.rsplit("-", 1)[1]) % 2 == 0]
    return np.mean(solvable) if solvable else np.nan


PPO = LearnerConfig(
    estimator="gae",
    gae_lambda=0.95,
    epochs=2,
    minibatches=2,
    lr=1e-3,
    gain_lr=1e-2,
    value_lr=1e-2,
    lr_warmup=0,
    lr_schedule="constant",
)


def test_the_critic_learns_to_explain_and_the_policy_to_act(make_model, tokenizer):
    model = make_model()
    learner = Learner(model, PPO, updates=40)
    predictor = CriticPredictor(learner.critic, warmup=3)
    envs, policy = wrapper(budget=48, predictor=predictor), policy_of(model, tokenizer)
    explained, rate = [], []
    for step in range(40):
        forest = collect(envs, policy, seed=1000 + step)
        update = learner.update(forest)
        policy.reset_cache()
        envs.allocator.update(forest)
        explained.append(update.figures["critic/explained_variance"])
        rate.append(success(forest))
        assert update.figures["learner/skipped"] == 0 and update.figures["loss/value"] > 0
    assert predictor.ready and envs.allocator.fallbacks == 0
    assert np.mean(explained[-5:]) > np.mean(explained[:3]) + 0.2
    assert np.nanmean(rate[-5:]) > np.nanmean(rate[:3]) + 0.15


@pytest.fixture(scope="module")
def forest(model, tokenizer):
    forest = collect(wrapper(), policy_of(model, tokenizer), seed=3)
    assert forest.ledger.continuations > 4 and 0 < success(forest) < 1
    return forest


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def constant_critic(learner, value):
    with torch.no_grad():
        learner.critic.weight.zero_()
        learner.critic.bias.fill_(value)


@pytest.fixture
def reinforce():
    """REINFORCE with a constant baseline, an estimator of its own: the return of what followed, less 0.3."""

    @register("constant_baseline")
    def credit(table, config, values=None):
        to_go = table.values("reward") - table.returns + table.reward
        return Credit.of(np.where(table.is_root, 0.0, to_go - 0.3), np.where(table.is_root, 0.0, table.weights))

    yield "constant_baseline"
    del ESTIMATORS["constant_baseline"]


def test_a_constant_critic_is_a_constant_baseline(make_model, forest, reinforce):
    settings = dict(lr=1e-3, lr_warmup=0, lr_schedule="constant", epochs=2, minibatches=2)
    one, other = make_model(), make_model()
    ppo = Learner(one, LearnerConfig(estimator="gae", gae_lambda=1.0, value_coef=0.0, **settings), updates=3)
    constant_critic(ppo, 0.3)
    plain = Learner(other, LearnerConfig(estimator=reinforce, **settings), updates=3)
    before = weights(one)
    for _ in range(3):
        a, b = ppo.update(forest), plain.update(forest)
        assert a.credit.advantage == pytest.approx(b.credit.advantage, abs=1e-6)
        assert a.figures["loss/policy"] == pytest.approx(b.figures["loss/policy"], abs=1e-6)
    assert float(ppo.critic.bias.detach()) == pytest.approx(0.3) and not ppo.critic.weight.any()
    after = weights(other)
    for name, weight in weights(one).items():
        assert (weight - before[name]).abs().max() > 1e-4
        torch.testing.assert_close(weight, after[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", ["flat", "packed"])
def test_values_are_those_of_the_hidden_states_that_the_policy_gave(make_model, forest, layout):
    model = make_model()
    learner = Learner(model, LearnerConfig(estimator="gae", layout=layout, gae_lambda=0.0), updates=1)
    with torch.no_grad():
        learner.critic.weight.mul_(20)
    critic = copy.deepcopy(learner.critic)
    update = learner.update(forest)
    table = update.table
    value = np.zeros(len(table))
    inner = np.flatnonzero(table.num_children > 0)
    states = torch.from_numpy(np.stack([table.node(row).features for row in inner]))
    value[inner] = critic(states).detach().numpy()
    edge = ~table.is_root
    expected = np.where(edge, table.reward + value - value[np.where(edge, table.parent, 0)], 0.0)
    assert update.credit.advantage == pytest.approx(expected, abs=1e-4)


def test_the_value_loss_alone_trains_the_critic_and_the_policys_layers(make_model, forest):
    model = make_model()
    config = LearnerConfig(estimator="gae", value_coef=1.0, lr_warmup=0, lr=1e-3, value_lr=1e-2, lr_schedule="constant")
    learner = Learner(model, config, updates=30)
    constant_critic(learner, 0.9)
    first = learner.update(forest).figures
    assert first["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    for _ in range(25):
        last = learner.update(forest).figures
    assert last["loss/value"] < 0.7 * first["loss/value"]
    assert last["critic/explained_variance"] > 0.2


def test_state_goes_on_bit_for_bit(make_model, forest):
    one = make_model()
    learner = Learner(one, PPO, updates=4)
    learner.update(forest)
    state, weights_then = copy.deepcopy(learner.state_dict()), copy.deepcopy(one.state_dict())
    other = make_model(1)
    other.load_state_dict(weights_then)
    resumed = Learner(other, PPO, updates=4, seed=9)
    resumed.load_state_dict(state)
    for _ in range(2):
        a, b = learner.update(forest).figures, resumed.update(forest).figures
        assert a == b
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(one).items())
    assert all(torch.equal(x, y) for x, y in zip(learner.critic.parameters(), resumed.critic.parameters(), strict=True))


def test_every_figure_is_finite_where_nothing_can_be_learned(make_model, forest):
    silent = copy.deepcopy(forest)
    for tree in silent:
        for node in tree.nodes:
            node.reward = 0.0
    learner = Learner(make_model(), LearnerConfig(estimator="gae", lr_warmup=0), updates=2)
    constant_critic(learner, 0.0)
    update = learner.update(silent)
    assert (ForestTable.of(silent).reward == 0).all() and (update.credit.advantage == 0).all()
    assert all(np.isfinite(x) for x in update.figures.values()), update.figures
