"""Questions about a world, each with the searches that answer it.

Invariant: every step of every question names a passage that each of its queries brings back among the first two of
BM25's results over the whole corpus, with no tie that another sorting could decide differently; a question with a step
that no query can find is never asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trace_envs.multihop_qa.data import QATask, Step
from trace_envs.multihop_qa.retrieval import BM25Index
from trace_envs.multihop_qa.synthetic import relations
from trace_envs.multihop_qa.synthetic.world import World

TOP_K = 2
"""Results within which a query has to bring its passage back."""

_PATIENCE = 4000  # draws in a row that give nothing new before a world counts as too small
_NUMERIC_END = 0.25  # share of chains that are steered to a number where one is in reach
_ALIAS_USE = 0.5  # of the questions that may call their first subject by its alias
_KINDS_OF_START = ("work", "team", "company", "person", "city", "country")
_START_ODDS = (0.3, 0.2, 0.17, 0.2, 0.1, 0.03)
_YES_NO_ENDS = ("country", "birthplace", "headquarters")


@dataclass(frozen=True, slots=True)
class Chain:
    """A walk through the facts: where it starts, what is asked in turn, and what that gives.

    Attributes:
        start: Name of the first subject.
        called: What the question calls it: its name or its alias.
        asked: Relations in the order in which they are applied.
        values: What each of them gives.
    """

    start: str
    called: str
    asked: tuple[str, ...]
    values: tuple[str, ...]

    def phrase(self, drop: int = 0) -> str:
        """Returns the nested noun phrase, without the last `drop` relations."""
        asked = self.asked[: len(self.asked) - drop]
        return "".join(f"the {relation} of " for relation in reversed(asked)) + self.called

    @property
    def compared(self) -> str:
        """The entity that the last relation is asked of."""
        return self.values[-2] if len(self.values) > 1 else self.start


class QuestionWriter:
    """Draws questions of one world.

    Args:
        world: What is asked about.
        rng: Source of every choice.
        held_out: Whether to ask for the unseen compositions only, or never.
    """

    def __init__(self, world: World, rng: np.random.Generator, *, held_out: bool = False) -> None:
        self._world = world
        self._rng = rng
        self._held_out = held_out
        self._index = BM25Index([f"{p.title} {p.text}" for p in world.passages])
        self._positions = {p.title: i for i, p in enumerate(world.passages)}
        self._queries: dict[tuple[str, str, str], tuple[str, ...]] = {}
        self._in_country: dict[str, list[str]] = {}
        self._leading_to = _leading_to(held_out)

    def write(self, n: int, hops: int, prefix: str, *, kinds: Sequence[str]) -> list[QATask]:
        """Writes questions, no two alike.

        Args:
            n: How many.
            hops: Searches that each of them needs.
            prefix: What their ids begin with.
            kinds: Kind of the i-th question, taken in turn: `chain`, `comparison`, `yes` or `no`.

        Returns:
            The tasks.

        Raises:
            ValueError: The world is too small for so many.
        """
        tasks: list[QATask] = []
        seen: set[str] = set()
        misses = 0
        while len(tasks) < n and misses < _PATIENCE:
            kind = kinds[len(tasks) % len(kinds)]
            task = self._draw(kind, hops, f"{prefix}-{hops}hop-{len(tasks):05d}")
            misses += 1
            if task is not None and task.prompt not in seen:
                misses = 0
                seen.add(task.prompt)
                tasks.append(task)
        if len(tasks) < n:
            raise ValueError(
                f"the world has only {len(tasks)} of the {n} questions of {hops} hops wanted; ask for fewer, or "
                "for a larger scale"
            )
        return tasks

    def _draw(self, kind: str, hops: int, task_id: str) -> QATask | None:
        if kind == "chain":
            return self._chain(hops, task_id)
        if kind == "comparison":
            return self._comparison(hops, task_id)
        end = _YES_NO_ENDS[self._rng.integers(len(_YES_NO_ENDS))]
        if end == "country":
            return self._same_country(hops, task_id, yes=kind == "yes")
        return self._in_place(hops, task_id, end, yes=kind == "yes")

    def _chain(self, hops: int, task_id: str) -> QATask | None:
        chain = self._walk(hops)
        if chain is None:
            return None
        last = self._world.entities.get(chain.values[-1])
        answers = (chain.values[-1],) if last is None else last.answers
        return self._task(task_id, "chain", {"a": chain.phrase()}, answers, [chain])

    def _two_sides(self, hops: int, end: str) -> tuple[Chain, Chain] | None:
        split = int(self._rng.integers(1, hops))
        one, other = self._walk(split, end), self._walk(hops - split, end)
        if one is None or other is None or one.compared == other.compared or one.start == other.start:
            return None
        same_kind = self._world.entities[one.compared].kind == self._world.entities[other.compared].kind
        return (one, other) if same_kind else None

    def _comparison(self, hops: int, task_id: str) -> QATask | None:
        numbers = [r.name for r in relations.RELATIONS.values() if r.value == relations.NUMBER]
        end = numbers[self._rng.integers(len(numbers))]
        sides = self._two_sides(hops, end)
        if sides is None or sides[0].values[-1] == sides[1].values[-1]:
            return None
        pick = max if end == "population" else min
        winner = pick(sides, key=lambda side: int(side.values[-1]))
        answers = self._world.entities[winner.compared].answers
        words = {"a": sides[0].phrase(drop=1), "b": sides[1].phrase(drop=1)}
        return self._task(task_id, "comparison", words, answers, list(sides), end)

    def _same_country(self, hops: int, task_id: str, *, yes: bool) -> QATask | None:
        sides = self._two_sides(hops, "country")
        if sides is None or (sides[0].values[-1] == sides[1].values[-1]) != yes:
            return None
        words = {"a": sides[0].phrase(drop=1), "b": sides[1].phrase(drop=1)}
        return self._task(task_id, "yes_no", words, ("yes" if yes else "no",), list(sides), "country")

    def _in_place(self, hops: int, task_id: str, end: str, *, yes: bool) -> QATask | None:
        chain = self._walk(hops, end)
        if chain is None:
            return None
        cities = self._world.by_kind["city"]
        place = chain.values[-1] if yes else cities[self._rng.integers(len(cities))]
        if (place == chain.values[-1]) != yes:
            return None
        words = {"a": chain.phrase(drop=1), "b": place}
        return self._task(task_id, "yes_no", words, ("yes" if yes else "no",), [chain], end)

    def _walk(self, hops: int, end: str | None = None) -> Chain | None:
        """Draws a chain of that many hops, ending with the relation `end` if one is given; `None` at a dead end."""
        rng, world = self._rng, self._world
        numeric = end is None and rng.random() < _NUMERIC_END
        kinds, odds = list(_KINDS_OF_START), np.array(_START_ODDS)
        if end is not None:
            open_to = self._leading_to[end, hops]
            odds = odds * [any(r.name in open_to for r in relations.relations_of(kind)) for kind in kinds]
            if not odds.any():
                return None
        pool = world.by_kind[kinds[rng.choice(len(kinds), p=odds / odds.sum())]]
        start = subject = pool[rng.integers(len(pool))]
        visited = {start}
        asked: list[str] = []
        values: list[str] = []
        for left in range(hops, 0, -1):
            facts = world.facts[subject]
            options = [
                relation
                for relation, value in facts.items()
                if relation not in asked
                and value not in visited
                and relations.may_follow(asked[-1] if asked else None, relation, held_out=self._held_out)
                and (left == 1 or relations.RELATIONS[relation].value != relations.NUMBER)
                and (end is None or relation in self._leading_to[end, left])
            ]
            if end is None and left == 1:
                numbers = [r for r in options if relations.RELATIONS[r].value == relations.NUMBER]
                options = numbers if numeric and numbers else [r for r in options if r not in numbers]
            if not options:
                return None
            relation = options[rng.integers(len(options))]
            subject = facts[relation]
            visited.add(subject)
            asked.append(relation)
            values.append(subject)
        alias = world.entities[start].alias
        # Where the answer is one of two names in the question, the question uses the canonical one.
        by_alias = alias is not None and (end is None or hops > 1) and rng.random() < _ALIAS_USE
        called = alias if alias is not None and by_alias else start
        return Chain(start, called, tuple(asked), tuple(values))

    def _task(
        self,
        task_id: str,
        kind: str,
        words: dict[str, str],
        answers: tuple[str, ...],
        chains: list[Chain],
        end: str = "",
    ) -> QATask | None:
        steps: list[Step] = []
        for chain in chains:
            subject, called = chain.start, chain.called
            for relation, value in zip(chain.asked, chain.values, strict=True):
                queries = self._find(subject, called, relation)
                if not queries:
                    return None
                finding = relations.FINDING if kind == "chain" else relations.FINDING_OF
                note = finding.format(relation=relation, subject=called, value=value)
                steps.append(Step(called, relation, value, self._world.titles[subject, relation], queries, note))
                subject = called = value
        return QATask(
            task_id=task_id,
            prompt=relations.QUESTIONS[end or "chain"].format(**words),
            answers=answers,
            kind=kind,
            hops=len(steps),
            supporting=tuple(dict.fromkeys(step.title for step in steps)),
            steps=tuple(steps),
        )

    def _find(self, subject: str, called: str, relation: str) -> tuple[str, ...]:
        """Returns the queries that find a fact, the natural one first where it works."""
        key = (subject, called, relation)
        if key not in self._queries:
            what = relations.RELATIONS[relation]
            title = self._world.titles[subject, relation]
            suffix = title.removeprefix(subject).strip(" ()")
            extra = dict.fromkeys([relation, *([suffix] if suffix else []), *what.words])
            candidates = [f"{called} {word}" for word in extra] + [called]
            position = self._positions[title]
            self._queries[key] = tuple(query for query in candidates if self._finds(query, position))
        return self._queries[key]

    def _finds(self, query: str, position: int) -> bool:
        indices, scores = self._index.search(query, TOP_K + 1)
        rank = next((i for i, index in enumerate(indices[:TOP_K]) if index == position), None)
        if rank is None:
            return False
        return len(scores) <= TOP_K or float(scores[rank]) > float(scores[TOP_K]) + 1e-9


def _leading_to(held_out: bool) -> dict[tuple[str, int], frozenset[str]]:
    """Returns, for every (end, hops left), the relations that a walk may take now and still end there.

    Repetitions are not looked at: this only keeps the draws from wandering off, the walk itself checks them.
    """
    by_name = relations.RELATIONS
    table: dict[tuple[str, int], frozenset[str]] = {}
    for end in by_name:
        table[end, 1] = frozenset({end})
        for left in range(2, 2 * len(by_name)):
            table[end, left] = frozenset(
                before
                for before, what in by_name.items()
                for after in table[end, left - 1]
                if what.value == by_name[after].subject
                and before != end
                and relations.may_follow(before, after, held_out=held_out)
            )
    return table
