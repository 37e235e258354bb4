"""The settings of the methods made of TRACE's stages: defaults, solvers, rho, gate and band, and all of them together."""

from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
from bit_env import DepthPredictor
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import HiddenView, batches, shape, small_world

import allocation.methods.trace as trace_module
from allocation import Forest, TraceAllocator, TraceConfig, Tree, make_allocator
from allocation.arena.worlds import replay
from allocation.contrast import BELIEFS, ROOT_VALUES, root_value
from allocation.methods.gate import PROBE_EVERY, Gate
from allocation.methods.oracle import OracleAllocator, TrueValues
from allocation.methods.trace import TracePlusAllocator
from allocation.methods.trace_config import SOLVERS, TracePlusConfig
from allocation.prefixes import PREFIX_MODES
from allocation.roots import allocate_roots_exact, root_objective

BUDGET = 48


def prompts(n):
    """Trees whose hidden state is their number."""
    trees = [Tree(f"t{i}", i, "prompt", {"max_turns": 4}) for i in range(n)]
    for i, tree in enumerate(trees):
        tree.root.features = np.array([i])
    return trees


class Roots(DepthPredictor):
    """Predicts a value for each prompt by its number."""

    def __init__(self, values):
        self.values = values

    def predict(self, anchors):
        return np.array([self.values[int(a.features[0])] for a in anchors])


class Failing(DepthPredictor):
    """Cannot be asked."""

    def predict(self, anchors):
        raise RuntimeError("no memory left")


def plain(value):
    """A state as plain data that can be compared."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


# Names and defaults.


def test_the_defaults_of_trace_are_the_papers():
    config = TraceConfig()
    assert (config.root_value, config.prefix_belief, config.prefix_mode) == ("plug_in", "plug_in", "flip")
    assert (config.continuations, config.cap_per_rollout, config.root_waves, config.prefix_waves) == (2, None, 1, 1)
    assert not (config.cost_aware or config.tree_outcomes) and config.gate is config.band is config.token_budget is None
    # With the prediction alone: what a prompt did before hardly moves its belief.
    method = TraceAllocator(Roots([0.3]), config)
    method.beliefs.update("t0", 0, 500)
    alpha, beta = method.root_beliefs(prompts(1))
    assert alpha / (alpha + beta) == pytest.approx(0.3, abs=2e-4)


def test_trace_plus_takes_its_own_settings_only():
    assert make_allocator("trace_plus").config == TracePlusConfig()
    ours = make_allocator("trace_plus", config=TracePlusConfig(continuations=1.5))
    assert isinstance(ours, TracePlusAllocator) and ours.config.continuations == 1.5 and ours.gate is None
    assert {f.name for f in fields(TracePlusConfig)} == {f.name for f in fields(TraceConfig)}
    with pytest.raises(ValueError, match=r"pass config=TracePlusConfig\(\.\.\.\), got TraceConfig"):
        make_allocator("trace_plus", config=TraceConfig())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"root_choice": "top"}, "unknown root_choice 'top'; known: best, proportional"),
        ({"solver": "magic"}, "unknown solver 'magic'; known: greedy, exact"),
        ({"root_waves": 0}, "root_waves must be at least 1, got 0"),
        ({"prefix_waves": -1}, "prefix_waves must be at least 1, got -1"),
        ({"gate": 1.2}, r"gate must lie in \[0, 1\], got 1.2"),
        ({"band": (0.8, 0.2)}, r"band must be two probabilities in ascending order, got \(0.8, 0.2\)"),
        ({"solver": "exact", "token_budget": 100.0}, "solver='exact' counts rollouts"),
        ({"reweight": "ips", "root_waves": 2}, "reweight needs root_waves=1"),
        ({"reweight": "ips", "solver": "exact"}, "reweight needs root_waves=1 and solver='greedy'"),
        ({"tree_outcomes": True, "prefix_mode": "exact"}, "would let prefix_mode='exact' look at outcomes"),
    ],
)
def test_settings_that_make_no_sense_are_named_at_once(setting, message):
    with pytest.raises(ValueError, match=message):
        TraceConfig(**setting)


# The root stage.


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(ROOT_VALUES)),
    st.sampled_from(SOLVERS),
    st.lists(st.floats(0, 1), min_size=4, max_size=40),
    st.integers(4, 60),
    st.integers(0, 2**32),
)
def test_the_root_stage_reaches_the_optimum_in_any_order(value, solver, predicted, budget, seed):
    config = TraceConfig(root_value=value, solver=solver, explore=0.0, kappa=5.0)
    method, rng = TraceAllocator(Roots(predicted), config), np.random.default_rng(seed)
    table = root_value(value).table(*method.root_beliefs(prompts(len(predicted))), 16)
    budget = method.root_capacity(len(predicted), budget)
    optimum = root_objective(table, allocate_roots_exact(table, budget))
    order = rng.permutation(len(predicted))
    for arrangement in (np.arange(len(predicted)), order):
        trees = prompts(len(predicted))
        counts = np.zeros(len(predicted), dtype=int)
        counts[arrangement] = method.allocate_roots([trees[i] for i in arrangement], budget, rng)
        assert counts.sum() == budget and set(counts[counts > 0]) <= set(range(4, 17))
        assert root_objective(table, counts) >= (0.999 if solver == "greedy" else 1 - 1e-9) * optimum - 1e-12


def test_the_exact_solver_explores_too_and_hands_large_batches_to_the_greedy(monkeypatch):
    predicted = np.where(np.arange(60) < 30, 0.5, 0.01)
    exact = TraceAllocator(Roots(predicted), TraceConfig(solver="exact", explore=0.5, m_max=4))
    opened = sum(exact.allocate_roots(prompts(60), 80, np.random.default_rng(s)) > 0 for s in range(40))
    # Of 20 bundles 10 are explored, half of them among the hopeless: five of thirty each time.
    assert 3 < opened[30:].mean() < 10 and opened[:30].min() > 10
    monkeypatch.setattr(trace_module, "allocate_roots_exact", None)  # which nobody may call any more
    monkeypatch.setattr(trace_module, "EXACT_LIMIT", 60 * 80)
    greedy = replace(exact.config, solver="greedy")
    counts = [
        TraceAllocator(Roots(predicted), config).allocate_roots(prompts(60), 80, np.random.default_rng(3)).tolist()
        for config in (exact.config, greedy)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_exploration_has_its_share_of_the_whole_in_the_first_of_several_waves(solver):
    predicted = np.where(np.arange(100) < 50, 0.5, 0.001)
    hopeless = []
    for seed in range(60):
        method = TraceAllocator(Roots(predicted), TraceConfig(solver=solver, explore=0.2, root_waves=2))
        counts = method.allocate_roots(prompts(100), 160, np.random.default_rng(seed))
        assert counts.sum() == 80
        hopeless.append(counts[50:].sum())
    assert np.mean(hopeless) == pytest.approx(0.5 * 0.2 * 160, rel=0.2)


def test_rho_is_learned_and_used():
    world = small_world("balanced")
    method = TraceAllocator(HiddenView(world, ready=True), TraceConfig(root_value="beta_binomial", prefix_mode="none"))
    method.predictor.direction = 0 * world._direction  # one half for all: prompts differ from it a lot
    before = method.rho
    for number in range(8):
        report = method.update(replay(world, method, 96, np.random.default_rng(number)))
    assert report["predictor/rho"] == method.rho > before + 0.1
    values = []

    class Spy(TraceAllocator):
        def _root_value(self, trusted):
            values.append(super()._root_value(trusted))
            return values[-1]

    spy = Spy(Roots([0.5] * 9), method.config)
    spy.load_state_dict(method.state_dict() | {"predictor": {}})
    spy.allocate_roots(prompts(9), 8, np.random.default_rng(0))
    assert values == [root_value("beta_binomial", rho=method.rho)]


# Gate and band.


def forest_of(root, rollouts):
    """A tree of chains with two prefixes each; `rollouts` are (success, predictions at the prefixes)."""
    tree = prompts(1)[0]
    tree.root.predicted = root
    for number, (correct, predicted) in enumerate(rollouts):
        node = tree.root
        for value in predicted:
            node = tree.add(node, number, "root")
            node.predicted = value
        tree.add(node, number, "root", terminated=True).is_correct = correct
        tree.num_rollouts += 1
    return Forest([tree])


def test_the_gate_counts_failed_rollouts_with_a_prefix_of_mid_value_under_a_root_that_is_not():
    gate = Gate(0.5, decay=1.0)
    start = 16.0
    gate.update(forest_of(0.05, [(False, [0.05, 0.5]), (False, [0.1, 0.19]), (True, [0.5, 0.5]), (False, [0.2, 0.9])]))
    assert gate.share == pytest.approx((start + 2) / (start + 3))
    gate.update(forest_of(0.5, [(False, [0.5, 0.5])]))
    assert gate.share == pytest.approx((start + 2) / (start + 4))
    before = gate.share
    gate.update(forest_of(None, [(False, [0.5, 0.5])]))
    gate.update(forest_of(0.05, [(False, [None, None])]))
    gate.update(forest_of(0.05, [(False, [0.5, 0.5])]), trusted=False)
    assert gate.share == before


def test_the_gate_counts_flips():
    forest = forest_of(0.5, [(False, [0.5, 0.5]), (True, [0.5, 0.5])])
    tree = forest.trees[0]
    for number, (anchor, correct) in enumerate([(1, True), (1, False), (4, False), (5, True)], start=2):
        node = tree.add(tree.nodes[anchor], number, "continuation")
        tree.add(node, number, "continuation", terminated=True).is_correct = correct
    assert Gate(0.5).update(forest)["gate/flips"] == 0.5


def test_a_closed_gate_probes_now_and_then_and_opens_again():
    gate = Gate(0.3, decay=0.5)
    poor, rich = forest_of(0.05, [(False, [0.01, 0.01])] * 8), forest_of(0.05, [(False, [0.5, 0.5])] * 8)
    unseen = forest_of(0.05, [(False, [None, None])] * 8)
    while gate.share >= 0.3:
        gate.update(poor)
    opened = []
    for _ in range(3 * PROBE_EVERY):
        opened.append(gate.open)
        gate.update(poor if gate.open else unseen)
    assert sum(opened) == 3 and gate.share < 0.3
    turns = 0
    while gate.share < 0.3:
        gate.update(rich if gate.open else unseen)
        turns += 1
    assert turns <= PROBE_EVERY and gate.open


def test_trace_spends_everything_on_roots_while_the_gate_is_closed_and_keeps_that_in_its_state():
    method = TraceAllocator(DepthPredictor(), TraceConfig(gate=0.9, continuations=1.0))
    assert method.root_budget(BUDGET) == BUDGET // 2
    report = {}
    for _ in range(3):
        report = method.update(forest_of(0.05, [(False, [0.01, 0.01])] * 8))
    assert report["gate/share"] < 0.9 and report["gate/open"] == 0.0 and method.root_budget(BUDGET) == BUDGET
    other = TraceAllocator(DepthPredictor(), method.config)
    other.load_state_dict(method.state_dict())
    assert other.root_budget(BUDGET) == BUDGET and plain(other.state_dict()) == plain(method.state_dict())
    waited = 0
    while method.root_budget(BUDGET) == BUDGET:
        method.update(forest_of(0.05, [(False, [0.01, 0.01])] * 8))
        waited += 1
    assert waited < PROBE_EVERY


@pytest.mark.parametrize(("root", "inside"), [(0.5, True), (0.05, False), (0.95, False), (0.2, True)])
def test_prompts_outside_the_band_get_no_continuations(root, inside):
    method = TraceAllocator(DepthPredictor(), TraceConfig(band=(0.2, 0.8)))
    tree = forest_of(root, [(False, [None, None]), (True, [None, None])]).trees[0]
    assert bool(method.allocate_prefixes(tree, 4, np.random.default_rng(0))) == inside
    cold = TraceAllocator(HiddenView(small_world(), ready=False), TraceConfig(band=(0.2, 0.8)))
    assert cold.allocate_prefixes(tree, 4, np.random.default_rng(0))  # such a prediction closes nothing


# True values.


def test_the_oracle_goes_by_true_values_and_needs_them():
    for name in ("predictor", "none"):
        with pytest.raises(ValueError, match=r"needs true values: pass predictor=TrueValues\(value\)"):
            make_allocator("oracle", predictor=DepthPredictor() if name == "predictor" else None)
    with pytest.raises(TypeError, match="true values are known of nodes"):
        TrueValues(lambda tree, node: 0.5).predict([])
    true = {"t0": 0.01, "t1": 0.5, "t2": 0.99, "t3": float("nan")}
    method = make_allocator("oracle", predictor=TrueValues(lambda tree, node: true[tree.key]))
    trees = prompts(4)
    assert method.allocate_roots(trees, 16, np.random.default_rng(0))[[0, 2]].tolist() == [0, 0]
    assert [t.root.predicted for t in trees] == [0.01, 0.5, 0.99, 0.5]


def test_the_oracle_learns_what_rollouts_cost_and_nothing_else():
    world = small_world("skewed")
    method = OracleAllocator(TrueValues(world.value), TraceConfig(explore=0.0, cost_aware=True))
    batches(world, method, BUDGET, 2)
    assert method.charges.costs.ready and len(method.beliefs) == 0 and not method.fallbacks


# Everything together.

COMBINATIONS = list(product(("ready", "cold", "failing"), SOLVERS, (1, 3), (1, 2), PREFIX_MODES))


@pytest.mark.parametrize(("state", "solver", "root_waves", "prefix_waves", "mode"), COMBINATIONS)
def test_every_combination_spends_its_budget_and_continues_from_its_state(
    state, solver, root_waves, prefix_waves, mode
):
    world = small_world("skewed", turns=(2, 4))
    number = COMBINATIONS.index((state, solver, root_waves, prefix_waves, mode))
    config = TracePlusConfig(
        root_value=sorted(ROOT_VALUES)[number % len(ROOT_VALUES)],
        prefix_belief=BELIEFS[number % 2],
        solver=solver,
        root_waves=root_waves,
        prefix_waves=prefix_waves,
        prefix_mode=mode,
        tree_outcomes=mode != "exact",
        gate=[None, 0.3][number % 2],
        band=[None, (0.1, 0.9)][number // 2 % 2],
        continuations=1.0,
    )

    def make():
        return TracePlusAllocator(Failing() if state == "failing" else HiddenView(world, state == "ready"), config)

    first, second = make(), make()
    for seed in range(3):
        budget = int(np.random.default_rng([number, seed]).integers(8, 80))
        forests = [replay(world, method, budget, np.random.default_rng(seed)) for method in (first, second)]
        assert shape(forests[0]) == shape(forests[1])
        ledger = forests[0].ledger
        assert ledger.root_rollouts + ledger.continuations + ledger.unspent == budget
        assert all(4 <= len(tree.root.children) <= 16 for tree in forests[0])
        assert first.update(forests[0]).keys() >= {"predictor/rho"}
        assert (first.fallbacks > 0) == (state == "failing")
        second = make()
        second.load_state_dict(first.state_dict())
        assert plain(second.state_dict()) == plain(first.state_dict())
