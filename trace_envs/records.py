"""Raw records of data files, and what is asked of their fields.

Invariant: whatever is wrong with a file ends in one `DataFormatError` that names the file, the record (counted from 1),
the field, and what was expected.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHOWN = 60


class DataFormatError(ValueError):
    """A data file does not have the format that its data set is published in."""


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


@dataclass(frozen=True)
class Record:
    """One record, with where it stands.

    Attributes:
        fields: The record as it was parsed.
        file: File or repository that it comes from.
        number: Its place there, from 1.
    """

    fields: Mapping[str, Any]
    file: str
    number: int

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def error(self, field: str, expected: str, got: Any = None) -> DataFormatError:
        """Returns the error that says what is wrong with a field."""
        found = f"got {_show(got)}" if field.split("[")[0] in self.fields else "the field is missing"
        return DataFormatError(f"{self.file}, record {self.number}, field {field!r}: expected {expected}, {found}")

    def text(self, *names: str) -> str:
        """Returns the first of the fields that is present, a string that is not blank."""
        name = next((name for name in names if name in self.fields), names[0])
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(name, "a non-empty string", value)
        return value

    def text_or_list(self, *names: str) -> list[str]:
        """Returns the first of the fields that is present: a string or a list of strings, as a list."""
        name = next((name for name in names if name in self.fields), names[0])
        value = self.fields.get(name)
        values: list[Any] = value if isinstance(value, list) else [value]
        if not values or any(not isinstance(v, str) or not v.strip() for v in values):
            raise self.error(name, "a non-empty string or list of strings", value)
        return values

    def identifier(self, *names: str, default: str | None = None) -> str:
        """Returns the first of the fields that is present: a string or an integer, as a string."""
        name = next((name for name in names if name in self), None)
        if name is None and default is not None:
            return default
        value = self.fields.get(name or names[0])
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise self.error(name or names[0], "an id (string or integer)", value)
        return str(value)

    def optional_list(self, name: str) -> list[Any]:
        """Returns a list, empty where the field is missing or null."""
        value = self.fields.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(name, "a list", value)
        return value


def read_records(path: str | Path, argument: str) -> Iterator[Record]:
    """Yields the records of a JSON list, JSON lines or CSV file.

    Args:
        path: The file.
        argument: Name of the argument that gave the path, for the error message.

    Raises:
        FileNotFoundError: There is no such file.
        DataFormatError: The file is empty, is not UTF-8, or is none of the formats.
    """
    text = read_text(path, argument)
    if str(path).lower().endswith((".csv", ".tsv")):
        yield from _csv_records(text, str(path))
        return
    for number, value in enumerate(_json_values(text, str(path)), 1):
        if not isinstance(value, dict):
            raise DataFormatError(f"{path}, record {number}: expected a JSON object, got {_show(value)}")
        yield Record(value, str(path), number)


def fetch_records(repository: str, configuration: str | None, split: str, name: str) -> Iterator[Record]:
    """Yields the records of a data set on the Hugging Face hub.

    Args:
        repository: Where it is.
        configuration: Which of its configurations; `None` for its only one.
        split: Split, as it is called there.
        name: What an error calls the data set.

    Raises:
        ImportError: `datasets` is not installed.
        ConnectionError: The data set cannot be fetched.
    """
    try:
        import datasets  # here because it is optional, and slow to import
    except ImportError as error:
        raise ImportError(
            f'loading {name} without data_path needs `datasets`: pip install "trace-envs[datasets]"'
        ) from error
    try:
        rows = datasets.load_dataset(repository, configuration, split=split)
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors, by version
        raise ConnectionError(
            f"cannot load split {split!r} of {repository!r} from the Hugging Face hub "
            f"({type(error).__name__}: {error}); pass data_path, a local file with the questions"
        ) from error
    return (Record(row, repository, number) for number, row in enumerate(rows, 1))


def read_text(path: str | Path, argument: str) -> str:
    """Returns the text of a data file; raises as `read_records` does."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}: there is no file {str(path)!r}") from None
    except IsADirectoryError:
        raise FileNotFoundError(f"{argument}: {str(path)!r} is a directory; name a file in it") from None
    except UnicodeDecodeError as error:
        raise DataFormatError(
            f"{path} is not UTF-8 text (byte {error.start}); expected JSON, JSON lines or CSV"
        ) from None
    if not text.strip():
        raise DataFormatError(f"{path} is empty; expected JSON, JSON lines or CSV")
    return text


def whole_object(text: str) -> dict[str, Any] | None:
    """Returns the object that a file consists of; `None` for a list, for lines, and for what does not parse."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value


def _json_values(text: str, file: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataFormatError(f"{file} is not valid JSON ({error}); is the file cut short?") from None
        yield from values
        return
    if (whole := whole_object(text)) is not None:
        # One object: a single line, or a wrapper such as {"data": [...]}.
        lists = [value for value in whole.values() if isinstance(value, list)]
        yield from lists[0] if len(whole) == 1 and lists else [whole]
        return
    number = 0
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        number += 1
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataFormatError(
                f"{file}, record {number} (line {line_number}): expected a JSON object, got {_show(line)} ({error}); "
                "is the file cut short?"
            ) from None


def _csv_records(text: str, file: str) -> Iterator[Record]:
    delimiter = "\t" if file.lower().endswith(".tsv") else ","
    for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter), 1):
        if None in row or None in row.values():
            raise DataFormatError(
                f"{file}, record {number}: expected as many columns as the header has, got {_show(row)}"
            )
        yield Record(row, file, number)
