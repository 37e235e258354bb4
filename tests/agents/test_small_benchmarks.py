"""Benchmarks of retrieval and environment: that they compare what they say, and notice a difference."""

import numpy as np
import pytest
from rank_bm25 import BM25Okapi

from benchmarks import RESULTS, environment, results_folder, retrieval, tool_turns
from benchmarks import all as every
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.multihop_qa.retrieval import BM25Index, tokenize
from trace_envs.state import FinalAnswer, ToolCall


@pytest.fixture(scope="module")
def corpus():
    return retrieval.made(300, 20, 0)


def test_made_corpora_are_functions_of_their_seed(corpus):
    assert corpus == retrieval.made(300, 20, 0) != retrieval.made(300, 20, 1)
    counts = np.bincount([int(w[1:]) for text in corpus[0] for w in text.split()])
    assert counts[0] > counts[9] > counts[99]


def test_scores_are_compared_with_those_of_rank_bm25(corpus):
    texts, queries = corpus
    rank = BM25Okapi([tokenize(text) for text in texts])
    assert max(retrieval._difference(BM25Index(texts), rank, query) for query in queries) <= retrieval.TOLERANCE
    assert max(retrieval._difference(BM25Index(texts, k1=1.4), rank, query) for query in queries) > 1e-3
    assert retrieval._difference(BM25Index(texts[:20]), BM25Okapi([["other"]] * 20), queries[0]) == float("inf")


def test_growth_is_a_power():
    rows = [{"corpus": "made", "documents": n, "ours_us": 3.0 * n**0.5} for n in (10, 100, 1000)]
    assert retrieval.growth(rows, "ours_us") == pytest.approx(0.5)
    assert np.isnan(retrieval.growth(rows[:1], "ours_us"))


def test_the_two_environments_show_the_same_and_a_difference_is_seen(monkeypatch):
    args = environment.Args(questions=4, rank_questions=2, repeats=1)
    env = MultiHopQAEnv(split="test")
    row = environment.measure("synthetic", env, args)
    assert row["same_observations"] and row["turns"] > 4 and row["ratio"] > 0

    class Backwards(environment.RankBM25):
        def search(self, query, k):
            found, scores = super().search(query, k)
            return found[::-1], scores[::-1]

    monkeypatch.setattr(environment, "RankBM25", Backwards)
    assert not environment.measure("synthetic", env, args)["same_observations"]


def test_a_turn_is_measured_in_each_world():
    row = tool_turns.measure("shop", tool_turns.Args(tasks=6, repeats=1))
    assert row["calls"] >= 6 and row["bare_us"] < row["checked_us"] and row["ratio"] > 1
    assert row["met"] is (row["ratio"] <= tool_turns.BAR)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("a\nb 1.5 (bar 2)\n", "b 1.5 (bar 2)"),
        ("┏━━┓\n┃ x ┃ y ┃\n┡━━┩\n│ 1 │ 2 │\n└──┘\n", "1  2"),
        ("\n  \n", ""),
    ],
)
def test_the_last_words_of_a_benchmark(output, words):
    assert every.last_words(output) == words


def test_every_benchmark_is_there():
    import importlib

    for name in every.BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        assert hasattr(module, "main") and hasattr(module, "Args"), name
        assert "quick" in module.Args.__dataclass_fields__, name
    with pytest.raises(ValueError, match="unknown benchmark 'speed'; known: snapshots"):
        every.Args(only=("speed",))


def test_small_runs_leave_the_committed_results_alone(tmp_path):
    assert results_folder(RESULTS, quick=False) == RESULTS and results_folder(tmp_path, quick=True) == tmp_path
    small = results_folder(RESULTS, quick=True)
    assert small != RESULTS and small.is_dir()


def test_gem_is_shown_the_same_turns_in_its_own_tags():
    search = environment.for_gem("First this.", ToolCall("search", {"query": "the river"}))
    assert search == "<think>First this.</think><search>the river</search>"
    assert environment.for_gem("So.", FinalAnswer("Oslo")) == "<think>So.</think><answer>Oslo</answer>"
    found = environment.against_gem({"seconds": {"http": 4e-3, "free": 5e-5}, "correct": {"http": 0.3}}, 1e-3)
    assert (
        found["gem_http_ratio"] == pytest.approx(4)
        and found["gem_free_ratio"] == pytest.approx(0.05)
        and found["gem_met"]
    )
    rows = [{"data": "x", "turns_per_second": 1000.0, **found}]
    assert len(environment.gem_cells(rows)) == 2 and environment.gem_cells([{"data": "x"}]) == []


def test_an_interpreter_that_is_not_there_is_named_at_once():
    with pytest.raises(ValueError, match="there is no program '/nowhere/python'; make one with"):
        environment.Args(gem="/nowhere/python")
