"""Warm start: supervised learning on an oracle's trajectories, so that reinforcement learning has successes to build on.

Invariant: a trajectory is made by stepping the real environment with the oracle's text, so the tokens have exactly the form
that they will have when the model acts; only the oracle's actions are trained.

Two phases (docs/algorithm.md): first every number of hops, then mostly easy questions, which leaves success spread widely:
nearly all one-hop questions answered, nearly none of the six-hop ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.learner import micro_batches
from agents.policies.chat import ChatCodec, new_messages
from agents.renaming import Renamer
from agents.tiny import build_model, build_tokenizer
from trace_envs.multihop_qa import MultiHopQAEnv, QADataset, QATask
from trace_envs.multihop_qa.oracle import oracle_action

MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Phase:
    """One stretch of supervised training.

    Attributes:
        steps: Optimiser steps.
        hops: Share of each number of hops among the questions, from one hop on; they are normalised.
        lr: Peak step size; it warms up over a tenth of the phase and decays to a tenth.
    """

    steps: int
    hops: tuple[float, ...]
    lr: float = 1e-3


@dataclass(frozen=True)
class WarmStartConfig:
    """Settings of `warm_start`.

    Attributes:
        phases: See `Phase`.
        batch_size: Trajectories in a step.
        noise: Chance that the oracle issues a bad query, from which it then recovers.
        rename: Give the entities of each trajectory other names (`agents.renaming`).
        width, layers, heads: Shape of the model.
        vocab_size: Limit on the tokenizer's vocabulary.
        seed: Seeds weights, questions and mistakes.
        env: Arguments of the environment.
    """

    phases: tuple[Phase, ...] = (Phase(600, (1, 1, 1, 1, 1, 1)), Phase(150, (6, 5, 3, 0.6, 0.1, 0.0), 3e-4))
    batch_size: int = 48
    noise: float = 0.1
    rename: bool = True
    width: int = 128
    layers: int = 3
    heads: int = 4
    vocab_size: int = 1024
    seed: int = 0
    env: dict[str, Any] = field(default_factory=lambda: {"top_k": 2, "system_prompt": ""})


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Token ids and the mask of those that are trained (the oracle's actions), both [n]."""

    ids: np.ndarray
    mask: np.ndarray


def tokenizer_texts(data: QADataset) -> list[str]:
    """Returns the text that the tokenizer is trained on: passages, questions, notes and queries of a data set."""
    texts = [f" {p.title}: {p.text}" for p in data.passages]
    for task in data.tasks:
        texts.append(task.prompt)
        texts += [text for step in task.steps for text in (step.finding, *step.queries)]
    return [*texts, "First the", "Not found.", *[a for t in data.tasks for a in t.answers if t.kind == "yes_no"]]


def oracle_trajectory(
    env: MultiHopQAEnv, codec: ChatCodec, task: QATask, rng: np.random.Generator, noise: float
) -> Trajectory:
    """Lets the oracle answer one question and returns the tokens of the conversation."""
    env.reset(seed=int(rng.integers(2**31)), options={"task_id": task.task_id})
    ids, mask = [codec.prompt_ids(env.messages(), env.tools)], []
    mask.append(np.zeros(len(ids[0]), bool))
    while True:
        text = env.action_format.render(*oracle_action(task, list(env.state.turns()), rng, noise=noise))
        action = np.array([*codec.tokenizer.encode(text, add_special_tokens=False), codec.end_id], dtype=np.int64)
        ids.append(action)
        mask.append(np.ones(len(action), bool))
        _, _, terminated, truncated, info = env.step(text)
        if terminated or truncated:
            return Trajectory(np.concatenate(ids), np.concatenate(mask))
        ids.append(codec.delta_ids(new_messages(info["messages"]), ended=True))
        mask.append(np.zeros(len(ids[-1]), bool))


def supervised_loss(model: Any, batch: Sequence[Trajectory]) -> torch.Tensor:
    """Returns the summed negative log-likelihood of the trained tokens, in nats."""
    ids = torch.zeros(len(batch), max(len(t.ids) for t in batch), dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, t in enumerate(batch):
        ids[i, : len(t.ids)] = torch.from_numpy(t.ids)
        mask[i, : len(t.ids)] = torch.from_numpy(t.mask)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    rows, positions = mask[:, 1:].nonzero(as_tuple=True)
    logits = model.get_output_embeddings()(hidden[rows, positions])
    return torch.nn.functional.cross_entropy(logits, ids[rows, positions + 1], reduction="sum")


def warm_start(
    config: WarmStartConfig, directory: str | Path, *, progress: Callable[[int, float], None] | None = None
) -> tuple[Any, Any]:
    """Trains the tiny agent from random weights and saves it as a transformers folder.

    Args:
        config: See `WarmStartConfig`.
        directory: Where the folder goes.
        progress: Called with the step and the loss.

    Returns:
        The model and its tokenizer.
    """
    env = MultiHopQAEnv(split="train", **config.env)
    tokenizer = build_tokenizer(tokenizer_texts(env.dataset), vocab_size=config.vocab_size)
    model = build_model(len(tokenizer), width=config.width, layers=config.layers, heads=config.heads, seed=config.seed)
    codec = ChatCodec(tokenizer)
    rename = Renamer(tokenizer) if config.rename else None
    rng = np.random.default_rng([config.seed, 0x5F7])
    by_hops: dict[int, list[QATask]] = {}
    for task in env.dataset.tasks:
        by_hops.setdefault(task.hops, []).append(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01, betas=(0.9, 0.98))
    done = 0
    for phase in config.phases:
        share = np.array(phase.hops, dtype=float) / sum(phase.hops)
        for step in range(phase.steps):
            hops = rng.choice(len(share), size=config.batch_size, p=share) + 1
            tasks = [by_hops[int(h)][int(rng.integers(len(by_hops[int(h)])))] for h in hops]
            batch = [oracle_trajectory(env, codec, t, rng, config.noise) for t in tasks]
            if rename is not None:
                batch = [Trajectory(rename(t.ids, rng), t.mask) for t in batch]
            warm = min(1.0, (step + 1) / max(phase.steps // 10, 1))
            decay = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * step / phase.steps))
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * warm * decay
            optimizer.zero_grad(set_to_none=True)
            trained = sum(int(t.mask.sum()) for t in batch)
            total = 0.0
            for part in micro_batches(batch, MICRO_TOKENS):
                loss = supervised_loss(model, part) / trained
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            if progress is not None:
                progress(done, total)
    directory = Path(directory)
    model.eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer
