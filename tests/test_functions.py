from typing import Literal

import pytest

from trace_envs.functions import FunctionTools, ToolError, tool_schema
from trace_envs.schemas import check_value
from trace_envs.state import ToolCall


def deposit(world: dict, account: str, amount: int, note: str | None = None) -> tuple[dict, str]:
    """Puts money into an account.

    More about it.

    Args:
        world: Accounts.
        account: Name of
            the account.
        amount: Whole euros.
        note: What for.
    """
    if account not in world:
        raise ToolError(f"there is no account {account!r}")
    return {**world, account: world[account] + amount}, "done"


def look(world: dict, which: Literal["all", "some"], names: list[str], limits: dict[str, float]) -> tuple[dict, dict]:
    """Looks."""
    return world, {"which": which, "names": names, "limits": limits}


def test_schema_from_signature_and_docstring():
    assert tool_schema(deposit) == {
        "type": "function",
        "function": {
            "name": "deposit",
            "description": "Puts money into an account.",
            "parameters": {
                "type": "object",
                "properties": {
                    "account": {"type": "string", "description": "Name of the account."},
                    "amount": {"type": "integer", "description": "Whole euros."},
                    "note": {"type": ["string", "null"], "description": "What for."},
                },
                "required": ["account", "amount"],
                "additionalProperties": False,
            },
        },
    }
    rules = tool_schema(look)["function"]["parameters"]
    assert rules["properties"]["which"] == {"type": "string", "enum": ["all", "some"]}
    assert rules["properties"]["names"] == {"type": "array", "items": {"type": "string"}}
    assert check_value({"which": "all", "names": ["a"], "limits": {"a": 1.5}}, rules) is None
    assert "must be one of" in str(check_value({"which": "none", "names": [], "limits": {}}, rules))
    assert "must be a number" in str(check_value({"which": "all", "names": [], "limits": {"a": "b"}}, rules))


def test_calls():
    tools = FunctionTools([deposit, look])
    world = {"a": 1}
    after, text, refused = tools.call(world, ToolCall("deposit", {"account": "a", "amount": 2.0}))
    assert (after, text, refused) == ({"a": 3}, "done", False) and type(after["a"]) is int and world == {"a": 1}
    same, text, refused = tools.call(world, ToolCall("deposit", {"account": "b", "amount": 2}))
    assert same is world and refused and text == "Error: there is no account 'b'"
    _, text, _ = tools.call(world, ToolCall("look", {"which": "all", "names": ["é"], "limits": {}}))
    assert text == '{"which": "all", "names": ["é"], "limits": {}}'


def test_errors_of_a_tool_itself_are_not_hidden():
    def broken(world: dict) -> tuple[dict, str]:
        """Breaks."""
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        FunctionTools([broken]).call({}, ToolCall("broken", {}))


def no_world() -> None: ...
def untyped(world, name): ...
def strange(world, when: complex): ...
def many(world, *names: str): ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_world, "must take the world as its first parameter"),
        (untyped, "argument 'name' has no type; annotate it, such as name: str"),
        (strange, "which no JSON schema expresses"),
        (many, "cannot be passed by name"),
    ],
)
def test_functions_that_cannot_be_tools(function, message):
    with pytest.raises(TypeError, match=message):
        tool_schema(function)


def test_two_of_a_name():
    with pytest.raises(ValueError, match="same name"):
        FunctionTools([look, look])
