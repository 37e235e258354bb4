"""Conversations as token ids, without ever tokenising the same text twice.

Invariant: the ids of a branch are a concatenation: the prompt's, then for each turn the sampled ids as they were sampled and
the ids of what the environment answered. Text that a model produced is never tokenised again.

A chat template is asked twice: for the prompt, and for what it puts between the end of an assistant's message and the start
of the next one (the *delta*). The delta must not depend on what came before; `ChatCodec` checks that at start-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_PROBE_USER = {"role": "user", "content": "probe"}
_PROBE_ASSISTANT = {"role": "assistant", "content": "answer"}


class ChatTemplateError(ValueError):
    """The tokenizer's chat template cannot be used turn by turn; the message says why."""


class ChatCodec:
    """Turns messages into ids by deltas.

    Args:
        tokenizer: A transformers tokenizer with a chat template and an end-of-sequence token.

    Raises:
        ChatTemplateError: The tokenizer has no template or no end token, or its deltas depend on earlier messages.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            raise ChatTemplateError("the tokenizer has no chat template; set tokenizer.chat_template")
        if tokenizer.eos_token is None:
            raise ChatTemplateError("the tokenizer has no eos_token; set the token that ends an assistant's message")
        self.end_id = int(tokenizer.eos_token_id)
        probe = [{"role": "user", "content": "result"}]
        short = self._delta_text([_PROBE_USER], probe)
        long = self._delta_text([_PROBE_USER, _PROBE_ASSISTANT, _PROBE_USER], probe)
        if short != long:
            raise ChatTemplateError(
                "the chat template renders a message differently in a longer conversation, so that turns cannot be "
                f"appended: {short!r} against {long!r}; use a template that does not rewrite history"
            )

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, generate: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=generate
        )

    def _delta_text(self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str:
        """Returns what follows the end token of an assistant's message when `after` is appended."""
        conversation = [*before, _PROBE_ASSISTANT]
        text = self._render([*conversation, *after], None, True)
        head = self._render(conversation, None, False)
        end = head.rfind(self.tokenizer.eos_token)
        start = head.rfind(_PROBE_ASSISTANT["content"])
        if end < start or not text.startswith(head[: end + len(self.tokenizer.eos_token)]):
            raise ChatTemplateError(
                f"the chat template does not end an assistant's message with the end token {self.tokenizer.eos_token!r}, "
                "or rewrites it when more follows"
            )
        return text[end + len(self.tokenizer.eos_token) :]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> np.ndarray:
        """Returns the ids of a conversation that waits for its first answer, int64 [n]."""
        return np.array(self._encode(self._render(messages, tools, True)), dtype=np.int64)

    def delta_ids(self, messages: Sequence[Mapping[str, Any]], *, ended: bool) -> np.ndarray:
        """Returns the ids that lead from the end of an assistant's message to the start of the next, int64 [n].

        Args:
            messages: What the environment answered.
            ended: Whether the sampled ids end with the end token; if not (cut by the token limit), it is put first.
        """
        text = self._delta_text([_PROBE_USER], messages)
        ids = self._encode(text)
        return np.array(ids if ended else [self.end_id, *ids], dtype=np.int64)

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of sampled ids, the end token left out."""
        kept = [int(i) for i in ids if int(i) != self.end_id]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def new_messages(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the messages after the last assistant's."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    return list(messages[last + 1 :])
