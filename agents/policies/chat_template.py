"""A chat template as text: the prompt, and what it puts between one assistant's message and the next.

Invariant: a *delta* depends on the new messages alone. The template is asked for it in a conversation of probes, with a word in
the place of what the model said, and the text behind that word is taken; that the text is the same in other conversations is
checked once, at start-up. So a template may rewrite what came earlier: it is never asked for that.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

TODAY = datetime.date(2024, 7, 26)
"""What templates that print the current date are told, so that a prompt has the same tokens every day (Llama's own default)."""

# Letters and digits only: templates strip white space, split at tags and escape quotes.
_SAID = "QvSaidByTheModelQv"
_PROBE = "QvProbeQv"
_USER, _TOOL = {"role": "user", "content": _PROBE}, {"role": "tool", "content": _PROBE}
_ANSWER = {"role": "assistant", "content": "answer"}
_THOUGHT = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nanswer"}
_OPENED = re.compile(r"<(?:\w+:)?(?:think|thinking|thought|reasoning)>\s*\Z")
_CLOSED = re.compile(r"</(?:\w+:)?(?:think|thinking|thought|reasoning)>\s*\Z")

Messages = Sequence[Mapping[str, Any]]


class ChatTemplateError(ValueError):
    """The tokenizer's chat template cannot be used turn by turn; the message says why and what to do."""


class ChatTemplate:
    r"""Renders prompts and deltas.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        template_kwargs: Passed on to the template, such as `{"enable_thinking": False}`. A template that asks for the current
            date is told `TODAY` unless this holds a `strftime_now` of its own, or the variable that the template prefers
            (`date_string` in Llama 3).

    Attributes:
        end: Spelling of the token that ends an assistant's message.
        opener: What the generation prompt has already written of the assistant's message: `"<think>\n"` or the like, or `""`.
        rewrites_history: What the template would do to earlier answers if a conversation were rendered anew; `""` for nothing.

    Raises:
        ChatTemplateError: There is no template, it ends assistants' messages with no token of its own, or its deltas depend on
            earlier messages.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None):
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise ChatTemplateError("the tokenizer has no chat template; set tokenizer.chat_template")
        # A tokenizer may have several; one of them has to serve prompts with tools and deltas.
        self._template: str = tokenizer.get_chat_template()
        self._kwargs = {"strftime_now": TODAY.strftime} if "strftime_now" in self._template else {}
        self._kwargs |= template_kwargs or {}
        self.end = self._find_end()
        self.opener = _opened(self._render([_USER]))
        self._refused: dict[str, str] = {}
        for message in (_TOOL, _USER):
            try:
                self._check_role(message)
            except ChatTemplateError as error:
                self._refused[str(message["role"])] = str(error)
        if "user" in self._refused:
            raise ChatTemplateError(self._refused["user"])
        self._folds_system = self._raises([{"role": "system", "content": _PROBE}, _USER])
        self.rewrites_history = self._rewriting()

    def prompt(self, messages: Messages, tools: Sequence[Any] | None = None) -> str:
        """Returns the text of a conversation that waits for its first answer.

        Where the template refuses a system message (Gemma 1 and 2), it is put in front of the first user's message, with an
        empty line between them, as the template of Gemma 3 does.

        Raises:
            ChatTemplateError: The template refuses the messages; its words are in the message.
        """
        if self._folds_system and len(messages) > 1 and messages[0]["role"] == "system":
            system, first = messages[:2]
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *messages[2:]]
        return self._render(messages, tools)

    def delta(self, messages: Messages) -> str:
        """Returns the text between the end token of an assistant's message and the start of the next.

        Raises:
            ChatTemplateError: The template cannot show one of the messages, or not without a change to earlier ones.
        """
        for message in messages:
            if message["role"] in self._refused:
                raise ChatTemplateError(self._refused[message["role"]])
        return self._delta([_USER], messages)

    def _render(self, messages: Messages, tools: Sequence[Any] | None = None, *, generate: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generate,
                **self._kwargs,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(str(m["role"]) for m in messages)
            raise ChatTemplateError(f"the chat template refuses messages of the roles {roles}: {error}") from error

    def _raises(self, messages: Messages) -> bool:
        try:
            self._render(messages)
        except ChatTemplateError:
            return True
        return False

    def _behind(self, before: Messages, after: Messages, *, generate: bool = True) -> str:
        """Returns what the template writes behind an assistant's text."""
        text = self._render([*before, {"role": "assistant", "content": _SAID}, *after], generate=generate)
        _, found, rest = text.partition(_SAID)
        if not found:
            raise ChatTemplateError(
                "the chat template does not show the text of an assistant's message: it may want content as a list of parts, "
                "as templates of vision models do; set tokenizer.chat_template to one for text"
            )
        return rest

    def _find_end(self) -> str:
        inner, last = self._behind([_USER], [_USER]), self._behind([_USER], [], generate=False)
        end = next((token for token in special_tokens(self._tokenizer) if inner.startswith(token)), None)
        if end is None or not last.startswith(end):
            raise ChatTemplateError(
                "the chat template does not end an assistant's message with a special token of its own: it puts "
                f"{last[:40]!r} behind the last one and {inner[:40]!r} behind an earlier one; use a template that ends both "
                "with the same token, and a tokenizer that marks it as special"
            )
        return end

    def _delta(self, before: Messages, after: Messages) -> str:
        rest = self._behind(before, after)
        if not rest.startswith(self.end):
            raise ChatTemplateError(
                f"the chat template ends an assistant's message with {self.end!r} in some conversations, but with "
                f"{rest[:40]!r} before the roles {[m['role'] for m in after]}; use a template that always ends it"
            )
        return rest[len(self.end) :]

    def _check_role(self, message: Mapping[str, Any]) -> None:
        """Checks that a message of this role can be appended to any conversation.

        Raises:
            ChatTemplateError: It cannot.
        """
        role = message["role"]
        advice = (
            "pass the environment action_format='tags', which sends results of tools as messages of the user"
            if role == "tool"
            else "use a template that shows every message in the same way"
        )
        try:
            short = self._delta([_USER], [message])
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{error}; {advice}") from error
        if _PROBE not in short:
            raise ChatTemplateError(f"the chat template leaves out messages of the role {role!r}; {advice}")
        if (opened := _opened(short)) != self.opener:
            raise ChatTemplateError(
                f"the chat template asks for the assistant with {self.opener!r} in the prompt, but with {opened!r} after a "
                f"message of the role {role!r}; {advice}"
            )
        longer = [[_USER, _ANSWER, _USER], [_USER, _THOUGHT, _USER], [_USER, _THOUGHT, _USER, _ANSWER, _USER]]
        if "tool" not in self._refused:
            longer += [[_USER, _ANSWER, _TOOL], [_USER, _THOUGHT, _TOOL, _ANSWER, _TOOL]]
        for before in longer:
            long = self._delta(before, [message])
            if short != long:
                raise ChatTemplateError(
                    f"the chat template renders a message of the role {role!r} differently in a longer conversation, so that "
                    f"turns cannot be appended: {short!r} against {long!r}; {advice}"
                )

    def _rewriting(self) -> str:
        """Returns what becomes of earlier answers when the template renders them, as one sentence."""
        prompt = self._render([_USER])
        answers = [m for m in (_USER, _TOOL) if m["role"] not in self._refused]
        around = "adds to or takes from the text around earlier answers (such as an empty thought)"
        opened = self.opener or "<think>\n"
        thought = f"{opened}why\n{opened.strip().replace('<', '</')}\n\nanswer"
        probes = [] if self.opener else [("answer", around)]
        if not _CLOSED.search(prompt):  # with the thought closed in advance the model has none
            probes.append((thought, "drops or rewrites earlier thoughts"))
        probes.append(("  answer \n", "strips white space from earlier answers"))
        reasons: dict[str, None] = {}
        for content, reason in probes:
            sampled, said = content.removeprefix(self.opener), {"role": "assistant", "content": content}
            for message in answers:
                text, kept = self._render([_USER, said, message]), sampled + self.end + self.delta([message])
                if not text.endswith(kept):
                    reasons[reason] = None
                elif content.startswith(self.opener) and text != prompt + kept:
                    reasons[around] = None
        if not reasons:
            return ""
        return (
            f"the chat template {' and '.join(reasons)}; the tokens of an episode keep every answer as it was sampled"
        )


def special_tokens(tokenizer: Any) -> list[str]:
    """Returns the spellings of a tokenizer's special tokens, the longest first."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return sorted(added.union(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))


def _opened(text: str) -> str:
    """Returns the tag at the end of a generation prompt that opens a thought, with the white space behind it."""
    found = _OPENED.search(text)
    return found[0] if found else ""
