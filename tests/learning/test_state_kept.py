"""Nothing that a method or a predictor remembers is forgotten by a checkpoint: what was loaded goes on bit for bit."""

import numpy as np
import pytest
import torch
from synthetic_runs import batches, shape, small_world

from agents.state_file import read_state, write_state
from agents.tasks import TaskDeck
from allocation import TraceConfig, TracePlusConfig, make_allocator, make_predictor
from allocation.allocators import ALLOCATORS
from allocation.methods.oracle import TrueValues
from allocation.methods.predicted import PredictedAllocator
from allocation.predictors import PREDICTORS

BUDGET = 48
WARM = 10  # batches after which every predictor is ready
FEATURES = small_world().open(0).root.features.size
EVERYTHING = {
    "cost_aware": True,
    "prefix_waves": 2,
    "gate": 0.2,
    "kappa": None,
    "weighting": "precision",
    "tree_outcomes": True,
}
CASES = {
    **{f"{name} by hidden_state": (name, "hidden_state", None) for name in ALLOCATORS},
    **{f"trace_plus by {name}": ("trace_plus", name, None) for name in PREDICTORS if name != "hidden_state"},
    "oracle": ("oracle", None, None),
    "trace by entropy": ("trace", "counts", TraceConfig(prefix_mode="entropy")),
    "trace with all it may learn": ("trace", "ensemble", TraceConfig(**EVERYTHING)),
    "trace in waves": ("trace", "hidden_state", TraceConfig(root_waves=2, token_budget=900.0)),
    "trace_plus reweighted": ("trace_plus", "hidden_state", TracePlusConfig(reweight="clipped")),
}


def made(world, case):
    name, predictor, config = CASES[case]
    model = TrueValues(world.value) if predictor is None else make_predictor(predictor, feature_dim=FEATURES, seed=3)
    return make_allocator(name, predictor=model, group_size=6, config=config)


def through_disk(state, folder):
    write_state(folder, {"state": state})
    return read_state(folder)["state"]


def memory(thing):
    """All that an object holds, down to plain data: whatever attribute `state_dict` forgets differs here."""
    if isinstance(thing, torch.Tensor):
        thing = thing.detach().numpy()
    if isinstance(thing, np.ndarray | np.generic):
        return str(thing.dtype), thing.shape, thing.tobytes()
    if isinstance(thing, np.random.Generator):
        return memory(thing.bit_generator.state)
    if isinstance(thing, torch.nn.Module):
        return memory(dict(thing.state_dict()))
    if isinstance(thing, torch.optim.Optimizer):
        return memory(thing.state_dict())
    if isinstance(thing, dict):
        return [(memory(k), memory(v)) for k, v in thing.items()]
    if isinstance(thing, list | tuple):
        return [memory(v) for v in thing]
    if callable(thing) or thing is None or isinstance(thing, bool | int | float | str):
        return thing
    slots = [getattr(thing, name) for name in getattr(type(thing), "__slots__", ())]
    return type(thing).__name__, memory(getattr(thing, "__dict__", {})), memory(slots)


@pytest.mark.parametrize("case", CASES)
def test_a_method_goes_on_bit_for_bit_after_saving_and_loading(case, tmp_path):
    world = small_world("skewed")
    saved, fresh = made(world, case), made(world, case)
    if isinstance(saved, PredictedAllocator):
        saved.fallbacks += 3  # as if its predictor had failed
    batches(world, saved, BUDGET, WARM)
    fresh.load_state_dict(through_disk(saved.state_dict(), tmp_path))
    assert memory(fresh) == memory(saved)
    one, other = ([], [])
    for allocator, seen in ((saved, one), (fresh, other)):
        for number in range(2):
            (forest,) = batches(world, allocator, BUDGET, 1, seed=100 + number)
            seen.append((shape(forest), forest.ledger.counts(), allocator.root_budget(BUDGET)))
    assert one == other
    assert memory(fresh) == memory(saved)


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_method_with_a_predictor_has_used_it_by_then(name):
    world = small_world("skewed")
    allocator = make_allocator("trace_plus", predictor=make_predictor(name, feature_dim=FEATURES, seed=3))
    batches(world, allocator, BUDGET, WARM)
    assert allocator.predictor.ready, "a predictor that is not ready shows nothing"


def test_settings_that_changed_since_are_not_those_of_the_state(tmp_path):
    def method(**settings):
        return make_allocator("trace", predictor=make_predictor("counts"), config=TraceConfig(**settings))

    before = method(kappa=3.0, decay=0.5)
    batches(small_world("skewed"), before, BUDGET, 2)
    state = through_disk(before.state_dict(), tmp_path)
    given, fitted = method(kappa=8.0, decay=0.9), method(kappa=None, decay=0.9)
    for after in (given, fitted):
        after.load_state_dict(state)
        assert after.beliefs.retention == 0.9 and after.beliefs.clock == 2 and len(after.beliefs)
    assert given.kappa == given.prefix_kappa == 8.0
    assert fitted.kappa == fitted.prefix_kappa == 3.0, "what is fitted goes on from there"


def test_what_is_saved_does_not_move_on_with_the_run(tmp_path):
    world = small_world("skewed")
    allocator = made(world, "trace with all it may learn")
    batches(world, allocator, BUDGET, 3)
    state = allocator.state_dict()
    kept = memory(through_disk(state, tmp_path))
    batches(world, allocator, BUDGET, 1, seed=9)
    assert memory(through_disk(state, tmp_path)) == kept


def test_the_deck_goes_on_bit_for_bit(tmp_path):
    deck, rng = TaskDeck([f"t{i}" for i in range(11)]), np.random.default_rng(3)
    for count in (4, 9, 2):
        deck(rng, count)
    other = TaskDeck([f"t{i}" for i in range(11)])
    other.load_state_dict(through_disk(deck.state_dict(), tmp_path))
    again = np.random.default_rng(0)
    again.bit_generator.state = through_disk(rng.bit_generator.state, tmp_path)
    for count in (3, 11, 5, 1):
        assert deck(rng, count) == other(again, count)
