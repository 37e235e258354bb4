"""Reads HotpotQA, 2WikiMultiHopQA, MuSiQue and Bamboogle, from files in their public formats or through `datasets`.

Invariant: a data set keeps its source's order, ids and wording; passages come in order of first appearance and are
merged only if both title and text agree. What cannot be read is refused in a sentence that names file, record, field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from trace_envs.multihop_qa.data import Passage, QADataset, QATask
from trace_envs.multihop_qa.passages import contexts, paragraphs, read_passages, supporting_titles
from trace_envs.records import DataFormatError, Record, fetch_records, read_records

__all__ = ["READERS", "DataFormatError", "Source", "load_dataset"]

Parsed = tuple[QATask, list[Passage]]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and how one record of it is read.

    Attributes:
        name: The data set's full name.
        parse: Turns a record into a task and the passages that came with it.
        hub: Repository and configuration of a copy that `datasets.load_dataset` reads.
        splits: The split meant where the copy has no `train` or names its splits differently.
        joiner: What stands between the sentences of a passage.
    """

    name: str
    parse: Callable[[Record, str], Parsed]
    hub: tuple[str, str | None]
    splits: dict[str, str]
    joiner: str = ""


def load_dataset(
    name: str,
    *,
    data_path: str | Path | None = None,
    corpus_path: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
) -> QADataset:
    """Loads a multi-hop data set.

    Args:
        name: `hotpotqa`, `2wikimultihopqa` (or `2wiki`), `musique` or `bamboogle`.
        data_path: The questions: a JSON list, JSON lines or CSV file. Without it `datasets.load_dataset` fetches them.
        corpus_path: The passages to search: JSON list or lines of `{"title", "text"}`, or an object of
            title -> sentences. Without it the contexts of the questions read are pooled.
        split: Split to fetch; a local file is one split already.
        limit: Read at most that many questions.

    Returns:
        The questions and passages. A task id that occurs again gets the suffix `#2`, `#3`, ... MuSiQue's
        unanswerable questions are left out: no answer would be right.

    Raises:
        ValueError: The name is unknown, or there is no corpus.
        FileNotFoundError: A path does not exist.
        DataFormatError: A record is malformed.
        ImportError: `datasets` is needed and not installed.
        ConnectionError: The data set cannot be fetched.
    """
    if name not in READERS:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(READERS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    source = READERS[name]
    if source.parse is _bamboogle and corpus_path is None:
        raise ValueError("bamboogle has questions only; pass corpus_path, a file with the passages to search")
    records = _fetch(source, split) if data_path is None else read_records(data_path, "data_path")
    tasks, pooled = list[QATask](), dict[Passage, None]()
    answerable = (record for record in records if record.fields.get("answerable") is not False)
    for task, passages in _unique_ids(source.parse(record, source.joiner) for record in islice(answerable, limit)):
        tasks.append(task)
        if corpus_path is None:
            pooled.update(dict.fromkeys(passages))
    if not tasks:
        raise DataFormatError(f"{data_path or source.hub[0]} holds no record; expected questions of {source.name}")
    if corpus_path is not None:
        pooled = dict.fromkeys(read_passages(corpus_path, "corpus_path", source.joiner))
    if not pooled:
        raise ValueError(f"the records of {source.name} have no contexts to search; pass corpus_path")
    return QADataset(source.name, tuple(tasks), tuple(pooled))


def _fetch(source: Source, split: str) -> Iterator[Record]:
    repository, configuration = source.hub
    return fetch_records(repository, configuration, source.splits.get(split, split), source.name)


def _unique_ids(parsed: Iterable[Parsed]) -> Iterator[Parsed]:
    """Yields tasks with their ids made unique: some mirrors of the data sets repeat rows."""
    seen: set[str] = set()
    for task, passages in parsed:
        name, copy = task.task_id, 1
        while name in seen:
            copy += 1
            name = f"{task.task_id}#{copy}"
        seen.add(name)
        if copy > 1:
            task = replace(task, task_id=name)
        yield task, passages


def _hotpotqa(record: Record, joiner: str) -> Parsed:
    supporting = supporting_titles(record)
    task = QATask(
        task_id=record.identifier("_id", "id"),
        prompt=record.text("question"),
        answers=_answers(record, record.text("answer")),
        kind=record.text("type") if "type" in record else "bridge",
        hops=2,
        supporting=supporting,
    )
    return task, contexts(record, joiner)


def _two_wiki(record: Record, joiner: str) -> Parsed:
    task, passages = _hotpotqa(record, joiner)
    hops = len(task.supporting) or len(record.optional_list("evidences"))
    return replace(task, hops=hops), passages


def _musique(record: Record, joiner: str) -> Parsed:
    found = paragraphs(record)
    steps = record.optional_list("question_decomposition")
    order = [step.get("paragraph_support_idx") for step in steps if isinstance(step, dict)]
    by_number = {number: passage for number, passage, _ in found}
    # The decomposition gives the reading order; paragraphs that are only flagged follow.
    titles = [by_number[number].title for number in order if number in by_number]
    titles += [passage.title for _, passage, supports in found if supports]
    task = QATask(
        task_id=record.identifier("id", "_id"),
        prompt=record.text("question"),
        answers=_answers(record, record.text("answer")),
        kind=f"{len(steps)}hop" if steps else "chain",
        hops=len(steps) or len(dict.fromkeys(titles)),
        supporting=tuple(dict.fromkeys(titles)),
    )
    return task, [passage for _, passage, _ in found]


def _bamboogle(record: Record, joiner: str) -> Parsed:
    question = record.text("Question", "question")
    answer = record.text_or_list("Answer", "answer", "golden_answers")
    identifier = record.identifier("id", "_id", default=f"bamboogle-{record.number}")
    return QATask(identifier, question, tuple(dict.fromkeys(answer)), "compositional", 2), []


def _answers(record: Record, answer: str) -> tuple[str, ...]:
    aliases = record.optional_list("answer_aliases")
    for alias in aliases:
        if not isinstance(alias, str):
            raise record.error("answer_aliases", "a list of strings", alias)
    return tuple(dict.fromkeys([answer, *(alias for alias in aliases if alias.strip())]))


_NO_TRAIN = {"train": "test", "validation": "test", "dev": "test"}
_DEV = {"dev": "validation"}
_TWO_WIKI = Source("2wikimultihopqa", _two_wiki, ("framolfese/2WikiMultihopQA", None), _DEV, joiner=" ")

READERS: dict[str, Source] = {
    "hotpotqa": Source("hotpotqa", _hotpotqa, ("hotpotqa/hotpot_qa", "distractor"), _DEV),
    "2wikimultihopqa": _TWO_WIKI,
    "2wiki": _TWO_WIKI,
    "musique": Source("musique", _musique, ("dgslibisey/MuSiQue", None), _DEV),
    "bamboogle": Source("bamboogle", _bamboogle, ("chiayewken/bamboogle", None), _NO_TRAIN),
}
