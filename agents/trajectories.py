"""Sequences for supervised learning: an oracle's trajectories, and drills in reading.

Invariant: a trajectory is made by stepping the real environment with the oracle's text, so the tokens have exactly the form
that they will have when the model acts; only what the agent writes is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agents.policies.chat import ChatCodec, new_messages
from trace_envs.env import ToolEnv
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.multihop_qa.retrieval import format_passages
from trace_envs.multihop_qa.synthetic.relations import FINDING


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Token ids and the mask of those that are trained (the oracle's actions), both [n]."""

    ids: np.ndarray
    mask: np.ndarray


def oracle_trajectory(
    env: ToolEnv, codec: ChatCodec, task_id: str, rng: np.random.Generator, noise: float
) -> Trajectory:
    """Lets the environment's oracle do one task and returns the tokens of the conversation."""
    env.reset(seed=int(rng.integers(2**31)), options={"task_id": task_id})
    ids, mask = [codec.prompt_ids(env.messages(), env.tools_at(env.state))], []
    mask.append(np.zeros(len(ids[0]), bool))
    while True:
        text = env.write(*env.oracle(env.state, rng, noise))
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
