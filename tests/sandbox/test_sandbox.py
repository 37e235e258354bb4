"""What a cell prints, what it can rely on, and how sandboxes live beside threads and forks."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trace_envs.sandbox import Limits, Result, Sandbox, SandboxError, shared

LIMITS = Limits(cpu_seconds=2, wall_seconds=4, output_chars=200)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as made:
        yield made


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("", ""),
        ("x = 3", ""),
        ("3 + 4", "7\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("None", ""),
        ("import sys\nprint('e', file=sys.stderr)", "e\n"),
        ("from fractions import Fraction\nFraction(1, 3) + 1", "Fraction(4, 3)\n"),
        ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nf(20)", "2432902008176640000\n"),
        ("class A:\n    x = 1\nA().x", "1\n"),
        ("[i for i in range(3)]", "[0, 1, 2]\n"),
        ("__name__", "'__main__'\n"),
        ("import math, statistics, itertools, decimal, cmath, re, datetime, collections, functools\n1", "1\n"),
        ("open('a', 'w').write('bc')\nopen('a').read()", "'bc'\n"),
        ("if True:\n    print('é')", "é\n"),
    ],
)
def test_cell_prints_as_an_interpreter_does(code: str, output: str, sandbox: Sandbox) -> None:
    assert sandbox.run(code) == Result(output, True)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 / 0", "line 1: ZeroDivisionError: division by zero"),
        ("print('first')\n\nunknown", "first\nline 3: NameError: name 'unknown' is not defined"),
        ("def f():\n    raise KeyError('k')\nf()", "line 2: KeyError: 'k'"),
        ("x = (", "line 1: SyntaxError: '(' was never closed (<cell>, line 1)"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
        ("import nothing", "line 1: ModuleNotFoundError: No module named 'nothing'"),
        ("assert 1 == 2", "line 1: AssertionError"),
    ],
)
def test_failure_is_one_line(code: str, output: str, sandbox: Sandbox) -> None:
    assert sandbox.run(code) == Result(output, False, "exception")


def test_earlier_cells_are_there_and_silent(sandbox: Sandbox) -> None:
    before = ["print('noise')\nimport math\nx = 2", "def f(y):\n    return x + y", "1 / 0", "x = 40"]
    assert sandbox.run("f(math.floor(2.5))", before) == Result("42\n", True)
    assert not sandbox.run("x").ok, "nothing is left of it in the next call"


def test_branches_do_not_share(sandbox: Sandbox) -> None:
    trunk = ["x = []\nopen('log', 'w').close()"]
    left, right = [*trunk, "x.append('left')"], [*trunk, "x.append('right')"]
    assert sandbox.run("x", left).output == "['left']\n"
    assert sandbox.run("x", right).output == "['right']\n"
    assert sandbox.run("x", trunk).output == "[]\n"


def test_replay_is_deterministic_across_warm_processes() -> None:
    code = "import random\nprint(random.random(), hash('text'), {str(i) for i in range(9)})"
    outputs = set()
    for _ in range(3):
        with Sandbox(LIMITS) as made:
            outputs |= {made.run(code).output, made.run(code).output}
    assert len(outputs) == 1
    with Sandbox(LIMITS) as made:
        first = made.run("import random\na = random.random()\nb = random.random()\na, b").output
        again = made.run("(a, random.random())", ["import random\na = random.random()"]).output
    assert first == again


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["x += 1", "x *= 2", "y = x", "x = y - 1", "x += y", "y = [x]"]), max_size=6))
def test_replayed_cells_make_what_one_long_cell_makes(sandbox: Sandbox, cells: list[str]) -> None:
    begin, end = "x = 1\ny = 5", "(x, y)"
    assert all(isinstance(c, str) for c in cells)
    stepwise = sandbox.run(end, [begin, *(f"try:\n    {c}\nexcept TypeError:\n    pass" for c in cells)])
    body = [f"try:\n    {c}\nexcept TypeError:\n    pass" for c in cells]
    assert stepwise == sandbox.run("\n".join([begin, *body, end]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("utf-8", "surrogateescape")))
def test_any_text_is_a_cell(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(code)
    assert isinstance(result.output, str) and len(result.output) <= 2 * LIMITS.output_chars + 300
    json.dumps(result.output)


def test_output_is_cut_with_a_note(sandbox: Sandbox) -> None:
    result = sandbox.run("print('x' * 300)")
    assert result == Result("x" * 200 + "\n[101 more characters were cut]", True)
    flood = sandbox.run("while True: print('x' * 300)")
    assert flood.reason == "output"
    assert flood.output.startswith("x" * 200) and flood.output.endswith("(at most 200 characters).")


def test_time_grows_with_the_cells_that_are_replayed() -> None:
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=1)) as made:
        slow = "import time\ntime.sleep(0.7)"
        assert made.run("1", [slow, slow]).output == "1\n"
        assert made.run("time.sleep(9)", [slow]).reason == "time"


def test_threads_share_a_sandbox(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: sandbox.run(f"{i} * 2").output, range(64)))
    assert results == [f"{2 * i}\n" for i in range(64)]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_fork_has_warm_processes_of_its_own(sandbox: Sandbox) -> None:
    sandbox.run("0")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            outputs = [sandbox.run(f"{i} + 100").output for i in range(5)]
            os.write(writing, json.dumps(outputs).encode())
        finally:
            os._exit(0)
    os.close(writing)
    mine = [sandbox.run(f"{i} + 200").output for i in range(5)]
    with os.fdopen(reading) as pipe:
        theirs = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert theirs == [f"{100 + i}\n" for i in range(5)]
    assert mine == [f"{200 + i}\n" for i in range(5)]


def test_an_interrupted_call_leaves_no_answer_behind(sandbox: Sandbox) -> None:
    class Stop(Exception):
        pass

    import signal

    def stop(*_: object) -> None:
        raise Stop

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Stop):
            sandbox.run("import time\ntime.sleep(1)\n'late'")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [sandbox.run(str(i)).output for i in range(4)] == [f"{i}\n" for i in range(4)]


def test_it_works_beside_a_thousand_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("the machine allows fewer open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1200)]
    try:
        with Sandbox(LIMITS) as made:
            assert made.run("6 * 7").output == "42\n"
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_long_cell_arrives_whole(sandbox: Sandbox) -> None:
    assert sandbox.run(f"x = '{'é' * 300_000}'\nlen(x)").output == "300000\n"


def test_a_stopped_warm_process_is_given_up() -> None:
    with Sandbox(Limits(cpu_seconds=0.2, wall_seconds=0.2)) as made:
        before = {child.pid for child in psutil.Process().children()}
        made.run("1")
        (warm,) = [child for child in psutil.Process().children() if child.pid not in before]
        warm.suspend()
        result = made.run("1" + " " * 300_000)
        assert (result.ok, result.reason) == (False, "process")
        assert made.run("1").output == "1\n"


def test_trusted_functions_of_preloaded_modules() -> None:
    with Sandbox(LIMITS, preload=("textwrap", "fractions")) as made:
        assert made.call("textwrap:shorten", "one two three", 9) == "one [...]"
        with pytest.raises(SandboxError, match=r"textwrap:shorten: AttributeError") as caught:
            made.call("textwrap:shorten", 3, None)
        assert caught.value.reason == "exception"
        assert made.run("import textwrap\ntextwrap.dedent('  a')").output == "'a'\n"


def test_a_module_that_is_not_there_is_named() -> None:
    with Sandbox(LIMITS, preload=("no_such_module",)) as made, pytest.raises(SandboxError, match="no_such_module"):
        made.call("no_such_module:f")


def test_shared_is_one_for_each_setting() -> None:
    assert shared(Limits()) is shared(Limits())
    assert shared(Limits()) is not shared(Limits(cpu_seconds=1))
    assert shared(Limits()).run("6 * 7").output == "42\n"


def test_closed_sandbox_starts_again(sandbox: Sandbox) -> None:
    sandbox.close()
    assert sandbox.run("1").output == "1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cpu_seconds": 0}, "cpu_seconds must be positive"),
        ({"wall_seconds": float("nan")}, "wall_seconds"),
        ({"wall_seconds": "1"}, "wall_seconds"),
        ({"memory_mib": 0}, "memory_mib"),
        ({"output_chars": 1.5}, "output_chars"),
    ],
)
def test_impossible_limits_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Limits(**arguments)  # type: ignore[arg-type]


def test_unknown_layers_and_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown layer 'walls'; known: namespaces"):
        Sandbox(layers=("walls",))
    with pytest.raises(ValueError, match="workers must be at least 1"):
        Sandbox(workers=0)
