"""Warm start: supervised learning on an oracle's trajectories, so that reinforcement learning has successes to build on.

Invariant: a phase is a function of the model before it, the settings and the seed.

For multi-hop questions *reading drills* come first: the result of a search and every fact in it, several facts a sequence,
because finding a value in a text is what takes a small model longest, and a trajectory practises it once a turn. Then come
trajectories, most of them of low levels, which leaves success spread widely: most one-hop questions are answered, hardly any
six-hop ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.evaluate import make_env
from agents.layout import grouped
from agents.models import env_settings
from agents.policies.chat import ChatCodec
from agents.renaming import Renamer
from agents.tasks import ids_by_level
from agents.tiny import FORMAT_TOKENS, build_model, build_tokenizer, tokens_of_calls
from agents.trajectories import ReadingDrills, Trajectory, oracle_trajectory, supervised_loss
from trace_envs.env import ToolEnv
from trace_envs.multihop_qa import MultiHopQAEnv, QADataset
from trace_envs.multihop_qa.synthetic.names import split_countries, split_words

MICRO_TOKENS = 4096
TOKENIZER_TASKS = 600


@dataclass(frozen=True)
class Phase:
    """One stretch of supervised training.

    Attributes:
        steps: Optimiser steps.
        levels: Share of each level (number of hops, for instance) among the tasks, from level 1 on; they are normalised. Empty
            for reading drills, which multi-hop questions have.
        lr: Peak step size; it warms up over a tenth of the phase and decays to a tenth.
    """

    steps: int
    levels: tuple[float, ...] = ()
    lr: float = 5e-4


MULTI_HOP = (
    Phase(1200),
    Phase(800, (4, 4, 3, 1, 0.3, 0.1)),
    Phase(1500, (4, 4, 3, 1.5, 0.6, 0.3), 8e-4),
    Phase(700, (6, 4, 3, 1, 0.3, 0.1)),
)
OTHERS = (Phase(600, (4, 4, 3, 1, 0.3, 0.1), 1e-3), Phase(300, (6, 4, 3, 1, 0.3, 0.1)))
MATHS = (Phase(600, (4, 4, 3, 1, 0.3, 0.1), 1e-3), Phase(200, (6, 4, 3, 1, 0.3, 0.1)))
PHASES = {"TraceMultiHopQA-v0": MULTI_HOP, "TraceMath-v0": MATHS}
"""How long each shipped agent learns; `OTHERS` for environments that are not named."""


@dataclass(frozen=True)
class WarmStartConfig:
    """Settings of `warm_start`.

    Attributes:
        env_id: An environment with an oracle.
        phases: See `Phase`.
        batch_size: Trajectories in a step.
        noise: Chance that the oracle makes a mistake, from which it then recovers.
        rename: Give the entities of each trajectory other names (`agents.renaming`).
        width, layers, heads: Shape of the model.
        vocab_size: Limit on the tokenizer's vocabulary.
        bfloat16: Multiply matrices in bfloat16, which is faster where the processor knows it.
        seed: Seeds weights, tasks and mistakes.
        env: Arguments of the environment.
    """

    env_id: str = "TraceMultiHopQA-v0"
    phases: tuple[Phase, ...] = MULTI_HOP
    batch_size: int = 32
    noise: float = 0.1
    rename: bool = True
    width: int = 128
    layers: int = 3
    heads: int = 4
    vocab_size: int = 1024
    bfloat16: bool = True
    seed: int = 0
    env: dict[str, Any] = field(default_factory=lambda: dict(env_settings("tiny", "TraceMultiHopQA-v0")))


def config_for(env_id: str, seed: int = 0) -> WarmStartConfig:
    """Returns the settings of the shipped agent of an environment."""
    phases = PHASES.get(env_id, OTHERS)
    return WarmStartConfig(env_id=env_id, phases=phases, seed=seed, env=dict(env_settings("tiny", env_id)))


def tokenizer_texts(data: QADataset) -> list[str]:
    """Returns the text that the tokenizer is trained on: passages, questions, notes and queries of a data set."""
    texts = [f" {p.title}: {p.text}" for p in data.passages]
    for task in data.tasks:
        texts.append(task.prompt)
        texts += [text for step in task.steps for text in (step.finding, *step.queries)]
    return [*texts, "First the", "Not found.", *[a for t in data.tasks for a in t.answers if t.kind == "yes_no"]]


def make_tokenizer(env: ToolEnv, config: WarmStartConfig) -> Any:
    """Returns a tokenizer for the texts of an environment."""
    if isinstance(env, MultiHopQAEnv):
        return build_tokenizer(tokenizer_texts(env.dataset), vocab_size=config.vocab_size, format_tokens=FORMAT_TOKENS)
    rng = np.random.default_rng([config.seed, 0])
    ids = env.task_ids()
    # Every chunk of a name, so that each gets its token (`Renamer`).
    texts = [f" {word} {word}" for word in (*split_words("train"), *split_countries("train"))]
    calls: dict[str, None] = {}
    for i in rng.permutation(len(ids))[:TOKENIZER_TASKS]:
        env.reset(seed=int(rng.integers(2**31)), options={"task_id": ids[i]})
        while not env.state.done:
            calls |= dict.fromkeys(tokens_of_calls(env.tools_at(env.state)))
            env.step(env.write(*env.oracle(env.state, rng, config.noise)))
        texts += [message["content"] for message in env.messages()]
    # A digit is a token, the same one with and without a space before it: numbers are copied from texts into calls.
    return build_tokenizer(texts, vocab_size=config.vocab_size, format_tokens=tuple(calls), numbers="[0-9]")


class _Batches:
    """Draws the batches of a phase."""

    def __init__(self, config: WarmStartConfig, env: ToolEnv, tokenizer: Any):
        self._config, self._env = config, env
        self._codec = ChatCodec(tokenizer)
        self._drill = ReadingDrills(env, self._codec) if isinstance(env, MultiHopQAEnv) else None
        self._rename = Renamer(tokenizer) if config.rename else None
        self._by_level = ids_by_level(env)
        for phase in config.phases:
            missing = [i for i, share in enumerate(phase.levels, 1) if share and i not in self._by_level]
            if missing or (not phase.levels and self._drill is None):
                known = ", ".join(map(str, sorted(self._by_level)))
                what = (
                    f"has no tasks of level {missing[0]}; its levels are {known}"
                    if missing
                    else "has no reading drills"
                )
                raise ValueError(f"environment {config.env_id!r} {what}: change the phases")

    def __call__(self, phase: Phase, rng: np.random.Generator) -> list[Trajectory]:
        size = self._config.batch_size
        if phase.levels:
            levels = rng.choice(len(phase.levels), size=size, p=np.array(phase.levels) / sum(phase.levels)) + 1
            tasks = [self._by_level[int(n)][int(rng.integers(len(self._by_level[int(n)])))] for n in levels]
            batch = [oracle_trajectory(self._env, self._codec, t, rng, self._config.noise) for t in tasks]
        else:
            assert self._drill is not None
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
    env = make_env(config.env_id, {**config.env, "split": "train"}).unwrapped
    if not isinstance(env, ToolEnv):
        raise ValueError(f"environment {config.env_id!r} is none of the kind that has an oracle (a ToolEnv)")
    tokenizer = make_tokenizer(env, config)
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
