"""The warm process: it isolates itself once, then a copy of it does each call.

Invariant: whatever a copy does or sends, the next call begins from the same process as this one did. A copy has no descriptor
but its own reply, and what comes through that is taken as bytes of a stranger.

Run as a script by a bare interpreter: standard library only. Requests and replies are frames: four bytes of length, then JSON.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import time
from typing import Any, NoReturn

_SPARE = 64  # times the output limit: whoever prints more is stopped


class _OutputLimit(BaseException):
    """Far too much output."""


class _Output(io.TextIOBase):
    """Keeps the first characters that are written."""

    def __init__(self, limit: int):
        self._limit, self._kept, self._length, self._total = limit, list[str](), 0, 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._total += len(text)
        if self._length < self._limit:
            kept = text[: self._limit - self._length]
            self._kept.append(kept)
            self._length += len(kept)
        elif self._total > _SPARE * self._limit:
            raise _OutputLimit
        return len(text)

    def text(self) -> str:
        return "".join(self._kept)

    def missing(self) -> int:
        return self._total - self._length


def _complaint(error: BaseException) -> str:
    """Returns the last line of a traceback, with the line of the cell it comes from."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<cell>":
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        words = str(error)
    except BaseException:
        words = "(its message cannot be shown)"
    where = f"line {line}: " if line is not None else ""
    return f"{where}{type(error).__name__}: {words}" if words else f"{where}{type(error).__name__}"


def _execute(code: str, namespace: dict[str, Any]) -> None:
    """Runs a cell; the value of a last expression is printed, as an interactive interpreter does."""
    tree = ast.parse(code, "<cell>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
        if value is not None:
            print(repr(value))


def _cell(code: str, namespace: dict[str, Any], limit: int) -> dict[str, Any]:
    output = _Output(limit)
    sys.stdout = sys.stderr = output
    reason, complaint = "", ""
    try:
        _execute(code, namespace)
    except _OutputLimit:
        reason = "output"
    except MemoryError:
        reason = "memory"
    except BaseException as error:  # SystemExit too
        reason, complaint = "exception", _complaint(error)
    text = output.text()
    if output.missing():
        text += f"\n[{output.missing()} more characters were cut]"
    if complaint:
        text = f"{text}\n{complaint}" if text and not text.endswith("\n") else text + complaint
    return {"output": text[: 2 * limit + 200], "reason": reason}


def _answer(request: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """Does a call, in the copy."""
    if request["kind"] == "call":
        module, _, name = request["function"].partition(":")
        try:
            return {"value": getattr(sys.modules[module], name)(*request["arguments"]), "reason": ""}
        except MemoryError:
            return {"reason": "memory", "output": ""}
        except Exception as error:
            return {"reason": "exception", "output": f"{type(error).__name__}: {error}"[:500]}
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    for earlier in request["before"]:
        _cell(earlier, namespace, limits["output_chars"])
    return _cell(request["code"], namespace, limits["output_chars"])


def _reply(descriptor: int, answer: dict[str, Any]) -> None:
    # From the module as it is now: a cell may have changed it, and then its own reply is wrong, nobody else's.
    data = json.dumps(answer).encode("utf-8", "replace")
    while data:
        data = data[os.write(descriptor, data) :]


def _address_space() -> int:
    """Returns the bytes of address space in use; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 0


def _limit(limits: dict[str, Any], used: int, times: int, *, lonely: bool) -> None:
    """Sets the kernel's limits; `lonely` is for where the system calls that make processes are not refused."""
    seconds = max(1, -(-int(1000 * limits["cpu_seconds"] * times) // 1000))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    memory = used + limits["memory_mib"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    size = limits["folder_mib"] * 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if lonely:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


class Worker:
    """Serves requests until there are no more.

    Args:
        config: `limits`, `folder`, `preload`, `paths` (where preloaded modules are) and `layers` (which to try).
        requests: Descriptor to read from.
        replies: Descriptor to write to.
    """

    def __init__(self, config: dict[str, Any], requests: int, replies: int):
        self._config, self._requests, self._replies = config, requests, replies
        self._limits = config["limits"]
        # Before the walls go up: afterwards nothing outside the standard library can be read.
        sys.path[:0] = config["paths"]
        for name in config["preload"]:
            importlib.import_module(name)
        del sys.path[: len(config["paths"])]
        for name in ("math", "cmath", "decimal", "fractions", "itertools", "statistics", "re", "datetime"):
            importlib.import_module(name)
        self._used = _address_space()
        self.isolation = self._isolate()

    def _isolate(self) -> dict[str, Any]:
        layers, folder = self._config["layers"], self._config["folder"]
        library = os.path.dirname(os.__file__)
        system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
        devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
        self._readable = [library, *system, *devices, *self._config["paths"]]
        namespaces = "namespaces" in layers and isolation.enter_namespaces(folder, self._limits["folder_mib"])
        # A folder that can be filled without end is not to be written to.
        writable = ["/dev/null", *([folder] if namespaces else [])]
        self._program = isolation.filter_program() if "seccomp" in layers else None
        landlock = 0
        if "landlock" in layers:
            landlock = isolation.restrict_files(self._readable, writable)
        seccomp = self._program is not None and self._try_filter()
        self._audit = not (landlock and seccomp)
        return {"namespaces": namespaces, "landlock": landlock, "seccomp": seccomp, "audit": self._audit}

    def _try_filter(self) -> bool:
        """Says whether filters can be set here, in a copy that ends at once."""
        copy = os.fork()
        if copy == 0:
            os._exit(0 if isolation.restrict_calls(self._program) else 1)
        if os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) != 0:
            self._program = None
        return self._program is not None

    def serve(self) -> None:
        """Answers requests one after the other."""
        self._send({"isolation": self.isolation})
        while (request := self._receive()) is not None:
            self._send(self._do(request))

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        inside = os.path.join(self._config["folder"], "work")
        with contextlib.suppress(OSError):
            os.mkdir(inside)
        reading, writing = os.pipe()
        copy = os.fork()
        if copy == 0:
            self._be_the_copy(request, writing, inside)
        os.close(writing)
        times = 1 + len(request.get("before", ()))
        data, late = self._collect(reading, time.monotonic() + self._limits["wall_seconds"] * times)
        os.close(reading)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(copy, signal.SIGKILL)
            os.killpg(copy, signal.SIGKILL)  # its session, where nothing keeps it from making processes
        _, status, used = os.wait4(copy, 0)
        code = os.waitstatus_to_exitcode(status)
        shutil.rmtree(inside, ignore_errors=True)
        # Who ignores the signal at the soft limit is killed by the kernel at the hard one, and says nothing any more.
        exhausted = used.ru_utime + used.ru_stime >= self._limits["cpu_seconds"] * times
        silent = "time" if exhausted and code == -signal.SIGKILL else "process"
        return _verdict(request["kind"], data, late or code == -signal.SIGXCPU, silent)

    def _be_the_copy(self, request: dict[str, Any], writing: int, inside: str) -> NoReturn:
        try:
            os.setsid()
            isolation.set_up()
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            os.dup2(writing, 3)
            os.closerange(4, 1 << 16)
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.chdir(inside)
            os.environ.clear()
            random.seed(0)  # here: Python seeds it anew in the child of a fork
            times = 1 + len(request.get("before", ()))
            _limit(self._limits, self._used, times, lonely=self._program is None)
            if self._program is not None and not isolation.restrict_calls(self._program):
                os._exit(70)
            if self._audit:
                isolation.hook_audit(self._readable)
            _reply(3, _answer(request, self._limits))
        except BaseException:
            os._exit(71)
        finally:
            os._exit(0)

    def _collect(self, reading: int, deadline: float) -> tuple[bytes, bool]:
        """Returns what a copy sends until it closes its end, and whether that took too long."""
        most = 16 * self._limits["output_chars"] + 65_536
        data = b""
        while len(data) <= most:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([reading], [], [], left)[0]:
                return data, True
            part = os.read(reading, 65_536)
            if not part:
                return data, False
            data += part
        return b"", False

    def _receive(self) -> dict[str, Any] | None:
        head = self._exactly(4)
        if head is None:
            return None
        body = self._exactly(struct.unpack("!I", head)[0])
        return None if body is None else json.loads(body)

    def _exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            part = os.read(self._requests, count - len(data))
            if not part:
                return None
            data += part
        return data

    def _send(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode("utf-8", "replace")
        data = struct.pack("!I", len(body)) + body
        while data:
            data = data[os.write(self._replies, data) :]


def _verdict(kind: str, data: bytes, late: bool, silent: str) -> dict[str, Any]:
    """Returns what to make of a copy's reply; `silent` is the reason if it is none."""
    if late:
        return {"reason": "time", "output": ""}
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(data)
        if isinstance(answer, dict) and isinstance(answer.get("reason"), str):
            if kind == "call" and "value" in answer and not answer["reason"]:
                return {"reason": "", "value": answer["value"]}
            if isinstance(answer.get("output"), str) and answer["reason"] in ("", "exception", "memory", "output"):
                return {"reason": answer["reason"], "output": answer["output"]}
    return {"reason": silent, "output": ""}


def main() -> None:
    """Takes over the descriptors for requests and replies and serves."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    Worker(json.loads(sys.argv[1]), requests, replies).serve()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import isolation

    del sys.path[0]
    main()
else:
    from trace_envs.sandbox import isolation
