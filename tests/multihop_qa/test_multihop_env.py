import json
import random
import re
import warnings
from collections.abc import Mapping

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import trace_envs
from trace_envs.multihop_qa import DATASETS, MultiHopQAEnv
from trace_envs.multihop_qa.env import MAX_QUERY_CHARS
from trace_envs.multihop_qa.oracle import oracle_action
from trace_envs.multihop_qa.synthetic.names import SPLITS
from trace_envs.state import FinalAnswer, ToolCall

ENV_ID = "TraceMultiHopQA-v0"
FORMATS = ("hermes", "react", "tags")
RUNNING = {"messages", "tools", "max_calls", "task_id", "turn", "tool_calls", "tool_errors", "tool_error"}
FINISHED = RUNNING | {"is_correct", "reward_components", "episode"}

PASSAGES = {
    "Orla Finch": ["Orla Finch is a painter. ", "She lives in Vexomontule."],
    "Vexomontule": ["Vexomontule is a town on the river Drane. ", "Its mayor is Ivo Brandt."],
    "Дом": ["Дом стоит в городе 東京. "],
    "River Drane": ["The river Drane is long. ", "It was mapped by Orla Finch."],
}
QUESTIONS = [
    ("town", "Where does the painter live?", "Vexomontule", ["Vexomontule Town"], ["Orla Finch"]),
    ("unwritten", "What is the password?", "Qwzzkriblu", [], ["Orla Finch", "Vexomontule"]),
    ("closed", "Is the river Drane long?", "yes", [], ["River Drane"]),
    ("script", "Где стоит дом?", "東京", [], ["Дом"]),
    ("number", "How many boats are there?", "twenty seven boats", ["27"], []),
]


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "questions.json"
    context = [[title, sentences] for title, sentences in PASSAGES.items()]
    records = [
        {
            "_id": name,
            "question": question,
            "answer": answer,
            "answer_aliases": aliases,
            "type": "bridge",
            "supporting_facts": [[title, 0] for title in supporting],
            "context": context,
        }
        for name, question, answer, aliases, supporting in QUESTIONS
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def make(data_path):
    return lambda **kwargs: MultiHopQAEnv(dataset="hotpotqa", data_path=data_path, **kwargs)


def say(env, action):
    return env.action_format.render("Well.", action, env.tools)


def search(env, query):
    return env.step(say(env, ToolCall("search", {"query": query})))


def answer(env, text):
    return env.step(say(env, FinalAnswer(text)))


# Gymnasium -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("render_mode", [None, "ansi"])
def test_gymnasium_finds_nothing_to_warn_of(render_mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(ENV_ID, render_mode=render_mode)
        check_env(env.unwrapped)
        env.reset(seed=0)  # through the passive checker
        for action in ("nonsense", "<tool_call>", "<answer>no</answer>"):
            *_, terminated, truncated, _ = env.step(action)
            if render_mode:
                assert isinstance(env.render(), str)
        assert terminated and not truncated
        env.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments_run_whole_episodes(mode):
    single = gym.make(ENV_ID)
    task = single.unwrapped.dataset.tasks[3]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        envs = gym.make_vec(ENV_ID, num_envs=2, vectorization_mode=mode, reward="f1")
        try:
            observations, infos = envs.reset(seed=[5, 6])
            assert observations == (single.reset(seed=5)[0], single.reset(seed=6)[0])
            assert infos["task_id"][1] == single.unwrapped.state.task.task_id
            observations, infos = envs.reset(options={"task_id": task.task_id})
            assert observations == (task.prompt,) * 2 and list(infos["task_id"]) == [task.task_id] * 2
            query = say(single.unwrapped, ToolCall("search", {"query": task.steps[0].queries[0]}))
            observations, rewards, terminated, truncated, infos = envs.step((query, "\ud800 nonsense"))
            assert task.answers[0] in observations[0] and observations[1].startswith("Error: No action found")
            assert list(infos["tool_error"]) == [False, True] and not (terminated | truncated).any()
            assert infos["messages"][0][-1]["content"] == observations[0]
            verdict = f"<answer>{task.answers[0]}</answer>", "<answer>who knows</answer>"
            _, rewards, terminated, truncated, infos = envs.step(verdict)
            assert list(rewards) == [1.0, 0.0] and list(terminated) == [True] * 2 and not truncated.any()
            assert list(infos["is_correct"]) == [True, False] and list(infos["episode"]["l"]) == [2, 2]
            observations, rewards, terminated, truncated, infos = envs.step(verdict)  # the next episodes begin
            assert not (terminated | truncated).any() and list(infos["turn"]) == [0, 0]
        finally:
            envs.close()


def test_corpus_and_index_are_shared():
    first, second = MultiHopQAEnv(), MultiHopQAEnv(top_k=5, max_turns=3)
    assert first.dataset is second.dataset and first.index is second.index
    assert MultiHopQAEnv(dataset_seed=1, split="validation").index is not first.index


# Episodes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["em", "f1"])
@pytest.mark.parametrize("action_format", FORMATS)
def test_the_oracle_answers_through_every_format(action_format, reward):
    env = MultiHopQAEnv(action_format=action_format, reward=reward)
    rng = np.random.default_rng(0)
    tasks = {(task.hops, task.kind): task for task in env.dataset.tasks}  # the last of each sort
    assert {hops for hops, _ in tasks} == {1, 2, 3, 4, 5, 6} and {"chain", "comparison", "yes_no"} <= {
        k for _, k in tasks
    }
    for task in tasks.values():
        observation, info = env.reset(options={"task_id": task.task_id})
        assert observation == task.prompt and info["task_id"] == task.task_id
        over = False
        while not over:
            text = env.action_format.render(*oracle_action(task, list(env.state.turns()), rng), env.tools)
            _, score, terminated, truncated, info = env.step(text)
            over = terminated or truncated
            assert set(info) == (FINISHED if over else RUNNING)
        assert terminated and not truncated and info["is_correct"] and score == 1.0
        assert info["tool_errors"] == 0 and info["tool_calls"] == info["turn"] - 1 == info["episode"]["l"] - 1
        assert info["reward_components"] == {"em": 1.0, "f1": 1.0, "supporting_recall": 1.0}


@pytest.mark.parametrize(
    ("task_id", "text", "em", "f1"),
    [
        ("town", "vexomontule.", 1, 1),
        ("town", "The Vexomontule Town", 1, 1),
        ("town", "town", 0, 2 / 3),
        ("town", "Orla Finch", 0, 0),
        ("closed", "Yes", 1, 1),
        ("closed", "no", 0, 0),
        ("closed", "yes it is", 0, 0),
        ("script", "東京", 1, 1),
        ("script", "京都", 0, 0),
        ("number", "27", 1, 1),
        ("number", "twenty boats", 0, 0.8),
        ("unwritten", "\x00\ud800", 0, 0),
    ],
)
@pytest.mark.parametrize("reward", ["em", "f1"])
def test_rewards(make, reward, task_id, text, em, f1):
    env = make(reward=reward)
    env.reset(options={"task_id": task_id})
    _, score, terminated, truncated, info = answer(env, text)
    assert terminated and not truncated
    assert score == pytest.approx(em if reward == "em" else f1)
    assert info["is_correct"] == bool(em)  # success is exact match under both rewards
    assert info["reward_components"]["em"] == em and info["reward_components"]["f1"] == pytest.approx(f1)


def test_supporting_recall_counts_the_passages_shown(make):
    env = make(top_k=1)
    env.reset(options={"task_id": "unwritten"})  # needs the passages on Orla Finch and on Vexomontule
    search(env, "painter")
    assert search(env, "painter")[0].startswith("[1] Orla Finch: ")
    assert answer(env, "?")[4]["reward_components"]["supporting_recall"] == 0.5


def strings(value, path=()):
    """Yields every text in a structure with the way to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield (*path, "key"), str(key)
            yield from strings(item, (*path, key))
    elif isinstance(value, (list, tuple, np.ndarray)):
        for i, item in enumerate(value):
            yield from strings(item, (*path, i))
    else:
        yield path, repr(value)


@pytest.mark.parametrize("action_format", FORMATS)
@pytest.mark.parametrize("task_id", ["town", "unwritten", "script"])
def test_the_gold_answer_is_nowhere_but_in_the_passages_shown(make, task_id, action_format):
    env = make(action_format=action_format, render_mode="ansi", max_turns=6, top_k=1)
    gold = {name: answer for name, _, answer, *_ in QUESTIONS}[task_id]
    steps = [env.reset(seed=0, options={"task_id": task_id})]
    for text in (
        "nonsense",
        say(env, ToolCall("search", {"query": " "})),
        say(env, ToolCall("search", {"query": "?"})),
    ):
        observation, *_, info = env.step(text)
        steps.append((observation, info))
    assert not any(gold in text for step in steps for _, text in strings(step))
    assert gold not in env.render() and gold not in repr((env, env.spec, env.metadata, env.observation_space))
    observation, *_, info = search(env, "Дом" if task_id == "script" else "painter")
    assert (gold in observation) == (task_id != "unwritten")
    assert {text for _, text in strings((observation, info)) if gold in text} <= {observation}
    paths = [path for path, text in strings(info) if gold in text]
    assert paths == [("messages", len(info["messages"]) - 1, "content")] * (gold in observation)


def test_the_task_is_random_or_the_one_asked_for(make):
    env = make()
    assert list(env.task_ids()) == [name for name, *_ in QUESTIONS]
    for name, question, *_ in QUESTIONS:
        observation, info = env.reset(options={"task_id": name})
        assert (observation, info["task_id"], env.observation()) == (question, name, question)
    env.reset(seed=0)
    assert len({env.reset()[1]["task_id"] for _ in range(50)}) == len(QUESTIONS)
    for bad in ("lake", "", 3, ["town"]):
        with pytest.raises(ValueError, match=rf"no task {re.escape(repr(bad))}; it holds 5 ids such as 'town'"):
            env.reset(options={"task_id": bad})
    with pytest.raises(ValueError, match=r"unknown reset options \['question'\]; known: \['task_id'\]"):
        env.reset(options={"question": "town"})


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_search_shows_top_k_passages(make, top_k):
    env = make(top_k=top_k)
    env.reset(seed=0)
    observation = search(env, "Orla Drane Vexomontule")[0]
    assert [line[:4] for line in observation.split("\n")] == [f"[{i}] " for i in range(1, top_k + 1)]
    titles = [passage.title for passage in env.dataset.passages]
    assert len(env.state.world) == top_k and all(titles[i] in observation for i in env.state.world)
    assert (
        search(env, "boat mayor")[0]
        == "[1] Vexomontule: Vexomontule is a town on the river Drane. Its mayor is Ivo Brandt."
    )


# Bad input -----------------------------------------------------------------------------------------------------------

MEGABYTE = 1 << 20


@pytest.mark.parametrize("action_format", FORMATS)
@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        (" \t", "empty"),
        ("\x00\x1b[2J\x07", "no passage holds any word"),
        ("zzz ??? !!!", "no passage holds any word"),
        ("мост 橋", "no passage holds any word"),
        ("\ud800\udfff", "no passage holds any word"),
        ("x" * (MAX_QUERY_CHARS + 1), "513 characters; use at most 512"),
        ("painter " * (MEGABYTE // 8), "1048576 characters; use at most 512"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_bad_queries_are_explained_and_counted(make, action_format, query, complaint):
    env = make(action_format=action_format, max_action_chars=2 * MEGABYTE)
    env.reset(seed=0)
    arguments = json.dumps({"query": query})
    text = {
        "hermes": f'<tool_call>{{"name": "search", "arguments": {arguments}}}</tool_call>',
        "react": f"Action: search\nAction Input: {arguments}",
        "tags": f"<search>{arguments}</search>",
    }[action_format]
    observation, reward, terminated, truncated, info = env.step(text)
    assert observation.startswith("Error: ") and complaint in observation and len(observation) < 200
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["tool_error"], info["tool_errors"], info["tool_calls"], env.state.world) == (True, 1, 1, None)
    assert search(env, "painter")[0].startswith("[1] Orla Finch") and not env.info()["tool_error"]


CALL = '<tool_call>{"name": "search", "arguments": {"query": "painter"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "No action found"),
        ("\x00\x1b\ud800", "No action found"),
        ("The answer is Vexomontule.", "No action found"),
        (CALL * 2, "Found 2 actions in one turn; give exactly one"),
        (CALL + "<answer>x</answer>", "Found 2 actions"),
        ("<tool_call>{", "not closed"),
        ("<tool_call>{</tool_call>", "<tool_call>"),
        ("<answer> </answer>", "The answer is empty"),
        (CALL.replace("search", "browse"), "Unknown tool 'browse'; the tools are: search"),
        (CALL.replace('"painter"', "7"), "query"),
        (CALL.replace("query", "q"), "query"),
        (CALL.replace("painter", "x" * MEGABYTE), "characters long; at most 16384 are read"),
        ("(" * MEGABYTE, "1048576 characters long; at most 16384 are read"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_unreadable_actions_are_explained_and_counted(make, text, complaint):
    env = make()
    env.reset(options={"task_id": "town"})
    observation, reward, terminated, truncated, info = env.step(text)
    assert observation.startswith("Error: ") and complaint in observation.replace('"', "'") and len(observation) < 400
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["tool_error"], info["tool_errors"], info["tool_calls"]) == (True, 1, 0)
    assert answer(env, "Vexomontule")[1:3] == (1.0, True)


PIECES = [
    *("<tool_call>", "</tool_call>", "<answer>", "</answer>", "<think>", "</think>", "<search>", "</search>"),
    *(
        "Action:",
        "Action Input:",
        "Final Answer:",
        "Thought:",
        "search[",
        "]",
        "finish[",
        "\n",
        " ",
        "{",
        "}",
        '"',
        ",",
    ),
    *(
        '{"name": "search", "arguments": ',
        '{"query": ',
        '"painter"',
        "Vexomontule",
        "null",
        "1e999",
        "[[[[",
        "\\u",
        "\\",
    ),
    *("\x00", "\x1b[0m", "\ud800", "\udfff", "\u2028", "😀", "中文", "ع", "e\u0301", "(a+)+$", "%s", "{0}", "x" * 600),
    *(CALL, "<answer>no</answer>", "<search>river</search>", "Action: search[town]", "NaN", "[" * 2000, "{" * 2000),
]


@pytest.mark.parametrize("action_format", FORMATS)
def test_nothing_an_agent_writes_raises(make, action_format):
    rng = random.Random(action_format)
    env = make(action_format=action_format, search_dropout=0.3, max_observation_chars=150, render_mode="ansi")
    env.reset(seed=0)
    errors = ends = 0
    for _ in range(2000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(9)))
        before = env.state
        observation, reward, terminated, truncated, info = env.step(text)
        assert observation in env.observation_space and 0.0 <= reward <= 1.0 and not (terminated and truncated)
        assert info["turn"] == before.turn + 1 and info["tool_errors"] == before.tool_errors + info["tool_error"]
        assert not info["tool_error"] or observation.startswith("Error: ")
        errors += info["tool_error"]
        if terminated or truncated:
            ends += terminated
            assert env.render().endswith("reward 0") or info["is_correct"]
            env.reset()
    assert errors > 200 and ends > 20  # of both kinds there were many


@given(st.text(st.characters(exclude_categories=()), max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_query_and_any_answer_can_be_given(text):
    env = MultiHopQAEnv(action_format="hermes", split="train")
    env.reset(seed=0)
    observation, *_, info = env.step(
        f'<tool_call>{{"name": "search", "arguments": {json.dumps({"query": text})}}}</tool_call>'
    )
    assert observation.startswith("Error: the query is empty" if not text.strip() else ("[1] ", "Error: no passage"))
    assert info["tool_calls"] == 1 and info["tool_error"] == observation.startswith("Error: ")
    _, _, terminated, _, info = env.step(f"<answer>{text}</answer>")
    assert terminated or info["tool_error"]


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "squad"}, f"unknown dataset 'squad'; known: {', '.join(DATASETS)}"),
        ({"split": "dev"}, f"unknown split 'dev'; known: {', '.join(SPLITS)}"),
        ({"retriever": "dense"}, "unknown retriever 'dense'; known: bm25"),
        ({"reward": "bleu"}, "unknown reward 'bleu'; known: em, f1"),
        ({"action_format": "xml"}, "unknown action format 'xml'; known: hermes, react, tags"),
        ({"render_mode": "human"}, "unknown render_mode 'human'; known: ansi"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"search_dropout": 1.0}, "search_dropout must be in [0, 1), got 1.0"),
        ({"data_path": "x.json"}, "the synthetic data set is generated; it takes no data_path (got 'x.json')"),
    ],
)
def test_bad_values_are_named_with_the_known_ones(arguments, message):
    with pytest.raises(ValueError) as caught:
        MultiHopQAEnv(**arguments)
    assert str(caught.value) == message


def test_unknown_arguments_are_named_with_the_known_ones():
    with pytest.raises(TypeError) as caught:
        MultiHopQAEnv(topk=3)
    message = str(caught.value)
    assert message.startswith("MultiHopQAEnv takes no argument 'topk'; known: action_format, ")
    assert {"top_k", "dataset", "max_turns", "render_mode"} <= set(re.findall(r"\w+", message))


# Search that fails by chance -----------------------------------------------------------------------------------------

WORDS = "river painter town Orla Drane"


def test_search_dropout_is_a_function_of_the_snapshot_and_the_seed(make):
    env = make(search_dropout=0.5)
    env.reset(seed=0)
    start = env.snapshot()

    def results():
        return tuple(search(env, WORDS)[0] for _ in range(4))

    first = results()
    env.restore(start)
    assert results() == first
    assert len(set(first)) > 1  # drawn anew at each search
    by_seed = {}
    for seed in range(20):
        env.restore(start, seed=seed)
        by_seed[seed] = results()
    assert len(set(by_seed.values())) > 15
    env.restore(start, seed=7)
    assert results() == by_seed[7]


def test_search_dropout_withholds_its_share_of_passages(make):
    everything = make()
    everything.reset(seed=0)
    ranked = search(everything, WORDS)[0].split("\n")
    assert len(ranked) == 3
    env = make(search_dropout=0.25, max_turns=2000)
    env.reset(seed=0)
    state, shown, empty = env.state, 0, 0
    query = say(env, ToolCall("search", {"query": WORDS}))
    for _ in range(1000):
        state = env.advance(state, query)
        observation = state.history.turn.observation
        lines = [] if observation == "No results this time; try again." else observation.split("\n")
        passages = [line.split("] ", 1)[1] for line in lines]
        assert passages == [line[4:] for line in ranked if line[4:] in passages]  # in the order of the ranking
        shown, empty = shown + len(lines), empty + (not lines)
    assert abs(shown / 3000 - 0.75) < 0.04 and 0 < empty < 50  # expected: 0.75 +- 0.008, 16 +- 4
    assert state.tool_errors == 0


def test_the_packages_snapshot_is_the_environments_own(make):
    env = make()
    env.reset(seed=0)
    assert trace_envs.snapshot(env) == env.snapshot()
