"""Warm start: supervised learning on an oracle's trajectories, so that reinforcement learning has successes to build on.

Invariant: a trajectory is made by stepping the real environment with the oracle's text, so the tokens have exactly the form
that they will have when the model acts; only what the agent writes is trained.

*Reading drills* come first: the result of a search and every fact in it, several facts a sequence, because finding a value in
a text is what takes a small model longest, and a trajectory practises it once a turn. Then come trajectories, most of them
of few hops, which leaves success spread widely: most one-hop questions are answered, hardly any six-hop ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.layout import grouped
from agents.policies.chat import ChatCodec, new_messages
from agents.renaming import Renamer
from agents.tiny import build_model, build_tokenizer
from trace_envs.multihop_qa import MultiHopQAEnv, QADataset, QATask
from trace_envs.multihop_qa.oracle import oracle_action
from trace_envs.multihop_qa.retrieval import format_passages
from trace_envs.multihop_qa.synthetic.relations import FINDING

MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Phase:
    """One stretch of supervised training.

    Attributes:
        steps: Optimiser steps.
        hops: Share of each number of hops among the questions, from one hop on; they are normalised. Empty for reading drills.
        lr: Peak step size; it warms up over a tenth of the phase and decays to a tenth.
    """

    steps: int
    hops: tuple[float, ...] = ()
    lr: float = 5e-4


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
        bfloat16: Multiply matrices in bfloat16, which is faster where the processor knows it.
        seed: Seeds weights, questions and mistakes.
        env: Arguments of the environment.
    """

    phases: tuple[Phase, ...] = (
        Phase(1200),
        Phase(800, (4, 4, 3, 1, 0.3, 0.1)),
        Phase(1500, (4, 4, 3, 1.5, 0.6, 0.3), 8e-4),
        Phase(700, (6, 4, 3, 1, 0.3, 0.1)),
    )
    batch_size: int = 32
    noise: float = 0.1
    rename: bool = True
    width: int = 128
    layers: int = 3
    heads: int = 4
    vocab_size: int = 1024
    bfloat16: bool = True
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


class ReadingDrills:
    """Makes sequences that practise reading: the result of a search, then the facts in it, as an agent would note them.

    Args:
        env: Supplies questions, passages and search.
        codec: Supplies tokens.
    """

    def __init__(self, env: MultiHopQAEnv, codec: ChatCodec):
        self._env, self._codec = env, codec
        self._facts: dict[str, dict[tuple[str, str], str]] = {}
        for task in env.dataset.tasks:
            for step in task.steps:
                self._facts.setdefault(step.title, {})[step.subject, step.relation] = step.value
        self._titles = list(self._facts)

    def __call__(self, rng: np.random.Generator) -> Trajectory:
        """Returns one drill."""
        while True:
            title = self._titles[int(rng.integers(len(self._titles)))]
            subject, relation = list(self._facts[title])[int(rng.integers(len(self._facts[title])))]
            found, _ = self._env.index.search(f"{subject} {relation}", self._env.top_k)
            passages = [self._env.dataset.passages[int(i)] for i in found]
            stated = [(r, v) for p in passages for (_, r), v in self._facts.get(p.title, {}).items()]
            # A relation that two passages state has two values, and the note does not say of whom.
            names = [r for r, _ in stated]
            facts = [stated[i] for i in rng.permutation(len(stated)) if names.count(stated[i][0]) == 1]
            if facts:
                return self._trajectory(format_passages(passages), facts)

    def _trajectory(self, observation: str, facts: Sequence[tuple[str, str]]) -> Trajectory:
        parts = [self._codec.delta_ids([{"role": "tool", "content": observation}], ended=True)]
        mask = [np.zeros(len(parts[0]), bool)]
        for i, (relation, value) in enumerate(facts):
            text = FINDING.format(relation=relation, value=value)
            ids = self._codec.tokenizer.encode(" " * (i > 0) + text, add_special_tokens=False)
            rest = self._codec.tokenizer.encode(f" {value}.", add_special_tokens=False)
            parts.append(np.array(ids, dtype=np.int64))
            mask.append(np.arange(len(ids)) >= len(ids) - len(rest))
        return Trajectory(np.concatenate(parts), np.concatenate(mask))


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


class _Batches:
    """Draws the batches of a phase."""

    def __init__(self, config: WarmStartConfig, env: MultiHopQAEnv, tokenizer: Any):
        self._config, self._env = config, env
        self._codec = ChatCodec(tokenizer)
        self._drill = ReadingDrills(env, self._codec)
        self._rename = Renamer(tokenizer) if config.rename else None
        self._by_hops: dict[int, list[QATask]] = {}
        for task in env.dataset.tasks:
            self._by_hops.setdefault(task.hops, []).append(task)

    def __call__(self, phase: Phase, rng: np.random.Generator) -> list[Trajectory]:
        size = self._config.batch_size
        if phase.hops:
            hops = rng.choice(len(phase.hops), size=size, p=np.array(phase.hops) / sum(phase.hops)) + 1
            tasks = [self._by_hops[int(h)][int(rng.integers(len(self._by_hops[int(h)])))] for h in hops]
            batch = [oracle_trajectory(self._env, self._codec, t, rng, self._config.noise) for t in tasks]
        else:
            batch = [self._drill(rng) for _ in range(size)]
        if self._rename is not None:
            batch = [Trajectory(self._rename(t.ids, rng), t.mask) for t in batch]
        return batch


def warm_start(
    config: WarmStartConfig, directory: str | Path, *, progress: Callable[[int, float], None] | None = None
) -> tuple[Any, Any]:
    """Trains the tiny agent from random weights and saves it as a transformers folder.

    Args:
        config: See `WarmStartConfig`.
        directory: Where the folder goes; the model as it was after phase k is kept beside it, in `<directory>-phase-<k>`.
        progress: Called with the step and the loss.

    Returns:
        The model and its tokenizer.
    """
    directory = Path(directory)
    env = MultiHopQAEnv(split="train", **config.env)
    tokenizer = build_tokenizer(tokenizer_texts(env.dataset), vocab_size=config.vocab_size)
    model = build_model(
        len(tokenizer),
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        seed=config.seed,
        end_id=int(tokenizer.eos_token_id),
    )
    batches = _Batches(config, env, tokenizer)
    done = 0
    for number, phase in enumerate(config.phases, 1):
        for loss in _train_phase(model, phase, number, config, batches):
            done += 1
            if progress is not None:
                progress(done, loss)
        folder = directory if number == len(config.phases) else directory.with_name(f"{directory.name}-phase-{number}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def _train_phase(model: Any, phase: Phase, number: int, config: WarmStartConfig, batches: _Batches) -> Iterator[float]:
    """Trains one phase, yielding the loss of each step.

    Optimiser and generator begin anew with each phase, so that a phase is a function of the model before it.
    """
    rng = np.random.default_rng([config.seed, number])
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step in range(phase.steps):
        batch = batches(phase, rng)
        warm = min(1.0, (step + 1) / max(phase.steps // 10, 1))
        decay = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * step / phase.steps))
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * warm * decay
        optimizer.zero_grad(set_to_none=True)
        trained = sum(int(t.mask.sum()) for t in batch)
        total = 0.0
        for part in grouped([len(t.ids) for t in batch], MICRO_TOKENS):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bfloat16):
                loss = supervised_loss(model, [batch[i] for i in part]) / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield total
