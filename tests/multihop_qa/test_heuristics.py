"""The scripted bm25 agent: bounded, blind to the answer, and right now and then."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_envs.multihop_qa.heuristics import MAX_SEARCHES, bm25_action
from trace_envs.multihop_qa.metrics import exact_match
from trace_envs.multihop_qa.readers import load_dataset
from trace_envs.multihop_qa.retrieval import format_passages, make_retriever
from trace_envs.state import FinalAnswer, FormatError, ToolCall, Turn


def searched(query, observation, error=False):
    return Turn(f"I look up {query}.", ToolCall("search", {"query": query}), observation, error)


def answer(question, *observations):
    turns = [searched(f"q{i}", text) for i, text in enumerate((*observations, "", "", "")[:MAX_SEARCHES])]
    thought, action = bm25_action(question, turns)
    assert isinstance(action, FinalAnswer) and thought
    return action.text


def test_it_begins_with_the_question():
    _, action = bm25_action("Who wrote Emma?", [])
    assert action == ToolCall("search", {"query": "Who wrote Emma?"})


def test_it_follows_up_with_a_name_of_the_passages():
    question = "Where was the author of Emma born?"
    found = "[1] Emma: Emma is a novel by the author Jane Austen.\n[2] Pea: A pea is green."
    _, action = bm25_action(question, [searched(question, found)])
    assert action == ToolCall("search", {"query": "Jane Austen"})


@pytest.mark.parametrize(
    ("question", "observation", "expected"),
    [
        ("In what year was Ruby Hall built?", "[1] Ruby Hall: Ruby Hall was built in 1871.", "1871"),
        ("When was Ann Lee born?", "[1] Ann Lee: Ann Lee (born 3 May 1901) sang. She sang in 1950.", "3 May 1901"),
        ("How many people live in Osk?", "[1] Osk: In Osk live 1,204 people.", "1,204"),
        ("Who founded Osk?", "[1] Osk: Osk was founded by Bo Renn.", "Bo Renn"),
        (
            "Which film came out first, Blue Sky or Red Sea?",
            "[1] Blue Sky: A film of 1990.\n[2] Red Sea: A film of 1970.",
            "Red Sea",
        ),
        ("Are Rose and Tulip both plants?", "[1] Rose: Roses are plants.\n[2] Tulip: Tulips are plants.", "yes"),
        ("Are Rose and Basalt both plants?", "[1] Rose: Roses are plants.\n[2] Basalt: A dark rock.", "no"),
    ],
)
def test_answers_by_type(question, observation, expected):
    assert answer(question, observation) == expected


def test_it_answers_when_nothing_was_found():
    assert answer("Who?") == "unknown"
    assert isinstance(bm25_action("Who?", [Turn("?", FormatError("no"), "Error: no", True)] * 5)[1], FinalAnswer)


observations = st.one_of(st.text(max_size=80), st.just("[1] A B: The C D of E. In 1999 it was.\n[2] X: y"))


@given(st.text(max_size=200), st.lists(st.tuples(st.text(max_size=20), observations, st.booleans()), max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_text_gets_an_action_within_the_bound(question, found):
    turns = [searched(*turn) for turn in found]
    _, action = bm25_action(question, turns)
    assert bm25_action(question, turns)[1] == action
    if len(turns) >= MAX_SEARCHES:
        assert isinstance(action, FinalAnswer)


@pytest.mark.data
def test_hotpotqa_is_answered_now_and_then(data_dir):
    data = load_dataset("hotpotqa", data_path=data_dir / "hotpotqa" / "hotpotqa_train_200.jsonl")
    index = make_retriever("bm25", [f"{p.title} {p.text}" for p in data.passages])
    right = 0
    for task in data.tasks:
        turns: list[Turn] = []
        while isinstance((step := bm25_action(task.prompt, turns))[1], ToolCall):
            found, _ = index.search(step[1].arguments["query"], 3)
            text = format_passages([data.passages[i] for i in found])
            turns.append(Turn(step[0], step[1], text, not text))
        right += exact_match(step[1].text, task.answers)
    assert 0.1 < right / len(data.tasks) < 0.6
