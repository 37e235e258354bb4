"""Whole evaluations through a server: what answers there is the scripted BM25 agent, so the scores are known."""

import json

import numpy as np
import pytest
from faulty_server import Answer, Drop, completion, refusal, serving

from agents.evaluate import evaluate, make_vector
from agents.policies import ScriptedPolicy, openai_server
from agents.policies.openai_policy import OpenAIPolicy
from allocation import AsyncRunner, Root, UniformAllocator
from trace_envs.actions import get_format
from trace_envs.multihop_qa.env import SEARCH_TOOL
from trace_envs.multihop_qa.heuristics import bm25_action
from trace_envs.state import FinalAnswer, ToolCall, Turn

ENV_ID = "TraceMultiHopQA-v0"
HERMES = get_format("hermes")
OPEN, CLOSE = "<tool_response>\n", "\n</tool_response>"


def tasks(n):
    envs = make_vector(ENV_ID, 1, {"split": "test"})
    env = envs.envs[0].unwrapped
    found = [env.pick_task(None, task_id) for task_id in list(env.task_ids())[:n]]
    envs.close()
    return found


def task_ids(n):
    return [task.task_id for task in tasks(n)]


@pytest.fixture(scope="module")
def expected():
    """What the agent scores when it acts directly."""
    return evaluate(ScriptedPolicy("bm25"), ENV_ID, {"split": "test"}, task_ids(24), num_envs=8)


def seen(messages):
    """The question and the turns, read from what a server is sent, in text or as tool calls."""
    told = [m for m in messages if m["role"] != "system"]
    turns = []
    for said, result in zip(told[1::2], told[2::2], strict=True):
        if calls := said.get("tool_calls"):
            assert result["role"] == "tool" and result["tool_call_id"] == calls[0]["id"]
            function = calls[0]["function"]
            action, observation = ToolCall(function["name"], json.loads(function["arguments"])), result["content"]
        else:
            action, observation = HERMES.parse(said["content"], [SEARCH_TOOL]), result["content"]
            assert result["role"] == "user" and observation.startswith(OPEN) and observation.endswith(CLOSE)
            observation = observation[len(OPEN) : -len(CLOSE)]
        turns.append(Turn(said["content"], action, observation))
    return told[0]["content"], turns


def answers_in_text(body, number):
    return HERMES.render(*bm25_action(*seen(body["messages"])))


def answers_in_calls(body, number):
    assert body["tools"] == [SEARCH_TOOL]
    thought, action = bm25_action(*seen(body["messages"]))
    if isinstance(action, FinalAnswer):
        return HERMES.render(thought, action)
    function = {"name": action.name, "arguments": json.dumps(dict(action.arguments))}
    call = {"id": f"id-{number}", "type": "function", "function": function}
    message = {"role": "assistant", "content": thought, "tool_calls": [call]}
    return completion(thought, message=message, finish_reason="tool_calls")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["lock-step", "continuous"])
@pytest.mark.parametrize("native", [False, True], ids=["text", "tool calls"])
def test_an_agent_behind_a_server_scores_what_it_scores_directly(expected, native, asynchronous):
    with serving(answers_in_calls if native else answers_in_text) as server:
        policy = OpenAIPolicy("tiny", base_url=server.base_url, native_tools=native)
        asked = policy.asynchronous() if asynchronous else policy
        record = evaluate(asked, ENV_ID, {"split": "test"}, task_ids(24), num_envs=8)
        policy.close()
    assert record == expected and record["eval/accuracy_all"] > 0


def test_a_server_that_fails_now_and_then_changes_no_score(expected, monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_PAUSE", 0.01)
    faults = [refusal(429, "wait", {"Retry-After": "0.01"}), Answer(b'{"choices": ['), Answer({"choices": []})]
    faults.append(Answer(b"oops", 500, {"Retry-After": "0.01"}))
    rng = np.random.default_rng(0)

    def now_and_then(body, number):
        return faults[number % len(faults)] if rng.random() < 0.25 else answers_in_text(body, number)

    with serving(now_and_then) as server:
        policy = OpenAIPolicy("tiny", base_url=server.base_url, max_retries=12)
        record = evaluate(policy.asynchronous(), ENV_ID, {"split": "test"}, task_ids(24), num_envs=8)
        policy.close()
    assert record == expected


def test_counts_of_the_server_go_into_the_ledger():
    with serving(answers_in_text) as server:
        policy = OpenAIPolicy("tiny", base_url=server.base_url)
        roots = [Root(i, {"task_id": t}) for i, t in enumerate(task_ids(6))]
        runner = AsyncRunner(make_vector(ENV_ID, 4, {"split": "test"}), allocator=UniformAllocator(1), budget=6)
        ledger = runner.run_sync(policy.asynchronous(), roots=roots).ledger
        runner.close()
        policy.close()
        asked = len(server.asked)
    assert (ledger.prefilled_tokens, ledger.generated_tokens) == (6 * asked, 3 * asked)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["lock-step", "continuous"])
def test_questions_that_get_no_answer_are_lost_alone(monkeypatch, asynchronous):
    monkeypatch.setattr(openai_server, "FIRST_PAUSE", 0.01)
    ids, told = task_ids(12), [task.prompt for task in tasks(12)]

    def script(body, number):
        question, turns = seen(body["messages"])
        if turns and question == told[3]:
            return Drop()
        if turns and question == told[5]:
            return refusal(400, "maximum context length is 64 tokens")
        return answers_in_text(body, number)

    with serving(script) as server:
        policy = OpenAIPolicy("tiny", base_url=server.base_url, max_retries=0)
        asked = policy.asynchronous() if asynchronous else policy
        forests = []
        record = evaluate(asked, ENV_ID, {"split": "test"}, ids, num_envs=4, done=forests.append)
        policy.close()
    leaves = {tree.root.observation: tree.leaves()[0] for forest in forests for tree in forest}
    direct = []
    evaluate(ScriptedPolicy("bm25"), ENV_ID, {"split": "test"}, ids, done=direct.append)
    for tree in direct[0]:
        leaf, order = leaves[tree.root.observation], told.index(tree.root.observation)
        if order in (3, 5):
            assert leaf.truncated and leaf.depth == 2 and leaf.reward == 0 and leaf.is_correct is False
            assert leaf.components == ({"policy_error": 1.0} if order == 3 else {"out_of_context": 1.0})
            assert leaf.observation.startswith("The server" if order == 3 else "The conversation is too long")
        else:
            same = tree.leaves()[0]
            assert (leaf.action, leaf.reward, leaf.is_correct, leaf.depth) == (
                same.action,
                same.reward,
                same.is_correct,
                same.depth,
            )
    assert record["eval/policy_error"] == record["eval/out_of_context"] == 1 / 12
