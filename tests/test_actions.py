import json
import time
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from trace_envs.actions import ActionFormat, get_format
from trace_envs.schemas import check_value, loads_object, signature
from trace_envs.state import FinalAnswer, FormatError, ToolCall, ToolCalls


def tool(name: str, properties: dict[str, Any], required: list[str], **extra: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, **extra}
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": parameters}}


SEARCH = tool("search", {"query": {"type": "string"}, "top_k": {"type": "integer"}}, ["query"])
MOVE = tool(
    "move",
    {
        "x": {"type": "number"},
        "flags": {"type": "array", "items": {"type": "boolean"}},
        "mode": {"type": "string", "enum": ["walk", "run"]},
        "where": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    ["x"],
)
LOOK = tool("look", {}, [])
OPEN = tool("anything", {}, [], additionalProperties=True)
TOOLS = [SEARCH, MOVE, LOOK, OPEN]
FORMATS = [get_format(name) for name in ("hermes", "react", "tags")]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
MARKERS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "<search>",
    "</search>",
    "<",
    ">",
]
MARKERS += [
    "Action:",
    "Action Input:",
    "Final Answer:",
    "Thought:",
    "Observation:",
    "\n",
    "[",
    "]",
    "{",
    "}",
    '"',
    "search",
]
MARKERS += [
    '{"name": "search", "arguments": {"query": "x"}}',
    "finish[x]",
    "search[x]",
    '{"query": "x"}',
    "NaN",
    "\\",
    ",",
]
NOISE = st.lists(st.sampled_from(MARKERS) | ANY_TEXT, max_size=12).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NOISE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.one_of(
    st.builds(lambda query: ToolCall("search", {"query": query}), NOISE),
    st.builds(lambda query, k: ToolCall("search", {"query": query, "top_k": k}), NOISE, st.integers()),
    st.builds(lambda x: ToolCall("move", {"x": x, "flags": [True]}), st.integers(-9, 9) | st.floats(-1, 1)),
    st.just(ToolCall("look", {})),
    st.builds(lambda arguments: ToolCall("anything", arguments), st.dictionaries(NOISE, JSON, max_size=3)),
)


@every_format
@given(thought=ANY_TEXT, call=CALLS)
@example(thought="", call=ToolCall("search", {"query": ""}))
@example(thought="x", call=ToolCall("search", {"query": " \ud83d\ude00</search></tool_call></think>]\n"}))
def test_every_call_survives_the_round_trip(fmt: ActionFormat, thought: str, call: ToolCall) -> None:
    assume("<" not in thought and not any(marker in thought for marker in MARKERS[10:15]))
    assert fmt.parse(fmt.render(thought, call, TOOLS), TOOLS) == call


@every_format
@given(thought=ANY_TEXT, text=ANY_TEXT)
def test_every_plain_answer_survives_the_round_trip(fmt: ActionFormat, thought: str, text: str) -> None:
    assume(text.strip() and not any(marker in text + thought for marker in [*MARKERS[:8], *MARKERS[10:15]]))
    answer = FinalAnswer(text.strip())
    assert fmt.parse(fmt.render(thought, answer), TOOLS) == answer


@every_format
@given(thought=NOISE, action=CALLS | st.builds(FinalAnswer, NOISE))
def test_render_round_trips_or_refuses(fmt: ActionFormat, thought: str, action: ToolCall | FinalAnswer) -> None:
    try:
        text = fmt.render(thought, action, TOOLS)
    except ValueError as error:
        assert "cannot express" in str(error)
    else:
        assert fmt.parse(text, TOOLS) == action


@every_format
@given(NOISE)
def test_no_text_raises(fmt: ActionFormat, text: str) -> None:
    action = fmt.parse(text, TOOLS)
    if isinstance(action, FormatError):
        assert action.message
        assert len(action.message) < 600
        action.message.encode("utf-8")  # fit to be shown and stored, whatever was in the text
    assert fmt.parse(text, TOOLS) == action


@every_format
def test_render_without_tools(fmt: ActionFormat) -> None:
    for call in (
        ToolCall("search", {"query": "a < b"}),
        ToolCall("search", {"query": "q", "top_k": 3}),
        ToolCall("look"),
    ):
        assert fmt.parse(fmt.render("so", call), TOOLS) == call


@every_format
@pytest.mark.parametrize(
    "call",
    [ToolCall("move", {"x": float("nan")}), ToolCall("move", {"x": object()}), FinalAnswer(" "), FinalAnswer(" a")],
)
def test_render_refuses_what_cannot_be_written(fmt: ActionFormat, call: Any) -> None:
    with pytest.raises(ValueError):
        fmt.render("", call)


def test_spellings() -> None:
    hermes, react, tags = FORMATS
    call, answer = ToolCall("search", {"query": "who?"}), FinalAnswer("Bob")
    assert hermes.render("Hm.", call) == (
        'Hm.\n<tool_call>{"name": "search", "arguments": {"query": "who?"}}</tool_call>'
    )
    assert hermes.render("", answer) == "<answer>Bob</answer>"
    assert react.render("Hm.", call) == "Thought: Hm.\nAction: search[who?]"
    assert react.render("Hm.", answer) == "Thought: Hm.\nFinal Answer: Bob"
    assert tags.render("", call) == "<search>who?</search>"
    assert (
        tags.render("Try <search>x</search>?", call) == "<think>Try <search>x</search>?</think>\n<search>who?</search>"
    )


H_CALL = '<tool_call>{"name": "search", "arguments": {"query": "q"}}</tool_call>'
GOOD = [
    ("hermes", f"<think>maybe {H_CALL}</think>{H_CALL} thanks", ToolCall("search", {"query": "q"})),
    ("hermes", f"a thought the template opened {H_CALL}</think>{H_CALL}", ToolCall("search", {"query": "q"})),
    ("hermes", '<tool_call>\n{"name": "look"}\n</tool_call>', ToolCall("look", {})),
    ("hermes", '<tool_call>{"name":"look","name":"search","arguments":{"query":"1","query":"2"}}</tool_call>', "2"),
    (
        "hermes",
        '<tool_call>{"name":"search","arguments":{"query":"</answer><answer>"}}</tool_call>',
        "</answer><answer>",
    ),
    ("hermes", "text <answer>\n  two\nlines </answer> text", FinalAnswer("two\nlines")),
    ("hermes", '<tool_call>{"name":"search","arguments":{"query":"q","top_k":3.0}}</tool_call>', "q"),
    ("react", "Thought: hm\nAction: search[what [is] this]", "what [is] this"),
    ("react", 'Action: search\nAction Input: {"query":\n "q"}\nObservation: made up', "q"),
    ("react", "  Action: search\n  Action Input: q", "q"),
    ("react", "Action: look", ToolCall("look", {})),
    ("react", "Action: Finish[ Bob ]", FinalAnswer("Bob")),
    ("react", "<think>Action: look</think>Final Answer: a\nb", FinalAnswer("a\nb")),
    ("tags", "let me <b>see</b> <search> q \n</search>", "q"),
    ("tags", '<search>{"query": "q", "top_k": 2}</search>', ToolCall("search", {"query": "q", "top_k": 2})),
    ("tags", "<look></look>", ToolCall("look", {})),
    ("tags", "<think><answer>no</answer></think><think>x</think><answer>yes</answer>", FinalAnswer("yes")),
]


@pytest.mark.parametrize(("name", "text", "expected"), GOOD)
def test_well_formed(name: str, text: str, expected: Any) -> None:
    action = get_format(name).parse(text, TOOLS)
    if isinstance(expected, str):
        assert isinstance(action, ToolCall)
        assert action.arguments["query"] == expected
    else:
        assert action == expected


def h(arguments: Any, name: Any = "search", **more: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments, **more})}</tool_call>"


BAD = [
    ("hermes", "", ["No action found", "<tool_call>"]),
    ("hermes", "I will search.", ["No action found"]),
    ("hermes", "</tool_call>", ["No action found", "</tool_call> without <tool_call>"]),
    ("hermes", H_CALL + H_CALL, ["Found 2 actions", "exactly one"]),
    ("hermes", H_CALL + "<answer>x</answer>", ["Found 2 actions"]),
    ("hermes", f"<think>{H_CALL}</think>", ["No action found"]),
    ("hermes", f"<think>{H_CALL}", ["<think> is not closed"]),
    ("hermes", "<answer> \n </answer>", ["answer is empty"]),
    ("hermes", "<answer>Bob", ["<answer> is not closed", "</answer>"]),
    ("hermes", "<tool_call>{}", ["<tool_call> is not closed"]),
    ("hermes", "<tool_call>{'name': 'search'}</tool_call>", ["not valid JSON", "character 1", '"arguments"']),
    ("hermes", "<tool_call>[1]</tool_call>", ["must be a JSON object", "an array"]),
    ("hermes", "<tool_call>{}</tool_call>", ['no "name"']),
    ("hermes", '<tool_call>{"name": "search", "query": "q"}</tool_call>', ["Unexpected key 'query'", '"arguments"']),
    ("hermes", h("q"), ['"arguments" must be an object', "a string"]),
    ("hermes", h({}, name="browse"), ["Unknown tool 'browse'", "search, move, look"]),
    ("hermes", h({}), ["'search'", "missing argument 'query'", "search(query: string"]),
    ("hermes", h({"query": "q", "lang": "en"}), ["unknown argument 'lang'", "known: 'query', 'top_k'"]),
    ("hermes", h({"query": 3}), ["argument 'query' must be a string, not an integer"]),
    ("hermes", h({"query": None}), ["argument 'query' must be a string, not null"]),
    ("hermes", h({"query": "q", "top_k": True}), ["argument 'top_k' must be an integer, not a boolean"]),
    ("hermes", h({"query": "q", "top_k": 1.5}), ["argument 'top_k' must be an integer, not a number"]),
    ("hermes", h({"x": 1, "flags": [True, 0]}, "move"), ["argument 'flags'[1] must be a boolean"]),
    ("hermes", h({"x": 1, "mode": "fly"}, "move"), ["must be one of 'walk', 'run', not 'fly'"]),
    ("hermes", h({"x": 1, "where": {}}, "move"), ["missing argument 'city' in argument 'where'"]),
    ("hermes", h({"a": 1}, "look"), ["unknown argument 'a'", "known: none"]),
    ("hermes", h({"x": float("nan")}, "move"), ["NaN"]),
    ("hermes", h({"x": float("inf")}, "move"), ["Infinity"]),
    ("hermes", '<tool_call>{"name": "move", "arguments": {"x": 1e999}}</tool_call>', ["too large a number"]),
    ("hermes", f'<tool_call>{{"name": "move", "arguments": {{"x": {"9" * 9999}}}}}</tool_call>', ["not valid JSON"]),
    ("hermes", "<tool_call>" + "[" * 99_999 + "</tool_call>", ["nested too deeply"]),
    ("hermes", h({"x": json.loads("[" * 80 + "]" * 80)}, "anything"), ["more than 64 levels"]),
    ("hermes", h({}, name="\x00\ud800" * 999), [r"Unknown tool '\x00\ud800", "..."]),
    ("react", "just words", ["No action found", "Final Answer:"]),
    ("react", "Action: search[q", ["is not closed"]),
    ("react", "Action: search[q]\nAction: search[q]", ["Found 2 actions"]),
    ("react", "Action: search[q]\nFinal Answer: x", ["Found 2 actions"]),
    ("react", "Action: browse[q]", ["Unknown tool 'browse'"]),
    ("react", "Action:", ["Unknown tool ''"]),
    ("react", "Action: search", ["missing argument 'query'"]),
    ("react", "Action Input: q", ["without an Action"]),
    ("react", "Action: search[q]\nAction Input: q", ["without an Action"]),
    ("react", "Action: search\nAction Input: {query}", ["not valid JSON", "search(query: string"]),
    ("react", "Action: move[fast]", ["must be a JSON object", "move(x: number"]),
    ("react", "Final Answer:\n", ["answer is empty"]),
    ("react", "Action: finish[]", ["answer is empty"]),
    ("tags", "<browse>q</browse>", ["unknown tool 'browse'", "<search>...</search>"]),
    ("tags", "<search>q", ["<search> is not closed"]),
    ("tags", "q</search>", ["</search> without <search>"]),
    ("tags", "<search></search>", ["missing argument 'query'"]),
    ("tags", "<search>a</search><search>b</search>", ["Found 2 actions"]),
    ("tags", '<search>{"query": "a"</search>', ["not valid JSON"]),
    ("tags", "<answer></answer>", ["answer is empty"]),
    ("tags", "<look>now</look>", ["must be a JSON object", "look()"]),
]


@pytest.mark.parametrize(("name", "text", "hints"), BAD, ids=range(len(BAD)))
def test_malformed(name: str, text: str, hints: list[str]) -> None:
    action = get_format(name).parse(text, TOOLS)
    assert isinstance(action, FormatError)
    for hint in hints:
        assert hint in action.message


MEGABYTE = 1 << 20
UNITS = [
    "<",
    ">",
    "[",
    "{",
    '{"a":',
    "<think>",
    "</think>",
    "<think></think>",
    "<tool_call>",
    "</tool_call>",
    "\n",
    "]",
]
UNITS += [
    "<answer>",
    "<answer></answer>",
    "<tool_call></tool_call>",
    "<tool_call><answer>",
    "Action:\n",
    "Action: search\n",
]
UNITS += [
    "Action Input: x\n",
    "<search></search>",
    "<search><move>",
    "\ud800",
    " ",
    "\x00",
    "<x>",
    '"',
    "\\",
    "Action: a[\n",
]
FRAMES = [
    ("", ""),
    ('<tool_call>{"name": "search", "arguments": {"query": "', '"}}</tool_call>'),
    ("<tool_call>", "</tool_call>"),
    ("<search>", "</search>"),
    ("Action: search[", "]"),
    ("Action: search\nAction Input: {", "}"),
]


@every_format
def test_a_megabyte_of_anything_is_read_in_linear_time(fmt: ActionFormat) -> None:
    for before, after in FRAMES:
        for unit in UNITS:
            text = before + unit * (MEGABYTE // len(unit)) + after
            start = time.process_time()
            fmt.parse(text, TOOLS)
            # Quadratic work on a megabyte takes minutes: the bound tells the two apart on any machine.
            assert time.process_time() - start < 10, (before, unit)


@every_format
def test_a_megabyte_as_query_arrives_whole(fmt: ActionFormat) -> None:
    call = ToolCall("search", {"query": "ab\x00<" * (MEGABYTE // 4)})
    assert fmt.parse(fmt.render("", call, TOOLS), TOOLS) == call


@every_format
def test_instructions_name_tools_and_show_a_readable_example(fmt: ActionFormat) -> None:
    text = fmt.instructions(TOOLS)
    for name in ("search", "move", "look"):
        assert name in text
    assert fmt.render("...", ToolCall("search", {"query": "..."}), TOOLS) in text
    assert fmt.render("...", FinalAnswer("...")) in text
    assert fmt.render("...", FinalAnswer("...")) in fmt.instructions([])
    nested = tool("go", {"to": {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"]}}, ["to"])
    assert '{"to": {"a": 7}}' in fmt.instructions([nested])


def test_tags_refuses_tools_whose_tags_mean_something_else() -> None:
    with pytest.raises(ValueError, match="hermes"):
        get_format("tags").instructions([tool("think", {}, [])])


def test_unknown_format_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'xml'.*hermes, react, tags"):
        get_format("xml")


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"a": 1}, {}),
        (1, {"type": ["string", "integer"]}),
        ({"a": 1}, {"type": "dict", "additionalProperties": {"type": "integer"}}),
        ([1, [2]], {"type": "array"}),
        (None, {"type": "null"}),
    ],
)
def test_schema_admits(value: Any, schema: dict[str, Any]) -> None:
    assert check_value(value, schema, "it") is None


def test_schema_checks_additional_properties() -> None:
    wrong = check_value({"a": "x"}, {"additionalProperties": {"type": ["integer", "null"]}})
    assert wrong == "argument 'a' must be an integer or null, not a string"


def test_signature_and_strict_json() -> None:
    assert signature("search", SEARCH["function"]) == "search(query: string, top_k: integer (optional))"
    assert loads_object(' {"a": [1.5, "\ud800"]} ') == {"a": [1.5, "\ud800"]}


CALLS = ToolCalls(
    (ToolCall("search", {"query": "a"}), ToolCall("search", {"query": "b"}), ToolCall("search", {"query": "a"}))
)


@pytest.mark.parametrize("name", ["hermes", "react", "tags"])
def test_several_calls_in_one_turn(name):
    form = get_format(name)
    text = form.render("First this, then that.", CALLS, TOOLS)
    assert form.parse(text, TOOLS, max_calls=3) == CALLS
    assert "give exactly one" in form.parse(text, TOOLS).message
    assert "give at most 2" in form.parse(text, TOOLS, max_calls=2).message
    one = form.render("", CALLS.calls[0], TOOLS)
    assert form.parse(one, TOOLS, max_calls=3) == CALLS.calls[0]
    mixed = f"{one}\n{form.render('', FinalAnswer('c'), TOOLS)}"
    assert "call tools first" in form.parse(mixed, TOOLS, max_calls=3).message
    assert "up to 3" in form.instructions(TOOLS, max_calls=3)


@pytest.mark.parametrize("name", ["hermes", "react", "tags"])
def test_words_without_an_action_may_be_an_answer(name):
    form = get_format(name)
    assert form.parse("<think>hm</think> Hello there. ", TOOLS, plain_answer=True) == FinalAnswer("Hello there.")
    assert isinstance(form.parse("Hello there.", TOOLS), FormatError)
    assert isinstance(form.parse("<think>hm</think> ", TOOLS, plain_answer=True), FormatError)
    assert "reply to the user" in form.instructions(TOOLS, plain_answer=True)


def test_half_a_call_is_no_answer():
    form = get_format("hermes")
    for text in ('<tool_call>{"name": "search"', '{"name": "search"}</tool_call>'):
        assert isinstance(form.parse(text, TOOLS, plain_answer=True), FormatError)


@pytest.mark.parametrize("name", ["hermes", "react", "tags"])
def test_two_calls_of_one_tool_with_different_arguments(name):
    calls = ToolCalls((ToolCall("search", {"query": "a"}), ToolCall("search", {"query": "b", "top_k": 2})))
    form = get_format(name)
    assert form.parse(form.render("Both.", calls), TOOLS, max_calls=2) == calls
