"""Passages in the records of question-answering data sets.

Invariant: as for `trace_envs.records`, whatever is wrong ends in one `DataFormatError` that says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_envs.multihop_qa.data import Passage
from trace_envs.records import DataFormatError, Record, read_records, read_text, whole_object


def contexts(record: Record, joiner: str) -> list[Passage]:
    """Returns the passages of `context`, given as pairs [title, [sentences]] or as columns."""
    context = record.fields.get("context")
    expected = "a list of [title, [sentences]] pairs or columns {'title': [...], 'sentences': [[...]]}"
    pairs: Any = context
    if isinstance(context, Mapping):
        titles, sentences = context.get("title"), context.get("sentences", context.get("content"))
        if not isinstance(titles, list) or not isinstance(sentences, list) or len(titles) != len(sentences):
            raise record.error("context", f"{expected}, of equal lengths", context)
        pairs = list(zip(titles, sentences, strict=True))
    if not isinstance(pairs, list):
        raise record.error("context", expected, context)
    return [_passage(record, f"context[{i}]", pair, joiner) for i, pair in enumerate(pairs)]


def _passage(record: Record, field: str, pair: Any, joiner: str) -> Passage:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise record.error(field, "a [title, [sentences]] pair", pair)
    title, sentences = pair
    if not isinstance(sentences, list) or any(not isinstance(sentence, str) for sentence in sentences):
        raise record.error(f"{field}[1]", "a list of sentences", sentences)
    return Passage(title, joiner.join(sentences).strip())


def supporting_titles(record: Record) -> tuple[str, ...]:
    """Returns the titles in `supporting_facts`, in order and once each; sentence numbers are not looked at."""
    facts = record.fields.get("supporting_facts")
    if facts is None:
        return ()
    titles = facts.get("title") if isinstance(facts, Mapping) else facts
    if not isinstance(titles, list):
        raise record.error("supporting_facts", "a list of [title, sentence number] pairs", facts)
    if not isinstance(facts, Mapping):
        titles = [fact[0] if isinstance(fact, list | tuple) and fact else fact for fact in titles]
        bad = next((i for i, fact in enumerate(facts) if not isinstance(fact, list | tuple) or not fact), None)
        if bad is not None:
            raise record.error(f"supporting_facts[{bad}]", "a [title, sentence number] pair", facts[bad])
    for i, title in enumerate(titles):
        if not isinstance(title, str):
            raise record.error(f"supporting_facts[{i}]", "a title (string)", title)
    return tuple(dict.fromkeys(titles))


def paragraphs(record: Record) -> list[tuple[int, Passage, bool]]:
    """Returns MuSiQue's `paragraphs` as (number, passage, is supporting)."""
    value = record.fields.get("paragraphs")
    if not isinstance(value, list):
        raise record.error("paragraphs", "a list of paragraphs", value)
    found = []
    for i, paragraph in enumerate(value):
        field = f"paragraphs[{i}]"
        if not isinstance(paragraph, Mapping):
            raise record.error(field, "an object with title and paragraph_text", paragraph)
        for key in ("title", "paragraph_text"):
            if not isinstance(paragraph.get(key), str):
                raise record.error(f"{field}.{key}", "a string", paragraph.get(key))
        number = paragraph.get("idx", i)
        passage = Passage(paragraph["title"], paragraph["paragraph_text"])
        found.append((number, passage, paragraph.get("is_supporting") is True))
    return found


def read_passages(path: str | Path, argument: str, joiner: str) -> list[Passage]:
    """Returns the passages of a corpus file.

    Args:
        path: JSON list or lines of `{"title", "text"}` (for text also `paragraph_text`, `sentences` or Search-R1's
            `contents`), or an object of title -> sentences.
        argument: Name of the argument that gave the path.
        joiner: What stands between sentences that are listed singly.
    """
    text = read_text(path, argument)
    whole = whole_object(text)
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
