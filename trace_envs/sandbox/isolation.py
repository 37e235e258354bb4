"""Layers between a process and the machine, by system calls alone.

Invariant: standard library only, and no layer that fails leaves anything half done: it says so and the others stand. This
module is run by a bare interpreter, which does not know the package.

Sources: landlock(7), seccomp(2), user_namespaces(7) of the Linux manual pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 16384, 1 << 18

# What a Python interpreter computes with, by name: the numbers on x86_64 and on aarch64 (None: not there).
_SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "msync": (26, 227),
    "mincore": (27, 232),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "uname": (63, 160),
    "fcntl": (72, 25),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "getdents": (78, None),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "unlink": (87, None),
    "readlink": (89, None),
    "umask": (95, 166),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "fadvise64": (221, 223),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "utimensat": (280, 88),
    "dup3": (292, 24),
    "getrandom": (318, 278),
    "renameat2": (316, 276),
    "membarrier": (324, 283),
    "statx": (332, 291),
    "rseq": (334, 293),
    "close_range": (436, 436),
    "faccessat2": (439, 439),
}
_CLONE, _IOCTL, _CLONE3 = (56, 220), (16, 29), 435
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
_TCGETS, _FIOCLEX = 0x5401, 0x5451
_CLONE_THREAD = 0x10000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def set_up() -> None:
    """Makes the process end with its parent and unreadable for others, where there is such a thing."""
    if sys.platform == "linux":
        libc = _libc()
        libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def enter_namespaces(folder: str, folder_mib: int) -> bool:
    """Enters namespaces of its own and mounts a folder of limited size; returns whether both was possible."""
    if sys.platform != "linux":
        return False
    libc = _libc()
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    if libc.unshare(flags) != 0:
        return False
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    if libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) != 0:
        return False
    options = f"size={folder_mib}m,nr_inodes=4096,mode=700".encode()
    mounted = libc.mount(
        b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC), options
    )
    return mounted == 0


def restrict_files(readable: list[str], writable: list[str]) -> int:
    """Lets this process and its children open nothing but what lies beneath some paths.

    Args:
        readable: Files and folders that may be read.
        writable: Files and folders in which anything but devices may be made, changed and removed.

    Returns:
        The version of Landlock's interface; 0 if the kernel has none and nothing was restricted.
    """
    if sys.platform != "linux":
        return 0
    libc = _libc()
    libc.syscall.restype = ctypes.c_long
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return 0
    bits = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    everything = (1 << bits) - 1
    # Files, then TCP, then signals and abstract sockets.
    attributes = struct.pack("QQQ", everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return 0
    read, devices = 0b1100, 0b111001000000
    for paths, allowed in ((readable, read), (writable, everything & ~devices & ~1)):
        for path in paths:
            with contextlib.suppress(OSError):
                opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
                mask = allowed if os.path.isdir(path) else allowed & (0b110 | (everything & 0b100000000000000))
                libc.syscall(445, rules, 1, struct.pack("=Qi", mask, opened), 0)
                os.close(opened)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    done = libc.syscall(446, rules, 0)
    os.close(rules)
    return version if done == 0 else 0


def filter_program() -> bytes | None:
    """Returns the filter of system calls for this machine; `None` for a machine that it does not know."""
    known = _ARCHITECTURES.get(platform.machine())
    if sys.platform != "linux" or known is None:
        return None
    column, architecture = known

    def op(code: int, yes: int, no: int, k: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    program = [
        op(load, 0, 0, 4),
        op(equal, 1, 0, architecture),
        op(end, 0, 0, _EPERM),
        op(load, 0, 0, 0),
        # A thread may be made, a process not.
        op(equal, 0, 4, _CLONE[column]),
        op(load, 0, 0, 16),
        op(any_bit, 0, 1, _CLONE_THREAD),
        op(end, 0, 0, _ALLOW),
        op(end, 0, 0, _EPERM),
        # What it asks for is in memory, which a filter cannot read; libraries then use clone.
        op(equal, 0, 1, _CLONE3),
        op(end, 0, 0, _ENOSYS),
        op(equal, 0, 5, _IOCTL[column]),
        op(load, 0, 0, 24),
        op(equal, 1, 0, _TCGETS),
        op(equal, 0, 1, _FIOCLEX),
        op(end, 0, 0, _ALLOW),
        op(end, 0, 0, _EPERM),
    ]
    for numbers in _SYSCALLS.values():
        if numbers[column] is not None:
            program += [op(equal, 0, 1, numbers[column] or 0), op(end, 0, 0, _ALLOW)]
    return b"".join([*program, op(end, 0, 0, _EPERM)])


def restrict_calls(program: bytes | None) -> bool:
    """Refuses all system calls but those of a filter, for good; returns whether that was possible."""
    if program is None:
        return False
    libc = _libc()
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held = ctypes.create_string_buffer(program, len(program))
    given = _Program(len(program) // 8, ctypes.cast(held, ctypes.c_void_p))
    return libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(given), 0, 0) == 0


_REFUSED = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "os.killpg",
    "os.startfile",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.chown",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.listdir",
    "os.scandir",
    "os.truncate",
    "shutil.",
    "ctypes.",
    "signal.pthread_kill",
    "resource.",
    "mmap.",
    "pty.",
    "ftplib.",
    "http.",
    "urllib.",
    "winreg.",
)


_UNHEARD = {"os": ("pidfd_open",), "signal": ("pidfd_send_signal",)}


def hook_audit(readable: list[str]) -> None:
    """Refuses the same by Python's own means; code in C can get round it."""
    for public, names in _UNHEARD.items():  # these raise no audit event
        for module in (public, "_signal", "posix"):
            for name in names:
                sys.modules.get(module, sys).__dict__.pop(name, None)
    roots = tuple(os.path.realpath(path) for path in readable)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, _, flags = arguments[0], arguments[1], arguments[2]
            writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            inside = isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(roots)  # type: ignore[arg-type]
            if writes or not inside:
                raise PermissionError(f"opening {path!r} is not allowed here")

    sys.addaudithook(hook)
