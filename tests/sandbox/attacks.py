"""Code that means harm, by name, with how its call must end.

Invariant: every attack is one that works on a bare interpreter, or did on somebody's sandbox.
"""

from __future__ import annotations

# How a call may end: "refused" (an exception in the cell), "time", "memory", "output", "process" (the interpreter died), or
# "harmless" (the cell ran to its end and learned nothing; the test looks for secrets in what it printed).
ATTACKS: dict[str, tuple[str, str]] = {
    # Processes.
    "fork": ("import os\nos.fork()", "refused"),
    "fork_bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "time",
    ),
    "vfork_by_subprocess": ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'])", "refused"),
    "shell": ("import os\nraise SystemExit('refused' if os.system('id') != 0 else 'shell')", "refused"),
    "popen": ("import os\nos.popen('id').read()", "refused"),
    "exec": ("import os\nos.execv('/bin/sh', ['sh'])", "refused"),
    "spawn": ("import os\nos.posix_spawn('/bin/sh', ['sh'], {})", "refused"),
    "multiprocessing": (
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "refused",
    ),
    "pty": ("import pty\npty.spawn('/bin/sh')", "refused"),
    "thread_bomb": (
        "import threading, time\nfor _ in range(10**6):\n    threading.Thread(target=time.sleep, args=(99,)).start()",
        "refused memory time",
    ),
    "daemon_thread_outlives": (
        "import threading, time\nt = threading.Thread(target=time.sleep, args=(99,))\nt.start()",
        "harmless",
    ),
    "new_session": ("import os\nos.setsid()", "refused"),
    "ptrace_by_ctypes": (
        "import ctypes, os\nr = ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)\nassert r == 0",
        "refused",
    ),
    # Signals.
    "kill_parent": ("import os\nos.kill(os.getppid(), 9)", "refused"),
    "kill_everybody": ("import os\nos.kill(-1, 9)", "refused"),
    "kill_group": ("import os\nos.killpg(0, 9)", "refused"),
    "stop_self": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "refused"),
    "ignore_signals": (
        "import signal\nfor s in range(1, 65):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
        "time",
    ),
    "signal_queue": ("import signal, os\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)", "refused"),
    "parent_death_by_ctypes": ("import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0", "refused"),
    # Time.
    "endless_loop": ("while True:\n    pass", "time"),
    "sleep": ("import time\ntime.sleep(1000)", "time"),
    "wait_for_lock": ("import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()", "time"),
    "catch_all_loop": (
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "time",
    ),
    "big_power": ("9 ** 9 ** 9", "time memory"),
    "regex_backtracking": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", "time"),
    "big_factorial": ("import math\nmath.factorial(10 ** 8)", "time memory"),
    "parse_deep": ("(" * 10**6, "refused memory"),
    "decimal_precision": (
        "from decimal import *\nsetcontext(Context(prec=MAX_PREC, Emax=MAX_EMAX))\nDecimal(0) ** Decimal('.1')\n"
        "Decimal(2).sqrt()",
        "memory refused time process",
    ),
    "block_in_read": ("import os\nr, w = os.pipe()\nos.read(r, 1)", "refused time"),
    "endless_destructor": (
        "class A:\n    def __del__(self):\n        while True:\n            pass\na = A()\ndel a",
        "time",
    ),
    "at_exit_loop": ("import atexit\natexit.register(lambda: exec('while True: pass'))", "harmless"),
    # Memory.
    "memory_list": ("x = [0] * 10 ** 10", "memory"),
    "memory_doubling": ("x = 'x'\nwhile True:\n    x += x", "memory"),
    "memory_in_parts": ("x = []\nwhile True:\n    x.append(bytearray(2 ** 20))", "memory"),
    "memory_mmap": ("import mmap\nm = mmap.mmap(-1, 2 ** 40)", "refused memory"),
    "memory_raise_limit": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2 ** 40, 2 ** 40))\nbytearray(2 ** 32)",
        "refused",
    ),
    "nested_lists": ("x = []\nfor _ in range(10 ** 8):\n    x = [x]", "memory time process"),
    "zip_bomb": (
        "import zlib\nd = zlib.compress(bytes(2 ** 26))\nz = [zlib.decompress(d) for _ in range(1000)]",
        "memory",
    ),
    "zip_bomb_layers": (
        "import gzip\nd = gzip.compress(bytes(2 ** 27))\nd = gzip.compress(d)\n"
        "x = gzip.decompress(gzip.decompress(d)) * 99",
        "memory",
    ),
    "xml_entities": (
        "from xml.etree import ElementTree\n"
        "e = ''.join(f'<!ENTITY l{i} \"{(f\"&l{i - 1};\" * 10) if i else \"lol\"}\">' for i in range(12))\n"
        "ElementTree.fromstring(f'<!DOCTYPE l [{e}]><l>&l11;</l>')",
        "refused memory time",
    ),
    # Recursion and crashes.
    "deep_recursion": ("def f():\n    f()\nf()", "refused"),
    "deep_recursion_no_limit": (
        "import sys\nsys.setrecursionlimit(2 ** 31 - 1)\ndef f(x):\n    return [f(x)]\nf(1)",
        "process memory refused time",
    ),
    "deep_repr": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6):\n    x = [x]\nrepr(x)",
        "process memory refused time",
    ),
    "null_pointer": ("import ctypes\nctypes.string_at(0)", "process refused"),
    "broken_bytecode": (
        "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=bytes([151, 0, 100, 255, 83, 0]), co_consts=())\nf()",
        "process refused harmless",
    ),
    "abort": ("import os\nos.abort()", "process refused"),
    "exit_now": ("import os\nos._exit(0)", "process"),
    "exit_lying": ("import sys\nsys.exit(0)", "refused"),
    # Output.
    "huge_line": ("print('x' * 10 ** 8)", "output harmless"),
    "endless_output": ("while True:\n    print('x' * 1000)", "output"),
    "endless_output_caught": (
        "while True:\n    try:\n        print('x' * 1000)\n    except BaseException:\n        pass",
        "time output",
    ),
    "huge_exception": ("raise ValueError('x' * 10 ** 7)", "refused"),
    "huge_repr": ("'x' * 10 ** 8", "output harmless memory"),
    "lying_repr": (
        "class A:\n    def __repr__(self):\n        raise SystemExit\nA()",
        "refused",
    ),
    "reply_flood": ("import os\nwhile True:\n    os.write(3, b'x' * 65536)", "time process refused"),
    "reply_forged_deep": ("import os\nos.write(3, b'[' * 100000)\nos._exit(0)", "process"),
    "reply_forged_type": ("import os\nos.write(3, b'{\"reason\": \"\", \"output\": 7}')\nos._exit(0)", "process"),
    "surrogates": ("print('\\ud800' * 5)", "harmless"),
    "control_characters": ("print(''.join(map(chr, range(32))))", "harmless"),
    # Files.
    "read_passwd": ("print(open('/etc/passwd').read())", "refused"),
    "read_shadow": ("print(open('/etc/shadow').read())", "refused"),
    "read_secret": ("print(open({secret!r}).read())", "refused"),
    "read_by_descriptor": (
        "import os\nprint(os.read(os.open({secret!r}, os.O_RDONLY), 99))",
        "refused",
    ),
    "read_by_proc": ("print(open('/proc/self/environ').read(), open('/proc/1/environ').read())", "refused"),
    "read_parent_memory": ("import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb').read(1)", "refused"),
    "read_by_linecache": (
        "import linecache\nprint(linecache.getlines({secret!r}))\nassert linecache.getlines({secret!r})",
        "refused",
    ),
    "read_by_loader": (
        "from importlib.machinery import SourceFileLoader\nprint(SourceFileLoader('x', {secret!r}).get_data({secret!r}))",
        "refused",
    ),
    "read_by_relative_path": ("print(open('../' * 20 + 'etc/passwd').read())", "refused"),
    "read_by_link": ("import os\nos.symlink({secret!r}, 'link')\nprint(open('link').read())", "refused"),
    "read_by_sqlite": (
        "import sqlite3\nd = sqlite3.connect({secret!r})\nprint(d.execute('select * from sqlite_master').fetchall())",
        "refused",
    ),
    "list_root": ("import os\nprint(os.listdir('/'), os.listdir('/home'), os.listdir('/tmp'))", "refused"),
    "write_beside_secret": ("open({secret!r} + '.new', 'w').write('x')", "refused"),
    "write_secret": ("open({secret!r}, 'a').write('x')", "refused"),
    "write_tmp": ("open('/tmp/escaped', 'w').write('x')", "refused"),
    "write_shared_memory": ("open('/dev/shm/escaped', 'w').write('x')", "refused"),
    "write_library": ("import os\nopen(os.__file__, 'a').write('x')", "refused"),
    "remove_secret": ("import os\nos.remove({secret!r})", "refused"),
    "rename_secret": ("import os\nos.rename({secret!r}, 'mine')", "refused"),
    "remove_tree": ("import shutil\nshutil.rmtree('/')", "refused"),
    "fill_disk": (
        "i = 0\nwhile True:\n    open(f'f{{i}}', 'wb').write(bytes(2 ** 20))\n    i += 1",
        "refused process",
    ),
    "many_files": ("for i in range(10 ** 6):\n    open(f'f{{i}}', 'w').close()", "refused time"),
    "many_descriptors": ("x = [open('/dev/null') for _ in range(10 ** 5)]", "refused"),
    "device": ("import os\nos.mknod('disk', 0o60600, os.makedev(8, 0))", "refused"),
    "mount": ("import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/', b'tmpfs', 0, None) == 0", "refused"),
    "chroot": ("import os\nos.chroot('.')", "refused"),
    "set_user": ("import os\nos.setuid(1)\nos.setuid(0)", "refused"),
    # Network.
    "socket_internet": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)", "refused"),
    "socket_listen": ("import socket\nsocket.create_server(('127.0.0.1', 0))", "refused"),
    "socket_unix": ("import socket\nsocket.socket(socket.AF_UNIX).connect('/run/x')", "refused"),
    "socket_pair": ("import socket\nsocket.socketpair()", "refused"),
    "socket_raw": ("import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "refused"),
    "http": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/')", "refused"),
    "asyncio_loop": ("import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', {port}))", "refused"),
    # Python's own doors.
    "environment": ("import os\nprint(dict(os.environ), os.getenv('SECRET'))", "harmless"),
    "import_project": ("import trace_envs", "refused"),
    "import_numpy": ("import numpy", "refused"),
    "import_by_path": ("import sys\nsys.path.append({folder!r})\nimport planted", "refused"),
    "import_worker": ("import sys\nprint(sys.modules['__main__'].SECRET)", "refused"),
    "patch_builtins": (
        "import builtins, json, os\nbuiltins.open = builtins.len = builtins.print = None\njson.dumps = None\n"
        "os.fork = None",
        "refused process harmless",
    ),
    "patch_reply": (
        "import sys\nsys.modules['__main__']._reply = lambda *a: None",
        "harmless process",
    ),
    "subclasses": (
        "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'] or __import__('nothing')",
        "refused",
    ),
    "frames": (
        "import sys\nf = sys._getframe()\nwhile f.f_back:\n    f = f.f_back\n"
        "w = f.f_locals.get('self') or f.f_globals.get('Worker')\nprint(getattr(w, '_requests', None))",
        "harmless refused",
    ),
    "parent_pipe": ("import os\nfor d in range(4, 64):\n    os.write(d, b'x')", "refused"),
    "pickle": (
        "import pickle, os\nclass P:\n    def __reduce__(self):\n        return os.fork, ()\n"
        "pickle.loads(pickle.dumps(P()))",
        "refused",
    ),
    "pickle_path": ("import pickle\npickle.load(open({secret!r}, 'rb'))", "refused"),
    "native_code": (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(b'\\xb8\\x39\\x00\\x00\\x00\\x0f\\x05\\xc3')  # mov eax, 57 (fork); syscall; ret\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "r = f()\nassert r >= 0, r",
        "refused process",
    ),
    "io_uring": ("import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256)) >= 0", "refused"),
    "kernel_keys": ("import ctypes\nassert ctypes.CDLL(None).syscall(250, 0, -3, 0) >= 0", "refused"),
    "bpf": ("import ctypes\nassert ctypes.CDLL(None).syscall(321, 0, None, 0) >= 0", "refused"),
    "namespace": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "refused"),
    "terminal_injection": ("import fcntl\nfcntl.ioctl(0, 0x5412, b'x')", "refused"),
    "set_clock": ("import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)", "refused"),
    "nul_bytes": ("x = 1\0", "refused"),
    "wrong_encoding": ("# -*- coding: nonsense -*-\nx = '\\udcff'", "harmless refused"),
    "name_as_code": ("__import__('os').system('touch {folder}/touched') and 1/0", "refused"),
    "trace_function": (
        "import sys\ndef t(*a):\n    return t\nsys.settrace(t)\nsys.setprofile(t)\nfor i in range(9):\n    pass",
        "harmless",
    ),
    "collector_off": ("import gc, sys\ngc.disable()\ngc.set_threshold(0)\nsys.setswitchinterval(1e-9)", "harmless"),
    "stdin": ("input()", "refused"),
}  # fmt: skip


def attack(name: str, *, secret: str, folder: str, port: int) -> tuple[str, set[str]]:
    """Returns the code of an attack and how it may end."""
    code, ends = ATTACKS[name]
    for hole, value in (
        ("secret!r", repr(secret)),
        ("folder!r", repr(folder)),
        ("folder", folder),
        ("port", str(port)),
    ):
        code = code.replace("{" + hole + "}", value)
    return code.replace("{{", "{").replace("}}", "}"), set(ends.split())
