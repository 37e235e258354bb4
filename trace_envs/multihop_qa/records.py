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

from trace_envs.multihop_qa.data import Passage

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

    def contexts(self, joiner: str) -> list[Passage]:
        """Returns the passages of `context`, given as pairs [title, [sentences]] or as columns."""
        context = self.fields.get("context")
        expected = "a list of [title, [sentences]] pairs or columns {'title': [...], 'sentences': [[...]]}"
        pairs: Any = context
        if isinstance(context, Mapping):
            titles, sentences = context.get("title"), context.get("sentences", context.get("content"))
            if not isinstance(titles, list) or not isinstance(sentences, list) or len(titles) != len(sentences):
                raise self.error("context", f"{expected}, of equal lengths", context)
            pairs = list(zip(titles, sentences, strict=True))
        if not isinstance(pairs, list):
            raise self.error("context", expected, context)
        return [self._passage(f"context[{i}]", pair, joiner) for i, pair in enumerate(pairs)]

    def _passage(self, field: str, pair: Any, joiner: str) -> Passage:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise self.error(field, "a [title, [sentences]] pair", pair)
        title, sentences = pair
        if not isinstance(sentences, list) or any(not isinstance(sentence, str) for sentence in sentences):
            raise self.error(f"{field}[1]", "a list of sentences", sentences)
        return Passage(title, joiner.join(sentences).strip())

    def supporting_titles(self) -> tuple[str, ...]:
        """Returns the titles in `supporting_facts`, in order and once each; sentence numbers are not looked at."""
        facts = self.fields.get("supporting_facts")
        if facts is None:
            return ()
        titles = facts.get("title") if isinstance(facts, Mapping) else facts
        if not isinstance(titles, list):
            raise self.error("supporting_facts", "a list of [title, sentence number] pairs", facts)
        if not isinstance(facts, Mapping):
            titles = [fact[0] if isinstance(fact, list | tuple) and fact else fact for fact in titles]
            bad = next((i for i, fact in enumerate(facts) if not isinstance(fact, list | tuple) or not fact), None)
            if bad is not None:
                raise self.error(f"supporting_facts[{bad}]", "a [title, sentence number] pair", facts[bad])
        for i, title in enumerate(titles):
            if not isinstance(title, str):
                raise self.error(f"supporting_facts[{i}]", "a title (string)", title)
        return tuple(dict.fromkeys(titles))

    def paragraphs(self) -> list[tuple[int, Passage, bool]]:
        """Returns MuSiQue's `paragraphs` as (number, passage, is supporting)."""
        value = self.fields.get("paragraphs")
        if not isinstance(value, list):
            raise self.error("paragraphs", "a list of paragraphs", value)
        found = []
        for i, paragraph in enumerate(value):
            field = f"paragraphs[{i}]"
            if not isinstance(paragraph, Mapping):
                raise self.error(field, "an object with title and paragraph_text", paragraph)
            for key in ("title", "paragraph_text"):
                if not isinstance(paragraph.get(key), str):
                    raise self.error(f"{field}.{key}", "a string", paragraph.get(key))
            number = paragraph.get("idx", i)
            passage = Passage(paragraph["title"], paragraph["paragraph_text"])
            found.append((number, passage, paragraph.get("is_supporting") is True))
        return found


def read_records(path: str | Path, argument: str) -> Iterator[Record]:
    """Yields the records of a JSON list, JSON lines or CSV file.

    Args:
        path: The file.
        argument: Name of the argument that gave the path, for the error message.

    Raises:
        FileNotFoundError: There is no such file.
        DataFormatError: The file is empty, is not UTF-8, or is none of the formats.
    """
    text = _read(path, argument)
    if str(path).lower().endswith((".csv", ".tsv")):
        yield from _csv_records(text, str(path))
        return
    for number, value in enumerate(_json_values(text, str(path)), 1):
        if not isinstance(value, dict):
            raise DataFormatError(f"{path}, record {number}: expected a JSON object, got {_show(value)}")
        yield Record(value, str(path), number)


def read_passages(path: str | Path, argument: str, joiner: str) -> list[Passage]:
    """Returns the passages of a corpus file.

    Args:
        path: JSON list or lines of `{"title", "text"}` (for text also `paragraph_text`, `sentences` or Search-R1's
            `contents`), or an object of title -> sentences.
        argument: Name of the argument that gave the path.
        joiner: What stands between sentences that are listed singly.
    """
    text = _read(path, argument)
    whole = _whole_object(text)
    if whole is not None and not isinstance(whole.get("text"), str):
        records = [
            Record({"title": title, "text": value}, str(path), i) for i, (title, value) in enumerate(whole.items(), 1)
        ]
    else:
        records = list(read_records(path, argument))
    passages = [_corpus_passage(record, joiner) for record in records]
    if not passages:
        raise DataFormatError(f"{path} holds no passage; expected at least one")
    return passages


def _corpus_passage(record: Record, joiner: str) -> Passage:
    name = next((name for name in ("text", "paragraph_text", "sentences", "contents") if name in record.fields), "text")
    title, text = record.fields.get("title"), record.fields.get(name)
    if name == "contents" and title is None and isinstance(text, str):
        # Search-R1's dump: the first line of `contents` is the quoted title.
        title, _, text = text.partition("\n")
        title = title.strip('"')
    if not isinstance(title, str):
        raise record.error("title", "a string", title)
    if isinstance(text, list) and all(isinstance(sentence, str) for sentence in text):
        text = joiner.join(text).strip()
    if not isinstance(text, str):
        raise record.error(name, "a string or a list of sentences", text)
    return Passage(title, text)


def _read(path: str | Path, argument: str) -> str:
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


def _whole_object(text: str) -> dict[str, Any] | None:
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
    if (whole := _whole_object(text)) is not None:
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
