"""`Sandbox`: run Python that somebody else wrote, in another process, within limits.

Invariant: a call ends within its limits whatever the code does, and leaves nothing behind: each runs in a fresh copy of a warm
process, and a warm process that does not answer is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trace_envs.sandbox.limits import Isolation, Limits, Result, SandboxError

LAYERS = ("namespaces", "landlock", "seccomp")
_START_SECONDS = 60.0
_GRACE_SECONDS = 5.0
_PART = 4096  # bytes that a pipe which is ready takes without waiting (PIPE_BUF)
_MESSAGES = {
    "time": "it took too long (at most {wall_seconds:g} seconds, {cpu_seconds:g} of processor time)",
    "memory": "it needs more memory than the {memory_mib} MiB there are",
    "output": "it printed far too much (at most {output_chars} characters)",
    "process": "the interpreter died",
}


class _Dead(Exception):
    """A warm process does not answer."""


def _await(descriptor: int, event: int, deadline: float) -> None:
    """Waits until a descriptor is ready; not by `select`, which knows no descriptor above 1,023."""
    poll = select.poll()
    poll.register(descriptor, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(1000 * left):
        raise _Dead


class _Warm:
    """A warm process: started once, asked many times."""

    def __init__(self, limits: Limits, preload: Sequence[str], paths: Sequence[str], layers: Sequence[str]):
        self._folder = tempfile.mkdtemp(prefix="trace-sandbox-")
        config = {
            "limits": limits.plain(),
            "folder": self._folder,
            "preload": list(preload),
            "paths": [*paths, *_import_paths()] if preload else [],
            "layers": list(layers),
        }
        script = Path(__file__).with_name("worker.py")
        # -I but for the environment, which has only the seed of hashes (sets come in the same order each time) and what keeps
        # numerical libraries from threads, which do not survive a fork.
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-S", "-B", str(script), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # what a buffer holds at a fork would be sent twice
            env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            cwd=self._folder,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        try:
            self.isolation = Isolation(**self._receive(time.monotonic() + _START_SECONDS)["isolation"])
        except (_Dead, KeyError, TypeError) as error:
            self.close()
            missing = f" (it imports {', '.join(preload)})" if preload else ""
            raise SandboxError(
                "process", f"the sandbox's interpreter {sys.executable} did not start{missing}"
            ) from error

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        body = json.dumps(request).encode("utf-8", "replace")
        data = memoryview(struct.pack("!I", len(body)) + body)
        try:
            while data:
                _await(self._requests.fileno(), select.POLLOUT, deadline)
                data = data[os.write(self._requests.fileno(), data[:_PART]) :]
        except (OSError, ValueError) as error:
            raise _Dead from error
        return self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        length = struct.unpack("!I", self._exactly(4, deadline))[0]
        return json.loads(self._exactly(length, deadline))

    def _exactly(self, count: int, deadline: float) -> bytes:
        data = b""
        while len(data) < count:
            _await(self._replies.fileno(), select.POLLIN, deadline)
            part = os.read(self._replies.fileno(), count - len(data))
            if not part:
                raise _Dead
            data += part
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._requests.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._replies.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget(self) -> None:
        """Lets go of a process that is another's child."""
        for pipe in (self._requests, self._replies):
            pipe.close()
        self._process.returncode = 0  # or its destructor would warn


def _import_paths() -> list[str]:
    """Returns where installed packages are, without what an editable installation adds."""
    paths = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return list(dict.fromkeys(str(Path(path).resolve()) for path in paths))


class Sandbox:
    """Runs code in isolated processes.

    Threads may share one: as many calls run at once as there are warm processes, others wait. It can be used on after a fork;
    the copy has processes of its own. What holds here is in `isolation`.

    Args:
        limits: What one call may use.
        preload: Modules that are imported before the walls go up; cells may import them, `call` calls their functions. The code
            can then read what is installed beside them.
        paths: Folders that preloaded modules are found in, besides where packages are installed.
        workers: Most warm processes, which are started as they are needed.
        layers: Which of `LAYERS` to try; for tests.

    Raises:
        ValueError: A layer is unknown, or there is no worker.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        preload: Sequence[str] = (),
        paths: Sequence[str] = (),
        workers: int = 1,
        layers: Sequence[str] = LAYERS,
    ):
        unknown = [name for name in layers if name not in LAYERS]
        if unknown:
            raise ValueError(f"unknown layer {unknown[0]!r}; known: {', '.join(LAYERS)}")
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.limits = Limits() if limits is None else limits
        self._preload, self._paths, self._layers = tuple(preload), tuple(paths), tuple(layers)
        self._workers = workers
        self._begin()
        atexit.register(self.close)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._idle: list[_Warm] = []
        self._busy: list[_Warm] = []
        self._free = threading.Semaphore(self._workers)
        self._lock = threading.Lock()

    @property
    def isolation(self) -> Isolation:
        """What keeps sandboxed code from the rest of the machine."""
        with self._warm() as warm:
            return warm.isolation

    def run(self, code: str, before: Sequence[str] = ()) -> Result:
        """Runs a cell.

        Args:
            code: The cell.
            before: Cells that were run earlier: they are run again, silently, and their names are there. What they did must not
                depend on the time, or on chance other than that of the module `random`, which begins with the same seed.
        """
        answer = self._ask({"kind": "run", "code": code, "before": list(before)}, 1 + len(before))
        reason, output = answer["reason"], answer["output"]
        if reason not in ("", "exception"):
            output = f"{output}\n{self.explain(reason)}".lstrip("\n")
        return Result(output, ok=not reason, reason=reason)

    def call(self, function: str, *arguments: Any) -> Any:
        """Calls a function of a preloaded module, within the limits.

        Args:
            function: `module:name`.
            *arguments: Plain data, as JSON has it.

        Returns:
            What the function returned, plain data too.

        Raises:
            SandboxError: It did not end within the limits, or raised an exception.
        """
        answer = self._ask({"kind": "call", "function": function, "arguments": arguments}, 1)
        if answer["reason"]:
            raise SandboxError(answer["reason"], f"{function}: {answer['output'] or self.explain(answer['reason'])}")
        return answer["value"]

    def explain(self, reason: str) -> str:
        """Returns a reason of a `Result` as a sentence."""
        return f"The call was ended: {_MESSAGES[reason].format(**self.limits.plain())}."

    def _ask(self, request: dict[str, Any], times: int) -> dict[str, Any]:
        seconds = self.limits.wall_seconds * times + _GRACE_SECONDS
        with self._warm() as warm:
            return warm.ask(request, seconds)
        return {"reason": "process", "output": ""}

    @contextlib.contextmanager
    def _warm(self) -> Any:
        """Lends a warm process; one that does not answer is replaced by another at the next call."""
        if self._pid != os.getpid():
            for other in (*self._idle, *self._busy):
                other.forget()
            self._begin()
        with self._free:
            with self._lock:
                idle = self._idle.pop() if self._idle else None
            warm = idle
            if warm is None:
                warm = _Warm(self.limits, self._preload, self._paths, self._layers)
            with self._lock:
                self._busy.append(warm)
            try:
                yield warm
            except _Dead:
                self._drop(warm)
            except BaseException:  # an interrupt, in the middle of an exchange
                self._drop(warm)
                raise
            else:
                with self._lock:
                    self._busy.remove(warm)
                    self._idle.append(warm)

    def _drop(self, warm: _Warm) -> None:
        with self._lock:
            self._busy.remove(warm)
        warm.close()

    def close(self) -> None:
        """Ends the warm processes; a later call starts others."""
        if self._pid != os.getpid():
            return
        with self._lock:
            idle, self._idle = self._idle, []
        for warm in idle:
            warm.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        atexit.unregister(self.close)


@lru_cache(maxsize=16)
def shared(limits: Limits, preload: tuple[str, ...] = (), paths: tuple[str, ...] = ()) -> Sandbox:
    """Returns the one sandbox of this process with these settings, with a warm process for each core."""
    return Sandbox(limits, preload=preload, paths=paths, workers=_cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
