"""Hostile code: each attack ends within its limits, leaves the host as it was, and the next call clean."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from attacks import ATTACKS, attack

from trace_envs.sandbox import Limits, Result, Sandbox

LIMITS = Limits(cpu_seconds=1, wall_seconds=2, memory_mib=128, output_chars=1000, folder_mib=4)
SECRET = "the-secret-that-nobody-may-see"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS) as made:
        if made.isolation.audit:
            pytest.skip("the kernel offers no Landlock or no filters of system calls; see the fallback tests")
        yield made


@pytest.fixture(scope="module")
def fallback() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, layers=()) as made:
        yield made


class Host:
    """What an attack must not change or learn."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.secret = folder / "secret.txt"
        self.secret.write_text(SECRET)
        (folder / "planted.py").write_text(f"print({SECRET!r})\n")
        self.connections = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        self._before = self._listing()

    def _accept(self) -> None:
        while True:
            try:
                self._server.accept()[0].close()
            except OSError:
                return
            self.connections += 1

    def _listing(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir())

    def assert_unharmed(self) -> None:
        assert self.secret.read_text() == SECRET
        assert self._listing() == self._before
        assert self.connections == 0
        assert not Path("/tmp/escaped").exists()
        assert not Path("/dev/shm/escaped").exists()

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("SECRET", SECRET)
    made = Host(tmp_path)
    yield made
    made.close()


def ending(result: Result) -> str:
    if result.ok:
        return "harmless"
    return "refused" if result.reason == "exception" else result.reason


def assert_clean(sandbox: Sandbox) -> None:
    after = sandbox.run("import os\nprint(sorted(os.listdir('.')) if hasattr(os, 'fork') else 'patched')\n2 + 3")
    assert after == Result("[]\n5\n", True)


def copies() -> list[psutil.Process]:
    """Returns whatever still runs beneath the warm processes."""
    return [child for warm in psutil.Process().children() for child in warm.children(recursive=True)]


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 60


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_ends_within_its_limits(name: str, sandbox: Sandbox, host: Host) -> None:
    sandbox.run("0")  # the warm process is there
    warm = {child.pid for child in psutil.Process().children()}
    code, ends = attack(name, secret=str(host.secret), folder=str(host.folder), port=host.port)
    begun = time.monotonic()
    result = sandbox.run(code)
    seconds = time.monotonic() - begun
    assert ending(result) in ends, result.output[:300]
    assert SECRET not in result.output
    assert "root:" not in result.output
    assert len(result.output) <= 2 * LIMITS.output_chars + 300
    assert result.ok or result.output, "an error observation says something"
    assert seconds < LIMITS.wall_seconds + 3.0, "not only after the parent's own deadline"
    host.assert_unharmed()
    assert_clean(sandbox)
    assert copies() == []
    assert {child.pid for child in psutil.Process().children()} == warm, "the same warm process goes on"


# What Python's audit hooks and the kernel's resource limits stop by themselves, where the kernel offers no more than these.
BY_AUDIT = [
    name
    for name, (code, _) in ATTACKS.items()
    if not any(word in code for word in ("ctypes", "mmap", "list_root", "sqlite"))
    and name
    not in ("new_session", "block_in_read", "chroot", "set_user", "device", "set_clock", "many_files", "fill_disk")
    and name
    not in ("thread_bomb", "daemon_thread_outlives")  # no thread can be made there: each would count as a process
]


@pytest.mark.parametrize("name", BY_AUDIT)
def test_attack_without_the_kernels_layers(name: str, fallback: Sandbox, host: Host) -> None:
    assert fallback.isolation.audit
    code, ends = attack(name, secret=str(host.secret), folder=str(host.folder), port=host.port)
    result = fallback.run(code)
    assert ending(result) in ends, result.output[:300]
    assert SECRET not in result.output
    assert "root:" not in result.output
    host.assert_unharmed()
    assert fallback.run("2 + 3") == Result("5\n", True)
    assert copies() == []


@pytest.mark.parametrize("missing", ["namespaces", "landlock", "seccomp"])
def test_each_layer_can_be_missing(missing: str, host: Host) -> None:
    layers = [name for name in ("namespaces", "landlock", "seccomp") if name != missing]
    with Sandbox(LIMITS, layers=layers) as sandbox:
        assert not getattr(sandbox.isolation, missing)
        for name in ("fork", "kill_parent", "read_secret", "write_secret", "socket_internet", "shell", "endless_loop"):
            code, ends = attack(name, secret=str(host.secret), folder=str(host.folder), port=host.port)
            result = sandbox.run(code)
            assert ending(result) in ends, (name, result.output)
            assert SECRET not in result.output
        host.assert_unharmed()
        assert sandbox.run("2 + 3").output == "5\n"


def test_a_killed_warm_process_is_replaced(sandbox: Sandbox) -> None:
    sandbox.run("0")
    for warm in psutil.Process().children():
        warm.kill()
    died = sandbox.run("1 + 1")
    assert (died.ok, died.reason) == (False, "process")
    assert sandbox.run("1 + 1").output == "2\n"


def test_warm_processes_end_with_the_sandbox_and_leave_no_folder() -> None:
    def folders() -> set[str]:
        return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("trace-sandbox-")}

    folders_before, children_before = folders(), {c.pid for c in psutil.Process().children()}
    with Sandbox(LIMITS) as sandbox:
        sandbox.run("open('x', 'w').write('y')")
        (warm,) = [c for c in psutil.Process().children() if c.pid not in children_before]
        assert len(folders() - folders_before) == 1
    assert not warm.is_running()
    assert folders() <= folders_before
