"""A tiny Qwen3 with random weights and the real tokenizer of its family, built from the BPE ranks in the data folder.

As a script it saves both as a model folder: `python tests/engines/qwen_family.py <folder>`.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter

RANKS = "tokenizers/qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# From id 151,643 on, in the order of Qwen3's vocabulary; those of tools, thoughts and code are not marked as special there.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
PLAIN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
EMBEDDINGS = 151_936
# What Qwen's templates share, for environments without trl: it has no tools, and leaves thoughts as they are.
CHATML = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def ranks_file(data_dir=None):
    """The file of BPE ranks in a data folder, by default that of TRACE_DATA_DIR or beside the repository."""
    default = os.environ.get("TRACE_DATA_DIR", Path(__file__).parents[2].parent / "shared" / "data")
    return Path(data_dir or default) / RANKS


def public_template(name):
    """A chat template that the trl package carries, such as `qwen3`."""
    if (package := find_spec("trl")) is None:
        raise ImportError("the public templates come with trl: pip install 'trace-envs[trl]', or pass template=CHATML")
    [folder] = package.submodule_search_locations
    return (Path(folder) / "chat_templates" / f"{name}.jinja").read_text()


def qwen_tokenizer(data_dir=None, template=None):
    """The tokenizer of Qwen3, with its public template unless another is given; takes about two seconds."""
    backend = TikTokenConverter(vocab_file=str(ranks_file(data_dir)), pattern=PATTERN).converted()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in PLAIN])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = public_template("qwen3") if template is None else template
    return tokenizer


def tiny_qwen(tokenizer, seed=0):
    """A Qwen3 of width 64 and two layers with random weights; its vocabulary is as large as the real one's."""
    config = Qwen3Config(
        vocab_size=EMBEDDINGS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return model


def save_tiny_qwen(folder, data_dir=None, template=None, seed=0):
    """Saves model and tokenizer as a folder that transformers and vLLM load; returns both."""
    tokenizer = qwen_tokenizer(data_dir, template)
    model = tiny_qwen(tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plain-template", action="store_true", help="the short template here, which needs no trl")
    arguments = parser.parse_args()
    save_tiny_qwen(arguments.folder, template=CHATML if arguments.plain_template else None)
