"""What a sandboxed call may use, and what comes of it.

Invariant: every record is immutable and holds plain data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trace_envs.arguments import integer, number


class SandboxError(RuntimeError):
    """A call of a trusted function in the sandbox gave no result.

    Attributes:
        reason: As for `Result`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use; the replay of earlier cells may use as much again for each of them.

    Attributes:
        cpu_seconds: Processor time; the kernel counts whole seconds and rounds up.
        wall_seconds: Time from beginning to end.
        memory_mib: Memory beyond that of the bare interpreter, in MiB.
        output_chars: Characters of output that are kept.
        folder_mib: Size of the working folder, in MiB.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 10.0
    memory_mib: int = 256
    output_chars: int = 8192
    folder_mib: int = 16

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "wall_seconds"):
            if not 0.0 < number(name, getattr(self, name)) <= 3600.0:
                raise ValueError(f"{name} must be positive and at most 3600, got {getattr(self, name)}")
        for name in ("memory_mib", "output_chars", "folder_mib"):
            integer(name, getattr(self, name), 1)

    def plain(self) -> dict[str, Any]:
        """Returns the limits as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Result:
    """What a cell did.

    Attributes:
        output: What it printed, the value of a last expression, and the last line of a traceback if it failed; cut to
            `Limits.output_chars`.
        ok: Whether it ended by itself and without an exception.
        reason: Why not: `exception`, `time`, `memory`, `output` (far too much of it), or `process` (the interpreter died);
            empty if it did.
    """

    output: str
    ok: bool
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether the cell ended by itself, so that its effects can be repeated."""
        return self.reason in ("", "exception")


@dataclass(frozen=True, slots=True)
class Isolation:
    """What keeps sandboxed code from the rest of the machine; what the kernel does not offer is false.

    Attributes:
        namespaces: Own user, mount, network and inter-process namespaces: no network devices, a working folder of limited size.
        landlock: Version of Landlock's interface that restricts which files can be opened; 0 for none.
        seccomp: System calls that computing does not need are refused, among them those for processes, sockets and signals.
        audit: Python's audit hooks refuse the same, where one of the others is missing; code in C can get round them.
    """

    namespaces: bool
    landlock: int
    seccomp: bool
    audit: bool
