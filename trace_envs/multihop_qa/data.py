"""The records that every multi-hop data set, synthetic or real, is read into.

Invariant: a data set is immutable, its task ids and its passage titles are those of its source, and its order is fixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from trace_envs.snapshots.codec import register
from trace_envs.state import Task


@dataclass(frozen=True, slots=True)
class Passage:
    """One unit of retrieval."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """One hop of the way to the answer, known for synthetic questions.

    Attributes:
        subject: Name of the entity asked about.
        relation: What is asked of it, in the words of the question (such as `"spouse"`).
        value: The name or number found.
        title: Title of the passage that states it.
        queries: Search queries that find the passage, the best first; all of them work within the default `top_k`.
        finding: One short sentence that states what was found, as an agent would note it.
    """

    subject: str
    relation: str
    value: str
    title: str
    queries: tuple[str, ...]
    finding: str


@dataclass(frozen=True, slots=True)
class QATask(Task):
    """A question. `prompt` is the question itself.

    Attributes:
        answers: Accepted answers, the canonical one first, then its aliases.
        kind: `chain`, `comparison` or `yes_no` for synthetic questions, the source's own type for others.
        hops: Number of passages that have to be read, 0 where the source does not say.
        supporting: Titles of the passages that hold the evidence, in reading order where it is known.
        steps: The way to the answer, empty for real data.
    """

    answers: tuple[str, ...] = ()
    kind: str = "chain"
    hops: int = 0
    supporting: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class QADataset:
    """Questions and the corpus they are asked of."""

    name: str
    tasks: Sequence[QATask]
    passages: Sequence[Passage]
    _index: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"data set {self.name!r} holds no question")
        if not self.passages:
            raise ValueError(f"data set {self.name!r} holds no passage")
        self._index.update({task.task_id: i for i, task in enumerate(self.tasks)})
        if len(self._index) != len(self.tasks):
            raise ValueError(f"data set {self.name!r} has duplicate task ids")

    @cached_property
    def digest(self) -> str:
        """A digest of everything that questions and passages say, in hex; computed once."""
        made = hashlib.blake2b(digest_size=16)
        for record in (*self.tasks, *self.passages):
            # The text is unambiguous: every field is a string, a number or a tuple of these.
            made.update(repr(record).encode("utf-8", "surrogatepass"))
        return made.hexdigest()

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """The positions of the passages, one number object for each, which all states share: they hold many."""
        return tuple(range(len(self.passages)))

    def task(self, task_id: str) -> QATask:
        """Returns the task of that id.

        Raises:
            ValueError: The data set has no such task; the message says how ids look.
        """
        try:
            return self.tasks[self._index[task_id]]
        except (KeyError, TypeError):  # TypeError: not hashable, so no id either
            example = self.tasks[0].task_id
            raise ValueError(
                f"data set {self.name!r} has no task {task_id!r}; it holds {len(self.tasks)} ids such as {example!r}"
            ) from None


register(QATask, "QATask")
register(Step, "QAStep")
