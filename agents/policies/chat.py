"""Conversations as token ids, without ever tokenising the same text twice.

Invariant: the ids of a branch are a concatenation: the prompt's, then for each turn the sampled ids as they were sampled and
the ids of what the environment answered. Text that a model produced is never tokenised again, and no text of a message
becomes a special token: those come from the template and from sampling alone.

A chat template is asked twice: for the prompt, and for what it puts between the end of an assistant's message and the start
of the next one (the *delta*); see `chat_template`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from agents.policies.chat_template import ChatTemplate, ChatTemplateError, Messages, special_tokens

__all__ = ["ChatCodec", "ChatTemplateError", "new_messages"]


class ChatCodec:
    r"""Turns messages into ids by deltas.

    Special tokens that a message spells out (`<|im_end|>` in a passage that was found) are encoded as the plain text that they
    are. Added tokens that the tokenizer does not mark as special, such as `<tool_call>` in Qwen's, are text and stay one token.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        template_kwargs: Passed on to the template, such as `{"enable_thinking": False}`; see `ChatTemplate` for dates.
        stop_ids: Further tokens that end an action, such as those of the model's generation config
            (`agents.tokenizer_checks.model_stop_ids`).

    Attributes:
        end_id: The token that ends an assistant's message in the template, which need not be the tokenizer's `eos_token`.
        stop_ids: Tokens of which any ends an action when it is sampled: `end_id`, the tokenizer's `eos_token`, those given.
        opener: What the generation prompt has already written of the assistant's message, such as `"<think>\n"`.
        rewrites_history: One sentence on what the template would do to earlier answers, if a conversation were rendered anew,
            and the ids of a branch do not; `""` for nothing.

    Raises:
        ChatTemplateError: The tokenizer has no template, it ends assistants' messages with no token of its own, or its deltas
            depend on earlier messages.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None, stop_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, template_kwargs)
        self.opener, self.rewrites_history = self._template.opener, self._template.rewrites_history
        self.end_id = int(tokenizer.convert_tokens_to_ids(self._template.end))
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_ids = frozenset(int(i) for i in (self.end_id, *eos, *stop_ids))
        self._spelling = re.compile("|".join(map(re.escape, special_tokens(tokenizer))))
        self._takes_space_behind = {t.content for t in tokenizer.added_tokens_decoder.values() if t.rstrip}
        self._takes_space_before = {t.content for t in tokenizer.added_tokens_decoder.values() if t.lstrip}

    def prompt_ids(self, messages: Messages, tools: Sequence[Any] | None) -> np.ndarray:
        """Returns the ids of a conversation that waits for its first answer, int64 [n].

        Raises:
            ChatTemplateError: The template refuses the messages; its words are in the message.
        """
        messages, spelled = self._disguise(messages)
        return np.array(self._encode(self._template.prompt(messages, tools), spelled), dtype=np.int64)

    def delta_ids(self, messages: Messages, *, ended: bool) -> np.ndarray:
        """Returns the ids that lead from the end of an assistant's message to the start of the next, int64 [n].

        Args:
            messages: What the environment answered.
            ended: Whether the sampled ids end with `end_id`; if not (cut by the token limit, or ended by another of
                `stop_ids`), it is put first.

        Raises:
            ChatTemplateError: The template cannot show such messages turn by turn; the message says what to do.
        """
        messages, spelled = self._disguise(messages)
        # Behind the end token, as it will stand: some tokenizers treat the beginning of a text in their own way.
        ids = self._encode(self._template.end + self._template.delta(messages), spelled)
        return np.array(ids[1:] if ended else ids, dtype=np.int64)

    def text_of(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns what the model said: the opener and the text of sampled ids, without the stop token at their end.

        Other special tokens are spelled out; bytes that are no UTF-8 become U+FFFD.
        """
        kept = [int(i) for i in ids]
        if kept and kept[-1] in self.stop_ids:
            kept.pop()
        text = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.opener + text

    def _disguise(self, messages: Messages) -> tuple[Messages, dict[str, str]]:
        """Puts words in the place of the special tokens that messages spell; returns the spelling of each word too."""
        texts = [m["content"] for m in messages if isinstance(m.get("content"), str)]
        if not any(self._spelling.search(text) for text in texts):
            return messages, {}
        name = "QvSpelled"
        while any(name in text for text in texts):
            name += "Q"
        spelled: dict[str, str] = {}

        def disguise(found: re.Match[str]) -> str:
            word = f"{name}{len(spelled)}Qv"
            spelled[word] = found[0]
            return word

        hidden = [
            {**m, "content": self._spelling.sub(disguise, m["content"])} if isinstance(m.get("content"), str) else m
            for m in messages
        ]
        return hidden, spelled

    def _encode(self, text: str, spelled: Mapping[str, str]) -> list[int]:
        """Returns the ids of a rendered text in which every special token is the template's.

        Args:
            text: The text.
            spelled: Words in it that stand for special tokens which are to be encoded as plain text.
        """
        text = _valid(text)
        if not spelled:
            return self._tokenize(text)
        word = re.compile("|".join(spelled))
        ids: list[int] = []
        ready = before = ""
        parts = re.split(f"({self._spelling.pattern})", text)
        # Special tokens part a text before anything else does, so what stands between two of them can be encoded by itself.
        for plain, behind in zip(parts[::2], [*parts[1::2], ""], strict=True):
            if word.search(plain):
                plain = plain.lstrip() if before in self._takes_space_behind else plain
                plain = plain.rstrip() if behind in self._takes_space_before else plain
                plain = word.sub(lambda found: spelled[found[0]], plain)
                ids += self._tokenize(ready) + self._tokenize(plain, split_special_tokens=True)
                ready = behind
            else:
                ready += plain + behind
            before = behind
        return ids + self._tokenize(ready)

    def _tokenize(self, text: str, **keywords: Any) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, **keywords) if text else []


def _valid(text: str) -> str:
    """Returns the text with U+FFFD for halves of characters outside the first plane, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def new_messages(messages: Messages) -> list[Mapping[str, Any]]:
    """Returns the messages after the last assistant's."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    return list(messages[last + 1 :])
