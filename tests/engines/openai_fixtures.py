"""Fixtures and contexts of the tests that ask a server."""

import openai._base_client
import pytest

from agents.policies import openai_server
from agents.policies.openai_policy import OpenAIPolicy
from allocation import Context
from allocation.tree import Tree

KEY = "sk-very-secret-1234567890"
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}},
            "required": ["query"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai_server, "FIRST_PAUSE", 0.01)


@pytest.fixture
def make():
    """Makes policies that are closed at the end."""
    made = []

    def make(server, model="tiny", **kwargs):
        base_url = server if isinstance(server, str) else server.base_url
        made.append(OpenAIPolicy(model, base_url=base_url, **({"max_retries": 2, "timeout": 5.0} | kwargs)))
        return made[-1]

    yield make
    for policy in made:
        policy.close()


def context(question="Who?", *turns, tools=(SEARCH,)):
    tree = Tree(question, 0, question)
    messages = [{"role": "user", "content": question}]
    for text, seen in turns:
        messages += [{"role": "assistant", "content": text}, {"role": "tool", "content": seen}]
    return Context(0, tree, tree.root, question, {"messages": messages, "tools": list(tools)})


def questions(n):
    return [context(f"question {i}") for i in range(n)]


def asked_of(body):
    return body["messages"][0]["content"]
