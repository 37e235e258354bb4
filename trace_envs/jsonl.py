"""Files of one JSON object a line.

Invariant: damage costs at most the last line, which is what a killed process leaves behind; anywhere else it is an error that
names the line.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


class DamagedLogError(ValueError):
    """A line other than the last is not a JSON object, or one is no record of a run."""


def iter_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSON-lines file one by one.

    Args:
        path: The file.

    Yields:
        One dictionary for each line; blank lines are passed over. A last line that is cut short is dropped with a
        warning, because that is what a killed process leaves behind.

    Raises:
        DamagedLogError: A line before the last is not a JSON object; the message names the file and the line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = parse_line(line)
            if record is None:
                if any(rest.strip() for rest in file):
                    raise DamagedLogError(
                        f"{path}, line {number}: not a JSON object ({excerpt(line)}). Delete or mend that line."
                    )
                warnings.warn(
                    f"{path}, line {number}: the last line is cut short and was dropped ({excerpt(line)}).",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            yield record


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a JSON-lines file whole; see :func:`iter_jsonl` for how it treats damage.

    Args:
        path: The file.

    Returns:
        The records in the order of the file.
    """
    return list(iter_jsonl(path))


def drop_torn_line(path: Path) -> None:
    """Leaves `path` ending in a whole line, without reading more of it than the last one.

    What is removed is named in a warning. A file that is not there stays away.
    """
    if not path.exists():
        return
    with open(path, "r+b") as file:
        start, line = _last_line(file)
        if not line.strip():
            return
        if parse_line(line) is None:
            message = f"{path}: removed a last line that was cut short ({excerpt(line)})."
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            file.truncate(start)
        elif not line.endswith(b"\n"):  # all of the record arrived, only its newline did not
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _last_line(file: BinaryIO, block: int = 1 << 16) -> tuple[int, bytes]:
    """Returns the offset and the bytes of the last line that is not blank."""
    end = file.seek(0, os.SEEK_END)
    tail = b""
    while end > 0:
        begin = max(0, end - block)
        file.seek(begin)
        tail = file.read(end - begin) + tail
        end = begin
        newline = tail.rstrip().rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1, tail[newline + 1 :]
    return 0, tail


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Returns the JSON object of a line, or `None` if it holds anything else."""
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:  # UnicodeDecodeError and JSONDecodeError alike
        return None
    return record if isinstance(record, dict) else None


def excerpt(line: bytes) -> str:
    """Returns the beginning of a line, printable and quoted, for a message."""
    text = line.decode("utf-8", "replace").strip()
    return ascii(text if len(text) <= 60 else text[:57] + "...")
