"""What README and docs tell a reader to do works.

Python examples and the cheap commands are run as they stand; of commands that train or need files of the reader's own, the
names and options are checked; of make targets, that they exist.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agents.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for number, code in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        ):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


def commands() -> list[str]:
    lines = []
    for param in blocks("bash"):
        for line in param.values[0].splitlines():
            words = line.split("#")[0].strip()
            if words:
                lines.append(words)
    return sorted(set(lines))


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("trace-envs ")])
def test_documented_commands_are_understood(command, capsys):
    """Every option is one that the help of the named command lists; values are not looked at."""
    name, *arguments = shlex.split(command)[1:]
    assert name in COMMANDS
    known = _options(name, capsys)
    for word in arguments:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{command}: {word} is no option of {name}"


@pytest.mark.parametrize(
    "command", [c for c in commands() if re.match(r"trace-envs (evaluate --agent oracle|train --dry-run)$", c)]
)
def test_cheap_commands_run(command, tmp_path, monkeypatch, capsys):
    """The oracle answers five questions instead of all; a dry run is short by itself."""
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command, comments=True)[1:]
    assert main([*arguments, "--limit", "5"] if arguments[0] == "evaluate" else arguments) == 0
    assert not list(tmp_path.rglob("metrics.jsonl")), "a dry run wrote a run"
    assert ("100" if arguments[0] == "evaluate" else "TraceMultiHopQA-v0") in capsys.readouterr().out


def test_the_cheap_commands_are_documented():
    assert {"trace-envs evaluate --agent oracle", "trace-envs train --dry-run"} <= set(commands())


def _options(name: str, capsys) -> set[str]:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    return set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_documented_make_targets_exist(command):
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m ")])
def test_documented_modules_exist(command):
    """The module starts and prints its help."""
    module = shlex.split(command)[2]
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
