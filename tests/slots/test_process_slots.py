import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, NormalizeReward
from slot_envs import (
    COUNT,
    DIE,
    GROW,
    HANG,
    RAISE,
    RAISE_UNSENDABLE,
    UNSENDABLE_INFO,
    CounterEnv,
    SealedEnv,
    broken_env,
    shape,
)

from trace_envs.slots import LocalSlots, ProcessSlots, SlotError
from trace_envs.snapshots import SnapshotUnsupportedError
from trace_envs.snapshots.compare import difference

STACKS = {
    "CartPole": (lambda: gym.make("CartPole-v1"), [0, 1, 1, 0, 1]),
    "Blackjack": (lambda: gym.make("Blackjack-v1"), [1, 1, 0]),
    "TraceMultiHopQA": (
        lambda: gym.make("TraceMultiHopQA-v0"),
        ["what?", "<search>mayor</search>", "<answer>nobody</answer>"],
    ),
    "stacked": (
        lambda: FrameStackObservation(NormalizeReward(NormalizeObservation(gym.make("CartPole-v1"))), 3),
        [1, 0, 0, 1],
    ),
}


@contextlib.contextmanager
def processes(*makes, **kwargs):
    before = set(multiprocessing.active_children())
    slots = ProcessSlots(makes, **kwargs)
    try:
        yield slots
    finally:
        slots.close()
        assert set(multiprocessing.active_children()) <= before


def scenario(slots, actions):
    """Opens, branches into the other slots with old and new randomness, and returns all that was seen."""
    opened = slots.open(0, 3)
    seen = [opened.observation, opened.info, opened.facts, opened.carried]
    for slot in range(slots.num_slots):
        slots.restore(slot, opened.snapshot, None if slot == 0 else slot)
    over, kept = set(), opened.snapshot
    for action in actions:
        results = slots.step({s: action for s in range(slots.num_slots) if s not in over}, keep=[1])
        over |= {s for s, result in results.items() if result.terminated or result.truncated}
        kept = results[1].snapshot if 1 in results and results[1].snapshot is not None else kept
        seen.append({slot: shape(result) for slot, result in results.items()})
    slots.restore(0, kept, None)
    slots.restore(1, kept, 77)
    slots.reseed(1, 78)
    return [
        *seen,
        kept.turn,
        [shape(slots.step_one(slot, actions[0], False)) for slot in (0, 1)],
        slots.replayed_turns(),
    ]


@pytest.mark.parametrize("name", STACKS)
def test_processes_do_as_one_process_does(name):
    make, actions = STACKS[name]
    local = scenario(LocalSlots([make() for _ in range(3)]), actions)
    with processes(make, make, make) as slots:
        assert difference(scenario(slots, actions), local) is None


def test_spawned_processes_do_so_too():
    make, actions = STACKS["TraceMultiHopQA"]
    local = scenario(LocalSlots([make(), make()]), actions)
    with processes(make, make, context="spawn") as slots:
        assert slots.spec.id == "TraceMultiHopQA-v0"
        assert difference(scenario(slots, actions), local) is None


def test_classes_of_a_script_travel_to_spawned_processes_and_back(tmp_path):
    """What Gymnasium's functions do: a class that only the script knows goes along."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from slot_envs import CounterEnv, COUNT\n"
        "from trace_envs.slots import ProcessSlots\n"
        "class Moment:\n"
        "    def __init__(self, count): self.count = count\n"
        "class Mine(CounterEnv):\n"
        "    def snapshot(self): return Moment(super().snapshot())\n"
        "    def restore(self, moment, *, seed=None): super().restore(moment.count)\n"
        "if __name__ == '__main__':\n"
        "    slots = ProcessSlots([Mine], 'spawn')\n"
        "    opened = slots.open(0, 5)\n"
        "    assert type(opened.snapshot.payload) is Moment\n"
        "    slots.step_one(0, COUNT, False)\n"
        "    slots.restore(0, opened.snapshot, None)\n"
        "    print(slots.step_one(0, COUNT, False).observation['count'])\n"
    )
    # The slots are not closed: the interpreter ends all the same.
    done = subprocess.run(
        [sys.executable, script, Path(__file__).parent], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[6]" and not done.stderr


def test_replay_is_warned_of_once_and_counted():
    with contextlib.ExitStack() as stack:
        with pytest.warns(UserWarning, match="SealedEnv is restored by repeating its actions") as caught:
            slots = stack.enter_context(processes(SealedEnv, SealedEnv))
        assert len(caught) == 1
        slots.open(0, 4)
        kept = slots.step_one(0, 1, True).snapshot
        there = shape(slots.step_one(0, 1, False))
        slots.restore(1, kept, None)
        assert shape(slots.step_one(1, 1, False)) == there and slots.replayed_turns() == 1
        slots.replace(1)
        assert slots.replayed_turns() == 1
        slots.restore(1, kept, None)
        assert shape(slots.step_one(1, 1, False)) == there and slots.replayed_turns() == 2


def test_steps_and_restores_run_at_the_same_time():
    """Each environment waits in its step until all of them have begun theirs."""
    barrier = multiprocessing.get_context("fork").Barrier(3)

    class Together(CounterEnv):
        def step(self, action):
            barrier.wait(30)
            return super().step(action)

        def restore(self, snapshot, *, seed=None):
            barrier.wait(30)
            super().restore(snapshot)

    with processes(Together, Together, Together, context="fork") as slots:
        snapshot = slots.open(0, 1).snapshot
        for slot in range(3):
            slots.restore(slot, snapshot, None)
        results = slots.step(dict.fromkeys(range(3), COUNT))
        assert [int(r.observation["count"][0]) for r in results.values()] == [2, 2, 2]
        # From threads, one slot each.
        threads = [threading.Thread(target=slots.step_one, args=(slot, COUNT, False)) for slot in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert barrier.n_waiting == 0 and not barrier.broken


def test_exceptions_keep_their_class_and_tell_where():
    with processes(CounterEnv, CounterEnv) as slots:
        opened = slots.open(0, 5)
        slots.open(1, 6)
        with pytest.raises(ValueError, match="no step after 6") as caught:
            slots.step({0: COUNT, 1: RAISE})
        notes = "\n".join(caught.value.__notes__)
        assert "while stepping slot 1" in notes and "in the process of slot 1:\nTraceback" in notes
        with pytest.raises(SlotError, match=r"slot 0 raised .*UnsendableError: 6"):
            slots.step_one(0, RAISE_UNSENDABLE, False)
        slots.restore(0, replace(opened.snapshot, payload=-1), None)  # its error comes with the next call
        with pytest.raises(ValueError, match="no count -1") as caught:
            slots.step({0: COUNT, 1: COUNT})
        assert "while restoring slot 0" in caught.value.__notes__
        with pytest.raises(ValueError, match="no step after 6") as caught:
            slots.step({0: RAISE, 1: RAISE})
        assert "another slot failed too: ValueError: no step after 6" in caught.value.__notes__
        with pytest.raises(SlotError, match=r"slot 1, CounterEnv, changed its action_space"):
            slots.step_one(1, GROW, False)
        assert slots.step_one(0, COUNT, False).observation["count"] == 7


def test_what_cannot_be_pickled():
    make = lambda: CounterEnv(unsendable=True)  # noqa: E731
    with processes(make) as slots:
        with pytest.raises(
            SnapshotUnsupportedError, match=r"the snapshot cannot be sent between processes.*lock.*sync"
        ):
            slots.open(0, 0)
        assert slots.step_one(0, COUNT, False).reward == 1.0
        with pytest.raises(SnapshotUnsupportedError, match="the snapshot cannot be sent"):
            slots.step_one(0, COUNT, True)
        with pytest.raises(TypeError, match="the info cannot be sent between processes"):
            slots.step_one(0, UNSENDABLE_INFO, False)
        with pytest.raises(TypeError, match="pickle") as caught:
            slots.step_one(0, threading.Lock(), False)
        assert "while sending a step to the process of slot 0" in caught.value.__notes__[0]
        assert slots.step_one(0, COUNT, False).observation["count"] == 4


def test_a_process_that_dies_is_named_and_replaced():
    with processes(CounterEnv, CounterEnv, CounterEnv) as slots:
        snapshot = slots.open(0, 2).snapshot
        for slot in (1, 2):
            slots.restore(slot, snapshot, None)
        with pytest.raises(SlotError, match=r"the process of slot 1 died \(exit code 7") as caught:
            slots.step({0: COUNT, 1: DIE, 2: COUNT})
        assert caught.value.slot == 1
        with pytest.raises(SlotError, match="slot 1 died"):  # still
            slots.restore(1, snapshot, None)
        assert slots.step({0: COUNT, 2: COUNT})[2].observation["count"] == 4
        os.kill(slots.pids[2], signal.SIGKILL)
        with pytest.raises(SlotError, match=r"slot 2 died \(exit code -9: it was killed"):
            slots.step_one(2, COUNT, False)
        for slot in (1, 2):
            slots.replace(slot)
            slots.restore(slot, snapshot, None)
        results = slots.step(dict.fromkeys(range(3), COUNT))
        assert [int(r.observation["count"][0]) for r in results.values()] == [5, 3, 3]


def test_a_step_that_takes_too_long():
    with processes(CounterEnv, CounterEnv) as slots:
        snapshot = slots.open(0, 0).snapshot
        slots.open(1, 0)
        with pytest.raises(TimeoutError, match=r"slot 0 did not finish its step within 0.1 s; replace\(0\)"):
            slots.step_one(0, HANG, True, timeout=0.1)
        with pytest.raises(SlotError, match=r"replace\(0\)"):
            slots.step_one(0, COUNT, False)
        assert slots.step_one(1, COUNT, False, timeout=60).reward == 1.0
        slots.replace(0)
        slots.restore(0, snapshot, None)
        assert slots.step_one(0, COUNT, False, timeout=60).observation["count"] == 1
        with pytest.raises(TimeoutError):
            slots.step_one(1, HANG, True, timeout=0.1)  # and is closed as it is


def test_an_interrupted_step_is_forgotten():
    """Ctrl-C in a notebook: what was on its way is dropped, and the next call goes on."""
    with processes(lambda: CounterEnv(slow=0.5)) as slots:
        slots.open(0, 0)
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            slots.step({0: COUNT})
        os.kill(slots.pids[0], signal.SIGINT)  # a terminal sends it to the whole group
        assert slots.step({0: COUNT})[0].observation["count"] == 2


def test_a_function_that_raises_or_dies_leaves_no_process_behind():
    before = set(multiprocessing.active_children())
    with pytest.raises(OSError, match="no such simulator") as caught:
        ProcessSlots([CounterEnv, broken_env, CounterEnv])
    notes = "\n".join(caught.value.__notes__)
    assert "while making the environment of slot 1" in notes and "broken_env" in notes
    with pytest.raises(SlotError, match=r"slot 0 died \(exit code 3"):
        ProcessSlots([lambda: os._exit(3), CounterEnv])
    with pytest.raises(ValueError, match=r"observation_space .* in slot 1"):
        ProcessSlots([CounterEnv, lambda: CounterEnv(high=7)])
    with pytest.raises(SnapshotUnsupportedError, match="SealedEnv"):
        ProcessSlots([SealedEnv], replay="never")
    assert set(multiprocessing.active_children()) <= before


def test_a_replacement_that_fails_can_be_tried_again(tmp_path):
    flag = tmp_path / "broken"

    def make():
        return broken_env() if flag.exists() else CounterEnv()

    with processes(make, make) as slots:
        flag.touch()
        with pytest.raises(OSError, match="no such simulator"):
            slots.replace(1)
        with pytest.raises(SlotError, match="none took its place"):
            slots.open(1, 0)
        flag.unlink()
        slots.replace(1)
        assert slots.open(1, 8).observation["count"] == 8


def test_a_function_that_cannot_be_pickled_for_a_spawned_process():
    lock = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        ProcessSlots([lambda: CounterEnv(lock)], "spawn")


def test_closing_while_a_thread_waits_for_a_step(monkeypatch):
    monkeypatch.setattr("trace_envs.slots.process.CLOSE_SECONDS", 0.2)
    raised = []

    def step():
        try:
            slots.step_one(0, HANG, False)
        except SlotError as error:
            raised.append(error)

    with processes(CounterEnv) as slots:
        slots.open(0, 0)
        thread = threading.Thread(target=step)
        thread.start()
        while not slots._workers[0].owed:
            thread.join(0.01)
    thread.join(30)
    assert not thread.is_alive() and len(raised) == 1


def test_closing():
    class Stubborn(CounterEnv):
        def close(self):
            raise OSError("busy")

    before = set(multiprocessing.active_children())
    slots = ProcessSlots([Stubborn, Stubborn])
    with pytest.raises(OSError, match="busy"):
        slots.close()
    slots.close()
    assert set(multiprocessing.active_children()) <= before
    for call in (
        lambda: slots.open(0, 0),
        lambda: slots.step({0: COUNT}),
        lambda: slots.step_one(0, COUNT, False),
        lambda: slots.replace(0),
    ):
        with pytest.raises(RuntimeError, match="have been closed"):
            call()


def test_forgotten_slots_end_their_processes():
    before = set(multiprocessing.active_children())
    slots = ProcessSlots([CounterEnv])
    assert set(multiprocessing.active_children()) > before
    del slots
    assert set(multiprocessing.active_children()) <= before


def test_processes_end_when_their_parent_is_killed(tmp_path):
    """Also those that share a parent with others, forked before and after them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from slot_envs import CounterEnv\n"
        "from trace_envs.slots import ProcessSlots\n"
        "first, second = (ProcessSlots([CounterEnv] * 2, 'fork') for _ in range(2))\n"
        "first.replace(0)\n"
        "print(*first.pids, *second.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, script, Path(__file__).parent], stdout=subprocess.PIPE, text=True)
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 4
        parent.kill()
        # Each of them holds the other end of this pipe, as its standard output, until it ends.
        closed = threading.Thread(target=parent.stdout.read)
        closed.start()
        closed.join(30)
        left = closed.is_alive()
        for pid in pids if left else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not left


def test_large_observations_and_actions_keep_their_types():
    class Large(CounterEnv):
        def step(self, action):
            return action, 0, False, False, {"same": np.float32(1)}

    big = {"count": np.arange(3_000_000, dtype=np.int16)}
    with processes(Large, Large) as slots:
        slots.open(0, 0)
        results = slots.step({0: big, 1: "text" * 100_000})
        assert difference(results[0].observation, big) is None and results[1].observation == "text" * 100_000
        assert type(results[0].info["same"]) is np.float32 and type(results[0].reward) is float
        results[0].observation["count"][0] = 1  # writable
