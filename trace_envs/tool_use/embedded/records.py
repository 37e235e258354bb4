"""What generated tasks are made of.

Invariant: every record is immutable; the calls of a request are concrete and solve it in the data it was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trace_envs.snapshots.codec import register
from trace_envs.state import ToolCall
from trace_envs.tool_use.suite import ToolUseTask

Data = Mapping[str, Any]
"""What tools act on: nested dictionaries that are replaced along the path of a change, never changed."""


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the way, and what an agent that knows it would think."""

    thought: str
    call: ToolCall


@dataclass(frozen=True, slots=True)
class Request:
    """Something that a user wants.

    Attributes:
        message: The user's words.
        steps: The way; empty if nothing may be done.
        reply: What the agent says at the end.
        mention: What its reply must hold, such as the number that was asked for.
        vague: The same without one thing that is needed; empty if there is no such wording.
        detail: What the user says when asked for it.
    """

    message: str
    steps: tuple[Step, ...]
    reply: str = "Done."
    mention: str = ""
    vague: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class UserTurn:
    """One message of the user, with what has to come of it.

    Attributes:
        message: The user's words.
        steps: Calls that do what is wanted; empty if nothing can be done yet, or may be.
        reply: What the agent says at the end.
        mention: What its reply must hold.
        withheld: Tools that cannot be called in this turn.
    """

    message: str
    steps: tuple[Step, ...]
    reply: str
    mention: str = ""
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EmbeddedTask(ToolUseTask):
    """A generated conversation.

    Attributes:
        turns: The user's messages, the first of which is in the prompt.
        data: What the world holds at first.
    """

    turns: tuple[UserTurn, ...] = ()
    data: Data = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class EmbeddedWorld:
    """A moment of a conversation.

    Attributes:
        user_turn: Number of the user's messages that have been dealt with.
        data: What tools act on.
        results: What calls have returned, the newest last.
        begun: Number of results before the present user turn.
        passed: For each user turn that is over: whether the data was right, and whether the answer was.
    """

    user_turn: int = 0
    data: Data = field(default_factory=dict, hash=False)
    results: tuple[str, ...] = ()
    begun: int = 0
    passed: tuple[tuple[bool, bool], ...] = ()


for _cls in (Step, UserTurn, EmbeddedTask, EmbeddedWorld):
    register(_cls, f"tool_use.{_cls.__name__}")


@dataclass(frozen=True, slots=True)
class Names:
    """Draws words that nobody has read before and two worlds of different splits never share.

    Attributes:
        words: The split's name words.
        rng: Where they are drawn.
        used: Those drawn already; no word comes twice.
    """

    words: Sequence[str]
    rng: np.random.Generator
    used: set[str] = field(default_factory=set)

    def __call__(self) -> str:
        """Returns a new word."""
        while (word := self.words[int(self.rng.integers(len(self.words)))]) in self.used:
            pass
        self.used.add(word)
        return word

    def pick(self, choices: Sequence[Any]) -> Any:
        """Returns one of the choices."""
        return choices[int(self.rng.integers(len(choices)))]

    def number(self, low: int, high: int) -> int:
        """Returns a whole number from `low` to `high`, the latter included."""
        return int(self.rng.integers(low, high + 1))


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request: how many calls it takes, and how one is made.

    Attributes:
        calls: Calls that it takes.
        make: Returns one for the data as it is, or `None` if the data holds nothing to ask for.
    """

    calls: int
    make: Callable[[Data, Names], Request | None]


@dataclass(frozen=True, slots=True)
class Domain:
    """One of the small worlds.

    Attributes:
        name: The category of its tasks.
        functions: Its tools; see `trace_envs.functions`.
        data: Returns what a new world holds; the second argument is how much of it is beside the point.
        kinds: What users ask for.
        policy: Rules that the agent must keep, told before the first message; empty for none.
    """

    name: str
    functions: tuple[Callable[..., Any], ...]
    data: Callable[[Names, int], Data]
    kinds: tuple[Kind, ...]
    policy: str = ""


def call(tool: str, /, **arguments: Any) -> ToolCall:
    """Returns a tool call."""
    return ToolCall(tool, arguments)
