"""Benchmarks: one script for each question."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any


def config_of(args: Any) -> dict[str, Any]:
    """Returns the settings of a benchmark (a dataclass) as plain data, to stand beside its results."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
