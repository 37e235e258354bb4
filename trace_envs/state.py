"""Immutable records of what happened in an episode.

Invariant: an :class:`EpisodeState` is never changed. A step makes a new one whose history points at the old one's, so that
any number of branches share the turns that they have in common and a snapshot is a reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. Families subclass it; whatever they add is immutable too.

    Attributes:
        task_id: Unique within its data set; `reset(options={"task_id": ...})` picks it.
        prompt: What the agent is asked, in words.
    """

    task_id: str
    prompt: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A well-formed call of one tool."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """Several well-formed calls of one turn, carried out in this order."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """The agent's last word; in a conversation, its reply to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class FormatError:
    """An action that is neither; `message` tells the agent what was wrong and what is expected."""

    message: str


Action = ToolCall | ToolCalls | FinalAnswer | FormatError
Act = ToolCall | ToolCalls | FinalAnswer
"""What an agent means to do: an action that is well-formed."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One thought-action-observation.

    Attributes:
        text: The agent's text, as it came.
        action: What it was parsed to.
        observation: What the agent is shown next; empty after the last turn.
        error: Whether the action was malformed or a tool refused it.
        results: What each call returned, where there were several; the observation is their lines.
    """

    text: str
    action: Action
    observation: str
    error: bool = False
    results: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class History:
    """A persistent list: one turn and the history before it.

    Whatever walks it does so in a loop: a long history must not exhaust the recursion limit.
    """

    turn: Turn
    before: History | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as a flat tuple."""
        return _history_from_turns, (tuple(turns_of(self)),)

    def __eq__(self, other: object) -> bool:
        """Compares turn by turn, newest first, as far as the first turn that both share."""
        if not isinstance(other, History):
            return NotImplemented
        left: History | None = self
        right: History | None = other
        while left is not right:
            if left is None or right is None or left.turn != right.turn:
                return False
            left, right = left.before, right.before
        return True

    def __hash__(self) -> int:
        """Agrees with equality."""
        return hash(tuple(turns_of(self)))

    def __repr__(self) -> str:
        """Lists the turns, oldest first."""
        return f"History({turns_of(self)!r})"


def turns_of(history: History | None) -> list[Turn]:
    """Returns the turns of a history, oldest first."""
    turns = []
    while history is not None:
        turns.append(history.turn)
        history = history.before
    return turns[::-1]


def _history_from_turns(turns: tuple[Turn, ...]) -> History | None:
    history = None
    for turn in turns:
        history = History(turn, history)
    return history


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an episode was judged.

    Attributes:
        is_correct: The environment's own success flag, never a shaped reward.
        reward: Terminal reward, in [0, 1].
        components: Named scores behind it, such as `em` and `f1`.
    """

    is_correct: bool
    reward: float
    components: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Mapping proxies do not pickle; what they stand for does."""
        proxied = isinstance(self.components, MappingProxyType)
        return _outcome, (self.is_correct, self.reward, dict(self.components) if proxied else self.components, proxied)


def _outcome(is_correct: bool, reward: float, components: Mapping[str, float], proxied: bool) -> Outcome:
    return Outcome(is_correct, reward, MappingProxyType(components) if proxied else components)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class EpisodeState:
    """Everything that distinguishes one moment of an episode from another.

    Attributes:
        task: The problem, shared by every state of every episode on it.
        key: Randomness of the episode: whatever is random at turn t is drawn from `(key, t)`.
        turn: Number of turns taken.
        history: The turns, newest first.
        tool_calls: Well-formed calls so far.
        tool_errors: Malformed actions and refused calls so far.
        world: What the family's tools act on, immutable; `None` where tools have no state.
        outcome: The verdict, once the episode has terminated.
        terminated: The agent answered.
        truncated: The turn limit was reached without an answer.
    """

    task: Task
    key: int
    turn: int = 0
    history: History | None = None
    tool_calls: int = 0
    tool_errors: int = 0
    world: Any = None
    outcome: Outcome | None = None
    terminated: bool = False
    truncated: bool = False

    def with_world(self, world: Any) -> EpisodeState:
        """Returns the same moment in another world; quicker than `replace`."""
        return EpisodeState(
            self.task,
            self.key,
            self.turn,
            self.history,
            self.tool_calls,
            self.tool_errors,
            world,
            self.outcome,
            self.terminated,
            self.truncated,
        )

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated

    def turns(self) -> Iterator[Turn]:
        """Yields the turns, oldest first."""
        yield from turns_of(self.history)
