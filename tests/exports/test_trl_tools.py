"""Environments' tools as TRL sees them."""

import inspect
import sys

import numpy as np
import pytest
import trl_games
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema
from trl_games import LOOKUP, TOOLS, tool

from agents.trl import environment_factory, episode_reward, trl_dataset
from trace_envs.multihop_qa.env import SEARCH_TOOL
from trace_envs.schemas import by_name, check_value
from trace_envs.state import FormatError, ToolCall


@pytest.fixture(scope="module", autouse=True)
def _games():
    trl_games.register()


def offered(episode):
    """The methods that the trainer lists, by its own rule."""
    names = [name for name, _ in inspect.getmembers(type(episode), predicate=inspect.isfunction)]
    return {n: getattr(episode, n) for n in names if n not in ("reset", "get_reward") and not n.startswith("_")}


def begun(env_id="Trip-v0", **kwargs):
    episode = environment_factory(env_id, **kwargs)()
    assert episode.reset(prompt=[{"role": "user", "content": "?"}], task_id="Ada", level=3) is None
    return episode


def last_turn(episode):
    return episode._env.unwrapped.state.history.turn


def test_the_tools_and_nothing_else_are_offered():
    search = offered(environment_factory("TraceMultiHopQA-v0")())
    assert list(search) == ["search"]
    assert str(inspect.signature(search["search"])) == "(*, query: str) -> str"
    derived = get_json_schema(search["search"])
    derived["function"]["parameters"]["additionalProperties"] = False  # the one thing that a signature cannot say
    assert derived == SEARCH_TOOL
    assert set(offered(begun())) == {"book", "pack-bag", "wait"}
    public = {name for name in dir(begun()) if not name.startswith("_")}
    assert public == {"book", "pack-bag", "wait", "reset", "total_reward", "is_correct", "info"}


def test_signatures_say_what_schemas_say():
    methods = offered(begun())
    functions = {name: get_json_schema(method)["function"] for name, method in methods.items()}
    assert [functions[f["function"]["name"]]["name"] for f in TOOLS] == ["book", "pack-bag", "wait"]
    book = functions["book"]["parameters"]
    assert functions["book"]["description"] == "Books a trip.\nReturns : a number."
    assert set(book["required"]) == {"days", "city"} and "return" not in functions["book"]
    assert book["properties"] == {
        "note": {"type": "string", "description": "The note."},
        "days": {"type": "integer", "description": "How long: in days (choices : [1])"},
        "city": {
            "type": "object",
            "description": 'The city. JSON schema: {"type": "object", "properties": {"name": {"type": "string"}, '
            '"zip": {"type": "integer"}}, "required": ["name"]}.',
        },
        "by": {"type": "string", "enum": ["train", "ship"], "description": "Means."},
        "price": {
            "type": "number",
            "nullable": True,
            "description": 'Most. JSON schema: {"type": ["number", "null"], "minimum": 0}.',
        },
    }
    assert functions["pack-bag"] == {
        "name": "pack-bag",
        "description": "The tool pack-bag.",
        "parameters": {
            "type": "object",
            "properties": TOOLS[1]["function"]["parameters"]["properties"],
            "required": ["things"],
        },
    }
    assert functions["wait"] == {
        "name": "wait",
        "description": "Does nothing.",
        "parameters": {"type": "object", "properties": {}},
    }


WORDS = st.text(st.sampled_from('ab é\n"\\<>/[]{}:\ud800'), max_size=8) | st.sampled_from(
    ["</book>", "<think>", "Action:"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.fixed_dictionaries(
    {"city": st.fixed_dictionaries({"name": WORDS}), "days": st.integers(0, 3)},
    optional={"note": WORDS, "by": st.sampled_from(["train", "ship"]), "price": st.none() | st.floats(0, 9)},
) | st.dictionaries(st.sampled_from(["city", "days", "note", "self", "x-y"]), VALUES, max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    arguments=ARGUMENTS, name=st.sampled_from(["book", "wait"]), spelling=st.sampled_from(["hermes", "tags", "react"])
)
def test_a_call_is_the_turn_that_it_would_be_as_text(arguments, name, spelling):
    """What the schema admits arrives as it is, in every action format; of the rest the environment says what is wrong."""
    episode = begun(action_format=spelling)
    said = getattr(episode, name)(**arguments)
    schema = by_name(TOOLS)[name]["parameters"]
    turn = last_turn(episode)
    assert episode.info["turn"] == 1
    if check_value(arguments, schema) is None:
        assert turn.action == ToolCall(name, arguments) and episode.info["tool_errors"] == 0
    else:
        assert isinstance(turn.action, FormatError) and episode.info["tool_errors"] == 1
        assert said.startswith(f"Error: {name!r}: ")
    said.encode()


def test_one_text_under_a_wrong_name_is_no_call():
    """Where a format takes bare text for the only argument, the name would not be looked at."""
    for spelling in ("hermes", "tags", "react"):
        episode = begun("Place-v0", action_format=spelling)
        assert "missing argument 'name'" in episode.lookup(who="Ada")
        assert episode.lookup(name="Ada") == "Ada is in Rome."


def test_what_json_cannot_say_is_an_error_text():
    episode = begun()
    assert episode.book(days=float("nan"), city={}).startswith("Error: ")
    assert episode.info["turn"] == 0


@pytest.mark.parametrize("max_turns", [1, 2])
def test_after_the_end_calls_are_answered_with_an_error(max_turns):
    episode = begun("Place-v0", max_turns=max_turns)
    assert [episode.lookup(name="Ada") for _ in range(max_turns)] == ["Ada is in Rome."] * max_turns
    assert episode.lookup(name="Ada") == "Error: the episode is over; no tool can be called any more."
    assert episode.info["turn"] == max_turns and episode.info["reward_components"] == {"em": 0.0}
    fresh = environment_factory("Place-v0")()
    assert fresh.lookup(name="Ada").startswith("Error: the episode is over")


def said(text, **more):
    return [{"role": "assistant", "content": text, **more}]


def test_the_last_message_without_a_call_is_the_answer():
    call = [{"type": "function", "function": {"name": "lookup", "arguments": {"name": "Ada"}}}]
    cases = [
        (said("<answer>Rome</answer>"), 1.0, True),
        (said("<think>Oslo?</think><answer>Rome</answer>"), 1.0, True),
        (said("<answer>Oslo</answer>"), 0.25, False),
        (said("It is Rome."), 0.0, False),  # no answer in the environment's format
        (said(""), 0.0, False),
        (said("<answer>Rome</answer>", tool_calls=call), 0.0, False),  # the call was never answered
        (said('<tool_call>{"name": "lookup", "arguments": {"name": "Ada"}}</tool_call>'), 0.0, False),
        (
            [*said("", tool_calls=call), {"role": "tool", "name": "lookup", "content": "<answer>Rome</answer>"}],
            0.0,
            False,
        ),
    ]
    episodes = [begun("Place-v0") for _ in cases]
    logged = []
    for _ in range(2):  # whoever asks twice is told the same
        rewards = episode_reward(
            completions=[messages for messages, _, _ in cases],
            environments=episodes,
            log_metric=lambda *metric: logged.append(metric),
            prompts=None,
        )
        assert rewards == [reward for _, reward, _ in cases]
    assert [episode.is_correct for episode in episodes] == [right for _, _, right in cases]
    assert logged == [("is_correct", 2 / len(cases))] * 2
    # Neither a call that the trainer did not make nor what is no answer was a turn.
    assert [episode.info["turn"] for episode in episodes] == [1, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="with rollout_func use environment_reward"):
        episode_reward(completions=[said("")], prompts=None)


def test_an_answer_to_an_episode_that_is_over_changes_nothing():
    episode = begun("Place-v0", max_turns=1)
    episode.lookup(name="Ada")
    assert episode_reward(completions=[said("<answer>Rome</answer>")], environments=[episode]) == [0.0]


def test_a_reset_begins_the_episode_of_the_row():
    episode = environment_factory("Place-v0")()
    assert episode.reset(task_id="Bob") == "Where is Bob?"  # what a row without a prompt lacks
    episode.lookup(name="Bob")
    assert episode_reward(completions=[said("<answer>Oslo</answer>")], environments=[episode]) == [1.0]
    assert episode.reset(prompt=[], task_id="Cem") is None
    assert (episode.total_reward, episode.is_correct, episode.info["task_id"], episode.info["turn"]) == (
        0,
        False,
        "Cem",
        0,
    )
    with pytest.raises(ValueError, match="no column task_id"):
        episode.reset(prompt=[])


def test_every_episode_has_randomness_of_its_own_by_the_seed():
    def keys(seed):
        make = environment_factory("Place-v0", seed=seed)
        episodes = [make() for _ in range(3)]
        found = []
        for episode in episodes * 2:
            episode.reset(task_id="Ada")
            found.append(episode._env.unwrapped.state.key)
        return found

    assert keys(0) == keys(0) and len({*keys(0), *keys(1)}) == 12


def test_training_data_are_the_tasks():
    data = trl_dataset("Place-v0", system_prompt="Look \ud800 up.")
    assert data.column_names == ["prompt", "task_id"] and data["task_id"] == list(trl_games.PLACES)
    assert data[1]["prompt"] == [
        {"role": "system", "content": "Look \N{REPLACEMENT CHARACTER} up."},
        {"role": "user", "content": "Where is Bob?"},
    ]
    assert trl_dataset("Place-v0", task_ids=["Dag", "Ada"])["task_id"] == ["Dag", "Ada"]


def test_training_data_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'trace-envs\[trl\]'"):
        trl_dataset("Place-v0")


@pytest.mark.parametrize(
    ("schemas", "message"),
    [
        ([], "has no tools"),
        ([tool("reset")], "tool named 'reset' cannot be offered"),
        ([tool("get_reward")], "tool named 'get_reward' cannot be offered"),
        ([tool("_hidden")], "tool named '_hidden' cannot be offered"),
        ([tool("go", "", (), **{"from": {"type": "string"}})], "'from' is not a valid parameter name"),
        ([tool("go", "", (), **{"top-k": {"type": "integer"}})], "'top-k' is not a valid parameter name"),
    ],
)
def test_tools_that_cannot_be_methods_are_refused(schemas, message):
    with pytest.raises(ValueError, match=message):
        environment_factory("OneTool-v0", schemas=schemas)


def test_environments_without_text_are_refused():
    with pytest.raises(ValueError, match="whose turns are text"):
        environment_factory("CartPole-v1")
    with pytest.raises(ValueError, match="whose turns are text"):
        trl_dataset("CartPole-v1")


KINDS = st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object", "file"])
TEXTS = st.text(st.sampled_from("ab:( )[]\n") | st.characters(categories=["L"]), max_size=12) | st.sampled_from(
    ["Args:\n  x: y", "Returns:", '(choices: ["a"])', "Raises: z", "a\n\nb: c"]
)
RULES = st.recursive(
    st.fixed_dictionaries(
        {},
        optional={"type": KINDS | st.lists(KINDS, min_size=1, max_size=3), "description": TEXTS, "minimum": st.just(1)},
    )
    | st.fixed_dictionaries({"enum": st.lists(st.integers() | TEXTS | st.none(), min_size=1, max_size=3)}),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries({"type": st.just("object"), "additionalProperties": inner})
        | st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(st.just("inner"), inner)})
    ),
    max_leaves=3,
)


@settings(max_examples=200, deadline=None)
@given(description=TEXTS, rules=st.dictionaries(st.sampled_from(["a", "b", "Args", "self_"]), RULES), data=st.data())
def test_any_schema_can_be_told(description, rules, data):
    """Names and needs are the tool's; what a hint cannot say of an argument is in its description, word for word."""
    required = data.draw(st.lists(st.sampled_from(sorted(rules)), unique=True)) if rules else []
    episode = environment_factory(
        "OneTool-v0", schemas=[tool("go", description, required, **rules)], system_prompt=""
    )()
    derived = get_json_schema(episode.go)["function"]
    parameters = derived["parameters"]
    assert derived["name"] == "go" and derived["description"] and set(parameters["properties"]) == set(rules)
    assert set(parameters.get("required", ())) == set(required)
    for name, rule in rules.items():
        kinds = rule.get("type", ())
        if set(rule) <= {"type", "description"} and kinds in (
            "string",
            "integer",
            "number",
            "boolean",
            "array",
            "object",
        ):
            assert parameters["properties"][name]["type"] == kinds
            assert "JSON schema" not in parameters["properties"][name]["description"]
        if {"minimum", "properties"} & set(rule):
            assert "JSON schema: {" in parameters["properties"][name]["description"]
    episode.reset(task_id="Ada")
    assert np.isscalar(episode.total_reward) and LOOKUP["function"]["name"] not in offered(episode)


def test_a_conversation_is_refused_and_mathematics_is_not():
    with pytest.raises(ValueError, match=r"'TraceToolUse-v0' is a conversation .* use rollout_func"):
        environment_factory("TraceToolUse-v0")
    episode = environment_factory("TraceMath-v0", category="linear")()
    episode.reset(task_id="linear-1-0")
    assert episode.calculator(expression="2 * 21") == "42"
    assert episode.python(code="x = 3\nx") == "3" and episode.python(code="x + 1") == "4"
