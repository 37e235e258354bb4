"""Fixtures of the tests that need a model: an environment in which any text is an action, and a random model."""

import echo_env
import pytest
import torch
from echo_env import echo_forest, random_model

from agents.config import TrainConfig
from agents.tiny import build_tokenizer
from allocation import TracePlusConfig

TEXTS = [
    "Say a b c a b c",
    "12 letters and more and more and more",
    "Error: no passage holds any word of the query.",
] * 3


@pytest.fixture(scope="session", autouse=True)
def _registered():
    echo_env.register()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture
def make_model(tokenizer):
    return lambda seed=0, **config: random_model(tokenizer, seed, **config)


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer)


@pytest.fixture(scope="module")
def sampled(model, tokenizer):
    """A forest with branches, sampled at temperature 1. Read only."""
    forest = echo_forest(model, tokenizer)
    assert forest.ledger.continuations > 8 and forest.effective_ratio() > 0
    return forest


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    random_model(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def config(folder, tmp_path):
    return TrainConfig(
        env_id="Echo-v0",
        model=str(folder),
        trace_plus=TracePlusConfig(pool_factor=2.0),
        budget=16,
        updates=3,
        lr=3e-3,
        max_new_tokens=6,
        num_envs=6,
        eval_per_level=2,
        checkpoint_every=1,
        runs=tmp_path / "runs",
        name="one",
        threads=1,
    )
