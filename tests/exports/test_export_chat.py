"""Conversations as lines of JSON, in both styles."""

import itertools
import json

import pytest
from export_forests import search_forest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import TypeAdapter

from allocation import Tree
from allocation.export import (
    append_chat,
    chat_line,
    fine_tuning_line,
    read_chat,
    rollout_records,
    write_chat,
    write_fine_tuning,
)
from trace_envs.actions import get_format
from trace_envs.jsonl import DamagedLogError
from trace_envs.state import ToolCall

FORMATS = ["hermes", "tags", "react"]


@pytest.fixture(scope="module", params=FORMATS)
def searched(request):
    return request.param, search_forest(request.param)


def test_files_give_back_the_messages(searched, tmp_path):
    _, forest = searched
    file = tmp_path / "chat.jsonl"
    write_chat(forest, file)
    records, lines = forest.rollouts(), read_chat(file)
    assert lines == [chat_line(record) for record in records]
    for record, line in zip(records, lines, strict=True):
        assert tuple(line["messages"]) == record.messages and tuple(line["tools"]) == record.tools
        metadata = line["metadata"]
        assert (metadata["task_id"], metadata["tree"], metadata["rollout"]) == (
            record.task_id,
            record.tree,
            record.rollout,
        )
        assert (metadata["reward"], metadata["is_correct"]) == (record.total_reward, record.is_correct)
        assert metadata["components"] == record.components and metadata["turns"] == len(record.rewards)
    text = file.read_text()
    assert "\N{SNOWMAN}" in text and text.count("\n") == len(lines) == forest.num_leaves


def test_a_torn_line_costs_one_record(searched, tmp_path):
    _, forest = searched
    records, file = forest.rollouts(), tmp_path / "chat.jsonl"
    write_chat(records, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.warns(RuntimeWarning, match="the last line is cut short"):
        assert read_chat(file) == [chat_line(record) for record in records[:-1]]
    with pytest.warns(RuntimeWarning, match="removed a last line that was cut short"):
        append_chat(records[:2], file)
    assert read_chat(file) == [chat_line(record) for record in [*records[:-1], *records[:2]]]
    file.write_bytes(whole[40:])
    with pytest.raises(DamagedLogError, match="line 1: not a JSON object"):
        read_chat(file)


def test_appending_starts_a_file(searched, tmp_path):
    _, forest = searched
    for tree in forest:
        append_chat(rollout_records([tree]), tmp_path / "appended.jsonl")
    write_chat(forest, tmp_path / "written.jsonl")
    assert (tmp_path / "appended.jsonl").read_bytes() == (tmp_path / "written.jsonl").read_bytes()


def test_fine_tuning_lines_are_openais(searched, tmp_path):
    name, forest = searched
    action_format, file = get_format(name), tmp_path / "tune.jsonl"
    messages_, tools_ = TypeAdapter(list[ChatCompletionMessageParam]), TypeAdapter(list[ChatCompletionToolParam])
    records = [record for record in forest.rollouts() if record.num_actions]
    assert write_fine_tuning(forest, file, action_format=name) == len(records)
    calls = 0
    for record, line in zip(records, read_chat(file), strict=True):
        assert set(line) == {"messages", "tools", "parallel_tool_calls"}
        messages = line["messages"]
        messages_.validate_python(messages)
        tools_.validate_python(line["tools"])
        assert messages[-1]["role"] == "assistant"
        said = [m for m in messages if m["role"] == "assistant"]
        texts = [m["content"] for m in record.messages if m["role"] == "assistant"]
        assert len(said) == len(texts) == record.num_actions and all(m["weight"] == 1 for m in said)
        for message, text in zip(said, texts, strict=True):
            action = action_format.parse(text, record.tools)
            if isinstance(action, ToolCall):
                (call,) = message["tool_calls"]
                assert call["function"]["name"] == action.name
                assert json.loads(call["function"]["arguments"]) == action.arguments
                calls += 1
            else:
                assert message["content"] == text and "tool_calls" not in message
        for before, after in itertools.pairwise(messages):
            assert ("tool_calls" in before) == (after["role"] == "tool")
            if after["role"] == "tool":
                assert after["tool_call_id"] == before["tool_calls"][0]["id"]
    assert calls > 10


@pytest.mark.parametrize("right", [False, True])
def test_once_weighs_every_turn_once(searched, right, tmp_path):
    name, forest = searched
    records = [record for record in forest.rollouts() if record.is_correct or not right]
    write_fine_tuning(records, tmp_path / "tune.jsonl", action_format=name, once=True)
    lines = read_chat(tmp_path / "tune.jsonl")
    weights = [m["weight"] for line in lines for m in line["messages"] if m["role"] == "assistant"]
    edges = {(record.tree, int(node)) for record in records for node in record.nodes[1:]}
    acted = sum(forest.trees[tree].nodes[node].sample.acted for tree, node in edges)
    assert 0 < sum(weights) == acted < len(weights)


def conversation(opening, **end):
    tree = Tree("q", 0, "")
    tree.root.messages = tuple(opening)
    tree.add(tree.root, 0, "root", "I say.", messages=(), terminated=True, is_correct=True, **end)
    return rollout_records([tree])[0]


def test_examples_in_the_prompt_are_not_trained():
    opening = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    line = fine_tuning_line(conversation(opening))
    assert [m.get("weight") for m in line["messages"]] == [None, 0, None, 1] and set(line) == {"messages"}


def test_what_is_not_finite_is_null(tmp_path):
    record = conversation([], reward=float("nan"), components={"f1": float("inf"), "em": 1.0})
    write_chat([record], tmp_path / "chat.jsonl")
    (line,) = read_chat(tmp_path / "chat.jsonl")
    assert line["metadata"]["reward"] is None and line["metadata"]["components"] == {"f1": None, "em": 1.0}


def test_what_cannot_be_trained_is_refused_in_one_sentence():
    picture = conversation([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(ValueError, match=r"has no text as its content .*; export such conversations by write_chat"):
        fine_tuning_line(picture)
    with pytest.raises(ValueError, match="unknown action format"):
        fine_tuning_line(conversation([]), action_format="xml")
    silent = next(r for r in search_forest().rollouts() if not r.num_actions)
    with pytest.raises(ValueError, match="has no action to learn from; leave it out"):
        fine_tuning_line(silent)
