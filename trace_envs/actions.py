"""One turn's text, read as one action.

Invariant: `parse` never raises, whatever a model writes, and takes time linear in the text; what it cannot read becomes
a :class:`~trace_envs.state.FormatError` that says what was wrong and what is expected. `render` writes only what
`parse` reads back to the same action.

Every format treats `<think>...</think>` the same way: what is inside is never an action, wherever the block stands. A
`</think>` without a beginning closes a block that the chat template opened; a `<think>` without an end hides all that
follows, so such a turn holds no action.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

from trace_envs.blocks import (
    END_THINK,
    THINK,
    Block,
    Known,
    Malformed,
    bodies,
    call_of_body,
    checked_call,
    outside_thoughts,
    read_answer,
    read_object,
    stray_end,
    tagged,
    tools_of,
    without_tags,
)
from trace_envs.schemas import Tools, by_name, describe, dumps, example_call, kind_of, show
from trace_envs.state import Act, Action, FinalAnswer, FormatError, ToolCall, ToolCalls

_ANSWER = "answer"
_FINAL = "Final Answer:"


class ActionFormat(ABC):
    """A convention for writing tool calls and answers as text.

    A format finds the blocks of a turn (`_scan`) and reads one of them (`_read`).

    Attributes:
        name: What `get_format` knows it by.
    """

    name: ClassVar[str]

    def parse(self, text: str, tools: Tools, *, max_calls: int = 1, plain_answer: bool = False) -> Action:
        """Reads the action of a turn.

        Args:
            text: Whatever the model wrote, of any length and content.
            tools: Schemas of the tools that may be called; arguments are checked against them.
            max_calls: Calls that one turn may make.
            plain_answer: Take words that hold no action for an answer, as users of a conversation do.

        Returns:
            The call or calls, the answer, or a `FormatError` with a message for the model.
        """
        known = by_name(tools)
        try:
            visible = outside_thoughts(text)
            blocks = self._scan(visible, known)
            if not blocks:
                why = self._why_none(visible, known)
                if plain_answer and not why and visible.strip():
                    return FinalAnswer(visible.strip())
                raise Malformed(f"No action found{why}. {self._expected(known)}")
            if len(blocks) > max_calls:
                most = "exactly one" if max_calls == 1 else f"at most {max_calls}"
                raise Malformed(f"Found {len(blocks)} actions in one turn; give {most}. {self._expected(known)}")
            if len(blocks) == 1:
                return self._read(blocks[0], known)
            calls = tuple(self._read(block, known) for block in blocks)
            if not all(isinstance(call, ToolCall) for call in calls):
                raise Malformed(
                    "Found an answer beside other actions in one turn; call tools first, answer in a later turn."
                )
            return ToolCalls(calls)  # type: ignore[arg-type]  # as was just checked
        except Malformed as error:
            return FormatError(str(error))

    def render(self, thought: str, action: Act, tools: Tools | None = None) -> str:
        """Writes a turn, the inverse of `parse`.

        Args:
            thought: Words before the action; may be empty.
            action: What to do.
            tools: The tools the turn will be parsed with. Without them the tools are taken to need exactly the arguments
                of the calls.

        Returns:
            The shortest spelling that `parse` reads back to `action`.

        Raises:
            ValueError: The format has no way to write this, such as an answer that holds the closing tag.
        """
        calls = () if isinstance(action, FinalAnswer) else action.calls if isinstance(action, ToolCalls) else (action,)
        if tools is None:
            tools = tools_of(calls)
        if len(calls) > 1:
            spellings: Iterator[str] = iter(["\n".join(self.render("", call, tools) for call in calls)])
        else:
            spellings = self._spellings(calls[0] if calls else action)  # type: ignore[arg-type]
        for spelling in spellings:
            for before in (thought, f"{THINK}{thought}{END_THINK}"):
                text = self._with_thought(before, spelling) if thought else spelling
                if self.parse(text, tools, max_calls=max(len(calls), 1)) == action:
                    return text
        raise ValueError(f"format {self.name!r} cannot express {show(action)} after the thought {show(thought)}")

    def instructions(self, tools: Tools, *, max_calls: int = 1, plain_answer: bool = False) -> str:
        """Returns system-prompt text that tells a model how to act, with one example of each kind.

        Args:
            tools: Schemas of the tools.
            max_calls: As for `parse`.
            plain_answer: As for `parse`.

        Raises:
            ValueError: The format cannot call one of the tools.
        """
        known = by_name(tools)
        answer = self.render("...", FinalAnswer("..."), tools)
        if not known:
            return f"Think first, then give your answer alone:\n{answer}"
        call = self.render("...", ToolCall(*example_call(known)), tools)
        often = "call a tool" if max_calls == 1 else f"call tools, up to {max_calls} of them one after the other"
        finish = "or finish with your answer alone"
        if plain_answer:
            finish = "or, when nothing is left to do or something is missing, reply to the user without a call"
        return (
            f"Think first, then act exactly once per turn. Either {often}:\n{call}\n"
            f"{finish}:\n{answer}\nTools:\n{describe(known)}"
        )

    @abstractmethod
    def _scan(self, text: str, known: Known) -> list[Block]:
        """Finds the actions of a turn, in order."""

    @abstractmethod
    def _read(self, block: Block, known: Known) -> Action:
        """Reads one of the blocks that `_scan` found."""

    @abstractmethod
    def _spellings(self, action: ToolCall | FinalAnswer) -> Iterator[str]:
        """Yields ways to write an action, the most natural first."""

    @abstractmethod
    def _expected(self, known: Known) -> str:
        """Returns the sentence that error messages end with."""

    def _with_thought(self, thought: str, spelling: str) -> str:
        return f"{thought}\n{spelling}"

    def _why_none(self, text: str, known: Known) -> str:
        """Returns a guess at what a turn without an action was meant to be, to be put after "No action found"."""
        return ""


class HermesFormat(ActionFormat):
    """JSON in `<tool_call>` tags, the convention of Hermes and Qwen models."""

    name = "hermes"
    _TAG = "tool_call"

    def _scan(self, text: str, known: Known) -> list[Block]:
        return tagged(text, (self._TAG, _ANSWER))

    def _read(self, block: Block, known: Known) -> Action:
        if block.tag == _ANSWER:
            return read_answer(block.body)
        call = read_object(block.body, "The text inside <tool_call>", self._expected(known))
        name = call.get("name")
        if not isinstance(name, str):
            raise Malformed(f'The call has no "name" that is a string. {self._expected(known)}')
        extra = next((key for key in call if key not in ("name", "arguments")), None)
        if extra is not None:
            raise Malformed(f'Unexpected key {show(extra)} beside "name" and "arguments". {self._expected(known)}')
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            raise Malformed(f'"arguments" must be an object, not {kind_of(arguments)}. {self._expected(known)}')
        return checked_call(name, arguments, known)

    def _spellings(self, action: ToolCall | FinalAnswer) -> Iterator[str]:
        if isinstance(action, FinalAnswer):
            yield f"<answer>{action.text}</answer>"
            return
        body = dumps({"name": action.name, "arguments": dict(action.arguments)})
        yield f"<tool_call>{body}</tool_call>"
        yield f"<tool_call>{without_tags(body)}</tool_call>"

    def _expected(self, known: Known) -> str:
        if not known:
            return "Expected <answer>...</answer>."
        return 'Expected one <tool_call>{"name": ..., "arguments": {...}}</tool_call> or one <answer>...</answer>.'

    def _why_none(self, text: str, known: Known) -> str:
        return stray_end(text, (self._TAG, _ANSWER))


class TagsFormat(ActionFormat):
    """A tag per tool, the convention of Search-R1: `<search>query</search>`.

    A tool that needs one string takes it as it is; others take a JSON object of arguments between their tags.
    """

    name = "tags"

    def instructions(self, tools: Tools, *, max_calls: int = 1, plain_answer: bool = False) -> str:
        """See base class; also refuses tools named `think` or `answer`, whose tags mean something else."""
        for reserved in ("think", _ANSWER):
            if reserved in by_name(tools):
                raise ValueError(f"format 'tags' cannot call a tool named {reserved!r}; use the format 'hermes'")
        return super().instructions(tools, max_calls=max_calls, plain_answer=plain_answer)

    def _scan(self, text: str, known: Known) -> list[Block]:
        return tagged(text, (*known, _ANSWER))

    def _read(self, block: Block, known: Known) -> Action:
        if block.tag == _ANSWER:
            return read_answer(block.body)
        return call_of_body(block, known, f"The text inside <{block.tag}>")

    def _spellings(self, action: ToolCall | FinalAnswer) -> Iterator[str]:
        if isinstance(action, FinalAnswer):
            yield f"<answer>{action.text}</answer>"
            return
        for body in bodies(action):
            yield f"<{action.name}>{body}</{action.name}>"

    def _expected(self, known: Known) -> str:
        calls = ", ".join(f"<{name}>...</{name}>" for name in list(known)[:20])
        return f"Expected exactly one of {calls}, <answer>...</answer>." if calls else "Expected <answer>...</answer>."

    def _why_none(self, text: str, known: Known) -> str:
        start = text.find("<")
        while start >= 0:
            end = text.find(">", start, start + 66)  # a window, so that a megabyte of "<" stays linear
            name = text[start + 1 : end] if end >= 0 else ""
            if name.isidentifier() and name not in known:
                return f": unknown tool {show(name)}"
            start = text.find("<", start + 1)
        return stray_end(text, (*known, _ANSWER))


class ReActFormat(ActionFormat):
    """Lines that begin with `Thought:`, `Action:` and `Final Answer:`, the convention of ReAct.

    `Action: search[query]` and `Action: search` followed by `Action Input: {...}` mean the same, as do
    `Final Answer: ...` and `Action: finish[...]`. What follows `Action Input:` or `Final Answer:` runs to the next
    marker.
    """

    name = "react"
    _MARKERS = ("Thought:", "Action:", "Action Input:", "Observation:", _FINAL)

    def _scan(self, text: str, known: Known) -> list[Block]:
        blocks: list[Block] = []
        bare: str | None = None  # an `Action: name` that may still get its `Action Input:`
        for marker, body in self._sections(text):
            if marker == "Action Input:":
                if bare is None:
                    raise Malformed(f"Action Input without an Action: name line before it. {self._expected(known)}")
                blocks[-1] = Block(bare, body.strip())
                bare = None
            elif marker == "Action:":
                name, bracket, argument = body.split("\n", 1)[0].strip().partition("[")
                name = name.strip()
                if bracket and not argument.endswith("]"):
                    raise Malformed(f"The bracket after Action: {show(name)} is not closed. {self._expected(known)}")
                bare = None if bracket else name
                if name.lower() == "finish" and name not in known:
                    name = _FINAL
                blocks.append(Block(name, argument[:-1].strip()))
            elif marker == _FINAL:
                bare = None
                blocks.append(Block(_FINAL, body))
        return blocks

    def _sections(self, text: str) -> Iterator[tuple[str, str]]:
        """Yields each marker with the text up to the next one."""
        marker, lines = "", list[str]()
        for line in text.split("\n"):  # not splitlines: an answer may hold exotic line separators
            head = line.lstrip()
            found = next((marker for marker in self._MARKERS if head.startswith(marker)), None)
            if found is None:
                lines.append(line)
            else:
                yield marker, "\n".join(lines)
                marker, lines = found, [head[len(found) :]]
        yield marker, "\n".join(lines)

    def _read(self, block: Block, known: Known) -> Action:
        if block.tag == _FINAL:
            return read_answer(block.body)
        return call_of_body(block, known, f"The input of {show(block.tag)}")

    def _spellings(self, action: ToolCall | FinalAnswer) -> Iterator[str]:
        if isinstance(action, FinalAnswer):
            yield f"Final Answer: {action.text}"
            return
        for body in bodies(action):
            yield (
                f"Action: {action.name}\nAction Input: {body}" if body[:1] == "{" else f"Action: {action.name}[{body}]"
            )

    def _with_thought(self, thought: str, spelling: str) -> str:
        return f"Thought: {thought}\n{spelling}"

    def _expected(self, known: Known) -> str:
        if not known:
            return "Expected one line Final Answer: ..."
        return "Expected one line Action: tool[input], or Action: tool and Action Input: {...}, or Final Answer: ..."


_FORMATS: dict[str, Callable[[], ActionFormat]] = {
    "hermes": HermesFormat,
    "react": ReActFormat,
    "tags": TagsFormat,
}


def get_format(name: str) -> ActionFormat:
    """Returns the format of that name.

    Raises:
        ValueError: There is none; the message lists the known ones.
    """
    if name not in _FORMATS:
        raise ValueError(f"unknown action format {name!r}; known: {', '.join(sorted(_FORMATS))}")
    return _FORMATS[name]()
