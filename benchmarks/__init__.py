"""Benchmarks: one script for each question."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any


def config_of(args: Any) -> dict[str, Any]:
    """Returns the settings of a benchmark (a dataclass) as plain data, to stand beside its results."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}


RESULTS = Path("results")
_SMALL: list[tempfile.TemporaryDirectory[str]] = []


def results_folder(output: Path, quick: bool) -> Path:
    """Returns where results go: those of a small run, unless it names another folder, not in the place of the real ones."""
    if not quick or output != RESULTS:
        output.mkdir(parents=True, exist_ok=True)
        return output
    _SMALL.append(tempfile.TemporaryDirectory(prefix="trace-envs-small-"))  # goes when the process ends
    return Path(_SMALL[-1].name)


def data_folder() -> Path:
    """Returns where the real data sets are, in TRACE_DATA_DIR or beside the repository, whether they are there or not."""
    return Path(os.environ.get("TRACE_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions that figures depend on: of packages, of Python, and the kind of machine."""
    machine = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    return {name: metadata.version(name) for name in packages} | machine


def commit() -> str:
    """Returns the commit that is checked out, with a `+` if files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()
