"""Whether a tokenizer, its chat template and a model belong together.

Invariant: every id that a policy can be shown or that ends an action is one that the model has an embedding for. Nothing here
changes the model or the tokenizer.
"""

from __future__ import annotations

import logging
from typing import Any

from agents.policies.chat import ChatCodec

logger = logging.getLogger(__name__)


def check_tokenizer(model: Any, tokenizer: Any, codec: ChatCodec) -> frozenset[int]:
    """Checks that a model can converse in the tokens of a tokenizer and its chat template.

    Warns if the model's generation config names end tokens, and the one of the chat template is not among them: the model may
    never have learned to end its turns with it (base models), so that actions run into the token limit.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        codec: The codec of its chat template; having been built, it has refused a tokenizer without a usable template.

    Returns:
        The tokens that end a text by the model's configuration (`model_stop_ids`).

    Raises:
        ValueError: The tokenizer has no `eos_token`, or it or the codec has ids that the model has no embedding for.
    """
    check_vocabulary(model, tokenizer)
    end = tokenizer.convert_ids_to_tokens(codec.end_id)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer has no eos_token; set tokenizer.eos_token = {end!r}, which ends a message here"
        )
    size, stops = _vocabulary(model), model_stop_ids(model)
    if unknown := sorted(i for i in codec.stop_ids if i >= size):
        raise ValueError(
            f"the end tokens {unknown} are unknown to the model, which has embeddings for {size} ids: correct the stop_ids of "
            "the codec, or pass the tokenizer that was saved with the model"
        )
    if stops and codec.end_id not in stops:
        logger.warning(
            "the chat template ends messages with %r (id %d), which is not among the end tokens %s of the model's generation "
            "config: a model that was not trained on this template may never sample it, and its turns run into the token limit",
            end,
            codec.end_id,
            sorted(stops),
        )
    return stops


def model_stop_ids(model: Any) -> frozenset[int]:
    """Returns the tokens that end a text by a model's generation config, or by its configuration if that names none.

    Ids that the model has no embedding for are left out: default configurations name end tokens of another vocabulary.
    """
    named = (model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id)
    ids = next((ids for ids in named if ids is not None), ())
    return frozenset(i for i in ([ids] if isinstance(ids, int) else ids) if i < _vocabulary(model))


def check_vocabulary(model: Any, tokenizer: Any, reference_model: Any = None) -> None:
    """Checks that every id means the same to tokenizer, policy and reference, as far as sizes show it.

    Args:
        model: The policy's model.
        tokenizer: The policy's tokenizer.
        reference_model: The reference's model; `None` without one.

    Raises:
        ValueError: The tokenizer has ids that the model has no embedding for, or policy and reference have vocabularies of
            different sizes.
    """
    size = _vocabulary(model)
    if (ids := 1 + max(tokenizer.get_vocab().values())) > size:
        raise ValueError(
            f"the tokenizer has {ids} ids and the model embeddings for {size}: pass the tokenizer that was saved with the "
            f"model, or enlarge the model by model.resize_token_embeddings({ids})"
        )
    if reference_model is not None and (other := _vocabulary(reference_model)) != size:
        raise ValueError(
            f"the policy has a vocabulary of {size} tokens and the reference one of {other}, so their log-probs cannot be "
            f"compared: pass as reference the model that the policy started from, or set kl_coef=0"
        )


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])
