"""The tiny agent: a Qwen3-architecture model of under one million parameters, and a tokenizer that fits its world.

Invariant: the tokenizer encodes any text and decodes it to the same text; what is special about it is only that the words of
the synthetic encyclopedia are short in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trace_envs.multihop_qa.synthetic import name_chunks
from trace_envs.schemas import Tools, by_name, dumps

END, USER, TOOL, ASSISTANT = "<|im_end|>", "<|user|>", "<|tool|>", "<|assistant|>"
# What stands around queries, answers and passages in every turn of multi-hop questions; as single tokens they cost a step each.
FORMAT_TOKENS = (
    '\n<tool_call>{"name": "search", "arguments": {"query": "',
    '"}}</tool_call>',
    "\n<answer>",
    "</answer>",
    "[1]",
    "\n[2]",
    "\n[3]",
)
# The system message and the tool schemas are left out: a model that was only ever shown one tool knows them.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}<|user|>{{ message.content }}"
    "{%- elif message.role == 'tool' -%}<|tool|>{{ message.content }}"
    "{%- elif message.role == 'assistant' -%}<|assistant|>{{ message.content }}<|im_end|>"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def tokens_of_calls(tools: Tools) -> list[str]:
    """Returns what stands around the arguments of a call in the format `hermes`, with them in the schema's order.

    Optional arguments are left out: whoever uses them spells them. The schema itself is one token too, for tools that the user
    gives in the middle of a conversation.
    """
    tokens = ["\n<answer>", "<answer>", "</answer>"]
    for function in by_name(tools).values():
        parameters = function["parameters"]
        tokens.append(dumps(dict(function)))
        before, quoted = f'\n<tool_call>{{"name": "{function["name"]}", "arguments": {{', False
        for name in parameters.get("required", ()):
            kind = parameters["properties"][name].get("type")
            tokens.append(f'{before}"{name}": ' + '"' * (kind == "string"))
            before, quoted = '"' * (kind == "string") + ", ", kind == "string"
        tokens.append('"' * quoted + "}}</tool_call>")
    return tokens


def build_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = 1024,
    format_tokens: Sequence[str] = FORMAT_TOKENS,
    numbers: str = "[ ]?[0-9]{1,2}",
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE whose name words are two tokens, opener and closer.

    Args:
        texts: Training text.
        vocab_size: Size of the vocabulary, special tokens included.
        format_tokens: Texts that are one token each.
        numbers: What a token of a number may be, as a regular expression.
    """
    openers, closers = name_chunks()
    # Without the split BPE would learn the names of the training world as single tokens and spell all others.
    opener = Regex(f"[ ]?(?:{'|'.join(openers)})(?=(?:{'|'.join(closers)})\\b)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(opener, behavior="isolated"),
            pre_tokenizers.Split(Regex(numbers), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, USER, TOOL, ASSISTANT]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(format_tokens),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in format_tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    vocab_size: int, *, width: int = 128, layers: int = 3, heads: int = 4, seed: int = 0, end_id: int | None = None
) -> Any:
    """Returns a Qwen3 model with random weights.

    Args:
        vocab_size: Size of the vocabulary.
        width: Hidden size.
        layers: Number of layers.
        heads: Attention heads, each with its own keys and values (sharing them saves nothing at this size).
        seed: Seeds the weights.
        end_id: Token that ends a turn, for servers that look for it in the model's configuration.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=end_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
