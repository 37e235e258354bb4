import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.critic import START, Critic, explained_variance, value_coefficients, value_loss
from allocation import Tree
from allocation.forest_table import ForestTable


def test_the_first_values_are_near_the_start_and_differ_by_seed():
    state = torch.get_rng_state()
    hidden = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    one, two, other = Critic(512, 0), Critic(512, 0), Critic(512, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one(hidden), two(hidden)) and not torch.equal(one(hidden), other(hidden))
    assert (one(hidden) - START).abs().max() < 0.06
    assert one(hidden.bfloat16()).dtype == torch.float32


def test_the_loss_is_half_the_weighted_squared_error():
    values = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    targets, coefficients = torch.tensor([0.0, 2.5, 4.0]), torch.tensor([0.5, 0.25, 0.25])
    loss = value_loss(values, torch.zeros(3), targets, coefficients)
    assert loss.item() == pytest.approx(0.5 * (0.5 * 1 + 0.25 * 0.25 + 0.25 * 16))
    loss.backward()
    assert values.grad.tolist() == pytest.approx([0.5, -0.125, -1.0])


@pytest.mark.parametrize(
    ("value", "target", "gradient"),
    [
        (0.1, 1.0, -0.9),  # within the bound
        (0.5, 1.0, 0.0),  # moved far enough towards its target
        (0.5, 0.1, 0.4),  # moved past it: back
        (-0.5, 1.0, -1.5),  # moved away from it: back
    ],
)
def test_a_clipped_value_is_not_pulled_on(value, target, gradient):
    values = torch.tensor([value], requires_grad=True)
    value_loss(values, torch.zeros(1), torch.tensor([target]), torch.ones(1), clip=0.2).backward()
    assert values.grad.item() == pytest.approx(gradient)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0.0, 0.2]))
def test_parts_of_a_batch_add_up(seed, parts, clip):
    generator = torch.Generator().manual_seed(seed)
    values, old, targets, coefficients = torch.rand(4, 12, generator=generator, dtype=torch.float64)
    whole = value_loss(values, old, targets, coefficients, clip)
    tensors = (t.tensor_split(parts) for t in (values, old, targets, coefficients))
    cut = [value_loss(*part, clip) for part in zip(*tensors, strict=True)]
    assert sum(cut).item() == pytest.approx(whole.item())


def branching():
    tree = Tree("q", 0, "prompt")
    first = tree.add(tree.root, 0, "root")
    for number in range(2):
        tree.add(first, number, "root", terminated=True, reward=float(number))
    tree.add(tree.root, 2, "root", terminated=True)
    return tree


def test_prompts_count_the_same_and_prefixes_by_their_share():
    single = Tree("q", 1, "prompt")
    single.add(single.root, 0, "root", terminated=True)
    single.loss_weight = 0.0  # Nothing for the policy, and all the more for the critic.
    table = ForestTable.of([branching(), single, Tree("q", 2, "prompt")])
    targets = np.full(len(table), np.nan)
    targets[[0, 1, 5]] = 0.5
    coefficients = value_coefficients(table, targets)
    assert coefficients == pytest.approx([1 / 3, 1 / 6, 0, 0, 0, 1 / 2, 0, 0])
    assert value_coefficients(table, np.full(len(table), np.nan)).sum() == 0


def test_explained_variance():
    rng = np.random.default_rng(0)
    targets, weights = rng.normal(size=50), rng.uniform(0.5, 1, size=50)
    assert explained_variance(targets, targets, weights) == 1
    assert explained_variance(targets + 3, targets, weights) == pytest.approx(1)
    assert explained_variance(np.full(50, 0.7), targets, weights) == pytest.approx(0)
    assert explained_variance(-targets, targets, weights) == pytest.approx(-3)
    half = np.where(np.arange(50) < 25, weights, 0.0)
    noisy = np.where(half > 0, targets, np.nan)
    assert explained_variance(noisy, noisy, half) == 1
    doubled = np.repeat(np.arange(50), 1 + (weights > 0.7))
    values = targets + rng.normal(size=50)
    assert explained_variance(values, targets, 1.0 + (weights > 0.7)) == pytest.approx(
        1 - np.var((targets - values)[doubled]) / np.var(targets[doubled])
    )
    assert explained_variance(rng.normal(size=50), np.ones(50), weights) == 0
    assert explained_variance(rng.normal(size=50), 0.01 * targets, weights) == 0  # Not -10,000.
    assert explained_variance(targets, targets, np.zeros(50)) == 0
