"""The checks that restore a snapshot elsewhere: into another environment of the same kind, and in another process.

Invariant: another process is told how to make an environment, the snapshot's bytes and the actions, and nothing else; not
even the program that asked is imported there, so a script needs no `if __name__ == "__main__"` to check its environment.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np

from trace_envs.snapshots.checks import MISSING, SEEDS, Checks, SnapshotCheckError
from trace_envs.snapshots.episodes import Actions, Step, moment_of, play, state_difference, take_step, wrappers_of
from trace_envs.snapshots.record import EnvSnapshot, SnapshotUnsupportedError
from trace_envs.snapshots.stack import fork, restore, snapshot

SECONDS = 300
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from trace_envs.snapshots.elsewhere import serve; serve()"
)


class Answer(NamedTuple):
    """What came of it in the other process.

    Attributes:
        failed: What could not be done: "make", "restore" or "step"; empty if all went well.
        error: The error then, as it was printed.
        data: A snapshot taken after the restore.
        steps: The future.
        seeded: The future after a restore with a seed.
    """

    failed: str
    error: str
    data: bytes = b""
    steps: Sequence[Step] = ()
    seeded: Sequence[Step] = ()


def sendable(make: Callable[[], gym.Env], actions: Sequence[Any]) -> bytes:
    """Returns what another process needs to know.

    Raises:
        Exception: Whatever hinders it from being pickled.
    """
    return cloudpickle.dumps((make, list(actions)))


def ask(sent: bytes, data: bytes, seed: int) -> Answer:
    """Restores a snapshot in a new process and plays on from there, without a seed and with one.

    Args:
        sent: What `sendable` returned.
        data: The snapshot, as `to_bytes` returned it.
        seed: The seed.
    """
    # Sets and dictionaries of texts come in another order there, as they may on another day.
    hashing = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=pickle.dumps(sys.path) + pickle.dumps((sent, data, seed)),
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": hashing},
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Answer("step", f"nothing within {SECONDS} seconds")
    if done.returncode or not done.stdout:
        return Answer("step", f"exit status {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}")
    return cloudpickle.loads(done.stdout)


def serve() -> None:
    """Answers, in the other process."""
    # Environments print; what they print must not come between the bytes of the answer.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with out:
        out.write(cloudpickle.dumps(_answer(*pickle.load(sys.stdin.buffer))))


def _answer(sent: bytes, data: bytes, seed: int) -> Answer:
    doing = "make"
    try:
        make, actions = cloudpickle.loads(sent)
        env = make()
        doing = "restore"
        taken = EnvSnapshot.from_bytes(data)
        restore(env, taken)
        again = snapshot(env).to_bytes()
        doing = "step"
        steps = play(env, actions)
        restore(env, taken, seed=seed)
        seeded = play(env, actions)
        env.close()
    except Exception as error:
        return Answer(doing, "".join(traceback.format_exception_only(error)).strip())
    return Answer("", "", again, steps, seeded)


class ChecksElsewhere(Checks):
    """All checks, with those that need another environment.

    Args:
        env: See `Checks`.
        rng: See `Checks`.
        actions: See `Checks`.
        make: Makes another environment, if that is known.

    Attributes:
        skipped: Names of checks that could not be made, with the reason.
    """

    def __init__(self, env: gym.Env, rng: np.random.Generator, actions: Actions, make: Callable[[], gym.Env] | None):
        super().__init__(env, rng, actions)
        self.make = make
        self.skipped: dict[str, str] = {}

    def _another(self) -> tuple[gym.Env | None, str]:
        """Returns another environment with the same wrappers, or the reason why there is none."""
        if self.make is not None:
            return self.make(), ""
        stack = [type(wrapper).__name__ for wrapper in wrappers_of(self.env)]
        reason = "the environment has no spec"
        if self.env.spec is not None:
            try:
                made = self.env.spec.make()
            except Exception as error:  # whatever a spec cannot express shows in a way of its own
                reason = f"its spec cannot make another ({type(error).__name__}: {error})"
            else:
                if [type(wrapper).__name__ for wrapper in wrappers_of(made)] == stack:
                    self.make = self.env.spec.make
                    return made, ""
                made.close()
                reason = "its spec makes another stack of wrappers"
        try:
            return fork(self.env), ""
        except SnapshotUnsupportedError as error:
            return None, f"{reason}, and fork() says: {error}; pass make=lambda: ..."

    def sibling(self, repeats: bool) -> None:
        """A moment can be restored into another environment of the same kind, and the two do not see each other."""
        other, reason = self._another()
        if other is None:
            self.skipped[self.name] = reason
            return
        try:
            self._sibling(other, repeats)
        finally:
            other.close()

    def _sibling(self, other: gym.Env, repeats: bool) -> None:
        episode, turn = self.episode, self.middle
        where = "in another environment of the same kind"
        try:
            self._restore(turn, env=other)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise SnapshotCheckError(
                self.name,
                turn,
                f"check_snapshot: {self.name}: a restore {where}, which was never reset, raised {problem}",
            ) from error
        found = moment_of(other)
        if found.digest != episode.moments[turn].digest:
            differs = state_difference(episode.moments[turn].taken, found.taken)
            self._fail(
                turn, f"the digest of turn {turn}, restored {where}, is another: the snapshots differ in {differs}"
            )
        if repeats:
            advice = f"the snapshot misses what the first environment holds: {MISSING}"
            for seed in (None, *SEEDS[:1]):
                told = f"a future of turn {turn}, restored{'' if seed is None else f' with seed={seed}'} {where},"
                self._compare(self._future(turn, seed), self._future(turn, seed, other), turn, told, advice)
            self._restore(turn)
            self._restore(0, env=other)
            pairs = zip(episode.actions[turn:], episode.actions, strict=False)
            for at, (mine, its) in enumerate(pairs):
                for env, start, action in ((self.env, turn, mine), (other, 0, its)):
                    self._compare(
                        episode.steps[start + at : start + at + 1],
                        [take_step(env, action)],
                        start + at,
                        f"a future from turn {start}, stepped in turns with another environment of the same kind,",
                        "the two share what a step changes: look for class attributes and module-level state",
                    )

    def another_process(self) -> None:
        """A moment can be restored in another process, from bytes."""
        if self.make is None:
            self.skipped[self.name] = "it is not known how to make another environment; pass make=lambda: ..."
            return
        turn = self.middle
        moment = self.episode.moments[turn]
        try:
            data = moment.taken.to_bytes()
        except SnapshotUnsupportedError as error:
            self.skipped[self.name] = str(error)
            return
        try:
            sent = sendable(self.make, self.episode.actions[turn:])
        except Exception as error:  # pickling fails in as many ways as there are objects
            self.skipped[self.name] = f"make or the actions cannot be sent there ({type(error).__name__}: {error})"
            return
        answer = ask(sent, data, SEEDS[0])
        if answer.failed == "make":
            self.skipped[self.name] = f"the environment cannot be made there ({answer.error})"
            return
        if answer.failed:
            self._fail(
                turn,
                f"turn {turn} was to be restored and played there, but {answer.failed}() raised {answer.error}; "
                f"what a snapshot holds must be plain data, or of classes registered with trace_envs.snapshots.codec.register",
            )
        advice = f"its snapshot misses what this process holds, or depends on the order of sets of texts: {MISSING}"
        told = f"a future of turn {turn}, restored in another process"
        self._compare(self.episode.steps[turn:], answer.steps, turn, f"{told},", advice)
        self._compare(self._future(turn, SEEDS[0]), answer.seeded, turn, f"{told} with seed={SEEDS[0]},", advice)
        found = EnvSnapshot.from_bytes(answer.data)
        if found.digest != moment.digest:
            differs = state_difference(moment.taken, found)
            self._fail(
                turn,
                f"the digest of turn {turn}, restored in another process, is another: the snapshots differ in {differs}",
            )
