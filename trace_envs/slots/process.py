"""`ProcessSlots`: each environment in a process of its own.

Invariant: at any moment it is known how many replies each process owes; what fails or dies in one process is raised for its
slot, and the other slots go on.

Gymnasium's own worker processes can neither take nor restore snapshots, so these are others, with their own protocol
(`trace_envs.slots.worker`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing import util
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import cloudpickle
import gymnasium as gym
from gymnasium.vector.utils import clear_mpi_env_vars

from trace_envs.slots import worker as child
from trace_envs.slots.base import Opened, Result, SlotError, Slots
from trace_envs.slots.environment import Description, Replay
from trace_envs.slots.local import check_alike
from trace_envs.snapshots import EnvSnapshot

LOOK_SECONDS = 1.0  # between two looks at whether a process that does not answer is still there
CLOSE_SECONDS = 5.0  # that all processes together have to close their environments
STOP_SECONDS = 1.0  # that a process has to go when it was terminated, before it is killed
_ACKNOWLEDGED_LATER = ("restore", "reseed")


class _Worker:
    """A process, this end of its pipe, and the replies that it owes."""

    def __init__(self, context: BaseContext, slot: int, make: Callable[[], gym.Env], daemon: bool, replay: Replay):
        self.slot = slot
        self.replayed = 0
        self.lost: str | None = None  # why nothing can be asked of it any more
        self.owed: list[tuple[str, int]] = [("make", 1)]  # command, and how many turns it may have to take
        # A forked process shares this one's memory; for any other, the function is pickled as Gymnasium does.
        sent = make if context.get_start_method() == "fork" else cloudpickle.dumps(make)
        # One at a time: a process forked meanwhile would inherit this one's end too, and hide this one's death.
        with child.starting, clear_mpi_env_vars():
            self.connection, theirs = context.Pipe()
            child.parent_ends.add(self.connection)
            self.process: BaseProcess = context.Process(  # type: ignore[attr-defined]
                target=child.work,
                args=(theirs, slot, sent, replay),
                name=f"trace_envs slot {slot}",
                daemon=daemon,
            )
            try:
                self.process.start()
            except BaseException:
                self._disconnect()
                raise
            finally:
                theirs.close()

    def request(self, command: str, *arguments: Any, turns: int = 1) -> None:
        """Sends a request; `turns` is how many turns the answer may take, for time limits."""
        if self.lost is not None:
            raise SlotError(self.slot, self.lost)
        try:
            data = child.dumps((command, arguments))
        except Exception as error:
            error.add_note(
                f"while sending a {command} to the process of slot {self.slot}; only what can be pickled can be sent"
            )
            raise
        try:
            self.connection.send_bytes(data)
        except OSError:
            self._died()
        self.owed.append((command, turns))

    def answer(self, timeout: float | None = None) -> Any:
        """Returns the oldest reply that is owed, or raises what it holds.

        Raises:
            TimeoutError: It did not come within `timeout` seconds.
            SlotError: The process died.
        """
        if self.lost is not None:
            raise SlotError(self.slot, self.lost)
        deadline = None if timeout is None else time.monotonic() + timeout
        ready: list[Any] = []
        while not ready:
            left = LOOK_SECONDS if deadline is None else min(LOOK_SECONDS, max(0.0, deadline - time.monotonic()))
            # The process as well as the pipe. Something that the environment forked may hold the ends of both open, so
            # once in a while the system is asked.
            ready = wait([self.connection, self.process.sentinel], left)
            if not ready and not self.process.is_alive():
                self._died()
            if deadline is not None and time.monotonic() >= deadline:
                break
        if not ready:
            self.lost = (
                f"slot {self.slot} did not finish its {self.owed[0][0]} within {timeout:g} s; replace({self.slot}) before it "
                f"is used again"
            )
            raise TimeoutError(self.lost)
        if self.connection not in ready:
            self._died()
        # If Ctrl-C comes between here and the end of the message, nobody knows where the next one begins.
        self.lost = (
            f"reading from the process of slot {self.slot} was interrupted; replace({self.slot}) starts a new one"
        )
        try:
            data = self.connection.recv_bytes()
        except (EOFError, OSError):
            self._died()
        self.owed.pop(0)
        self.lost = None
        try:
            reply: child.Reply = pickle.loads(data)
        except Exception as error:
            error.add_note(f"while reading a reply of the process of slot {self.slot}")
            raise
        self.replayed = reply.replayed
        if reply.error is not None:
            raise _exception(self.slot, reply.error)
        return reply.value

    def settle(self, timeout: float | None = None, superseded: bool = False) -> None:
        """Takes every reply that is owed: raises what a restore raised, and drops what nobody waits for any more.

        Args:
            timeout: Seconds for each turn that has to be repeated.
            superseded: What follows puts the environment elsewhere, so a restore that failed no longer matters.
        """
        while self.owed:
            command, turns = self.owed[0]
            try:
                self.answer(None if timeout is None else timeout * turns)
            except Exception:
                if (command in _ACKNOWLEDGED_LATER and not superseded) or self.lost is not None:
                    raise

    def leave(self, deadline: float) -> Exception | None:
        """Waits until the process, told to close, has gone, at most until then; returns what closing raised."""
        while self.owed and self.lost is None:
            command, _ = self.owed[0]
            try:
                self.answer(max(0.0, deadline - time.monotonic()))
            except Exception as error:
                if command == "close" and self.lost is None:
                    return error
        if self.lost is None:
            self.process.join(max(0.0, deadline - time.monotonic()))
        return None

    def terminate(self) -> None:
        """Asks the process to go, whatever it is doing."""
        if self.process.is_alive():
            self.process.terminate()

    def join(self, deadline: float) -> None:
        """Waits until the process has gone; one that has not by then is killed."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._disconnect()  # last: who waits for a reply in another thread learns from the process that there is none

    def _disconnect(self) -> None:
        child.parent_ends.discard(self.connection)
        self.connection.close()

    def _died(self) -> NoReturn:
        self.process.join(STOP_SECONDS)
        code = self.process.exitcode
        if code is None:
            cause = "it closed its pipe but still runs"
        elif code == -signal.SIGKILL:
            cause = f"exit code {code}: it was killed, as the system does when memory runs out"
        elif code < 0:
            cause = f"exit code {code}: signal {-code}, as when native code crashes"
        else:
            cause = f"exit code {code}: the environment called exit, or could not be made in a new process"
        self.lost = f"the process of slot {self.slot} died ({cause}); replace({self.slot}) starts a new one"
        raise SlotError(self.slot, self.lost)


def _exception(slot: int, failure: child.Failure) -> Exception:
    """Returns the exception that a process raised, of its own class where that can travel."""
    error: Exception
    try:
        error = pickle.loads(failure.pickled)  # type: ignore[arg-type]
    except Exception:
        error = SlotError(slot, f"the environment of slot {slot} raised {failure.summary}")
    error.add_note(f"in the process of slot {slot}:\n{failure.trace}")
    return error


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        worker.join(deadline)


class ProcessSlots(Slots):
    """Environments in processes of their own, stepped and restored at the same time.

    Snapshots, observations, infos and actions are pickled on their way. A restore does not keep its caller waiting; what it
    raises comes with the next call on the slot.

    Args:
        env_fns: Functions that make the environments, one for each slot.
        context: How processes are started (`multiprocessing.get_context`): `"fork"`, `"spawn"`, `"forkserver"`; `None` for
            the platform's default.
        daemon: Processes end with this one at the latest, and may start none of their own.
        replay: `"auto"` restores environments that nothing else can carry by repeating their actions, with a warning;
            `"never"` refuses them.

    Raises:
        Exception: Whatever making an environment raised, with the traceback of its process as a note.
        SlotError: A process died before its environment was made.
        ValueError: The environments differ.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        context: str | None = None,
        daemon: bool = True,
        *,
        replay: Replay = "auto",
    ):
        self._make = list(env_fns)
        self._context, self._daemon, self._replay = multiprocessing.get_context(context), daemon, replay
        self._workers: list[_Worker] = []
        self._replayed = 0  # by processes that have been replaced
        self._closed = False
        # When these slots are forgotten, and before the interpreter waits for its children.
        self._finalizer = util.Finalize(self, _stop, (self._workers,), exitpriority=10)
        try:
            for slot in range(len(self._make)):
                self._workers.append(self._start(slot))
            made = [worker.answer() for worker in self._workers]
            self._descriptions: list[Description] = [description for description, _ in made]
            check_alike(self._descriptions)
        except BaseException:
            self._closed = True
            self._finalizer()
            raise
        self.num_slots = len(self._workers)
        first, self.spec = made[0]
        self.metadata = first.metadata
        self.observation_space, self.action_space = first.observation_space, first.action_space

    @property
    def pids(self) -> list[int | None]:
        """The processes' ids, one for each slot."""
        return [worker.process.pid for worker in self._workers]

    def _start(self, slot: int) -> _Worker:
        return _Worker(self._context, slot, self._make[slot], self._daemon, self._replay)

    def _worker(self, slot: int) -> _Worker:
        if self._closed:
            raise RuntimeError("the environments have been closed; make new ones")
        return self._workers[slot]

    def open(
        self,
        slot: int,
        seed: int | None,
        options: dict[str, Any] | None = None,
        carried: tuple[tuple[str, Mapping[str, Any]], ...] | None = None,
    ) -> Opened:
        """Resets one environment."""
        worker = self._worker(slot)
        worker.settle(superseded=True)
        worker.request("open", seed, options, carried)
        return worker.answer()

    def restore(self, slot: int, snapshot: EnvSnapshot, seed: int | None) -> None:
        """Puts one environment back, without waiting; errors are raised by the next call on the slot."""
        worker = self._worker(slot)
        worker.settle(superseded=True)
        turns = 1 + (snapshot.turn or 0) if isinstance(snapshot, EnvSnapshot) else 1
        worker.request("restore", snapshot, seed, turns=turns)

    def settle(self, slot: int, timeout: float | None = None) -> None:
        """Waits for a restore, `timeout` seconds at most for each turn that it may have to repeat."""
        self._worker(slot).settle(timeout)

    def reseed(self, slot: int, seed: int) -> None:
        """Gives one environment a new seed, without waiting; errors are raised by the next call on the slot."""
        worker = self._worker(slot)
        worker.settle()
        worker.request("reseed", seed)

    def step(self, actions: Mapping[int, Any], keep: Collection[int] = ()) -> dict[int, Result]:
        """Steps the environments named, all at the same time.

        Raises:
            Exception: What the first of them raised; what others raised is in its notes.
        """
        kept = set(keep)
        workers = {slot: self._worker(slot) for slot in actions}
        for worker in workers.values():
            worker.settle()
        results: dict[int, Result] = {}
        errors: list[Exception] = []
        asked = []
        for slot, worker in workers.items():
            try:
                worker.request("step", actions[slot], slot in kept)
                asked.append(slot)
            except Exception as error:
                errors.append(error)
        for slot in asked:
            try:
                results[slot] = workers[slot].answer()
            except Exception as error:
                errors.append(error)
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"another slot failed too: {type(other).__name__}: {other}")
            raise errors[0]
        return results

    def step_one(self, slot: int, action: Any, keep: bool, timeout: float | None = None) -> Result:
        """Steps one environment.

        Args:
            slot: Which.
            action: What to do there.
            keep: Whether the snapshot is wanted after the step, if the episode goes on.
            timeout: Seconds that the step may take. A restore that is still under way may take as long for each turn of
                its snapshot, which it may have to repeat.

        Raises:
            TimeoutError: It took longer; `replace` the slot before it is used again.
            SlotError: The process died.
            Exception: Whatever the environment raised.
        """
        worker = self._worker(slot)
        worker.settle(timeout)
        worker.request("step", action, keep)
        return worker.answer(timeout)

    def replayed_turns(self) -> int:
        """Returns how many turns were repeated by what has been answered so far."""
        return self._replayed + sum(worker.replayed for worker in self._workers)

    def replace(self, slot: int) -> None:
        """Ends the slot's process, whatever it is doing, and starts a new one."""
        before = self._worker(slot)
        _stop([before])
        before.lost = (
            f"the process of slot {slot} was stopped and none took its place; replace({slot}) starts a new one"
        )
        fresh = self._start(slot)
        try:
            description, _ = fresh.answer()
            self._descriptions[0].check_equal(slot, description)
        except BaseException:
            _stop([fresh])
            raise
        self._replayed += before.replayed
        self._workers[slot] = fresh

    def close(self) -> None:
        """Closes the environments and ends their processes; again has no effect."""
        if self._closed:
            return
        self._closed = True
        errors: list[Exception] = []
        try:
            for worker in self._workers:
                with contextlib.suppress(SlotError):  # it is gone already
                    worker.request("close")
            deadline = time.monotonic() + CLOSE_SECONDS
            errors = [error for error in (worker.leave(deadline) for worker in self._workers) if error is not None]
        finally:
            self._finalizer()
        if errors:
            raise errors[0]
