"""Policies by name: what samples in training, and what is evaluated.

Invariant: an engine that is not used is not imported.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from agents.lora import has_adapters
from agents.models import SHIPPED
from agents.policies.base import TrainablePolicy
from agents.policies.transformers_policy import TransformersPolicy

if TYPE_CHECKING:
    from agents.config import TrainConfig

logger = logging.getLogger(__name__)


def make_trainable(config: TrainConfig, model: Any, tokenizer: Any, *, entropy: bool = False) -> TrainablePolicy:
    """Returns the policy that a trainer samples with.

    Args:
        config: Settings of the run, resolved.
        model: The learner's model: the transformers policy samples from it; an engine loads the folder or hub id that it came
            from, and is given its adapters if it has any.
        tokenizer: Its tokenizer.
        entropy: Give each sample its mean entropy.

    Raises:
        ImportError: The engine is not installed.
        ValueError: The settings do not fit the model or the engine.
    """
    sampling = config.sampling
    if sampling.truncates:
        logger.warning(
            "top_p %g and top_k %d keep tokens from ever being sampled that the learner's distribution holds: its probability "
            "ratios are wrong by what was cut off, and entropy shrinks; leave them at 1 and 0 in training",
            sampling.top_p,
            sampling.top_k,
        )
    keywords: dict[str, Any] = {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}
    keywords |= {"entropy": entropy, "template_kwargs": config.template_kwargs}
    policy: TrainablePolicy
    if config.policy == "vllm":
        from agents.policies.vllm_policy import VLLMPolicy

        source = SHIPPED.get(model.name_or_path, model.name_or_path)
        policy = VLLMPolicy(source, tokenizer, engine=config.engine, **keywords)
        if has_adapters(model):
            policy.sync(model, 0)
    else:
        policy = TransformersPolicy(model, tokenizer, compile=config.compile, **keywords)
    say_template(policy)
    return policy


def say_template(policy: Any) -> None:
    """Logs once what the chat template would do to earlier turns and the tokens of a branch do not."""
    if policy.codec.rewrites_history:
        logger.warning("%s", policy.codec.rewrites_history)
