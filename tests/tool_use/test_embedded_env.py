import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import trace_envs
from trace_envs.conversation import text_of
from trace_envs.state import FinalAnswer, ToolCall, ToolCalls
from trace_envs.tool_use import ToolUseEnv

ENV_ID = "TraceToolUse-v0"
FORMATS = ("hermes", "react", "tags")
CATEGORIES = ("files", "messages", "calendar", "shop")


def follow(env, rng, noise=0.0):
    """Lets the oracle finish the episode."""
    while not env.state.done:
        env.step(env.write(*env.oracle(env.state, rng, noise)))
    return env.state.outcome


def begin(env, task_id):
    env.reset(seed=0, options={"task_id": task_id})
    return env


@pytest.mark.parametrize("action_format", FORMATS)
def test_it_is_an_environment_like_any_other(action_format):
    env = gym.make(ENV_ID, action_format=action_format, disable_env_checker=True)
    check_env(env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize("category", CATEGORIES)
def test_snapshots_are_exact(category):
    report = trace_envs.check_snapshot(gym.make(ENV_ID, category=category, disable_env_checker=True))
    assert report.passed


@pytest.mark.parametrize("make", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_vectors(make):
    envs = make([lambda: gym.make(ENV_ID, split="test")] * 2)
    first, info = envs.reset(seed=3)
    again, _ = envs.reset(seed=3)
    assert first == again and len(info["task_id"]) == 2
    envs.step(("hello", "hello"))
    envs.close()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("action_format", FORMATS)
def test_the_oracle_solves_every_task(split, action_format):
    env = ToolUseEnv(split=split, action_format=action_format)
    rng = np.random.default_rng(0)
    for i, task_id in enumerate(env.task_ids()[:480]):
        outcome = follow(begin(env, task_id), rng, noise=0.3 * (i % 2))
        assert outcome.is_correct, text_of(env.state)
        assert set(outcome.components.values()) == {1.0}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 599), st.integers(0, 2**32 - 1))
def test_after_a_mistake_the_oracle_goes_on_from_where_it_stands(number, seed):
    """Look-ups of one's own between the oracle's calls change nothing of what has to be done."""
    env = ToolUseEnv(split="test")
    rng = np.random.default_rng(seed)
    begin(env, env.task_ids()[number])
    listing = {"files": "list_files", "messages": "list_messages", "calendar": "list_events", "shop": "check_stock"}
    while not env.state.done:
        act = env.oracle(env.state, rng)
        if rng.random() < 0.3:
            tool = listing[env.state.task.category]
            argument = {"calendar": {"day": "Monday"}, "files": {"folder": "nowhere"}, "shop": {"item": "nothing"}}
            lookup = ToolCall(tool, argument.get(env.state.task.category, {"sender": "nobody"}))
            act = ("", lookup)
        env.step(env.write(*act))
    # An agent that looks around too long runs out of turns, and only then it fails.
    assert env.state.outcome.is_correct or env.state.truncated


@pytest.mark.parametrize("number", range(24))
def test_doing_nothing_or_too_much_fails(number):
    env = ToolUseEnv(split="validation")
    task_id = env.task_ids()[number]
    begin(env, task_id)
    if not any(turn.steps for turn in env.state.task.turns):
        pytest.skip("nothing has to be done in this task")
    while not env.state.done:
        env.step("<answer>Done.</answer>")
    assert not env.state.outcome.is_correct

    begin(env, task_id)
    extra = {
        "files": ToolCall("make_folder", {"folder": "Extra"}),
        "messages": ToolCall("add_contact", {"name": "Extra", "number": 1}),
        "calendar": ToolCall("add_event", {"title": "Extra", "day": "Monday", "hour": 9}),
        "shop": ToolCall("add_credit", {"customer": "Extra", "amount": 1}),
    }[env.state.task.category]
    tools = {tool["function"]["name"] for tool in env.tools_at(env.state)}
    if extra.name not in tools:
        pytest.skip("the tool is withheld in this task")
    env.step(env.action_format.render("", extra))
    assert not follow(env, np.random.default_rng(0)).is_correct


def test_what_was_asked_must_be_said_and_looked_up():
    env = ToolUseEnv(split="test", category="calendar")
    asked = next(
        t for t in map(env.suite.task, env.task_ids()) if t.level == 1 and t.turns[0].mention and "When" in t.prompt
    )
    answer = asked.turns[0].reply
    guess = begin(env, asked.task_id)
    guess.step(f"<answer>{answer}</answer>")
    assert not guess.state.outcome.is_correct and guess.state.outcome.components["state_match"] == 1.0
    silent = begin(env, asked.task_id)
    silent.step(silent.action_format.render("", asked.turns[0].steps[0].call))
    silent.step("<answer>I know it now.</answer>")
    assert not silent.state.outcome.is_correct
    assert follow(begin(env, asked.task_id), np.random.default_rng(0)).is_correct


def test_words_without_a_call_are_a_reply():
    env = begin(ToolUseEnv(split="test", category="files"), "files-3-0")
    turns = env.state.task.turns
    env.step("I will not do it.")
    assert env.observation() == turns[1].message and not env.state.done
    assert env.state.world.user_turn == 1
    assert env.messages()[-1] == {"role": "user", "content": turns[1].message}


def test_withheld_tools_come_later_with_their_schema():
    env = ToolUseEnv(split="train", category="files")
    task = next(t for t in map(env.suite.task, env.task_ids()) if any(turn.withheld for turn in t.turns))
    number = next(i for i, turn in enumerate(task.turns) if turn.withheld)
    (tool,) = task.turns[number].withheld[:1]
    _, info = env.reset(seed=0, options={"task_id": task.task_id})
    assert tool not in {t["function"]["name"] for t in info["tools"]}
    assert f'"{tool}"' not in info["messages"][0]["content"]
    rng = np.random.default_rng(0)
    given = []
    while not env.state.done:
        names = {t["function"]["name"] for t in env.tools_at(env.state)}
        given.append(tool in names)
        if tool not in names:
            after = env.advance(env.state, env.action_format.render("", ToolCall(tool, {"folder": "a", "name": "b"})))
            assert after.history.turn.error and "Unknown tool" in after.history.turn.observation
            assert after.world == env.state.world
        env.step(env.write(*env.oracle(env.state, rng)))
    assert given == sorted(given) and given[-1]
    assert env.state.outcome.is_correct


def test_several_calls_in_one_turn():
    env = begin(ToolUseEnv(split="test", category="files"), "files-1-0")
    calls = ToolCalls(
        (
            ToolCall("make_folder", {"folder": "One"}),
            ToolCall("make_folder", {"folder": "One"}),
            ToolCall("list_files", {"folder": "One"}),
        )
    )
    env.step(env.action_format.render("Make it.", calls))
    turn = env.state.history.turn
    assert turn.action == calls and turn.error
    assert turn.results == ("made One", "Error: there is a folder One already", "empty")
    assert env.observation() == "\n".join(turn.results)
    assert [m["content"] for m in env.messages()[-3:]] == list(turn.results)
    assert {m["role"] for m in env.messages()[-3:]} == {"tool"}
    assert env.state.tool_calls == 3 and env.state.tool_errors == 1 and env.state.turn == 1
    one = ToolUseEnv(split="test", category="files", calls_per_turn=1)
    begin(one, "files-1-0").step(env.action_format.render("", calls))
    assert "give exactly one" in one.observation() and one.state.world.results == ()


def test_a_branch_shares_what_it_does_not_change():
    env = begin(ToolUseEnv(split="test", category="files"), "files-6-0")
    before = env.state.world.data["folders"]
    env.step(env.action_format.render("", ToolCall("make_folder", {"folder": "New"})))
    after = env.state.world.data["folders"]
    assert "New" in after and "New" not in before
    assert all(after[name] is files for name, files in before.items())


def test_snapshots_go_through_bytes_and_pickle():
    env = begin(ToolUseEnv(split="test"), "calendar-6-0")
    rng = np.random.default_rng(0)
    for _ in range(4):
        env.step(env.write(*env.oracle(env.state, rng)))
    snap = env.snapshot()
    other = ToolUseEnv(split="test")
    for copy in (pickle.loads(pickle.dumps(snap)), trace_envs.EnvSnapshot.from_bytes(snap.to_bytes())):
        assert copy.digest == snap.digest
        other.restore(copy)
        assert other.state == env.state
        assert follow(other, np.random.default_rng(1)).is_correct


def test_gold_is_never_shown_before_the_end():
    env = ToolUseEnv(split="test", category="files")
    _, info = env.reset(seed=0, options={"task_id": "files-6-0"})
    assert "is_correct" not in info and "turns" not in info
    text = str(info)
    assert all(turn.message not in text for turn in env.state.task.turns[1:])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"suite": "bfcl"}, "unknown suite 'bfcl'; known: embedded, bfcl-v4"),
        (
            {"category": "bank"},
            "unknown category 'bank' of the embedded suite; known: files, messages, calendar, shop, all",
        ),
        ({"split": "dev"}, "unknown split 'dev' of the embedded suite; known: train, validation, test"),
        ({"calls_per_turn": 0}, "calls_per_turn must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(ValueError, match=error.replace("(", r"\(")):
        ToolUseEnv(**arguments)


def test_unknown_task():
    with pytest.raises(ValueError, match="unknown task_id 'files-9-0'"):
        begin(ToolUseEnv(), "files-9-0")


def test_tasks_are_a_function_of_the_seed_and_names_of_the_split():
    one, same, other = (ToolUseEnv(split="test", dataset_seed=seed) for seed in (0, 0, 1))
    ids = one.task_ids()[:50]
    assert [one.suite.task(i) for i in ids] == [same.suite.task(i) for i in ids]
    assert all(one.suite.task(i) != other.suite.task(i) for i in ids)
    with pytest.raises(ValueError, match="suite_digest"):
        begin(other, ids[0]).restore(begin(one, ids[0]).snapshot())


def test_levels_need_more_and_more_turns():
    env = ToolUseEnv(split="test")
    rng = np.random.default_rng(0)
    turns = {level: [] for level in range(1, 7)}
    for task_id in env.task_ids()[:240]:
        follow(begin(env, task_id), rng)
        turns[env.level_of(env.state.task)].append(env.state.turn)
    means = [np.mean(turns[level]) for level in range(1, 7)]
    assert means == sorted(means) and means[-1] > 5 * means[0]


TEXTS = st.one_of(
    st.text(max_size=80),
    st.sampled_from(
        ["<tool_call>", "</tool_call>", '<tool_call>{"name": "find_file"}</tool_call>', "<answer></answer>"]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=12), st.integers(0, 599))
def test_whatever_a_model_writes_is_an_observation(texts, number):
    env = ToolUseEnv(split="test")
    begin(env, env.task_ids()[number])
    for text in texts:
        if env.state.done:
            break
        _, reward, _, _, info = env.step(text)
        assert 0.0 <= reward <= 1.0 and isinstance(info["messages"], list)


def test_render():
    env = ToolUseEnv(split="test", render_mode="ansi")
    begin(env, "shop-1-0")
    env.step(env.action_format.render("", FinalAnswer("Hello.")))
    assert "Hello." in env.render()
