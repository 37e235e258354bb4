"""Short training runs in the environment of the tests, and what they leave."""

import os
from contextlib import closing
from pathlib import Path

import torch

from agents.checkpoint import list_checkpoints
from agents.models import load_model
from agents.runlog import read_jsonl
from agents.trainer import Trainer

DATA = Path(os.environ.get("TRACE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


def train(config, resume=False):
    trainer = Trainer(config, resume=resume)
    with closing(trainer):
        trainer.run()
    return trainer


def metrics(config):
    """The run's records without what depends on the clock."""
    records = read_jsonl(config.directory / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def weights(config):
    model, _ = load_model(str(list_checkpoints(config.directory / "checkpoints")[-1]))
    return torch.cat([p.flatten() for p in model.parameters()])
