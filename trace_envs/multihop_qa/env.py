"""`TraceMultiHopQA-v0`: answer a question by searching a corpus, one search or the answer per turn.

Invariant: questions, corpus and index are shared by every environment with the same arguments and never enter a state.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from trace_envs.arguments import integer, number
from trace_envs.env import ToolEnv
from trace_envs.multihop_qa.data import QADataset, QATask
from trace_envs.multihop_qa.metrics import exact_match, f1, supporting_recall
from trace_envs.multihop_qa.oracle import oracle_action
from trace_envs.multihop_qa.readers import READERS, load_dataset
from trace_envs.multihop_qa.retrieval import Retriever, format_passages, make_retriever
from trace_envs.multihop_qa.synthetic import synthetic_dataset
from trace_envs.state import Act, EpisodeState, Outcome, Task, ToolCall

DATASETS = ("synthetic", *READERS)
REWARDS = ("em", "f1")
MAX_QUERY_CHARS = 512

SEARCH_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches an encyclopedia and returns the passages that match best.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "A few words to look up."}},
            "required": ["query"],
            "additionalProperties": False,
        },
    },
}


@lru_cache(maxsize=16)
def load_resources(
    dataset: str, split: str, data_path: str | None, corpus_path: str | None, dataset_seed: int, retriever: str
) -> tuple[QADataset, Retriever]:
    """Loads a data set and builds its index, once for every environment that asks for the same."""
    if dataset == "synthetic":
        for name, value in (("data_path", data_path), ("corpus_path", corpus_path)):
            if value is not None:
                raise ValueError(f"the synthetic data set is generated; it takes no {name} (got {value!r})")
        data = synthetic_dataset(split, seed=dataset_seed)
    elif dataset in READERS:
        data = load_dataset(dataset, data_path=data_path, corpus_path=corpus_path, split=split)
    else:
        raise ValueError(f"unknown dataset {dataset!r}; known: {', '.join(DATASETS)}")
    return data, make_retriever(retriever, [f"{p.title} {p.text}" for p in data.passages])


class MultiHopQAEnv(ToolEnv):
    """Multi-hop question answering with one tool, `search`.

    Args:
        dataset: `synthetic` (embedded), `hotpotqa`, `2wikimultihopqa`, `musique` or `bamboogle`.
        split: Split of the data set; the synthetic ones are listed in `trace_envs.multihop_qa.synthetic.SPLITS`.
        data_path: File with the questions of a real data set; `None` loads it with `datasets.load_dataset`.
        corpus_path: File with the passages to search; `None` pools the questions' own contexts.
        dataset_seed: Seed of the synthetic encyclopedia.
        retriever: `bm25`.
        top_k: Passages that a search returns.
        search_dropout: Chance that a passage found is withheld, drawn anew at each search (0: search is deterministic).
        reward: `em` (exact match) or `f1`. Success (`is_correct`) is exact match under both.
        **kwargs: Arguments of `ToolEnv` (`action_format`, `max_turns`, `system_prompt`, `render_mode`, ...).

    Raises:
        ValueError: An argument has an unknown value; the message lists the known ones.
    """

    level_name = "hops"

    def __init__(
        self,
        *,
        dataset: str = "synthetic",
        split: str = "train",
        data_path: str | None = None,
        corpus_path: str | None = None,
        dataset_seed: int = 0,
        retriever: str = "bm25",
        top_k: int = 3,
        search_dropout: float = 0.0,
        reward: str = "em",
        **kwargs: Any,
    ):
        if reward not in REWARDS:
            raise ValueError(f"unknown reward {reward!r}; known: {', '.join(REWARDS)}")
        top_k, search_dropout = integer("top_k", top_k, 1), number("search_dropout", search_dropout)
        dataset_seed = integer("dataset_seed", dataset_seed, 0)
        for name, path in (("data_path", data_path), ("corpus_path", corpus_path)):
            if path is not None and not isinstance(path, str | os.PathLike):
                raise TypeError(f"{name} must be a path or None, got {path!r:.60} ({type(path).__name__})")
        if not 0.0 <= search_dropout < 1.0:
            raise ValueError(f"search_dropout must be in [0, 1), got {search_dropout}")
        super().__init__(**kwargs)
        self.reward, self.top_k, self.search_dropout, self.retriever = reward, top_k, search_dropout, retriever
        self.dataset, self.index = load_resources(
            dataset,
            split,
            None if data_path is None else str(data_path),
            None if corpus_path is None else str(corpus_path),
            dataset_seed,
            retriever,
        )

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Returns the schema of `search`."""
        return [SEARCH_TOOL]

    def settings(self) -> dict[str, Any]:
        """Adds what is asked, what is searched and how, and what it is worth.

        Questions and passages are known by their content, so a data set read from other files, or generated by another
        release, is the same if it says the same.
        """
        return super().settings() | {
            "dataset": self.dataset.name,
            "dataset_digest": self.dataset.digest,
            "retriever": self.retriever,
            "top_k": self.top_k,
            "search_dropout": self.search_dropout,
            "reward": self.reward,
        }

    def task_ids(self) -> Sequence[str]:
        """Returns the question ids in the data set's order."""
        return [task.task_id for task in self.dataset.tasks]

    def pick_task(self, rng: np.random.Generator, task_id: str | None) -> Task:
        """Returns the question of that id, or a random one."""
        if task_id is not None:
            return self.dataset.task(task_id)
        return self.dataset.tasks[int(rng.integers(len(self.dataset.tasks)))]

    def level_of(self, task: Task) -> int:
        """Returns the number of hops."""
        assert isinstance(task, QATask)
        return task.hops

    def oracle(self, state: EpisodeState, rng: np.random.Generator, noise: float = 0.0) -> tuple[str, Act]:
        """See base class; `trace_envs.multihop_qa.oracle` says how."""
        assert isinstance(state.task, QATask)
        return oracle_action(state.task, list(state.turns()), rng, noise=noise)

    def call_tool(self, state: EpisodeState, call: ToolCall) -> tuple[EpisodeState, str, bool]:
        """Searches; an empty, over-long or unmatched query is refused with a reason.

        The world is the tuple of the positions of all passages shown so far, in order of first appearance.
        """
        query = call.arguments["query"]
        if not query.strip():
            return state, "Error: the query is empty; give a few words to look up.", True
        if len(query) > MAX_QUERY_CHARS:
            return (
                state,
                f"Error: the query has {len(query)} characters; use at most {MAX_QUERY_CHARS}.",
                True,
            )
        found, _ = self.index.search(query, self.top_k)
        if len(found) == 0:
            return state, "Error: no passage holds any word of the query; try other words.", True
        if self.search_dropout:
            kept = found[self.randomness(state).random(len(found)) >= self.search_dropout]
            if len(kept) == 0:
                return state, "No results this time; try again.", False
            found = kept
        seen = state.world or ()
        new = tuple(self.dataset.positions[i] for i in found if i not in seen)
        state = replace(state, world=seen + new)
        return state, format_passages([self.dataset.passages[int(i)] for i in found]), False

    def judge(self, state: EpisodeState, answer: str | None) -> Outcome:
        """Scores an answer by exact match and F1; running out of turns scores zero."""
        task = state.task
        assert isinstance(task, QATask)
        seen = [self.dataset.passages[i].title for i in state.world or ()]
        scores = {
            "em": 0.0 if answer is None else float(exact_match(answer, task.answers)),
            "f1": 0.0 if answer is None else float(f1(answer, task.answers)),
            "supporting_recall": supporting_recall(seen, task.supporting),
        }
        return Outcome(is_correct=scores["em"] == 1.0, reward=scores[self.reward], components=scores)
