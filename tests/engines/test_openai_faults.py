"""`OpenAIPolicy` against a server that fails in every way there is, and against the mistakes of its user."""

import asyncio
import sys

import pytest
from faulty_server import Answer, Drop, Stall, completion, refusal, serving
from openai_fixtures import KEY, asked_of, context, make, questions, quick

from agents.policies import openai_server
from agents.policies.openai_policy import OpenAIPolicy
from allocation import Context
from allocation.tree import Tree

__all__ = ["make", "quick"]


# Failures ------------------------------------------------------------------------------------------------------------

FAULTS = {
    "drop": Drop(),
    "stall": Stall(),
    "rate limit": refusal(429, "slow down", {"Retry-After": "0.02"}),
    "rate limit without a word": Answer(b"", 429),
    "500": refusal(500, "oops"),
    "503 of a proxy": Answer(b"<html>Service Unavailable</html>", 503, {"Content-Type": "text/html"}),
    "malformed": Answer(b'{"choices": [{"mess'),
    "not UTF-8": Answer(b'{"choices": "\xff\xfe'),
    "nested": Answer(b"[" * 100_000),
    "digits": Answer(b'{"a": ' + b"9" * 5000 + b"}"),
    "html": Answer(b"<html>hello</html>", 200, {"Content-Type": "text/html"}),
    "a list": Answer([1, 2]),
    "null": Answer(None),
    "no choices": Answer({"id": "x"}),
    "no choice": Answer({"choices": []}),
    "a choice of another type": Answer({"choices": ["x"]}),
    "no message": Answer({"choices": [{"text": "x"}]}),
    "null content": Answer(completion(None, usage=(1, 0, 0))),
    "nothing": Answer(completion("", usage=(1, 0, 0))),
    "a number": Answer(completion(3)),
    "odd calls": Answer(completion("", message={"content": None, "tool_calls": "search"})),
    "a call without a name": Answer(completion("", message={"content": None, "tool_calls": [{"function": {}}]})),
    "error within": Answer({"error": {"message": "Provider returned error", "code": 502}}),
    "gave up": Answer(completion("x", finish_reason="error")),
    "cut": Answer(completion("x" * 500), cut=200),
    "trickle": Answer(completion("x" * 500), pace=0.02),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_fails_once_is_asked_again(make, fault):
    with serving([fault, "fine"]) as server:
        (sample,) = make(server, timeout=0.3).act([context()])
        assert len(server.asked) == 2
    assert (sample.text, sample.finish_reason) == ("fine", "stop")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_fails_for_good_costs_its_own_branch(make, fault):
    def script(body, number):
        return fault if asked_of(body) == "question 1" else "fine"

    with serving(script) as server:
        policy = make(server, timeout=0.2, max_retries=1)
        policy.act([context()])
        first, bad, last = policy.act(questions(3))
        assert len(server.asked) == 1 + 2 + 2
    assert first.text == last.text == "fine"
    assert bad.finish_reason == "error" and not bad.acted and bad.text == ""
    assert (
        bad.note.startswith("The server ") and bad.note.endswith(".") and "\n" not in bad.note and len(bad.note) < 500
    )


def test_both_layers_of_repetition_draw_on_one_bound(make):
    with serving(["fine", Drop(), Answer(b"{"), refusal(500, "oops"), Answer(b"["), Drop()]) as server:
        policy = make(server, max_retries=3)
        policy.act([context()])
        (sample,) = policy.act([context()])
        assert len(server.asked) == 1 + 4
    assert sample.finish_reason == "error"


def test_retry_after_is_heeded(make):
    with serving([refusal(429, "slow down", {"Retry-After": "0.4"}), "fine"]) as server:
        make(server).act([context()])
        assert server.times[1] - server.times[0] >= 0.4


@pytest.mark.parametrize(
    "answer",
    [
        refusal(400, "This model's maximum context length is 64 tokens. However, you requested 99 tokens."),
        refusal(400, "You passed 99 input tokens. However, the model's context length is only 64 tokens."),
        refusal(400, "too much", code="context_length_exceeded"),
        refusal(400, "the request exceeds the available context size", type="exceed_context_size_error"),
        refusal(400, "prompt is too long: 9 tokens > 5 maximum"),
        refusal(422, "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 60 + 64"),
        Answer({"detail": "The input (99 tokens) is longer than the model's context length (64 tokens)."}, 400),
        Answer(b"Request Entity Too Large", 413, {"Content-Type": "text/plain"}),
        Answer({"error": {"message": "maximum context length is 64 tokens", "code": 400}}),
    ],
)
def test_a_conversation_that_is_too_long_ends_as_context(make, answer):
    with serving([answer]) as server:
        (sample,) = make(server).act([context()])
        assert len(server.asked) == 1
    assert (sample.finish_reason, sample.acted) == ("context", False)
    assert sample.note.startswith("The conversation is too long for the model")


@pytest.mark.parametrize(
    "answer", [completion("half a", finish_reason="content_filter"), refusal(400, "no", code="content_filter")]
)
def test_what_a_content_filter_withholds_is_not_asked_for_again(make, answer):
    with serving([answer]) as server:
        (sample,) = make(server).act([context()])
        assert len(server.asked) == 1
    assert sample.finish_reason == "error" and sample.text == ""


def test_a_refused_conversation_costs_only_itself(make):
    def script(body, number):
        return refusal(400, "roles must alternate") if asked_of(body) == "question 1" else "fine"

    with serving(script) as server:
        policy = make(server)
        policy.act([context()])
        samples = policy.act(questions(3))
    assert [s.text for s in samples] == ["fine", "", "fine"]
    assert "roles must alternate" in samples[1].note


def test_a_server_that_is_gone_is_not_asked_for_long(make, monkeypatch):
    with serving(lambda body, number: "fine" if number == 0 else Drop()) as server:
        policy = make(server, max_concurrency=2)
        policy.act([context()])
        samples = policy.act(questions(50))
        sent = len(server.asked) - 1
        assert all(s.finish_reason == "error" for s in samples)
        # Those that brought it to the limit, and one that was under way beside the last of them.
        assert openai_server.BREAK_AFTER * 3 <= sent <= (openai_server.BREAK_AFTER + 1) * 3
        assert samples[-1].note in [f"The last {n} requests failed; this one was not sent." for n in (5, 6)]

        (skipped,) = policy.act([context()])
        assert not skipped.acted and len(server.asked) - 1 == sent

        monkeypatch.setattr(openai_server, "PAUSE", 0.0)
        policy._server._next_probe = 0.0
        policy.act([context()])
        assert len(server.asked) - 1 == sent + 1, "the request that looks whether it is back is not repeated"

        server.script = ["back"]
        policy._server._next_probe = 0.0
        assert [s.text for s in policy.act(questions(9))] == ["back"] * 9


def test_a_server_that_has_gone_away_ends_the_branches(make):
    with serving(["fine"]) as server:
        policy = make(server, max_retries=1)
        policy.act([context()])
    samples = policy.act(questions(20))
    assert all(s.finish_reason == "error" for s in samples)
    assert "cannot be reached" in samples[0].note


# The user's mistakes -------------------------------------------------------------------------------------------------


def test_a_refused_key_is_said_at_once_and_not_shown(make, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving([refusal(401, f"Incorrect API key provided: {KEY}.")]) as server:
        with pytest.raises(
            ValueError, match=r"HTTP 401 \(Incorrect API key provided: \[key\]\.\).*variable MY_KEY"
        ) as e:
            make(server, api_key_env="MY_KEY").act(questions(30))
        assert len(server.asked) <= 30
    assert KEY not in str(e.value) and e.value.__context__ is None and e.value.__cause__ is None


def test_an_unknown_model_is_said_with_those_that_are_listed(make):
    with (
        serving([refusal(404, "The model `gpt-9` does not exist.")], models=["qwen", "llama"]) as server,
        pytest.raises(ValueError, match=r"`gpt-9` does not exist.*--model or --base-url.*qwen, llama"),
    ):
        make(server, model="gpt-9").act([context()])


def test_a_wrong_path_is_said(make):
    not_found = Answer({"detail": "Not Found"}, 404)
    with serving([not_found], models=None) as server, pytest.raises(ValueError, match=r"404.*--base-url.*no models"):
        make(server).act([context()])


def test_a_setting_that_is_refused_is_said(make):
    refused = refusal(400, '"auto" tool choice requires --enable-auto-tool-choice')
    with (
        serving([refused]) as server,
        pytest.raises(ValueError, match=r"--enable-auto-tool-choice.*change the setting"),
    ):
        make(server, native_tools=True).act([context()])


@pytest.mark.parametrize("native", [False, True])
def test_a_server_that_is_not_there_is_said_at_once(make, native):
    with serving(["x"]) as server:
        url = server.base_url
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:\d+/v1/ cannot be reached.*--base-url"):
        make(url, native_tools=native).act(questions(30))


def test_a_web_site_is_no_chat_server(make):
    page = Answer(b"<html>hello</html>", 200, {"Content-Type": "text/html"})
    with serving([page]) as server, pytest.raises(ConnectionError, match=r"other than JSON.*ends in /v1"):
        make(server).act([context()])


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (refusal(429, "You exceeded your current quota"), "--requests-per-minute"),
        (refusal(500, "CUDA error"), "CUDA error"),
        (Stall(), "--timeout"),
    ],
)
def test_a_server_that_never_answers_is_said(make, answer, hint):
    with serving([answer]) as server, pytest.raises(ConnectionError, match=hint):
        make(server, timeout=0.2, max_retries=1).act([context()])


def test_the_asynchronous_form_raises_the_same(make):
    with serving([refusal(401, "no")]) as server, pytest.raises(ValueError, match="HTTP 401"):
        asyncio.run(make(server).asynchronous().act(context()))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"base_url": None}, "no key in the environment variable OPENAI_API_KEY"),
        ({"base_url": "localhost:8000"}, "--base-url must be an address"),
        ({"base_url": "http://"}, "--base-url must be an address"),
        ({"base_url": f"http://me:{KEY}@localhost:8000/v1"}, "no user name or password"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"max_retries": -1}, "max_retries must be at least 0"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"requests_per_minute": 0}, "requests_per_minute must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1}, "temperature must not be negative"),
        ({"stop": "x"}, "stop must be a sequence"),
        ({"action_format": "xml"}, "unknown action format"),
        ({"tool_role": "assistant"}, "tool_role must be"),
    ],
)
def test_impossible_settings_are_refused(keywords, words):
    with pytest.raises(ValueError, match=words) as e:
        OpenAIPolicy("tiny", **({"base_url": "http://localhost:1/v1"} | keywords))
    assert KEY not in str(e.value)


def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nexport OTHER")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as e:
        OpenAIPolicy("tiny")
    assert "secret" not in str(e.value)


def test_an_environment_without_messages_is_refused(make):
    tree = Tree("a", 0, "a")
    with pytest.raises(ValueError, match=r"info\['messages'\]"):
        make("http://localhost:1/v1").act([Context(0, tree, tree.root, "a", {})])


def test_without_the_packages_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "agents.policies.openai_server")
    with pytest.raises(ImportError, match=r"'openai': pip install 'trace-envs\[openai\]'"):
        import agents.policies.openai_server  # noqa: F401
