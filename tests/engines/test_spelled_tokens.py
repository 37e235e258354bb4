"""Text that spells special tokens, sampled or shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_family import public_template
from template_families import END_OF_TEXT, PROMPT, family, family_tokenizer, rendered
from tokenizers import AddedToken

from agents.policies.chat import ChatCodec, new_messages


@pytest.fixture(scope="module")
def qwen():
    return ChatCodec(family("qwen2_5"))


def special_ids(codec, ids):
    special = set(codec.tokenizer.all_special_ids)
    return [i for i in ids if i in special]


SPELLINGS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", END_OF_TEXT, "<|im_", "end|>", "<think>", "QvSpelled0Qv", "\ud800"]
)
OBSERVATION = st.lists(SPELLINGS | st.text(st.characters(), max_size=8), max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_branch_is_prompt_actions_and_deltas_whatever_was_said(qwen, data):
    ids, parts, messages = [], [], [{"role": "user", "content": data.draw(OBSERVATION)}]
    ids += (shown := qwen.prompt_ids(messages, None).tolist())
    parts.append((shown, rendered(qwen, messages)))
    assert len(special_ids(qwen, shown)) == len(special_ids(qwen, qwen.prompt_ids([PROMPT], None).tolist()))
    for _ in range(data.draw(st.integers(0, 3))):
        action = data.draw(st.lists(st.integers(0, len(qwen.tokenizer) - 1), max_size=12))
        role = data.draw(st.sampled_from(["user", "tool"]))
        result = {"role": role, "content": data.draw(OBSERVATION)}
        before = len(rendered(qwen, messages))
        messages += [{"role": "assistant", "content": qwen.text_of(action)}, result]
        ended = bool(action) and action[-1] == qwen.end_id
        delta = qwen.delta_ids(new_messages(messages), ended=ended).tolist()
        said = qwen.tokenizer.decode(action[: len(action) - (bool(action) and action[-1] in qwen.stop_ids)])
        assert qwen.text_of(action) == said
        # What the environment said is all text; special tokens are those of an answer that spells none.
        plain = qwen.delta_ids([{"role": role, "content": "plain"}], ended=ended).tolist()
        assert special_ids(qwen, delta) == special_ids(qwen, plain)
        parts.append(
            (delta, rendered(qwen, messages)[before + len(said) :].removeprefix("<|im_end|>" if ended else ""))
        )
        ids += action + delta
    at = 0
    for part, meant in parts:
        text = qwen.tokenizer.decode(part)
        assert text == meant.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        at += len(part)
    assert at <= len(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 400), max_size=20))
def test_only_a_stop_token_at_the_end_is_left_out_of_the_text(qwen, ids):
    tokenizer = qwen.tokenizer
    ids = [i % len(tokenizer) for i in ids]
    for end in qwen.stop_ids:
        assert qwen.text_of([*ids, end]) == tokenizer.decode(ids)
    text = qwen.text_of([*ids, qwen.end_id, 300])
    assert text.count("<|im_end|>") >= 1 + ids.count(qwen.end_id)
    assert text.encode()  # invalid pieces have become U+FFFD


def test_bytes_that_are_no_text_become_replacement_characters(qwen):
    [half, *_] = qwen.tokenizer.encode("é", add_special_tokens=False)
    assert qwen.text_of([half, half]) == "\ufffd\ufffd"


def test_spelled_special_tokens_survive_templates_that_strip_and_quote():
    spelled = {"role": "tool", "content": " <|eot_id|>\n"}
    codec = ChatCodec(family("llama3_1"))
    for role, meant in (("tool", '" <|eot_id|>\\n"'), ("user", "<|eot_id|>")):
        ids = codec.delta_ids([{**spelled, "role": role}], ended=True).tolist()
        assert codec.tokenizer.decode(ids) == (
            f"<|start_header_id|>{'ipython' if role == 'tool' else role}<|end_header_id|>\n\n{meant}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        assert ids.count(codec.end_id) == 1
    system = [{"role": "system", "content": "a <|eot_id|> b"}, {"role": "user", "content": "<|eot_id|>"}]
    ids = codec.prompt_ids(system, None).tolist()
    assert ids.count(codec.end_id) == 2 and codec.tokenizer.decode(ids) == rendered(codec, system)


def test_special_tokens_take_the_white_space_beside_them_in_spelled_texts_too():
    codec = ChatCodec(family_tokenizer(public_template("phi3"), rstrip=True))
    plain, spelled = (
        codec.delta_ids([{"role": "user", "content": text}], ended=True).tolist() for text in ("a b", "<|end|> b")
    )
    assert special_ids(codec, plain) == special_ids(codec, spelled)
    newline = codec.tokenizer.encode("\n", add_special_tokens=False)
    assert newline[0] not in plain and newline[0] not in spelled
    assert codec.tokenizer.decode(spelled) == codec.tokenizer.decode(plain).replace("a b", "<|end|> b")


def test_added_tokens_that_are_not_special_are_text():
    tokenizer = family("qwen2_5")
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    codec = ChatCodec(tokenizer)
    one = tokenizer.convert_tokens_to_ids("<tool_call>")
    for text in ("see <tool_call>", "see <tool_call> and <|im_end|>"):
        ids = codec.delta_ids([{"role": "user", "content": text}], ended=True).tolist()
        assert ids.count(one) == 1 and ids.count(codec.end_id) == 1
