"""Settings of the learner that make no sense are refused where they are given."""

import math

import pytest

from agents.learner_config import LearnerConfig, LoraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "gea"}, "unknown estimator 'gea'; known: .*gae"),
        ({"aggregation": "sum"}, "unknown aggregation 'sum'; known: prompt, trajectory, edge, token"),
        ({"lr_schedule": "step"}, "unknown lr_schedule 'step'; known: linear, cosine, constant"),
        ({"kl_estimator": "k2"}, "unknown kl_estimator 'k2'; known: k1, k3"),
        ({"importance": "clipped"}, "unknown importance 'clipped'; known: auto, none, truncated"),
        ({"layout": "padded"}, "unknown layout 'padded'; known: packed, flat"),
        ({"precision": "float16"}, "unknown precision 'float16'; known: float32, bfloat16"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"minibatches": 0}, "minibatches must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"importance_cap": math.nan}, "importance_cap must be positive, got nan"),
        ({"kl_coef": -0.1}, "kl_coef must not be negative, got -0.1"),
        ({"entropy_coef": math.nan}, "entropy_coef must not be negative, got nan"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, or 0 for none, got 1.0"),
        ({"gamma": 1.1}, "gamma must be between 0 and 1, got 1.1"),
        ({"gae_lambda": -0.1}, "gae_lambda must be between 0 and 1, got -0.1"),
        ({"lora": LoraConfig(rank=-1)}, "lora.rank must not be negative, got -1"),
        ({"lora": LoraConfig(alpha=0.0)}, "lora.alpha must be positive, got 0.0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LearnerConfig(**settings)
