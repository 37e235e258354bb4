"""Tokenizers for the public chat templates that the trl package carries, and what is expected of each template."""

import re
from dataclasses import dataclass

from qwen_family import public_template
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agents.policies.chat_template import TODAY

TEXTS = [
    "First answer, second answer: why the result is what it is.\n\nSo be it.\n",
    "user system assistant model tool\n",
]
SPECIAL = re.compile(
    r"<\|[^|<>'\" ]+\|>|<｜[^｜<>']+｜>|<(?:start|end)_of_turn>|<end_of_utterance>|\[gMASK\]|<sop>|</s>"
    r"|<\|(?:turn|tool|tool_call|channel|tool_response)>|<(?:turn|tool|tool_call|channel|tool_response)\|>"
)
END_OF_TEXT, BEGIN_OF_TEXT = "<|the_end_of_text|>", "<|the_beginning|>"
THINK = "<think>\n"
PROMPT = {"role": "user", "content": "What is it?"}


@dataclass(frozen=True)
class Expected:
    """What the codec must find out about a template that it accepts.

    Attributes:
        end: The token that ends an assistant's message.
        changes: What the template does to earlier answers: `a`, the text around them; `t`, thoughts; `w`, white space.
        tool: Whether it takes messages of the role `tool` turn by turn.
        opener: What the generation prompt has written of the answer.
        between: Text that it puts between a generation prompt and an answer.
    """

    end: str
    changes: str = ""
    tool: bool = True
    opener: str = ""
    between: str = ""


CHATML, GEMMA, GEMMA4, DEEPSEEK = "<|im_end|>", "<end_of_turn>", "<turn|>", "<｜end▁of▁sentence｜>"
COHERE, COHERE2 = "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>"
ATEM = " to=user<|message|>"
ACCEPTED = {
    "cohere": Expected(COHERE, "w", tool=False),
    "cohere_training": Expected(COHERE, "w", tool=False),
    "cohere2": Expected(COHERE2, tool=False),
    "cohere2_training": Expected(COHERE2, tool=False),
    "deepseek_r1_distill": Expected(DEEPSEEK, "t", tool=False, opener=THINK),
    "deepseek_r1_distill_training": Expected(DEEPSEEK, tool=False, opener=THINK),
    "deepseekv3": Expected(DEEPSEEK, "t", tool=False, opener=THINK),
    "deepseekv3_training": Expected(DEEPSEEK, "t", tool=False, opener=THINK),
    "diffusion_gemma": Expected(GEMMA4, "w", tool=False),
    "diffusion_gemma_training": Expected(GEMMA4, "w", tool=False),
    "gemma": Expected(GEMMA, "w", tool=False),
    "gemma_training": Expected(GEMMA, "w", tool=False),
    "gemma3": Expected(GEMMA, "w", tool=False),
    "gemma3_training": Expected(GEMMA, "w", tool=False),
    "gemma4": Expected(GEMMA4, "w", tool=False),
    "gemma4_v2": Expected(GEMMA4, "w"),
    "gemma4_v3": Expected(GEMMA4, "w", tool=False),
    "gemma4_v4": Expected(GEMMA4, "w", tool=False),
    "gemma4_v5": Expected(GEMMA4, "w", tool=False),
    "glm4moe_training": Expected("<|user|>", "atw"),
    "lfm2": Expected(CHATML),
    "lfm2_training": Expected(CHATML),
    "lfm2_v2": Expected(CHATML),
    "lfm2_v2_training": Expected(CHATML),
    "lfm2_2_5": Expected(CHATML, "t"),
    "lfm2_2_5_v2": Expected(CHATML, "t"),
    "lfm2_2_5_vl": Expected(CHATML, "t"),
    "llama3": Expected("<|eot_id|>", "w"),
    "llama3_training": Expected("<|eot_id|>", "w"),
    "llama3_1": Expected("<|eot_id|>", "w"),
    "llama3_2": Expected("<|eot_id|>", "w"),
    "muse_glimmer": Expected("<|eot|>", "a", between=ATEM),
    "muse_glimmer_training": Expected("<|eot|>", "a", between=ATEM),
    **{
        f"nemotron_3_{name}": Expected(CHATML, "tw", opener=THINK)
        for size in ("5_lightning", "nano", "super", "ultra")
        for name in (size, f"{size}_training")
    },
    "phi3": Expected("<|end|>", tool=False),
    "phi3_training": Expected("<|end|>", tool=False),
    "phi3_5": Expected("<|end|>", tool=False),
    "phi3_5_training": Expected("<|end|>", tool=False),
    "qwen2_5": Expected(CHATML),
    "qwen2_5_training": Expected(CHATML),
    "qwen2_5_vl": Expected(CHATML),
    "qwen2_5_vl_training": Expected(CHATML),
    "qwen3": Expected(CHATML, "t"),
    "qwen3_training": Expected(CHATML, "a"),
    "qwen3_vl": Expected(CHATML),
    "qwen3_vl_training": Expected(CHATML),
    "qwen3_instruct_2507": Expected(CHATML),
    "qwen3_instruct_2507_training": Expected(CHATML),
    "qwen3_5_nothink": Expected(CHATML, "aw"),
    "qwen3_5_nothink_training": Expected(CHATML, "w"),
    "qwen3_5_think": Expected(CHATML, "tw", opener=THINK),
    "qwen3_5_think_training": Expected(CHATML, "w", opener=THINK),
    "qwen3_6": Expected(CHATML, "tw", opener=THINK),
    "qwen3_6_training": Expected(CHATML, "w", opener=THINK),
    "qwen3_8": Expected(CHATML, "aw", opener=THINK),
    "qwen3_8_training": Expected(CHATML, "aw", opener=THINK),
}
_PARTS = "does not show the text of an assistant's message: it may want content as a list of parts"
# The last message has no end token: the token that opens the next message is what ends it.
_NO_END = "with a special token of its own: it puts '' behind the last one"
# `<|end|>` also ends the analysis within an answer, so that it must not end an action.
_TWO_ENDS = r"it puts '<\|return\|>' behind the last one and '<\|end\|><\|start\|>user"
REFUSED = {
    "glm4moe": _NO_END,
    "gptoss": _TWO_ENDS,
    "gptoss_training": _TWO_ENDS,
    "idefics3": _PARTS,
    "idefics3_training": _PARTS,
    "llava_next": "refuses messages of the roles user, assistant, user: 'str object' has no attribute 'text'",
    "llava_next_training": "refuses messages of the roles user, assistant, user: 'str object' has no attribute 'text'",
    "smolvlm": _PARTS,
    "smolvlm_training": _PARTS,
}


def family_tokenizer(template, **added):
    """A small byte-level tokenizer that knows the special tokens of a template.

    Args:
        template: The template's text.
        **added: Flags of its special tokens, such as `rstrip=True`.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, BEGIN_OF_TEXT, *dict.fromkeys(SPECIAL.findall(template))]
    backend.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=256 + len(special) + 60,
            special_tokens=[AddedToken(token, normalized=False, special=True, **added) for token in special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=AddedToken(END_OF_TEXT, normalized=False, special=True, **added),
        bos_token=AddedToken(BEGIN_OF_TEXT, normalized=False, special=True, **added),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def family(name):
    """The tokenizer of a public template."""
    return family_tokenizer(public_template(name))


def rendered(codec, messages, tools=None):
    """A conversation that waits for an answer, in one piece."""
    return codec.tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, strftime_now=TODAY.strftime
    )
