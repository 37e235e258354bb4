"""The worker process of `ProcessSlots`: one environment, and what travels through its pipe.

Invariant: every request is answered, in order, by exactly one reply, unless the process dies; what does not go well is a
reply too.
"""

from __future__ import annotations

import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import gymnasium as gym

from trace_envs.slots.base import Opened, Result
from trace_envs.slots.environment import Replay, SlotEnvironment
from trace_envs.snapshots import SnapshotUnsupportedError

# The parent's ends of all pipes to workers. A forked worker inherits those that are open: it must close them, or another
# worker would never see that the parent is gone.
parent_ends: set[Connection] = set()
starting = threading.Lock()


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to a request.

    Attributes:
        value: What was asked for.
        error: What was raised instead.
        replayed: Turns that the environment has repeated so far.
    """

    value: Any
    error: Failure | None
    replayed: int


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception on its way to another process.

    Attributes:
        pickled: The exception; `None` where it cannot be pickled, or not be unpickled.
        summary: Its class and message.
        trace: Its traceback.
    """

    pickled: bytes | None
    summary: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Returns what can travel of an exception."""
        summary = "".join(traceback.format_exception_only(error)).strip()
        trace = "".join(traceback.format_exception(error)).rstrip()
        try:
            pickled: bytes | None = dumps(error)
            pickle.loads(pickled)  # type: ignore[arg-type]  # an exception may be pickled and yet not be made again
        except Exception:
            pickled = None
        return cls(pickled, summary, trace)


def dumps(value: Any) -> bytes:
    """Pickles a value; classes and functions of scripts and notebooks go along, as Gymnasium's environment functions do."""
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:
        return cloudpickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def dumps_reply(reply: Reply) -> bytes:
    """Pickles a reply, or a failure that says which part of it cannot be pickled."""
    try:
        return dumps(reply)
    except Exception:
        failure = Failure.of(_unsendable(reply.value))
        return dumps(Reply(None, failure, reply.replayed))


def _unsendable(value: Any) -> Exception:
    """Returns what is wrong with a value that cannot be pickled."""
    if isinstance(value, (Opened, Result)):
        for name in ("snapshot", "observation", "info"):
            try:
                dumps(getattr(value, name))
            except Exception as error:
                text = f"the {name} cannot be sent between processes ({type(error).__name__}: {error}); "
                if name == "snapshot":
                    return SnapshotUnsupportedError(
                        f'{text}step the environment in this process (vectorization_mode="sync"), or keep what cannot be '
                        f"pickled out of its state"
                    )
                return TypeError(f"{text}return only what can be pickled")
    return TypeError(f"a {type(value).__name__} cannot be sent between processes")


def work(connection: Connection, slot: int, make: Callable[[], gym.Env] | bytes, replay: Replay) -> None:
    """Runs an environment until the parent closes it or is gone.

    Args:
        connection: This process's end of the pipe.
        slot: The environment's slot, for messages.
        make: Makes the environment; pickled where the process does not share the parent's memory.
        replay: See `SlotEnvironment`.
    """
    _leave_parent()
    try:
        made = pickle.loads(make) if isinstance(make, bytes) else make
        env = SlotEnvironment(slot, made(), replay)
        connection.send_bytes(dumps_reply(Reply((env.description, _sendable_spec(env.env)), None, 0)))
    except Exception as error:
        error.add_note(f"while making the environment of slot {slot}")
        connection.send_bytes(dumps(Reply(None, Failure.of(error), 0)))
        return
    _serve(connection, env)


def _serve(connection: Connection, env: SlotEnvironment) -> None:
    commands: dict[str, Callable[..., Any]] = {
        "open": env.open,
        "restore": env.restore,
        "reseed": env.reseed,
        "step": env.step,
        "close": env.env.close,
    }
    command = None
    while command != "close":
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):  # the parent is gone
            env.env.close()
            return
        try:
            command, arguments = pickle.loads(request)
            reply = Reply(commands[command](*arguments), None, env.replayed_turns())
        except Exception as error:
            reply = Reply(None, Failure.of(error), env.replayed_turns())
        try:
            connection.send_bytes(dumps_reply(reply))
        except OSError:  # the parent is gone
            env.env.close()
            return


def _leave_parent() -> None:
    """Lets go of what a forked process shares with its parent, and leaves Ctrl-C to the parent, which closes its workers."""
    global starting
    starting = threading.Lock()  # the parent's is held at this moment
    for end in parent_ends:
        end.close()
    parent_ends.clear()
    signal.set_wakeup_fd(-1)  # an event loop of the parent's would get this process's signals
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _sendable_spec(env: gym.Env) -> gym.envs.registration.EnvSpec | None:
    """Returns the spec, which may hold arguments that cannot be sent; it is there to be read, so it may then be missing."""
    try:
        dumps(env.spec)
    except Exception:
        return None
    return env.spec
