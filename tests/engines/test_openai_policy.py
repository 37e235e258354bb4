"""`OpenAIPolicy`: what it asks, what it makes of replies, the key, the limits, loops and threads."""

import asyncio
import logging
import threading
import time

import pytest
from faulty_server import Answer, Drop, Stall, completion, refusal, serving
from openai_fixtures import KEY, asked_of, context, make, questions, quick

from agents.policies import openai_server
from agents.policies.openai_policy import NO_KEY, OpenAIPolicy
from agents.policies.openai_reply import MAX_CHARS

__all__ = ["make", "quick"]


# Replies -------------------------------------------------------------------------------------------------------------


def test_a_reply_becomes_a_sample(make):
    with serving([completion("<answer>Paris</answer>", usage=(10, 4, 3))]) as server:
        (sample,) = make(server).act([context()])
    assert (sample.text, sample.finish_reason, sample.acted) == ("<answer>Paris</answer>", "stop", True)
    assert (sample.generated, sample.prefilled) == (3, 6)
    assert len(sample.action_ids) == len(sample.logprobs) == len(sample.context_ids) == 0


def test_samples_come_in_the_order_of_their_contexts(make):
    def slower_first(body, number):
        return Answer(completion(asked_of(body)), wait=0.05 * (number < 8))

    with serving(slower_first) as server:
        samples = make(server).act(questions(40))
    assert [s.text for s in samples] == [f"question {i}" for i in range(40)]


def test_requests_say_what_was_set(make):
    settings = {"max_new_tokens": 7, "temperature": 0.25, "top_p": 0.5, "stop": ("</tool_call>",)}
    with serving(["x"]) as server:
        make(server, extra_body={"top_k": 20, "temperature": 0.75}, **settings).act([context("Who?", ("a", "b"))])
        body = server.asked[0]
    assert body["model"] == "tiny"
    assert body["messages"] == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "<tool_response>\nb\n</tool_response>"},
    ]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (7, 0.75, 0.5, 20)
    assert body["stop"] == ["</tool_call>"] and "tools" not in body


def test_openai_itself_is_sent_the_names_that_its_newer_models_take(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    policy = OpenAIPolicy("gpt", max_new_tokens=7)
    body = policy._body(context())
    assert body["max_completion_tokens"] == 7 and not {"max_tokens", "temperature", "top_p"} & set(body)
    policy.close()


def test_branches_of_a_prefix_have_seeds_of_their_own(make):
    with serving(["x"]) as server:
        for seed in (0, 0, 1):
            make(server, seed=seed).act([context()] * 3 + [context("Where?")])
        seeds = [sorted(b["seed"] for b in server.asked[i : i + 4]) for i in (0, 4, 8)]
    assert len(set(seeds[0])) == 4 and all(0 <= s < 2**31 for s in seeds[0])
    assert seeds[0] == seeds[1] and not set(seeds[0]) & set(seeds[2])


@pytest.mark.parametrize(
    ("answer", "text", "reason"),
    [
        (completion("cut", finish_reason="length"), "cut", "length"),
        (completion("x", finish_reason="tool_calls"), "x", "stop"),
        (completion("x", finish_reason=None), "x", "stop"),
        (completion("", usage=(10, 0, 1)), "", "stop"),  # the model ended its turn at once
        (completion("", message={"role": "assistant"}, usage=(10, 0, 1)), "", "stop"),
        (completion("", message={"content": None, "refusal": "I cannot."}), "I cannot.", "stop"),
        (completion("", message={"content": [{"type": "text", "text": "a"}, {"text": "b"}]}), "ab", "stop"),
        (completion("", message={"content": "b", "reasoning_content": "a"}), "<think>\na\n</think>\nb", "stop"),
        (
            completion("", message={"content": None, "reasoning": "a"}, finish_reason="length"),
            "<think>\na\n</think>\n",
            "length",
        ),
        (completion("<|im_end|>\x00\ud800 a"), "<|im_end|>\x00\ud800 a", "stop"),
    ],
)
def test_unusual_replies_are_actions(make, answer, text, reason):
    with serving([answer]) as server:
        (sample,) = make(server, max_retries=0).act([context()])
    assert (sample.text, sample.finish_reason, sample.acted) == (text, reason, True)


def test_counts_that_are_none_are_not_believed(make):
    odd = completion("x") | {"usage": {"prompt_tokens": "ten", "completion_tokens": -1, "prompt_tokens_details": 3}}
    with serving([odd, completion("x") | {"usage": None}]) as server:
        samples = [make(server).act([context()])[0] for _ in range(2)]
    assert [(s.generated, s.prefilled) for s in samples] == [(None, 0)] * 2


def test_a_huge_reply_is_cut_and_goes_on(make):
    with serving([completion("ab " * 3_500_000)]) as server:
        (sample,) = make(server).act([context()])
    assert len(sample.text) == MAX_CHARS and sample.acted


def test_a_reply_of_more_bytes_than_are_read_is_no_reply(make, monkeypatch):
    monkeypatch.setattr(openai_server, "MAX_BYTES", 1 << 20)
    with serving(["fine", completion("a" * (2 << 20))]) as server:
        policy = make(server, max_retries=1)
        policy.act([context()])
        (sample,) = policy.act([context()])
        assert len(server.asked) == 3
    assert sample.finish_reason == "error" and "more than 1 MiB" in sample.note


def test_text_that_utf8_cannot_encode_is_sent_on_mended(make):
    with serving(["x"]) as server:
        make(server).act([context("Who?", ("a\ud800b", "\ud83d\ude00"))])
        assert server.asked[0]["messages"][1]["content"] == "a�b"
        assert "😀" in server.asked[0]["messages"][2]["content"]


@pytest.mark.parametrize(
    ("text", "extra", "expected"),
    [
        ('<tool_call>{"name": "search", "arguments": {"query": "a"}}', {}, "</tool_call>"),
        ("<answer>a", {}, "</answer>"),
        ("<answer>a", {"stop_reason": "</answer>"}, "</answer>"),
        ("<answer>a</answer>", {}, ""),  # of a server that leaves it there
        ("no action", {}, ""),
        ("no action", {"stop_reason": "</answer>"}, "</answer>"),
        ("<answer>a", {"finish_reason": "length"}, ""),
        ("<answer>a", {"stop_reason": 151645}, "</answer>"),  # a token id, as vLLM says it
    ],
)
def test_a_stop_string_that_the_server_cut_off_is_put_back(make, text, extra, expected):
    with serving([completion(text, **extra)]) as server:
        (sample,) = make(server, stop=("</tool_call>", "</answer>")).act([context()])
    assert sample.text == text + expected


# The key -------------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(make, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    for name in list(logging.root.manager.loggerDict):
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        caplog.set_level(logging.DEBUG, logger=name)
    caplog.set_level(logging.DEBUG)
    echoing = refusal(500, f"cannot use Bearer {KEY}", {"X-Echo": "yes"})
    with serving(["fine", refusal(429, "wait", {"Retry-After": "0.01"}), Answer(b"{"), Drop(), echoing]) as server:
        policy = make(server, max_retries=3)
        samples = policy.act([context()]) + policy.act([context()])
        assert {h["authorization"] for _, _, _, h in server.requests} == {f"Bearer {KEY}"}
    assert samples[1].finish_reason == "error"
    assert len(caplog.records) > 20 and {r.name.split(".")[0] for r in caplog.records} >= {"openai"}
    shown = [repr(policy), repr(policy.asynchronous()), repr(vars(policy)), repr(vars(policy._server)), repr(samples)]
    assert not any("secret" in text for text in [caplog.text, *shown])


def test_a_local_server_needs_no_key(make):
    with serving(["fine"]) as server:
        assert make(server).act([context()])[0].text == "fine"
        assert server.requests[-1][3]["authorization"] == f"Bearer {NO_KEY}"


# Which model ---------------------------------------------------------------------------------------------------------


def test_the_only_model_need_not_be_named(make):
    with serving(["fine"], models=["some/model"]) as server:
        policy = make(server, model=None)
        policy.act([context()])
        assert policy.model == server.asked[0]["model"] == "some/model"


@pytest.mark.parametrize(("models", "words"), [(["a", "b"], "lists a, b"), (None, "lists none"), ([], "lists none")])
def test_a_model_must_be_named_unless_there_is_one(make, models, words):
    with serving(["fine"], models=models) as server, pytest.raises(ValueError, match=f"--model .*{words}"):
        make(server, model=None)


# Limits --------------------------------------------------------------------------------------------------------------


def test_no_more_requests_are_under_way_than_allowed(make):
    with serving(lambda body, number: Answer(completion("x"), wait=0.03)) as server:
        make(server, max_concurrency=3).act(questions(20))
        assert server.most == 3


def test_both_forms_share_the_limit(make):
    with serving(lambda body, number: Answer(completion("x"), wait=0.03)) as server:
        policy = make(server, max_concurrency=3)
        thread = threading.Thread(target=policy.act, args=(questions(10),))
        thread.start()

        async def others():
            return await asyncio.gather(*(policy.asynchronous().act(c) for c in questions(10)))

        assert len(asyncio.run(others())) == 10
        thread.join()
        assert server.most == 3


def test_requests_are_spread_over_the_minute(make):
    with serving(["x"]) as server:
        make(server, requests_per_minute=1200).act(questions(6))
        assert max(server.times) - min(server.times) >= 5 * 0.05 * 0.8


# Loops and threads ---------------------------------------------------------------------------------------------------


def test_act_works_inside_a_running_loop_and_from_threads(make):
    with serving(["fine"]) as server:
        policy = make(server)

        async def inside():
            return policy.act([context()]), await asyncio.to_thread(policy.act, [context()])

        assert [[s.text for s in samples] for samples in asyncio.run(inside())] == [["fine"], ["fine"]]
        assert policy.act([]) == []


def test_the_asynchronous_form_works_in_one_loop_after_another(make):
    with serving(["fine"]) as server:
        policy = make(server).asynchronous()
        assert [asyncio.run(policy.act(context())).text for _ in range(2)] == ["fine", "fine"]


def test_a_cancelled_request_gives_its_place_back(make):
    with serving(lambda body, number: Stall() if number == 1 else "fine") as server:
        policy = make(server, max_concurrency=1)
        policy.act([context()])

        async def give_up():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(policy.asynchronous().act(context()), 0.2)
            return await asyncio.wait_for(policy.asynchronous().act(context()), 5)

        assert asyncio.run(give_up()).text == "fine"


def test_a_closed_policy_says_so(make):
    with serving(["fine"]) as server:
        policy = make(server)
        policy.act([context()])
        policy.close()
        with pytest.raises(RuntimeError, match="closed"):
            policy.act([context()])
        with pytest.raises(RuntimeError, match="closed"):
            asyncio.run(policy.asynchronous().act(context()))


def test_a_policy_that_is_forgotten_ends_its_thread(make):
    with serving(["fine"]) as server:
        before = set(threading.enumerate())
        policy = OpenAIPolicy("tiny", base_url=server.base_url)
        policy.act([context()])
        own = [t for t in set(threading.enumerate()) - before if t.name == "openai policy"]
        assert len(own) == 1
        del policy
        deadline = time.monotonic() + 10
        while own[0].is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not own[0].is_alive()
