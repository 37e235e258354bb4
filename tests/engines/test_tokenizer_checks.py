import copy
import logging

import pytest
from template_families import family
from transformers import GenerationConfig

from agents.policies.chat import ChatCodec
from agents.tiny import build_model
from agents.tokenizer_checks import check_tokenizer, check_vocabulary, model_stop_ids


@pytest.fixture(scope="module")
def codec():
    return ChatCodec(family("qwen3"))


@pytest.fixture
def model(codec):
    return build_model(len(codec.tokenizer), width=32, layers=1)


def named(model, ids):
    model.generation_config = GenerationConfig(eos_token_id=ids)
    return model


@pytest.mark.parametrize("ids", [None, 3, [3], [3, 1]])
@pytest.mark.parametrize("inner", [None, 5, [5, 6]])
def test_stop_ids_are_those_of_the_generation_config_else_of_the_model(model, ids, inner):
    model.config.eos_token_id = inner
    expected = ids if ids is not None else inner
    expected = [] if expected is None else [expected] if isinstance(expected, int) else expected
    assert model_stop_ids(named(model, ids)) == set(expected)


def test_end_tokens_of_another_vocabulary_end_nothing(codec, model, caplog):
    assert model_stop_ids(named(model, [codec.end_id, 50_256])) == {codec.end_id}
    with caplog.at_level(logging.WARNING):
        assert check_tokenizer(named(model, 50_256), codec.tokenizer, codec) == frozenset()
    assert not caplog.records


def test_a_model_and_its_tokenizer_pass(codec, model, caplog):
    with caplog.at_level(logging.WARNING):
        for ids in (None, codec.end_id, [codec.end_id, 3]):
            stops = check_tokenizer(named(model, ids), codec.tokenizer, codec)
            assert stops == model_stop_ids(model)
            assert ChatCodec(codec.tokenizer, None, stops).stop_ids == codec.stop_ids | stops
    assert not caplog.records


def test_a_model_that_may_never_end_its_turns_is_warned_of(codec, model, caplog):
    with caplog.at_level(logging.WARNING):
        assert check_tokenizer(named(model, [5, 2]), codec.tokenizer, codec) == {2, 5}
    [record] = caplog.records
    assert (
        f"ends messages with '<|im_end|>' (id {codec.end_id}), which is not among the end tokens [2, 5]"
        in record.message
    )


def test_ids_without_an_embedding_are_refused(codec, model):
    size = len(codec.tokenizer)
    small = build_model(size - 1, width=32, layers=1)
    with pytest.raises(
        ValueError, match=rf"has {size} ids and the model embeddings for {size - 1}: pass the tokenizer"
    ):
        check_tokenizer(small, codec.tokenizer, codec)
    beyond = ChatCodec(codec.tokenizer, None, [size])
    with pytest.raises(
        ValueError, match=rf"end tokens \[{size}\] are unknown to the model, .* {size} ids: correct the stop_ids"
    ):
        check_tokenizer(named(model, codec.end_id), codec.tokenizer, beyond)
    check_tokenizer(build_model(size + 5, width=32, layers=1), codec.tokenizer, codec)  # padded, as many are
    check_vocabulary(model, codec.tokenizer, model)


def test_a_tokenizer_without_an_end_token_is_told_which_to_set(codec, model):
    tokenizer = copy.deepcopy(codec.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no eos_token; set tokenizer.eos_token = '<\|im_end\|>'"):
        check_tokenizer(model, tokenizer, ChatCodec(tokenizer))
    tokenizer.eos_token = "<|im_end|>"
    check_tokenizer(model, tokenizer, ChatCodec(tokenizer))
