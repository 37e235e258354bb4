"""The synthetic encyclopedia: what it promises about names, splits, retrieval and the oracle."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from trace_envs.multihop_qa.data import QADataset, QATask
from trace_envs.multihop_qa.oracle import oracle_action
from trace_envs.multihop_qa.synthetic import SPLITS, fixed_words, name_chunks, synthetic_dataset
from trace_envs.multihop_qa.synthetic.relations import HELD_OUT, RELATIONS
from trace_envs.state import FinalAnswer, FormatError, Turn

NUMERIC = {relation.name for relation in RELATIONS.values() if relation.value == "number"}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Search:
    """The reference retriever, as an environment would show its results."""

    def __init__(self, dataset: QADataset) -> None:
        self.passages = dataset.passages
        self.bm25 = BM25Okapi([words_of(f"{p.title} {p.text}") for p in dataset.passages])

    def titles(self, query: str) -> list[str]:
        scores = self.bm25.get_scores(words_of(query))
        return [self.passages[i].title for i in np.argsort(scores)[::-1][:2]]

    def observe(self, query: str) -> str:
        by_title = {p.title: p.text for p in self.passages}
        return "\n".join(f"[{i}] {t}: {by_title[t]}" for i, t in enumerate(self.titles(query), 1))


_searches: dict[str, Search] = {}


def search_of(dataset: QADataset) -> Search:
    if dataset.name not in _searches:
        _searches[dataset.name] = Search(dataset)
    return _searches[dataset.name]


def play(task: QATask, search: Search, limit: int, rng: np.random.Generator, noise: float = 0.0) -> list[Turn]:
    turns: list[Turn] = []
    for _ in range(limit):
        thought, action = oracle_action(task, turns, rng, noise=noise)
        if isinstance(action, FinalAnswer):
            return [*turns, Turn(thought, action, "")]
        turns.append(Turn(thought, action, search.observe(action.arguments["query"])))
    return turns


def sample(dataset: QADataset, n: int) -> list[QATask]:
    """A few tasks of every kind and number of hops."""
    seen: Counter[tuple[str, int]] = Counter()
    chosen = []
    for task in dataset.tasks:
        if seen[task.kind, task.hops] < n:
            seen[task.kind, task.hops] += 1
            chosen.append(task)
    return chosen


def names_in(dataset: QADataset) -> set[str]:
    fixed = set(fixed_words())
    texts = [f"{p.title} {p.text}" for p in dataset.passages] + [task.prompt for task in dataset.tasks]
    return {word for text in texts for word in re.findall(r"[A-Za-z]+", text) if word not in fixed}


def bigrams(dataset: QADataset) -> set[tuple[str, str]]:
    return {
        (one.relation, two.relation)
        for task in dataset.tasks
        for one, two in zip(task.steps, task.steps[1:], strict=False)
        if two.subject == one.value
    }


def test_deterministic() -> None:
    one = synthetic_dataset("test", seed=3, questions_per_hop=20)
    assert one is synthetic_dataset("test", seed=3, questions_per_hop=20)
    again = synthetic_dataset.__wrapped__("test", seed=3, questions_per_hop=20)
    assert one is not again
    assert one.tasks == again.tasks and one.passages == again.passages
    other = synthetic_dataset("test", seed=4, questions_per_hop=20)
    assert one.passages != other.passages and one.tasks != other.tasks


def test_sizes_ids_and_shape() -> None:
    least = {"train": 600, "validation": 100}
    for split in SPLITS:
        dataset = synthetic_dataset(split)
        hops = Counter(task.hops for task in dataset.tasks)
        assert set(hops.values()) == {least.get(split, 300)}
        assert sorted(hops) == {"test_longer": [7, 8], "test_compositions": [2, 3, 4, 5, 6]}.get(
            split, [1, 2, 3, 4, 5, 6]
        )
        assert len({task.prompt for task in dataset.tasks}) == len(dataset.tasks)
        assert len({p.title for p in dataset.passages}) == len(dataset.passages)
        assert max(len(p.text.split()) for p in dataset.passages) <= 30
        assert all(task.hops == len(task.steps) for task in dataset.tasks)
        kinds = Counter(task.kind for task in dataset.tasks)
        assert kinds["chain"] >= 0.75 * len(dataset.tasks)
    assert synthetic_dataset("train").tasks[0].task_id == "synthetic-train-1hop-00000"
    assert len(synthetic_dataset("train").passages) > 2000


def test_names_are_chunks_and_splits_share_none() -> None:
    openers, closers = name_chunks()
    assert len({a + b for a in openers for b in closers}) == len(openers) * len(closers)
    made = {a + b for a in openers for b in closers}
    assert not made & {word.capitalize() for word in fixed_words()}
    names = {split: names_in(synthetic_dataset(split)) for split in SPLITS}
    for split in SPLITS:
        assert names[split] <= made
    for i, one in enumerate(SPLITS):
        for two in SPLITS[i + 1 :]:
            assert not names[one] & names[two]
    # The partition does not depend on the seed either.
    assert not names["test"] & names_in(synthetic_dataset("train", seed=1, questions_per_hop=10))


@pytest.mark.parametrize("split", SPLITS)
def test_chains_are_consistent(split: str) -> None:
    dataset = synthetic_dataset(split)
    passages = {p.title: p.text for p in dataset.passages}
    for task in dataset.tasks:
        assert task.answers and task.supporting == tuple(dict.fromkeys(step.title for step in task.steps))
        for step in task.steps:
            assert step.value in passages[step.title]
            assert step.subject in f"{step.title} {passages[step.title]}"
            assert step.value in step.finding and step.relation in step.finding
        if task.kind == "chain":
            relations = [step.relation for step in task.steps]
            assert len(set(relations)) == len(relations)
            assert task.prompt == f"What is the {' of the '.join(relations[::-1])} of {task.steps[0].subject}?"
            assert task.answers[0] == task.steps[-1].value
            assert all(two.subject == one.value for one, two in zip(task.steps, task.steps[1:], strict=False))


def test_comparisons_follow_from_their_steps() -> None:
    for task in synthetic_dataset("train").tasks:
        if task.kind == "comparison":
            sides = [step for step in task.steps if step.relation in NUMERIC]
            assert len(sides) == 2
            pick = max if sides[0].relation == "population" else min
            assert pick(sides, key=lambda step: int(step.value)).subject == task.answers[0]
        if task.kind == "yes_no" and task.prompt.startswith("Are"):
            values = [step.value for step in task.steps if step.relation == "country"]
            assert task.answers == ("yes" if values[0] == values[-1] else "no",)
        elif task.kind == "yes_no":
            place = task.prompt.split()[-1].rstrip("?")
            assert task.answers == ("yes" if task.steps[-1].value == place else "no",)


def test_yes_no_balanced() -> None:
    for split in ("train", "validation", "test", "test_distractors"):
        answers = Counter(task.answers[0] for task in synthetic_dataset(split).tasks if task.kind == "yes_no")
        assert answers["yes"] == answers["no"] > 0


def test_compositions_are_held_out() -> None:
    for split in SPLITS:
        found = bigrams(synthetic_dataset(split))
        assert (found <= HELD_OUT) if split == "test_compositions" else not (found & HELD_OUT)
    assert len(bigrams(synthetic_dataset("test_compositions"))) == len(HELD_OUT)
    # Every relation is nevertheless known from training, first and later in a chain.
    trained = bigrams(synthetic_dataset("train"))
    assert {name for pair in HELD_OUT for name in pair} <= {name for pair in trained for name in pair}


def test_natural_query_mostly_works_and_names_are_unambiguous() -> None:
    for split in SPLITS:
        dataset = synthetic_dataset(split)
        steps = [step for task in dataset.tasks for step in task.steps]
        natural = np.mean([step.queries[0] == f"{step.subject} {step.relation}" for step in steps])
        assert 0.75 < natural < 0.97
        # Aliases: nothing that is announced as a second name is the title of an article.
        titles = {re.sub(r" \(\w+\)$", "", p.title) for p in dataset.passages}
        aliases = [m for p in dataset.passages for m in re.findall(r"also known as ([\w ]+?)(?:,|\.)", p.text)]
        assert aliases and not titles & set(aliases)
    assert any(len(task.answers) > 1 for task in synthetic_dataset("train").tasks)


@pytest.mark.parametrize("split", SPLITS)
def test_every_query_finds_its_passage(split: str) -> None:
    dataset = synthetic_dataset(split)
    search = search_of(dataset)
    for task in sample(dataset, 6):
        for step in task.steps:
            for query in step.queries:
                assert step.title in search.titles(query), (task.task_id, query)


@pytest.mark.parametrize("split", SPLITS)
def test_oracle_answers_everything(split: str) -> None:
    dataset = synthetic_dataset(split)
    rng = np.random.default_rng(0)
    for task in sample(dataset, 8):
        turns = play(task, search_of(dataset), 12 if split == "test_longer" else 10, rng)
        assert isinstance(turns[-1].action, FinalAnswer)
        assert turns[-1].action.text == task.answers[0]
        assert len(turns) == task.hops + 1


def test_noisy_oracle_errs_and_recovers() -> None:
    dataset = synthetic_dataset("test")
    rng = np.random.default_rng(0)
    runs = [play(task, search_of(dataset), 10, rng, noise=0.3) for task in sample(dataset, 8)]
    assert np.mean([isinstance(turns[-1].action, FinalAnswer) for turns in runs]) > 0.95
    assert sum(turn.text == "Not found." for turns in runs for turn in turns) > len(runs) / 4
    # A mistake is put right one turn later.
    assert not any(a.text == b.text == "Not found." for turns in runs for a, b in pairwise(turns))


def test_oracle_is_stateless_and_takes_over_after_others() -> None:
    dataset = synthetic_dataset("test")
    task = next(task for task in dataset.tasks if task.hops == 3 and task.kind == "chain")
    turns = play(task, search_of(dataset), 10, np.random.default_rng(0))
    lost = [Turn("?", FormatError("say what"), "Error: say what", error=True)]
    mixed = [*turns[:1], *lost, *turns[1:2], *lost, *lost]
    thought, action = oracle_action(task, mixed, np.random.default_rng(1))
    assert thought == "Not found." and action.arguments["query"] == task.steps[2].queries[0]


def test_oracle_on_real_data_searches_titles() -> None:
    task = QATask(
        "x", "Who was older, Ada Lovelace or Bob?", answers=("Ada",), supporting=("Ada Lovelace", "Bob (chef)")
    )
    rng = np.random.default_rng(0)
    _, first = oracle_action(task, [], rng)
    assert first.arguments["query"] == "Ada Lovelace"
    turns = [Turn("", first, "[1] Lovelace family: ...")]
    _, second = oracle_action(task, turns, rng)
    assert second.arguments["query"].startswith("Ada Lovelace Who was")
    turns.append(Turn("", second, "[1] Ada Lovelace: ...\n[2] Bob (chef): ..."))
    _, last = oracle_action(task, turns, rng)
    assert last == FinalAnswer("Ada")
    with pytest.raises(ValueError, match="no answer"):
        oracle_action(QATask("y", "?"), [], rng)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'; known: train, validation"):
        synthetic_dataset("dev")
    with pytest.raises(ValueError, match="2 to 8 hops"):
        synthetic_dataset("test_compositions", hops=(1,))
    with pytest.raises(ValueError, match="1 to 8 hops"):
        synthetic_dataset("train", hops=())
    with pytest.raises(ValueError, match="questions_per_hop"):
        synthetic_dataset("train", questions_per_hop=0)
    with pytest.raises(ValueError, match="name words"):
        synthetic_dataset("test", scale=50.0)
    with pytest.raises(ValueError, match="larger scale"):
        synthetic_dataset("test", scale=0.05, hops=(1,), questions_per_hop=5000)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), split=st.sampled_from(SPLITS))
def test_small_worlds_of_any_seed(seed: int, split: str) -> None:
    dataset = synthetic_dataset(split, seed=seed, scale=0.3, questions_per_hop=4, hops=(2, 4))
    search = Search(dataset)
    assert len({p.title for p in dataset.passages}) == len(dataset.passages)
    for task in dataset.tasks:
        turns = play(task, search, 10, np.random.default_rng(seed))
        assert turns[-1].action == FinalAnswer(task.answers[0])
