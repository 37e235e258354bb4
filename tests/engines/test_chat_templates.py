import copy
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from template_families import ACCEPTED, END_OF_TEXT, PROMPT, REFUSED, THINK, family, family_tokenizer, rendered
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agents.policies.chat import ChatCodec, ChatTemplateError, new_messages

REASONS = {
    "a": "adds to or takes from the text around earlier answers",
    "t": "drops or rewrites earlier thoughts",
    "w": "strips white space from earlier answers",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Finds passages.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "description": "Words."}},
                "required": ["query"],
            },
        },
    }
]


def branch(codec, answers, results, tools=None):
    """A conversation as a policy builds it, and as messages; answers are as they were sampled, without the end token."""
    messages = [PROMPT]
    ids = codec.prompt_ids(messages, tools).tolist()
    for answer, result in zip(answers, results, strict=True):
        action = [*codec.tokenizer.encode(answer, add_special_tokens=False), codec.end_id]
        messages += [{"role": "assistant", "content": codec.text_of(action)}, result]
        assert codec.text_of(action) == codec.opener + answer
        ids += [*action, *codec.delta_ids(new_messages(messages), ended=True).tolist()]
    return ids, messages


def results(role):
    return [{"role": role, "content": text} for text in ("the result is 12", "Error: no passage", "so be it")]


def roles(expected):
    return ("user", "tool") if expected.tool else ("user",)


def bare(text, expected):
    """A text without thoughts, white space and what the template puts before answers."""
    text = re.sub(
        r"<think>.*?</think>", "", text.replace(expected.between, "") if expected.between else text, flags=re.S
    )
    return re.sub(r"\s|<think>", "", text)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_found_out_about_a_public_template(name):
    expected, tokenizer = ACCEPTED[name], family(name)
    codec = ChatCodec(tokenizer)
    assert codec.end_id == tokenizer.convert_tokens_to_ids(expected.end) != tokenizer.unk_token_id
    assert codec.stop_ids == {codec.end_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)}
    assert codec.opener == expected.opener
    assert {k for k, reason in REASONS.items() if reason in codec.rewrites_history} == set(expected.changes)
    assert bool(codec.rewrites_history) == bool(expected.changes)
    if not expected.tool:
        with pytest.raises(
            ChatTemplateError, match=r"role.* tool.*pass the environment action_format='tags'|'tool'.*'tags'"
        ):
            codec.delta_ids(results("tool")[:1], ended=True)


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_deltas_make_the_conversation_that_one_rendering_makes(name, tools):
    expected, codec = ACCEPTED[name], ChatCodec(family(name))
    plain = ["First answer, I think.", "Second answer: 12", "So be it"]
    if expected.opener:
        plain = [f"why {i}\n</think>\n\n{answer}" for i, answer in enumerate(plain)]
    tricky = [
        f"{'' if expected.opener else THINK}why\n</think>\n\nFirst",
        f"{'' if expected.opener else THINK}why </think> it is \n\n",
        "no end of the thought" if expected.opener else "  answer \n",
    ]
    for role in roles(expected):
        ids, messages = branch(codec, plain, results(role), tools)
        whole = rendered(codec, messages, tools)
        if "a" not in expected.changes and not (expected.opener and "t" in expected.changes):
            assert ids == codec.tokenizer.encode(whole, add_special_tokens=False)
        else:
            assert bare(codec.tokenizer.decode(ids), expected) == bare(whole, expected)
        ids, messages = branch(codec, tricky[:2], results(role)[:2], tools)
        assert bare(codec.tokenizer.decode(ids), expected) == bare(rendered(codec, messages, tools), expected)
        if not expected.changes:
            assert codec.tokenizer.decode(ids) == rendered(codec, messages, tools)
        # Whatever the template does to earlier answers, the branch holds them to the letter.
        ids, _ = branch(codec, tricky, results(role), tools)
        text = codec.tokenizer.decode(ids)
        assert all(answer + expected.end in text for answer in tricky)


@pytest.mark.parametrize("name", REFUSED)
def test_public_templates_that_cannot_be_used_turn_by_turn_say_why(name):
    with pytest.raises(ChatTemplateError, match=REFUSED[name]):
        ChatCodec(family(name))


def test_templates_that_are_new_in_trl_are_accepted_or_refused_in_words():
    [folder] = find_spec("trl").submodule_search_locations
    names = {path.stem for path in (Path(folder) / "chat_templates").glob("*.jinja")}
    assert len(names & {*ACCEPTED, *REFUSED}) > 60
    for name in names - {*ACCEPTED, *REFUSED}:
        try:
            codec = ChatCodec(family(name))
        except ChatTemplateError:
            continue
        ids, _ = branch(codec, ["answer", "answer"], results("user")[:2])
        assert ids.count(codec.end_id) >= 2


# One template after the other.


def test_the_end_token_need_not_be_the_tokenizers():
    codec = ChatCodec(family("gemma3"), stop_ids=[7])
    tokenizer = codec.tokenizer
    assert tokenizer.convert_ids_to_tokens(codec.end_id) == "<end_of_turn>" != tokenizer.eos_token
    assert codec.stop_ids == {codec.end_id, tokenizer.eos_token_id, 7}
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    assert ChatCodec(tokenizer).stop_ids == {codec.end_id}


def test_an_action_that_was_cut_is_ended_for_it():
    codec = ChatCodec(family("qwen3"))
    for role in ("user", "tool"):
        ended = codec.delta_ids(results(role)[:1], ended=True)
        assert codec.delta_ids(results(role)[:1], ended=False).tolist() == [codec.end_id, *ended.tolist()]
        assert ended.dtype == np.int64


def test_thinking_can_be_switched_off():
    on, off = (ChatCodec(family("qwen3"), kwargs) for kwargs in (None, {"enable_thinking": False}))
    empty = off.tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    for role in ("user", "tool"):
        asked = [c.delta_ids(results(role)[:1], ended=True).tolist() for c in (on, off)]
        assert asked[1] == asked[0] + empty
    assert on.opener == off.opener == ""
    assert REASONS["a"] in off.rewrites_history and REASONS["a"] not in on.rewrites_history
    thinking, instructed = (ChatCodec(family("qwen3_6"), {"enable_thinking": on}) for on in (True, False))
    assert (thinking.opener, instructed.opener) == (THINK, "")


def test_the_opener_is_part_of_what_the_model_said():
    codec = ChatCodec(family("deepseek_r1_distill"))
    ids = codec.tokenizer.encode("why\n</think>\n\nIt is 12", add_special_tokens=False)
    for end in ([], [codec.end_id], [codec.tokenizer.eos_token_id]):
        assert codec.text_of(ids + end) == "<think>\nwhy\n</think>\n\nIt is 12"


def test_a_system_message_that_the_template_refuses_goes_into_the_first_users():
    system = {"role": "system", "content": "Answer in words."}
    codec = ChatCodec(family("gemma"))
    text = codec.tokenizer.decode(codec.prompt_ids([system, PROMPT], None))
    assert (
        text
        == "<|the_beginning|><start_of_turn>user\nAnswer in words.\n\nWhat is it?<end_of_turn>\n<start_of_turn>model\n"
    )
    later = ChatCodec(family("gemma3"))  # does the same by itself
    assert later.tokenizer.decode(later.prompt_ids([system, PROMPT], None)) == text
    codec = ChatCodec(family("qwen2_5"))
    text = codec.tokenizer.decode(codec.prompt_ids([system, PROMPT], TOOLS))
    assert text == rendered(codec, [system, PROMPT], TOOLS) and "Answer in words." in text and '"search"' in text


def test_the_words_of_a_template_that_refuses_a_prompt_are_passed_on():
    codec = ChatCodec(family("gemma"))
    with pytest.raises(ChatTemplateError, match="of the roles user, user: Conversation roles must alternate"):
        codec.prompt_ids([PROMPT, PROMPT], None)
    with pytest.raises(ChatTemplateError, match="of the roles user, assistant, user, user: Conversation roles must"):
        codec.delta_ids(results("user")[:2], ended=True)


def test_an_environment_may_answer_nothing():
    for name in ("qwen3", "gemma", "llama3_2"):
        codec = ChatCodec(family(name))
        asked = codec.delta_ids([], ended=True).tolist()
        assert codec.delta_ids(results("user")[:1], ended=True).tolist()[-len(asked) + 1 :] == asked[1:]
        assert len(asked) > 1


def test_prompts_do_not_depend_on_the_day():
    def today(codec):
        return re.search("Today Date: (.*)", codec.tokenizer.decode(codec.prompt_ids([PROMPT], None)))[1]

    assert today(ChatCodec(family("llama3_2"))) == "26 Jul 2024"
    assert today(ChatCodec(family("llama3_2"), {"date_string": "1 May 2030"})) == "1 May 2030"
    assert today(ChatCodec(family("llama3_2"), {"strftime_now": lambda form: form})) == "%d %b %Y"


MINIMAL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}<|user|>"
)


def minimal(old="", new=""):
    assert old in MINIMAL
    tokenizer = family_tokenizer(MINIMAL + "<|assistant|>")
    tokenizer.chat_template = MINIMAL.removesuffix("<|user|>").replace(old, new)
    return tokenizer


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<|end|>", "", r"it puts '' behind the last one and '<\|user\|>"),
        ("<|end|>", " <|end|>", r"it puts ' <\|end\|>' behind the last one"),
        ("<|end|>", "-end-", "it puts '-end-' behind the last one"),
        ("<|end|>", "{% if loop.last %}<|end|>{% endif %}", r"'<\|end\|>' behind the last one and '<\|user\|>"),
        ("{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}", "does not show the text"),
        ("<|{{ m.role }}|>", "<|{{ m.role }}|>{{ loop.index }}", "role 'user' differently in a longer conversation"),
        (
            "{{ m.content }}",
            "{% if loop.index < 3 %}{{ m.content }}{% endif %}",
            "leaves out messages of the role 'user'",
        ),
        (
            "{{ m.content }}",
            "{{ m.content + m.name }}",
            "roles user, assistant, user: 'dict object' has no attribute 'name'",
        ),
        ("{{ m.content }}", "{{ m.content + 1 }}", "roles user, assistant, user: can only concatenate str"),
        ("{{ m.content }}", "{{ raise_exception('Not today') }}", "roles user, assistant, user: Not today"),
        (
            "<|assistant|>",
            "<|assistant|>{% if messages|length < 2 %}<think>{% endif %}",
            "'<think>' in the prompt, but with ''",
        ),
    ],
)
def test_templates_that_cannot_be_used_turn_by_turn_are_refused(old, new, words):
    ChatCodec(minimal())
    with pytest.raises(ChatTemplateError, match=words):
        ChatCodec(minimal(old, new))


def test_a_template_that_ends_messages_in_two_ways_is_refused():
    ends = "{% if loop.index > 3 %}<|user|>{% else %}<|end|>{% endif %}"
    with pytest.raises(
        ChatTemplateError, match=r"ends an assistant's message with '<\|end\|>' in some conversations, but"
    ):
        ChatCodec(minimal("<|end|>", ends))


def test_an_end_token_that_the_tokenizer_takes_for_text_is_refused():
    # Any message could spell it, and end an answer that way.
    tokenizer = minimal()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<done>")
    tokenizer.add_tokens([AddedToken("<done>", special=False, normalized=False)])
    with pytest.raises(
        ChatTemplateError, match=r"'<done>' behind the last one .* a tokenizer that marks it as special"
    ):
        ChatCodec(tokenizer)
    tokenizer.add_tokens([AddedToken("<done>", special=True, normalized=False)])
    assert ChatCodec(tokenizer).end_id == tokenizer.convert_tokens_to_ids("<done>")


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = minimal()
    for template in (None, ""):
        tokenizer.chat_template = template
        with pytest.raises(ChatTemplateError, match=r"no chat template; set tokenizer\.chat_template"):
            ChatCodec(tokenizer)


def test_of_several_templates_one_serves_prompts_and_deltas():
    tokenizer = family("qwen2_5")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": minimal().chat_template}
    one = ChatCodec(family("qwen2_5"))
    assert np.array_equal(ChatCodec(tokenizer).prompt_ids([PROMPT], TOOLS), one.prompt_ids([PROMPT], TOOLS))


def test_a_delta_is_encoded_as_it_stands_behind_the_end_token():
    # Like SentencePiece: a word at the start of a text is another token than behind a special token.
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
    letters = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(["said: user user said: model"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} said: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant said: {% endif %}"
    )
    codec = ChatCodec(tokenizer)
    messages = [PROMPT, {"role": "assistant", "content": "model"}, results("user")[0]]
    whole = tokenizer.encode(rendered(codec, messages), add_special_tokens=False)
    delta = codec.delta_ids(messages[-1:], ended=False).tolist()
    assert whole[-len(delta) :] == delta
    alone = tokenizer.encode(rendered(codec, messages[-1:]), add_special_tokens=False)
    assert len(alone) > 2 and alone != delta[1:]
