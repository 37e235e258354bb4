from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import Autoreset, FrameStackObservation, NormalizeObservation, TimeLimit
from slot_envs import COUNT, GROW, RAISE, CounterEnv, SealedEnv, shape

from trace_envs.slots import LocalSlots, ProcessSlots, SlotError, make_slots
from trace_envs.snapshots import ReplayDivergenceError, SnapshotUnsupportedError
from trace_envs.snapshots.compare import difference


def counters(n=2, **kwargs):
    return SyncVectorEnv([lambda: CounterEnv(**kwargs)] * n)


# What may be given.


def test_a_sync_vectors_environments_are_used_as_they_are():
    envs = gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync")
    slots = make_slots(envs)
    assert isinstance(slots, LocalSlots) and slots.envs == list(envs.envs)
    assert slots.num_slots == 3 and slots.spec.id == "CartPole-v1"
    assert slots.observation_space == envs.single_observation_space and slots.action_space == envs.single_action_space
    assert make_slots(slots) is slots


def test_a_single_environment_is_a_vector_of_one():
    slots = make_slots(gym.make("CartPole-v1"))
    assert slots.num_slots == 1 and slots.open(0, 3).observation.shape == (4,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gym.make_vec("CartPole-v1", num_envs=2), "CartPoleVectorEnv computes all .*sync"),
        (
            lambda: gym.wrappers.vector.RecordEpisodeStatistics(
                gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")
            ),
            r"RecordEpisodeStatistics wraps a whole vector.*wrappers=\[",
        ),
        (lambda: "CartPole-v1", "got str"),
    ],
)
def test_other_kinds_of_vector_are_refused_with_advice(make, words):
    with pytest.raises(TypeError, match=words):
        make_slots(make())


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_a_closed_vector_is_refused(kind):
    envs = kind([CounterEnv])
    envs.close()
    with pytest.raises(ValueError, match=f"{kind.__name__} has been closed"):
        make_slots(envs)


def test_a_worker_function_of_its_own_is_refused():
    envs = AsyncVectorEnv([CounterEnv])
    envs.worker = lambda *args: None
    with pytest.raises(TypeError, match="without worker="):
        make_slots(envs)
    envs.close()


def test_environments_must_be_alike():
    with pytest.raises(ValueError, match=r"observation_space is .* in slot 0 and .* in slot 1"):
        LocalSlots([CounterEnv(), CounterEnv(high=7)])
    with pytest.raises(ValueError, match="wrappers is none in slot 0 and TimeLimit in slot 2"):
        make_slots(SyncVectorEnv([CounterEnv, CounterEnv, lambda: TimeLimit(CounterEnv(), 9)]))
    with pytest.raises(ValueError, match="env_id is 'CounterEnv' in slot 0 and 'Other' in slot 1"):
        make_slots(SyncVectorEnv([CounterEnv, type("Other", (CounterEnv,), {})]))


def test_one_environment_cannot_be_two_slots():
    env = gym.make("CartPole-v1")
    with pytest.raises(ValueError, match="slots 0 and 1 are the same environment"):
        make_slots(SyncVectorEnv([lambda: env] * 2))


def test_environments_that_reset_themselves_are_refused():
    with pytest.raises(ValueError, match="slot 1 has the wrapper Autoreset"):
        LocalSlots([CounterEnv(), TimeLimit(Autoreset(CounterEnv()), 5)])


# Replay, where nothing else carries an environment.


def test_replay_is_put_innermost_with_one_warning():
    envs = SyncVectorEnv([lambda: TimeLimit(SealedEnv(), 20)] * 3)
    with pytest.warns(UserWarning, match="SealedEnv is restored by repeating its actions") as caught:
        slots = make_slots(envs)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert type(slots.envs[0]) is TimeLimit and type(slots.envs[0].env).__name__ == "Replayable"
    opened = slots.open(0, 4)
    kept = slots.step({0: 1}, [0])[0]
    there = [shape(slots.step_one(0, a, False)) for a in (0, 1, 1)]
    assert slots.replayed_turns() == 0
    slots.restore(2, kept.snapshot, None)
    assert [shape(slots.step_one(2, a, False)) for a in (0, 1, 1)] == there
    assert slots.replayed_turns() == 1
    slots.restore(1, opened.snapshot, None)
    assert shape(slots.step_one(1, 1, False)) == shape(kept)


def test_replay_around_a_bare_environment_and_never():
    with pytest.warns(UserWarning, match="SealedEnv"):
        slots = make_slots(SealedEnv())
    assert type(slots.envs[0]).__name__ == "Replayable"
    with pytest.raises(SnapshotUnsupportedError, match="SealedEnv"):
        make_slots(SealedEnv(), replay="never")


def test_a_nondeterministic_environment_is_not_replayed():
    gym.register("Sealed-v0", "slot_envs:SealedEnv", nondeterministic=True)
    try:
        with pytest.raises(SnapshotUnsupportedError):
            make_slots(gym.make("Sealed-v0"))
    finally:
        del gym.registry["Sealed-v0"]


def test_a_replay_that_goes_another_way_names_the_slot():
    with pytest.warns(UserWarning):
        slots = LocalSlots([SealedEnv(), SealedEnv()])
    slots.open(0, 0)
    kept = slots.step_one(0, 1, True)
    slots.envs[1].unwrapped.reset = lambda **kwargs: (999, {})
    with pytest.raises(ReplayDivergenceError) as caught:
        slots.restore(1, kept.snapshot, None)
    assert "while restoring slot 1" in caught.value.__notes__


# What slots hand out.


def test_what_is_handed_out_is_not_changed_by_later_steps():
    slots = make_slots(counters())
    opened = slots.open(0, 0)
    first, second = (slots.step({0: COUNT}, [0])[0] for _ in range(2))
    assert [int(x.observation["count"][0]) for x in (opened, first, second)] == [0, 1, 2]
    assert [x.info["past"] for x in (opened, first, second)] == [[], [0], [0, 1]]
    assert [int(x.info["pair"][0][0]) for x in (opened, first, second)] == [0, 1, 2]
    assert type(first.info["pair"]) is tuple


def test_each_slot_goes_its_own_way_and_snapshots_travel_between_them():
    slots = make_slots(counters(3))
    opened = slots.open(0, 10)
    for slot in (1, 2):
        slots.restore(slot, opened.snapshot, slot)
    results = slots.step({2: COUNT, 0: COUNT}, keep=[2])
    assert list(results) == [2, 0] and results[0].snapshot is None
    slots.restore(1, results[2].snapshot, None)
    assert slots.step_one(1, COUNT, False).info["past"] == list(range(12))


def test_no_snapshot_is_taken_at_the_end():
    slots = make_slots(counters(1))
    slots.open(0, 49)
    over = slots.step({0: COUNT}, [0])[0]
    assert over.terminated is True and over.snapshot is None and over.reward == 1.0


def test_frames_are_part_of_the_moment():
    make = lambda: FrameStackObservation(gym.make("CartPole-v1"), 3)  # noqa: E731
    slots = make_slots(SyncVectorEnv([make] * 2))
    slots.open(0, 1)
    kept = slots.step_one(0, 1, True)
    there = [shape(slots.step_one(0, a, False)) for a in (0, 1)]
    slots.restore(1, kept.snapshot, None)
    assert difference([shape(slots.step_one(1, a, False)) for a in (0, 1)], there) is None


def test_an_episode_can_be_opened_as_it_was_with_what_wrappers_carried():
    slots = make_slots(SyncVectorEnv([lambda: NormalizeObservation(gym.make("CartPole-v1"))] * 2))
    slots.open(0, 1)
    for action in (0, 1, 0):
        slots.step_one(0, action, False)
    opened = slots.open(0, 2)
    assert opened.carried
    plain = slots.open(1, 2)
    again = slots.open(1, 2, carried=opened.carried)
    assert difference(again.observation, opened.observation) is None
    assert difference(plain.observation, opened.observation) is not None
    assert difference(again.carried, opened.carried) is None


# What goes wrong.


def test_an_exception_names_the_slot():
    slots = make_slots(counters())
    slots.open(0, 5), slots.open(1, 6)
    with pytest.raises(ValueError, match="no step after 6") as caught:
        slots.step({0: COUNT, 1: RAISE})
    assert caught.value.__notes__ == ["while stepping slot 1"]
    with pytest.raises(ValueError, match="no count") as caught:
        slots.restore(1, replace(slots.open(0, 5).snapshot, payload=-1), None)
    assert caught.value.__notes__ == ["while restoring slot 1"]
    assert slots.step({0: COUNT, 1: COUNT})[1].observation["count"] == 7


def test_changed_spaces_are_an_error_that_names_the_slot():
    slots = make_slots(counters())
    slots.open(0, 0), slots.open(1, 0)
    with pytest.raises(
        SlotError, match=r"slot 1, CounterEnv, changed its action_space from Discrete\(7\) to Discrete\(8\)"
    ) as e:
        slots.step({0: COUNT, 1: GROW})
    assert e.value.slot == 1
    with pytest.raises(SlotError, match="changed its action_space"):
        slots.open(1, 0)


def test_an_equal_space_may_take_the_place_of_the_first():
    slots = make_slots(counters(1))
    slots.envs[0].action_space = gym.spaces.Discrete(7)
    slots.open(0, 0)
    assert slots.step_one(0, COUNT, False).reward == 1.0


def test_a_slot_can_be_replaced():
    slots = make_slots(counters())
    slots.open(1, 3)
    kept, before = slots.step_one(1, COUNT, True), slots.envs[1]
    slots.replace(1)
    assert slots.envs[1] is not before and not before.closed
    slots.restore(1, kept.snapshot, None)
    assert slots.step_one(1, COUNT, False).observation["count"] == 5


def test_a_slot_that_cannot_be_replaced_says_so():
    slots = make_slots(CounterEnv())
    with pytest.raises(SlotError, match="slot 0 cannot be replaced") as caught:
        slots.replace(0)
    assert caught.value.slot == 0
    made = iter([CounterEnv(), CounterEnv(), CounterEnv(high=7)])
    slots = make_slots(SyncVectorEnv([lambda: next(made)] * 2))
    with pytest.raises(ValueError, match="slot 1"):
        slots.replace(1)
    assert slots.open(1, 2).observation["count"] == 2


def test_closing():
    envs = counters()
    slots = make_slots(envs)
    snapshot = slots.open(0, 0).snapshot
    inner = slots.envs
    slots.close(), slots.close()
    assert envs.closed and all(env.closed for env in inner)
    calls = [
        lambda: slots.open(0, 0),
        lambda: slots.restore(0, snapshot, None),
        lambda: slots.reseed(0, 1),
        lambda: slots.step({0: COUNT}),
        lambda: slots.step_one(0, COUNT, False),
        lambda: slots.replace(0),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="have been closed"):
            call()


def test_a_vector_closed_under_the_slots():
    envs = counters()
    slots = make_slots(envs)
    envs.close()
    with pytest.raises(RuntimeError, match="have been closed"):
        slots.open(0, 0)


def test_every_environment_is_closed_even_if_one_raises():
    slots = make_slots(counters(3))
    inner = slots.envs

    def refuse():
        raise OSError("busy")

    inner[0].close = refuse
    with pytest.raises(OSError, match="busy"):
        slots.close()
    assert inner[1].closed and inner[2].closed


def test_observations_of_every_kind_are_copied():
    from trace_envs.slots.environment import copied_info, copied_observation

    graph = gym.spaces.GraphInstance(np.zeros((2, 1)), None, None)
    objects = np.array([[1], None], dtype=object)
    given = {"text": "a", "graph": graph, "more": [np.float32(2), {3}], "objects": objects}
    kept = copied_observation(given)
    assert difference(kept["graph"], graph) is None and type(kept["graph"]) is gym.spaces.GraphInstance
    graph.nodes[0] = 1
    given["more"][1].add(4)
    objects[0].append(2)
    assert kept["graph"].nodes[0] == 0 and kept["more"][1] == {3} and kept["objects"][0] == [1]
    thing = object()
    assert copied_info({"thing": thing})["thing"] is thing
    assert copied_info({}) == {}


def test_slots_of_processes_come_of_an_async_vector():
    envs = AsyncVectorEnv([CounterEnv] * 2)
    slots = make_slots(envs)
    try:
        assert isinstance(slots, ProcessSlots) and slots.num_slots == 2 and envs.closed
        assert slots.open(1, 4).observation["count"] == 4
    finally:
        slots.close()
