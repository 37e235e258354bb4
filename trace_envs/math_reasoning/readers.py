"""Reads GSM8K, DeepScaleR and MATH, from files in their public formats or through `datasets`.

Invariant: a data set keeps its source's order, ids and wording. What cannot be read is refused in a sentence that names file,
record and field.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from trace_envs.math_reasoning.answers import final_of
from trace_envs.math_reasoning.calculator import CalculatorError, evaluate
from trace_envs.math_reasoning.records import MathTask, Step
from trace_envs.records import DataFormatError, Record, fetch_records, read_records

__all__ = ["READERS", "FileProblems", "Source", "load_problems"]

_STEP = re.compile(r"<<([^<>=]*)=[^<>]*>>")


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and how one record of it is read.

    Attributes:
        name: The data set's full name.
        parse: Turns a record into a task; `None` for one without an answer.
        hub: Repository and configuration of a copy that `datasets.load_dataset` reads.
        splits: How the copy calls its splits, where they have other names.
    """

    name: str
    parse: Callable[[Record], MathTask | None]
    hub: tuple[str, str | None]
    splits: dict[str, str]


@dataclass(frozen=True)
class FileProblems:
    """The problems of a data set.

    Attributes:
        name: Name of the data set.
        tasks: The problems, in the source's order.
    """

    name: str
    tasks: tuple[MathTask, ...]

    @cached_property
    def digest(self) -> str:
        """Digest of all that is in the problems."""
        return hashlib.blake2b(repr([astuple(task) for task in self.tasks]).encode(), digest_size=16).hexdigest()

    @cached_property
    def _by_id(self) -> dict[str, MathTask]:
        return {task.task_id: task for task in self.tasks}

    def task_ids(self) -> Sequence[str]:
        """Returns the ids in the source's order."""
        return list(self._by_id)

    def task(self, task_id: str) -> MathTask:
        """Returns a problem.

        Raises:
            ValueError: There is none of that id.
        """
        if task_id not in self._by_id:
            raise ValueError(f"unknown task_id {task_id!r}; {self.name} has {len(self.tasks)}, see task_ids()")
        return self._by_id[task_id]


@lru_cache(maxsize=16)
def load_problems(
    name: str, *, data_path: str | None = None, split: str = "train", levels: tuple[int, ...] | None = None
) -> FileProblems:
    """Loads a data set, once for every environment that asks for the same.

    Args:
        name: `gsm8k`, `deepscaler` or `math`.
        data_path: The problems: a JSON list, JSON lines or CSV file. Without it `datasets.load_dataset` fetches them.
        split: Split to fetch; a local file is one split already.
        levels: Levels to keep; `None` for all. Of GSM8K the calculations of the solution, of the others their own.

    Returns:
        The problems. Those whose answer is null or empty are left out.

    Raises:
        ValueError: The name is unknown, or no problem has these levels.
        FileNotFoundError: The path does not exist.
        DataFormatError: A record is malformed.
        ImportError: `datasets` is needed and not installed.
        ConnectionError: The data set cannot be fetched.
    """
    if name not in READERS:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(READERS)}")
    source = READERS[name]
    if data_path is None:
        records = fetch_records(*source.hub, source.splits.get(split, split), source.name)
    else:
        records = read_records(Path(data_path), "data_path")
    tasks: dict[str, MathTask] = {}
    for record in records:
        task = source.parse(record)
        if task is None:
            continue
        if task.task_id in tasks:
            raise record.error("id", f"ids that differ; {task.task_id!r} came before", task.task_id)
        tasks[task.task_id] = task
    if not tasks:
        raise DataFormatError(f"{data_path or source.hub[0]} holds no record; expected problems of {source.name}")
    kept = tuple(task for task in tasks.values() if levels is None or task.level in levels)
    if not kept:
        known = ", ".join(map(str, sorted({task.level for task in tasks.values()})))
        raise ValueError(f"no problem of {source.name} has a level of {sorted(levels or ())}; there are {known}")
    return FileProblems(source.name, kept)


def _gsm8k(record: Record) -> MathTask:
    solution = record.text("answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise record.error("answer", "a solution that ends in '#### answer'", solution[-40:])
    steps = tuple(Step("", "calculator", text) for text in _STEP.findall(solution) if _has_value(text))
    task_id = record.identifier("id", "_id", default=f"gsm8k-{record.number}")
    return MathTask(task_id, record.text("question"), "gsm8k", len(_STEP.findall(solution)), answer.strip(), steps)


def _has_value(expression: str) -> bool:
    try:
        evaluate(expression)
    except CalculatorError:
        return False
    return True


def _deepscaler(record: Record) -> MathTask | None:
    if "answer" in record.fields and record.fields["answer"] in (None, ""):
        return None
    difficulty = record.fields.get("difficulty", 0)
    if isinstance(difficulty, bool) or not isinstance(difficulty, int | float):
        raise record.error("difficulty", "a number", difficulty)
    task_id = record.identifier("id", "_id", default=f"deepscaler-{record.number}")
    return MathTask(task_id, record.text("problem", "question"), _kind(record), int(difficulty), _answer(record))


def _math(record: Record) -> MathTask:
    level = record.fields.get("level", 0)
    found = re.fullmatch(r"(?:Level )?(\d+|\?)", str(level))
    if found is None:
        raise record.error("level", "such as 'Level 3'", level)
    if "answer" in record:
        answer = _answer(record)
    else:
        solution = record.text("solution")
        if "\\boxed" not in solution:
            raise record.error("solution", "a solution with a \\boxed answer", solution[-40:])
        answer = final_of(re.sub(r"\\boxed\s+(\S+?)(?=[.$\s]|$)", r"\\boxed{\1}", solution))
    number = 0 if found[1] == "?" else int(found[1])
    task_id = record.identifier("unique_id", "id", "_id", default=f"math-{record.number}")
    return MathTask(task_id, record.text("problem"), _kind(record), number, answer)


def _answer(record: Record) -> str:
    value = record.fields.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return record.text("answer").strip()


def _kind(record: Record) -> str:
    name = next((name for name in ("type", "subject") if name in record), None)
    return record.text(name) if name is not None else ""


READERS: dict[str, Source] = {
    "gsm8k": Source("gsm8k", _gsm8k, ("openai/gsm8k", "main"), {"validation": "test", "dev": "test"}),
    "deepscaler": Source("deepscaler", _deepscaler, ("agentica-org/DeepScaleR-Preview-Dataset", None), {}),
    "math": Source(
        "math", _math, ("HuggingFaceH4/MATH-500", None), {"train": "test", "validation": "test", "dev": "test"}
    ),
}
