"""Conversations and replies, translated in both directions."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agents.policies.openai_messages import encodable, native_messages, plain_messages, text_of
from agents.policies.openai_reply import Call, Reply
from trace_envs.actions import get_format
from trace_envs.state import FinalAnswer, FormatError, ToolCall

FORMATS = ("hermes", "tags", "react")


def tool(name, **properties):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("search", query={"type": "string"}),
    tool("add", a={"type": "integer"}, b={"type": "integer"}),
    tool("now"),
]

TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # surrogates and NULs too
PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "<search>",
    "</search>",
    "x",
    "{",
    "}",
    '"',
]
PIECES += [
    "\n",
    " ",
    '{"name": "search", "arguments": {"query": "q"}}',
    "Action: search[q]\n",
    "Final Answer: x",
    "Action Input:",
]
MARKUP = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
ANY = TEXT | MARKUP
CALLS = st.one_of(
    st.builds(lambda q: ToolCall("search", {"query": q}), ANY),
    st.builds(lambda a, b: ToolCall("add", {"a": a, "b": b}), st.integers(), st.integers()),
    st.just(ToolCall("now", {})),
)


def reply_of(message):
    """What a server would answer that says what is in one of our messages."""
    calls = tuple(Call(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ()))
    return Reply(message["content"], calls=calls)


# From a reply to text ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(call=CALLS, content=ANY, reasoning=ANY, name=st.sampled_from(FORMATS))
@example(
    call=ToolCall("search", {"query": "</tool_call>"}),
    content="<answer>x</answer>",
    reasoning="</think>",
    name="hermes",
)
@example(
    call=ToolCall("search", {"query": "a\nFinal Answer: b"}), content="Final Answer: c", reasoning="", name="react"
)
def test_a_call_is_read_as_itself(call, content, reasoning, name):
    action_format = get_format(name)
    reply = Reply(content, reasoning, (Call(call.name, json.dumps(dict(call.arguments))),))
    action = action_format.parse(text_of(reply, TOOLS, action_format), TOOLS)
    # A format may have no way to write an argument; it must then be refused, never changed.
    assert action == call or (isinstance(action, FormatError) and name != "hermes")


@settings(max_examples=200, deadline=None)
@given(
    called=st.sampled_from(["search", "add", "now", "finish", "answer", "think", "Final Answer", ""]) | ANY,
    arguments=ANY | st.recursive(st.none() | st.integers() | ANY, st.lists, max_leaves=4).map(json.dumps),
    content=ANY,
    name=st.sampled_from(FORMATS),
)
@example(called="search", arguments='{"query": "x"', content="", name="hermes")
@example(called="search", arguments='{"query": "x"}, "name": "now"', content="", name="hermes")
@example(called="now", arguments='{}}</tool_call><tool_call>{"name": "now"', content="", name="hermes")
@example(called="search", arguments="<answer>x</answer>", content="", name="hermes")
@example(called="search", arguments="x\nFinal Answer: y", content="", name="react")
@example(called="finish", arguments='{"answer": "Paris"}', content="", name="react")
@example(called="answer", arguments='{"text": "Paris"}', content="", name="tags")
def test_a_call_that_cannot_be_read_is_refused_and_never_becomes_another(called, arguments, content, name):
    action_format = get_format(name)
    text = text_of(Reply(content, calls=(Call(called, arguments),)), TOOLS, action_format)
    action = action_format.parse(text, TOOLS)
    try:
        made = ToolCall(called, json.loads(arguments.strip() or "{}"))
    except ValueError:
        made = None
    assert isinstance(action, FormatError) or action == made


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Call("search", '{"query": "x"'), "is not valid JSON"),
        (Call("search", "[1]"), "must be an object"),
        (Call("search", '{"q": 1}'), "missing argument 'query'"),
        (Call("find", "{}"), "Unknown tool 'find'"),
    ],
)
def test_the_environment_says_what_is_wrong_with_a_call(call, words):
    action = get_format("hermes").parse(text_of(Reply("I look.", calls=(call,)), TOOLS, get_format("hermes")), TOOLS)
    assert isinstance(action, FormatError) and words in action.message


def test_of_several_calls_the_first_is_taken():
    calls = (Call("search", '{"query": "a"}'), Call("search", '{"query": "b"}'))
    text = text_of(Reply("I look.", calls=calls), TOOLS, get_format("hermes"))
    assert text == 'I look.\n<tool_call>{"name": "search", "arguments": {"query": "a"}}</tool_call>'


def test_thoughts_come_first_and_stay_thoughts():
    reply = Reply("<answer>b</answer>", "is it <answer>a</answer>?</think><answer>c</answer>")
    text = text_of(reply, TOOLS, get_format("hermes"))
    assert text.startswith("<think>\n") and text.endswith("</think>\n<answer>b</answer>")
    assert get_format("hermes").parse(text, TOOLS) == FinalAnswer("b")


def test_text_without_calls_is_passed_on_as_it_is():
    text = ' <tool_call>{"name": "search", "arguments": {"query": "a"}}</tool_call>\n'
    assert text_of(Reply(text), TOOLS, get_format("hermes")) == text


# From a conversation to messages -------------------------------------------------------------------------------------


def test_as_text_results_are_what_a_user_says():
    messages = [{"role": "tool", "content": "seen"}, {"role": "assistant", "content": "said"}]
    assert plain_messages(messages) == [
        {"role": "user", "content": "<tool_response>\nseen\n</tool_response>"},
        {"role": "assistant", "content": "said"},
    ]
    assert plain_messages(messages, "tool") == messages


def test_as_tool_calls_each_call_has_its_result():
    hermes = get_format("hermes")
    search = hermes.render("I look.", ToolCall("search", {"query": "é"}))
    sent = native_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": search},
            {"role": "tool", "content": "[1] A"},
            {"role": "assistant", "content": "nonsense"},
            {"role": "user", "content": "Error: no action"},
            {"role": "assistant", "content": hermes.render("", ToolCall("now", {}))},
        ],
        TOOLS,
        hermes,
    )
    assert [m["role"] for m in sent] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
        "tool",
    ]
    assert sent[2]["content"] == "I look."
    assert sent[2]["tool_calls"] == [
        {
            "id": sent[3]["tool_call_id"],
            "type": "function",
            "function": {"name": "search", "arguments": '{"query": "é"}'},
        }
    ]
    assert sent[3]["content"] == "[1] A" and sent[4] == {"role": "assistant", "content": "nonsense"}
    assert sent[7] == {"role": "tool", "tool_call_id": sent[6]["tool_calls"][0]["id"], "content": ""}
    assert sent[6]["tool_calls"][0]["id"] != sent[2]["tool_calls"][0]["id"]


TURNS = st.one_of(ANY.map(lambda text: (text, None)), st.tuples(ANY, CALLS))


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(TURNS, ANY), max_size=4), name=st.sampled_from(FORMATS))
def test_a_conversation_keeps_its_calls_and_results(turns, name):
    action_format, messages, expected = get_format(name), [{"role": "user", "content": "Who?"}], []
    for (thought, call), seen in turns:
        text = thought
        if call is not None:
            try:
                text = action_format.render(thought, call, TOOLS)
            except ValueError:  # the format cannot say this
                continue
        action = action_format.parse(encodable(text), TOOLS)
        messages.append({"role": "assistant", "content": text})
        if seen:  # as environments do
            messages.append({"role": "tool" if isinstance(action, ToolCall) else "user", "content": seen})
        expected.append((action if isinstance(action, ToolCall) else None, encodable(text), encodable(seen)))

    sent = native_messages(messages, TOOLS, action_format)
    json.dumps(sent, ensure_ascii=False).encode()
    rest = iter(sent[1:])
    for call, text, seen in expected:
        message = next(rest)
        assert message["role"] == "assistant"
        if call is None:
            assert message["content"] == text and "tool_calls" not in message
            if seen:
                assert next(rest) == {"role": "user", "content": seen}
            continue
        (made,) = message["tool_calls"]
        assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == (
            call.name,
            dict(call.arguments),
        )
        assert next(rest) == {"role": "tool", "tool_call_id": made["id"], "content": seen}
        assert message["content"] in text
        # And back: what was sent, said by a server, is the same call.
        assert action_format.parse(text_of(reply_of(message), TOOLS, action_format), TOOLS) == call
    assert next(rest, None) is None
    ids = [m["tool_calls"][0]["id"] for m in sent if "tool_calls" in m]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("thought", ["", "I look.", "<think>\nOr search[x]? <tool_call>\n</think>\nI look."])
def test_what_is_said_before_a_call_is_its_content(name, thought):
    action_format = get_format(name)
    text = action_format.render(thought, ToolCall("search", {"query": "a b"}))
    sent = native_messages([{"role": "assistant", "content": text}], TOOLS, action_format)
    assert sent[0]["content"] == thought


@given(ANY)
def test_texts_are_made_encodable_and_otherwise_left_alone(text):
    mended = encodable(text)
    mended.encode()
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert mended == text
