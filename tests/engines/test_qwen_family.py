import base64

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qwen_family import CHATML, EMBEDDINGS, PATTERN, PLAIN, SPECIAL, qwen_tokenizer, ranks_file, save_tiny_qwen

from agents.models import load_model
from agents.policies.chat import ChatCodec, new_messages
from agents.tokenizer_checks import check_tokenizer

pytestmark = pytest.mark.data

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab <|>\n'sé1漢", max_size=40)


@pytest.fixture(scope="module")
def tokenizer(data_dir):
    if not ranks_file(data_dir).is_file():
        pytest.skip(f"no BPE ranks in {ranks_file(data_dir)}")
    return qwen_tokenizer(data_dir)


@pytest.fixture(scope="module")
def tiktoken_encoding(data_dir, tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    lines = ranks_file(data_dir).read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    special = {token: len(ranks) + i for i, token in enumerate([*SPECIAL, *PLAIN])}
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def test_special_tokens_have_the_ids_of_qwen3(tokenizer):
    ids = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<tool_call>": 151657, "<think>": 151667, "</think>": 151668}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert len(tokenizer) == 151669 < EMBEDDINGS
    assert set(tokenizer.all_special_tokens) == {"<|im_end|>", "<|endoftext|>"}
    assert {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} == set(SPECIAL)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS)
def test_encodings_are_those_of_tiktoken(tokenizer, tiktoken_encoding, text):
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    ids = tokenizer.encode(text)
    assert ids == tiktoken_encoding.encode(normal, allowed_special="all")
    assert tokenizer.decode(ids) == normal


def test_a_whole_page_is_encoded_as_by_tiktoken(tokenizer, tiktoken_encoding):
    page = (ranks_file().parent.parent / "README.md").read_text() + tokenizer.chat_template
    assert tokenizer.encode(page) == tiktoken_encoding.encode(page, allowed_special="all")


def test_a_saved_model_is_loaded_and_talks_in_its_template(tmp_path, data_dir, tokenizer):
    model, _ = save_tiny_qwen(tmp_path, data_dir)
    loaded, words = load_model(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert words.get_vocab() == tokenizer.get_vocab() and words.chat_template == tokenizer.chat_template
    codec = ChatCodec(words)
    assert check_tokenizer(loaded, words, codec) == {151643, 151645}
    assert codec.end_id == 151645 and "drops or rewrites earlier thoughts" in codec.rewrites_history
    ids = torch.from_numpy(codec.prompt_ids([{"role": "user", "content": "Who?"}], None))[None]
    assert loaded(ids).logits.shape == (1, ids.shape[1], EMBEDDINGS)
    # Ids that no token has may be sampled: the embeddings are padded.
    assert codec.text_of([151_700, 151_645]) == ""


def test_the_short_template_says_the_same(tokenizer):
    short = qwen_tokenizer(template=CHATML)
    codecs = [ChatCodec(tokenizer), ChatCodec(short)]
    assert codecs[1].rewrites_history == ""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    prompts = [codec.prompt_ids(messages, None).tolist() for codec in codecs]
    assert prompts[0] == prompts[1]
    for role in ("user", "tool"):
        result = [{"role": role, "content": "Nobody <|im_end|> knows."}]
        deltas = [codec.delta_ids(new_messages(result), ended=True).tolist() for codec in codecs]
        assert deltas[0] == deltas[1] and deltas[0].count(151645) == 1


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.lists(st.sampled_from([*SPECIAL, " ", "\n", "QvSpelled1Qv"]) | TEXTS, max_size=5).map("".join))
def test_no_text_becomes_a_special_token_of_qwen(tokenizer, text):
    codec = ChatCodec(tokenizer)
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    plain, shown = (
        codec.delta_ids([{"role": "tool", "content": content}], ended=True).tolist() for content in ("plain", text)
    )
    assert [i for i in shown if i in special] == [i for i in plain if i in special]
    meant = tokenizer.decode(plain).replace("plain", text)
    assert tokenizer.decode(shown) == tokenizer.backend_tokenizer.normalizer.normalize_str(meant)
